"""Sources as data frames of samples, for notebooks; entries left out become a SourceWarning.

Arguments are the fields of `ImageSource`. Each function raises SourceError as its reader does.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from headrace.extract.sources.layout import Layout
from headrace.extract.sources.read import read_source, warn_about_left_out
from headrace.extract.sources.source import ImageSource


def list_folder(
    folder: str | Path, *, layout: Layout = "auto", exclude: Sequence[str] = ()
) -> pd.DataFrame:
    """Return `read_folder`'s samples: columns `id`, `path`, `label`, and perhaps `split`."""
    listing = read_source(ImageSource("folder", folder, layout=layout, exclude=tuple(exclude)))
    warn_about_left_out(listing, folder)
    return listing.samples


def list_archives(
    archives: str | Path | Sequence[str | Path], *, layout: Layout = "auto"
) -> pd.DataFrame:
    """Return `read_archives`' samples: columns `id`, `path` (a locator), `label`, then others."""
    listing = read_source(ImageSource("archive", archives, layout=layout))
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
    source = ImageSource("array", images, array_key=key, labels=labels, labels_key=labels_key)
    # Not yet labelled: which values are black and white is said later, with the backbone.
    return read_source(source, labelled=False).samples


def read_table(
    table: str | Path,
    *,
    path_column: str | None = None,
    id_column: str | None = None,
    root: str | Path | None = None,
    path_pattern: str | None = None,
) -> pd.DataFrame:
    """Return `read_tables`' samples: columns `id`, `path`, then those of the table."""
    source = ImageSource(
        "table",
        table,
        path_column=path_column,
        id_column=id_column,
        root=root,
        path_pattern=path_pattern,
    )
    listing = read_source(source)
    warn_about_left_out(listing, table)
    return listing.samples
