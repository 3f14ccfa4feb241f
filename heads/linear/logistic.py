"""Banks of logistic heads: every C, fold, class weight and label at once, to the optimum.

In shapes: N rows, D features, C classes, L labels, n_outputs weight vectors of a head (C for a
softmax, 1 for a sigmoid). Elsewhere C is scikit-learn's inverse strength of the penalty.

The objective of a head is that of scikit-learn's `LogisticRegression` after a `StandardScaler`
fitted on the head's training rows: sum_i w_i loss_i + |W|^2 / (2 C), the intercept unpenalized. For
two classes the loss is that of a sigmoid with one weight vector, as in scikit-learn (in a two-class
softmax with a penalty on both vectors, C would mean another strength). The two classes are stored
as -w/2 and +w/2, whose softmax is that sigmoid. `solver/README.md` explains the solver.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.arrays import Array, Index, Mask
from headrace.heads.data.checks import check_rows, check_specs
from headrace.heads.data.fold_coordinates import fold_moments
from headrace.heads.data.standardize import Features, Moments, chunks, sweep
from headrace.heads.data.streamed import StreamedRows
from headrace.heads.data.task import REFIT
from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear.bands import with_bands
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.linear.solver.design import (
    ROWS_PER_STREAMED_BLOCK,
    DesignMatrix,
    FoldRows,
    RowBlock,
    make_design,
    make_streamed_design,
    scales_are_similar,
    should_copy_per_fold,
)
from headrace.heads.linear.solver.dual_form import DualForm, copies_fit, make_dual_form
from headrace.heads.linear.solver.loss import sigmoid, softmax
from headrace.heads.linear.solver.path_solver import solve_paths
from headrace.heads.linear.solver.regularization_path import RegularizationPath
from headrace.heads.link import ABSENT_CLASS_DECISION
from headrace.heads.spec import FitResult, relative_gap, specs_by


@dataclass(frozen=True)
class _HeadPart:
    """A solved head of one spec and fold, for all classes of a problem or for one label."""

    weight: Array  # (n_outputs, D) float64, for raw features
    bias: Array  # (n_outputs,)
    objective: float = 0.0
    gap_bound: float = 0.0
    n_iterations: int = 0
    converged: bool = True  # false if rounding errors ended its descent before the gap
    seconds: float = 0.0


@dataclass(frozen=True)
class _Bank:
    """A bank while it is fitted."""

    X: Features  # (N, D)
    target: Array  # (N,) or (N, L)
    fold: Array  # (N,) int64, the fold that holds the row out, or TRAIN_ONLY
    sample_weight: Array | None  # (N,) float64; None: all one
    specs: Sequence[LogisticSpec]
    gap: float
    device: str
    # {(spec index, fold, label or 0): head}
    parts: dict[tuple[int, int, int], _HeadPart] = field(default_factory=dict)

    def class_mass(self, fold: int, n_classes: int) -> Array:
        """Return the weight (C,) of each class in the training rows of a fold."""
        train = self.fold != fold
        weight = None if self.sample_weight is None else self.sample_weight[train]
        return np.bincount(self.target[train], weight, minlength=n_classes)


@dataclass(frozen=True)
class _ClassProblem:
    """The folds whose training rows have exactly `classes`."""

    folds: tuple[int, ...]
    classes: Index  # single label: the classes present; multi-label: empty
    target: Array  # (N,) index into `classes`, -1 for rows of other classes; or (N, L)
    labels: Array | None  # (N, L) 0/1 of binary and multi-label problems; None: a softmax

    @property
    def n_outputs(self) -> int:
        return len(self.classes) if self.labels is None else 1

    @property
    def has_class(self) -> Mask:
        """Which rows have a class of the problem, (N,)."""
        return self.target >= 0 if self.target.ndim == 1 else np.ones(len(self.target), bool)


def fit_logistic_bank(
    data: TrainingData,
    specs: Sequence[LogisticSpec],
    *,
    refit: bool = True,
    gap: float = 1e-5,
    device: str = "cpu",
) -> list[FitResult]:
    """Fit every spec on the training rows of every fold, and on all rows when `refit`.

    data: X (N, D) float16, float32 or float64 in memory, or streamed from shards on every pass; no
    test rows. Multi-label targets (N, L) are L independent binary problems.
    gap: relative distance to the optimum at which a head stops, by estimate; `FitResult.gap` is a
    proven bound.
    device: "cpu" (compiled code or NumPy), or torch's name of a device ("cuda"), where the products
    then run.

    Returns the heads ordered by spec, then by fold, REFIT last.

    Raises ValueError for NaN or infinite features, shapes that do not fit, labels out of range, no
    specs, a C that is not positive, and sample weights that are not 0 and outside 1e-30..1e15.
    """
    _check(data, specs)
    fold = np.asarray(data.fold, np.int64)
    bank = _Bank(data.X, data.target, fold, data.weights, specs, gap, device)
    folds = data.folds_to_fit(refit=refit)
    scaling = fold_moments(data)
    for (standardize, banded), spec_indices in specs_by(specs, "standardize", "banded").items():
        # Banded: factors of the scaled features give every tap of the input its own penalty.
        spec_scaling = with_bands(data, scaling) if banded else scaling
        for problem in _class_problems(bank, folds, data.n_outputs):
            _fit_problem(bank, problem, spec_indices, spec_scaling, standardize=standardize)
    return _fit_results(bank, folds, data.n_outputs)


def _class_problems(bank: _Bank, folds: list[int], n_classes: int) -> list[_ClassProblem]:
    """Group the folds by the classes that their training rows have."""
    # A class without training rows has no optimum, because its intercept would go to minus
    # infinity. It is left out, as in scikit-learn, and predicted with probability 0.
    if bank.target.ndim == 2:
        return [_ClassProblem(tuple(folds), np.zeros(0, np.intp), bank.target, bank.target)]
    folds_by_classes: dict[tuple[int, ...], list[int]] = {}
    for fold in folds:
        present = np.flatnonzero(bank.class_mass(fold, n_classes) > 0)
        folds_by_classes.setdefault(tuple(present.tolist()), []).append(fold)
    problems = []
    for classes, problem_folds in folds_by_classes.items():
        position = np.full(n_classes, -1)
        position[list(classes)] = np.arange(len(classes))
        target = position[bank.target]
        labels = (target == 1)[:, None] if len(classes) == 2 else None
        problems.append(
            _ClassProblem(tuple(problem_folds), np.array(classes, np.intp), target, labels)
        )
    return problems


def _fit_problem(
    bank: _Bank,
    problem: _ClassProblem,
    spec_indices: list[int],
    scaling: dict[int, Moments],
    *,
    standardize: bool,
) -> None:
    """Fit the given specs on the problem's folds, into `bank.parts`."""
    if problem.labels is None and problem.n_outputs == 1:  # one class: nothing to fit
        for i in spec_indices:
            for fold in problem.folds:
                bank.parts[i, fold, 0] = _HeadPart(np.zeros((1, bank.X.shape[1])), np.zeros(1))
        return
    began = time.perf_counter()
    for folds in _folds_by_design(bank, problem, scaling, standardize=standardize):
        design_scaling = {fold: scaling[fold] for fold in folds}
        if len(folds) > 1:
            # The coordinates that these folds share are scaled by the moments of all rows.
            design_scaling[REFIT] = scaling[REFIT]
        paths, specs_by_strength = _regularization_paths(bank, problem, folds, spec_indices)
        if not paths:
            continue
        n_heads = sum(len(path.l2_strengths) for path in paths)
        # One of a softmax's weight vectors follows from the others.
        n_free = max(problem.n_outputs - 1, 1)
        copy_per_fold = (
            bank.device == "cpu"
            and standardize
            and should_copy_per_fold(scaling, folds, n_free, n_heads)
        )
        designs = _Designs(bank, problem, folds, design_scaling, standardize, copy_per_fold)
        heads = _solve(bank, designs, paths, problem.n_outputs)
        seconds = (time.perf_counter() - began) / max(len(heads), 1)
        began = time.perf_counter()
        for (path_index, l2_strength), head in heads.items():
            path = paths[path_index]
            label = path.label if problem.target.ndim == 2 else 0
            for i in specs_by_strength[path_index][l2_strength]:
                bank.parts[i, path.fold, label] = dataclasses.replace(head, seconds=seconds)


def _folds_by_design(
    bank: _Bank, problem: _ClassProblem, scaling: dict[int, Moments], *, standardize: bool
) -> list[tuple[int, ...]]:
    """Return the problem's folds in tuples: those that can share a design, and the rest alone."""
    n_rows = int(problem.has_class.sum())
    # In common coordinates float32 loses the digits of a fold whose scales are far from the
    # others'; a single outlier among its held-out rows is enough for that.
    similar = tuple(
        fold
        for fold in problem.folds
        if scales_are_similar(scaling[fold], scaling[REFIT], standardize=standardize)
    )
    # In the dual form a shared design has a copy of its rows for each fold.
    if bank.X.shape[1] > n_rows and not copies_fit(scaling, similar, n_rows):
        similar = ()
    single: list[tuple[int, ...]] = [(fold,) for fold in problem.folds if fold not in similar]
    return [similar, *single] if similar else single


def _solve(
    bank: _Bank, designs: "_Designs", paths: list[RegularizationPath], n_outputs: int
) -> dict[tuple[int, float], _HeadPart]:
    """Return {(path index, L2 strength): head} of every head.

    Heads are solved in float32. Those whose descent was ended by rounding errors before they
    reached the gap are continued in float64.
    """
    heads: dict[tuple[int, float], _HeadPart] = {}
    for dtype in (np.float32, np.float64):
        pending: dict[int, list[float]] = {}
        for i, path in enumerate(paths):
            for l2 in path.l2_strengths:
                if (i, l2) not in heads or not heads[i, l2].converged:
                    pending.setdefault(i, []).append(l2)
        if not pending:
            break
        design = designs.design(dtype)
        # Converts L2 strengths to those for weights of the design's divided features.
        to_design_strength = design.feature_divisor**-2
        pending_paths: list[RegularizationPath] = []
        # Both by (index in pending_paths, strength in the design).
        raw_head: dict[tuple[int, float], tuple[int, float]] = {}
        starts: dict[tuple[int, float], Array] = {}
        for i, strengths in pending.items():
            design_strengths = tuple(l2 * to_design_strength for l2 in strengths)
            for l2, design_l2 in zip(strengths, design_strengths, strict=True):
                raw_head[len(pending_paths), design_l2] = i, l2
                if (i, l2) in heads:
                    starts[len(pending_paths), design_l2] = design.from_raw_weights(
                        heads[i, l2].weight, heads[i, l2].bias, np.full(n_outputs, paths[i].fold)
                    )
            pending_paths.append(dataclasses.replace(paths[i], l2_strengths=design_strengths))
        solutions = solve_paths(
            design,
            pending_paths,
            n_outputs,
            gap=bank.gap,
            starts=starts,
            device=_device_for(bank.device, design.dtype),
        )
        folds = np.repeat([pending_paths[i].fold for i, _ in solutions], n_outputs)
        weight, bias = design.to_raw_weights(
            np.concatenate([solution.u for solution in solutions.values()]), folds
        )
        for position, (design_head, solution) in enumerate(solutions.items()):
            head = raw_head[design_head]
            earlier_iterations = heads[head].n_iterations if head in heads else 0
            rows = slice(position * n_outputs, (position + 1) * n_outputs)
            heads[head] = _HeadPart(
                weight[rows],
                bias[rows],
                solution.objective,
                solution.gap_bound,
                solution.n_iterations + earlier_iterations,
                solution.converged,
            )
    return heads


def _regularization_paths(
    bank: _Bank, problem: _ClassProblem, folds: tuple[int, ...], spec_indices: list[int]
) -> tuple[list[RegularizationPath], list[dict[float, list[int]]]]:
    """Return a path for each fold, class weighting and label, and for each path {L2 strength: spec
    indices}.

    Heads for a label that is constant over their training rows are stored in `bank.parts` at once.
    """
    paths, specs_by_strength = [], []
    n_features = bank.X.shape[1]
    weights = np.ones(len(bank.fold)) if bank.sample_weight is None else bank.sample_weight
    for fold in folds:
        train = (bank.fold != fold) & problem.has_class
        for class_weight in sorted({bank.specs[i].class_weight for i in spec_indices}):
            by_strength: dict[float, list[int]] = {}
            for i in spec_indices:
                if bank.specs[i].class_weight == class_weight:
                    by_strength.setdefault(1.0 / bank.specs[i].C, []).append(i)
            for label in [-1] if problem.labels is None else range(problem.labels.shape[1]):
                target = problem.target
                if problem.labels is not None:
                    target = problem.labels[:, label].astype(np.int64)
                n_classes = max(problem.n_outputs, 2)
                class_mass = np.bincount(target[train], weights[train], minlength=n_classes)
                if (class_mass == 0).any():
                    is_always_one = class_mass[1] > 0
                    decision = -ABSENT_CLASS_DECISION if is_always_one else ABSENT_CLASS_DECISION
                    constant = _HeadPart(np.zeros((1, n_features)), np.full(1, decision))
                    for i in itertools.chain.from_iterable(by_strength.values()):
                        bank.parts[i, fold, label] = constant
                    continue
                class_factors = np.ones(n_classes)
                if class_weight == "balanced":
                    # scikit-learn's compute_class_weight("balanced"), with sample weights
                    class_factors = class_mass.sum() / (n_classes * class_mass)
                strengths = tuple(sorted(by_strength, reverse=True))
                paths.append(
                    RegularizationPath(fold, class_factors, label, class_weight, strengths)
                )
                specs_by_strength.append(by_strength)
    return paths, specs_by_strength


def _device_for(device: str, dtype: npt.DTypeLike) -> str:
    """Return the device, or the CPU for float64 where it has none (MPS)."""
    return "cpu" if device.startswith("mps") and np.dtype(dtype) == np.float64 else device


@dataclass(frozen=True)
class _Designs:
    """The design matrices of some folds of a problem, in float32 and in float64."""

    bank: _Bank
    problem: _ClassProblem
    folds: tuple[int, ...]
    scaling: dict[int, Moments]
    standardize: bool
    copy_per_fold: bool

    # Kept for the second design: the factorization is most of its time.
    @functools.cached_property
    def dual_form(self) -> DualForm:
        """The dual form of each fold's training rows, for fewer rows than features."""
        in_problem, row_fold = self.problem.has_class, self.bank.fold
        training_rows = [
            ((fold,), self._sort_by_class(np.flatnonzero(in_problem & (row_fold != fold))))
            for fold in self.folds
        ]
        return make_dual_form(
            self.bank.X, training_rows, self.scaling, standardize=self.standardize
        )

    def _sort_by_class(self, row_index: Index) -> Index:
        if self.problem.n_outputs == 1:
            return row_index  # a sigmoid has labels, and needs no order
        return row_index[np.argsort(self.problem.target[row_index], kind="stable")]

    def design(self, dtype: Any) -> DesignMatrix:
        """Return the design matrix with labels, or for a softmax with rows sorted by class in each
        block.

        Rows of classes outside the problem are left out.
        """
        X, fold, scaling = self.bank.X, self.bank.fold, self.scaling
        needed = self.problem.has_class
        if len(self.folds) == 1:
            needed &= fold != self.folds[0]  # a design for one fold needs no held-out rows

        def block_rows(held_out_in: int, row_index: Index) -> FoldRows:
            training = tuple(other for other in self.folds if other != held_out_in)
            return training, self._sort_by_class(row_index)

        if X.shape[1] > int(needed.sum()):
            design = self.dual_form.design(dtype)
        elif isinstance(X, StreamedRows):
            # Sorted by class only within blocks, because they are read in the order of the disk.
            blocks = [block_rows(*part) for part in sweep(X, fold, ROWS_PER_STREAMED_BLOCK, needed)]
            design = make_streamed_design(
                X, blocks, scaling, standardize=self.standardize, dtype=dtype
            )
        else:
            blocks = [
                block_rows(held_out_in, row_index)
                for held_out_in in np.unique(fold).tolist()
                if (row_index := np.flatnonzero(needed & (fold == held_out_in))).size
            ]
            design = make_design(
                X,
                blocks,
                scaling,
                standardize=self.standardize,
                dtype=dtype,
                # Only a few heads are left for float64, which are not worth copies of the rows.
                copy_per_fold=self.copy_per_fold and dtype == np.float32,
                device=_device_for(self.bank.device, dtype),
            )
        row_blocks = [self._labelled(block, dtype) for block in design.row_blocks]
        return dataclasses.replace(design, row_blocks=row_blocks)

    def _labelled(self, block: RowBlock, dtype: Any) -> RowBlock:
        rows, labels, class_offsets = block.row_index, block.labels, block.class_offsets
        if self.problem.labels is None:
            classes = np.arange(self.problem.n_outputs + 1)
            class_offsets = np.searchsorted(self.problem.target[rows], classes)
        else:
            labels = np.ascontiguousarray(self.problem.labels[rows].T, dtype)
        weight = self.bank.sample_weight
        return dataclasses.replace(
            block,
            class_offsets=class_offsets,
            labels=labels,
            sample_weight=None if weight is None else weight[rows].astype(dtype),
        )


def _fit_results(bank: _Bank, folds: list[int], n_classes: int) -> list[FitResult]:
    """Return all heads of `bank.parts` in order, with weights of all classes and predictions.

    n_classes: or labels.
    """
    heads_of_fold: dict[int, list[FitResult]] = {}
    for fold in folds:
        present = None
        if bank.target.ndim == 1:
            present = np.flatnonzero(bank.class_mass(fold, n_classes) > 0)
        heads = [_fit_result(bank, i, fold, n_classes, present) for i in range(len(bank.specs))]
        if fold != REFIT:
            heads = [
                dataclasses.replace(head, validation=probabilities)
                for head, probabilities in zip(heads, _predict_held_out(bank, heads), strict=True)
            ]
        heads_of_fold[fold] = heads
    return [heads_of_fold[fold][i] for i in range(len(bank.specs)) for fold in folds]


def _fit_result(bank: _Bank, i: int, fold: int, n_classes: int, present: Index | None) -> FitResult:
    """Return the head of a spec and fold, without predictions.

    present: the classes that the training rows have; None for multi-label targets.
    """
    if present is None:
        parts = [bank.parts[i, fold, label] for label in range(n_classes)]
        weight = np.concatenate([part.weight for part in parts])
        bias = np.concatenate([part.bias for part in parts])
    else:
        parts = [bank.parts[i, fold, 0]]
        # Classes without training rows are not solved for: they get weights of zero and an
        # intercept that rules them out.
        weight = np.zeros((n_classes, bank.X.shape[1]))
        bias = np.full(n_classes, ABSENT_CLASS_DECISION)
        if len(present) == 2:
            # One sigmoid, divided evenly between the two classes as in a softmax.
            weight[present] = np.outer([-0.5, 0.5], parts[0].weight[0])
            bias[present] = np.array([-0.5, 0.5]) * parts[0].bias[0]
        else:
            weight[present], bias[present] = parts[0].weight, parts[0].bias
    objective = float(sum(part.objective for part in parts))
    gap_bound = float(sum(part.gap_bound for part in parts))
    return FitResult(
        bank.specs[i],
        fold,
        {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)},
        objective,
        relative_gap(objective, gap_bound),
        max(part.n_iterations for part in parts),
        sum(part.seconds for part in parts),
    )


def _predict_held_out(bank: _Bank, fold_results: list[FitResult]) -> Array:
    """Return the probabilities of a fold's held-out rows by its K heads, (K, n, C) float32."""
    held_out = np.flatnonzero(bank.fold == fold_results[0].fold)
    weight = np.concatenate([result.arrays["weight"] for result in fold_results])
    bias = np.concatenate([result.arrays["bias"] for result in fold_results])
    n_heads, n_classes = len(fold_results), len(weight) // len(fold_results)
    to_probabilities = sigmoid if bank.target.ndim == 2 else softmax
    probabilities = np.empty((n_heads, len(held_out), n_classes), np.float32)
    for positions in chunks(np.arange(len(held_out))):
        rows = bank.X[held_out[positions]].astype(np.float32, copy=False)
        decisions = (weight @ rows.T + bias[:, None]).reshape(n_heads, n_classes, -1)
        chunk = to_probabilities(decisions.transpose(1, 0, 2))
        probabilities[:, positions] = chunk.transpose(1, 2, 0)
    return probabilities


def _check(data: TrainingData, specs: Sequence[LogisticSpec]) -> None:
    check_specs(specs, "LogisticSpec(C=1.0)")
    check_rows(data)
    for spec in specs:
        if not (np.isfinite(spec.C) and spec.C > 0):
            raise ValueError(
                f"C must be a positive number, found {spec.C}: it is the inverse of the penalty's "
                "strength"
            )
