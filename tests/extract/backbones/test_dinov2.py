"""DINOv2, small and with random weights: features equal a hook on timm's untouched network and
transformers' Dinov2 from the same tensors, at the weights' own and at another size, with four
registers too. On real weights: benchmarks/elpv.py --case dinov2.
"""

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from headrace.extract.backbones.backbone import Backbone, load_backbone
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.forward import make_forward, make_normalizer
from headrace.extract.taps.resolve import resolve_taps

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from dinov2_weights import transformers_names

# The architectures of DINOv2 ViT-S/14 without and with registers, of three blocks.
SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 2}
NAMES = {"dinov2": "vit_small_patch14_dinov2", "registers": "vit_small_patch14_reg4_dinov2"}
TAPS = ["blocks.1.cls", "blocks.1.avg", "norm.cls", "norm.avg", "norm.map"]


def loaded(kind: str, size: int, folder: Path) -> tuple[Backbone, nn.Module]:
    """The backbone from a file of weights for 112 pixels, and timm's own network at `size`."""
    torch.manual_seed(0)
    own = timm.create_model(NAMES[kind], img_size=112, **SIZES).eval()
    for parameter in own.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_file(own.state_dict(), folder / "w.safetensors")
    spec = BackboneSpec(
        f"timm:{NAMES[kind]}",
        str(folder / "w.safetensors"),
        image_size=size,
        model={"img_size": 112, **SIZES},
    )
    untouched = timm.create_model(NAMES[kind], img_size=size, **SIZES)
    untouched.load_state_dict(checkpoint_filter_fn(own.state_dict(), untouched))
    return load_backbone(spec), untouched.eval()


def hooked(module: nn.Module, nodes: list[str], images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        module.get_submodule(node).register_forward_hook(lambda *args: seen.append(args[2]))
        for node in nodes
    ]
    with torch.inference_mode():
        module(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("size", [56, 112])
@pytest.mark.parametrize("kind", NAMES)
def test_features_are_timms_and_transformers_own(kind: str, size: int, tmp_path: Path) -> None:
    backbone, untouched = loaded(kind, size, tmp_path)
    n_prefix = 5 if kind == "registers" else 1
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    found = make_forward(backbone, resolve_taps(backbone, TAPS))(pixels)
    images = make_normalizer(backbone, "cpu")(pixels)
    inner, last = hooked(untouched, ["blocks.1", "norm"], images)
    expected = [
        inner[:, 0],
        inner[:, n_prefix:].mean(1),
        last[:, 0],
        last[:, n_prefix:].mean(1),
        last[:, n_prefix:].transpose(1, 2).unflatten(2, (size // 14, size // 14)),
    ]
    torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-5)
    if kind == "dinov2":
        tokens = tokens_of_transformers(backbone, size, images, tmp_path)
        torch.testing.assert_close(found[2], tokens[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[3], tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


def test_a_file_as_dinov2_publishes_it(tmp_path: Path) -> None:
    """With registers: other names, and a position of the class token that timm adds to it."""
    own = timm.create_model(NAMES["registers"], img_size=112, **SIZES).eval()
    state = {key: torch.randn_like(value) for key, value in own.state_dict().items()}
    first_position = torch.randn(1, 1, 24)
    published = {
        **state,
        "register_tokens": state["reg_token"],
        "mask_token": torch.zeros(1, 24),
        "cls_token": state["cls_token"] - first_position,
        "pos_embed": torch.cat([first_position, state["pos_embed"]], dim=1),
    }
    del published["reg_token"]
    files = {"own": state, "published": published}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    found, expected = (
        load_backbone(
            BackboneSpec(
                f"timm:{NAMES['registers']}",
                str(tmp_path / f"{name}.safetensors"),
                model={"img_size": 112, **SIZES},
            )
        )
        for name in ("published", "own")
    )
    assert not found.left_out
    for key, value in expected.module.state_dict().items():
        torch.testing.assert_close(found.module.state_dict()[key], value)


def tokens_of_transformers(backbone: Backbone, size: int, images: Tensor, folder: Path) -> Tensor:
    """Of the same tensors, with the position embeddings as timm has resampled them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=size
    )
    config.save_pretrained(folder)
    tensors = transformers_names(backbone.module.state_dict())
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(images).last_hidden_state  # type: ignore[no-any-return]
