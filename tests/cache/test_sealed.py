"""Files that carry their own digest: no byte of them can change unseen."""

import io
import random

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from support.caches import make_spec

from headrace.cache.format.sealed import (
    UNSEALED,
    SealBroken,
    check_seal,
    read_sealed_arrays,
    read_sealed_json,
    seal,
    seal_safetensors,
    sealed_arrays,
    sealed_json,
)
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.spec_cache import (
    TapFeatures,
    _read_tap_features,
    save_feature_specs,
)
from headrace.heads.errors import HeadError
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.persist import TrainedHead, load_head, save_head
from headrace.pipelines.finetune.checkpoint import (
    TrainingProgress,
    load_checkpoint,
    save_checkpoint,
)


def damages(good, n=80, seed=0):
    """Single bits that have flipped, ends that are missing, and nothing at all."""
    draw = random.Random(seed)
    for _ in range(n):
        data, bit = bytearray(good), draw.randrange(8 * len(good))
        data[bit // 8] ^= 1 << bit % 8
        yield bytes(data)
    yield from (good[: len(good) // 2], good[:-1], b"")


def test_every_flip_of_a_sealed_object_is_seen_or_changes_no_value():
    """In values, keys and the digest alike; what stands between them carries nothing."""
    values = {"score": 0.125, "names": ["é", "b"], "nested": {"n": 3}}
    good = sealed_json(values)
    assert read_sealed_json(good) == values
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        try:
            found = read_sealed_json(bytes(data))
        except SealBroken:
            continue
        assert {name: found[name] for name in values} == values


def test_an_object_without_a_seal_is_one_of_an_earlier_version():
    """It is read as it is; what is no object is not."""
    assert read_sealed_json(b'{"a": 1}') == {"a": 1}
    for bad in (b"", b"[1]", b"{", b"\xff"):
        with pytest.raises(SealBroken):
            read_sealed_json(bad)


def test_the_seal_is_of_all_bytes():
    """Before it and behind it."""
    good = seal(b"before " + UNSEALED.encode() + b" behind")
    check_seal(good)
    for bad in (good[1:], good + b"x", good.replace(b"behind", b"behinD")):
        with pytest.raises(SealBroken):
            check_seal(bad)


def test_arrays_carry_a_seal():
    """They come back as they were, text too, and NumPy alone reads them; nothing else
    is believed.
    """
    arrays = {
        "ids": np.array(["ä", "b"]),
        "target": np.arange(6.0).reshape(2, 3),
        "none": np.zeros((0, 2), np.int16),
    }
    good = sealed_arrays(arrays)
    found = read_sealed_arrays(good)
    with np.load(io.BytesIO(good)) as plain:
        assert list(found) == list(arrays) == plain.files
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 4
        try:
            again = read_sealed_arrays(bytes(bad))
        except SealBroken:
            continue
        for name, array in arrays.items():  # the mark itself was hit
            np.testing.assert_array_equal(again[name], array)
    for bad in (good[: len(good) // 2], good[:-1], b""):
        with pytest.raises(SealBroken):
            read_sealed_arrays(bad)


def test_a_damaged_head_is_never_loaded(tmp_path):
    """Each damage is an error that names the file and the command, or changes nothing."""
    arrays = {"weight": np.arange(24.0).reshape(2, 12), "intercept": np.zeros(2)}
    head = TrainedHead(LogisticSpec(C=1.0), "single", ("a", "b"), (make_spec(),), {}, arrays)
    path = save_head(tmp_path, head)
    good, said = path.read_bytes(), []
    for data in damages(good):
        path.write_bytes(data)
        try:
            found = load_head(tmp_path)
        except HeadError as error:
            said.append(str(error))
        else:
            assert (found.arrays["weight"] == arrays["weight"]).all()
            assert found.classes == ("a", "b")
    assert len(said) > 75
    assert all(str(path) in text and "headrace run" in text for text in said)


def test_a_damaged_checkpoint_is_not_trained_on(tmp_path):
    """It is as if there were none."""
    path, progress = (
        tmp_path / "checkpoint.safetensors",
        TrainingProgress(2, 1, 0.5, 1.0, [{"epoch": 1.0}]),
    )
    save_checkpoint(path, "key", progress, {"w": torch.arange(50.0)})
    good = path.read_bytes()
    found = load_checkpoint(path, "key")
    assert found is not None
    assert found[0] == progress
    for data in damages(good):
        path.write_bytes(data)
        found = load_checkpoint(path, "key")
        assert found is None or (
            found[0] == progress and torch.equal(found[1]["w"], torch.arange(50.0))
        )


def test_what_is_remembered_of_a_backbone_is_what_was_found(tmp_path):
    """A changed memory is none: a digit of a crop in it would have all features extracted again,
    under another name.
    """
    spec = BackboneSpec("torchvision:resnet18", weights="random:0")
    features = TapFeatures((make_spec(),), "left out: fc.weight")
    save_feature_specs(spec, "auto", features, cache_root=tmp_path)
    (memory,) = (tmp_path / "backbones").iterdir()
    good = memory.read_bytes()
    for bad in damages(good):
        memory.write_bytes(bad)
        assert _read_tap_features(memory) in (None, features)
    memory.write_bytes(good)
    assert _read_tap_features(memory) == features


def test_equal_tensors_are_equal_files() -> None:
    """Though the writer of safetensors shuffles the keys of metadata."""
    arrays = {"weight": np.arange(6.0).reshape(2, 3), "bias": np.ones(3, np.float32)}
    files = {seal_safetensors(save(arrays, metadata={"headrace": "ü {}"})) for _ in range(20)}
    assert len(files) == 1
    (file,) = files
    check_seal(file)
    assert all(np.array_equal(load(file)[name], array) for name, array in arrays.items())
