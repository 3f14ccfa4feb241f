"""The recipe's task section from a table: which columns are the target, the groups, the split."""

import contextlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from headrace.cache.count_text import count_text
from headrace.cache.text import as_numbers, as_text
from headrace.extract.images.locators import locator_file
from headrace.extract.sources.formats import IMAGE_SUFFIXES
from headrace.extract.sources.layout import side_of_cell
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.recipe.targets import are_quantities, name_some

_TARGET_NAMES = ("label", "labels", "class", "target", "category", "diagnosis", "species", "y")
GROUP_NAMES = (
    *("group", "patient", "patient_id", "subject", "subject_id", "case", "case_id", "lesion_id"),
    *("slide", "slide_id", "scene", "site", "deployment_id", "location", "seq_id"),
)
MIN_GROUPS = 6  # for a test split and five folds
_FOLD_NAMES = ("fold", "folds", "kfold")
_TRAIN_WORD = re.compile(r"(?<![a-z])(is)?train(ing)?(?![a-z])", re.IGNORECASE)
_MAX_SIDES = 5  # different values of a column that may be a split
_SPLIT_NAMES = ("split", "set", "subset", "partition")
# Of a table, to count the missing files: all of them would take long on a network disk.
_PATHS_CHECKED = 100
_ZEROS, _ONES, _MINUS_ONES = ("0", "0.0", "False"), ("1", "1.0", "True"), ("-1", "-1.0")
_SEPARATORS = (";", "|", ",", " ")


def targets_text(samples: pd.DataFrame, targets: Sequence[str]) -> str:
    """Return the targets in words: "3 classes in column 'label'", "targets in 4 columns"."""
    if len(targets) > 1:
        return f"targets in {count_text(len(targets), 'column')}"
    n_classes = n_distinct(samples[targets[0]])
    if n_classes is not None and are_quantities(samples[targets[0]]):
        return f"numbers in column {targets[0]!r}"
    classes_text = (
        "lists of classes" if n_classes is None else count_text(n_classes, "class", "classes")
    )
    return f"{classes_text} in column {targets[0]!r}"


def table_doubts(paths: "pd.Series[Any]", labels: "pd.Series[Any]", table_file: Path) -> str:
    """Return, in words, how many rows of a table have no label and how many files are missing."""
    doubt_text = ""
    if n_unlabelled := int(labels.isna().sum()):
        doubt_text += (
            f"; {count_text(n_unlabelled, 'row has', 'rows have')} no label: a run predicts them"
        )
    checked_files = list(map(locator_file, paths.head(_PATHS_CHECKED).astype(str)))
    missing_files = [file_path for file_path in checked_files if not Path(file_path).is_file()]
    if missing_files:
        doubt_text += (
            f"; {len(missing_files):,} of the first {count_text(len(checked_files), 'file')} are "
            f"not there, such as {missing_files[0]} (relative paths start from images.root, by "
            "default the table's folder)"
        )
        folder = table_file.parent.absolute()
        cure_text = _names_elsewhere(Path(missing_files[0]))
        prefix = _prefix_elsewhere(missing_files, folder)
        if prefix and table_file.suffix.lower() in (".csv", ".tsv", ".tab", ".txt"):
            pattern = prefix.replace("\\", "\\\\")
            cure_text += (
                f". Without {prefix} they are below {folder.name}: sed 's|{pattern}||' "
                f"{table_file.name} > here.csv, and then headrace init here.csv"
            )
        if not cure_text and len(missing_files) == len(checked_files):
            cure_text = _no_file_is_there(missing_files[0], folder)
        doubt_text += cure_text
    return doubt_text


def _names_elsewhere(missing_file: Path) -> str:
    """Return, in words, why a path that a table names leads to no file, where its text says so."""
    names = [name.strip() for name in re.split(r"[;,|]", str(missing_file))]
    if len(names) > 1 and all(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
        return (
            ". The cells name several images each: write a row for each image, with what they have "
            "in common in a column (task.unit: scores by all images of one)"
        )
    with contextlib.suppress(OSError):
        for path in missing_file.parent.iterdir():
            if path.name.lower() == missing_file.name.lower():
                return (
                    f". There is {path.name}: write the table's paths as the files are, in upper "
                    "and lower case too"
                )
    return ""


def _no_file_is_there(missing_file: str, folder: Path) -> str:
    """Return, in words, what makes a recipe work whose table leads to no file."""
    if missing_file.startswith(f"{folder}/"):
        written_path = missing_file.removeprefix(f"{folder}/")
        return (
            f". Before a run, write the folder that {written_path} starts from into the recipe: "
            "'root: FOLDER' in the place of '# root: images'"
        )
    return ". Before a run, put the images there, or paths into the table that lead to them"


def _prefix_elsewhere(missing_files: Sequence[str], folder: Path) -> str | None:
    """Return what paths of another machine begin with, where they lead to files below the folder
    without it.
    """
    names = [file_path.removeprefix(f"{folder}/") for file_path in missing_files]
    separators = [match.end() for match in re.finditer(r"[/\\]", names[0])]
    for prefix in (names[0][:end] for end in separators):
        # A table from Windows has backslashes.
        tails = [name.removeprefix(prefix).replace("\\", "/") for name in names]
        if all(name.startswith(prefix) for name in names) and all(
            (folder / tail).is_file() for tail in tails
        ):
            return prefix
    return None


def task_section(
    samples: pd.DataFrame, column_names: Sequence[str], location: Path
) -> tuple[str, list[str], list[str]]:
    """Return the recipe's task section, the target's columns, and notes on what was assumed."""
    task_notes: list[str] = []
    named_columns = (
        first_named(_SPLIT_NAMES, column_names),
        first_named(GROUP_NAMES, column_names),
    )
    list_columns = [
        column_name
        for column_name in ("label", "labels")
        if column_name in samples and n_distinct(samples[column_name]) is None
    ]
    free_columns = [name for name in column_names if name not in named_columns]
    target_column = named_target([*column_names, *list_columns])
    indicators = _indicators(samples, free_columns)
    # Most of a table's columns, each of which says yes or no, are what it is about.
    n_filled = sum(samples[name].notna().any() for name in free_columns)
    if target_column is None and 2 < len(indicators) > n_filled / 2:
        target_column = indicators[0]
    if target_column is None and (target_column := nearly_named(samples, free_columns)):
        task_notes.append(
            f"{target_column!r} is taken for the label, by its name. For another: task.target"
        )
    if target_column is None and (target_column := few_valued(samples, free_columns)):
        other_columns = [
            name for name in free_columns if name != target_column and few_valued(samples, [name])
        ]
        others_text = f" (others: {name_some(other_columns)})" if other_columns else ""
        task_notes.append(
            f"no column is named like a label; {target_column!r} is taken, the first with few "
            f"values{others_text}. For another: task.target"
        )
    if target_column is None and (quantities := _quantities(samples, free_columns)):
        target_column = quantities[0]
        others_text = f" (others: {name_some(quantities[1:])})" if quantities[1:] else ""
        task_notes.append(
            f"no column looks like a label; {target_column!r} is taken, the first with numbers"
            f"{others_text}. For another: task.target"
        )
    task_notes += _shared_epithets(samples, target_column)
    answers = samples[indicators].apply(as_text).dropna(how="all")
    is_one_hot = len(indicators) > 1 and bool((answers.isin(_ONES).sum(axis=1) == 1).all())
    # Two columns of 0 and 1 that are not one-hot are rather a label and a flag than two labels, and
    # one alone is a target of two classes.
    if target_column not in indicators or not (is_one_hot or len(indicators) > 2):
        indicators = []
    if target_column is None:
        raise InvalidInput(
            f"{location}: no column looks like a label (2 to 1,000 different values) or like "
            f"numbers to predict. It has: {', '.join(map(str, samples.columns))}"
            f"{_first_words(samples, free_columns, location)}"
        )
    targets = indicators or [target_column]
    task_lines = f"  target: {yaml_text(target_column)}"
    # Several labels for an image are told by 0/1 columns, lists in cells, or a separator.
    if indicators:
        task_lines = f"  target: [{', '.join(map(yaml_text, indicators))}]"
        if is_one_hot:
            meaning = "one class for each image, named by the column that holds a 1"
        else:
            task_lines += "\n  kind: multi                    # 0/1 columns"
            meaning = "several labels for an image (task.kind: multi)"
        task_notes.append(
            f"{count_text(len(indicators), 'column holds', 'columns hold')} 0 and 1 alone "
            f"({name_some(indicators)}) and are taken for {meaning}; for one of them: task.target"
        )
        relabel_line, relabel_notes = _relabel(samples[indicators])
        task_lines += relabel_line
        task_notes += relabel_notes
    elif target_column in list_columns:
        task_lines += "\n  kind: multi                    # several labels in a cell"
    elif are_quantities(samples[target_column]):
        task_lines += "\n  kind: regression               # numbers"
        task_notes.append(
            f"{target_column!r} holds {n_distinct(samples[target_column]):,} different numbers, "
            "and is predicted as a number (task.kind: regression)"
        )
    elif (separator := _label_separator(samples[target_column])) is not None:
        task_lines += (
            "\n  kind: multi                    # several labels in a cell\n  separator: "
            f"{yaml_text(separator)}"
        )
        task_notes.append(
            f"the cells of {target_column!r} are taken for several labels each, separated by "
            f"{separator!r} (task.separator); for one label each: task.kind: single"
        )
    else:
        class_values = samples[target_column].dropna().unique()
        if len(class_values) < 2:
            found_text = f"one class only, {class_values[0]!r}" if len(class_values) else "no value"
            raise InvalidInput(
                f"{location}: column {target_column!r} holds {found_text}. A classifier needs two "
                "classes or more"
            )
    side_lines, side_notes = _split_and_group(
        # A run trains on labelled rows alone, so that the others may leave a split or group empty.
        samples[samples[target_column].notna()],
        [name for name in column_names if name not in targets],
        named_columns,
    )
    return task_lines + side_lines, targets, [*task_notes, *side_notes]


def _indicators(samples: pd.DataFrame, column_names: Sequence[str]) -> list[str]:
    """Return the columns that say yes or no: 0 and 1, also with -1 and empty cells beside a 1."""
    texts_of = {name: as_text(samples[name]) for name in column_names if n_distinct(samples[name])}
    return [
        name
        for name, texts in texts_of.items()
        if set(texts.dropna()) <= {*_ONES, *_ZEROS, *_MINUS_ONES}
        and (texts.isin(_ONES).any() or set(texts) <= set(_ZEROS))
    ]


def _relabel(indicators: pd.DataFrame) -> tuple[str, list[str]]:
    """Return the line of the recipe for values of yes-or-no columns other than 0 and 1, and notes
    on what they are taken for.
    """
    texts = indicators.apply(as_text)
    relabels, notes = [], []
    if n_minus := int(texts.isin(_MINUS_ONES).to_numpy().sum()):
        # CelebA's -1 is a no; beside zeros it is CheXpert's "uncertain".
        is_no = not texts.isin(_ZEROS).any(axis=None)
        relabels.append(f"-1: {0 if is_no else 'null'}")
        cells_text = count_text(n_minus, "cell holds", "cells hold")
        notes.append(
            f"{cells_text} -1, which counts as 0 (task.relabel)"
            if is_no
            else f"{cells_text} -1 beside 0 and 1, which counts as no value: nothing is trained on "
            "these rows. To count it as yes or no: task.relabel: {-1: 1} or {-1: 0}"
        )
    if n_empty := int(texts.isna().to_numpy().sum()):
        # A row without any value is one to predict.
        if not texts.isna().all(axis=1).any():
            relabels.append('"": 0')
            notes.append(
                f"{count_text(n_empty, 'cell is', 'cells are')} empty, which counts as 0 "
                "(task.relabel)"
            )
        else:
            notes.append(
                f"{count_text(n_empty, 'cell is', 'cells are')} empty, and nothing is trained on "
                'these rows: where that means 0, task.relabel: {"": 0}'
            )
    return (f"\n  relabel: {{{', '.join(relabels)}}}" if relabels else ""), notes


def _split_and_group(
    labelled_samples: pd.DataFrame,
    column_names: Sequence[str],
    named_columns: tuple[str | None, str | None],
) -> tuple[str, list[str]]:
    """Return the lines for columns of a split and of groups, and notes on columns not taken.

    named_columns: those that are named like a split and like groups.
    """
    task_lines, task_notes = "", []
    # A split or group with empty cells would leave it open where these rows belong.
    full_columns = [name for name in column_names if is_full(labelled_samples[name])]
    group_column = first_named(GROUP_NAMES, full_columns)
    split_columns = [name for name in full_columns if _is_split(labelled_samples[name])]
    split_column = first_named(_SPLIT_NAMES, split_columns)
    if split_column is None and len(split_columns) == 1:
        (split_column,) = split_columns
        task_notes.append(f"column {split_column!r} is taken for the split (task.split)")
    n_groups = labelled_samples[group_column].nunique() if group_column else 0
    if split_column:
        task_lines += f"\n  split: {yaml_text(split_column)}"
    if named_columns[0] and named_columns[0] != split_column:
        task_notes.append(
            f"column {named_columns[0]!r} holds other values than train, validation and test, or "
            "none, and is not taken for a split"
        )
    if group_column and not split_column and n_groups < MIN_GROUPS:
        task_notes.append(
            f"column {group_column!r} has {n_groups} values, too few for a test split and five "
            "folds, and is not taken for groups. Where the images of one are alike: task.group: "
            f"{yaml_text(group_column)}, with fewer task.folds"
        )
    elif group_column:
        task_lines += f"\n  group: {yaml_text(group_column)}"
    if split_column is None:
        other_names = [name for name in column_names if name != named_columns[0]]
        task_notes += _unused_splits(labelled_samples, other_names)
    # Told also where another column is taken: that of patients says more than that of sites.
    if named_columns[1] and named_columns[1] != group_column:
        task_notes.append(
            f"column {named_columns[1]!r} is empty for some images, and is not taken for groups: "
            f"fill it, and set task.group: {yaml_text(named_columns[1])}"
        )
    return task_lines, task_notes


def _is_split(column: "pd.Series[Any]") -> bool:
    """Return whether a column's values stand for two or three sides of a split."""
    if (n_values := n_distinct(column)) is None or n_values > _MAX_SIDES:
        return False
    sides = {side_of_cell(text, str(column.name)) for text in as_text(column).unique()}
    return None not in sides and ("train" in sides or column.name in _SPLIT_NAMES)


def _unused_splits(samples: pd.DataFrame, column_names: Sequence[str]) -> list[str]:
    """Return notes on columns that may be a split or folds of the user's own."""
    notes = []
    for name in column_names:
        if name.lower() in _FOLD_NAMES:
            notes.append(
                f"column {name!r} may be folds of your own, and is not used: task.fold: "
                f"{yaml_text(name)}"
            )
            continue
        is_flat = n_distinct(samples[name]) is not None
        values = list(samples[name].dropna().unique()) if is_flat else []
        texts = [name, *map(str, values)] if len(values) <= _MAX_SIDES else [name]
        if any(_TRAIN_WORD.search(text) for text in texts):
            notes.append(
                f"column {name!r} may be a split of your own, and is not used: task.split: "
                f"{yaml_text(name)}, with the words train, validation and test in it"
            )
    return notes


def is_full(column: "pd.Series[Any]") -> bool:
    """Return whether no cell of a column is empty."""
    cell_texts = as_text(column)
    return bool(cell_texts.notna().all() and (cell_texts != "").all())


def _label_separator(column: "pd.Series[Any]") -> str | None:
    """Return the separator of labels in a column's cells, None if each cell is a single label.

    `cat;dog` beside `cat` is two labels. A comma or a blank may also belong to one long name, so
    that the parts must recur in other cells, and half of them or more must also stand alone.
    """
    # Different cells alone: a table may have millions of rows, and few combinations of labels.
    cell_texts = as_text(column).dropna().unique().tolist()
    for separator in _SEPARATORS:
        combinations = [
            {label_part.strip() for label_part in cell_text.split(separator)}
            for cell_text in cell_texts
            if separator in cell_text
        ]
        label_parts = {label_part for combination in combinations for label_part in combination}
        single_labels = {cell_text for cell_text in cell_texts if separator not in cell_text}
        if (
            label_parts
            and len(label_parts | single_labels) < len(cell_texts)
            and len(label_parts & single_labels) * 2 >= len(label_parts)
            and (separator != " " or _are_labels(combinations, label_parts, single_labels))
        ):
            return separator
    return None


def _are_labels(
    combinations: list[set[str]], label_parts: set[str], single_labels: set[str]
) -> bool:
    """Return whether words that blanks separate are labels, and not one name of several words,
    such as `wild cat` beside `cat`.

    They are labels if each is also a cell of its own, and either no cell holds another label or
    three of them recur in combinations.
    """
    recurring_parts = [
        label_part
        for label_part in label_parts
        if sum(label_part in combination for combination in combinations) > 1
    ]
    return label_parts <= single_labels and (
        label_parts == single_labels or len(recurring_parts) >= 3
    )


def first_named(names: tuple[str, ...], column_names: Sequence[str]) -> str | None:
    """Return the column with the first of `names` that there is, also as `Patient ID` and such."""
    columns_by_letters = {_letters(str(column)): str(column) for column in column_names}
    matches = (columns_by_letters.get(_letters(name)) for name in names)
    return next((column for column in matches if column is not None), None)


def _letters(name: str) -> str:
    return re.sub(r"[ _-]", "", name).lower()


def named_target(column_names: Sequence[str]) -> str | None:
    """Return the column that is named like a label.

    A `class` beside an `order` and a `family` is a rank of animals or plants (Wildlife Insights,
    GBIF): there `species` is meant.
    """
    ranks = {"order", "family"} <= {str(name).lower() for name in column_names}
    return first_named(
        tuple(name for name in _TARGET_NAMES if not (ranks and name == "class")), column_names
    )


def _first_words(samples: pd.DataFrame, column_names: Sequence[str], location: Path) -> str:
    """Return, in words, how the first word of a column's cells becomes a label, where it recurs
    (ImageNet's PredictionString: a class and a box); "" elsewhere.
    """
    if location.suffix.lower() != ".csv":
        return ""
    for name in column_names:
        if n_distinct(samples[name]) is None:
            continue
        cells = as_text(samples[name])
        first_words = cells.str.partition(" ")[0]
        if cells.str.contains(" ").any() and few_valued(pd.DataFrame({name: first_words}), [name]):
            new_path = location.with_name(f"{location.stem}-labels.csv")
            script = (
                f"import pandas as p; t = p.read_csv({location.name!r}, dtype=str); "
                f"t['label'] = t[{name!r}].str.split().str[0]; t.to_csv({new_path.name!r}, "
                "index=False)"
            )
            return (
                f". If the first word of {name!r} is the label, such as {first_words.iloc[0]!r}, "
                f'in that folder `python -c "{script}"`, then headrace init '
                f"{shlex.quote(str(new_path))}"
            )
    return ""


def nearly_named(samples: pd.DataFrame, column_names: Sequence[str]) -> str | None:
    """Return the first column with a word for a label in its name, such as `Finding Labels` or
    `ClassId`, whose values repeat; or None.
    """
    for name in column_names:
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
        if words & {*_TARGET_NAMES} - {"y"} and samples[name].notna().any():
            n_values = n_distinct(samples[name])
            if n_values is None or 2 <= n_values < samples[name].notna().sum():
                return name
    return None


def few_valued(samples: pd.DataFrame, column_names: list[str]) -> str | None:
    """Return the first column with few enough values to be classes: on average three rows each."""
    for column_name in column_names:
        # Two of two rows are classes too: a table may be a first try with a few images.
        if 2 <= (n_distinct(samples[column_name]) or 0) <= min(1000, max(2, len(samples) // 3)):
            return str(column_name)
    return None


def _shared_epithets(samples: pd.DataFrame, target_column: str | None) -> list[str]:
    """Return a note if one value of a target belongs to several genera: a species without its
    genus, as Wildlife Insights writes it.
    """
    genus_column = first_named(("genus",), list(map(str, samples.columns)))
    if genus_column is None or target_column is None or n_distinct(samples[target_column]) is None:
        return []
    genera = samples.groupby(target_column)[genus_column].unique()
    shared = genera[genera.map(len) > 1]
    if shared.empty:
        return []
    return [
        f"{shared.index[0]!r} in {target_column!r} is of several genera "
        f"({name_some(sorted(map(str, shared.iloc[0])))}), and they would be one class. Name a "
        "column that tells them apart, such as one of common or scientific names: task.target"
    ]


def _quantities(samples: pd.DataFrame, column_names: list[str]) -> list[str]:
    """Return the columns of numbers to predict. Whole numbers that do not repeat count rows."""
    return [
        name
        for name in column_names
        if n_distinct(samples[name]) is not None
        and are_quantities(samples[name])
        and (samples[name].duplicated().any() or (as_numbers(samples[name]) % 1 != 0).any())
    ]


def n_distinct(column: "pd.Series[Any]") -> int | None:
    """Return the number of a column's values; None if its cells are lists, as Parquet allows."""
    try:
        return column.nunique()
    except TypeError:
        return None


def yaml_text(text: str) -> str:
    """Return text as a YAML value, quoted where it must be ("2020", "a: b")."""
    return yaml.safe_dump([text], width=10_000, allow_unicode=True).removeprefix("- ").strip()
