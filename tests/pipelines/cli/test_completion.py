"""What the Tab key offers, and the table of `headrace backbones`."""

import os
from types import SimpleNamespace

import pytest
import torchvision.models
from support.caches import make_feature_set

from headrace.extract.backbones.published import published_weights
from headrace.pipelines.cli.completion import (
    complete_backbones,
    complete_feature_sets,
    complete_runs,
)


def test_backbones_with_and_without_their_library():
    """As people remember them."""
    assert complete_backbones("torchvision:resnet1") == [
        "torchvision:resnet101",
        "torchvision:resnet152",
        "torchvision:resnet18",
    ]
    assert "timm:vit_small_patch14_dinov2" in complete_backbones("vit_small_patch14")


def test_feature_sets_of_the_cache_that_is_named(tmp_path):
    """By fingerprint and by tap."""
    make_feature_set(tmp_path / "cache", 1)
    context = SimpleNamespace(params={"cache": tmp_path / "cache"})
    assert set(complete_feature_sets(context, "")) == {
        next((tmp_path / "cache" / "features").iterdir()).name,
        "blocks.4.avg",
    }
    assert complete_feature_sets(context, "blocks") == ["blocks.4.avg"]
    assert complete_feature_sets(SimpleNamespace(params={}), "") == []


def test_runs_and_recipes(tmp_path, monkeypatch):
    """Recipes, folders on the way, and the runs beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "headrace-runs" / "birds").mkdir(parents=True)
    (tmp_path / "birds.yaml").write_text("")
    (tmp_path / "birds.csv").write_text("")
    assert complete_runs("bi") == ["birds.yaml", os.path.join("headrace-runs", "birds")]
    assert complete_runs("headrace-runs/") == ["headrace-runs/birds"]


def test_published_weights_come_from_the_libraries_tables():
    """Accuracy, licence and size, the default weights first."""
    entry = torchvision.models.ResNet50_Weights.DEFAULT
    first = published_weights("torchvision:resnet50")[0]
    assert first.tag == entry.name
    assert first.imagenet_accuracy == pytest.approx(
        entry.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100
    )
    assert (first.image_size, first.classes) == (224, 1000)
    by_tag = {each.tag: each for each in published_weights("timm:resnet18")}
    assert by_tag["fb_swsl_ig1b_ft_in1k"].licence == "cc-by-nc-4.0"
    assert published_weights("timm:convnext_tiny")[0].tag == "in12k_ft_in1k"
    assert published_weights("python:module:function") == []
    # weights without a last layer name no classes
    assert None in {each.classes for each in published_weights("torchvision:vgg16")}
