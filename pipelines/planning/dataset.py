"""From the user's images and columns to tasks: rows to train and validate on, rows to test on, rows
without a target.

A test row never enters the task that banks read: the two are separate values, and separate files.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.text import as_text
from headrace.extract.images.crops import split_crop
from headrace.extract.images.locators import printable_name
from headrace.extract.sources.layout import side_of_cell
from headrace.extract.sources.listing import Listing, join_listings
from headrace.extract.sources.read import read_source
from headrace.heads.arrays import Array, Index
from headrace.heads.data.side_columns import SideColumns
from headrace.heads.data.task import TEST, Task
from headrace.heads.evaluate.metrics import DEFAULT_METRIC, METRICS, metric_names
from headrace.pipelines.planning.sides import (
    CROPPED_IMAGE,
    assign_folds,
    check_classes,
    check_folds,
    check_metric_in_folds,
    copies_across_sides,
    joined_by,
)
from headrace.pipelines.recipe.load import Recipe, RecipeError
from headrace.pipelines.recipe.sections import TaskSection
from headrace.pipelines.recipe.side_columns import (
    encode_side_columns,
    make_side_columns,
    require_columns,
)
from headrace.pipelines.recipe.targets import (
    DataError,
    alike_classes,
    alike_names,
    check_targets,
    empty_as_missing,
    target_columns,
    unused_relabels,
)
from headrace.pipelines.recipe.unit_targets import unit_targets


@dataclass(frozen=True)
class Dataset:
    """A recipe's task, split into rows to train on, rows to test on, and rows to predict."""

    train: Task  # rows that banks read, with their folds
    test: Task  # rows that nothing reads before the winner is chosen; may be empty
    notes: tuple[str, ...]  # peculiarities of the rows, for the user
    # (rows of train,) rows of one group or unit, or copies of one image, share a number
    groups: Index
    # images that can be read and have no target: target -1 or nan, fold TEST; an image without a
    # unit is a unit of its own, named by its id
    unlabelled: Task
    test_groups: Index  # (rows of test,) as `groups`


def read_samples(recipe: Recipe, *, labelled: bool = True) -> Listing:
    """Read the recipe's images, with the user's columns, and a count of what is left out.

    labelled: require the columns that the task names. Raises SourceError for images that cannot be
    listed, DataError if a column that the task names is absent.
    """
    listing = read_source(recipe.images.source(), labelled=labelled)
    if recipe.images.unlabelled is not None:
        # As objects, because joining rows without a value would turn whole numbers into floats.
        listings = (listing, _unlabelled_listing(recipe))
        listing = join_listings(
            replace(source, samples=source.samples.astype(object)) for source in listings
        )
    if not labelled:
        return listing
    require_task_columns(listing.samples, recipe.task, recipe.images.source().location)
    return listing


def require_task_columns(samples: pd.DataFrame, section: TaskSection, location: object) -> None:
    """Raise DataError if a column that the task names is absent. location: for its message."""
    for task_key in ("target", "group", "unit", "split", "fold", "side_columns"):
        columns = getattr(section, task_key)
        for column in [columns] if isinstance(columns, str) else columns or ():
            if column not in samples.columns:
                raise DataError(_absent(f"task.{task_key}", column, location, samples))


def _unlabelled_listing(recipe: Recipe) -> Listing:
    """Return the images of `images.unlabelled`, without target columns, under ids that begin with
    the folder's name.
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
    """Return the metric that ranks heads, by default that of the task's kind.

    Raises RecipeError for a metric of other kinds of task.
    """
    kind = section.kind
    metric = section.metric or DEFAULT_METRIC[kind]
    tasks = METRICS[metric].tasks if metric in METRICS else ()
    if kind not in tasks:
        hint = f" It is one of task.kind: {' or '.join(tasks)}." if tasks else ""
        raise RecipeError(
            f"task.metric {metric!r} is no metric of a {kind} task.{hint} There are: "
            f"{', '.join(metric_names(kind))}"
        )
    return metric


def make_dataset(
    samples: pd.DataFrame, content_hashes: Sequence[str | None], section: TaskSection
) -> Dataset:
    """Return targets, test split and folds of the samples that could be read: those with a content
    hash. Raises DataError for targets that cannot be learned (one class only, not a number,
    unknown split words).
    """
    readable = samples.assign(
        _content=pd.Series(list(content_hashes), index=samples.index, dtype=object)
    )
    # Sorted, so that the split does not depend on the rows' order in the table.
    readable = readable[readable["_content"].notna()].sort_values("id", ignore_index=True)
    notes: list[str] = []
    labelled_samples, classes, target = check_targets(readable, section)
    notes += unused_relabels(readable, section)
    unlabelled_samples = readable[~readable["id"].isin(labelled_samples["id"])]
    if len(unlabelled_samples):
        notes.append(
            f"{count_text(len(unlabelled_samples), 'image has', 'images have')} no "
            f"{' / '.join(target_columns(section))}: they are predicted in the end, and no head is "
            f"trained or scored on them{_partly_labelled(unlabelled_samples, section)}"
        )
    notes += alike_classes(classes)
    labelled_samples, groups, unit_names = _groups_and_units(labelled_samples, section, notes)
    units = None
    if unit_names is not None:
        units = unit_names.to_numpy(dtype=np.str_)
        ids = labelled_samples["id"]
        target, unit_notes = unit_targets(ids, target, classes, unit_names, section)
        notes += unit_notes
    notes += _unused_split(labelled_samples, section)
    copy_notes = copies_across_sides(labelled_samples, section)
    notes += _duplicates(labelled_samples, target, across_sides=bool(copy_notes)) + copy_notes
    fold_of_row = assign_folds(
        labelled_samples, target, groups, section, notes, across_sides=bool(copy_notes)
    )
    if section.kind == "single":
        notes += check_classes(classes, target, fold_of_row, section.metric)
    check_folds(fold_of_row, target if section.kind == "single" else None)
    check_metric_in_folds(fold_of_row, target, check_metric(section), section)
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
    row_groups = copy_codes if groups is None else joined_by(groups, labelled_samples["_content"])
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


def _partly_labelled(unlabelled_samples: pd.DataFrame, section: TaskSection) -> str:
    """Return, in words, how many images without a target have a value in some of its columns."""
    has_value = unlabelled_samples[target_columns(section)].apply(empty_as_missing).notna()
    n_partly = int((has_value.any(axis=1) & ~has_value.all(axis=1)).sum())
    if not n_partly or "" in section.relabel:
        return ""
    return (
        f". {n_partly:,} of them have values in some of these columns: where an empty cell means "
        '0, task.relabel: {"": 0}'
    )


def _groups_and_units(
    labelled_samples: pd.DataFrame, section: TaskSection, notes: list[str]
) -> tuple[pd.DataFrame, Index | None, pd.Series | None]:
    """Return the samples, the group number of each (None without groups) and the name of its unit
    (None without units); adds to `notes`.

    Crops of one image are one group, and the samples get the image's name in CROPPED_IMAGE.
    """
    groups = units = None
    if "path" in labelled_samples and labelled_samples["path"].str.contains("::crop:").any():
        # Boxes and tiles of one image are as alike as copies of it.
        image_names = labelled_samples["path"].map(lambda path: split_crop(path)[0])
        labelled_samples = labelled_samples.assign(**{CROPPED_IMAGE: image_names})
        groups = np.asarray(pd.factorize(image_names)[0], dtype=np.int64)
    for task_key, column_name in (("group", section.group), ("unit", section.unit)):
        if column_name is None:
            continue
        names = _names_in(labelled_samples, task_key, column_name)
        notes += alike_names(names.unique(), f"values of {column_name!r}")
        codes = np.asarray(pd.factorize(names)[0], dtype=np.int64)
        groups = codes if groups is None else joined_by(groups, names)
        if task_key == "unit":
            units = names
    return labelled_samples, groups, units


def _unlabelled_rows(
    samples: pd.DataFrame, task: Task, section: TaskSection
) -> tuple[Task, list[str]]:
    """Return the samples without a target as a task like `task`, and notes on their columns."""
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
    split_words = set(as_text(labelled_samples["split"]).dropna())
    if any(side_of_cell(word, "split") is None for word in split_words):
        return []
    return [
        (
            f"the images are marked as {', '.join(sorted(split_words))}, and a random split is "
            "drawn: to use theirs, task.split: split"
        )
    ]


def _duplicates(labelled_samples: pd.DataFrame, target: Array, *, across_sides: bool) -> list[str]:
    """Return notes on exact copies. across_sides: the user's split has copies on several sides, and
    is followed.
    """
    is_repeated = labelled_samples["_content"].duplicated(keep=False).to_numpy()
    if not is_repeated.any():
        return []
    kept_text = "" if across_sides else "; copies stay on one side of every split"
    notes = [
        f"{count_text(int(is_repeated.sum()), 'image is', 'images are')} exact copies of one "
        f"another{kept_text}"
    ]
    flat_targets = pd.DataFrame(target.reshape(len(target), -1))[is_repeated]
    by_image = flat_targets.groupby(labelled_samples["_content"].to_numpy()[is_repeated])
    if n_disagreeing := int(by_image.nunique().gt(1).any(axis=1).sum()):
        verb = "carries" if n_disagreeing == 1 else "carry"
        notes.append(
            f"{n_disagreeing:,} of the copied images {verb} different targets: check their labels"
        )
    return notes


def drop_rows(dataset: Dataset, failed_reasons: Mapping[str, str]) -> Dataset:
    """Leave out the images that some feature set of the run cannot hold. The other rows keep their
    folds. Raises DataError if a fold has no row left.

    failed_reasons: why they cannot be held, by content hash.
    """
    if not failed_reasons:
        return dataset
    # For all heads, which are compared on the same rows: one that is spared its hardest images
    # would win.
    failed_hashes = np.array(sorted(failed_reasons), "S32")
    is_kept = ~np.isin(dataset.train.content, failed_hashes)
    kept_train = dataset.train.take(is_kept)
    empty_folds = sorted(set(dataset.train.fold[dataset.train.fold >= 0]) - set(kept_train.fold))
    if empty_folds:
        first_row = int(np.argmax(dataset.train.fold == empty_folds[0]))
        raise DataError(
            f"every image of fold {empty_folds[0]} failed; the first is "
            f"{dataset.train.ids[first_row]}: "
            f"{failed_reasons[dataset.train.content[first_row].decode()]}. Mend some of these "
            "images, or take fewer folds"
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
