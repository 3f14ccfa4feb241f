"""The table of units beside a table of images, OUT.units.csv: a row per patient, slide or sequence.

unit            as the images' table names it
images, failed  how many of its images were used, and how many could not be

Then class, probability and p_<class>, for regression the values, as in the table of images; empty
where none of its images could be used. For a model that predicts units whole, OUT.weights.csv has
the weight of each image in the prediction of its unit, sorted by unit and falling weight.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.heads.data.task import TaskKind
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.console import valid_text
from headrace.pipelines.predict.tables import outcome_columns


@dataclass(frozen=True)
class UnitNames:
    """The units of N images, and the rule that predicts them."""

    rule: UnitRule
    names: npt.NDArray[np.object_]  # (N,) the unit of each image, None for an image without one

    @property
    def digest(self) -> str:
        """24 hex digits of a hash of names and rule."""
        # Names may come from files whose names are no UTF-8.
        text = json.dumps([vars(self.rule), self.names.tolist()])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def units_path(table_path: Path) -> Path:
    """Return the path of the table of units of a table of images."""
    return table_path.with_name(f"{table_path.stem}.units{table_path.suffix}")


def unit_table(
    units: UnitNames,
    probabilities: npt.NDArray[np.float32],
    task_kind: TaskKind,
    classes: tuple[str, ...],
) -> pd.DataFrame:
    """Return the table of units, in the order of their first images.

    probabilities: (N, C) of the images, nan for images that failed. Images without a unit are left
    out.
    """
    unit_of_row, names = pd.factorize(units.names)
    has_unit = unit_of_row >= 0
    is_used = has_unit & ~np.isnan(probabilities).any(1)
    n_images = np.bincount(unit_of_row[has_unit], minlength=len(names))
    n_used = np.bincount(unit_of_row[is_used], minlength=len(names))
    predicted = np.full((len(names), len(classes)), np.nan, np.float32)
    used_units, unit_of_used = np.unique(unit_of_row[is_used], return_inverse=True)
    if len(used_units):
        predicted[used_units] = units.rule.predict(task_kind, probabilities[is_used], unit_of_used)
    columns = {
        "unit": np.array([valid_text(str(name)) for name in names], object),
        "images": n_used,
        "failed": n_images - n_used,
    }
    table = pd.DataFrame(outcome_columns(columns, predicted, task_kind, classes))
    # The class of a row of nan would be the first one.
    table.loc[n_used == 0, table.columns[3:]] = None
    return table


def weights_path(table_path: Path) -> Path:
    """Return the path of the table of image weights of a table of images."""
    return table_path.with_name(f"{table_path.stem}.weights{table_path.suffix}")


def weight_table(
    images: pd.DataFrame, units: npt.NDArray[np.str_], weights: npt.NDArray[np.float32]
) -> pd.DataFrame:
    """Return the table, columns unit, file, weight. An image that a unit has twice counts once.

    images: columns `file` and `path`. units, weights: (N,) of each; nan where it could not be used.
    """
    table = images[["file", "path"]].assign(unit=units, weight=weights).dropna(subset="weight")
    table = table.drop_duplicates(["path", "unit"])[["unit", "file", "weight"]]
    return table.sort_values(
        ["unit", "weight"], ascending=[True, False], kind="stable", ignore_index=True
    )


def write_unit_table(table: pd.DataFrame, path: Path, table_format: str) -> None:
    """Write the table as csv, parquet or jsonl."""
    if table_format == "parquet":
        table.to_parquet(path, index=False)
    elif table_format == "jsonl":
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        table.to_csv(path, index=False)


def is_unit_table(path: Path) -> bool:
    """Return whether a file is empty or begins as a table by `write_unit_table`."""
    with path.open("rb") as file:
        beginning = file.read(16)
    if beginning.startswith(b"PAR1"):
        try:
            return pq.read_schema(path).names[:2] in (["unit", "images"], ["unit", "file"])
        except pa.ArrowException:
            return False
    return not beginning or beginning.startswith((b"unit,images,", b"unit,file,", b'{"unit":'))
