"""From sections to one HTML file that needs nothing else: no server, no network, no script but its
own.

Everything that comes from users' data is escaped by Jinja or by JSON; the page's policy allows one
script, by its hash.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from headrace.pipelines.number_format import bytes_text
from headrace.pipelines.report.blocks import Column, Format, Headline, Note, Section, Table, plain

# A table of at most so many columns stands beside another on a wide screen.
_NARROW = 7
# A page with more rows than this in one table would be slow to open; all of them are in the files
# of `--tables`.
MAX_ROWS = 20_000
_NONE = "–"


def render(title: str, made: str, headline: Headline, sections: Sequence[Section]) -> str:
    """The page. made: one line that says when, by what and from what."""
    style, script = _asset("report.css"), _asset("report.js")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    warnings = [
        (section, block)
        for section in sections
        for block in section.blocks
        if isinstance(block, Note) and block.kind == "warning"
    ]
    return environment.from_string(_asset("page.html.j2")).render(
        title=title,
        made=made,
        headline=headline,
        sections=sections,
        warnings=warnings,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        table=_TableView,
        safe=Markup,
        kind=lambda block: type(block).__name__,
    )


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else plain(value)


class _TableView:
    """A table as the template and the script see it: values as JSON knows them, written alike by
    both.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.columns = table.columns
        self.total = len(table.frame)
        self.values = [_values(table, column) for column in table.columns]
        self.rows = len(self.values[0]) if self.values else 0
        self.interactive = table.sortable and self.rows > 1
        self.paged = self.interactive and self.rows > table.page
        self.narrow = len(self.columns) <= _NARROW and not (
            table.wide or table.search or table.filters
        )
        # Small tables are sorted too, but need no filter and no pages.
        self.tools = self.paged or (
            self.rows > 8 and bool(table.filters or table.search or table.switch)
        )

    def first_rows(self) -> list[list[str]]:
        """The cells that stand in the page before its script runs, and without it."""
        shown = range(min(self.rows, self.table.page) if self.paged else self.rows)
        return [
            [
                cell(values[row], column.format)
                for values, column in zip(self.values, self.columns, strict=True)
            ]
            for row in shown
        ]

    def shares(self) -> list[list[float]]:
        """Of each row's numbers in its sum, for shading; the first column is the row's name."""
        numbers = np.array(self.values[1:], float).T
        sums = numbers.sum(1, keepdims=True)
        return np.round(numbers / np.where(sums > 0, sums, 1), 4).tolist()  # type: ignore[no-any-return]

    def data(self) -> Markup:
        """The rows for the script, safe inside a <script> element."""
        switch = self.table.switch
        content = {
            "columns": [
                {"name": column.name, "title": plain(column.title), "format": column.format}
                for column in self.columns
            ],
            "values": [_packed(values) for values in self.values],
            "rows": self.rows,
            "total": self.total,
            "page": self.table.page,
            "filters": list(self.table.filters) if self.tools else [],
            "search": self.table.search and self.tools,
            "switch": (
                {
                    "label": plain(switch[1]),
                    "rows": np.flatnonzero(
                        self.table.frame[switch[0]].to_numpy()[: self.rows]
                    ).tolist(),
                }
                if switch and self.tools
                else None
            ),
            "marked": sorted(self.table.marked),
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return Markup(
            text.replace("&", "\\u0026")
            .replace("<", "\\u003c")
            .replace(">", "\\u003e")
            .replace("\u2028", "\\u2028")
            .replace("\u2029", "\\u2029")
        )


def cell(value: Any, format: Format) -> str:
    """A value as it is written; `report.js` has the same rules."""
    if value is None:
        return _NONE
    if format == "count":
        return f"{int(value):,}"
    if format == "share":
        return f"{_fixed(value * 100, 2)} %"
    if format == "seconds":
        return _fixed(value, 1 if abs(value) >= 100 else 2)
    if format == "bytes":
        return bytes_text(value)
    if format == "number":
        size = abs(value)
        if size and (size < 1e-3 or size >= 1e9):
            return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.2e}")
        return _fixed(value, 1 if size >= 1000 else 4)
    if format == "yes":
        return "yes" if value else "no"
    return str(value)


def numeric(column: Column) -> bool:
    """Whether the column's cells stand on the right."""
    return column.format not in ("text", "yes")


def _fixed(value: float, digits: int) -> str:
    # As JavaScript's toFixed: the double's exact value, ties away from zero.
    return f"{Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):,}"


def _values(table: Table, column: Column) -> list[Any]:
    values = table.frame[column.name].tolist()[:MAX_ROWS]
    if column.format == "text":
        return [None if value is None or value != value else plain(value) for value in values]
    if column.format == "yes":
        return [bool(value) for value in values]
    return [_number(value, column.format) for value in values]


def _number(value: Any, format: Format) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    # Six digits are more than any cell shows, and half as many bytes.
    return int(value) if format in ("count", "bytes") else float(f"{value:.6g}")


def _packed(values: list[Any]) -> Any:
    """Texts that repeat are written once, with their numbers."""
    if not values or not isinstance(values[0], str) or None in values:
        return values
    words = list(dict.fromkeys(values))
    if len(words) * 2 > len(values):
        return values
    number = {word: place for place, word in enumerate(words)}
    return {"words": words, "codes": [number[value] for value in values]}


@cache
def _asset(name: str) -> str:
    return (files("headrace.pipelines.report") / name).read_text(encoding="utf-8")
