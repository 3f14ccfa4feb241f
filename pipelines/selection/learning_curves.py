"""Learning curves: the same heads on nested subsets of the cached features, a power law through
their errors, and what it says of twice and four times as many images.

S sizes, N held-out rows, B resamples, F folds. For each fold its own random order of the groups of
the other rows is drawn, class by class; the subset of each size is a beginning of it, so that
smaller ones lie within larger ones.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.bank import BankJob
from headrace.heads.data.folds import strata
from headrace.heads.data.task import TRAIN_ONLY, Task, save_task
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.results import read_bank, remove_damaged
from headrace.heads.spec import ClassWeight, HeadSpec, spec_to_json
from headrace.pipelines.selection.correction import resampled_rows
from headrace.pipelines.selection.estimate import Estimate

Floats = npt.NDArray[np.float64]

FRACTIONS = (0.1, 0.16, 0.25, 0.4, 0.63, 1.0)
MOST_FOLDS = 5
# Of the linear heads, from strong to weak.
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0)
ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4)
EXPONENTS = np.geomspace(
    0.1, 2.0, 30
)  # of the power law; measured ones lie between 0.1 and 1 (Hestness et al. 2017)
TrainAll = Callable[[Sequence[BankJob]], None]


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Errors of the best head at each size, row by row."""

    sizes: Floats  # (S,) images that were trained on, mean over folds
    class_sizes: Floats  # (S, C) of each class; regression and several labels: (S, 1), all
    # (S, N) each held-out row's error: 0 or 1, or a squared error as a share of the variance
    wrong: Floats
    rows: npt.NDArray[np.int64]  # (N,) positions in the task

    @property
    def errors(self) -> Floats:
        """(S,) mean errors."""
        return np.asarray(self.wrong.mean(1))


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """error(n) = floor + scale × n^-exponent, one fit for each of B weightings of the rows."""

    floor: Floats  # (B,) >= 0
    scale: Floats  # (B,) >= 0
    exponent: Floats  # (B,)

    def at(self, n: npt.ArrayLike) -> Floats:
        """(B,) the error with n images; n may be (B,)."""
        return np.asarray(self.floor + self.scale * np.asarray(n, np.float64) ** -self.exponent)

    def images_for(self, error: npt.ArrayLike) -> Floats:
        """(B,) images at which the error is reached; infinite where it never is."""
        above = np.asarray(error, np.float64) - self.floor
        with np.errstate(divide="ignore", over="ignore"):
            found = (self.scale / np.where(above > 0, above, np.nan)) ** (1 / self.exponent)
        return np.where(above > 0, found, np.inf)


def learning_curve(
    task: Task,
    features: Sequence[Path],
    specs: Sequence[HeadSpec],
    folder: Path,
    train_all: TrainAll,
    *,
    groups: npt.NDArray[Any] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> LearningCurve:
    """Train the specs (one or more kinds) on nested subsets, and read how each held-out row fared
    under the best of them.

    groups: (rows of the task,) by default the images' content; a subset has a group as a whole or
    not at all. Shares that leave the same rows (two images of a class are the least) are one size
    of the curve. Results are kept in `folder`, by what they are results of: a second call trains
    nothing. train_all runs bank jobs.
    """
    folds = list(range(min(task.n_folds, MOST_FOLDS)))
    kinds = sorted({spec.kind for spec in specs})
    together = np.unique(
        task.content if groups is None else np.asarray(groups), return_inverse=True
    )[1]
    fractions, drawn = nested_subsets(task, folds, fractions, seed, together)
    key = repr(
        [
            task.digest,
            [path.name for path in features],
            [spec_to_json(spec) for spec in specs],
            fractions,
            seed,
        ]
    )
    digest = hashlib.sha256(key.encode())
    if len(np.unique(together)) < len(together):
        digest.update(together.astype("<i8").tobytes())
    folder = folder / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    subtasks = {
        (place, fold): small
        for place, smaller in enumerate(drawn)
        for fold, small in zip(folds, smaller, strict=True)
    }
    jobs = []
    for (place, fold), small in subtasks.items():
        path = folder / f"{place}-{fold}.npz"
        save_task(
            small, path
        )  # every time: one that was damaged would stop all that is trained on it
        for kind in kinds:
            chosen = tuple(spec for spec in specs if spec.kind == kind)
            result = str(folder / f"{place}-{fold}-{kind}.h5")
            jobs.append(BankJob(str(path), tuple(map(str, features)), chosen, result, refit=False))
    for job in jobs:
        remove_damaged(job.result)
    train_all([job for job in jobs if not Path(job.result).exists()])
    rows = np.flatnonzero(np.isin(task.fold, folds))
    wrong = np.zeros((len(fractions), len(rows)))
    for place in range(len(fractions)):
        errors = np.zeros((len(specs), len(rows)))
        for fold in folds:
            small = subtasks[place, fold]
            own = task.fold[rows] == fold
            for kind in kinds:
                found = read_bank(folder / f"{place}-{fold}-{kind}.h5")
                at = [number for number, spec in enumerate(specs) if spec.kind == kind]
                stack = found.out_of_fold_stack([spec_to_json(specs[number]) for number in at])
                inside = small.fold == 0
                errors[np.ix_(np.array(at), np.flatnonzero(own))] = row_errors(
                    task, small.target[inside], stack[:, inside]
                )
        means = np.where(np.isfinite(errors).all(1), errors.mean(1), np.inf)
        wrong[place] = errors[int(means.argmin())]
    counts = np.array(
        [[_counts(subtasks[place, fold]) for fold in folds] for place in range(len(fractions))]
    ).mean(1)
    return LearningCurve(counts.sum(1), counts, wrong, rows)


def nested_subsets(
    task: Task,
    folds: Sequence[int],
    fractions: Sequence[float],
    seed: int,
    groups: npt.NDArray[Any],
) -> tuple[list[float], list[list[Task]]]:
    """The shares that differ, and for each of them the subset of each fold. groups: (rows of the
    task,).

    Several small shares of few images are one and the same subset, which would weigh several times
    in a fit.
    """
    drawn = [
        [subset(task, fold, fraction, seed, groups) for fold in folds] for fraction in fractions
    ]
    sizes = [[len(small.ids) for small in smaller] for smaller in drawn]
    kept = [place for place in range(len(fractions)) if sizes[place] not in sizes[:place]]
    return [fractions[place] for place in kept], [drawn[place] for place in kept]


def subset(
    task: Task, fold: int, fraction: float, seed: int, groups: npt.NDArray[Any] | None = None
) -> Task:
    """The task whose fold 0 is the given fold, and that trains on a share of the other rows: of
    each stratum, two rows at least. In the order of the task.

    groups: (rows of the task,) drawn as a whole, each as of the stratum of its first row; by
    default each row is its own.
    """
    others = np.flatnonzero(task.fold != fold)
    rng = np.random.default_rng([seed, fold])
    together = others if groups is None else np.asarray(groups)[others]
    _, first, group = np.unique(together, return_index=True, return_inverse=True)
    of_group = strata(task.target[others])[first]
    sizes = np.bincount(group)
    taken = []
    for stratum in np.unique(of_group):
        members = np.flatnonzero(of_group == stratum)
        order = rng.permutation(members[np.argsort(first[members])])
        rows = np.cumsum(sizes[order])
        wanted = max(min(2, int(rows[-1])), round(fraction * int(rows[-1])))
        taken.append(others[np.isin(group, order[: int(np.searchsorted(rows, wanted)) + 1])])
    rows = np.sort(np.concatenate([*taken, np.flatnonzero(task.fold == fold)]))
    folds = np.where(task.fold[rows] == fold, 0, TRAIN_ONLY).astype(np.int16)
    return dataclasses.replace(task.take(rows), fold=folds)


def row_errors(task: Task, target: npt.NDArray[Any], predicted: npt.NDArray[np.float32]) -> Floats:
    """(K, n) errors of predictions (K, n, C) of some rows of the task; nan where there is no
    prediction.
    """
    if task.kind == "single":
        lost = np.isnan(predicted).any(2)
        return np.where(lost, np.nan, np.nan_to_num(predicted).argmax(2) != target)
    target = np.asarray(target, np.float64).reshape(len(target), -1)
    if task.kind == "multi":
        return np.asarray(
            np.where(np.isnan(predicted), np.nan, (predicted >= 0.5) != (target >= 0.5)).mean(2)
        )
    variance = np.asarray(task.target, np.float64).reshape(len(task.target), -1).var(0)
    return np.asarray(
        ((predicted - target) ** 2 / np.where(variance > 0, variance, 1)).mean(2), np.float64
    )


def _counts(small: Task) -> Floats:
    trains = small.fold == TRAIN_ONLY
    if small.kind != "single":
        return np.array([float(trains.sum())])
    return np.bincount(small.target[trains], minlength=len(small.classes)).astype(np.float64)


def row_draws(
    fold: npt.NDArray[Any], groups: npt.NDArray[Any], resamples: int, seed: int = 0
) -> Floats:
    """(N, 1 + B) weights of rows: ones, then B resamples of folds and of groups within them, so
    that the luck of the training subsets is in the spread.
    """
    rng = np.random.default_rng(seed)
    numbers = np.unique(fold)
    times = rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), resamples)
    drawn = resampled_rows(fold, groups, resamples, seed)
    for place, number in enumerate(numbers):
        drawn[fold == number] *= times[:, place]
    return np.concatenate([np.ones((len(fold), 1)), drawn], axis=1)


def weighted_errors(wrong: Floats, weights: Floats) -> Floats:
    """(S, B) mean errors of rows (S, N) under weights (N, B)."""
    mass = weights.sum(0)
    return np.where(mass > 0, wrong @ weights / np.where(mass > 0, mass, 1), np.nan)


def fit_power_law(sizes: Floats, errors: Floats) -> PowerLaw:
    """Least squares with floor and scale >= 0, sizes (S,), errors (S, B); each size weighs as its
    root.

    Small subsets are few images and vary more. For each exponent of a grid the best floor and scale
    are in closed form.
    """
    weight = np.sqrt(sizes / sizes.max())[:, None]
    total = weight.sum()
    best = np.full(errors.shape[1], np.inf)
    floor, scale, exponent = (np.zeros(errors.shape[1]) for _ in range(3))
    middle = (weight * errors).sum(0) / total
    for c in EXPONENTS:
        x = sizes[:, None] ** -c
        x_mean = (weight * x).sum() / total
        spread = (weight * (x - x_mean) ** 2).sum()
        b = (weight * (x - x_mean) * (errors - middle)).sum(0) / spread
        a = middle - b * x_mean
        # On the border of what is allowed one of the two is zero.
        through_zero = (weight * x * errors).sum(0) / (weight * x * x).sum()
        b = np.where(a < 0, np.maximum(through_zero, 0), b)
        a = np.where(b < 0, middle, np.maximum(a, 0))
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
    """The error that is left of today's after a gain, >= 0, with both uncertainties in its
    interval.

    The interval of the difference is that of two intervals of unlike tails, put together by their
    squares ("MOVER", method of variance estimates recovery: Zou and Donner 2008, "Construction of
    confidence limits about effect measures", Statistics in Medicine 27:1693-1702). A larger error
    usually comes with a larger gain, so it is rather too wide than too narrow.
    """
    value = error.value - gain.value
    low = value - float(np.hypot(error.value - error.low, gain.high - gain.value))
    high = value + float(np.hypot(error.high - error.value, gain.value - gain.low))
    left = np.maximum(error.draws - gain.draws, 0.0)
    return Estimate(max(value, 0.0), left, (max(low, 0.0), max(high, 0.0)))


def gain_from_more(law: PowerLaw, size: float, times: float) -> Estimate:
    """By how much the error falls with `times` as many images, from the fit; the first weighting is
    the value itself.
    """
    gain = law.at(size) - law.at(size * times)
    return Estimate(float(gain[0]), gain[1:])


def linear_specs(task: Task, class_weight: ClassWeight = "none") -> list[HeadSpec]:
    """Linear heads from strong to weak regularisation."""
    if task.kind == "regression":
        return [RidgeSpec(alpha) for alpha in ALPHAS]
    return [LogisticSpec(strength, class_weight) for strength in STRENGTHS]
