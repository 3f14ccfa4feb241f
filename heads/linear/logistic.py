"""Banks of logistic heads: every strength, fold, class weight and label at once, to scikit-learn's
optimum.

N rows, D features, C classes, L labels, F folds.

The objective of a head is scikit-learn's `LogisticRegression` after a `StandardScaler` fitted on
the head's training
rows: sum_i w_i loss_i + |W|^2 / (2 C), the intercept free. For two classes the loss is the
sigmoid's with one weight vector, as scikit-learn has it (a two-class softmax with penalty on both
rows would be a different strength); its two rows are stored as -w/2 and +w/2, whose softmax is that
sigmoid.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.checks import check_specs
from headrace.heads.data.inputs import check_rows
from headrace.heads.data.standardize import (
    Features,
    Moments,
    chunks,
    group_moments,
    sweep,
    training_moments,
)
from headrace.heads.data.streamed import Streamed
from headrace.heads.data.task import REFIT
from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear.bands import with_bands
from headrace.heads.linear.solver.design import (
    ROWS_PER_STREAMED_BLOCK,
    DesignMatrix,
    make_design,
    make_streamed_design,
    scales_are_similar,
    should_copy_per_fold,
)
from headrace.heads.linear.solver.dual_form import copies_fit, make_dual_design
from headrace.heads.linear.solver.loss import sigmoid, softmax
from headrace.heads.linear.solver.path_solver import HeadSolution, solve_paths
from headrace.heads.linear.solver.regularization_path import RegularizationPath
from headrace.heads.spec import FitResult, LogisticSpec

Array = npt.NDArray[Any]
# an absent class's decision is minus this: its probability is exactly zero, and no arithmetic
# overflows
NEVER = 1e30


@dataclass(frozen=True)
class _Part:
    """One spec's head of one fold, for some classes or one label, before it is assembled."""

    weight: Array  # (rows, D) float64, raw coordinates
    bias: Array  # (rows,)
    objective: float
    bound: float
    iterations: int
    seconds: float


def fit_logistic_bank(
    data: TrainingData,
    specs: Sequence[LogisticSpec],
    *,
    refit: bool = True,
    gap: float = 1e-5,
    device: str = "cpu",
    deadline: float | None = None,
) -> list[FitResult]:
    """Fit every spec on the training rows of every fold, and on all rows when `refit`.

    data: X (N, D) float16, float32 or float64 in memory, or streamed from shards on every pass; no
    test rows. Multi-label targets (N, L) are L independent binary problems.
    gap: relative distance to the optimum at which a head stops, by estimate; `FitResult.gap` is a
    proven bound.
    device: "cpu" (NumPy), or torch's name of a device ("cuda"), where the products then run.
    deadline: time.monotonic() seconds at which to stop early.

    Returns the heads spec by spec, for each its folds in order, then REFIT. Raises NotFinite (a
    ValueError) for NaN or infinite features, ValueError for shapes that do not fit, labels out of
    range, no spec at all, strengths that are not positive, and sample weights that are negative or
    beyond 1e-30..1e15.
    """
    _check(data, specs)
    X, target, n_classes, sample_weight = data.X, data.target, data.n_outputs, data.sample_weight
    fold = np.asarray(data.fold, np.int64)
    sw = (
        None
        if sample_weight is None or (sample_weight == 1).all()
        else np.asarray(sample_weight, np.float64)
    )
    folds = data.folds_to_fit(refit=refit)
    groups = group_moments(X, fold)
    scaling = training_moments(groups)
    parts: dict[tuple[int, int, int], _Part] = {}  # (spec, fold, label or 0)
    for standardize, banded in sorted({(spec.standardize, spec.banded) for spec in specs}):
        chosen = [
            i
            for i, spec in enumerate(specs)
            if (spec.standardize, spec.banded) == (standardize, banded)
        ]
        scales = (
            with_bands(X, target, fold, scaling, data.band_widths, data.n_views)
            if banded
            else scaling
        )
        for problem in _problems(target, n_classes, fold, folds, sw):
            _fit_problem(
                X,
                problem,
                fold,
                specs,
                chosen,
                scales,
                sw,
                gap,
                deadline,
                parts,
                standardize,
                device,
            )
    return _assemble(X, target, n_classes, fold, folds, specs, parts, sw)


@dataclass(frozen=True)
class _Problem:
    """Heads with the same classes present: folds whose training rows hold exactly `classes`."""

    folds: tuple[int, ...]
    classes: npt.NDArray[np.intp]  # single label: the classes present; multi-label: empty
    target: Array  # (N,) position in `classes`, -1 where absent; or (N, L)

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """(N,) rows that have a class of the problem."""
        return self.target >= 0 if self.target.ndim == 1 else np.ones(len(self.target), bool)


def _problems(
    target: Array, n_classes: int, fold: Array, folds: list[int], sw: Array | None
) -> list[_Problem]:
    """Group the folds by the classes that their training rows hold.

    A class without training rows has no optimum: its intercept would run to minus infinity. It is
    left out, as scikit-learn leaves it out, and predicted with 0.
    """
    if target.ndim == 2:
        return [_Problem(tuple(folds), np.zeros(0, np.intp), target)]
    seen: dict[tuple[int, ...], list[int]] = {}
    for f in folds:
        rows = fold != f
        mass = np.bincount(target[rows], None if sw is None else sw[rows], minlength=n_classes)
        seen.setdefault(tuple(np.flatnonzero(mass > 0).tolist()), []).append(f)
    problems = []
    for classes, members in seen.items():
        position = np.full(n_classes, -1)
        position[list(classes)] = np.arange(len(classes))
        problems.append(_Problem(tuple(members), np.array(classes, np.intp), position[target]))
    return problems


def _fit_problem(
    X: Features,
    problem: _Problem,
    fold: Array,
    specs: Sequence[LogisticSpec],
    chosen: list[int],
    scaling: dict[int, Moments],
    sw: Array | None,
    gap: float,
    deadline: float | None,
    parts: dict[tuple[int, int, int], _Part],
    standardize: bool,
    device: str,
) -> None:
    """Fit the chosen specs on the problem's folds; results go to `parts`."""
    multi = problem.target.ndim == 2
    labels = problem.target if multi else (problem.target == 1)[:, None]
    binary = multi or len(problem.classes) == 2
    rows = 1 if binary else len(problem.classes)
    if rows == 1 and not binary:  # one class: nothing to fit
        for i in chosen:
            for f in problem.folds:
                parts[i, f, 0] = _Part(np.zeros((1, X.shape[1])), np.zeros(1), 0.0, 0.0, 0, 0.0)
        return
    began = time.perf_counter()
    for folds in _batches(problem, scaling, X.shape[1], standardize):
        used = {f: scaling[f] for f in folds}
        if len(folds) > 1:
            used[REFIT] = scaling[REFIT]
        paths, owners = _lines(
            problem,
            folds,
            specs,
            chosen,
            fold,
            labels if binary else None,
            rows,
            sw,
            parts,
            X.shape[1],
        )
        if not paths:
            continue
        own_labels = labels if binary else None
        heads = sum(len(path.l2_strengths) for path in paths)
        own_rows = (
            device == "cpu"
            and standardize
            and should_copy_per_fold(scaling, folds, rows - 1, heads)
        )
        narrow, wide = (
            functools.partial(
                _design,
                X,
                problem,
                fold,
                used,
                folds,
                own_labels,
                rows,
                sw,
                standardize,
                own,
                dtype,
            )
            # What is left for float64 is a few heads: not worth rows of their own.
            for dtype, own in ((np.float32, own_rows), (np.float64, False))
        )
        solutions = _solve(narrow, wide, paths, rows, gap, deadline, device)
        seconds = (time.perf_counter() - began) / max(len(solutions), 1)
        began = time.perf_counter()
        for index, (path, owner) in enumerate(zip(paths, owners, strict=True)):
            for mu, spec_indices in owner.items():
                weight, bias, solution = solutions[index, mu]
                for i in spec_indices:
                    parts[i, path.fold, max(path.label, 0) if multi else 0] = _Part(
                        weight,
                        bias,
                        solution.objective,
                        solution.gap_bound,
                        solution.n_iterations,
                        seconds,
                    )


def _batches(
    problem: _Problem, scaling: dict[int, Moments], dim: int, standardize: bool
) -> list[tuple[int, ...]]:
    """The problem's folds, those in one tuple that can share a design."""
    whole, count = scaling[REFIT], int(problem.known.sum())
    alike = tuple(
        f for f in problem.folds if scales_are_similar(scaling[f], whole, standardize=standardize)
    )
    if dim > count and not copies_fit(scaling, alike, count):
        alike = ()
    alone: list[tuple[int, ...]] = [(f,) for f in problem.folds if f not in alike]
    return [alike, *alone] if alike else alone


def _solve(
    narrow: Callable[[], DesignMatrix],
    wide: Callable[[], DesignMatrix],
    paths: list[RegularizationPath],
    rows: int,
    gap: float,
    deadline: float | None,
    device: str,
) -> dict[tuple[int, float], tuple[Array, Array, HeadSolution]]:
    """Raw weights, biases and solution of every head: in float32, and where rounding ended the
    descent before the gap was reached, from there on in float64.
    """
    found: dict[tuple[int, float], tuple[Array, Array, HeadSolution]] = {}
    for make in (narrow, wide):
        index = [
            i
            for i, path in enumerate(paths)
            if any((i, mu) not in found for mu in path.l2_strengths)
        ]
        late = deadline is not None and time.monotonic() > deadline
        if found:
            index = [
                i
                for i, path in enumerate(paths)
                if any(not found[i, mu][2].converged for mu in path.l2_strengths)
            ]
        if not index or (found and late):
            break
        design = make()
        unit = design.feature_unit**-2
        part, names, starts = [], {}, {}
        for new, i in enumerate(index):
            left = [
                mu
                for mu in paths[i].l2_strengths
                if (i, mu) not in found or not found[i, mu][2].converged
            ]
            part.append(dataclasses.replace(paths[i], l2_strengths=tuple(mu * unit for mu in left)))
            for mu in left:
                names[new, mu * unit] = i, mu
                if (i, mu) in found:
                    starts[new, mu * unit] = design.from_raw_weights(
                        *found[i, mu][:2], np.full(rows, paths[i].fold)
                    )
        solved = solve_paths(
            design, part, rows, gap=gap, deadline=deadline, starts=starts, device=device
        )
        folds = np.repeat([part[i].fold for i, _ in solved], rows)
        weight, bias = design.to_raw_weights(
            np.concatenate([solution.u for solution in solved.values()]), folds
        )
        for place, (head, solution) in enumerate(solved.items()):
            before = found[names[head]][2].n_iterations if names[head] in found else 0
            better = dataclasses.replace(solution, n_iterations=solution.n_iterations + before)
            own = slice(place * rows, (place + 1) * rows)
            found[names[head]] = weight[own], bias[own], better
    return found


def _lines(
    problem: _Problem,
    folds: tuple[int, ...],
    specs: Sequence[LogisticSpec],
    chosen: list[int],
    fold: Array,
    labels: Array | None,
    rows: int,
    sw: Array | None,
    parts: dict[tuple[int, int, int], _Part],
    dim: int,
) -> tuple[list[RegularizationPath], list[dict[float, list[int]]]]:
    """One line per fold, kind of class weight and label; beside each, which specs want which
    strength.
    """
    paths, owners = [], []
    weights = np.ones(len(fold)) if sw is None else sw
    for f in folds:
        train = (fold != f) & problem.known
        for kind in sorted({specs[i].class_weight for i in chosen}):
            wanted: dict[float, list[int]] = {}
            for i in chosen:
                if specs[i].class_weight == kind:
                    wanted.setdefault(1.0 / specs[i].C, []).append(i)
            for label in range(labels.shape[1]) if labels is not None else [-1]:
                own = problem.target if labels is None else labels[:, label].astype(np.int64)
                member = own[train]
                counts = np.bincount(member, weights[train], minlength=2 if label >= 0 else rows)
                if (counts == 0).any():  # a label that is constant over the training rows
                    sure = np.full(1, NEVER if counts[1] > 0 else -NEVER)
                    for i in [i for indices in wanted.values() for i in indices]:
                        parts[i, f, label] = _Part(np.zeros((1, dim)), sure, 0.0, 0.0, 0, 0.0)
                    continue
                # scikit-learn's compute_class_weight("balanced"), with sample weights
                multiplier = (
                    counts.sum() / (len(counts) * counts)
                    if kind == "balanced"
                    else np.ones(len(counts))
                )
                paths.append(
                    RegularizationPath(
                        f, multiplier, label, kind, tuple(sorted(wanted, reverse=True))
                    )
                )
                owners.append(wanted)
    return paths, owners


def _design(
    X: Features,
    problem: _Problem,
    fold: Array,
    scaling: dict[int, Moments],
    folds: tuple[int, ...],
    labels: Array | None,
    rows: int,
    sw: Array | None,
    standardize: bool,
    own_rows: bool,
    dtype: Any,
) -> DesignMatrix:
    """The design, its tiles' rows sorted by class and labelled; rows without a class in the problem
    are left out.
    """

    def by_class(member: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        return member[np.argsort(problem.target[member], kind="stable")] if rows > 1 else member

    wanted = problem.known
    if len(folds) == 1:
        wanted &= fold != folds[0]  # a design of its own fold needs no held-out rows

    def seen_by(group: int) -> tuple[int, ...]:
        return tuple(f for f in folds if f != group)

    few = X.shape[1] > int(wanted.sum())
    if few:
        own = [((f,), by_class(np.flatnonzero(wanted & (fold != f)))) for f in folds]
        design = make_dual_design(X, own, scaling, standardize=standardize, dtype=dtype)
    elif isinstance(X, Streamed):
        # By class within a tile only: tiles are read in the order in which their rows lie on disk.
        runs = [
            (seen_by(group), by_class(part))
            for group, part in sweep(X, fold, ROWS_PER_STREAMED_BLOCK, wanted)
        ]
        design = make_streamed_design(X, runs, scaling, standardize=standardize, dtype=dtype)
    else:
        members = {
            int(group): by_class(np.flatnonzero(wanted & (fold == group)))
            for group in np.unique(fold)
        }
        groups = [(seen_by(group), member) for group, member in members.items() if member.size]
        design = make_design(
            X, groups, scaling, standardize=standardize, dtype=dtype, copy_per_fold=own_rows
        )
    tiles = []
    for block in design.row_blocks:
        bounds = (
            np.searchsorted(problem.target[block.row_index], np.arange(rows + 1))
            if rows > 1
            else block.class_offsets
        )
        given = (
            np.ascontiguousarray(labels[block.row_index].T, dtype)
            if labels is not None
            else block.labels
        )
        weight = None if sw is None else sw[block.row_index].astype(dtype)
        tiles.append(
            dataclasses.replace(block, class_offsets=bounds, labels=given, sample_weight=weight)
        )
    return dataclasses.replace(design, row_blocks=tiles)


def _assemble(
    X: Features,
    target: Array,
    n_classes: int,
    fold: Array,
    folds: list[int],
    specs: Sequence[LogisticSpec],
    parts: dict[tuple[int, int, int], _Part],
    sw: Array | None,
) -> list[FitResult]:
    """Heads in order, their weights laid out by class, and the probabilities of their held-out
    rows.
    """
    fits = []
    multi = target.ndim == 2
    for i, spec in enumerate(specs):
        for f in folds:
            if multi:
                own = [parts[i, f, label] for label in range(n_classes)]
                weight = np.concatenate([part.weight for part in own])
                bias = np.concatenate([part.bias for part in own])
            else:
                own = [parts[i, f, 0]]
                rows = fold != f
                mass = np.bincount(
                    target[rows], None if sw is None else sw[rows], minlength=n_classes
                )
                present = np.flatnonzero(mass > 0)
                weight, bias = np.zeros((n_classes, X.shape[1])), np.full(n_classes, -NEVER)
                if len(present) == 2:
                    weight[present] = np.outer([-0.5, 0.5], own[0].weight[0])
                    bias[present] = np.array([-0.5, 0.5]) * own[0].bias[0]
                else:
                    weight[present], bias[present] = own[0].weight, own[0].bias
            objective = float(sum(part.objective for part in own))
            bound = float(sum(part.bound for part in own))
            optimum = objective - bound
            arrays = {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}
            fits.append(
                FitResult(
                    spec,
                    f,
                    arrays,
                    objective,
                    bound / optimum if optimum > 0 else (0.0 if bound == 0 else float("inf")),
                    max(part.iterations for part in own),
                    sum(part.seconds for part in own),
                    None,
                )
            )
    predicted = {
        f: iter(
            _predict_held_out(
                X, np.flatnonzero(fold == f), [fit for fit in fits if fit.fold == f], multi
            )
        )
        for f in folds
        if f != REFIT
    }
    return [
        fit if fit.fold == REFIT else dataclasses.replace(fit, validation=next(predicted[fit.fold]))
        for fit in fits
    ]


def _predict_held_out(
    X: Features, rows: npt.NDArray[np.intp], fits: list[FitResult], multi: bool
) -> Array:
    """(K, n, C) float32 probabilities of a fold's held-out rows, for all its heads in one
    product.
    """
    weight = np.concatenate([fit.arrays["weight"] for fit in fits])
    bias = np.concatenate([fit.arrays["bias"] for fit in fits])
    classes = len(weight) // len(fits)
    out = np.empty((len(fits), len(rows), classes), np.float32)
    for where in chunks(np.arange(len(rows))):
        decision = weight @ X[rows[where]].astype(np.float32, copy=False).T + bias[:, None]
        p = (sigmoid if multi else softmax)(
            decision.reshape(len(fits), classes, -1).transpose(1, 0, 2)
        )
        out[:, where] = p.transpose(1, 2, 0)
    return out


def _check(data: TrainingData, specs: Sequence[LogisticSpec]) -> None:
    check_specs(specs, "LogisticSpec(C=1.0)")
    check_rows(data)
    for spec in specs:
        if not (np.isfinite(spec.C) and spec.C > 0):
            raise ValueError(
                f"C must be a positive number, found {spec.C}: it is the inverse of the penalty's "
                "strength"
            )
