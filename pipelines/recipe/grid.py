"""From the recipe's lists to head specs: products, in a fixed order, each spec once."""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headrace.heads.spec import (
    CentroidSpec,
    ConvSpec,
    Halving,
    HeadSpec,
    KNNSpec,
    LogisticSpec,
    MLPSpec,
    RidgeSpec,
    SklearnSpec,
)
from headrace.pipelines.recipe.heads import ConvGrid, HalvingSection, HeadInput, Heads, MLPGrid
from headrace.pipelines.recipe.load import RecipeError

# What a network's settings are tried in, outermost first; also the names of the recipe's lists and
# of the spec's fields.
_NETWORK_AXES = (
    "hidden",
    "learning_rate",
    "weight_decay",
    "dropout",
    "label_smoothing",
    "class_weight",
    "seed",
)


# Kinds of heads that cannot do every kind of task, with those that they do.
_TASKS = {"logistic": ("single", "multi"), "centroid": ("single",)}

_DOES = {"single": "one class per image", "multi": "several labels", "regression": "numbers"}


class Wanted(NamedTuple):
    """Heads of one kind that the recipe asks for, on one input."""

    inputs: tuple[str, ...]  # names of the feature sets that stand side by side
    specs: tuple[HeadSpec, ...]
    halving: Halving | None = None


def wanted_heads(heads: Heads, names: Sequence[str]) -> list[Wanted]:
    """Every (inputs, specs) pair that the recipe asks for; `names` are the feature sets there are.

    `each` and `all` mean the maps (`layer3.map`) for convolution heads, and everything else for the
    other kinds. Raises RecipeError for an input that is not one of them, and for convolution heads
    without a map.
    """
    sections = {
        kind: grid.halving
        for kind, grid in (("mlp", heads.mlp), ("conv", heads.conv))
        if grid is not None
    }
    wanted = (
        Wanted(
            columns,
            tuple(dict.fromkeys(_of_input(specs, columns))),
            _halving(sections.get(specs[0].kind)),
        )
        for inputs, specs in _grids(heads)
        for columns in _expand(inputs, names, maps=specs[0].kind == "conv")
    )
    return list(dict.fromkeys(wanted))  # a value that a list repeats counts once


def _of_input(specs: Sequence[HeadSpec], columns: Sequence[str]) -> Iterator[HeadSpec]:
    """The specs, none of them banded where a single tap has nothing to be banded against."""
    for spec in specs:
        if isinstance(spec, LogisticSpec | RidgeSpec) and len(columns) == 1:
            yield dataclasses.replace(spec, banded=False)
        else:
            yield spec


def check_kinds(heads: Heads, task_kind: str) -> None:
    """Raises RecipeError for heads that cannot do such a task, before anything is extracted for
    them.
    """
    for kind, tasks in _TASKS.items():
        if getattr(heads, kind) is not None and task_kind not in tasks:
            able = [
                name for name in Heads.model_fields if task_kind in _TASKS.get(name, (task_kind,))
            ]
            raise RecipeError(
                f"heads.{kind}: {kind} heads predict {' or '.join(_DOES[task] for task in tasks)}, "
                f"and task.kind is {task_kind}. Take {kind} out of the recipe; heads that can do "
                f"this task: {', '.join(able)}"
            )


def _halving(section: HalvingSection | None) -> Halving | None:
    return None if section is None else Halving(after=section.after, keep=section.keep)


def _grids(heads: Heads) -> Iterator[tuple[tuple[HeadInput, ...], list[HeadSpec]]]:
    # One entry per (kind, class weight, banded): these heads share their products best in one bank.
    if grid := heads.logistic:
        for class_weight, banded in itertools.product(grid.class_weight, sorted(set(grid.banded))):
            yield (
                grid.inputs,
                [
                    LogisticSpec(C=c, class_weight=class_weight, banded=banded)
                    for c in sorted(grid.C)
                ],
            )
    if ridge := heads.ridge:
        for class_weight, banded in itertools.product(
            ridge.class_weight, sorted(set(ridge.banded))
        ):
            yield (
                ridge.inputs,
                [
                    RidgeSpec(alpha=alpha, class_weight=class_weight, banded=banded)
                    for alpha in sorted(ridge.alpha)
                ],
            )
    if heads.mlp:
        yield heads.mlp.inputs, _networks(heads.mlp, MLPSpec, _NETWORK_AXES)
    if heads.conv:
        yield heads.conv.inputs, _networks(heads.conv, ConvSpec, ("channels", *_NETWORK_AXES))
    if knn := heads.knn:
        yield (
            knn.inputs,
            [
                KNNSpec(k=k, metric=m, weighting=w)
                for k, m, w in itertools.product(knn.k, knn.metric, knn.weighting)
            ],
        )
    if centroid := heads.centroid:
        yield centroid.inputs, [CentroidSpec(metric=metric) for metric in centroid.metric]
    for estimator in heads.sklearn:
        for values in itertools.product(*estimator.parameters.values()):
            parameters = json.dumps(
                dict(zip(estimator.parameters, values, strict=True)), sort_keys=True
            )
            yield (
                estimator.inputs,
                [
                    SklearnSpec(
                        estimator=estimator.estimator,
                        parameters=parameters,
                        standardize=estimator.standardize,
                    )
                ],
            )


def _networks(
    grid: MLPGrid | ConvGrid, kind: type[MLPSpec | ConvSpec], axes: Sequence[str]
) -> list[HeadSpec]:
    """The product of the axes' lists; the other settings are the same for all."""
    fixed = {name: getattr(grid, name) for name in ("batch_size", "epochs", "patience")}
    products = itertools.product(*(getattr(grid, axis) for axis in axes))
    return [kind(**dict(zip(axes, values, strict=True)), **fixed) for values in products]


def _expand(
    inputs: Sequence[HeadInput], names: Sequence[str], *, maps: bool
) -> list[tuple[str, ...]]:
    meant = [name for name in names if name.endswith(".map") == maps]
    if not meant and {"each", "all"} & {item for item in inputs if isinstance(item, str)}:
        found = ", ".join(names)
        raise RecipeError(
            (
                "heads.conv needs a tap with its positions kept, such as layer3.map; the taps are "
                f"{found}"
            )
            if maps
            else f"the taps {found} keep their positions, which makes very wide inputs: add "
            f"reduced ones, such as {names[0].removesuffix('.map')}.avg, or name these under "
            "`inputs`"
        )
    columns: list[tuple[str, ...]] = []
    for item in inputs:
        if item == "each":
            columns += [(name,) for name in meant]
        elif item == "all":
            columns.append(tuple(meant))
        else:
            columns.append(tuple(_known(name, names) for name in item))
    return list(dict.fromkeys(columns))


def _known(name: str, names: Sequence[str]) -> str:
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise RecipeError(
        f"heads: inputs names {name!r}, which no backbone gives: {hint}There are: "
        f"{', '.join(names)}"
    )
