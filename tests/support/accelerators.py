"""Accelerators without one: "cuda" is sent to the CPU, or its tensors are simulated; what a device
would be asked for is noted.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Noted:
    """What was asked of the stand-in, in order."""

    events: list[str] = field(default_factory=list)  # "recorded on the stream of cuda:1", "waited"
    current: list[int] = field(default_factory=list)  # devices that were made the current one
    # at each emptying of the cache: outputs of convolutions that something still held
    alive_when_emptied: list[int] = field(default_factory=list)
    # outputs of convolutions so far
    outputs: "list[weakref.ref[torch.Tensor]]" = field(default_factory=list)
    batches: set[int] = field(default_factory=set)  # sizes that convolutions were given


@contextlib.contextmanager
def cuda_on_cpu(count: int = 2, room: int | None = None) -> Iterator[Noted]:
    """Have the CPU compute for "cuda", "cuda:0" …, `count` of them.

    room: images that a convolution has memory for; with more it raises OutOfMemoryError.
    """
    noted = Noted()
    with _accelerators(noted, count), _SentToCpu(noted, room):
        yield noted


@contextlib.contextmanager
def fake_cuda(count: int = 2) -> Iterator[Noted]:
    """Simulate tensors on `count` GPUs: their shapes, dtypes and devices, no values. Two that are
    not on the same device cannot be added.
    """
    noted = Noted()
    with (
        _accelerators(noted, count),
        FakeTensorMode(),
        # PyTorch 2.11 asks the driver for a context where a GPU is available
        mock.patch("torch._subclasses.fake_tensor.init_gpu_context"),
        # or autocast warns; without a GPU it casts nothing
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
    ):
        yield noted


def simulate(module: torch.nn.Module, device: str) -> None:
    """Put a module on a GPU of `fake_cuda`: simulated tensors cannot take the place of real ones by
    `to`.
    """
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, value in tensors.items():
                if value is not None:
                    tensors[name] = torch.empty(value.shape, dtype=value.dtype, device=device)


@contextlib.contextmanager
def cuda_graphs(noted: Noted, refusal: str | None = None) -> Iterator[None]:
    """Have `torch.cuda.graph` record operators on the CPU, and a replay run them again on the very
    tensors; streams are names.

    refusal: what recording raises in the middle of the pass.
    """

    @contextlib.contextmanager
    def record(graph: Any, *, stream: object, capture_error_mode: str) -> Iterator[None]:
        noted.events.append(f"recording on {stream}, {capture_error_mode}")
        with stream_of(stream), graph:
            yield
            if refusal is not None:
                raise RuntimeError(refusal)

    class Stream:
        def wait_stream(self, other: object) -> None:
            noted.events.append(f"{self} waits for {other}")

        def __str__(self) -> str:
            return "the default stream" if self is default else "the side stream"

    @contextlib.contextmanager
    def stream_of(stream: object) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    class Recording(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[Any, Any, Any, Any]] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            self.calls.append((func, args, kwargs or {}, result))
            return result

        def replay(self) -> None:
            noted.events.append(f"replayed on {streams[-1]}")
            with torch.inference_mode():
                for func, args, kwargs, result in self.calls:
                    again = func(*args, **kwargs)
                    if isinstance(result, torch.Tensor) and again is not result:
                        result.copy_(again)

    default = Stream()
    streams: list[object] = [default]
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("CUDAGraph", Recording),
            ("graph", record),
            ("Stream", Stream),
            ("stream", stream_of),
            ("current_stream", lambda: streams[-1]),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield


class _SentToCpu(TorchFunctionMode):
    """Every torch function that is given a CUDA device is given the CPU; pinned memory is ordinary
    memory.
    """

    def __init__(self, noted: Noted, room: int | None) -> None:
        super().__init__()
        self.noted, self.room = noted, room

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.device:
            args = [_on_cpu(value) for value in args]
            kwargs = {name: _on_cpu(value) for name, value in kwargs.items()}
        kwargs.pop("pin_memory", None)
        is_convolution = func in (torch.conv2d, torch.nn.functional.conv2d)
        if is_convolution:
            self.noted.batches.add(len(args[0]))
            # Not the first, of three channels: then activations are there, as on a device.
            if self.room is not None and len(args[0]) > self.room and args[0].shape[1] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
        output = func(*args, **kwargs)
        if is_convolution:
            self.noted.outputs.append(weakref.ref(output))
        return output


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_cuda else value


@contextlib.contextmanager
def _accelerators(noted: Noted, count: int) -> Iterator[None]:
    class Event:
        def __init__(self, device: object = None) -> None:
            self.device = device

        def record(self, stream: object = None) -> None:
            noted.events.append(f"recorded on {stream or 'the stream of the current device'}")

        def synchronize(self) -> None:
            noted.events.append("waited")

    @contextlib.contextmanager
    def device_index(index: int) -> Iterator[None]:
        noted.current.append(index)
        yield

    def empty_cache() -> None:
        noted.alive_when_emptied.append(sum(ref() is not None for ref in noted.outputs))

    with contextlib.ExitStack() as stack:
        for holder, name, value in (
            (torch, "Event", Event),
            (torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")),
            (torch.accelerator, "device_count", lambda: count),
            (torch.accelerator, "current_stream", lambda device: f"the stream of {device}"),
            (torch.accelerator, "synchronize", lambda device: None),
            (torch.accelerator, "device_index", device_index),
            (torch.accelerator.memory, "empty_cache", empty_cache),
            (torch.backends.cudnn, "flags", lambda **_: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(holder, name, value))
        yield
