"""From the user's images and columns to tasks: which rows are trained on, which are held out, which
nobody may see.

A test row never enters the task that banks read: the two are separate values, and separate files.
"""

import difflib
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from headrace.cache.text import as_text
from headrace.extract.errors import as_yaml_list
from headrace.extract.images.byte_ranges import printable_name
from headrace.extract.images.crops import split_crop
from headrace.extract.sources.layout import SPLIT_WORDS
from headrace.extract.sources.listing import Listing, join_listings
from headrace.extract.sources.read import read_source
from headrace.heads.data.folds import make_folds, split_test
from headrace.heads.data.side_columns import SideColumns
from headrace.heads.data.task import TEST, TRAIN_ONLY, Task
from headrace.heads.evaluate.metrics import DEFAULT_METRIC, METRICS
from headrace.pipelines.recipe.load import Recipe, RecipeError
from headrace.pipelines.recipe.sections import TaskSection
from headrace.pipelines.recipe.side_columns import (
    encode_side_columns,
    make_side_columns,
    require_columns,
)
from headrace.pipelines.recipe.targets import (
    DataError,
    alike_names,
    check_targets,
    empty_as_missing,
    name_some,
    target_columns,
)
from headrace.pipelines.recipe.unit_targets import unit_targets

_CROPPED_IMAGE = "image of the box or tile"  # a column of samples that are crops
_MISSING_WORDS = ("nan", "none", "null", "na", "n/a", "unlabelled", "unlabeled")
_EXCLUDED_NAMED = 20  # images in one message, to be copied from it


@dataclass(frozen=True)
class Dataset:
    """A recipe's task, split into what banks may see and what is opened once at the end."""

    train: Task  # every row that banks see, with its fold
    test: Task  # every row that nobody sees before the winner is chosen; may be empty
    notes: tuple[str, ...]  # what a careful person would want to be told about the rows
    # of each row of `train`: rows of one group or unit, or copies of one image, share a number
    groups: npt.NDArray[np.int64]
    # images that can be read and have no target: theirs are -1 or nan, their fold is TEST, and the
    # unit of one without a unit is its own id
    unlabelled: Task
    test_groups: npt.NDArray[np.int64]  # as `groups`, of each row of `test`


def read_samples(recipe: Recipe, *, labelled: bool = True) -> Listing:
    """Read the recipe's images, with the user's columns, and a count of what is left out.

    labelled: the task's columns are wanted. Raises SourceError for images that cannot be listed,
    DataError when a column that the task names is absent.
    """
    listing = read_source(recipe.images.source(), labelled=labelled)
    if recipe.images.unlabelled is not None:
        # As objects: beside rows without a value, whole numbers would become decimals.
        parts = (listing, _unlabelled_listing(recipe))
        listing = join_listings(
            replace(part, samples=part.samples.astype(object)) for part in parts
        )
    if not labelled:
        return listing
    task = recipe.task
    for task_key in ("target", "group", "unit", "split", "fold", "side_columns"):
        column_names = getattr(task, task_key)
        for column in (
            ()
            if column_names is None
            else (column_names,)
            if isinstance(column_names, str)
            else column_names
        ):
            if column not in listing.samples.columns:
                raise DataError(
                    _absent(
                        f"task.{task_key}", column, recipe.images.source().location, listing.samples
                    )
                )
    return listing


def _unlabelled_listing(recipe: Recipe) -> Listing:
    """Return the images of `images.unlabelled`, under ids that begin with its name, without what
    may stand there for a target.
    """
    location, source = recipe.images.unlabelled, recipe.images.unlabelled_source()
    assert location is not None
    assert source is not None
    listing = read_source(source, labelled=False)
    column_names = [name for name in listing.samples if name not in target_columns(recipe.task)]
    samples = listing.samples[column_names]
    require_columns(samples, list(recipe.task.side_columns), f"images.unlabelled, {location}: ")
    prefix = printable_name(location.name)
    return replace(listing, samples=samples.assign(id=f"{prefix}/" + samples["id"].astype(str)))


def list_samples(recipe: Recipe) -> pd.DataFrame:
    """Return `read_samples`' samples: columns `id`, `path` and the user's own, one per image."""
    return read_samples(recipe).samples


def _absent(
    recipe_key: str, column_name: str, source_location: object, samples: pd.DataFrame
) -> str:
    column_names = [str(name) for name in samples.columns]
    nearest_names = difflib.get_close_matches(column_name, column_names, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest_names[0]!r}?" if nearest_names else ""
    return (
        f"{source_location} has no column {column_name!r} ({recipe_key}).{hint} It has: "
        f"{', '.join(column_names)}"
    )


def check_metric(section: TaskSection) -> str:
    """Return the metric that ranks, by default that of the task's kind.

    Raises RecipeError for one that the task does not have.
    """
    kind = section.kind
    metric = section.metric or DEFAULT_METRIC[kind]
    if metric not in METRICS or kind not in METRICS[metric].tasks:
        valid = [name for name, known in METRICS.items() if kind in known.tasks]
        raise RecipeError(
            f"task.metric {metric!r} is no metric of a {kind} task. There are: {', '.join(valid)}"
        )
    return metric


def make_dataset(
    samples: pd.DataFrame, content_hashes: Sequence[str | None], section: TaskSection
) -> Dataset:
    """Return targets, test split and folds of the samples whose file could be read (whose content
    hash is not None).

    The split depends on the rows' ids, targets, groups and the seed alone, not on their order in
    the table. Raises DataError for targets that cannot be learned (one class only, not a number,
    unknown split words).
    """
    readable = samples.assign(
        _content=pd.Series(list(content_hashes), index=samples.index, dtype=object)
    )
    readable = readable[readable["_content"].notna()].sort_values("id", ignore_index=True)
    notes: list[str] = []
    labelled_samples, classes, target = check_targets(readable, section)
    unlabelled_samples = readable[~readable["id"].isin(labelled_samples["id"])]
    if len(unlabelled_samples):
        notes.append(
            f"{len(unlabelled_samples):,} images have no {' / '.join(target_columns(section))}: "
            "they are predicted in the end, and no head is trained or scored on them"
        )
    notes += alike_names(classes, "classes")
    groups = units = None
    if "path" in labelled_samples and labelled_samples["path"].str.contains("::crop:").any():
        # Boxes and tiles of one image are as alike as its copies
        image_names = labelled_samples["path"].map(lambda path: split_crop(path)[0])
        labelled_samples = labelled_samples.assign(**{_CROPPED_IMAGE: image_names})
        groups = np.asarray(pd.factorize(image_names)[0], dtype=np.int64)
    for task_key, column_name in (("group", section.group), ("unit", section.unit)):
        if column_name is None:
            continue
        names = _names_in(labelled_samples, task_key, column_name)
        notes += alike_names(names.unique(), f"values of {column_name!r}")
        codes = np.asarray(pd.factorize(names)[0], dtype=np.int64)
        groups = codes if groups is None else _joined_by(groups, names)
        if task_key == "unit":
            units = names.to_numpy(dtype=np.str_)
            ids = labelled_samples["id"]
            target, unit_notes = unit_targets(ids, target, classes, names, section)
            notes += unit_notes
    notes += _unused_split(labelled_samples, section)
    copy_notes = _copies_across_sides(labelled_samples, section)
    notes += _duplicates(labelled_samples, target, across_sides=bool(copy_notes)) + copy_notes
    fold_of_row = _assign_folds(
        labelled_samples, target, groups, section, notes, across_sides=bool(copy_notes)
    )
    if section.kind == "single":
        notes += _check_classes(classes, target, fold_of_row, section.metric)
    _check_folds(fold_of_row, target if section.kind == "single" else None)
    side, side_notes = make_side_columns(labelled_samples, target, fold_of_row != TEST, section)
    notes += side_notes
    task = Task(
        section.kind,
        classes,
        labelled_samples["id"].to_numpy(dtype=np.str_),
        labelled_samples["_content"].to_numpy(dtype="S32"),
        target,
        fold_of_row,
        np.ones(len(labelled_samples)),
        units,
        section.unit_aggregation,
        side=side,
    )
    copy_codes = pd.factorize(labelled_samples["_content"])[0].astype(np.int64)
    row_groups = copy_codes if groups is None else _joined_by(groups, labelled_samples["_content"])
    is_test = fold_of_row == TEST
    unlabelled_rows, unlabelled_notes = _unlabelled_rows(unlabelled_samples, task, section)
    notes += unlabelled_notes
    return Dataset(
        task.without_test(),
        task.take(is_test),
        tuple(notes),
        row_groups[~is_test],
        unlabelled_rows,
        row_groups[is_test],
    )


def _unlabelled_rows(
    samples: pd.DataFrame, task: Task, section: TaskSection
) -> tuple[Task, list[str]]:
    """Return the rows that have no target, as rows of the task, and notes on their columns."""
    ids = samples["id"].to_numpy(dtype=np.str_)
    units = None
    if section.unit is not None:
        names = as_text(empty_as_missing(samples[section.unit]))
        units = names.fillna(samples["id"].astype(str)).to_numpy(dtype=np.str_)
    no_target = np.nan if section.kind == "regression" else -1
    no_target_dtype = np.float64 if section.kind == "regression" else np.int64
    side: SideColumns | None = None
    notes: list[str] = []
    if task.side is not None:
        side, notes = encode_side_columns(samples, task.side.columns)
    rows = replace(
        task,
        ids=ids,
        content=samples["_content"].to_numpy(dtype="S32"),
        target=np.full((len(samples), *task.target.shape[1:]), no_target, no_target_dtype),
        fold=np.full(len(samples), TEST, np.int16),
        weight=np.ones(len(samples)),
        units=units,
        side=side,
    )
    return rows, [f"of those without a label, {note}" for note in notes]


def _names_in(labelled_samples: pd.DataFrame, task_key: str, column_name: str) -> pd.Series:
    """Return the group or unit of each row as text. Raises DataError for a row without one."""
    names = as_text(empty_as_missing(labelled_samples[column_name]))
    if names.isna().any():
        first_id = labelled_samples.loc[names.isna(), "id"].iloc[0]
        raise DataError(
            f"task.{task_key} {column_name!r} is empty for {first_id!r}: every image needs a "
            f"{task_key}, or none has one"
        )
    return names


def _unused_split(labelled_samples: pd.DataFrame, section: TaskSection) -> list[str]:
    if section.split is not None or section.fold is not None or "split" not in labelled_samples:
        return []
    split_words = set(as_text(labelled_samples["split"]).dropna().str.lower())
    if not split_words <= set(SPLIT_WORDS):
        return []
    return [
        (
            f"the images are marked as {', '.join(sorted(split_words))}, and a random split is "
            "drawn: to use theirs, task.split: split"
        )
    ]


def _duplicates(
    labelled_samples: pd.DataFrame, target: npt.NDArray[Any], *, across_sides: bool
) -> list[str]:
    """Return notes on exact copies. across_sides: the user's column, which is followed, has some of
    them on several sides.
    """
    is_repeated = labelled_samples["_content"].duplicated(keep=False).to_numpy()
    if not is_repeated.any():
        return []
    kept_text = "" if across_sides else "; copies stay on one side of every split"
    notes = [f"{int(is_repeated.sum()):,} images are exact copies of one another{kept_text}"]
    flat_targets = pd.DataFrame(target.reshape(len(target), -1))[is_repeated]
    disagreeing = (
        flat_targets.groupby(labelled_samples["_content"].to_numpy()[is_repeated])
        .nunique()
        .gt(1)
        .any(axis=1)
    )
    if n_disagreeing := int(disagreeing.sum()):
        verb = "carries" if n_disagreeing == 1 else "carry"
        notes.append(
            f"{n_disagreeing:,} of the copied images {verb} different targets: check their labels"
        )
    return notes


def _assign_folds(
    labelled_samples: pd.DataFrame,
    target: npt.NDArray[Any],
    groups: npt.NDArray[np.int64] | None,
    section: TaskSection,
    notes: list[str],
    *,
    across_sides: bool,
) -> npt.NDArray[np.int16]:
    """Return the fold of each row, (N,) int16. Copies of one image are split as one row, and groups
    that share a copy as one group.

    across_sides: the user's column has copies on several sides, and stays as it is; what it leaves
    to be drawn keeps them together.
    """
    if across_sides:
        row_groups = np.arange(len(labelled_samples), dtype=np.int64) if groups is None else groups
        return _draw_folds(
            labelled_samples,
            target,
            groups,
            section,
            notes,
            kept_together=_joined_by(row_groups, labelled_samples["_content"]),
        )
    if groups is None:
        first_rows, copy_of = _first_copies(labelled_samples["_content"])
        return _draw_folds(
            labelled_samples.iloc[first_rows], target[first_rows], None, section, notes
        )[copy_of]
    joined_groups = _joined_by(groups, labelled_samples["_content"])
    notes += _joined_groups(labelled_samples, groups, joined_groups, section)
    return _draw_folds(labelled_samples, target, joined_groups, section, notes)


def _copies_across_sides(labelled_samples: pd.DataFrame, section: TaskSection) -> list[str]:
    """Return a note where the split or fold column has copies of an image on different sides and is
    followed all the same.

    Raises DataError, naming the rows, unless task.copies says so.
    """
    column_name = section.split or section.fold
    if column_name is None:
        return []
    side_of_row = pd.Series(
        _read_split(labelled_samples, column_name)
        if section.split
        else _read_folds(labelled_samples, column_name),
        index=labelled_samples.index,
    )
    is_mixed = side_of_row.groupby(labelled_samples["_content"].to_numpy()).transform("nunique") > 1
    if not is_mixed.any():
        return []
    first_content = labelled_samples.loc[is_mixed, "_content"].iloc[0]
    copy_ids = labelled_samples.loc[labelled_samples["_content"] == first_content, "id"].tolist()
    copies_text = (
        f"column {column_name!r} puts exact copies of an image on different sides: "
        f"{int(is_mixed.sum()):,} images, first {' and '.join(map(repr, copy_ids[:2]))}"
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
    return str(section.group or section.unit or _CROPPED_IMAGE)


def _joined_groups(
    labelled_samples: pd.DataFrame,
    groups: npt.NDArray[np.int64],
    joined_groups: npt.NDArray[np.int64],
    section: TaskSection,
) -> list[str]:
    """Return a note on groups that copies of images join.

    Raises DataError where they make most of the images one group.
    """
    group_table = pd.DataFrame(
        {
            "group": groups,
            "joined": joined_groups,
            "content": labelled_samples["_content"].to_numpy(),
        }
    )
    joined_sizes = group_table.groupby("joined")["group"].nunique()
    if joined_sizes.max() < 2:
        return []
    groups_per_image = group_table.groupby("content")["group"].nunique()
    most_shared = groups_per_image.idxmax()
    copy_ids = labelled_samples.loc[labelled_samples["_content"] == most_shared, "id"].tolist()
    n_joined_rows = int((joined_groups == joined_sizes.idxmax()).sum())
    n_groups = group_table["group"].nunique()
    groups_text = (
        "copies of one image are in several groups, which are joined, for else one would be "
        f"tested on what it was trained on: {copy_ids[0]!r} and its copies are in "
        f"{int(groups_per_image.max()):,} of the {n_groups:,} groups of "
        f"{_group_column(section)!r}, and the largest joined group has "
        f"{int(joined_sizes.max()):,} of them, {n_joined_rows:,} of {len(labelled_samples):,} "
        "images"
    )
    if n_joined_rows > len(labelled_samples) / 2:
        more_text = (
            f" and {len(copy_ids) - _EXCLUDED_NAMED:,} more"
            if len(copy_ids) > _EXCLUDED_NAMED
            else ""
        )
        raise DataError(
            f"{groups_text}. No fair split is left. Leave these copies out (a placeholder shows "
            "nothing of its patient): images.exclude: "
            f"{as_yaml_list(copy_ids[:_EXCLUDED_NAMED])}{more_text}, or mend "
            f"{_group_column(section)!r}"
        )
    return [groups_text]


def _draw_folds(
    labelled_samples: pd.DataFrame,
    target: npt.NDArray[Any],
    groups: npt.NDArray[np.int64] | None,
    section: TaskSection,
    notes: list[str],
    *,
    kept_together: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int16]:
    """Return the fold of each row, (N,) int16: the user's column where it says them, and what is
    drawn where it does not.

    groups: no side of the user's column may split one. kept_together: what a draw keeps whole, by
    default the groups.
    """
    if kept_together is None:
        kept_together = groups
    fold_of_row = np.full(len(labelled_samples), TRAIN_ONLY, np.int16)
    is_validation = np.zeros(len(labelled_samples), np.bool_)
    if section.split is not None:
        split_of_row = _read_split(labelled_samples, section.split)
        fold_of_row[split_of_row == "test"] = TEST
        is_validation = split_of_row == "validation"
    elif section.fold is not None:
        fold_of_row = make_folds(
            target,
            n_folds=section.folds,
            seed=section.seed,
            given=_read_folds(labelled_samples, section.fold),
        )
        is_validation = fold_of_row >= 0
    column_name = section.split or section.fold
    if groups is not None and column_name is not None:
        side_of_row = np.where(
            is_validation,
            fold_of_row if section.fold else 0,
            np.where(fold_of_row == TEST, TEST, TRAIN_ONLY),
        )
        _refuse_split_groups(
            labelled_samples, groups, side_of_row, column_name, _group_column(section)
        )
    if section.test_fraction > 0 and not (fold_of_row == TEST).any():
        # Rows that the user validates on stay what they are, and with them their groups; folds give
        # up their share.
        is_kept = (
            is_validation
            if section.split is not None
            else np.zeros(len(labelled_samples), np.bool_)
        )
        is_free = (
            ~is_kept if kept_together is None else ~np.isin(kept_together, kept_together[is_kept])
        )
        if not is_free.any():
            raise DataError(
                f"column {column_name!r} has no test rows, and none can be drawn: every image is "
                "validated on, or shares a group or a copy with one that is. Mark test rows in "
                "it, or do without a test split: task.test_fraction: 0"
            )
        is_drawn = split_test(
            target[is_free],
            fraction=section.test_fraction,
            seed=section.seed,
            groups=None if kept_together is None else kept_together[is_free],
        )
        fold_of_row[np.flatnonzero(is_free)[is_drawn]] = TEST
        if column_name is not None:
            notes.append(
                f"column {column_name!r} has no test rows: {int(is_drawn.sum()):,} were drawn, at "
                "random, from the others"
            )
    if section.split is not None and is_validation.any():
        fold_of_row[is_validation] = 0
    elif section.fold is None:
        is_remaining = fold_of_row != TEST
        fold_of_row[is_remaining] = make_folds(
            target[is_remaining],
            n_folds=section.folds,
            seed=section.seed,
            groups=None if kept_together is None else kept_together[is_remaining],
        )
    if not (fold_of_row >= 0).any():
        raise DataError("no row is left for validation: a head cannot be chosen")
    return fold_of_row


def _joined_by(groups: npt.NDArray[np.int64], shared: pd.Series) -> npt.NDArray[np.int64]:
    """Return (N,) groups, those that share a value (a content hash: copies of one image; a unit)
    made one: the components of the graph of rows.
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
    groups: npt.NDArray[np.int64],
    side_of_row: npt.NDArray[Any],
    column_name: str,
    group_column: str,
) -> None:
    is_mixed = pd.Series(side_of_row).groupby(groups).transform("nunique").to_numpy() > 1
    if is_mixed.any():
        first_group = labelled_samples[group_column].iloc[int(is_mixed.argmax())]
        raise DataError(
            f"column {column_name!r} puts images of the same {group_column!r} (or copies of them) "
            f"on different sides, first {first_group!r}, {int(is_mixed.sum()):,} images in all. "
            "Mend the column, or leave one of the two out of the recipe"
        )


def _read_folds(labelled_samples: pd.DataFrame, column_name: str) -> npt.NDArray[Any]:
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
    ):  # 18 digits fit int64
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
    return fold_texts.to_numpy(dtype=np.str_)  # names; folds that are counted from 1 are such


def drop_rows(dataset: Dataset, failed_contents: Set[str]) -> Dataset:
    """Leave out the images that some feature set of the run cannot hold, so that all heads are
    compared on the same rows.

    The other rows keep their folds. Raises DataError when a fold or the training rows are left with
    nothing.
    """
    if not failed_contents:
        return dataset
    failed_hashes = np.array(sorted(failed_contents), "S32")
    is_kept = ~np.isin(dataset.train.content, failed_hashes)
    kept_train = dataset.train.take(is_kept)
    empty_folds = sorted(set(dataset.train.fold[dataset.train.fold >= 0]) - set(kept_train.fold))
    if empty_folds:
        raise DataError(
            f"every image of fold {empty_folds[0]} failed: the reasons are in `headrace cache` and "
            "in failed-images.csv"
        )
    is_tested = ~np.isin(dataset.test.content, failed_hashes)
    return Dataset(
        kept_train,
        dataset.test.take(is_tested),
        dataset.notes,
        dataset.groups[is_kept],
        dataset.unlabelled.take(~np.isin(dataset.unlabelled.content, failed_hashes)),
        dataset.test_groups[is_tested],
    )


def _first_copies(content_hashes: pd.Series) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the rows of the first copy of each content, and for every row the position of its
    first copy among those.
    """
    copy_of, _ = pd.factorize(content_hashes)
    return np.flatnonzero(~content_hashes.duplicated().to_numpy()), copy_of


def _read_split(labelled_samples: pd.DataFrame, column_name: str) -> npt.NDArray[np.str_]:
    split_texts = as_text(empty_as_missing(labelled_samples[column_name]))
    if split_texts.isna().any():
        raise DataError(
            f"task.split {column_name!r} is empty in {int(split_texts.isna().sum()):,} rows, first "
            f"{labelled_samples.loc[split_texts.isna(), 'id'].iloc[0]!r}; expected train, "
            "validation or test"
        )
    split_words = split_texts.str.lower()
    unknown_words = sorted(set(split_words) - set(SPLIT_WORDS))
    if unknown_words:
        raise DataError(
            f"task.split {column_name!r} holds {', '.join(map(repr, unknown_words[:5]))}; expected "
            "train, validation or test"
        )
    return split_words.map(SPLIT_WORDS).to_numpy(dtype=np.str_)


def _check_folds(fold_of_row: npt.NDArray[np.int16], target: npt.NDArray[np.int64] | None) -> None:
    """Raise DataError for a fold that leaves nothing to learn from."""
    for fold_number in range(int(fold_of_row.max()) + 1):
        is_trained = (fold_of_row != fold_number) & (fold_of_row != TEST)
        if not is_trained.any():
            raise DataError(
                f"validation fold {fold_number} leaves no image to train on: mark some rows as "
                "train in task.split, or use more folds"
            )
        if target is not None and len(np.unique(target[is_trained])) < 2:
            raise DataError(
                f"without validation fold {fold_number}, the {int(is_trained.sum()):,} images to "
                "train on are all of one class: a classifier needs two. Look at the split, fold "
                "or group column"
            )


def _check_classes(
    classes: tuple[str, ...],
    target: npt.NDArray[Any],
    fold_of_row: npt.NDArray[np.int16],
    metric: str | None,
) -> list[str]:
    class_counts = np.bincount(target[fold_of_row != TEST], minlength=len(classes))
    notes = []
    largest_class = int(class_counts.argmax())
    largest_share = class_counts[largest_class] / class_counts.sum()
    if largest_share >= 0.9 and metric in (None, "accuracy"):
        notes.append(
            f"{largest_share:.1%} of the images are {classes[largest_class]}, so always saying "
            f"that has an accuracy of {largest_share:.1%}; task.metric: balanced_accuracy or "
            "macro_f1 weighs all classes the same"
        )
    unseen_classes = [classes[class_index] for class_index in np.flatnonzero(class_counts == 0)]
    rare_classes = [
        f"{classes[class_index]} ({class_counts[class_index]})"
        for class_index in np.flatnonzero((class_counts > 0) & (class_counts < 5))
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
