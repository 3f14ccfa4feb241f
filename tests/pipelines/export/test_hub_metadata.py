"""The front matter of a model card, read by the Hub's own library."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from headrace.extract.spec import BackboneSpec
from headrace.pipelines.export.hub_metadata import hub_metadata
from headrace.pipelines.models.head import HeadModel


def model(*backbones, task_kind="single"):
    """As much of a model as its front matter looks at."""
    member = object.__new__(HeadModel)
    object.__setattr__(member, "head", SimpleNamespace(backbones=[vars(b) for b in backbones]))
    return SimpleNamespace(
        path=Path("runs/birds/winner"), task_kind=task_kind, members=(member,), weights=(1.0,)
    )


def read(text):
    return huggingface_hub.ModelCard(f"{text}\n\n# Image classifier\n").data


def test_the_hub_reads_scores_and_base_models():
    """Task, metric and value on the test split, and the networks by their names on the Hub."""
    data = read(
        hub_metadata(
            model(
                BackboneSpec("timm:resnet18"),
                BackboneSpec("transformers:facebook/dinov2-small"),
                BackboneSpec("torchvision:resnet50"),
            ),
            {"metric": "accuracy", "value": 0.91250001},
        )
    )
    assert data.base_model == ["facebook/dinov2-small", "timm/resnet18.a1_in1k"]
    assert data.pipeline_tag == "image-classification"
    (score,) = data.eval_results
    assert (score.metric_type, score.metric_value) == ("accuracy", pytest.approx(0.9125))


def test_values_are_no_classes_on_the_hub():
    """The score of a regression is of the task that the card names."""
    values = model(BackboneSpec("timm:resnet18"), task_kind="regression")
    data = read(hub_metadata(values, {"metric": "r2", "value": 0.5}))
    assert data.eval_results[0].task_type == data.pipeline_tag == "image-feature-extraction"
    assert "image-classification" not in data.tags


@pytest.mark.parametrize(
    "backbone",
    [
        BackboneSpec("timm:resnet18", weights="own.safetensors"),
        BackboneSpec("timm:resnet18", weights="random:0"),
        BackboneSpec("transformers:./folder/model"),
        BackboneSpec("python:mine:network"),
    ],
)
def test_weights_of_ones_own_have_no_name_on_the_hub(backbone):
    """Nothing is claimed of them, and no score where there was no test."""
    data = read(hub_metadata(model(backbone), None))
    assert data.base_model is None
    assert not data.eval_results
