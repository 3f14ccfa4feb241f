"""CUDA graphs: the kernels of one pass recorded once and launched together, for one batch shape."""

import warnings

import torch
from torch import Tensor

from headrace.extract.backbones.fused import Forward, outputs_agree

# passes before the one that is compared: the first chooses cuDNN's kernels and compiles
_WARM_UPS = 2


class GraphedForward:
    """A pass, and its CUDA graph for the shape that was last asked for.

    Called, it is the pass itself. A graph that cannot be recorded, or whose outputs are not those
    of the pass, is done without, with one warning.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._is_refused = False
        self.release()

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        return self._forward(pixels)

    def replay(self, pixels: Tensor) -> list[Tensor]:
        """Return the outputs for `pixels` on the device, valid on the current stream until the next
        call. Raises what the pass raises, out of memory too.
        """
        if self._is_refused:
            return self._forward(pixels)
        if self._graph is None or self._pixels.shape != pixels.shape:
            self.release()
            return self._record(pixels)
        self._pixels.copy_(pixels)
        self._graph.replay()
        return self._outputs

    def release(self) -> None:
        """Let go of the graph and its memory."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pixels = torch.empty(0)
        self._outputs: list[Tensor] = []

    def _record(self, pixels: Tensor) -> list[Tensor]:
        # Recorded with black images: where a network keeps something of its first batch, the
        # outputs for `pixels` are then others, and are compared.
        static_pixels = torch.zeros_like(pixels)
        # Warm-up and recording are on one stream: ROCm makes handles of its libraries for each
        # stream, which it cannot do while it records.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._forward(static_pixels)
            # Here too, for memory that was allocated for one stream is of no use to another.
            expected = self._forward(pixels)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: others pin memory for the batches to come.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                # Autocast begins and ends within the pass, so that its casts are recorded too.
                outputs = self._forward(static_pixels)
            static_pixels.copy_(pixels)
            graph.replay()
            reason = None if outputs_agree(outputs, expected) else "its outputs are others"
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
        if reason is not None:
            # Many versions of PyTorch keep the memory of a recording that failed (its issue
            # 190348), so that it is not tried again.
            self._is_refused = True
            warnings.warn(
                f"the pass runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=4
            )
            return expected
        self._graph, self._pixels, self._outputs = graph, static_pixels, outputs
        return outputs
