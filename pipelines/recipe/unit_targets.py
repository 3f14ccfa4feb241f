"""Targets of units: that of all their images or, where these differ, as `task.unit_label` says.

N images, U units, C outputs.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.pipelines.recipe.sections import TaskSection
from headrace.pipelines.recipe.targets import DataError, name_some


def unit_targets(
    ids: pd.Series,
    target: npt.NDArray[Any],
    classes: tuple[str, ...],
    unit_names: pd.Series,
    section: TaskSection,
) -> tuple[npt.NDArray[Any], list[str]]:
    """Return the target of each row's unit, in the shape of `target`, (N,) or (N, C), and notes on
    units whose images have different targets.

    Raises DataError, which names such units, if `task.unit_label` is "same".
    """
    unit_of_row, units = pd.factorize(unit_names)
    columns = target.reshape(len(target), -1)
    by_unit = pd.DataFrame(columns).groupby(unit_of_row)
    differs = (by_unit.nunique() > 1).any(axis=1).to_numpy()
    # Then it does not matter how images of a unit are combined.
    if not differs.any():
        return target, []
    if section.unit_label == "same":
        raise DataError(_refusal(ids, columns, classes, unit_of_row, units, differs, section))
    notes = [
        f"{int(differs.sum()):,} of {count_text(len(units), 'value')} of {section.unit!r} have "
        f"images with different targets, and count as task.unit_label says: {section.unit_label}"
    ]
    if section.unit_label != "majority":
        values = by_unit.max() if section.unit_label == "any" else by_unit.mean()
        return values.to_numpy(target.dtype)[unit_of_row].reshape(target.shape), notes
    if section.kind == "multi":
        # Half of the images is enough: labels are more often forgotten than given wrongly.
        return (by_unit.mean() >= 0.5).to_numpy(target.dtype)[unit_of_row], notes
    counts = np.zeros((len(units), len(classes)), np.int64)
    np.add.at(counts, (unit_of_row, target), 1)
    is_tied = (counts == counts.max(1, keepdims=True)).sum(1) > 1
    if is_tied.any():
        notes.append(
            f"{int(is_tied.sum()):,} of them have as many images of one class as of another, and "
            f"count as the first of these: {name_some([str(unit) for unit in units[is_tied]])}"
        )
    return counts.argmax(1)[unit_of_row], notes


def _refusal(
    ids: pd.Series,
    columns: npt.NDArray[Any],
    classes: tuple[str, ...],
    unit_of_row: npt.NDArray[np.intp],
    units: pd.Index,
    differs: npt.NDArray[np.bool_],
    section: TaskSection,
) -> str:
    first_unit = int(differs.argmax())
    rows = np.flatnonzero(unit_of_row == first_unit)
    # Two images that differ, so that a person can look at both.
    other_row = rows[(columns[rows] != columns[rows[0]]).any(1).argmax()]

    def text(row: np.intp) -> str:
        if section.kind == "single":
            return classes[int(columns[row, 0])]
        if section.kind == "multi":
            return " and ".join(np.asarray(classes)[columns[row] != 0]) or "no label"
        return " / ".join(f"{value:g}" for value in columns[row])

    ways = {"single": ("majority",), "multi": ("majority", "any"), "regression": ("mean",)}
    advice = " or ".join(f"task.unit_label: {way}" for way in ways[section.kind])
    names = name_some([repr(str(unit)) for unit in units[differs]])
    return (
        f"the images of one {section.unit} have one target, and {int(differs.sum()):,} of "
        f"{len(units):,} have several: {names}. {ids.iloc[rows[0]]!r} is {text(rows[0])}, "
        f"{ids.iloc[other_row]!r} of the same {section.unit} is {text(other_row)}. Mend their "
        f"labels, or say which counts: {advice}"
    )
