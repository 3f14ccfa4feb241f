"""One forward pass for many taps: hooks reduce each output as it appears, and the pass ends at the
deepest of them.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headrace.extract.backbones.backbone import Backbone
from headrace.extract.backbones.fused import fusable, fused, same_outputs
from headrace.extract.backbones.nodes import PRE_LOGITS, Node
from headrace.extract.taps.resolve import Tap, backbone_nodes, reduce_output

COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
# (pixels: uint8, shape (N, H, W, 3), on the forward's device) -> per tap (N, *tap_shape), on that
# device
Forward = Callable[[Tensor], list[Tensor]]


class _Done(BaseException):
    """Ends a forward pass once every tap has its output.

    No Exception, so that no network's own handler stops it.
    """


def make_forward(
    backbone: Backbone,
    taps: Sequence[Tap],
    *,
    device: str = "cpu",
    compute_dtype: str = "float32",
    compiled: bool = False,
) -> Forward:
    """The pass from pixels to the reduced outputs of `taps`, in their order, on a copy of the
    backbone's network.
    """
    nodes = backbone_nodes(backbone)
    placed = [(tap, nodes[tap.node]) for tap in taps]
    normalise = normalisation(backbone, device)
    module = copy.deepcopy(backbone.module).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = hooked(module, placed, normalise, compute_dtype, compiled=compiled)
    if device != "cpu" or compute_dtype != "float32" or compiled or not fusable():
        return plain
    pixels = _test_image(backbone)
    tapped = {node.module for _, node in placed}
    try:
        faster = hooked(
            fused(backbone.module, tapped, normalise(pixels)), placed, normalise, compute_dtype
        )
        return faster if same_outputs(faster(pixels), plain(pixels)) else plain
    except (RuntimeError, AttributeError, TypeError):  # a network that reads its layers' attributes
        return plain


def _test_image(backbone: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (1, *backbone.preprocessing.crop, 3), dtype=torch.uint8, generator=generator
    )


def normalisation(backbone: Backbone, device: str) -> Callable[[Tensor], Tensor]:
    """uint8 (N, H, W, 3) to the network's input:

    (x / 255 - mean) / std, float32 (N, 3, H, W) in channels_last.
    """
    how = backbone.preprocessing
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (how.mean, how.std)
    )
    scale, shift = (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)

    def normalise(pixels: Tensor) -> Tensor:
        # A permuted (N, H, W, 3) is channels_last as it lies, so nothing is transposed
        return torch.addcmul(shift, pixels.permute(0, 3, 1, 2).float(), scale).contiguous(
            memory_format=torch.channels_last
        )

    return normalise


def hooked(
    module: nn.Module,
    taps: Sequence[tuple[Tap, Node]],
    normalise: Callable[[Tensor], Tensor],
    compute_dtype: str,
    *,
    compiled: bool = False,
) -> Forward:
    """Attach hooks for the taps to `module` for good, and return the pass through it."""
    found: dict[Tap, Tensor] = {}

    def keep(node: Node, reductions: Sequence[Tap], output: Tensor) -> None:
        for tap in reductions:
            reduced = reduce_output(output, tap.reduction, node)
            # These are views of the output itself, which the network may overwrite in place
            # afterwards.
            found[tap] = reduced.clone() if tap.reduction in ("map", "vector", "cls") else reduced
        # A compiler sees by itself that nothing behind the deepest tap is used
        if len(found) == len(taps) and not compiled:
            raise _Done

    by_node: dict[str, tuple[Node, list[Tap]]] = {}
    for tap, node in taps:
        by_node.setdefault(tap.node, (node, []))[1].append(tap)
    for node, reductions in by_node.values():
        hook = _before if node.name == PRE_LOGITS else _after
        hook(module.get_submodule(node.module), functools.partial(keep, node, reductions))
    run = torch.compile(module) if compiled else module
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(compute_dtype)

    def forward(pixels: Tensor) -> list[Tensor]:
        found.clear()
        autocast = torch.autocast(pixels.device.type, half, enabled=half is not None)
        with (
            contextlib.suppress(_Done),
            torch.inference_mode(),
            autocast,
            _exact(pixels.device.type),
        ):
            run(normalise(pixels))
        outputs = [found[tap] for tap, _ in taps]
        found.clear()
        return outputs

    return forward


def _exact(device: str) -> contextlib.AbstractContextManager[None]:
    """On CUDA, cuDNN's fastest kernels, but not its 10-bit TF32, which float32 would
    silently mean.
    """
    if device != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=True, deterministic=False, allow_tf32=False
    )


def _after(module: nn.Module, keep: Callable[[Tensor], None]) -> None:
    module.register_forward_hook(lambda _module, _args, output: keep(output))


def _before(module: nn.Module, keep: Callable[[Tensor], None]) -> None:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        keep(args[0])

    module.register_forward_pre_hook(hook)
