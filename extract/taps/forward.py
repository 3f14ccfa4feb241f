"""The pass from pixels to the pooled outputs of many taps; it ends at the deepest one."""

import contextlib
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from headrace.extract.backbones.attention import with_fast_attention
from headrace.extract.backbones.backbone import Backbone
from headrace.extract.backbones.fused import (
    Forward,
    can_fuse,
    fold_batch_norms,
    fuse_layers,
    outputs_agree,
)
from headrace.extract.backbones.nodes import Node
from headrace.extract.taps.capture import TapCapture
from headrace.extract.taps.openvino_forward import openvino_forward
from headrace.extract.taps.repeatable import random_pixels, require_repeatable
from headrace.extract.taps.resolve import Tap, backbone_nodes

COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
# In evaluation mode their networks compute each image by itself, and the same in every pass.
_LIBRARIES = ("timm:", "torchvision:", "open_clip:")
_HALF_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def make_forward(
    backbone: Backbone,
    taps: Sequence[Tap],
    *,
    device: str = "cpu",
    compute_dtype: str = "float32",
    compiled: bool = False,
    runtime: str = "torch",
) -> Forward:
    """Return the pass from pixels to the pooled outputs of `taps`, on a copy of the network.

    Raises BackboneError for a network that gives one image other features in another pass.
    """
    nodes = backbone_nodes(backbone)
    placed = [(tap, nodes[tap.node]) for tap in taps]
    normalize = make_normalizer(backbone, device)
    on_cpu = torch.device(device).type == "cpu"
    network = backbone.module if on_cpu else _for_accelerator(backbone, placed)
    module = copy.deepcopy(network).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = hook_forward(module, placed, normalize, compute_dtype, compiled=compiled)
    # Compiled passes are not tried: one for two images and one for one would be compiled.
    if not compiled and not backbone.spec.name.startswith(_LIBRARIES):
        require_repeatable(backbone, plain, taps, device)
    if not on_cpu or compute_dtype != "float32" or compiled:
        return plain
    pixels = random_pixels(backbone, 1)
    if runtime == "openvino":
        return openvino_forward(module, plain, pixels)
    if not can_fuse():
        return plain
    tapped = {node.module for _, node in placed}
    try:
        fused = fuse_layers(backbone.module, tapped, normalize(pixels))
        faster = hook_forward(fused, placed, normalize, compute_dtype)
        if not outputs_agree(faster(pixels), plain(pixels)):
            return plain
        return with_fast_attention(faster, pixels)
    except (RuntimeError, AttributeError, TypeError):  # a network that reads its layers' attributes
        return plain


def _for_accelerator(backbone: Backbone, taps: Sequence[tuple[Tap, Node]]) -> nn.Module:
    """Return the network with batch normalizations folded if, on the CPU, that leaves the outputs
    of one image the same.
    """
    normalize, pixels = make_normalizer(backbone, "cpu"), random_pixels(backbone, 1)

    def outputs(module: nn.Module) -> list[Tensor]:
        return hook_forward(copy.deepcopy(module), taps, normalize, "float32")(pixels)

    # Raised by networks that read attributes of their layers.
    with contextlib.suppress(RuntimeError, AttributeError, TypeError):
        tapped = {node.module for _, node in taps}
        folded = fold_batch_norms(backbone.module, tapped, normalize(pixels))
        if outputs_agree(outputs(folded), outputs(backbone.module)):
            return folded
    return backbone.module


def make_normalizer(backbone: Backbone, device: str) -> Callable[[Tensor], Tensor]:
    """Return the function from pixels, as a `Forward` takes them, to the network's input.

    This is (x / 255 - mean) / std, float32 (N, C, H, W) in channels_last.
    """
    preprocessing = backbone.preprocessing
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    scale, shift = (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)

    def normalize(pixels: Tensor) -> Tensor:
        # A permuted (N, H, W, C) is channels_last in memory already, so that nothing is transposed.
        return torch.addcmul(shift, pixels.permute(0, 3, 1, 2).float(), scale).contiguous(
            memory_format=torch.channels_last
        )

    return normalize


def hook_forward(
    module: nn.Module,
    taps: Sequence[tuple[Tap, Node]],
    normalize: Callable[[Tensor], Tensor],
    compute_dtype: str,
    *,
    compiled: bool = False,
) -> Forward:
    """Attach hooks for the taps to `module` for good, and return the pass through it."""
    # A compiler finds out by itself that nothing after the deepest tap is used.
    capture = TapCapture(module, taps, stops_early=not compiled)
    run = torch.compile(module) if compiled else module
    half = _HALF_TYPES.get(compute_dtype)

    def forward(pixels: Tensor) -> list[Tensor]:
        autocast = torch.autocast(pixels.device.type, half, enabled=half is not None)
        with torch.inference_mode(), autocast, _without_tf32(pixels.device.type):
            captured = capture.run(run, normalize(pixels))
        return [captured[tap] for tap, _ in taps]

    return forward


def _without_tf32(device: str) -> contextlib.AbstractContextManager[None]:
    """Let cuDNN choose its fastest kernels, but not TF32: its mantissa has 10 bits, not 23."""
    if device != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=True, deterministic=False, allow_tf32=False
    )
