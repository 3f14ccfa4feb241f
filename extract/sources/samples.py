"""Sources as data frames of samples, for notebooks; entries left out become a SourceWarning."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from headrace.extract.sources.archive import read_archives
from headrace.extract.sources.array import read_array
from headrace.extract.sources.folder import read_folder
from headrace.extract.sources.layout import Layout
from headrace.extract.sources.read import warn_about_left_out
from headrace.extract.sources.tabular import TableOptions, read_tables


def list_folder(
    folder: str | Path, *, layout: Layout = "auto", exclude: Sequence[str] = ()
) -> pd.DataFrame:
    """Return `read_folder`'s samples: columns `id`, `path`, `label`, and perhaps `split`."""
    listing = read_folder(folder, layout=layout, exclude=exclude)
    warn_about_left_out(listing, folder)
    return listing.samples


def list_tar(
    archives: str | Path | Sequence[str | Path], *, layout: Layout = "auto"
) -> pd.DataFrame:
    """Return `read_archives`' samples: columns `id`, `path` (a locator), `label`, then others."""
    listing = read_archives(archives, layout=layout)
    warn_about_left_out(listing, str(archives))
    return listing.samples


def list_array(
    images: str | Path,
    *,
    key: str | None = None,
    labels: str | Path | None = None,
    labels_key: str | None = None,
) -> pd.DataFrame:
    """Return `read_array`'s samples: columns `id`, `path` (a locator) and `label`."""
    return read_array(images, key=key, labels=labels, labels_key=labels_key).samples


def read_table(
    table: str | Path,
    *,
    path_column: str | None = None,
    id_column: str | None = None,
    root: str | Path | None = None,
    path_pattern: str | None = None,
) -> pd.DataFrame:
    """Return `read_tables`' samples: columns `id`, `path`, then those of the table."""
    listing = read_tables(table, TableOptions(path_column, id_column, root, path_pattern))
    warn_about_left_out(listing, table)
    return listing.samples
