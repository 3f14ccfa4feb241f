"""Folds and the test split: stratified, grouped, or as given.

N rows, L labels. Everything is deterministic in the seed. A stratum is a class; for multi-label
targets the row's rarest label, for regression a quantile of the target.
"""

import warnings

import numpy as np
import numpy.typing as npt

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.heads.arrays import Array, Index, Mask
from headrace.heads.data.task import TEST, TRAIN_ONLY

REGRESSION_STRATA = 10  # quantiles of the target, from which folds get equal shares of rows

# {usual name of a side of a split: value of `Task.fold`}
GIVEN_NAMES = {
    "train": TRAIN_ONLY,
    "training": TRAIN_ONLY,
    "val": 0,
    "valid": 0,
    "validation": 0,
    "dev": 0,
    "test": TEST,
    "testing": TEST,
    "holdout": TEST,
}


class BadSplit(HeadraceError, ValueError):
    """The rows cannot be split as the options say."""


def strata(target: Array) -> Index:
    """Return the stratum of each row, (N,) int64.

    target: (N,) integers or text: the stratum is the class; (N, L) integers: the rarest label that
    the row has; floating point, (N,) or (N, L): the decile of the first column.
    """
    target_values = np.asarray(target)
    if np.issubdtype(target_values.dtype, np.floating):
        first_column = target_values.reshape(len(target_values), -1)[:, 0]
        # Ranks, not values, so that equal values and outliers leave the strata equally large.
        value_ranks = np.argsort(np.argsort(first_column, kind="stable"), kind="stable")
        n_rows = max(len(target_values), 1)
        return np.asarray(value_ranks * min(REGRESSION_STRATA, n_rows) // n_rows, np.int64)
    if target_values.ndim == 1:
        return np.asarray(np.unique(target_values, return_inverse=True)[1], np.int64)
    has_label = target_values != 0
    label_frequency = np.where(has_label, has_label.sum(0), len(target_values) + 1)
    # Rows without labels are a stratum of their own.
    rarest = np.where(has_label.any(1), label_frequency.argmin(1), target_values.shape[1])
    return np.asarray(rarest, np.int64)


def make_folds(
    target: Array,
    *,
    n_folds: int,
    seed: int,
    groups: Array | None = None,
    given: Array | None = None,
    row_noun: tuple[str, str] = ("row", "rows"),
) -> npt.NDArray[np.int16]:
    """Return the fold in which each row is held out, (N,) int16.

    given: a column of folds to use as it is: integers 0…F-1 (with TEST and TRAIN_ONLY), or names,
    of which train/val/test and their usual spellings are sides of a split, and all others folds in
    sorted order.
    groups: (N,); no group is in two folds.
    row_noun: what a row is, one and several, for messages.

    A class with fewer rows (or groups) than folds is missing from the held-out rows of some folds;
    every row is still held out exactly once, and trains in all other folds.

    Raises BadSplit for fewer rows or groups than folds, and for names or numbers in `given` that do
    not go together.
    """
    if given is not None:
        return _given_folds(np.asarray(given))
    stratum_of_row = strata(target)
    if n_folds < 2:
        raise BadSplit(
            f"{n_folds} folds: cross-validation needs at least 2. Give a split column for a fixed "
            "validation set."
        )
    if groups is not None:
        return _grouped_folds(stratum_of_row, np.asarray(groups), n_folds, seed)
    if len(stratum_of_row) < n_folds:
        raise BadSplit(
            f"{count_text(len(stratum_of_row), *row_noun)} cannot make {n_folds} folds: "
            f"{_fewer_folds(len(stratum_of_row))}add images."
        )
    # The shuffled rows are dealt to the folds in turn, class after class. The next class goes on
    # with the fold after the last one, so both the folds and their classes differ by at most one
    # row.
    shuffled_rows = np.random.default_rng(seed).permutation(len(stratum_of_row))
    dealt_rows = shuffled_rows[np.argsort(stratum_of_row[shuffled_rows], kind="stable")]
    fold_of_row = np.empty(len(stratum_of_row), np.int16)
    fold_of_row[dealt_rows] = np.arange(len(stratum_of_row)) % n_folds
    return fold_of_row


def split_test(
    target: Array,
    *,
    fraction: float,
    seed: int,
    groups: Array | None = None,
    row_noun: tuple[str, str] = ("row", "rows"),
) -> Mask:
    """Return which rows are test rows, (N,) bool: about `fraction` of every class.

    Without groups, at least one row of each class trains. groups: (N,); all rows of a group go to
    one side.
    row_noun: what a row is, one and several, for messages.

    Raises BadSplit when a side would be empty.
    """
    if not 0 < fraction < 1:
        raise BadSplit(f"test fraction {fraction}: give a number between 0 and 1, such as 0.25")
    stratum_of_row = strata(target)
    random_generator = np.random.default_rng(seed)
    is_test = np.zeros(len(stratum_of_row), np.bool_)
    if groups is not None:
        is_test = _grouped_test(stratum_of_row, np.asarray(groups), fraction, random_generator)
    else:
        stratum_counts = np.bincount(stratum_of_row)
        wanted_counts = stratum_counts * fraction
        taken_counts = np.floor(wanted_counts).astype(np.int64)
        # Method of largest remainders: the classes with the largest rounding errors get the rows
        # that are missing from the total. 25 % of 40 classes of 3 rows are then 30 rows, not 0.
        n_missing = round(wanted_counts.sum()) - taken_counts.sum()
        taken_counts[np.argsort(taken_counts - wanted_counts, kind="stable")[:n_missing]] += 1
        taken_counts = np.minimum(taken_counts, np.maximum(stratum_counts - 1, 0))
        for stratum, n_taken in enumerate(taken_counts):
            rows = random_generator.permutation(np.flatnonzero(stratum_of_row == stratum))
            is_test[rows[:n_taken]] = True
    if not is_test.any() or is_test.all():
        found_text, add_text = count_text(len(stratum_of_row), *row_noun), "add images"
        if groups is not None:
            found_text += f" in {count_text(len(np.unique(groups)), 'group')}"
            add_text = "name a finer column of groups, add images"
        if groups is None and len(stratum_of_row) == len(np.unique(stratum_of_row)) > 1:
            raise BadSplit(
                f"{found_text}, and each has a class of its own: is task.target the right column? "
                "Numbers are predicted with task.kind: regression"
            )
        raise BadSplit(
            f"{found_text} leave one side of a {fraction:.0%} test split empty: {add_text}, or "
            "change the fraction."
        )
    return is_test


def _given_folds(given_values: Array) -> npt.NDArray[np.int16]:
    if np.issubdtype(given_values.dtype, np.integer):
        fold_of_row = given_values.astype(np.int64)
        if fold_of_row.min(initial=0) < TRAIN_ONLY:
            raise BadSplit(
                f"fold {fold_of_row.min()}: use 0, 1, … for folds, {TEST} for test rows, "
                f"{TRAIN_ONLY} for rows that only train"
            )
        fold_numbers = np.unique(fold_of_row[fold_of_row >= 0])
        if len(fold_numbers) and not np.array_equal(fold_numbers, np.arange(len(fold_numbers))):
            raise BadSplit(
                f"folds {fold_numbers.tolist()} are not 0 … {len(fold_numbers) - 1}: number them "
                "without gaps"
            )
        return fold_of_row.astype(np.int16)
    fold_names = np.char.strip(given_values.astype(np.str_))
    lower_names = np.char.lower(fold_names)
    fold_like_names = sorted(set(fold_names[~np.isin(lower_names, list(GIVEN_NAMES))].tolist()))
    used_names = set(lower_names.tolist())
    if fold_like_names and used_names & {"val", "valid", "validation", "dev"}:
        raise BadSplit(
            "the split column mixes a validation set with other names "
            f"({', '.join(fold_like_names[:5])}): use train/val/test, or one name per fold"
        )
    fold_of_name = GIVEN_NAMES | {name.lower(): fold for fold, name in enumerate(fold_like_names)}
    if len({name.lower() for name in fold_like_names}) < len(fold_like_names):
        raise BadSplit(
            f"fold names that differ only in upper and lower case: {', '.join(fold_like_names[:8])}"
        )
    return np.array([fold_of_name[name] for name in lower_names.tolist()], np.int16)


def _fewer_folds(n_parts: int) -> str:
    """Return the advice to use fewer folds, where as many as there are parts are enough."""
    return f"use at most {n_parts} folds, or " if n_parts > 1 else ""


def _grouped_folds(
    stratum_of_row: Index, groups: Array, n_folds: int, seed: int
) -> npt.NDArray[np.int16]:
    n_groups = len(np.unique(groups))
    if n_groups < n_folds:
        raise BadSplit(
            f"{count_text(n_groups, 'group')} cannot make {n_folds} folds: "
            f"{_fewer_folds(n_groups)}name a finer group column."
        )
    # scikit-learn raises an error if every class has fewer rows than folds, and warns if one has. A
    # class may be missing from a fold here, so it gets all small classes as one stratum.
    stratum_counts = np.bincount(stratum_of_row)
    shown_stratum = np.where(stratum_counts[stratum_of_row] >= n_folds, stratum_of_row + 1, 0)
    if (shown_stratum == 0).sum() < n_folds:
        shown_stratum[shown_stratum == 0] = np.argmax(stratum_counts) + 1
    if np.bincount(shown_stratum).max() < n_folds:
        shown_stratum = np.zeros_like(shown_stratum)
    from sklearn.model_selection import StratifiedGroupKFold  # its import takes seconds

    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    fold_of_row = np.empty(len(stratum_of_row), np.int16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        splits = splitter.split(np.zeros(len(stratum_of_row)), shown_stratum, groups)
        for fold, (_, held_out) in enumerate(splits):
            fold_of_row[held_out] = fold
    # Its greedy balance may leave a fold empty. Then the groups are dealt to the folds in turn, the
    # largest first.
    if len(np.unique(fold_of_row)) < n_folds:
        group_of_row = np.unique(groups, return_inverse=True)[1]
        largest_first = np.argsort(-np.bincount(group_of_row), kind="stable")
        fold_of_group = np.empty(n_groups, np.int16)
        fold_of_group[largest_first] = np.arange(n_groups) % n_folds
        fold_of_row = fold_of_group[group_of_row]
    return fold_of_row


def _grouped_test(
    stratum_of_row: Index, groups: Array, fraction: float, random_generator: np.random.Generator
) -> Mask:
    """Return which rows are test rows, chosen greedily by group.

    A group becomes a test group if that brings the counts of the strata nearer to their share.
    """
    group_of_row = np.unique(groups, return_inverse=True)[1]
    # Rows of each group in each stratum.
    group_table = np.zeros((group_of_row.max(initial=-1) + 1, stratum_of_row.max(initial=-1) + 1))
    np.add.at(group_table, (group_of_row, stratum_of_row), 1)
    wanted_counts = group_table.sum(0) * fraction
    taken_counts = np.zeros_like(wanted_counts)
    is_test_group = np.zeros(len(group_table), np.bool_)
    shuffled_groups = random_generator.permutation(len(group_table))
    # Large groups first, because they are harder to place; equal sizes in random order.
    for group in shuffled_groups[np.argsort(-group_table[shuffled_groups].sum(1), kind="stable")]:
        deviation_with_group = np.abs(taken_counts + group_table[group] - wanted_counts).sum()
        if deviation_with_group < np.abs(taken_counts - wanted_counts).sum():
            is_test_group[group] = True
            taken_counts += group_table[group]
    # With few groups and fine strata (deciles of a number) perhaps no group brings them nearer.
    # Then those that change the counts least are taken, up to half of the share.
    while 2 * taken_counts.sum() < wanted_counts.sum():
        free_groups = shuffled_groups[~is_test_group[shuffled_groups]]
        sizes = group_table[free_groups].sum(1)
        # None that is larger than twice the missing rows.
        free_groups = free_groups[sizes <= 2 * (wanted_counts.sum() - taken_counts.sum())]
        if not len(free_groups):
            break
        deviation = np.abs(taken_counts + group_table[free_groups] - wanted_counts).sum(1)
        group = free_groups[deviation.argmin()]
        is_test_group[group] = True
        taken_counts += group_table[group]
    if not is_test_group.any() and len(group_table) > 1:
        is_test_group[shuffled_groups[np.argmin(group_table[shuffled_groups].sum(1))]] = True
    return np.asarray(is_test_group[group_of_row], np.bool_)
