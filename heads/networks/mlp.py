"""A bank of multi-layer perceptrons: specs × folds, trained together.

N rows, V views, D features.

Heads that share a fold, depth, width and batch size share their minibatches (`mlp_batch.py`); since
every head of such a batch trains on the same rows, nothing is masked and no product is spent on
held-out rows. A seed decides a head's first weights and its dropout.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch

from headrace.heads.data.checks import check_specs
from headrace.heads.data.task import TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.networks.bank import Family, fit_networks, stack
from headrace.heads.networks.kind import MLPSpec, NetworkSpec
from headrace.heads.networks.mlp_batch import NetworkBatch, padded_width
from headrace.heads.networks.mlp_data import FoldData, folded_arrays
from headrace.heads.spec import FitResult, Halving

Precision = Literal["auto", "float32", "bfloat16"]

# Memory for parameters and moments of the heads that are trained side by side on a CPU. Measured
# with 64 heads of 512 × 64: with 1 MB they take 2.1 times as long as with 48 MB, with 8 MB 1.15
# times; more gains nothing.
CPU_BATCH_BYTES = 64 << 20
# Below this many weights in a head's first layer its products are too small for reduced precision
# to pay.
REDUCED_PRECISION_WEIGHTS = 1 << 14


def fit_mlp_bank(
    data: TrainingData,
    specs: Sequence[MLPSpec],
    *,
    refit: bool = True,
    device: str = "cpu",
    halving: Halving | None = None,
    precision: Precision = "auto",
) -> list[FitResult]:
    """Train every spec on every fold, and with `refit` on all rows.

    Returns the fits spec by spec, of each spec the folds and then REFIT.

    data: X (N, D), or (V, N, D) for V views of each row, or such rows streamed from shards:
    training picks one view per row and epoch, prediction averages.

    Each fold's heads stop early by the loss of its held-out rows and keep their best epoch; REFIT
    heads train for the mean best epoch of their spec. With `halving` the specs that drop out have
    fits of fewer epochs and none for REFIT.

    precision: "bfloat16" multiplies the first layer's inputs and weights in bfloat16 and adds in
    float32 (master weights, optimizer and every other layer are float32); "auto" does so for large
    first layers of classifiers, where the processor is faster at it.

    A head that fails (a bad spec, a loss that is not finite) has an `error`; the others are
    unaffected. Raises ValueError for features that are not finite, naming the row.
    """
    check_specs(specs, "MLPSpec((64,))")
    stacked, n_classes, task = stack(data.X, 2), data.n_outputs, data.task_kind
    width = stacked.shape[2]

    def widths(spec: MLPSpec) -> tuple[int, ...]:
        return tuple(padded_width(units) for units in spec.hidden)

    def head_bytes(spec: MLPSpec) -> int:
        sizes = itertools.pairwise((width, *widths(spec), n_classes))
        return 12 * sum((i + 1) * o for i, o in sizes)  # parameters and two moments, float32

    def make_batch(chunk: list[MLPSpec], fold_data: FoldData, held_out_fold: int) -> NetworkBatch:
        where = torch.device(device)
        reduced = reduced_precision(chunk[0], width, task, where, precision)
        dtype = torch.bfloat16 if reduced else torch.float32
        return NetworkBatch(chunk, fold_data.rows, fold=held_out_fold, device=where, dtype=dtype)

    family = Family(
        batch_key=lambda spec: (widths(spec), spec.batch_size, spec.standardize),
        head_bytes=head_bytes,
        batch_bytes=CPU_BATCH_BYTES,
        make_batch=make_batch,
        to_arrays=folded_arrays,
    )
    return fit_networks(stacked, data, specs, family, refit=refit, device=device, halving=halving)


def reduced_precision(
    spec: NetworkSpec, features: int, task: TaskKind, device: torch.device, precision: Precision
) -> bool:
    """Return whether a head is trained with bfloat16, by the head and the machine alone.

    Of MLPs that is the first layer, of heads on bags every value that a row has.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if task == "regression" or not spec.hidden:
        return False
    if features * padded_width(spec.hidden[0]) < REDUCED_PRECISION_WEIGHTS:
        return False
    if device.type != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    # AMD's Zen 4 multiplies bfloat16 at twice the rate of float32 (measured: 200 against 97 GF/s).
    # Intel's processors do so with AMX only: their AVX-512 instruction is slower than float32.
    return bool(capabilities.get("amx_bf16")) or (
        bool(capabilities.get("avx512_bf16")) and "AMD" in str(capabilities.get("cpu_name"))
    )
