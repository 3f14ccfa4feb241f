"""Cells that Hugging Face's `datasets` writes for images into CSV and JSON: bytes and path as text,
of which the path can be used.
"""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.extract.errors import SourceError

# The text of a Python dict. The bytes may have any characters, so that the path is read from its
# end; JSON has the dict itself.
_CELL = re.compile(r"\{'bytes': .*'path': (?:None|'([^']*)'|\"([^\"]*)\")\}", re.DOTALL)


def with_image_paths(frame: pd.DataFrame, table_path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return a table with the paths in such cells in their place, and a note for each such column.

    Raises SourceError where the cells have no path: text does not give the bytes back.
    """
    notes: list[str] = []
    for column_name in frame.columns:
        cells = frame[column_name]
        # One cell tells; every column of every table is looked at, and may have a million.
        if not _is_image_cell(next((cell for cell in cells if _is_value(cell)), None)):
            continue
        meaning = (
            f"{table_path.name}: the cells of {column_name!r} are images as `datasets` writes them "
            "into text, which does not give their bytes back"
        )
        cure = (
            "write the data set with its images, in Python: "
            f"dataset.to_parquet({table_path.name.split('.')[0] + '.parquet'!r})"
        )
        paths = cells.map(_path_in)
        if paths.isna().all():
            raise SourceError(f"{meaning}, and have no path. Instead, {cure}")
        frame = frame.assign(**{column_name: paths.astype(object)})
        notes.append(f"{meaning}; the paths in them are used. Where these lead nowhere, {cure}")
    return frame, notes


def _is_value(cell: Any) -> bool:
    return not (cell is None or cell == "" or cell != cell)


def _is_image_cell(cell: Any) -> bool:
    if isinstance(cell, dict):
        return set(cell) == {"bytes", "path"}
    return isinstance(cell, str) and cell.startswith("{'bytes': ")


def _path_in(cell: Any) -> str | None:
    if isinstance(cell, dict):
        return cell.get("path")
    match = _CELL.fullmatch(cell.strip()) if isinstance(cell, str) else None
    return match and (match[1] or match[2])
