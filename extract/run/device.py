"""Forward passes on a device: batches that fit its memory, and asynchronous copies.

`torch.accelerator` makes CUDA, ROCm, XPU and MPS one case.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.cache.out_of_memory import is_out_of_memory
from headrace.extract.backbones.fused import Forward
from headrace.extract.errors import BackboneError
from headrace.extract.run.cuda_graph import GraphedForward

# Images/s of EfficientNet-Lite0 at 300 px on one core: 36 in batches of 1, 40 of 4, 41 of 8, 42 of
# 16.
CPU_BATCH = 8
# Batch sizes that are tried on an accelerator, as long as each is worth its memory.
_BATCHES = (32, 64, 128, 256, 512, 1024)
_SMALL_BATCHES = (16, 8, 4, 2)  # tried if the smallest of `_BATCHES` does not fit
_WORTH_DOUBLING = 1.05  # a larger batch must be this much faster; else its memory stays free

# Waits for a batch's outputs and returns them, per tap, (N, ...) float16 or float32.
PendingOutputs = Callable[[], list[npt.NDArray[Any]]]


@dataclass
class BatchLimit:
    """The largest batch that a pass is given: lowered when one does not fit, and never raised."""

    images: int


def is_cpu(device: str) -> bool:
    """Return whether the device is the CPU."""
    return torch.device(device).type == "cpu"


def check_device(device: str) -> None:
    """Raise BackboneError when PyTorch cannot use the device on this machine."""
    try:
        requested = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(
            f"device {device!r}: expected cpu, or an accelerator of PyTorch's: cuda, xpu or mps, "
            "of several also with its number, cuda:1"
        ) from error
    if requested.type == "cpu":
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != requested.type:
        seen = "no GPU" if accelerator is None else f"{accelerator.type} and no {requested.type}"
        instead = "cpu" if accelerator is None else f"{accelerator.type} or cpu"
        raise BackboneError(
            f"device {device!r}: PyTorch {torch.__version__} sees {seen} here. Use device "
            f"{instead}."
        )
    count = torch.accelerator.device_count()
    if requested.index is not None and requested.index >= count:
        last = f"{requested.type}:{count - 1}"
        raise BackboneError(f"device {device!r}: the last of {count} here is {last}. Use that one.")


def current_device(device: str) -> contextlib.AbstractContextManager[Any]:
    """Make `device` the current one of its kind within the block."""
    # Operations that name no device, such as pinning memory, use the current one; by default that
    # is the first, and they would take memory of it.
    index = torch.device(device).index
    if is_cpu(device) or index is None:
        return contextlib.nullcontext()
    return torch.accelerator.device_index(index)


def launch_forward(
    forward: Forward, pixels: Tensor, device: str, batch_limit: BatchLimit
) -> PendingOutputs:
    """Start a pass over `pixels` (N, H, W, C) in host memory, in parts that fit the device.

    On an accelerator this returns while the device works, and the outputs come back through pinned
    memory. A part that runs out of memory is halved and tried again, and `batch_limit` is lowered
    for later batches. A pass that has a CUDA graph is given full batches only, the last one filled
    up.

    Raises the device's RuntimeError if a single image does not fit.
    """
    graphed = forward if isinstance(forward, GraphedForward) else None
    run = forward if graphed is None else graphed.replay
    output_parts: list[list[Tensor]] = []
    part_start = 0
    with current_device(device):
        while part_start < len(pixels):
            pixel_part = pixels[part_start : part_start + batch_limit.images]
            n_part = len(pixel_part)
            n_images = batch_limit.images if graphed else _batch_shape(n_part, batch_limit, device)
            try:
                outputs = run(_to_device(pixel_part, n_images, device))
                output_parts.append([_to_host(output[:n_part], device) for output in outputs])
                part_start += n_part
                continue
            except RuntimeError as error:
                # A single image that does not fit cannot be divided further.
                if n_images == 1 or not is_out_of_memory(error):
                    raise
            # Outside of `except`, where the exception's frames keep tensors of the pass alive.
            outputs = []
            if graphed is not None:
                graphed.release()
            batch_limit.images = n_images // 2
            _free_cached_memory(device)
        done_event = None if is_cpu(device) else _record_event(device)

    def result() -> list[npt.NDArray[Any]]:
        if done_event is not None:
            done_event.synchronize()
        return [
            np.concatenate([output.numpy() for output in outputs])
            for outputs in zip(*output_parts, strict=True)
        ]

    return result


def _batch_shape(n_images: int, batch_limit: BatchLimit, device: str) -> int:
    """Return the size to which a part of `n_images` is filled up with zeros.

    On an accelerator a power of two, within the limit; on a CPU n_images.
    """
    # Kernels are chosen, and networks compiled, once per shape, and undecodable images would
    # otherwise leave batches of any size.
    if is_cpu(device):
        return n_images
    return max(n_images, min(1 << (n_images - 1).bit_length(), batch_limit.images))


def _to_device(pixels: Tensor, n_images: int, device: str) -> Tensor:
    if len(pixels) == n_images:
        return pixels.to(device, non_blocking=True)
    filled = torch.zeros((n_images, *pixels.shape[1:]), dtype=pixels.dtype, device=device)
    filled[: len(pixels)].copy_(pixels, non_blocking=True)
    return filled


def _record_event(device: str) -> torch.Event:
    """Record an event that completes when the device has done all its work up to now."""
    done_event = torch.Event(device)
    # The stream of this device, because the default is that of the current one, the first GPU.
    done_event.record(torch.accelerator.current_stream(device))
    return done_event


def _to_host(output: Tensor, device: str) -> Tensor:
    if output.dtype is torch.bfloat16:
        output = output.float()  # NumPy has no bfloat16
    if is_cpu(device):
        return output
    # Into pinned memory: a copy into other memory waits for the device.
    host_tensor = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
    return host_tensor.copy_(output, non_blocking=True)


def _free_cached_memory(device: str) -> None:
    if not is_cpu(device):
        torch.accelerator.memory.empty_cache()


def find_batch_size(forward: Forward, image_shape: tuple[int, ...], device: str) -> int:
    """Return the batch size: CPU_BATCH on a CPU, measured on an accelerator (`try_batch_sizes`).

    image_shape: (H, W, C).
    """
    if is_cpu(device):
        return CPU_BATCH
    with current_device(device):
        return try_batch_sizes(
            lambda batch_size: _images_per_s(forward, image_shape, device, batch_size),
            lambda: _free_cached_memory(device),
        )


def try_batch_sizes(
    images_per_s: Callable[[int], float], free_memory: Callable[[], None] = lambda: None
) -> int:
    """Return the largest batch size that is worth doubling to: _WORTH_DOUBLING times as fast.

    If none of _BATCHES fits, the largest of _SMALL_BATCHES that fits, or 1.

    images_per_s: measures a batch size; when it runs out of memory, `free_memory` is called.
    """
    best_size, best_rate = 0, 0.0
    for batch_size in _BATCHES:
        size_rate = _if_it_fits(images_per_s, batch_size, free_memory)
        if size_rate is None or size_rate < best_rate * _WORTH_DOUBLING:
            break
        best_size, best_rate = batch_size, size_rate
    if best_size:
        return best_size
    for batch_size in _SMALL_BATCHES:
        if _if_it_fits(images_per_s, batch_size, free_memory) is not None:
            return batch_size
    return 1


def _if_it_fits(
    images_per_s: Callable[[int], float], batch_size: int, free_memory: Callable[[], None]
) -> float | None:
    try:
        return images_per_s(batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    return None


def _images_per_s(
    forward: Forward, image_shape: tuple[int, ...], device: str, batch_size: int
) -> float:
    pixels = torch.zeros((batch_size, *image_shape), dtype=torch.uint8, device=device)
    forward(pixels)  # chooses kernels, and compiles
    torch.accelerator.synchronize(device)
    start_time = time.perf_counter()
    for _ in range(3):
        forward(pixels)
    torch.accelerator.synchronize(device)
    return 3 * batch_size / (time.perf_counter() - start_time)
