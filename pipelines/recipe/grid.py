"""From the recipe's lists to head specs: their products, in a fixed order, each spec once."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headrace.heads.data.side_columns import SIDE_COLUMNS, taps_of
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.sklearn.kind import SklearnSpec
from headrace.heads.spec import Halving, HeadSpec
from headrace.pipelines.recipe.heads import HalvingGrid, HeadGrid, HeadInput, Heads, SklearnGrid
from headrace.pipelines.recipe.load import RecipeError

_OUTPUTS = {"single": "one class per image", "multi": "several labels", "regression": "numbers"}


class RequestedHeads(NamedTuple):
    """Heads of one kind that the recipe asks for, on one input."""

    inputs: tuple[str, ...]  # names of the feature sets that stand side by side
    specs: tuple[HeadSpec, ...]
    halving: Halving | None = None


def requested_heads(
    heads: Heads, names: Sequence[str], *, side_columns: bool = False
) -> list[RequestedHeads]:
    """Return the heads that the recipe asks for.

    `each` and `all` in a recipe mean the maps (`layer3.map`) for convolution heads, and all other
    feature sets for the other kinds.

    names: of the feature sets that exist. side_columns: whether the task has any; each input then
    comes without and with them, for kinds that read them. Raises RecipeError for an unknown input,
    and for convolution heads without a map.
    """
    requested = (
        RequestedHeads(inputs, tuple(dict.fromkeys(_of_input(specs, inputs))), _halving(grid))
        for grid in heads.grids()
        for specs in grid.spec_banks()
        for inputs in _expand(grid, names, side_columns=side_columns)
    )
    return list(dict.fromkeys(requested))  # a value that is twice in a list counts once


def _of_input(specs: Sequence[HeadSpec], inputs: Sequence[str]) -> Iterator[HeadSpec]:
    """Yield the specs; on a single tap none is banded, as a band is all features of one tap."""
    for spec in specs:
        is_single = len(taps_of(inputs)) == 1 and "banded" in HEAD_KINDS[spec.kind].axes
        yield dataclasses.replace(spec, banded=False) if is_single else spec


def check_kinds(heads: Heads, task_kind: str, *, has_units: bool = False) -> None:
    """Raise RecipeError for heads that cannot do such a task."""
    for grid in heads.grids():
        kind = grid.head_kind
        if kind.takes_units and not has_units:
            raise RecipeError(
                f"heads.{kind.name}: {kind.name} heads predict units of several images, and the "
                "task names none: name their column, task.unit: patient, or take "
                f"heads.{kind.name} out"
            )
        if task_kind not in kind.tasks:
            able = [name for name, each_kind in HEAD_KINDS.items() if task_kind in each_kind.tasks]
            raise RecipeError(
                f"heads.{kind.name}: {kind.name} heads predict "
                f"{' or '.join(_OUTPUTS[task] for task in kind.tasks)}, and task.kind is "
                f"{task_kind}. Take {kind.name} out of the recipe; heads that can do this task: "
                f"{', '.join(able)}"
            )
        if isinstance(grid, SklearnGrid) and grid.estimator.partition(".")[0] in (
            "sklearn",
            grid.estimator,  # a name without a dot, which make_estimator refuses
        ):
            # Estimators of other packages are imported only when they are trained.
            from headrace.heads.sklearn.bank import make_estimator

            for specs in grid.spec_banks():
                for spec in specs:
                    assert isinstance(spec, SklearnSpec)
                    make_estimator(spec)


def side_columns_note(heads: Heads) -> list[str]:
    """Return a note on kinds of head in the recipe that do not read side columns, if any."""
    kinds = {grid.head_kind.name: grid.head_kind for grid in heads.grids()}
    unable = [name for name, kind in kinds.items() if not kind.takes_side_columns]
    if not unable:
        return []
    able = [kind.name for kind in HEAD_KINDS.values() if kind.takes_side_columns]
    return [
        f"side columns are no input of {', '.join(unable)} heads; those that read them: "
        f"{', '.join(able)}"
    ]


def _halving(grid: HeadGrid) -> Halving | None:
    section = grid.halving if isinstance(grid, HalvingGrid) else None
    return None if section is None else Halving(after=section.after, keep=section.keep)


def _expand(grid: HeadGrid, names: Sequence[str], *, side_columns: bool) -> list[tuple[str, ...]]:
    all_inputs = _taps(grid.inputs, names, maps=grid.head_kind.spatial)
    if side_columns and grid.head_kind.takes_side_columns:
        return [inputs for taps in all_inputs for inputs in (taps, (*taps, SIDE_COLUMNS))]
    return all_inputs


def _taps(
    inputs: Sequence[HeadInput], names: Sequence[str], *, maps: bool
) -> list[tuple[str, ...]]:
    # Convolution heads read maps and nothing else; for other heads each position would be features
    # more.
    suited = [name for name in names if name.endswith(".map") == maps]
    if not suited and {"each", "all"} & {item for item in inputs if isinstance(item, str)}:
        names_text = ", ".join(names)
        raise RecipeError(
            (
                "heads.conv needs a tap with its positions kept, such as layer3.map; the taps are "
                f"{names_text}"
            )
            if maps
            else f"the taps {names_text} keep their positions, which makes very wide inputs: add "
            f"reduced ones, such as {names[0].removesuffix('.map')}.avg, or name these under "
            "`inputs`"
        )
    taps_of_inputs: list[tuple[str, ...]] = []
    for item in inputs:
        if item == "each":
            taps_of_inputs += [(name,) for name in suited]
        elif item == "all":
            taps_of_inputs.append(tuple(suited))
        else:
            taps_of_inputs.append(tuple(_known(name, names) for name in item))
    return list(dict.fromkeys(taps_of_inputs))


def _known(name: str, names: Sequence[str]) -> str:
    if name in names:
        return name
    if name == SIDE_COLUMNS:
        raise RecipeError(
            "heads: inputs names 'side_columns': with task.side_columns every input is tried with "
            "and without them, so that it is left out here"
        )
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    raise RecipeError(
        f"heads: inputs names {name!r}, which no backbone gives. {hint}There are: "
        f"{', '.join(names)}"
    )
