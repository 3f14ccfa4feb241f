"""A transformer at another input size than its weights': what timm and torchvision make of the same
tensors, to the last bit.
"""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.errors import BackboneError
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.describe import describe_backbone
from headrace.extract.taps.forward import make_forward, make_normalizer
from headrace.extract.taps.resolve import backbone_nodes, resolve_taps

PIXELS = torch.randint(
    0, 256, (2, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def features(spec: BackboneSpec, taps: list[str]) -> list[Tensor]:
    backbone = load_backbone(spec)
    size = backbone.preprocessing.crop[0]
    return list(make_forward(backbone, resolve_taps(backbone, taps))(PIXELS[:, :size, :size]))


def test_position_embeddings_are_resampled_as_timm_does_it() -> None:
    """The same tensors, in a network that timm makes for 96 pixels."""
    spec = BackboneSpec("timm:vit_tiny_patch16_224", "random:1", image_size=96)
    own = load_backbone(spec)
    plain = load_backbone(BackboneSpec("timm:vit_tiny_patch16_224", "random:1"))
    assert own.weights == plain.weights  # the size is told apart by the preprocessing
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=96).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(plain.module.state_dict()), theirs))
    assert backbone_nodes(own)["blocks.11"].shape == (1 + 6 * 6, 192)
    with torch.inference_mode():
        tokens = theirs.forward_features(make_normalizer(own, "cpu")(PIXELS))  # type: ignore[operator]
    (found,) = features(spec, ["norm.cls"])
    torch.testing.assert_close(found.float(), tokens[:, 0], rtol=1e-4, atol=1e-5)
    assert plain.module.pos_embed.shape[1] == 197  # the object that others use is as it was


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("vit_small_patch14_dinov2", 112, 1 + 8 * 8),  # made for 518
        ("vit_small_patch14_reg4_dinov2", 112, 5 + 8 * 8),
        ("deit_tiny_patch16_224", 96, 1 + 6 * 6),
        ("vit_tiny_patch16_224", 384, 1 + 24 * 24),  # and larger
    ],
)
def test_the_number_of_tokens_is_that_of_the_size(name: str, size: int, tokens: int) -> None:
    """Without weights too, as `headrace backbones` describes a network."""
    info = describe_backbone(BackboneSpec(f"timm:{name}", image_size=size))
    assert next(tap for tap in info.taps if tap.node == "blocks.11").shape[0] == tokens
    backbone = load_backbone(BackboneSpec(f"timm:{name}", "random:0", image_size=size))
    assert backbone_nodes(backbone)["blocks.11"].shape[0] == tokens
    assert backbone.preprocessing.crop == (size, size)


@pytest.mark.slow
def test_a_file_of_either_size_loads(tmp_path: Path) -> None:
    """The weights' own, and those of a network that was saved at the size that is asked for, as an
    export does it.
    """
    name = "timm:vit_tiny_patch16_224"
    plain = load_backbone(BackboneSpec(name, "random:2"))
    resized = load_backbone(BackboneSpec(name, "random:2", image_size=96))
    wanted = features(BackboneSpec(name, "random:2", image_size=96), ["blocks.11.avg"])
    for number, module in enumerate((plain.module, resized.module)):
        file = tmp_path / f"{number}.safetensors"
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, file)
        found = features(BackboneSpec(name, str(file), image_size=96), ["blocks.11.avg"])
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.slow
def test_windows_and_tables_follow() -> None:
    """Swin's relative position tables, at a size that its windows do not divide."""
    (found,) = features(
        BackboneSpec("timm:swin_tiny_patch4_window7_224", "random:0", image_size=64), ["norm.avg"]
    )
    assert found.shape == (2, 768)
    assert torch.isfinite(found).all()


@pytest.mark.slow  # 88 million random weights
def test_torchvisions_transformers_too() -> None:
    from torchvision.models import vit_b_32
    from torchvision.models.vision_transformer import interpolate_embeddings

    spec = BackboneSpec("torchvision:vit_b_32", "random:3", image_size=96)
    own, plain = (
        load_backbone(spec),
        load_backbone(BackboneSpec("torchvision:vit_b_32", "random:3")),
    )
    with torch.device("meta"):  # no parameters are drawn for it
        theirs = vit_b_32(image_size=96).eval()
    state = interpolate_embeddings(96, 32, plain.module.state_dict())
    theirs.load_state_dict(state, assign=True)
    with torch.inference_mode():
        wanted = theirs(make_normalizer(own, "cpu")(PIXELS))
    (found,) = make_forward(own, resolve_taps(own, ["logits"]))(PIXELS)
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-5)


def test_a_size_that_its_patches_do_not_divide_is_refused() -> None:
    """Its last pixels would be cut off in silence."""
    with pytest.raises(
        BackboneError, match=r"image_size is 100, and its patches are 16 x 16 pixels: .* 96 or 112"
    ):
        load_backbone(BackboneSpec("timm:vit_tiny_patch16_224", "random:0", image_size=100))


def test_networks_that_name_one_edge_of_their_patches_take_other_sizes() -> None:
    spec = BackboneSpec("timm:xcit_nano_12_p16_224", "random:0", image_size=64)
    assert load_backbone(spec).preprocessing.crop == (64, 64)
    with pytest.raises(BackboneError, match="its patches are 16 x 16 pixels"):
        load_backbone(dataclasses.replace(spec, image_size=100))
