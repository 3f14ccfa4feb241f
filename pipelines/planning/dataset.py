"""From the user's images and columns to tasks: which rows are trained on, which are held out, which
nobody may see.

A test row never enters the task that banks read: the two are separate values, and separate files.
"""

import difflib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from headrace.cache.text import as_text
from headrace.extract.errors import yaml_list
from headrace.extract.sources.layout import SPLIT_WORDS
from headrace.extract.sources.listing import Listing
from headrace.extract.sources.read import read_source
from headrace.heads.data.folds import make_folds, split_test
from headrace.heads.data.task import TEST, TRAIN_ONLY, Task
from headrace.heads.evaluate.metrics import DEFAULT_METRIC, METRICS
from headrace.pipelines.recipe.load import Recipe, RecipeError
from headrace.pipelines.recipe.sections import TaskSection
from headrace.pipelines.recipe.targets import (
    DataError,
    alike_names,
    check_targets,
    empty_as_missing,
    name_some,
    target_columns,
)

_EXCLUDED_NAMED = 20  # images in one message, to be copied from it


@dataclass(frozen=True)
class Dataset:
    """A recipe's task, split into what banks may see and what is opened once at the end."""

    train: Task  # every row that banks see, with its fold
    test: Task  # every row that nobody sees before the winner is chosen; may be empty
    notes: tuple[str, ...]  # what a careful person would want to be told about the rows
    # of each row of `train`: rows of one group, or copies of one image, share a number
    groups: npt.NDArray[np.int64]
    unlabelled: int  # images that can be read and have no target
    test_groups: npt.NDArray[np.int64]  # as `groups`, of each row of `test`


def read_samples(recipe: Recipe) -> Listing:
    """The recipe's images, with the user's columns, and a count of what is left out.

    Raises SourceError for images that cannot be listed, DataError when a column that the task names
    is absent.
    """
    listing = read_source(recipe.images.source())
    task = recipe.task
    for key in ("target", "group", "split", "fold"):
        named = getattr(task, key)
        for column in () if named is None else (named,) if isinstance(named, str) else named:
            if column not in listing.samples.columns:
                raise DataError(
                    _absent(f"task.{key}", column, recipe.images.source().location, listing.samples)
                )
    return listing


def list_samples(recipe: Recipe) -> pd.DataFrame:
    """The samples of `read_samples`: columns `id`, `path` and the user's own, one row per image."""
    return read_samples(recipe).samples


def _absent(key: str, column: str, source: object, samples: pd.DataFrame) -> str:
    columns = [str(name) for name in samples.columns]
    nearest = difflib.get_close_matches(column, columns, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{source} has no column {column!r} ({key}).{hint} It has: {', '.join(columns)}"


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
    samples: pd.DataFrame, content: Sequence[str | None], section: TaskSection
) -> Dataset:
    """Targets, test split and folds for the samples whose file could be read (content is not None).

    The split depends on the rows' ids, targets, groups and the seed alone, not on their order in
    the table. Raises DataError for targets that cannot be learned (one class only, not a number,
    unknown split words).
    """
    frame = samples.assign(_content=pd.Series(list(content), index=samples.index, dtype=object))
    frame = frame[frame["_content"].notna()].sort_values("id", ignore_index=True)
    notes: list[str] = []
    unlabelled = len(frame)
    frame, classes, target = check_targets(frame, section)
    unlabelled -= len(frame)
    if unlabelled:
        notes.append(
            f"{unlabelled:,} images have no {' / '.join(target_columns(section))} and are left out"
        )
    notes += alike_names(classes, "classes")
    groups = None
    if section.group is not None:
        names = _group_names(frame, section.group)
        groups = np.asarray(pd.factorize(names)[0], dtype=np.int64)
        notes += alike_names(names.unique(), f"values of {section.group!r}")
    notes += _unused_split(frame, section)
    across = _copies_across_sides(frame, section)
    notes += _duplicates(frame, target, across=bool(across)) + across
    fold = _assign_folds(frame, target, groups, section, notes, across=bool(across))
    if section.kind == "single":
        notes += _check_classes(classes, target, fold, section.metric)
    _check_folds(fold, target if section.kind == "single" else None)
    task = Task(
        section.kind,
        classes,
        frame["id"].to_numpy(dtype=np.str_),
        frame["_content"].to_numpy(dtype="S32"),
        target,
        fold,
        np.ones(len(frame)),
    )
    copies = pd.factorize(frame["_content"])[0].astype(np.int64)
    together = copies if groups is None else _joined_by_copies(groups, frame["_content"])
    test = fold == TEST
    return Dataset(
        task.without_test(),
        task.take(test),
        tuple(notes),
        together[~test],
        unlabelled,
        together[test],
    )


def _group_names(frame: pd.DataFrame, column: str) -> pd.Series:
    names = as_text(empty_as_missing(frame[column]))
    if names.isna().any():
        first = frame.loc[names.isna(), "id"].iloc[0]
        raise DataError(
            f"task.group {column!r} is empty for {first!r}: every image needs a group, or none has "
            "one"
        )
    return names


def _unused_split(frame: pd.DataFrame, section: TaskSection) -> list[str]:
    if section.split is not None or section.fold is not None or "split" not in frame:
        return []
    words = set(as_text(frame["split"]).dropna().str.lower())
    if not words <= set(SPLIT_WORDS):
        return []
    return [
        (
            f"the images are marked as {', '.join(sorted(words))}, and a random split is drawn: to "
            "use theirs, task.split: split"
        )
    ]


def _duplicates(frame: pd.DataFrame, target: npt.NDArray[Any], *, across: bool) -> list[str]:
    """Notes on exact copies. across: the user's column, which is followed, has some of them on
    several sides.
    """
    repeated = frame["_content"].duplicated(keep=False).to_numpy()
    if not repeated.any():
        return []
    kept = "" if across else "; copies stay on one side of every split"
    notes = [f"{int(repeated.sum()):,} images are exact copies of one another{kept}"]
    flat = pd.DataFrame(target.reshape(len(target), -1))[repeated]
    disagreeing = flat.groupby(frame["_content"].to_numpy()[repeated]).nunique().gt(1).any(axis=1)
    if odd := int(disagreeing.sum()):
        carry = "carries" if odd == 1 else "carry"
        notes.append(f"{odd:,} of the copied images {carry} different targets: check their labels")
    return notes


def _assign_folds(
    frame: pd.DataFrame,
    target: npt.NDArray[Any],
    groups: npt.NDArray[np.int64] | None,
    section: TaskSection,
    notes: list[str],
    *,
    across: bool,
) -> npt.NDArray[np.int16]:
    """(N,) folds.

    Copies of one image are split as one row, and groups that share a copy as one group.

    across: the user's column has copies on several sides, and stays as it is; what it leaves to be
    drawn keeps them together.
    """
    if across:
        own = np.arange(len(frame), dtype=np.int64) if groups is None else groups
        return _draw_folds(
            frame,
            target,
            groups,
            section,
            notes,
            together=_joined_by_copies(own, frame["_content"]),
        )
    if groups is None:
        first, copy_of = _first_copies(frame["_content"])
        return _draw_folds(frame.iloc[first], target[first], None, section, notes)[copy_of]
    joined = _joined_by_copies(groups, frame["_content"])
    notes += _joined_groups(frame, groups, joined, section)
    return _draw_folds(frame, target, joined, section, notes)


def _copies_across_sides(frame: pd.DataFrame, section: TaskSection) -> list[str]:
    """A note where the split or fold column has copies of an image on different sides and is
    followed all the same.

    Raises DataError, naming the rows, unless task.copies says so.
    """
    column = section.split or section.fold
    if column is None:
        return []
    sides = pd.Series(
        _read_split(frame, column) if section.split else _read_folds(frame, column),
        index=frame.index,
    )
    mixed = sides.groupby(frame["_content"].to_numpy()).transform("nunique") > 1
    if not mixed.any():
        return []
    content = frame.loc[mixed, "_content"].iloc[0]
    names = frame.loc[frame["_content"] == content, "id"].tolist()
    found = (
        f"column {column!r} puts exact copies of an image on different sides: {int(mixed.sum()):,} "
        f"images, first {' and '.join(map(repr, names[:2]))}"
    )
    if section.copies == "keep":
        return [
            (
                f"{found}. The column is followed (task.copies: keep); what is tested was trained "
                "on there"
            )
        ]
    raise DataError(
        f"{found}. Mend the column, leave one of them out (images.exclude: "
        f"{yaml_list(names[:1])}), or follow the column as it is: task.copies: keep"
    )


def _joined_groups(
    frame: pd.DataFrame,
    groups: npt.NDArray[np.int64],
    joined: npt.NDArray[np.int64],
    section: TaskSection,
) -> list[str]:
    """A note on groups that copies of images join.

    Raises DataError where they make most of the images one group.
    """
    table = pd.DataFrame(
        {"group": groups, "joined": joined, "content": frame["_content"].to_numpy()}
    )
    sizes = table.groupby("joined")["group"].nunique()
    if sizes.max() < 2:
        return []
    shared = table.groupby("content")["group"].nunique()
    worst = shared.idxmax()
    names = frame.loc[frame["_content"] == worst, "id"].tolist()
    rows = int((joined == sizes.idxmax()).sum())
    total = table["group"].nunique()
    found = (
        "copies of one image are in several groups, which are joined, for else one would be "
        f"tested on what it was trained on: {names[0]!r} and its copies are in "
        f"{int(shared.max()):,} of the {total:,} groups of {section.group!r}, and the largest "
        f"joined group has {int(sizes.max()):,} of them, {rows:,} of {len(frame):,} images"
    )
    if rows > len(frame) / 2:
        more = f" and {len(names) - _EXCLUDED_NAMED:,} more" if len(names) > _EXCLUDED_NAMED else ""
        raise DataError(
            f"{found}. No fair split is left. Leave these copies out (a placeholder shows nothing "
            f"of its patient): images.exclude: {yaml_list(names[:_EXCLUDED_NAMED])}{more}, or mend "
            f"{section.group!r}"
        )
    return [found]


def _draw_folds(
    frame: pd.DataFrame,
    target: npt.NDArray[Any],
    groups: npt.NDArray[np.int64] | None,
    section: TaskSection,
    notes: list[str],
    *,
    together: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int16]:
    """(N,) folds: the user's column where it says them, and what is drawn where it does not.

    groups: no side of the user's column may split one. together: what a draw keeps whole, by
    default the groups.
    """
    if together is None:
        together = groups
    fold = np.full(len(frame), TRAIN_ONLY, np.int16)
    validation = np.zeros(len(frame), np.bool_)
    if section.split is not None:
        given = _read_split(frame, section.split)
        fold[given == "test"] = TEST
        validation = given == "validation"
    elif section.fold is not None:
        fold = make_folds(
            target, n_folds=section.folds, seed=section.seed, given=_read_folds(frame, section.fold)
        )
        validation = fold >= 0
    column = section.split or section.fold
    if groups is not None and column is not None:
        sides = np.where(
            validation, fold if section.fold else 0, np.where(fold == TEST, TEST, TRAIN_ONLY)
        )
        _refuse_split_groups(frame, groups, sides, column, section.group)
    if section.test_fraction > 0 and not (fold == TEST).any():
        # Rows that the user validates on stay what they are, and with them their groups; folds give
        # up their share.
        kept = validation if section.split is not None else np.zeros(len(frame), np.bool_)
        free = ~kept if together is None else ~np.isin(together, together[kept])
        if not free.any():
            raise DataError(
                f"column {column!r} has no test rows, and none can be drawn: every image is "
                "validated on, or shares a group or a copy with one that is. Mark test rows in "
                "it, or do without a test split: task.test_fraction: 0"
            )
        drawn = split_test(
            target[free],
            fraction=section.test_fraction,
            seed=section.seed,
            groups=None if together is None else together[free],
        )
        fold[np.flatnonzero(free)[drawn]] = TEST
        if column is not None:
            notes.append(
                f"column {column!r} has no test rows: {int(drawn.sum()):,} were drawn, at random, "
                "from the others"
            )
    if section.split is not None and validation.any():
        fold[validation] = 0
    elif section.fold is None:
        rest = fold != TEST
        fold[rest] = make_folds(
            target[rest],
            n_folds=section.folds,
            seed=section.seed,
            groups=None if together is None else together[rest],
        )
    if not (fold >= 0).any():
        raise DataError("no row is left for validation: a head cannot be chosen")
    return fold


def _joined_by_copies(groups: npt.NDArray[np.int64], content: pd.Series) -> npt.NDArray[np.int64]:
    """(N,) groups, those that hold a copy of the same image made one: the components of the graph
    of rows.
    """
    copies = pd.factorize(content)[0]
    count = int(groups.max()) + 1
    edges = (np.ones(len(groups)), (groups, copies + count))
    size = count + int(copies.max()) + 1
    components = connected_components(coo_array(edges, shape=(size, size)), directed=False)[1]
    return np.asarray(components[groups], np.int64)


def _refuse_split_groups(
    frame: pd.DataFrame,
    groups: npt.NDArray[np.int64],
    sides: npt.NDArray[Any],
    column: str,
    group: str | None,
) -> None:
    mixed = pd.Series(sides).groupby(groups).transform("nunique").to_numpy() > 1
    if mixed.any():
        name = frame[group].iloc[int(mixed.argmax())]
        raise DataError(
            f"column {column!r} puts images of the same {group!r} (or copies of them) on different "
            f"sides, first {name!r}, {int(mixed.sum()):,} images in all. Mend the column, or leave "
            "one of the two out of the recipe"
        )


def _read_folds(frame: pd.DataFrame, column: str) -> npt.NDArray[Any]:
    values = empty_as_missing(frame[column])
    if values.isna().any():
        raise DataError(
            f"task.fold {column!r} is empty for {frame.loc[values.isna(), 'id'].iloc[0]!r}: every "
            "image needs one"
        )
    texts = as_text(values)
    if (
        texts.str.fullmatch(r"-?\d{1,18}").all() and (numbers := texts.astype("int64")).min() <= 0
    ):  # 18 digits fit int64
        return numbers.to_numpy()
    if texts.str.fullmatch(r"-?\d+").all() and (below := texts[texts.str.startswith("-")]).any():
        # As a name, the -1 of a test row would be a fold to train on.
        raise DataError(
            f"task.fold {column!r} holds {below.iloc[0]} beside {max(texts, key=len)}: number the "
            "folds 0, 1, … without gaps, with -1 for test rows"
        )
    return texts.to_numpy(dtype=np.str_)  # names; folds that are counted from 1 are such


def drop_rows(dataset: Dataset, failed: Set[str]) -> Dataset:
    """Leave out the images that some feature set of the run cannot hold, so that all heads are
    compared on the same rows.

    The other rows keep their folds. Raises DataError when a fold or the training rows are left with
    nothing.
    """
    if not failed:
        return dataset
    bad = np.array(sorted(failed), "S32")
    kept = ~np.isin(dataset.train.content, bad)
    train = dataset.train.take(kept)
    empty = sorted(set(dataset.train.fold[dataset.train.fold >= 0]) - set(train.fold))
    if empty:
        raise DataError(
            f"every image of fold {empty[0]} failed: the reasons are in `headrace cache` and in "
            "failed-images.csv"
        )
    tested = ~np.isin(dataset.test.content, bad)
    return Dataset(
        train,
        dataset.test.take(tested),
        dataset.notes,
        dataset.groups[kept],
        dataset.unlabelled,
        dataset.test_groups[tested],
    )


def _first_copies(content: pd.Series) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows of the first copy of each content, and for every row the position of its first copy
    among those.
    """
    copy_of, _ = pd.factorize(content)
    return np.flatnonzero(~content.duplicated().to_numpy()), copy_of


def _read_split(frame: pd.DataFrame, column: str) -> npt.NDArray[np.str_]:
    texts = as_text(empty_as_missing(frame[column]))
    if texts.isna().any():
        raise DataError(
            f"task.split {column!r} is empty in {int(texts.isna().sum()):,} rows, first "
            f"{frame.loc[texts.isna(), 'id'].iloc[0]!r}; expected train, validation or test"
        )
    words = texts.str.lower()
    unknown = sorted(set(words) - set(SPLIT_WORDS))
    if unknown:
        raise DataError(
            f"task.split {column!r} holds {', '.join(map(repr, unknown[:5]))}; expected train, "
            "validation or test"
        )
    return words.map(SPLIT_WORDS).to_numpy(dtype=np.str_)


def _check_folds(fold: npt.NDArray[np.int16], target: npt.NDArray[np.int64] | None) -> None:
    """Every fold must leave something to learn from."""
    for number in range(int(fold.max()) + 1):
        trains = (fold != number) & (fold != TEST)
        if not trains.any():
            raise DataError(
                f"validation fold {number} leaves no image to train on: mark some rows as train in "
                "task.split, or use more folds"
            )
        if target is not None and len(np.unique(target[trains])) < 2:
            raise DataError(
                f"without validation fold {number}, the {int(trains.sum()):,} images to train on "
                "are all of one class: a classifier needs two. Look at the split, fold or group "
                "column"
            )


def _check_classes(
    classes: tuple[str, ...],
    target: npt.NDArray[Any],
    fold: npt.NDArray[np.int16],
    metric: str | None,
) -> list[str]:
    counts = np.bincount(target[fold != TEST], minlength=len(classes))
    notes = []
    largest = int(counts.argmax())
    share = counts[largest] / counts.sum()
    if share >= 0.9 and metric in (None, "accuracy"):
        notes.append(
            f"{share:.1%} of the images are {classes[largest]}, so always saying that has an "
            f"accuracy of {share:.1%}; task.metric: balanced_accuracy or macro_f1 weighs all "
            "classes the same"
        )
    unseen = [classes[i] for i in np.flatnonzero(counts == 0)]
    rare = [f"{classes[i]} ({counts[i]})" for i in np.flatnonzero((counts > 0) & (counts < 5))]
    if unseen:
        notes.append(f"no training image of class {name_some(unseen)}: it can never be predicted")
    if rare:
        notes.append(f"few training images of class {name_some(rare)}: expect noise there")
    return notes
