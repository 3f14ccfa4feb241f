"""Running a pass on a device: batches that fit, copies that nothing waits for."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.extract.errors import BackboneError
from headrace.extract.taps.forward import Forward

# Measured with EfficientNet-Lite0 at 300 px on one core: 1 image at a time 36/s, 4 40/s, 8 41/s, 16
# 42/s.
CPU_BATCH = 8
_CUDA_BATCHES = (32, 64, 128, 256, 512, 1024)
_SMALL_BATCHES = (16, 8, 4, 2)  # where not even the smallest of those fits
_WORTH_DOUBLING = 1.05  # a larger batch must be this much faster, or its memory is better left free

# Waits for a batch's outputs and returns them, per tap, (N, ...) float16 or float32
PendingOutputs = Callable[[], list[npt.NDArray[Any]]]


@dataclass
class BatchLimit:
    """The largest batch that has fitted so far; only ever lowered."""

    images: int


def check_device(device: str) -> None:
    """Raise BackboneError when the device is not there."""
    try:
        device_type = torch.device(device).type
    except RuntimeError as error:
        raise BackboneError(f"device {device!r}: expected cpu, cuda or cuda:N") from error
    if device_type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(
            f"device {device!r}: PyTorch {torch.__version__} sees no GPU here. Use device cpu."
        )


def launch_forward(
    forward: Forward, pixels: Tensor, device: str, batch_limit: BatchLimit
) -> PendingOutputs:
    """Start a pass over `pixels` (N, H, W, C) on the host, in parts that fit.

    On CUDA this returns while the device works, and the outputs come back through pinned memory. A
    part that runs out of memory is halved and tried again, and `batch_limit` remembers; an image
    that does not fit alone raises OutOfMemoryError.
    """
    output_parts: list[list[Tensor]] = []
    part_start = 0
    while part_start < len(pixels):
        pixel_part = pixels[part_start : part_start + batch_limit.images]
        try:
            output_parts.append(_to_host(forward(pixel_part.to(device, non_blocking=True))))
            part_start += len(pixel_part)
            continue
        except torch.OutOfMemoryError:
            if len(pixel_part) == 1:
                raise
        # Here, for the exception holds on to what the pass had allocated.
        batch_limit.images = len(pixel_part) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    done_event = _event(device) if torch.device(device).type == "cuda" else None

    def result() -> list[npt.NDArray[Any]]:
        if done_event is not None:
            done_event.synchronize()
        return [
            np.concatenate([output.numpy() for output in outputs])
            for outputs in zip(*output_parts, strict=True)
        ]

    return result


def _event(device: str) -> "torch.cuda.Event":
    """Record an event that is complete once the device has done all that it was given so far."""
    done_event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    # Of this device: without a stream, that of the process's current one is meant, which is the
    # first GPU's.
    done_event.record(torch.cuda.current_stream(device))
    return done_event


def _to_host(outputs: list[Tensor]) -> list[Tensor]:
    return [
        _copy(output.float() if output.dtype is torch.bfloat16 else output) for output in outputs
    ]  # NumPy has none


def _copy(output: Tensor) -> Tensor:
    if output.device.type == "cpu":
        return output
    host_tensor = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
    return host_tensor.copy_(output, non_blocking=True)


def find_batch_size(forward: Forward, image_shape: tuple[int, ...], device: str) -> int:
    """The batch size to use: fixed on a CPU; on CUDA the smallest that is as fast as the fastest
    that fits. image_shape: (H, W, C).
    """
    if torch.device(device).type == "cpu":
        return CPU_BATCH
    return try_batch_sizes(
        lambda batch_size: _images_per_s(forward, image_shape, device, batch_size)
    )


def try_batch_sizes(images_per_s: Callable[[int], float]) -> int:
    """The last of doubling batch sizes that was worth it; where none fits, the largest below that
    does.

    `images_per_s` may raise OutOfMemoryError.
    """
    best_size, best_rate = 0, 0.0
    for batch_size in _CUDA_BATCHES:
        size_rate = _if_it_fits(images_per_s, batch_size)
        if size_rate is None or size_rate < best_rate * _WORTH_DOUBLING:
            break
        best_size, best_rate = batch_size, size_rate
    return best_size or next(
        (
            batch_size
            for batch_size in _SMALL_BATCHES
            if _if_it_fits(images_per_s, batch_size) is not None
        ),
        1,
    )


def _if_it_fits(images_per_s: Callable[[int], float], batch_size: int) -> float | None:
    try:
        return images_per_s(batch_size)
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()
    return None


def _images_per_s(
    forward: Forward, image_shape: tuple[int, ...], device: str, batch_size: int
) -> float:
    pixels = torch.zeros((batch_size, *image_shape), dtype=torch.uint8, device=device)
    forward(pixels)  # chooses kernels, and compiles
    torch.cuda.synchronize(device)
    start_time = time.perf_counter()
    for _ in range(3):
        forward(pixels)
    torch.cuda.synchronize(device)
    return 3 * batch_size / (time.perf_counter() - start_time)
