"""Learning curves: the same heads on nested subsets of the cached features, and a power law through
their errors.

S sizes, N held-out rows, B resamples, F folds.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.heads.arrays import Array, Doubles, Floats, Index
from headrace.heads.bank import BankJob
from headrace.heads.data.folds import strata
from headrace.heads.data.task import TRAIN_ONLY, Task, save_task
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.results import read_bank, remove_damaged
from headrace.heads.spec import ClassWeight, HeadSpec, spec_to_json
from headrace.pipelines.selection.correction import resampled_rows
from headrace.pipelines.selection.estimate import Estimate

# shares of the training rows, evenly spaced in the logarithm
FRACTIONS = (0.1, 0.16, 0.25, 0.4, 0.63, 1.0)
_SEED = 0  # of subsets and resamples
MAX_FOLDS = 5  # more would train longer and tell no more
CS = (1e-3, 1e-2, 0.1, 1.0)  # of logistic heads
ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4)  # of ridge heads
# of the power law; measured ones lie between 0.1 and 1 (Hestness et al. 2017)
EXPONENTS = np.geomspace(0.1, 2.0, 30)
TrainAll = Callable[[Sequence[BankJob]], None]


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Errors of the best head at each size of the training set, row by row."""

    sizes: Doubles  # (S,) images that were trained on, mean over folds
    class_sizes: Doubles  # (S, C) the same by class; (S, 1) for regression and several labels
    # (S, N) each held-out row's error: 0 or 1, the share of wrong labels, or the squared error as a
    # share of the target's variance
    wrong: Doubles
    rows: Index  # (N,) positions in the task

    @property
    def errors(self) -> Doubles:
        """(S,) mean errors."""
        return np.asarray(self.wrong.mean(1))


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """error(n) = floor + scale × n^-exponent, one fit for each of B weightings of the rows."""

    floor: Doubles  # (B,) >= 0
    scale: Doubles  # (B,) >= 0
    exponent: Doubles  # (B,)

    def at(self, n: npt.ArrayLike) -> Doubles:
        """Return the error (B,) with n images; n may be (B,)."""
        return np.asarray(self.floor + self.scale * np.asarray(n, np.float64) ** -self.exponent)

    def images_for(self, error: npt.ArrayLike) -> Doubles:
        """Return how many images (B,) reach the error; infinite where none do."""
        excess = np.asarray(error, np.float64) - self.floor
        with np.errstate(divide="ignore", over="ignore"):
            n_images = (self.scale / np.where(excess > 0, excess, np.nan)) ** (1 / self.exponent)
        return np.where(excess > 0, n_images, np.inf)


def learning_curve(
    task: Task,
    features: Sequence[Path],
    specs: Sequence[HeadSpec],
    results_folder: Path,
    train_all: TrainAll,
    *,
    groups: Array | None = None,
    fractions: Sequence[float] = FRACTIONS,
) -> LearningCurve:
    """Train the specs (of one or more kinds) on nested subsets, and return the errors of the best
    of them at each size.

    Fractions that give the same rows (each has two images of a class at least) are one size.

    groups: (rows of the task,), by default the images' content. A group is in a subset as a whole
    or not at all.
    results_folder: where trained banks stay, under a digest of everything they depend on; a second
    call trains nothing.
    train_all: trains bank jobs, for example on a cluster.
    """
    folds = list(range(min(task.n_folds, MAX_FOLDS)))
    group_codes = np.unique(
        task.content if groups is None else np.asarray(groups), return_inverse=True
    )[1]
    fractions, subsets_by_size = nested_subsets(task, folds, fractions, _SEED, group_codes)
    names, spec_texts = [path.name for path in features], [spec_to_json(spec) for spec in specs]
    key = repr([task.digest, names, spec_texts, fractions, _SEED])
    digest = hashlib.sha256(key.encode())
    # Groups of one row each change nothing.
    if len(np.unique(group_codes)) < len(group_codes):
        digest.update(group_codes.astype("<i8").tobytes())
    results_folder = results_folder / digest.hexdigest()[:16]
    results_folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for size_index, subsets in enumerate(subsets_by_size):
        for fold, subset_task in zip(folds, subsets, strict=True):
            results_prefix = f"{results_folder}/{size_index}-{fold}"
            jobs += _bank_jobs(subset_task, features, specs, results_prefix)
    train_all([job for job in jobs if not Path(job.result).exists()])
    curve_rows = np.flatnonzero(np.isin(task.fold, folds))
    row_losses = np.zeros((len(fractions), len(curve_rows)))
    for size_index, subsets in enumerate(subsets_by_size):
        spec_errors = np.zeros((len(specs), len(curve_rows)))
        for fold, subset_task in zip(folds, subsets, strict=True):
            spec_errors[:, task.fold[curve_rows] == fold] = _held_out_errors(
                task, subset_task, specs, f"{results_folder}/{size_index}-{fold}"
            )
        # A head that failed in some fold has nan errors and cannot be the best.
        mean_errors = np.where(np.isfinite(spec_errors).all(1), spec_errors.mean(1), np.inf)
        row_losses[size_index] = spec_errors[int(mean_errors.argmin())]
    training_counts = np.mean(
        [[_counts(subset_task) for subset_task in subsets] for subsets in subsets_by_size], axis=1
    )
    return LearningCurve(training_counts.sum(1), training_counts, row_losses, curve_rows)


def _bank_jobs(
    subset_task: Task, features: Sequence[Path], specs: Sequence[HeadSpec], results_prefix: str
) -> list[BankJob]:
    """Write a subset's task, and return the jobs that train the specs on it, one for each kind."""
    task_path = f"{results_prefix}.npz"
    # Written anew each time: a damaged file would fail every bank that reads it.
    save_task(subset_task, Path(task_path))
    jobs = []
    for kind in sorted({spec.kind for spec in specs}):
        kind_specs = tuple(spec for spec in specs if spec.kind == kind)
        results_path = f"{results_prefix}-{kind}.h5"
        remove_damaged(results_path)
        names = tuple(map(str, features))
        jobs.append(BankJob(task_path, names, kind_specs, results_path, refit=False))
    return jobs


def _held_out_errors(
    task: Task, subset_task: Task, specs: Sequence[HeadSpec], results_prefix: str
) -> Doubles:
    """Return errors (K, n) of K heads trained on a subset, on the fold that it leaves out.

    results_prefix: of the results files, one for each kind of head.
    """
    held_out = subset_task.fold == 0  # `subset` calls the held-out fold 0
    errors = np.empty((len(specs), int(held_out.sum())))
    for kind in {spec.kind for spec in specs}:
        of_kind = [position for position, spec in enumerate(specs) if spec.kind == kind]
        predictions = read_bank(f"{results_prefix}-{kind}.h5").out_of_fold_predictions_of(
            [spec_to_json(specs[position]) for position in of_kind]
        )
        errors[of_kind] = row_errors(task, subset_task.target[held_out], predictions[:, held_out])
    return errors


def nested_subsets(
    task: Task, folds: Sequence[int], fractions: Sequence[float], seed: int, groups: Array
) -> tuple[list[float], list[list[Task]]]:
    """Return the fractions whose subsets differ, and for each of them the subset of each fold.

    groups: (rows of the task,).
    """
    subsets_by_size = [
        [subset(task, fold, fraction, seed, groups) for fold in folds] for fraction in fractions
    ]
    sizes = [[len(subset_task.ids) for subset_task in subsets] for subsets in subsets_by_size]
    # Small fractions of few images give one and the same subset, and repeated it would count
    # several times in the fit of the power law.
    distinct = [index for index, size in enumerate(sizes) if size not in sizes[:index]]
    return [fractions[index] for index in distinct], [subsets_by_size[index] for index in distinct]


def subset(task: Task, fold: int, fraction: float, seed: int, groups: Array | None = None) -> Task:
    """Return a task that holds out the given fold, as its fold 0, and trains on a fraction of the
    other rows: at least two of each stratum. Rows keep their order.

    groups: (rows of the task,) drawn as a whole, each in the stratum of its first row; by default
    each row is a group.
    """
    training_rows = np.flatnonzero(task.fold != fold)
    rng = np.random.default_rng([seed, fold])
    group_labels = training_rows if groups is None else np.asarray(groups)[training_rows]
    _, first_rows, group_codes = np.unique(group_labels, return_index=True, return_inverse=True)
    stratum_of_group = strata(task.target[training_rows])[first_rows]  # classes, or target bins
    group_sizes = np.bincount(group_codes)
    drawn_rows = []
    for stratum in np.unique(stratum_of_group):
        group_positions = np.flatnonzero(stratum_of_group == stratum)
        # Each size is a beginning of one random order, so that smaller subsets lie within larger
        # ones. Put into the order of the rows first: the draw must not depend on the groups' names.
        drawn_order = rng.permutation(group_positions[np.argsort(first_rows[group_positions])])
        rows_so_far = np.cumsum(group_sizes[drawn_order])
        n_rows = int(rows_so_far[-1])
        n_wanted = max(min(2, n_rows), round(fraction * n_rows))
        drawn_groups = drawn_order[: int(np.searchsorted(rows_so_far, n_wanted)) + 1]
        drawn_rows.append(training_rows[np.isin(group_codes, drawn_groups)])
    subset_rows = np.sort(np.concatenate([*drawn_rows, np.flatnonzero(task.fold == fold)]))
    subset_fold = np.where(task.fold[subset_rows] == fold, 0, TRAIN_ONLY).astype(np.int16)
    return dataclasses.replace(task.take(subset_rows), fold=subset_fold)


def row_errors(task: Task, target: Array, predicted: Floats) -> Doubles:
    """Return errors (K, n) of predictions (K, n, C) of rows; nan without a prediction."""
    if task.kind == "single":
        is_missing = np.isnan(predicted).any(2)
        return np.where(is_missing, np.nan, np.nan_to_num(predicted).argmax(2) != target)
    target = np.asarray(target, np.float64).reshape(len(target), -1)
    if task.kind == "multi":
        return np.asarray(
            np.where(np.isnan(predicted), np.nan, (predicted >= 0.5) != (target >= 0.5)).mean(2)
        )
    variance = np.asarray(task.target, np.float64).reshape(len(task.target), -1).var(0)
    return np.asarray(
        ((predicted - target) ** 2 / np.where(variance > 0, variance, 1)).mean(2), np.float64
    )


def _counts(subset_task: Task) -> Doubles:
    is_training = subset_task.fold == TRAIN_ONLY
    if subset_task.kind != "single":
        return np.array([float(is_training.sum())])
    return np.bincount(subset_task.target[is_training], minlength=len(subset_task.classes)).astype(
        np.float64
    )


def row_draws(fold: Array, groups: Array, resamples: int) -> Doubles:
    """Return weights (N, 1 + B) of rows: ones, then B resamples of folds and of groups within
    them.
    """
    # Folds are resampled too, so that the luck of the training subsets is in the spread.
    rng = np.random.default_rng(_SEED)
    fold_numbers = np.unique(fold)
    fold_counts = rng.multinomial(
        len(fold_numbers), np.full(len(fold_numbers), 1 / len(fold_numbers)), resamples
    )
    draw_counts = resampled_rows(fold, groups, resamples, _SEED)
    for fold_index, fold_number in enumerate(fold_numbers):
        draw_counts[fold == fold_number] *= fold_counts[:, fold_index]
    return np.concatenate([np.ones((len(fold), 1)), draw_counts], axis=1)


def weighted_errors(wrong: Doubles, weights: Doubles) -> Doubles:
    """Return mean errors (S, B) of rows (S, N) under weights (N, B)."""
    mass = weights.sum(0)
    return np.where(mass > 0, wrong @ weights / np.where(mass > 0, mass, 1), np.nan)


def fit_power_law(sizes: Doubles, errors: Doubles) -> PowerLaw:
    """Fit a + b × n^-c with floor a and scale b >= 0 by least squares to errors (S, B) at sizes
    (S,). For each exponent c of a grid the best a and b have a closed form.
    """
    # Heads trained on few images vary more. Relative to the largest, to keep the sums near 1.
    weight = np.sqrt(sizes / sizes.max())[:, None]
    total = weight.sum()
    best = np.full(errors.shape[1], np.inf)
    floor, scale, exponent = (np.zeros(errors.shape[1]) for _ in range(3))
    mean_error = (weight * errors).sum(0) / total
    for c in EXPONENTS:
        x = sizes[:, None] ** -c
        x_mean = (weight * x).sum() / total
        spread = (weight * (x - x_mean) ** 2).sum()
        b = (weight * (x - x_mean) * (errors - mean_error)).sum(0) / spread
        a = mean_error - b * x_mean
        # Where the unconstrained fit has a negative floor or scale, the best allowed one is zero.
        through_zero = (weight * x * errors).sum(0) / (weight * x * x).sum()
        b = np.where(a < 0, np.maximum(through_zero, 0), b)
        a = np.where(b < 0, mean_error, np.maximum(a, 0))
        b = np.maximum(b, 0)
        loss = (weight * (errors - a - b * x) ** 2).sum(0)
        better = loss < best
        best = np.where(better, loss, best)
        floor, scale, exponent = (
            np.where(better, new, old)
            for new, old in ((a, floor), (b, scale), (np.full_like(a, c), exponent))
        )
    return PowerLaw(floor, scale, exponent)


def error_with_more(error: Estimate, gain: Estimate) -> Estimate:
    """Return the error that is left after a gain, >= 0, with the uncertainty of both."""
    # The interval of the difference is combined from the two intervals, which need not be symmetric
    # ("MOVER", method of variance estimates recovery: Zou and Donner 2008, "Construction of
    # confidence limits about effect measures", Statistics in Medicine 27:1693-1702). A larger error
    # usually comes with a larger gain, so the interval is rather too wide than too narrow.
    value = error.value - gain.value
    low = value - float(np.hypot(error.value - error.low, gain.high - gain.value))
    high = value + float(np.hypot(error.high - error.value, gain.value - gain.low))
    remaining_error = np.maximum(error.draws - gain.draws, 0.0)
    return Estimate(max(value, 0.0), remaining_error, (max(low, 0.0), max(high, 0.0)))


def gain_from_more(law: PowerLaw, size: float, times: float) -> Estimate:
    """Return by how much the error falls with `times` as many images, from the fit."""
    gain = law.at(size) - law.at(size * times)
    return Estimate(float(gain[0]), gain[1:])  # the first weighting, of `row_draws`, is all ones


def linear_specs(task: Task, class_weight: ClassWeight = "none") -> list[HeadSpec]:
    """Return linear heads of several strengths of regularization."""
    if task.kind == "regression":
        return [RidgeSpec(alpha) for alpha in ALPHAS]
    return [LogisticSpec(C, class_weight) for C in CS]
