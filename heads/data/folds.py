"""Which rows a head trains on: folds and the test split, stratified, grouped, or as the user gave
them.

Everything is deterministic in the seed. A stratum is a class; for multi-label targets the row's
rarest label, for regression a quantile of the target.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import TEST, TRAIN_ONLY

REGRESSION_STRATA = 10

GIVEN_NAMES = {
    "train": TRAIN_ONLY,
    "training": TRAIN_ONLY,
    "val": 0,
    "valid": 0,
    "validation": 0,
    "dev": 0,
    "test": TEST,
}


class BadSplit(HeadraceError, ValueError):
    """The rows cannot be split as asked."""


def strata(target: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(N,) the stratum of each row. target: (N,) integers or text: its class; (N, L) integers: the
    rarest label that the row has; floating point, (N,) or (N, L): the decile of the first column.
    """
    values = np.asarray(target)
    if np.issubdtype(values.dtype, np.floating):
        column = values.reshape(len(values), -1)[:, 0]
        ranks = np.argsort(np.argsort(column, kind="stable"), kind="stable")
        return np.asarray(
            ranks * min(REGRESSION_STRATA, max(len(values), 1)) // max(len(values), 1), np.int64
        )
    if values.ndim == 1:
        return np.asarray(np.unique(values, return_inverse=True)[1], np.int64)
    has = values != 0
    frequency = np.where(has, has.sum(0), len(values) + 1)
    return np.asarray(np.where(has.any(1), frequency.argmin(1), values.shape[1]), np.int64)


def make_folds(
    target: npt.NDArray[Any],
    *,
    n_folds: int,
    seed: int,
    groups: npt.NDArray[Any] | None = None,
    given: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.int16]:
    """(N,) int16: the fold in which each row is held out.

    given: used as it is: integers 0…F-1 (with TEST and TRAIN_ONLY), or names, where train/val/test
    and their usual spellings mean what they say and any other names are folds in sorted order.
    groups: no group is in two folds. A class with fewer rows (or groups) than folds is missing from
    the validation part of some folds; every row is still held out exactly once, and it trains in
    all the other folds. Raises BadSplit when fewer than two rows or groups per fold structure make
    that impossible.
    """
    if given is not None:
        return _given_folds(np.asarray(given))
    stratum = strata(target)
    if n_folds < 2:
        raise BadSplit(
            f"{n_folds} folds: cross-validation needs at least 2. Give a split column for a fixed "
            "validation set."
        )
    if groups is not None:
        return _grouped_folds(stratum, np.asarray(groups), n_folds, seed)
    if len(stratum) < n_folds:
        raise BadSplit(
            f"{len(stratum)} rows cannot make {n_folds} folds: use at most {len(stratum)} folds, "
            "or add images."
        )
    # Deal the shuffled rows like cards, class after class without starting over, so that both the
    # folds and the classes within them differ by at most one row.
    shuffled = np.random.default_rng(seed).permutation(len(stratum))
    dealt = shuffled[np.argsort(stratum[shuffled], kind="stable")]
    fold = np.empty(len(stratum), np.int16)
    fold[dealt] = np.arange(len(stratum)) % n_folds
    return fold


def split_test(
    target: npt.NDArray[Any], *, fraction: float, seed: int, groups: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.bool_]:
    """(N,) bool: the rows of the test split, about `fraction` of every class (at least one row of
    each class trains).

    groups: whole groups go to one side. Raises BadSplit when a side would be empty.
    """
    if not 0 < fraction < 1:
        raise BadSplit(f"test fraction {fraction}: give a number between 0 and 1, such as 0.25")
    stratum = strata(target)
    generator = np.random.default_rng(seed)
    test = np.zeros(len(stratum), np.bool_)
    if groups is not None:
        test = _grouped_test(stratum, np.asarray(groups), fraction, generator)
    else:
        counts = np.bincount(stratum)
        wanted = counts * fraction
        take = np.floor(wanted).astype(np.int64)
        # Largest remainders make up the total, so that 25 % of 40 classes of 3 is 30 rows and not
        # 0.
        missing = round(wanted.sum()) - take.sum()
        take[np.argsort(take - wanted, kind="stable")[:missing]] += 1
        take = np.minimum(take, np.maximum(counts - 1, 0))
        for value, number in enumerate(take):
            test[generator.permutation(np.flatnonzero(stratum == value))[:number]] = True
    if not test.any() or test.all():
        found = f"{len(stratum)} rows" + (
            f" in {len(np.unique(groups))} groups" if groups is not None else ""
        )
        raise BadSplit(
            f"{found} leave one side of a {fraction:.0%} test split empty: add images, or change "
            "the fraction."
        )
    return test


def _given_folds(given: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    if np.issubdtype(given.dtype, np.integer):
        fold = given.astype(np.int64)
        if fold.min(initial=0) < TRAIN_ONLY:
            raise BadSplit(
                f"fold {fold.min()}: use 0, 1, … for folds, {TEST} for test rows, {TRAIN_ONLY} for "
                "rows that only train"
            )
        names = np.unique(fold[fold >= 0])
        if len(names) and not np.array_equal(names, np.arange(len(names))):
            raise BadSplit(
                f"folds {names.tolist()} are not 0 … {len(names) - 1}: number them without gaps"
            )
        return fold.astype(np.int16)
    text = np.char.strip(given.astype(np.str_))
    lower = np.char.lower(text)
    other = sorted(set(text[~np.isin(lower, list(GIVEN_NAMES))].tolist()))
    used = set(lower.tolist())
    if other and used & {"val", "valid", "validation", "dev"}:
        raise BadSplit(
            f"the split column mixes a validation set with other names ({', '.join(other[:5])}): "
            "use train/val/test, or one name per fold"
        )
    code = GIVEN_NAMES | {name.lower(): number for number, name in enumerate(other)}
    if len({name.lower() for name in other}) < len(other):
        raise BadSplit(
            f"fold names that differ only in upper and lower case: {', '.join(other[:8])}"
        )
    return np.array([code[name] for name in lower.tolist()], np.int16)


def _grouped_folds(
    stratum: npt.NDArray[np.int64], groups: npt.NDArray[Any], n_folds: int, seed: int
) -> npt.NDArray[np.int16]:
    n_groups = len(np.unique(groups))
    if n_groups < n_folds:
        raise BadSplit(
            f"{n_groups} groups cannot make {n_folds} folds: use at most {n_groups} folds, or a "
            "finer group column."
        )
    # scikit-learn refuses when every class has fewer rows than folds, and warns when one has; a
    # class that is missing from a fold is fine here, so it is shown one stratum for all the small
    # classes together.
    counts = np.bincount(stratum)
    known = np.where(counts[stratum] >= n_folds, stratum + 1, 0)
    if (known == 0).sum() < n_folds:
        known[known == 0] = np.argmax(counts) + 1
    if np.bincount(known).max() < n_folds:
        known = np.zeros_like(known)
    from sklearn.model_selection import StratifiedGroupKFold  # its import takes seconds

    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    fold = np.empty(len(stratum), np.int16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for number, (_, held_out) in enumerate(
            splitter.split(np.zeros(len(stratum)), known, groups)
        ):
            fold[held_out] = number
    if (
        len(np.unique(fold)) < n_folds
    ):  # its greedy balance left a fold empty: deal the groups instead
        codes = np.unique(groups, return_inverse=True)[1]
        sizes = np.bincount(codes)
        order = np.argsort(-sizes, kind="stable")
        of_group = np.empty(n_groups, np.int16)
        of_group[order] = np.arange(n_groups) % n_folds
        fold = of_group[codes]
    return fold


def _grouped_test(
    stratum: npt.NDArray[np.int64],
    groups: npt.NDArray[Any],
    fraction: float,
    generator: np.random.Generator,
) -> npt.NDArray[np.bool_]:
    """Greedy: a group goes to the test side where that brings the classes nearer to their share.

    Large groups first, because they are the hard ones to place; equal sizes in random order.
    """
    codes = np.unique(groups, return_inverse=True)[1]
    table = np.zeros((codes.max(initial=-1) + 1, stratum.max(initial=-1) + 1))
    np.add.at(table, (codes, stratum), 1)
    wanted = table.sum(0) * fraction
    taken = np.zeros_like(wanted)
    chosen = np.zeros(len(table), np.bool_)
    shuffled = generator.permutation(len(table))
    for group in shuffled[np.argsort(-table[shuffled].sum(1), kind="stable")]:
        if np.abs(taken + table[group] - wanted).sum() < np.abs(taken - wanted).sum():
            chosen[group] = True
            taken += table[group]
    if not chosen.any() and len(table) > 1:
        chosen[shuffled[np.argmin(table[shuffled].sum(1))]] = True
    return np.asarray(chosen[codes], np.bool_)
