"""Whole runs on every kind of input and every kind of head, small."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.models import run_here
from support.runs import make_photos

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.sources.samples import list_folder
from headrace.extract.spec import BackboneSpec
from headrace.pipelines.api import extract_features, feature_matrix, train_heads
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.planning.extraction import read_extraction
from headrace.pipelines.planning.run_state import read_run_state
from headrace.pipelines.recipe.load import RecipeError, load_recipe

BACKBONE = """\
backbones:
  - name: torchvision:resnet18
    weights: random:0
    image_size: 32
    crop_fraction: 1.0
    taps: [{taps}]
"""
SMALL = "compute:\n  workers: 2\n  images_per_shard: 32\n"


def finish(tmp_path, text):
    """Run a recipe text to its end, in this process: test_run.py has workers."""
    (tmp_path / "recipe.yaml").write_text(text)
    return run_here(tmp_path / "recipe.yaml")


@pytest.mark.slow
def test_every_kind_of_head_and_augmented_views(tmp_path):
    """Two backbones, three views, maps for convolution heads, halving: all on one leaderboard."""
    make_photos(tmp_path / "photos", n=60)
    result = finish(
        tmp_path,
        "images:\n  folder: photos\ntask:\n  folds: 3\n"
        + BACKBONE.format(taps="layer2.avg, layer2.map")
        + "    alias: first\n    views: 3\n"
        + (
            "  - name: torchvision:squeezenet1_1\n    weights: random:0\n    image_size: 64\n    "
            "alias: second\n"
        )
        + "    taps: [features.12.avg]\n    views: 3\n"
        + (
            "heads:\n  logistic: {C: [0.1]}\n  ridge: {alpha: [10]}\n  knn: {k: [1, 3]}\n  "
            "centroid: {}\n"
        )
        + (
            "  mlp: {hidden: [[8]], dropout: [0.0, 0.2, 0.4, 0.6], epochs: 6, halving: {after: "
            "[2], keep: 0.5}}\n"
        )
        + "  conv: {channels: [[4]], epochs: 3}\n"
        + (
            "  sklearn:\n    - estimator: sklearn.tree.DecisionTreeClassifier\n      parameters: "
            "{max_depth: [1, 3]}\n"
        )
        + SMALL,
    )
    assert result.failed_heads == 0, result.heads["error"].dropna().unique()
    assert set(result.board["kind"]) == {
        "logistic",
        "ridge",
        "knn",
        "centroid",
        "mlp",
        "conv",
        "sklearn",
    }
    inputs = {kind: set(group["inputs"]) for kind, group in result.board.groupby("kind")}
    assert inputs["conv"] == {("first:layer2.map",)}
    both = ("first:layer2.avg", "second:features.12.avg")
    assert inputs["logistic"] == {both[:1], both[1:], both}
    assert [len(views) for views in result.feature_paths.values()] == [3, 3, 3]
    mlp = result.board[result.board["kind"] == "mlp"]
    assert mlp["final"].sum() == 2  # halving keeps half
    assert mlp["final"].iloc[0]
    assert result.board["final"].iloc[0]
    assert result.test.value > 0.8


@pytest.mark.slow
def test_tar_shards_and_arrays_give_what_files_give(tmp_path):
    """The same images as files, in a WebDataset shard and in an array: the same content, the same
    or equal features.
    """
    make_photos(tmp_path / "photos", n=40)
    files = list_folder(tmp_path / "photos")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name, path, label in files[["id", "path", "label"]].itertuples(index=False):
            for suffix, data in (("png", Path(path).read_bytes()), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{name.split('/')[1].split('.')[0]}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    np.save(
        tmp_path / "images.npy", np.stack([np.asarray(Image.open(path)) for path in files["path"]])
    )
    np.save(tmp_path / "labels.npy", (files["label"] == "fine").to_numpy().astype(np.int64))
    rest = (
        BACKBONE.format(taps="layer2.avg")
        + "heads:\n  logistic: {C: [0.1]}\ntask: {folds: 2}\n"
        + SMALL
    )
    by_file = finish(tmp_path, "images: {folder: photos}\n" + rest)
    by_tar = finish(tmp_path, "images: {tar: shard.tar}\n" + rest)
    assert (
        by_tar.features("layer2.avg").n_rows == by_file.features("layer2.avg").n_rows == 40
    )  # the same bytes: one row
    assert by_tar.test.images == 10
    by_array = finish(tmp_path, "images: {array: images.npy, labels: labels.npy}\n" + rest)
    assert by_array.test.value > 0.8
    assert by_array.features("layer2.avg").n_rows == 80  # an array's images have bytes of their own


@pytest.mark.slow
def test_multi_label_and_regression_runs(tmp_path):
    """Columns of 0/1, and numbers, from a table with Parquet's types."""
    make_photos(tmp_path / "photos", n=60)
    table = list_folder(tmp_path / "photos").rename(columns={"label": "pattern"})
    table["is_fine"] = (table["pattern"] == "fine").astype(int)
    table["is_coarse"] = 1 - table["is_fine"]
    table["period"] = np.where(table["is_fine"], 4.0, 16.0) + np.random.default_rng(0).normal(
        0, 0.1, len(table)
    )
    table.to_parquet(tmp_path / "table.parquet")
    rest = BACKBONE.format(taps="layer2.avg") + SMALL
    multi = finish(
        tmp_path,
        "images: {table: table.parquet, id_column: id}\n"
        "task: {kind: multi, target: [is_fine, is_coarse], folds: 3}\nheads:\n  logistic: {C: "
        "[1]}\n  mlp: {epochs: 5}\n" + rest,
    )
    assert multi.failed_heads == 0, multi.heads["error"].dropna().unique()
    assert multi.metric == "average_precision"
    assert multi.test.value > 0.8
    numbers = finish(
        tmp_path,
        "images: {table: table.parquet, id_column: id}\n"
        "task: {kind: regression, target: period, folds: 3}\nheads:\n  ridge: {alpha: [1, 10]}\n  "
        "mlp: {epochs: 5}\n" + rest,
    )
    assert numbers.failed_heads == 0, numbers.heads["error"].dropna().unique()
    assert numbers.metric == "r2"
    assert numbers.test.value > 0.5


@pytest.mark.slow
def test_the_stages_as_functions(tmp_path, monkeypatch):
    """extract_features and train_heads, called again with more, do only what is more; results are
    DataFrames.
    """
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", n=40)
    spec = BackboneSpec("torchvision:resnet18", weights="random:0", image_size=32)
    features = extract_features(
        "photos", spec, ["layer1.avg", "layer2.avg"], images_per_shard=16, workers=2
    )
    assert {name: feature.shape for name, feature in features.items()} == {
        "layer1.avg": (40, 64),
        "layer2.avg": (40, 128),
    }
    assert features["layer2.avg"][:3].dtype == np.float16
    paths = sorted(Path("photos").rglob("*.png"), reverse=True)
    matrix = feature_matrix(features["layer2.avg"], paths)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest()[:32] for path in paths]
    assert (matrix == features["layer2.avg"].load(hashes)).all()
    assert len(np.unique(matrix, axis=0)) == 40
    with pytest.raises(InvalidInput, match="1 of 2 images cannot be read"):
        feature_matrix(features["layer2.avg"], [paths[0], "gone.png"])
    samples = list_folder("photos")
    first = train_heads(features, samples, heads={"logistic": {"C": [0.1]}}, task={"folds": 2})
    more = train_heads(features, samples, heads={"logistic": {"C": [0.1, 1]}}, task={"folds": 2})
    assert isinstance(more.board, pd.DataFrame)
    assert len(more.board) == 2 * len(first.board)
    same = more.heads.merge(first.heads, on=["inputs", "spec", "fold", "path"])
    assert len(same) == len(
        first.heads
    )  # the first heads are the ones of the first call, in their own files


def test_inputs_of_different_views_are_refused_before_anything_is_extracted(tmp_path):
    """Mirror images of one network cannot stand beside the crop of another, and the message says
    what to write.
    """
    make_photos(tmp_path / "photos", n=20)
    text = (
        "images:\n  folder: photos\ntask:\n  folds: 2\n"
        + BACKBONE.format(taps="layer2.avg")
        + "    alias: first\n    views: flips\n"
        + (
            "  - name: torchvision:squeezenet1_1\n    weights: random:0\n    image_size: 64\n    "
            "alias: second\n"
        )
        + "    taps: [features.12.avg]\n    views: 4\n"
        + "heads:\n  centroid: {inputs: [INPUTS]}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text.replace("INPUTS", "all"))
    with pytest.raises(
        RecipeError, match=r"first:layer2.avg has 4, second:features.12.avg has 4.*inputs: \[each\]"
    ):
        read_run_state(load_recipe(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text(text.replace("INPUTS", "each"))
    assert read_run_state(load_recipe(tmp_path / "recipe.yaml")).plan.heads_total > 0
    assert not (tmp_path / "headrace-cache" / "features").exists()


def test_what_a_checkpoint_lacks_is_noted_in_every_run(tmp_path):
    """Also where the cache remembers the taps, and no network is built that could say it."""
    make_photos(tmp_path / "photos", n=12)
    network = load_backbone(BackboneSpec("torchvision:resnet18", "random:0"))
    tensors = {
        name: tensor
        for name, tensor in network.module.state_dict().items()
        if not name.startswith("fc.")
    }
    torch.save(tensors, tmp_path / "headless.pth")
    (tmp_path / "recipe.yaml").write_text(
        "images:\n  folder: photos\ntask:\n  folds: 2\n"
        + BACKBONE.format(taps="layer2.avg").replace("random:0", "headless.pth")
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    for _ in range(2):
        for notes in (read_run_state(recipe).notes, read_extraction(recipe).notes):
            (note,) = (note for note in notes if "headless.pth" in note)
            assert "not in the file, or of another shape there (2): fc.weight, fc.bias" in note
