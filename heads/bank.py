"""Training a bank of heads on a worker: paths and specs in, one results file out.

N rows, V views, D features, C outputs.
"""

import dataclasses
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from headrace.cache.atomic_io import publish_bytes
from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import open_feature_set
from headrace.cache.out_of_memory import is_out_of_memory
from headrace.heads.arrays import Mask
from headrace.heads.data.features import (
    load_rows,
    loaded_bytes,
    rows_with_features,
    stream_rows,
    tap_widths,
)
from headrace.heads.data.side_columns import SideColumn, SideColumns, load_side_columns, side_blocks
from headrace.heads.data.standardize import Features
from headrace.heads.data.task import REFIT, Task, load_task
from headrace.heads.data.training_data import TrainingData
from headrace.heads.errors import HeadError
from headrace.heads.evaluate.units import held_out_metrics
from headrace.heads.kind import INSTANCE_WEIGHT, FitOptions, HeadKind
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.results import read_bank, results_bytes
from headrace.heads.spec import FitResult, Halving, HeadSpec

Fit = Callable[[Sequence[HeadSpec]], list[FitResult]]


@dataclass(frozen=True)
class BankJob:
    """Everything a worker needs, small enough to send: paths and specs."""

    task: str  # path of an .npz of `save_task`, without test rows
    # Directories of feature sets; those that differ only in the view are views of one another, all
    # others are concatenated.
    features: tuple[str, ...]
    specs: tuple[HeadSpec, ...]  # all of one kind
    result: str  # path of the results file
    threads: int = 1
    device: str = "cpu"
    refit: bool = True  # also train each spec on all rows
    # For kinds that `can_halve`: stop bad specs early; they are not trained on all rows.
    halving: Halving | None = None
    # Features that need more are streamed from their shards; None: `worker_memory`.
    memory_bytes: int | None = None
    # Path of the task's side columns (`save_side_columns`), which are appended to the features.
    side_columns: str | None = None


@dataclass(frozen=True)
class BankReport:
    """What a worker returns of a bank that it has trained."""

    result: str  # path of the results file
    heads: int
    failed: int  # heads with an error
    seconds: float  # wall time
    skipped: bool  # whether the results existed


def train_bank(job: BankJob) -> BankReport:
    """Train the job's heads and publish their results, unless the results exist. A head that fails
    is a row with its error.

    Raises HeadError, and the errors of opening the task and the features.
    """
    started = time.perf_counter()
    skipped = Path(job.result).exists()
    if not skipped:
        kinds = {spec.kind for spec in job.specs}
        if len(kinds) != 1:
            raise HeadError(
                f"a bank's heads are all of one kind, found {sorted(kinds) or 'no head'}: make one "
                "bank of each kind"
            )
        with threadpool_limits(job.threads):
            _train(job, HEAD_KINDS[kinds.pop()])
    table = read_bank(job.result).table
    n_failed = int(table["error"].notna().sum())
    return BankReport(job.result, len(table), n_failed, time.perf_counter() - started, skipped)


def _train(job: BankJob, kind: HeadKind) -> None:
    task = load_task(Path(job.task))
    side = None if job.side_columns is None else load_side_columns(Path(job.side_columns))
    X, has_features, bands = _load_features(job, task, kind, side)
    if not has_features.any():
        features = Path(job.features[0])  # CACHE/features/FINGERPRINT
        raise HeadError(
            f"none of the {count_text(len(has_features), 'image')} of {job.task} has features. "
            f"Why not: `headrace cache show {features.name} --cache "
            f"{shlex.quote(str(features.parent.parent))}`"
        )
    fits = fit_bank(
        X,
        task.take(has_features),
        job.specs,
        refit=job.refit,
        threads=job.threads,
        device=job.device,
        halving=job.halving,
        bands=bands,
        side=() if side is None else side.columns,
    )
    _publish(job, task, has_features, fits)


def publish_failure(job: BankJob, reason: str) -> None:
    """Publish results in which every head of the bank has failed for this reason."""
    task = load_task(Path(job.task))
    has_features = rows_with_features(job.features, task.content)
    fits = [failed for spec in job.specs for failed in _failed(spec, task, job.refit, reason)]
    _publish(job, task, has_features, fits)


def _publish(job: BankJob, task: Task, has_features: Mask, fits: Sequence[FitResult]) -> None:
    rows = task.take(has_features)
    specs = [open_feature_set(directory).spec for directory in job.features]
    data = results_bytes(
        rows,
        task.digest,
        fits,
        [held_out_metrics(rows, fit.fold, fit.validation) for fit in fits],
        features=[
            {"fingerprint": spec.fingerprint, "spec": json.loads(spec.to_json())} for spec in specs
        ],
        dropped=task.ids[~has_features].tolist(),
    )
    Path(job.result).parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(Path(job.result), data)


def _load_features(
    job: BankJob, task: Task, kind: HeadKind, side: SideColumns | None
) -> tuple[Features, Mask, list[int]]:
    """Return the features of the rows that have any, which rows those are, and the taps' widths.

    The features are loaded if the memory suffices for the bank's copies of them, else streamed.
    Side columns follow the features, and count as one tap.
    """
    sets = [open_feature_set(directory) for directory in job.features]
    needed_bytes = loaded_bytes(sets, len(task.ids)) * kind.copies_of_features
    available_bytes = worker_memory() if job.memory_bytes is None else job.memory_bytes
    read = stream_rows if needed_bytes > available_bytes and kind.streams else load_rows
    bands = tap_widths(sets)
    if side is not None:
        bands.append(side.n_inputs)
    return *read(sets, task.content, spatial=kind.spatial, side=side), bands


def worker_memory() -> int:
    """Return the bytes that a worker may fill with features: half its share of the memory."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    share = total // (os.cpu_count() or 1)
    if sys.platform == "linux":
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_DATA)[0]  # the cluster's limit for this worker
        if allowed != resource.RLIM_INFINITY:
            share = min(share, allowed)
    return share // 2


def fit_bank(
    X: Features,
    task: Task,
    specs: Sequence[HeadSpec],
    *,
    refit: bool = True,
    threads: int = 1,
    device: str = "cpu",
    halving: Halving | None = None,
    bands: Sequence[int] = (),
    side: Sequence[SideColumn] = (),
) -> list[FitResult]:
    """Train specs of one kind and return all heads, failed ones with their error.

    X: features (N, D), (V, N, D) with views, maps (…, channels, h, w), or streamed rows.
    bands: number of features of each tap in X, for specs that are `banded`.
    side: the side columns, whose inputs are the last columns of X.

    A head whose predictions are not finite has failed. A bank that does not fit a GPU's memory is
    trained there in smaller groups, and on the CPU if a single spec does not fit.

    Raises HeadError for a device, a task or side columns that the kind cannot use.
    """
    check_device(device)
    kind = HEAD_KINDS[specs[0].kind]
    if side and not kind.takes_side_columns:
        able = ", ".join(other.name for other in HEAD_KINDS.values() if other.takes_side_columns)
        raise HeadError(f"{kind.name} heads take no side columns: {able} do")
    if task.kind not in kind.tasks:
        able = ", ".join(other.name for other in HEAD_KINDS.values() if task.kind in other.tasks)
        raise HeadError(f"{kind.name} heads have no use for a {task.kind} task: use {able}")
    data = TrainingData(
        X,
        task.target,
        task.fold,
        len(task.classes),
        task.kind,
        task.weight,
        tuple(bands),
        side=side_blocks(side, X.shape[-1] - sum(column.width for column in side)),
        unit=task.units,
    )
    on_cpu = fit = _fitter(kind, data, FitOptions(refit, "cpu", threads, halving))
    if device != "cpu":
        on_device = _fitter(kind, data, FitOptions(refit, device, threads, halving))
        # Specs that compete in successive halving are not divided into groups.
        fit = partial(_fit_in_memory, on_device, on_cpu, divide=halving is None)
    try:
        fits = fit(specs)
    except HeadraceError:
        raise  # an error of the input, which is the same for every spec
    except Exception as error:  # noqa: BLE001 - one head's failure must not stop the others
        # Trained one by one, so that only the spec that crashes fails.
        fits = [
            head
            for spec in specs
            for head in _fit_alone(fit, spec, task, refit, error, is_alone=len(specs) == 1)
        ]
    return [_failed_if_not_finite(fit_result) for fit_result in fits]


def _fit_in_memory(
    on_device: Fit, on_cpu: Fit, specs: Sequence[HeadSpec], *, divide: bool
) -> list[FitResult]:
    """Train specs on a GPU, half of them at a time if its memory does not suffice.

    A single spec that does not fit, or all specs if `divide` is False, are trained on the CPU.
    """
    try:
        return on_device(specs)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    import torch

    # Outside of `except`, where the exception's frames keep the allocated tensors alive.
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    if not divide or len(specs) == 1:
        return on_cpu(specs)
    middle = len(specs) // 2
    return [
        fit
        for half in (specs[:middle], specs[middle:])
        for fit in _fit_in_memory(on_device, on_cpu, half, divide=divide)
    ]


def check_device(device: str) -> None:
    """Raise HeadError if torch cannot use the device on this machine."""
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    # torch raises any of these: for a build without CUDA, for no GPU, for an unknown device.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise HeadError(
            f"device {device!r} cannot be used on this machine ({reason}): give cpu (in a recipe, "
            "compute.heads_device: cpu), or run where PyTorch sees it"
        ) from error


def _fit_alone(
    fit: Fit, spec: HeadSpec, task: Task, refit: bool, bank_error: Exception, *, is_alone: bool
) -> list[FitResult]:
    """Train one spec of a bank that has failed; a bank of one spec is not tried again."""
    error = bank_error
    if not is_alone:
        try:
            return fit([spec])
        except Exception as spec_error:  # noqa: BLE001 - it becomes the head's error
            error = spec_error
    line = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {error} ({Path(line.filename).name}:{line.lineno})"
    return _failed(spec, task, refit, reason)


def _failed(spec: HeadSpec, task: Task, refit: bool, reason: str) -> list[FitResult]:
    folds = [*range(task.n_folds), REFIT] if refit else range(task.n_folds)
    return [FitResult(spec, fold, error=reason) for fold in folds]


def _failed_if_not_finite(fit: FitResult) -> FitResult:
    if fit.error is None and fit.validation is not None and not np.isfinite(fit.validation).all():
        error = "its predictions of the held-out rows are not finite"
        return dataclasses.replace(fit, arrays={}, validation=None, error=error)
    return fit


def _fitter(kind: HeadKind, data: TrainingData, options: FitOptions) -> Fit:
    """Return the function that trains specs of one kind on these rows."""

    def fit(specs: Sequence[HeadSpec]) -> list[FitResult]:
        if kind.takes_views:
            return kind.fit(data, specs, options)
        rows = data.one_row_per_view()
        return [_average_views(fit, rows) for fit in kind.fit(rows, specs, options)]

    return fit


def _average_views(fit: FitResult, data: TrainingData) -> FitResult:
    """Average the predictions of stacked views (V·n, C) to one per row, (n, C).

    The weight of a row in its unit is the sum of its views' weights.
    """
    if data.n_views == 1 or fit.validation is None:
        return fit
    n_images = len(fit.validation) // data.n_views
    averaged = fit.validation.reshape(data.n_views, n_images, -1).mean(0, dtype=np.float32)
    arrays = fit.arrays
    if INSTANCE_WEIGHT in arrays:
        of_views = arrays[INSTANCE_WEIGHT].reshape(data.n_views, n_images)
        arrays = {**arrays, INSTANCE_WEIGHT: of_views.sum(0)}
    return dataclasses.replace(fit, validation=averaged, arrays=arrays)
