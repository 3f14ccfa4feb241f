"""Attention on a CPU by oneDNN, where PyTorch's own is much slower.

PyTorch multiplies the matrices of attention with MKL, which uses half of the vector units of AMD's
Zen 5. Measured there on one thread, against PyTorch: 1.1 times as fast at 200 to 257 tokens, 1.4 to
1.6 times at 400 to 1,370.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from headrace.extract.backbones.fused import Forward, outputs_agree

# Below, the gain is near `_MIN_GAIN`, and would be decided by chance.
_MIN_TOKENS = 400
_MAX_SCORES = 2**21  # of one attention head in memory at a time: 8 MB
_MIN_ROWS = 64  # of scores computed together, so that very many tokens do not make tiny products
# Far from 1, so that processes on one kind of machine decide alike, and features have equal bits.
_MIN_GAIN = 1.25


def with_fast_attention(forward: Forward, pixels: Tensor) -> Forward:
    """Return the pass with oneDNN's attention if that is much faster for these pixels and gives the
    same outputs; else `forward` itself.
    """
    trial = _Trial()
    with trial:
        outputs = forward(pixels)
    if trial.gain() < _MIN_GAIN:
        return forward

    def faster(pixels: Tensor) -> list[Tensor]:
        with _FastAttention():
            return forward(pixels)

    return faster if outputs_agree(faster(pixels), outputs) else forward


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(query keyᵀ scale) value of each head, as `scaled_dot_product_attention` does.

    query: (N, heads, tokens, width); key: (N, heads, keys, width); value: (N, heads, keys, any
    width); all float32 on the CPU. Returns (N, heads, tokens, width of value).
    """
    # The kernel of linear layers, multiply(x, w) = x wᵀ; the other arguments leave out bias and
    # activation.
    multiply = torch.ops.mkldnn._linear_pointwise.default
    n_images, n_heads, n_tokens, _ = query.shape
    # (N, tokens, heads, width), so that the linear layer after it reads it without a copy.
    output = query.new_empty(n_images, n_tokens, n_heads, value.shape[-1])
    query, key = query.contiguous(), (key * scale).contiguous()
    value = value.transpose(-1, -2).contiguous()
    step = max(_MIN_ROWS, _MAX_SCORES // key.shape[-2])
    for image in range(n_images):
        for head in range(n_heads):
            for start in range(0, n_tokens, step):
                rows = slice(start, start + step)
                scores = multiply(query[image, head, rows], key[image, head], None, "none", [], "")
                torch.softmax(scores, -1, out=scores)
                output[image, rows, head] = multiply(
                    scores, value[image, head], None, "none", [], ""
                )
    return output.transpose(1, 2)


def _attend_if_served(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return what `attend` gives for a call of `scaled_dot_product_attention`, None for calls that
    it does not serve.
    """
    applies = (
        attn_mask is None
        and not dropout_p
        and not is_causal
        and query.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and key.shape[-2] >= _MIN_TOKENS
        and query.dtype is key.dtype is value.dtype is torch.float32
        and query.device.type == "cpu"
        # With several threads, PyTorch gives each of them heads of its own.
        and torch.get_num_threads() == 1
    )
    if not applies:
        return None
    return attend(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)


class _FastAttention(TorchFunctionMode):
    """Within it, attention is computed by `attend` where that applies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fast = _attend_if_served(*args, **kwargs) if func is scaled_dot_product_attention else None
        return func(*args, **kwargs) if fast is None else fast


class _Trial(TorchFunctionMode):
    """Computes attention both ways, and notes the CPU seconds of each."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds: list[tuple[float, float]] = []  # of each call: PyTorch's, ours

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        started = time.thread_time()
        output = func(*args, **kwargs)
        between = time.thread_time()
        if _attend_if_served(*args, **kwargs) is not None:
            self._seconds.append((between - started, time.thread_time() - between))
        return output

    def gain(self) -> float:
        """Return how much faster ours was, by the best call of each; 0 where it never applied."""
        if not self._seconds:
            return 0.0
        theirs = min(seconds for seconds, _ in self._seconds)
        ours = min(seconds for _, seconds in self._seconds)
        return theirs / max(ours, 1e-9)
