"""Banks of convolutional heads on spatial taps (`layer4.map`): 3 × 3 layers, a mean, an MLP.

N rows, V views, D channels, h × w positions, C outputs.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from headrace.heads.arrays import Array, Arrays, Floats
from headrace.heads.data.checks import check_specs
from headrace.heads.data.streamed import StreamedRows
from headrace.heads.data.task import TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.errors import HeadError
from headrace.heads.layers import Layers, predict_dense
from headrace.heads.networks.bank import Family, fit_networks, stack
from headrace.heads.networks.conv_batch import ConvBatch
from headrace.heads.networks.kind import ConvSpec
from headrace.heads.networks.mlp_data import FoldData
from headrace.heads.spec import FitResult, Halving

# Memory for activations and gradients of the heads that are trained side by side on a CPU.
CPU_BATCH_BYTES = 256 << 20
ROWS_AT_ONCE = 256  # maps that are predicted at once


def fit_conv_bank(
    data: TrainingData,
    specs: Sequence[ConvSpec],
    *,
    refit: bool = True,
    device: str = "cpu",
    halving: Halving | None = None,
) -> list[FitResult]:
    """Fit as `fit_mlp_bank` does, for maps X (N, D, h, w) or (V, N, D, h, w): V views of each row.

    Maps are standardized channel by channel. Heads of equal channels, hidden widths and batch size
    train side by side. Raises HeadError for features that are no maps or not finite.
    """
    check_specs(specs, "ConvSpec((64,))")
    X = data.X
    if X.ndim not in ((4,) if isinstance(X, StreamedRows) else (4, 5)):
        raise HeadError(
            f"a convolution head needs maps (N, channels, h, w), found {X.shape}: give a tap like "
            "layer4.map"
        )
    stacked = stack(X, 4)
    positions = math.prod(stacked.shape[3:])

    def head_bytes(spec: ConvSpec) -> int:
        # float32: each layer's product, its normalized value and the gradients of both.
        return 16 * spec.batch_size * positions * sum(spec.channels)

    def make_batch(chunk: list[ConvSpec], fold_data: FoldData, held_out_fold: int) -> ConvBatch:
        return ConvBatch(chunk, fold_data.rows, fold=held_out_fold, device=torch.device(device))

    family = Family(
        batch_key=lambda spec: (spec.channels, spec.hidden, spec.batch_size, True),
        head_bytes=head_bytes,
        batch_bytes=CPU_BATCH_BYTES,
        make_batch=make_batch,
        to_arrays=_with_scaling,
    )
    return fit_networks(stacked, data, specs, family, refit=refit, device=device, halving=halving)


def predict_maps(layers: Layers, X: Array, task_kind: TaskKind, temperature: float) -> Floats:
    """Return (n, C) float32 predictions of maps X (n, D, h, w) at a temperature."""
    blocks = [X[start : start + ROWS_AT_ONCE] for start in range(0, len(X), ROWS_AT_ONCE)] or [X]
    with torch.no_grad():
        return np.concatenate(
            [
                predict_dense(layers, _pooled(layers, maps), task_kind, temperature)
                for maps in blocks
            ]
        )


def _pooled(layers: Layers, X: Array) -> Floats:
    """Return the means (n, channels) over positions after the convolutions."""
    assert layers.mean is not None
    assert layers.inverse_scale is not None
    # The mean is not folded into the first kernel: at the border the padding stands for
    # standardized zeros.
    scale, mean = layers.inverse_scale[:, None, None], layers.mean[:, None, None]
    maps = torch.from_numpy((X.astype(np.float32) - mean) * scale)
    for kernel, shift in layers.convolutions:
        maps = F.relu(F.conv2d(maps, torch.from_numpy(kernel), torch.from_numpy(shift), padding=1))
    pooled: Floats = maps.mean((2, 3)).numpy()
    return pooled


def _with_scaling(layers: Arrays, data: FoldData) -> Arrays:
    """Return a head's layers with its input scaling, the targets' folded into the last layer."""
    arrays = dict(layers)
    last = sum(name.startswith("weight") for name in arrays) - 1
    weight = arrays[f"weight{last}"].astype(np.float64)
    bias = arrays[f"bias{last}"].astype(np.float64)
    arrays[f"weight{last}"] = (weight * data.target_scale[:, None]).astype(np.float32)
    arrays[f"bias{last}"] = (bias * data.target_scale + data.target_mean).astype(np.float32)
    arrays["mean"] = data.mean.astype(np.float32)
    arrays["inverse_scale"] = (1 / data.scale).astype(np.float32)
    return arrays
