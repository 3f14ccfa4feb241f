"""The parts of a page as plain values: sections of tables, figures, pictures and remarks.

Nothing here is HTML.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.heads.arrays import Floats, Index

# Characters that XML forbids or that mislead a reader: control characters, lone surrogates, and
# marks that reverse the order of text.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]"
)
# How a number is written: `render.py` and `report.js` know these, and write them alike. A "number"
# has four digits; "small" has an exponent, and is what a column of numbers below 0.001 becomes.
Format = Literal["text", "count", "share", "number", "small", "seconds", "bytes", "yes"]


@dataclass(frozen=True)
class Column:
    """One column of a table: its name in the frame, its heading, and how its values are written."""

    name: str
    title: str
    format: Format = "text"
    hint: str = ""  # what the heading means, where that is not plain


@dataclass(frozen=True)
class Table:
    """A table of the page; the same frame goes to `NAME.csv` and `NAME.parquet`."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    frame: pd.DataFrame
    filters: tuple[str, ...] = ()  # columns with a choice above the table
    # a column of yes and no, and the words of the tick box that keeps the yes
    switch: tuple[str, str] | None = None
    search: bool = False
    sortable: bool = True
    page: int = 10  # rows shown at a time, where the table is sortable
    wide: bool = False  # never beside another, however few columns it has
    # "rows": cells are shaded by their share of the row's sum (a confusion matrix)
    shade: str | None = None
    marked: frozenset[int] = frozenset()  # positions of rows that are drawn with an edge


def make_table(name: str, caption: str, values: Mapping[Column, Any], **options: Any) -> Table:
    """Return a table of the values of each column. options: further fields of `Table`."""
    frame = pd.DataFrame({column.name: cells for column, cells in values.items()})
    return Table(name, caption, tuple(values), frame, **options)


@dataclass(frozen=True)
class Figure:
    """A chart, its words for those who cannot see it, and the numbers behind it."""

    svg: str
    alt: str
    caption: str
    table: Table | None = None


@dataclass(frozen=True)
class Picture:
    """One image, or two to compare, with what is to be said of it."""

    images: tuple[str | None, ...]  # data URIs; None where the image is not there
    alt: tuple[str, ...]
    title: str
    lines: tuple[tuple[str, str], ...]  # what, value
    paths: tuple[str, ...] = ()  # the file of each image; "" where it is not known


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, the most interesting first."""

    caption: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Headline:
    """The few figures that stand in large letters at the top: label, value, remark."""

    values: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Note:
    """A remark; a warning is one that changes what the numbers mean."""

    text: str
    kind: Literal["note", "warning", "good"] = "note"


@dataclass(frozen=True)
class Code:
    """Text as it is, to be read or copied."""

    title: str
    text: str


@dataclass(frozen=True)
class Layout:
    """The places of a map's points by one method: (n, 2) uint16, x and y, y upwards.

    rows: (n,) the points that have a place, None for all of them.
    """

    title: str
    places: npt.NDArray[np.uint16]
    rows: npt.NDArray[np.uint32] | None = None


@dataclass(frozen=True)
class Colouring:
    """A column that points can be coloured by: a word or a number for each point."""

    title: str
    # (N,) positions in `words`, or steps from `low` to `high`; NO_VALUE where there is none
    codes: npt.NDArray[np.uint16]
    words: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0


NO_VALUE = 65_535  # in the codes of a colouring
STEPS = 65_534  # the code of a colouring's `high`


@dataclass(frozen=True)
class PointMap:
    """N images as points, to colour, to hover over and to select."""

    name: str
    caption: str
    layouts: tuple[Layout, ...]
    colourings: tuple[Colouring, ...]
    ids: tuple[str, ...]
    pictures: tuple[bytes | None, ...] = ()  # a small WebP file of each point, or nothing at all


@dataclass(frozen=True)
class Curve:
    """One class against the rest, at each of T thresholds, highest first.

    true_positives, false_positives: (T,) images with a score at or above the threshold.
    """

    name: str
    thresholds: Floats
    true_positives: npt.NDArray[np.uint32]
    false_positives: npt.NDArray[np.uint32]
    positives: int
    negatives: int
    auc: float
    average_precision: float


@dataclass(frozen=True)
class CurveSet:
    """ROC and precision-recall curves with a threshold to move, a class at a time."""

    name: str
    caption: str
    curves: tuple[Curve, ...]
    chosen: int = 0  # the curve that is shown first


@dataclass(frozen=True)
class Matrix:
    """Counts of C classes against each other, to walk over: rows are what the label says."""

    name: str
    caption: str
    classes: tuple[str, ...]
    counts: Index  # (C, C)
    orders: tuple[tuple[str, Index], ...]  # names of orders, and (C,) the classes


Block = Table | Figure | Gallery | Facts | Headline | Note | Code | PointMap | CurveSet | Matrix


@dataclass(frozen=True)
class Section:
    """A part of the page, in its table of contents."""

    id: str
    title: str
    lead: str
    blocks: tuple[Block, ...] = field(default_factory=tuple)


def tables_of(sections: tuple[Section, ...]) -> Mapping[str, Table]:
    """Every table of the page by its name, those behind figures included."""
    tables_by_name: dict[str, Any] = {}
    for section in sections:
        for block in section.blocks:
            table = block.table if isinstance(block, Figure) else block
            if isinstance(table, Table):
                tables_by_name[table.name] = table
    return tables_by_name


def plain_text(text: object) -> str:
    """Return text in which characters that cannot be shown become U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", str(text))
