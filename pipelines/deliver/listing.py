"""The images that are named on the command line: folders, tables, archives, array files, single files."""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from headrace.extract import SourceError, list_array, list_folder, list_tar, read_table

_TABLES = (".csv", ".tsv", ".parquet", ".pq")
_ARRAYS = (".npy", ".npz", ".h5", ".hdf5", ".hdf")


def list_images(
    sources: Sequence[str | Path],
    *,
    path_column: str = "path",
    root: Path | None = None,
    array_key: str | None = None,
) -> pd.DataFrame:
    """One row per image, in the order given: `file`, as a person would name it, and `path`, a file or a locator.

    A folder's images are named by their path below it, behind the folder's own name; a table's as they stand in it; those
    of an archive or an array file by the file and their place in it. Raises SourceError for what is not there.
    """
    frames = [_list(str(source), path_column, root, array_key) for source in sources]
    return pd.concat(frames, ignore_index=True)


def _list(source: str, path_column: str, root: Path | None, array_key: str | None) -> pd.DataFrame:
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        if any(path.glob("*.tar")):
            return _named(list_tar(path))
        found = list_folder(path)
        return _named(found.assign(id=[f"{source.rstrip('/')}/{name}" for name in found["id"]]))
    if suffix == ".tar" or (suffix != "" and re.search(r"[*{].*\.tar$", source)):
        return _named(list_tar(source))
    if suffix in _TABLES:
        return _named(read_table(path, path_column=path_column, root=root))
    if suffix in _ARRAYS or (path.is_file() and re.search(r"idx\d|\.idx", path.name)):
        return _named(list_array(path, key=array_key))
    if not path.exists():
        raise SourceError(
            f"{path}: no such file or folder. Give image files, folders, tables (.csv, .tsv, .parquet with a column "
            f"{path_column!r}), .tar archives or array files (.npy, .npz, .h5)"
        )
    return pd.DataFrame({"file": [source], "path": [str(path.absolute())]})


def _named(found: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"file": found["id"].astype(str), "path": found["path"].astype(str)})
