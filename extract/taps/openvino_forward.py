"""The pass on a CPU by OpenVINO, whose kernels take less time than PyTorch's for most networks."""

import importlib.util
import sys
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from headrace.extract.backbones.fused import Forward, outputs_agree
from headrace.extract.errors import BackboneError

# Images per call: EfficientNet-Lite0 at 300 px takes 9.3 ms an image by 1 or 2, 10.9 by 8, whose
# activations do not stay in the cache. Memory and kernels are made once per shape.
_BATCH = 2
_REASON_LENGTH = 400


def require_openvino() -> None:
    """Raise BackboneError if the library is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise BackboneError(
            "compute.runtime: openvino needs the library openvino. Try: pip install "
            "'headrace[openvino]', or write runtime: torch"
        )


class _Traced(nn.Module):
    """A pass as a module, with the network as its part, so that it can be traced."""

    def __init__(self, network: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.network, self.run_forward = network, forward

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.run_forward(pixels))


def openvino_forward(network: nn.Module, forward: Forward, pixels: Tensor) -> Forward:
    """Return a pass through the network by OpenVINO, on as many threads as PyTorch has now.

    forward: the pass by PyTorch, whose hooks `network` has. pixels: (1, H, W, C) that it is traced
    with. If OpenVINO cannot do the pass, or its outputs are others, `forward` is returned, with a
    warning that names the reason. Raises BackboneError if the library is not installed.
    """
    require_openvino()
    try:
        with warnings.catch_warnings(action="ignore"):  # the tracer warns of each branch in Python
            by_openvino = _compile(_Traced(network, forward), pixels.float())
        # Other images than the traced one, two of them and one darker: what a trace takes for a
        # constant, such as the outputs of another runtime or a branch, would not be seen otherwise.
        others = torch.cat([255 - pixels, pixels // 4])
        if outputs_agree(by_openvino(others), forward(others)):
            return by_openvino
        reason = "its outputs are others"
    except Exception as error:  # noqa: BLE001 - whatever tracing or compilation raise
        # What is wrong stands some lines below the first.
        reason = " ".join(f"{type(error).__name__} {error}".split())[:_REASON_LENGTH]
    warnings.warn(f"the pass runs by PyTorch, not by OpenVINO: {reason}", RuntimeWarning, 2)
    return forward


def _compile(traced: _Traced, pixels: Tensor) -> Forward:
    # Its import would report itself to Intel over the network; without this package it does not.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # Not `openvino.convert_model`, which needs the package that reports to Intel.
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=pixels)
    model = frontend.convert(frontend.load(decoder))
    model.reshape({model.inputs[0]: openvino.PartialShape([-1, *pixels.shape[1:]])})
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 where the processor has it, by default
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            # By default each process binds its threads to the first cores, all to the same.
            "ENABLE_CPU_PINNING": False,
        },
    )

    def forward(pixels: Tensor) -> list[Tensor]:
        # Of uint8 pixels too: an input of another type than the traced one would be cast to that.
        batch_outputs = [
            compiled(batch.float().contiguous().numpy(), share_inputs=True, share_outputs=False)
            for batch in torch.split(pixels, _BATCH)
        ]
        return [
            torch.from_numpy(np.concatenate([outputs[index] for outputs in batch_outputs]))
            for index in range(len(compiled.outputs))
        ]

    return forward
