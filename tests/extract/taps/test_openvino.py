"""The pass by OpenVINO beside PyTorch's."""

import os

import numpy as np
import pytest
import torch
from support import forks
from torch import nn

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.errors import BackboneError
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps import openvino_forward
from headrace.extract.taps.forward import make_forward
from headrace.extract.taps.resolve import resolve_taps

pytestmark = pytest.mark.slow


def pixels_for(backbone, count):
    generator = torch.Generator().manual_seed(1)
    shape = (count, *backbone.preprocessing.pixel_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm:tf_efficientnet_lite0", 64),
        ("timm:resnet18", 64),
        ("timm:convnext_atto", 64),
        ("timm:vit_tiny_patch16_224", 64),
        ("torchvision:alexnet", 64),
    ],
)
def test_features_are_those_of_pytorch_whatever_the_size_of_the_batch(name, size):
    backbone = load_backbone(BackboneSpec(name, "random:0", image_size=size))
    taps = resolve_taps(backbone, "auto")
    ours, theirs = (make_forward(backbone, taps, runtime=each) for each in ("openvino", "torch"))
    assert ours.__module__ == openvino_forward.__name__
    for count in (1, 2, 5):
        pixels = pixels_for(backbone, count)
        for output, expected in zip(ours(pixels), theirs(pixels), strict=True):
            assert output.shape == expected.shape
            assert output.dtype == torch.float32
            scale = float(expected.abs().max())
            np.testing.assert_allclose(output, expected, rtol=0, atol=2e-5 * scale)


def test_pixels_of_more_than_8_bits_keep_their_depth():
    backbone = load_backbone(
        BackboneSpec("timm:resnet18", "random:0", image_size=64, pixel_dtype="float32")
    )
    taps = resolve_taps(backbone, ["pre_logits"])
    ours, theirs = (make_forward(backbone, taps, runtime=each) for each in ("openvino", "torch"))
    # Fractions, and values beyond black and white, as bands have.
    pixels = pixels_for(backbone, 3) / 256 * 300 - 20.5
    (output,), (expected,) = ours(pixels), theirs(pixels)
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_outputs_stay_when_the_next_batch_is_computed():
    backbone = load_backbone(BackboneSpec("timm:resnet18", "random:0", image_size=64))
    forward = make_forward(backbone, resolve_taps(backbone, ["pre_logits"]), runtime="openvino")
    first, second = pixels_for(backbone, 4).split(2)
    kept = forward(first)[0]
    copied = kept.clone()
    forward(second)
    assert torch.equal(kept, copied)


def test_a_network_that_branches_on_its_images_stays_pytorchs():
    """A trace has one of the branches."""

    def plain(pixels):
        values = pixels.float()
        return [values if values[-1].mean() > 64 else -values]

    pixels = torch.arange(3 * 64).view(1, 8, 8, 3).byte()
    with pytest.warns(RuntimeWarning, match="by PyTorch, not by OpenVINO: its outputs are others"):
        assert openvino_forward.openvino_forward(nn.Identity(), plain, pixels) is plain


def test_a_pass_with_other_outputs_stays_pytorchs_and_says_so(monkeypatch):
    monkeypatch.setattr(openvino_forward, "outputs_agree", lambda ours, theirs: False)

    def plain(pixels):
        return [pixels.float()]

    with pytest.warns(RuntimeWarning, match="by PyTorch, not by OpenVINO: its outputs are others"):
        found = openvino_forward.openvino_forward(
            nn.Identity(), plain, torch.zeros(1, 8, 8, 3).byte()
        )
    assert found is plain


def test_outputs_that_a_trace_takes_for_constants_are_noticed():
    """As those of an ONNX file's network, which another library computes."""

    def plain(pixels):
        return [torch.from_numpy(pixels.float().numpy() + 1)]

    with pytest.warns(RuntimeWarning, match="by PyTorch, not by OpenVINO"):
        found = openvino_forward.openvino_forward(
            nn.Identity(), plain, torch.zeros(1, 8, 8, 3).byte()
        )
    assert found is plain


def test_a_network_that_openvino_cannot_read_stays_pytorchs_and_says_why():
    def plain(pixels):
        raise RuntimeError("no such operator")

    with pytest.warns(RuntimeWarning, match="not by OpenVINO: .*no such operator"):
        found = openvino_forward.openvino_forward(
            nn.Identity(), plain, torch.zeros(1, 8, 8, 3).byte()
        )
    assert found is plain


def test_the_missing_library_is_named_with_what_to_type(monkeypatch):
    monkeypatch.setattr(openvino_forward.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BackboneError, match=r"pip install 'headrace\[openvino\]', or write runtime"
    ):
        openvino_forward.require_openvino()


def test_openvino_reports_nothing_to_anyone(tmp_path):
    """Its own import leaves a number in the home directory by which its user is counted."""
    (tmp_path / "pass.py").write_text("""
import sys
assert "openvino" not in sys.modules
import torch
from headrace.extract.taps.openvino_forward import openvino_forward
pixels = torch.ones(1, 8, 8, 3).byte()
found = openvino_forward(torch.nn.Identity(), lambda pixels: [pixels.float() * 2], pixels)
assert "openvino_forward" in found.__module__
""")
    home = tmp_path / "home"
    home.mkdir()
    with (tmp_path / "said.txt").open("w") as said:
        call = forks.start(
            (),
            script=tmp_path / "pass.py",
            cwd=tmp_path,
            env=os.environ | {"HOME": str(home), "CI": ""},
            stdout=said,
            stderr=said,
        )
    assert call.wait(300) == 0, (tmp_path / "said.txt").read_text()
    assert not list(home.iterdir())
