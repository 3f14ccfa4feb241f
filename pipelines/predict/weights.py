"""The table of image weights beside a table of images, OUT.weights.csv: the weight of each image in
the prediction of its unit, sorted by unit and falling weight.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd


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
