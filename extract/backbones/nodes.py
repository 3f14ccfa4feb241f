"""The nodes of a network: all modules that could be tapped, in running order, with shape and cost.

N images, C channels, H x W positions, T tokens.
"""

import contextlib
import copy
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from headrace.extract.errors import BackboneError, nearest_names

Layout = Literal["NCHW", "NHWC", "NTC", "NC"]

# Names of two nodes that every network has, whatever its modules are called: the input of the last
# linear layer, and the network's output.
PRE_LOGITS = "pre_logits"
LOGITS = "logits"

# {parameter: kind of token before the patches}, with the names of timm, torchvision, transformers,
# open_clip, DINO, DINOv2 and DINOv3.
_TOKEN_KINDS = {
    "cls_token": "class",
    "class_token": "class",
    "class_embedding": "class",
    "dist_token": "distillation",
    "distillation_token": "distillation",
    "reg_token": "register",
    "register_tokens": "register",
    "storage_tokens": "register",
}

_BATCH = 2  # so that a leading 1 (a position embedding, a window) is not taken for the batch


@dataclass(frozen=True)
class Node:
    """One possible place for a tap."""

    name: str  # as in named_modules(), or PRE_LOGITS, LOGITS
    module: str  # the module to hook; "" is the network itself
    layout: Layout
    shape: tuple[int, ...]  # of one image, without N
    # NTC: count of class and register tokens before the patch tokens; None if it is not known.
    n_prefix_tokens: int | None
    has_class_token: bool  # NTC: whether the first of them is a class token
    cost: float  # share of the forward pass's multiply-adds up to this output, 0 to 1


@dataclass(frozen=True)
class Nodes:
    """All nodes of a network at one input size, in running order."""

    nodes: tuple[Node, ...]
    repeated: frozenset[str]  # modules that run several times in a pass, so have no single output
    multiply_adds: int  # of one image's whole forward pass

    def __getitem__(self, name: str) -> Node:
        """Return the node of that name. Raises BackboneError naming the nearest ones."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise BackboneError(
            f"the network has no node {name!r}. Nearest: {nearest_names(name, self.names)}"
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)


@dataclass(frozen=True)
class PrefixTokens:
    """The tokens that a network puts before those of its patches."""

    count: int
    has_class_token: bool = True  # the first of them, if there are any
    n_patches: int | None = None  # None if the network does not say it

    def before_patches(self, n_tokens: int) -> int | None:
        """Return how many of `n_tokens` are prefix tokens: `count`, or 0 for a node without them.

        None if the rest is neither `n_patches` nor the positions of a square map.
        """
        for n_before in (self.count, 0):
            n_others = n_tokens - n_before
            if n_others > 0 and (n_others == self.n_patches or is_square(n_others)):
                return n_before
        return None


def declared_tokens(module: nn.Module) -> PrefixTokens:
    """Return the prefix tokens that a network declares: timm's have num_prefix_tokens, others a
    parameter for each kind of token.
    """
    sizes: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        kind = _TOKEN_KINDS.get(name.rpartition(".")[2])
        # (1, tokens, C), (tokens, C) or (C,). The first of each kind: those of a decoder come
        # later.
        if kind is not None and kind not in sizes:
            sizes[kind] = parameter.shape[-2] if parameter.ndim > 1 else 1
    has_class_token = getattr(module, "has_class_token", None)
    if not isinstance(has_class_token, bool):
        has_class_token = "class" in sizes
    holders = (module, getattr(module, "config", None))
    for attribute in ("num_register_tokens", "n_storage_tokens"):
        for holder in holders:
            if isinstance(declared := getattr(holder, attribute, None), int):
                sizes.setdefault("register", declared)
    count = getattr(module, "num_prefix_tokens", None)
    if not isinstance(count, int):
        count = sum(sizes.values())
    n_patches = getattr(getattr(module, "patch_embed", None), "num_patches", None)
    return PrefixTokens(count, has_class_token, n_patches if isinstance(n_patches, int) else None)


def find_nodes(
    module: nn.Module,
    image_shape: tuple[int, int, int],
    network_name: str,
    prefix_tokens: int | None,
) -> Nodes:
    """Return the nodes of a network for images of `image_shape` (H, W, C).

    prefix_tokens: count of class, register and distillation tokens before the patches; None: as
    many as the network declares.

    Raises BackboneError when the network does not take that image size.
    """
    tokens = declared_tokens(module) if prefix_tokens is None else PrefixTokens(prefix_tokens)
    # By running it once on the meta device, which computes only shapes; not by tracing its code, so
    # that any module works.
    try:
        return _run_with_hooks(shapes_only(module), image_shape, torch.device("meta"), tokens)
    except Exception:  # noqa: BLE001 - networks that compute with values need real ones: see below
        pass
    device = next(module.parameters(), torch.empty(0)).device
    try:
        return _run_with_hooks(module, image_shape, device, tokens)
    except BackboneError:
        raise
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        raise BackboneError(
            f"{network_name} does not run on images of {image_shape[0]} x {image_shape[1]} pixels "
            f"and {image_shape[2]} channels{dtype_hint(module)}: "
            f"{type(error).__name__}: {str(error)[:300]}. Leave image_size out for the weights' "
            "own size."
        ) from error


def dtype_hint(module: nn.Module) -> str:
    """Return what to do about weights of another type than the images, float32; "" if none are."""
    others = {
        str(tensor.dtype).removeprefix("torch.")
        for tensor in module.parameters()
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    }
    return f" (its weights are {', '.join(sorted(others))}: return network.float())" * bool(others)


class _CountMultiplyAdds(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the operations of matrix products, convolutions and attention, by PyTorch's formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def shapes_only(module: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers have shapes and no values (meta device)."""
    memo: dict[int, Any] = {}  # {id of a tensor: its copy}, which deepcopy takes instead of copying
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=False
        )
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    # A copy of the rest too, because networks may keep values that they compute in a pass.
    return copy.deepcopy(module, memo)


class _Captured(NamedTuple):
    """A value of a forward pass that may become a node."""

    name: str
    module: str  # whose output it is, or, for PRE_LOGITS, its input
    shape: tuple[int, ...]  # with N
    flops: int  # of the pass up to here


def _run_with_hooks(
    module: nn.Module,
    image_shape: tuple[int, int, int],
    device: torch.device,
    tokens: PrefixTokens,
) -> Nodes:
    captured_outputs, linear_inputs, call_counts, total_flops = _capture(
        module, image_shape, device
    )
    shape_of_name = {output.name: output.shape for output in captured_outputs}
    logits_shape = captured_outputs[-1].shape
    for linear_input in reversed(linear_inputs):
        linear_name = linear_input.module
        # The classifier: the last linear layer that runs once, on one vector per image, with an
        # output of the logits' shape.
        if (
            len(linear_input.shape) == 2
            and call_counts.get(linear_name) == 1
            and shape_of_name[linear_name] == logits_shape
        ):
            classifier_index = [output.name for output in captured_outputs].index(linear_name)
            captured_outputs.insert(classifier_index, linear_input)
            break
    repeated = frozenset(name for name, count in call_counts.items() if count > 1)
    nodes = []
    for name, module_name, shape, flops_so_far in captured_outputs:
        layout = _tensor_layout(shape)
        if module_name in repeated or layout is None:
            continue
        n_prefix_tokens = tokens.before_patches(shape[1]) if layout == "NTC" else 0
        has_class_token = layout == "NTC" and bool(n_prefix_tokens) and tokens.has_class_token
        cost = flops_so_far / max(total_flops, 1)
        nodes.append(
            Node(name, module_name, layout, shape[1:], n_prefix_tokens, has_class_token, cost)
        )
    # A multiply-add is two operations.
    return Nodes(tuple(nodes), repeated, total_flops // 2 // _BATCH)


def _capture(
    module: nn.Module, image_shape: tuple[int, int, int], device: torch.device
) -> tuple[list[_Captured], list[_Captured], dict[str, int], int]:
    """Run a batch of zeros; return the outputs of modules, the inputs of linear layers, the calls
    of each module, and the operations of the whole pass.
    """
    captured_outputs: list[_Captured] = []
    linear_inputs: list[_Captured] = []
    call_counts: dict[str, int] = {}
    # The module to hook for the network's output: the network itself (""), or, for an ONNX graph,
    # the submodule of its last value, so that one pass gives it together with other nodes.
    output_module = getattr(module, "output_module", "")
    counter = _CountMultiplyAdds()

    def after(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        call_counts[name] = call_counts.get(name, 0) + 1
        if isinstance(tensor := output_tensor(output), Tensor):
            shape, node_module = tuple(tensor.shape), name or output_module
            captured_outputs.append(_Captured(name or LOGITS, node_module, shape, counter.flops))

    def before(name: str, _module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            shape = tuple(args[0].shape)
            linear_inputs.append(_Captured(PRE_LOGITS, name, shape, counter.flops))

    # Not inference_mode, in which convolutions are dispatched under names that have no formula.
    with torch.no_grad(), counter, contextlib.ExitStack() as hooks:
        for name, child in module.named_modules():
            hooks.enter_context(child.register_forward_hook(functools.partial(after, name)))
            if isinstance(child, nn.Linear):
                pre_hook = functools.partial(before, name)
                hooks.enter_context(child.register_forward_pre_hook(pre_hook))
        output = module(torch.zeros(_BATCH, image_shape[2], *image_shape[:2], device=device))
    if not captured_outputs:
        raise BackboneError(
            f"the network returns a value of type {type(output).__name__}, and no layer of it "
            "gives a tensor: return a tensor from its forward function"
        )
    return captured_outputs, linear_inputs, call_counts, counter.flops


def _tensor_layout(shape: tuple[int, ...]) -> Layout | None:
    if not shape or shape[0] != _BATCH or 0 in shape:
        return None
    if len(shape) == 4:
        # Inputs are nearly always square, so height and width are the two axes that are equal;
        # channels first if that does not decide.
        _, a, b, c = shape
        return "NHWC" if a == b and b != c else "NCHW"
    return {3: "NTC", 2: "NC"}.get(len(shape))  # type: ignore[return-value]


def output_tensor(output: Any) -> Any:
    """Return a module's output, or the first of a tuple: layers of transformers return tuples."""
    return output[0] if type(output) is tuple and output else output


def is_square(count: int) -> bool:
    """Return whether `count` is the number of positions of a square map."""
    return count > 0 and math.isqrt(count) ** 2 == count
