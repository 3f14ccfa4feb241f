"""The fast form of a network on a CPU: convolution, batch normalization and activation in one
oneDNN kernel, linear layer and activation in one, with weights in the layout of these kernels.

Measured with EfficientNet-Lite0 at 300 px on one core of an EPYC (Zen 4), images/s in batches of
16: as the library builds it 6, in channels_last 17, with `keep_freed_memory` 33, fused as well 42.
"""

import contextlib
import copy
import ctypes
import functools
import platform
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# A pass through a network: from pixels (N, H, W, C), uint8 or float32, white 255, to
# (N, *tap_shape) of each tap, both on the network's device.
Forward = Callable[[Tensor], list[Tensor]]
# An operation that oneDNN applies to an output before it leaves the registers: (name, scalars,
# algorithm).
_Epilogue = tuple[str, list[float], str]
_NO_EPILOGUE: _Epilogue = ("none", [], "")


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep freed memory instead of giving it back to the system, on glibc.

    Memory stays bounded by the largest batch; beyond 2 GiB it is given back.
    """
    # By default every large tensor is mapped from the kernel and unmapped after use, and the page
    # faults cost as much as the arithmetic.
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # from malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def fuse_layers(module: nn.Module, tapped: Collection[str], image: Tensor) -> nn.Module:
    """Return a fused copy of `module` (evaluation mode, float32, CPU) with the same outputs.

    tapped: names of the modules whose outputs must stay; other outputs may disappear.
    image: (1, C, H, W), run once to see which layer feeds which normalization and activation. One
    pass can miss a second use of a value, so the caller must compare the outputs (`outputs_agree`)
    and keep the original if they differ.
    """
    module = copy.deepcopy(module).to(memory_format=torch.channels_last)
    chains = _find_chains(module, image)
    names = {child: name for name, child in module.named_modules()}
    for conv, norm, activation in chains:
        if names[conv] in tapped:
            continue
        inner = getattr(norm, "act", None)  # timm's normalization layers contain their activation
        if inner is not None and not isinstance(inner, nn.Identity):
            epilogue, activation = _epilogue(inner), None
            if epilogue is None:
                continue  # the kernel does not have this activation
        elif activation is not None and not (norm is not None and names[norm] in tapped):
            epilogue = _epilogue(activation)
        else:
            epilogue, activation = _NO_EPILOGUE, None
        assert epilogue is not None  # `_find_chains` returns only activations that have one
        _replace(module, names[conv], _fused(conv, norm, epilogue, activation))
        if norm is not None:
            _replace(module, names[norm], nn.Identity())
    return _skip_applied_activations(module)


def fold_batch_norms(module: nn.Module, tapped: Collection[str], image: Tensor) -> nn.Module:
    """Return a copy of `module` (evaluation mode, float32, CPU) with batch normalizations folded
    into the convolutions before them; `module` itself if there are none.

    Unlike that of `fuse_layers`, which takes the same arguments, the copy can be moved to any
    device. Here too the caller must compare the outputs.
    """
    folded = copy.deepcopy(module)
    names = {child: name for name, child in folded.named_modules()}
    norms = [
        (conv, norm)
        for conv, norm, _ in _find_chains(folded, image)
        if norm is not None and isinstance(conv, nn.Conv2d) and names[conv] not in tapped
    ]
    for conv, norm in norms:
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        # timm's normalization layers contain their activation, which stays.
        _replace(folded, names[norm], getattr(norm, "act", nn.Identity()))
    return folded.requires_grad_(False) if norms else module


def _find_chains(
    module: nn.Module, image: Tensor
) -> list[tuple[nn.Conv2d | nn.Linear, nn.BatchNorm2d | None, nn.Module | None]]:
    """Return each convolution or linear layer that runs once, with the normalization and the
    activation, or None, that its output goes through next.
    """
    calls: dict[nn.Module, int] = {}
    # {id of an output tensor: (the module that returned it, its count of changes then)}
    made_by: dict[int, tuple[nn.Module, int]] = {}
    alive: list[Tensor] = []  # outputs, so that no id is used twice
    follower: dict[nn.Module, nn.Module] = {}  # {module: the one that takes its output}

    def before(child: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and id(args[0]) in made_by:
            maker, version = made_by[id(args[0])]
            # A changed tensor is no longer the output: torchvision's ResNets add the shortcut to it
            # in place.
            if _n_changes(args[0]) == version:
                follower.setdefault(maker, child)

    def after(child: nn.Module, _args: Any, output: Any) -> None:
        calls[child] = calls.get(child, 0) + 1
        # An in-place activation returns its input, which stays that of the layer before.
        if isinstance(output, Tensor) and id(output) not in made_by:
            made_by[id(output)] = child, _n_changes(output)
            alive.append(output)

    # Not inference mode, in which tensors do not count their changes.
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for child in module.modules():
            if not any(True for _ in child.children()) or isinstance(child, nn.BatchNorm2d):
                hooks.enter_context(child.register_forward_pre_hook(before))
                hooks.enter_context(child.register_forward_hook(after))
        module(image)
    chains = []
    for conv, count in calls.items():
        # No other class is known to compute just the convolution.
        is_plain = type(conv) in (nn.Conv2d, nn.Linear) or type(conv).__name__ == "Conv2dSame"
        if not isinstance(conv, nn.Conv2d | nn.Linear) or count != 1 or not is_plain:
            continue
        norm = follower.get(conv)
        if not isinstance(norm, nn.BatchNorm2d) or (
            calls[norm] != 1
            or norm.running_mean is None
            # A user's module may stay in training mode: it takes the moments of each batch.
            or norm.training
            or conv.training
        ):
            norm = None
        activation = follower.get(norm if norm is not None else conv)
        chains.append((conv, norm, activation if _epilogue(activation) is not None else None))
    return chains


def _n_changes(tensor: Tensor) -> int:
    """Return how often a tensor has been changed in place; 0 for tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _epilogue(activation: nn.Module | None) -> _Epilogue | None:
    """Return oneDNN's operation for an activation; None if it has none."""
    match activation:
        case nn.ReLU6():
            return "hardtanh", [0.0, 6.0], ""
        case nn.Hardtanh():
            return "hardtanh", [activation.min_val, activation.max_val], ""
        case nn.ReLU():
            return "relu", [], ""
        case nn.SiLU():
            return "swish", [], ""
        case nn.Hardswish():
            return "hardswish", [], ""
        case nn.GELU():
            return "gelu", [], activation.approximate
    return None


def _fused(
    layer: nn.Conv2d | nn.Linear,
    norm: nn.BatchNorm2d | None,
    epilogue: _Epilogue,
    activation: nn.Module | None,
) -> nn.Module:
    """Return the layer with its normalization folded in and its activation in the same kernel."""
    if norm is not None and isinstance(layer, nn.Conv2d):
        layer = fuse_conv_bn_eval(layer, norm)
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        return _FusedLinear(weight, bias, epilogue, activation)
    if _is_pointwise(layer):
        return _FusedPointwise(weight.flatten(1), bias, epilogue, activation)
    if bias is None:
        bias = torch.zeros(len(weight))
    return _FusedConv(layer, weight, bias, epilogue, activation)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    """Return whether each output pixel depends on the input pixel at its place only."""
    return (
        conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding in ((0, 0), "same", "valid")
    )


class _FusedConv(nn.Module):
    """A convolution with its activation in the same kernel.

    weight, bias: with its normalization folded in.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        weight: Tensor,
        bias: Tensor,
        epilogue: _Epilogue,
        activation: nn.Module | None,
    ) -> None:
        super().__init__()
        # Tensors, not parameters: once packed, their layout means nothing to other code.
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = bias.contiguous()
        self.kernel, self.groups = conv.kernel_size, conv.groups
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.same = type(conv).__name__ == "Conv2dSame" or conv.padding == "same"
        self.padding = [0, 0] if isinstance(conv.padding, str) else list(conv.padding)
        # A depthwise kernel with a row and column of zeros before it, for odd padding: then the
        # padding is the same on both sides, and the image is not copied into a padded one. The sums
        # are the same, 1.6 times as fast.
        self.wider = None
        if self.same and self.groups > 1 and self.dilation == [1, 1]:
            self.wider = nn.functional.pad(self.weight, (1, 0, 1, 0)).contiguous(
                memory_format=torch.channels_last
            )
        self.packed: dict[bool, Tensor] = {}  # whether it is the wider kernel -> its weights
        self.epilogue = epilogue
        self.applied = type(activation) if activation is not None else None

    def forward(self, x: Tensor) -> Tensor:
        padding, weight = self.padding, self.weight
        if self.same:
            total = _same_padding(x, self.kernel, self.stride, self.dilation)
            if self.wider is not None and total[0] % 2 == 1 and total[1] % 2 == 1:
                padding, weight = [(length + 1) // 2 for length in total], self.wider
            else:
                x, padding = _pad_same(x, total)
        is_wider = weight is self.wider
        if is_wider not in self.packed and len(x) > 1:
            # Once, at the first batch, for whose shape the layout is chosen; unpacked weights would
            # be reordered in every call.
            self.packed[is_wider] = torch.ops.mkldnn._reorder_convolution_weight(
                weight, padding, self.stride, self.dilation, self.groups, list(x.shape)
            )
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x,
            self.packed.get(is_wider, weight),
            self.bias,
            padding,
            self.stride,
            self.dilation,
            self.groups,
            *self.epilogue,
        )
        return _marked(y, self.applied)


def _marked(output: Tensor, applied: type[nn.Module] | None) -> Tensor:
    """Mark an output, so that `_SkippableActivation` knows that it has nothing left to do."""
    if applied is not None:
        output.headrace_applied = applied  # type: ignore[attr-defined]
    return output


class _FusedLinear(nn.Module):
    """A linear layer of oneDNN with its activation in the same kernel.

    On a Zen 4 core 1.13 to 1.2 times as fast as PyTorch's own (MKL), on Zen 5 twice as fast.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        epilogue: _Epilogue,
        activation: nn.Module | None,
    ) -> None:
        super().__init__()
        self.packed, self.bias, self.n_outputs = weight, bias, len(weight)
        self.is_packed = False
        self.epilogue = epilogue
        self.applied = type(activation) if activation is not None else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if not self.is_packed and len(x) > 1:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.packed, len(rows))
            self.is_packed = True
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.packed, self.bias, *self.epilogue
        ).reshape(*x.shape[:-1], self.n_outputs)
        return _marked(y, self.applied)


class _FusedPointwise(_FusedLinear):
    """A pointwise (1 × 1) convolution, computed as the linear layer that it is.

    Up to a tenth faster than oneDNN's convolution, and its call costs 15 microseconds instead of
    24.
    """

    def forward(self, x: Tensor) -> Tensor:
        # A permuted tensor is a new one, without the mark.
        y = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return _marked(y, self.applied)


def _same_padding(x: Tensor, kernel: Any, stride: list[int], dilation: list[int]) -> list[int]:
    """Return TensorFlow's "same" padding of height and width, both sides together, in pixels."""
    return [
        max((-(-size // step) - 1) * step + (edge - 1) * gap + 1 - size, 0)
        for size, edge, step, gap in zip(x.shape[-2:], kernel, stride, dilation, strict=True)
    ]


def _pad_same(x: Tensor, total: list[int]) -> tuple[Tensor, list[int]]:
    """Return (x, padding for the kernel), x padded here if `total` is odd: TensorFlow puts the odd
    pixel after the image, which no kernel's padding can do.
    """
    height, width = x.shape[-2:]
    if total[0] % 2 == 0 and total[1] % 2 == 0:
        return x, [total[0] // 2, total[1] // 2]
    top, left = total[0] // 2, total[1] // 2
    padded = torch.empty(
        (x.shape[0], x.shape[1], height + total[0], width + total[1]),
        dtype=x.dtype,
        memory_format=torch.channels_last,
    )
    # Zeros only at the borders; F.pad would fill the whole tensor before it copies the image.
    padded[:, :, :top] = 0
    padded[:, :, top + height :] = 0
    padded[:, :, top : top + height, :left] = 0
    padded[:, :, top : top + height, left + width :] = 0
    padded[:, :, top : top + height, left : left + width] = x
    return padded, [0, 0]


class _SkippableActivation(nn.Module):
    """An activation that returns tensors to which a kernel has already applied it as they are.

    It cannot be replaced by nn.Identity: networks use one activation module at many places, and
    only some of them follow a fused layer.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if getattr(x, "headrace_applied", None) is type(self.activation):
            return x
        y: Tensor = self.activation(x)
        return y


def _skip_applied_activations(module: nn.Module) -> nn.Module:
    applied = {
        child.applied for child in module.modules() if isinstance(child, _FusedConv | _FusedLinear)
    } - {None}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if type(child) in applied:
            _replace(module, name, _SkippableActivation(child))
    return module


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    module.get_submodule(parent)._modules[last] = new


def outputs_agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Return whether two lists of outputs agree to 1e-4 of each output's largest value."""
    return all(
        bool((a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-6))
        for a, b in zip(ours, theirs, strict=True)
    )


def can_fuse() -> bool:
    """Return whether this PyTorch and machine have the oneDNN kernels."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and all(
        hasattr(torch.ops.mkldnn, name)
        for name in (
            "_convolution_pointwise",
            "_linear_pointwise",
            "_reorder_convolution_weight",
            "_reorder_linear_weight",
        )
    )
