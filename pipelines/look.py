"""What a folder, a table, archives or an array of images hold, as the lines of a recipe."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from headrace.cache import HeadraceError
from headrace.extract import (
    IMAGE_SUFFIXES,
    array_labels,
    idx_pairs,
    list_array,
    list_folder,
    list_tar,
    read_frame,
    read_table,
)

_TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
_TARGET_NAMES = ("label", "class", "target", "category", "diagnosis", "species", "y")
_GROUP_NAMES = ("group", "patient", "patient_id", "subject", "subject_id", "slide", "scene", "site")
_SPLIT_NAMES = ("split", "set", "subset", "partition")
_PATHS_LOOKED_AT = 100
_ARRAY_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".hdf")


class InitError(HeadraceError, ValueError):
    """No recipe can be written for what was found."""


@dataclass(frozen=True)
class Finding:
    """What `init` found: the lines of the recipe's images and task sections, and a sentence for the user."""

    images: str
    task: str
    sentence: str


def look(source: Path, base: Path) -> Finding:
    """The recipe's lines for what `source` holds; paths in them start from `base`, the recipe's folder.

    Raises InitError when there is nothing to train on, SourceError for a file that cannot be read.
    """
    if source.is_file() and source.suffix.lower() == ".tar":
        return _look_at_tar(source, base)
    if source.is_file() and (source.suffix.lower() in _ARRAY_SUFFIXES or "idx" in source.name):
        return _look_at_array(source, base)
    if source.is_file():
        return _look_at_table(source, base)
    if not source.is_dir():
        raise InitError(
            f"{source}: no such folder or file. Give a folder with one sub-folder per class, a CSV or Parquet table, "
            "WebDataset shards (.tar) or an array file (.npy, .npz, .h5, idx)"
        )
    tables = sorted(path for path in source.iterdir() if path.suffix.lower() in _TABLE_SUFFIXES and path.is_file())
    refusals: list[str] = []
    for table in tables:
        try:
            return _look_at_table(table, base)
        except HeadraceError as refusal:
            refusals.append(str(refusal))  # a table of something else, unless the folder is no use either
    try:
        return _look_at_folder(source, base)
    except HeadraceError as error:
        if (inside := _look_inside(source, base)) is not None:
            return inside
        if not refusals:
            raise
        raise InitError("\n".join([str(error), *refusals])) from None


def _look_inside(folder: Path, base: Path) -> Finding | None:
    """For a folder that holds no images itself: its tar shards, its idx files, or the one array file in it."""
    if any(folder.glob("*.tar")):
        return _look_at_tar(folder, base)
    if idx_pairs(folder):
        return _look_at_array(folder, base)
    arrays = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _ARRAY_SUFFIXES]
    if not arrays:
        return None
    if len(arrays) > 1:
        raise InitError(f"{folder} holds {len(arrays)} array files: name one. Try: headrace init {arrays[0]}")
    return _look_at_array(arrays[0], base)


def _look_at_folder(source: Path, base: Path) -> Finding:
    samples = list_folder(source)
    counts = samples["label"].value_counts()
    if len(counts) < 2:
        found = f"one class only, {counts.index[0]!r}" if len(counts) else "images, but no sub-folder for a class"
        raise InitError(
            f"{source}: found {found} ({len(samples):,} images). A classifier needs two classes or more: "
            "one sub-folder each, or a CSV with the columns path and label"
        )
    has_split = "split" in samples
    layout = "train, val or test, and in it one sub-folder per class" if has_split else "one sub-folder per class"
    split = "\n  split: split                  # the names of the outer folders" if has_split else ""
    name = "inner folder" if has_split else "sub-folder"
    return Finding(
        images=f"  folder: {_relative(source, base)}      # {layout}\n",
        task=f"  target: label                  # the name of the {name}{split}",
        sentence=f"{len(samples):,} images in {len(counts):,} classes, {counts.min():,} to {counts.max():,} each"
        + (f"; {_sizes(samples['split'])}" if has_split else ""),
    )


def _look_at_tar(source: Path, base: Path) -> Finding:
    samples = list_tar(source)
    columns = [str(column) for column in samples.columns if column not in ("id", "path")]
    task, target = _task(samples, columns, source)
    return Finding(
        images=f"  tar: {_relative(source, base)}      # WebDataset shards; or a pattern: train-{{000..031}}.tar\n",
        task=task,
        sentence=f"{len(samples):,} images in tar shards, {samples[target].nunique():,} classes in {target!r}",
    )


def _look_at_array(source: Path, base: Path) -> Finding:
    images = f"  array: {_relative(source, base)}\n"
    if source.is_dir():
        samples = list_array(source)
    else:
        key, labels, labels_key = array_labels(source)
        samples = list_array(source, key=key, labels=labels, labels_key=labels_key)
        images += "" if key is None else f"  array_key: {_scalar(key)}\n"
        images += "" if labels is None else f"  labels: {_relative(labels, base)}\n"
        images += "" if labels_key is None else f"  labels_key: {_scalar(labels_key)}\n"
    if samples["label"].isna().all():
        raise InitError(
            f"{source}: {len(samples):,} images, and no labels beside them. Write the recipe by hand, with\n"
            f"images:\n{images}  labels: FILE      # .npy, .npz, HDF5 or idx, one value per image"
        )
    task, _ = _task(samples, ["label", *(["split"] if "split" in samples else [])], source)
    split = f"; {_sizes(samples['split'])}" if "split" in samples else ""
    return Finding(images, task, f"{len(samples):,} images in {samples['label'].nunique():,} classes{split}")


def _sizes(split: "pd.Series[Any]") -> str:
    return ", ".join(f"{count:,} in {name}" for name, count in split.value_counts().items())


def _look_at_table(table: Path, base: Path) -> Finding:
    frame = read_frame(table)
    path_column = _path_column(frame)
    if path_column is None:
        raise InitError(
            f"{table}: no column holds image paths. It has: {', '.join(map(str, frame.columns))}. "
            "Name the column `path`, or write the recipe by hand with images.path_column"
        )
    id_column = "id" if "id" in frame.columns else None
    samples = read_table(table, path_column=path_column, id_column=id_column)
    others = [
        column
        for column in frame.columns
        if column not in (path_column, id_column) and isinstance(column, str) and _values(frame[column]) is not None
    ]
    task, target = _task(frame, others, table)
    return Finding(
        images=(
            f"  table: {_relative(table, base)}\n  path_column: {_scalar(path_column)}\n"
            + ("" if id_column is None else f"  id_column: {id_column}\n")
            + "  # root: images      # what relative paths start from\n"
        ),
        task=task,
        sentence=f"{len(samples):,} images in {table.name}, {frame[target].nunique():,} classes in column {target!r}"
        + _doubts(samples["path"], frame[target]),
    )


def _doubts(paths: "pd.Series[Any]", labels: "pd.Series[Any]") -> str:
    """What a person should know of a table before the first run: rows without a label, and paths that lead nowhere."""
    said = ""
    if empty := int(labels.isna().sum()):
        said += f"; {empty:,} rows have no label, and a run leaves them out"
    looked = paths.head(_PATHS_LOOKED_AT).astype(str)
    gone = [path for path in looked if not Path(path).is_file()]
    if gone:
        said += (
            f"; {len(gone):,} of the first {len(looked):,} files are not there, such as {gone[0]} (relative paths start from "
            "images.root, by default the table's folder)"
        )
    return said


def _task(frame: pd.DataFrame, columns: list[str], where: Path) -> tuple[str, str]:
    """The lines of the recipe's task section, and the target's column."""
    split = _first_named(_SPLIT_NAMES, columns)
    group = _first_named(_GROUP_NAMES, columns)
    target = _first_named(_TARGET_NAMES, columns) or _few_valued(frame, [c for c in columns if c not in (split, group)])
    if target is None:
        raise InitError(
            f"{where}: no column looks like a label (2 to 1,000 different values). It has: "
            f"{', '.join(map(str, frame.columns))}. To predict a number, write the recipe by hand: "
            "task: {target: COLUMN, kind: regression}"
        )
    values = frame[target].dropna().unique()
    if len(values) < 2:
        found = f"one class only, {values[0]!r}" if len(values) else "no value"
        raise InitError(f"{where}: column {target!r} holds {found}. A classifier needs two classes or more")
    task = f"  target: {_scalar(target)}"
    if split:
        task += f"\n  split: {_scalar(split)}"
    if group:
        task += f"\n  group: {_scalar(group)}"
    return task, target


def _path_column(frame: pd.DataFrame) -> str | None:
    # `path` first: ids can look like files too.
    for column in sorted(frame.columns, key=lambda column: column != "path"):
        values = frame[column].dropna()
        if values.dtype.kind in "OTU" and len(values) and values.head(100).map(_looks_like_an_image).all():
            return str(column)
    return None


def _looks_like_an_image(value: object) -> bool:
    return Path(str(value)).suffix.lower() in IMAGE_SUFFIXES


def _first_named(names: tuple[str, ...], columns: list[str]) -> str | None:
    lower = {str(column).lower(): str(column) for column in columns}
    return next((lower[name] for name in names if name in lower), None)


def _few_valued(frame: pd.DataFrame, columns: list[str]) -> str | None:
    for column in columns:
        if 2 <= (_values(frame[column]) or 0) <= min(1000, max(2, len(frame) // 3)):
            return str(column)
    return None


def _values(column: "pd.Series[Any]") -> int | None:
    """How many different values a column has; None where it holds lists or the like, as Parquet can."""
    try:
        return column.nunique()
    except TypeError:
        return None


def _relative(path: Path, base: Path) -> str:
    """As a person would write it: relative where that is short."""
    relative = os.path.relpath(path.absolute(), base)
    return _scalar(str(path.absolute()) if relative.startswith("../..") else relative)


def _scalar(text: str) -> str:
    """Text as a YAML value, quoted where it must be ("2020", "a: b")."""
    return yaml.safe_dump([text], width=10_000, allow_unicode=True).removeprefix("- ").strip()
