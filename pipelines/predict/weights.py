"""The table of weights beside a table of images: OUT.weights.csv, what each image weighs in the
prediction of its unit; unit by unit, the weightiest first.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.pipelines.models.cached_model import find_cached_model
from headrace.pipelines.models.model import Model
from headrace.pipelines.predict.cached import known_contents
from headrace.pipelines.predict.parts import file_keys, part_slices
from headrace.pipelines.predict.units import write_unit_table

_IMAGES = 8192  # whose features are in memory at a time


def weights_path(table_path: Path) -> Path:
    """Return where the table of weights lies that belongs to a table of images."""
    return table_path.with_name(f"{table_path.stem}.weights{table_path.suffix}")


def write_weights(
    model: Model,
    images: pd.DataFrame,
    units: npt.NDArray[np.str_],
    cache_root: Path,
    path: Path,
    table_format: str,
) -> int:
    """Write the table for the units all of whose images have features in a cache; return how many
    units have some that lack them. An image that a unit has twice counts once.

    images: columns `file` and `path`. units: (N,) of each. The model is one head that pools units.
    """
    is_first = ~images.assign(unit=units).duplicated(["path", "unit"]).to_numpy()
    images, units = images[is_first], units[is_first]
    cached_model = find_cached_model(model, cache_root)
    hashes = known_contents(file_keys(images["path"].tolist()), cache_root)
    has_features = np.zeros(len(images), np.bool_)
    has_failed = hashes == b""  # a file that cannot be read
    if cached_model is not None:
        has_features = cached_model.has_features(hashes)
        has_failed |= np.isin(hashes, np.array(sorted(cached_model.failures), "S32"))
    lacking = np.unique(units[~(has_features | has_failed)])
    rows = np.flatnonzero(~np.isin(units, lacking) & has_features)
    rows = rows[np.argsort(units[rows], kind="stable")]
    weights = np.empty(len(rows), np.float32)
    for block in part_slices(len(rows), _IMAGES, units[rows]):
        assert cached_model is not None
        block_rows = rows[block]
        weights[block] = cached_model.instance_weights(hashes[block_rows], units[block_rows])
    table = pd.DataFrame(
        {"unit": units[rows], "file": images["file"].to_numpy()[rows], "weight": weights}
    ).sort_values(["unit", "weight"], ascending=[True, False], kind="stable", ignore_index=True)
    write_unit_table(table, path, table_format)
    return len(lacking)
