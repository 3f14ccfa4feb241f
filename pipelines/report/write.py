"""Writing of a page and its tables, in place of an earlier report but of no other file."""

import datetime
import importlib.metadata
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from headrace.cache.atomic_io import publish_replace
from headrace.cache.integrity.garbage import remove_temporaries
from headrace.pipelines.errors import OutputExists
from headrace.pipelines.report.page.blocks import Headline, Section, Table, tables_of
from headrace.pipelines.report.page.render import render_page

_TITLE = "headrace report: "


@dataclass(frozen=True)
class Report:
    """The files that were written."""

    page: Path
    bytes: int
    tables: tuple[Path, ...]
    missing_images: int  # thumbnails whose image is gone or has changed


def write_page(
    page_path: Path,
    title: str,
    byline: str,
    headline: Headline,
    sections: tuple[Section, ...],
    *,
    tables: bool,
    missing_images: int,
) -> Report:
    """Publish the page and, if asked, its tables in a folder beside it.

    page_path: one that `require_ours` allows. byline: when, by what and from what it is written.
    """
    page_text = render_page(f"{_TITLE}{title}", byline, headline, sections)
    # Nothing is made for a page that could not be rendered.
    page_path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(page_path)
    page_exists = page_path.exists()
    # Whole or not at all: a call that is killed leaves the earlier page.
    publish_replace(page_path, page_text.encode("utf-8", "replace"))
    table_paths = (
        write_tables(page_path.with_name(f"{page_path.stem}-tables"), sections, replace=page_exists)
        if tables
        else ()
    )
    return Report(page_path, page_path.stat().st_size, table_paths, missing_images)


def written_text() -> str:
    """Return when a page is written, and by what."""
    now = datetime.datetime.now(datetime.UTC)
    return f"written {now:%Y-%m-%d %H:%M} UTC by headrace {importlib.metadata.version('headrace')}"


def require_ours(page_path: Path) -> None:
    """Raise OutputExists unless nothing, an empty file or an earlier report is there."""
    if not page_path.exists():
        return
    remedy = (
        f"Give another name with --out, such as {page_path.with_name('headrace-report.html')}, or "
        "move it away"
    )
    if not page_path.is_file():
        raise OutputExists(
            f"{page_path} is a folder, or no file of the disk; expected the name of a page. "
            f"{remedy}"
        )
    with page_path.open("rb") as page_file:
        # A page can have many megabytes, and its title is near the beginning.
        page_start = page_file.read(4096)
        if page_start and _TITLE.encode() not in page_start:
            raise OutputExists(
                f"{page_path} is there, and headrace report did not write it: it is not replaced. "
                f"{remedy}"
            )


def write_tables(
    folder: Path, sections: Sequence[Section], *, replace: bool = False
) -> tuple[Path, ...]:
    """Write every table as NAME.csv and NAME.parquet, and return the paths.

    replace: whatever has the name of a table is an earlier report's, and is replaced. Otherwise
    only a table with both files is: raises OutputExists, before anything is written, where one of
    the two is alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = tables_of(tuple(sections))
    # All of them before the first is written.
    for table_name in () if replace else tables:
        pair = [folder / f"{table_name}.{suffix}" for suffix in ("csv", "parquet")]
        existing = [path for path in pair if path.exists()]
        if len(existing) == 1:
            raise OutputExists(
                f"{existing[0]} is there, and headrace report did not write it: it is not "
                "replaced. Move it away"
            )
    table_paths = []
    for table_name, table in tables.items():
        table_frame = plain_frame(table)
        parquet_file = io.BytesIO()
        table_frame.to_parquet(parquet_file, index=False)
        for suffix, file_content in (
            ("csv", table_frame.to_csv(index=False).encode("utf-8", "replace")),
            ("parquet", parquet_file.getvalue()),
        ):
            table_path = folder / f"{table_name}.{suffix}"
            remove_temporaries(table_path)
            publish_replace(table_path, file_content)
            table_paths.append(table_path)
    return tuple(table_paths)


def plain_frame(table: Table) -> pd.DataFrame:
    """Return the table's columns, not rounded. A confusion matrix has its classes as headings."""
    names = [column.name for column in table.columns]
    if not table.shade:
        return table.frame[names]
    titles = [names[0], *(column.title for column in table.columns[1:])]
    return table.frame[names].set_axis(titles, axis=1)
