"""What a run and `init` tell of a result: classes that accuracy hides, a winner on the edge, images
on both sides.
"""

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance
from support.evidence import content_of, store_taps, stored, task_of

from headrace.extract.images.content_hashes import hash_sample
from headrace.extract.images.locators import read_bytes
from headrace.heads.bags.kind import BagsSpec
from headrace.heads.data.task import Task
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.neighbors.kind import KNNSpec
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.sklearn.kind import SklearnSpec
from headrace.heads.spec import spec_to_json
from headrace.pipelines.cli.detect.source import detect_recipe
from headrace.pipelines.selection import signatures as signatures_module
from headrace.pipelines.selection.cautions import (
    grid_edges,
    hidden_classes,
    near_copies,
    near_duplicates,
    near_duplicates_text,
)
from headrace.pipelines.selection.predictions import validation_rows
from headrace.pipelines.selection.signatures import signatures


def told(folder, rare, found, rows=400):
    """What is said of a head that finds all of the common class, and a share of the rare one."""
    target = (np.arange(rows) % 100 < rare).astype(int)
    wrong = (target == 1) & (np.cumsum(target) % 10 >= 10 * found)
    side = np.where(wrong, 0, target)
    output = 0.98 * np.eye(2)[side] + 0.01
    board, task = stored(folder, "single", "accuracy", [output, output], target)
    return hidden_classes(board, validation_rows(task), "accuracy"), board, task


def test_an_accuracy_that_hides_a_class_is_told(tmp_path):
    """Nine in ten images right, and the rare class found in two of five: long before one class is
    nine tenths of all.
    """
    text, board, task = told(tmp_path, rare=17, found=0.4)
    assert "balanced accuracy is much lower than accuracy: 70" in text
    assert "class b is found in 4" in text
    assert "task.metric: balanced_accuracy" in text
    assert hidden_classes(board, validation_rows(task), "balanced_accuracy") is None
    assert told(tmp_path, rare=17, found=0.9)[0] is None


def test_a_few_images_of_a_class_prove_nothing(tmp_path):
    """Four of them, all missed."""
    assert told(tmp_path, rare=4, found=0.0, rows=100)[0] is None


def board_of(specs, scores, inputs=("a",)):
    order = np.argsort(-np.array(scores), kind="stable")
    rows = [
        {
            "inputs": inputs,
            "kind": specs[k].kind,
            "spec": spec_to_json(specs[k]),
            "accuracy": scores[k],
        }
        for k in order
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("values", "scores", "said"),
    [
        (
            [0.1, 1.0, 10.0],
            [0.7, 0.8, 0.9],
            "C=10 is the largest of 3 .* heads.logistic.C: [0.1, 1, 10, 100]",
        ),
        (
            [0.001, 0.003, 0.01],
            [0.9, 0.8, 0.7],
            "C=0.001 is the smallest of 3 .* heads.logistic.C: [0.0003, 0.001,",
        ),
        ([0.1, 1.0, 10.0], [0.7, 0.9, 0.8], None),
        ([0.1, 1.0, 10.0], [0.7, 0.9, 0.9], None),  # a tie is no sign that more would be better
        ([1.0], [0.9], None),
    ],
)
def test_a_winner_on_the_edge_of_its_grid_is_told_what_to_type(values, scores, said):
    """The list with the next value in its own steps."""
    found = grid_edges(board_of([LogisticSpec(value) for value in values], scores), "accuracy")
    if said is None:
        assert found == []
    else:
        (text,) = found
        for part in said.split(" .* "):
            assert part in text


def test_edges_are_looked_for_setting_by_setting():
    """On the line of the winner's other settings; one neighbour has nothing beyond it; an
    estimator's parameters count too.
    """
    nets = [MLPSpec((64,), rate, decay) for rate in (1e-3, 1e-2) for decay in (1e-2, 1e-1)]
    (text,) = grid_edges(
        board_of([*nets, MLPSpec((256,), 1.0, 10.0)], [0.7, 0.8, 0.95, 0.9, 0.6]), "accuracy"
    )[:1]
    assert "learning_rate=0.01 is the largest of 2" in text
    bags = [BagsSpec(learning_rate=rate) for rate in (1e-4, 1e-3)]
    (text,) = grid_edges(board_of(bags, [0.8, 0.9]), "accuracy")
    assert "heads.bags.learning_rate: [0.0001, 0.001, 0.01]" in text
    assert grid_edges(board_of([KNNSpec(1), KNNSpec(5)], [0.9, 0.8]), "accuracy") == []
    (text,) = grid_edges(
        board_of([KNNSpec(1), KNNSpec(5), KNNSpec(20)], [0.7, 0.8, 0.9]), "accuracy"
    )
    assert "heads.knn.k: [1, 5, 20, 80]" in text
    machines = [
        SklearnSpec("sklearn.svm.SVC", f'{{"C": {value}, "kernel": "rbf"}}') for value in (1, 10)
    ]
    (text,) = grid_edges(board_of(machines, [0.8, 0.9]), "accuracy")
    assert "parameters: C: [1, 10, 100]" in text


def split_of(target, test):
    whole = task_of(target)
    return tuple(
        Task(whole.kind, whole.classes, *[getattr(whole, name)[rows] for name in ("ids", "content", "target", "fold", "weight")])
        for rows in (~test, test)
    )  # fmt: skip


def test_near_duplicates_across_the_split_are_told(tmp_path):
    """By the features at hand, with the share of the test images; pairs on one side are none."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 16))
    test = np.arange(200) < 40
    train_task, test_task = split_of(rng.integers(0, 2, 200), test)
    clean = store_taps(tmp_path / "clean", {"a.avg": X})
    assert near_duplicates(train_task, test_task, clean, {}) is None
    X[100:108] = X[:8] + 0.01 * rng.normal(
        size=(8, 16)
    )  # eight test images have a partner in training
    X[39] = X[38] + 0.01 * rng.normal(size=16)  # both in the test split
    text = near_duplicates(train_task, test_task, store_taps(tmp_path / "leaky", {"a.avg": X}), {})
    assert "at least 8 pairs of images on different sides" in text
    assert "8 of 40 test images (20.0 %)" in text
    assert "task.group" in text


def test_pixels_find_what_features_only_make_likely(tmp_path, monkeypatch):
    """Copies whose features are the likest and no more: their images are read, and decide."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 16))
    X[60:80] = X[:20] + 0.4 * rng.normal(size=(20, 16))
    photos = rng.integers(0, 256, (120, 16, 16, 3), np.uint8)
    photos[60:80] = np.clip(photos[:20] * 1.08, 0, 255)
    train_task, test_task = split_of(rng.integers(0, 2, 120), np.arange(120) < 30)
    paths = {}
    # The content hashes are made ones, which no file has.
    monkeypatch.setattr(signatures_module, "read_unchanged", lambda path, _: read_bytes(path))
    for number, content in enumerate(content_of(120)):
        paths[content] = str(tmp_path / f"{number}.png")
        Image.fromarray(photos[number]).save(paths[content])
    taps = store_taps(tmp_path / "cache", {"a.avg": X})
    assert near_duplicates(train_task, test_task, taps, {}) is None
    assert "20 of 30 test images (66.7 %)" in near_duplicates(train_task, test_task, taps, paths)


def write_photos(folder, copies):
    rng = np.random.default_rng(0)
    for number in range(40):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        if number < copies:
            ImageEnhance.Brightness(image).enhance(1.05).save(
                path.with_name(f"{number:02d}-again.png")
            )


def test_init_tells_of_near_copies_before_anything_is_extracted(tmp_path):
    """By small grey copies of what lies side by side in the listing; a column of groups
    settles it.
    """
    write_photos(tmp_path / "clean", 0)
    assert not any(
        "nearly the same" in note for note in detect_recipe(tmp_path / "clean", tmp_path).notes
    )
    write_photos(tmp_path / "twice", 6)
    (note,) = (
        note
        for note in detect_recipe(tmp_path / "twice", tmp_path).notes
        if "nearly the same" in note
    )
    assert "12 of 46 images that were looked at" in note
    assert "task.group" in note
    rows = [(str(path), path.stem[:2]) for path in sorted((tmp_path / "twice").rglob("*.png"))]
    samples = pd.DataFrame(rows, columns=["path", "patient"]).assign(id=lambda frame: frame["path"])
    assert near_copies(samples) is not None
    assert near_copies(samples, "patient") is None


def test_pairs_without_a_test_split():
    """Nearly the same images on two folds are told also where no image is held for testing."""
    said = near_duplicates_text(np.array([0]), np.array([1]), np.array(["fold 0", "fold 1"]))
    assert said.startswith("1 pair of images on different sides")
    assert "test images" not in said


def test_an_image_that_has_changed_has_no_signature(tmp_path):
    """Nor has one that is gone: the file of signatures would keep the new image under the old one's
    content hash.
    """
    paths = {}
    for name in ("kept", "changed", "gone"):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (32, 32), "red" if name == "kept" else "blue").save(path)
        path.write_bytes(path.read_bytes() + name.encode())
        paths[hash_sample(str(path), path.read_bytes())] = str(path)
    Image.new("RGB", (32, 32), "white").save(tmp_path / "changed.png")
    (tmp_path / "gone.png").unlink()
    for _ in range(2):  # the second time from the file
        grey, positions = signatures(paths, list(paths), tmp_path / "signatures.npz")
        assert (len(grey), positions) == (1, [0])
