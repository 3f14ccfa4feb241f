"""The test split and the folds of a run's rows: the user's, or drawn so that no group is split."""

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from headrace.cache.count_text import count_text
from headrace.cache.text import as_text
from headrace.extract.errors import as_yaml_list
from headrace.extract.sources.layout import side_of_cell
from headrace.heads.arrays import Array, Index, Mask, Strings
from headrace.heads.data.folds import BadSplit, make_folds, split_test
from headrace.heads.data.task import TEST, TRAIN_ONLY
from headrace.pipelines.recipe.sections import TaskSection
from headrace.pipelines.recipe.targets import DataError, empty_as_missing, name_some

CROPPED_IMAGE = "image of the box or tile"  # a column of samples that are crops
_MISSING_WORDS = ("nan", "none", "null", "na", "n/a", "unlabelled", "unlabeled")
_DOMINANT_SHARE = 0.9  # of the images in one class, from which on accuracy says little
_FEW_IMAGES = 5  # of a class: with fewer, some of five folds, the default, have none
_EXCLUDED_NAMED = 20  # images in one message, to be copied into the recipe


def assign_folds(
    labelled_samples: pd.DataFrame,
    target: Array,
    groups: Index | None,
    section: TaskSection,
    notes: list[str],
    *,
    across_sides: bool,
) -> npt.NDArray[np.int16]:
    """Return the fold of each row, (N,) int16; adds to `notes`.

    across_sides: the user's column has copies on several sides, and is followed.
    """
    if across_sides:
        # A draw of what the column leaves open still keeps copies together.
        row_groups = np.arange(len(labelled_samples), dtype=np.int64) if groups is None else groups
        kept_together = joined_by(row_groups, labelled_samples["_content"])
        return _draw_folds(
            labelled_samples, target, groups, section, notes, kept_together=kept_together
        )
    if groups is None:
        # Copies of one image are split as one row.
        first_rows, copy_of = _first_of_each(labelled_samples["_content"])
        row_noun = ("image", "images")
        if len(first_rows) < len(labelled_samples):
            row_noun = ("image without its copies", "images without their copies")
        return _draw_folds(
            labelled_samples.iloc[first_rows],
            target[first_rows],
            None,
            section,
            notes,
            row_noun=row_noun,
        )[copy_of]
    joined_groups = joined_by(groups, labelled_samples["_content"])
    notes += _joined_groups(labelled_samples, groups, joined_groups, section)
    if section.unit is not None and section.split is None and section.fold is None:
        first_rows, unit_of_row = _first_of_each(as_text(labelled_samples[section.unit]))
        side_share = min(section.test_fraction or 1, 1 / section.folds)
        if np.bincount(unit_of_row).max() > side_share * len(unit_of_row):
            # One unit has more images than a side should have, which leaves the others to one side:
            # each unit counts once.
            fold_of_unit = _draw_folds(
                labelled_samples.iloc[first_rows],
                target[first_rows],
                joined_groups[first_rows],
                section,
                notes,
                row_noun=(f"unit of {section.unit!r}", f"units of {section.unit!r}"),
            )
            return fold_of_unit[unit_of_row]
    return _draw_folds(labelled_samples, target, joined_groups, section, notes)


def copies_across_sides(labelled_samples: pd.DataFrame, section: TaskSection) -> list[str]:
    """Return a note if the user's split or fold column has copies of an image on different sides.

    Raises DataError, naming the rows, unless the recipe allows it (task.copies: keep).
    """
    column_name = section.split or section.fold
    if column_name is None:
        return []
    read_column = _read_split if section.split else _read_folds
    side_of_row = pd.Series(read_column(labelled_samples, column_name), labelled_samples.index)
    if section.split is not None and section.fold is not None:
        folds = as_text(labelled_samples[section.fold]).fillna("")
        side_of_row = side_of_row.where(side_of_row != "train", "fold " + folds)
    is_mixed = side_of_row.groupby(labelled_samples["_content"].to_numpy()).transform("nunique") > 1
    if not is_mixed.any():
        return []
    first_content = labelled_samples.loc[is_mixed, "_content"].iloc[0]
    copy_ids = labelled_samples.loc[labelled_samples["_content"] == first_content, "id"].tolist()
    copies_text = (
        f"column {column_name!r} puts exact copies of an image on different sides: "
        f"{count_text(int(is_mixed.sum()), 'image')}, first {' and '.join(map(repr, copy_ids[:2]))}"
    )
    if section.copies == "keep":
        return [
            (
                f"{copies_text}. The column is followed (task.copies: keep); what is tested was "
                "trained on there"
            )
        ]
    raise DataError(
        f"{copies_text}. Mend the column, leave one of them out (images.exclude: "
        f"{as_yaml_list(copy_ids[:1])}), or follow the column as it is: task.copies: keep"
    )


def _group_column(section: TaskSection) -> str:
    return str(section.group or section.unit or CROPPED_IMAGE)


def _joined_groups(
    labelled_samples: pd.DataFrame, groups: Index, joined_groups: Index, section: TaskSection
) -> list[str]:
    """Return a note on groups that were joined because they share copies of an image.

    Raises DataError if most of the images became one group.
    """
    content = labelled_samples["_content"].to_numpy()
    group_table = pd.DataFrame({"group": groups, "joined": joined_groups, "content": content})
    joined_sizes = group_table.groupby("joined")["group"].nunique()
    if joined_sizes.max() < 2:
        return []
    groups_per_image = group_table.groupby("content")["group"].nunique()
    most_shared = groups_per_image.idxmax()
    copy_ids = labelled_samples.loc[labelled_samples["_content"] == most_shared, "id"].tolist()
    n_joined_rows = int((joined_groups == joined_sizes.idxmax()).sum())
    n_groups = group_table["group"].nunique()
    groups_text = (
        "copies of one image are in several groups, which are joined, since otherwise one would be "
        f"tested on what it was trained on: {copy_ids[0]!r} and its copies are in "
        f"{int(groups_per_image.max()):,} of the {count_text(n_groups, 'group')} of "
        f"{_group_column(section)!r}, and the largest joined group has "
        f"{int(joined_sizes.max()):,} of them, {n_joined_rows:,} of {len(labelled_samples):,} "
        "images"
    )
    if n_joined_rows > len(labelled_samples) / 2:
        n_more = len(copy_ids) - _EXCLUDED_NAMED
        more_text = f" and {n_more:,} more" if n_more > 0 else ""
        raise DataError(
            f"{groups_text}. No fair split is left. Leave these copies out (a placeholder shows "
            "nothing of its patient): images.exclude: "
            f"{as_yaml_list(copy_ids[:_EXCLUDED_NAMED])}{more_text}, or mend "
            f"{_group_column(section)!r}"
        )
    return [groups_text]


def _draw_folds(
    labelled_samples: pd.DataFrame,
    target: Array,
    groups: Index | None,
    section: TaskSection,
    notes: list[str],
    *,
    kept_together: Index | None = None,
    row_noun: tuple[str, str] = ("image", "images"),
) -> npt.NDArray[np.int16]:
    """Return the fold of each row, (N,) int16: as the user's column says, drawn where it does not.

    groups: (N,) the user's column must not split one. kept_together: (N,) groups that a draw keeps
    whole, by default `groups`. row_noun: what a row is, one and several, for messages.
    """
    if kept_together is None:
        kept_together = groups
    fold_of_row = np.full(len(labelled_samples), TRAIN_ONLY, np.int16)
    if section.split is not None:
        split_of_row = _read_split(labelled_samples, section.split)
        fold_of_row[split_of_row == "test"] = TEST
        fold_of_row[split_of_row == "validation"] = 0
    # With both columns, the one of folds divides what the other leaves to train on.
    is_open = fold_of_row == TRAIN_ONLY
    if section.fold is not None and is_open.any():
        if (fold_of_row == 0).any():
            raise DataError(
                f"task.split {section.split!r} has validation rows, and task.fold "
                f"{section.fold!r} has folds: heads are chosen on the one or the others. Leave one "
                "of the two keys out"
            )
        user_folds = _read_folds(labelled_samples[is_open], section.fold)
        fold_of_row[is_open] = make_folds(
            target[is_open], n_folds=section.folds, seed=section.seed, given=user_folds
        )
    is_validation = fold_of_row >= 0
    column_name = section.split or section.fold
    if groups is not None and column_name is not None:
        _refuse_split_groups(labelled_samples, groups, fold_of_row, section)
    if section.test_fraction > 0 and not (fold_of_row == TEST).any():
        test_rows = _draw_test_rows(target, is_validation, kept_together, section, row_noun)
        fold_of_row[test_rows] = TEST
        if column_name is not None:
            notes.append(
                f"column {column_name!r} has no test rows: {len(test_rows):,} were drawn, at "
                "random, from the others"
            )
    if section.fold is None and not is_validation.any():
        is_remaining = fold_of_row != TEST
        try:
            fold_of_row[is_remaining] = make_folds(
                target[is_remaining],
                n_folds=section.folds,
                seed=section.seed,
                groups=None if kept_together is None else kept_together[is_remaining],
                row_noun=row_noun,
            )
        except BadSplit as error:
            if is_remaining.all():
                raise
            # Who counts the groups of a table finds more than the message does.
            raise BadSplit(
                f"{error} The others are in the test split: task.test_fraction"
            ) from error
    if not (fold_of_row >= 0).any():
        raise DataError("no row is left for validation: a head cannot be chosen")
    return fold_of_row


def _draw_test_rows(
    target: Array,
    is_validation: Mask,
    kept_together: Index | None,
    section: TaskSection,
    row_noun: tuple[str, str],
) -> Index:
    """Return the positions of test rows, drawn from those that the user's column leaves open."""
    is_free = np.ones(len(target), np.bool_)
    # Validation rows of the user's split stay what they are, and so do their groups; folds of the
    # user give up a share of their rows.
    if section.split is not None:
        is_free = ~is_validation
        if kept_together is not None:
            is_free = ~np.isin(kept_together, kept_together[is_validation])
    if not is_free.any():
        raise DataError(
            f"column {section.split!r} has no test rows, and none can be drawn: every image is "
            "validated on, or shares a group or a copy with one that is. Mark test rows in "
            "it, or do without a test split: task.test_fraction: 0"
        )
    is_drawn = split_test(
        target[is_free],
        fraction=section.test_fraction,
        seed=section.seed,
        groups=None if kept_together is None else kept_together[is_free],
        row_noun=row_noun,
    )
    return np.flatnonzero(is_free)[is_drawn]


def joined_by(groups: Index, shared: pd.Series) -> Index:
    """Return (N,) groups in which those that have a value of `shared` in common (a content hash, a
    unit) are one: connected components of the graph of groups and values.
    """
    shared_codes = pd.factorize(shared)[0]
    n_groups = int(groups.max()) + 1
    graph_edges = (np.ones(len(groups)), (groups, shared_codes + n_groups))
    n_nodes = n_groups + int(shared_codes.max()) + 1
    components = connected_components(
        coo_array(graph_edges, shape=(n_nodes, n_nodes)), directed=False
    )[1]
    return np.asarray(components[groups], np.int64)


def _refuse_split_groups(
    labelled_samples: pd.DataFrame,
    groups: Index,
    fold_of_row: npt.NDArray[np.int16],
    section: TaskSection,
) -> None:
    is_mixed = pd.Series(fold_of_row).groupby(groups).transform("nunique").to_numpy() > 1
    if is_mixed.any():
        group_column = _group_column(section)
        first_group = labelled_samples[group_column].iloc[int(is_mixed.argmax())]
        raise DataError(
            f"column {section.split or section.fold!r} puts images of the same {group_column!r} "
            f"(or copies of them) on different sides, first {first_group!r}, "
            f"{count_text(int(is_mixed.sum()), 'image')} in all. Mend the column, or leave one of "
            "the two out of the recipe"
        )


def _read_folds(labelled_samples: pd.DataFrame, column_name: str) -> Array:
    """Return the user's folds (N,): as int64 where they are counted from 0, with -1 for test rows,
    else as names. Raises DataError.
    """
    fold_values = empty_as_missing(labelled_samples[column_name])
    if fold_values.isna().any():
        raise DataError(
            f"task.fold {column_name!r} is empty for "
            f"{labelled_samples.loc[fold_values.isna(), 'id'].iloc[0]!r}: every image needs one"
        )
    fold_texts = as_text(fold_values)
    if (
        fold_texts.str.fullmatch(r"-?\d{1,18}").all()
        and (fold_numbers := fold_texts.astype("int64")).min() <= 0
    ):  # 18 digits always fit int64
        return fold_numbers.to_numpy()
    if (
        fold_texts.str.fullmatch(r"-?\d+").all()
        and (negative_texts := fold_texts[fold_texts.str.startswith("-")]).any()
    ):
        # As a name, the -1 of a test row would be a fold to train on.
        raise DataError(
            f"task.fold {column_name!r} holds {negative_texts.iloc[0]} beside "
            f"{max(fold_texts, key=len)}: number the folds 0, 1, … without gaps, with -1 for test "
            "rows"
        )
    return fold_texts.to_numpy(dtype=np.str_)  # names of folds, such as numbers counted from 1


def _first_of_each(names: pd.Series) -> tuple[Index, Index]:
    """Return the first row of each name (a content hash, a unit), and for every row the position of
    its name's among those.
    """
    position_of_row, _ = pd.factorize(names)
    return np.flatnonzero(~names.duplicated().to_numpy()), position_of_row


def _read_split(labelled_samples: pd.DataFrame, column_name: str) -> Strings:
    split_texts = as_text(empty_as_missing(labelled_samples[column_name]))
    if split_texts.isna().any():
        raise DataError(
            f"task.split {column_name!r} is empty in "
            f"{count_text(int(split_texts.isna().sum()), 'row')}, first "
            f"{labelled_samples.loc[split_texts.isna(), 'id'].iloc[0]!r}; expected train, "
            "validation or test"
        )
    side_of_text = {text: side_of_cell(text, column_name) for text in split_texts.unique()}
    unknown_texts = sorted(text for text, side in side_of_text.items() if side is None)
    if unknown_texts:
        raise DataError(
            f"task.split {column_name!r} holds {', '.join(map(repr, unknown_texts[:5]))}; expected "
            "train, validation or test"
        )
    return split_texts.map(side_of_text).to_numpy(dtype=np.str_)


def check_folds(fold_of_row: npt.NDArray[np.int16], target: Index | None) -> None:
    """Raise DataError for a fold without which nothing can be trained.

    target: (N,) class positions, None for tasks that are not single-label.
    """
    for fold_number in range(int(fold_of_row.max()) + 1):
        is_trained = (fold_of_row != fold_number) & (fold_of_row != TEST)
        if not is_trained.any():
            raise DataError(
                f"validation fold {fold_number} leaves no image to train on: mark some rows as "
                "train in task.split, or use more folds"
            )
        if target is not None and len(np.unique(target[is_trained])) < 2:
            raise DataError(
                f"without validation fold {fold_number}, the "
                f"{count_text(int(is_trained.sum()), 'image')} to train on are all of one class: a "
                "classifier needs two. Look at the split, fold or group column"
            )


def check_metric_in_folds(
    fold_of_row: npt.NDArray[np.int16], target: Array, metric: str, section: TaskSection
) -> None:
    """Raise DataError for a metric that is undefined in a fold: no head could win.

    An area under a curve needs positives and negatives, an average precision positives.
    """
    undefined = [
        fold_number
        for fold_number in range(int(fold_of_row.max()) + 1)
        if len(in_fold := target[fold_of_row == fold_number])
        and (
            (metric == "auc" and (in_fold == in_fold[:1]).all())
            or (metric == "average_precision" and not in_fold.any())
        )
    ]
    if not undefined:
        return
    cures = "another metric (task.metric: log_loss)"
    n_defined = section.folds - len(undefined)
    if section.split is None and section.fold is None and n_defined >= 2:
        cures = f"fewer folds (task.folds: {n_defined}) or {cures}"
    what = (
        "only one class"
        if section.kind == "single"
        else "no label that some images have and others lack"
    )
    raise DataError(
        f"validation fold {undefined[0]} has {what}, so that {metric} is undefined there and no "
        f"head could be chosen by it. Take {cures}"
    )


def check_classes(
    classes: tuple[str, ...], target: Array, fold_of_row: npt.NDArray[np.int16], metric: str | None
) -> list[str]:
    """Return notes on classes that are frequent, rare, absent, or stand for a missing label."""
    class_counts = np.bincount(target[fold_of_row != TEST], minlength=len(classes))
    notes = []
    largest_class = int(class_counts.argmax())
    largest_share = class_counts[largest_class] / class_counts.sum()
    if largest_share >= _DOMINANT_SHARE and metric in (None, "accuracy"):
        notes.append(
            f"{100 * largest_share:.1f} % of the images are {classes[largest_class]}, so always "
            f"saying that has an accuracy of {100 * largest_share:.1f} %; task.metric: "
            "balanced_accuracy or macro_f1 weighs all classes the same"
        )
    unseen_classes = [classes[class_index] for class_index in np.flatnonzero(class_counts == 0)]
    rare_classes = [
        f"{classes[class_index]} ({class_counts[class_index]})"
        for class_index in np.flatnonzero((class_counts > 0) & (class_counts < _FEW_IMAGES))
    ]
    if missing_words := [name for name in classes if name.lower() in _MISSING_WORDS]:
        notes.append(
            f"class {name_some(missing_words)}: where that stands for a missing label, empty these "
            "cells"
        )
    if unseen_classes:
        notes.append(
            f"no training image of class {name_some(unseen_classes)}: it can never be predicted"
        )
    if rare_classes:
        notes.append(f"few training images of class {name_some(rare_classes)}: expect noise there")
    return notes
