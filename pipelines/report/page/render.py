"""Rendering of sections as one HTML file that needs nothing else: no server, no other file.

Everything that comes from users' data is escaped by Jinja or by JSON; the page's content security
policy allows one script, by its hash.
"""

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from headrace.pipelines.number_format import bytes_text
from headrace.pipelines.report.page.blocks import (
    Column,
    CurveSet,
    Format,
    Headline,
    Matrix,
    Note,
    PointMap,
    Section,
    Table,
    plain_text,
)
from headrace.pipelines.report.page.packing import packed, script_json

_NARROW = 7  # columns of a table that stands beside another on a wide screen
# More rows in one table would make the page slow to open; the files of `--tables` have all.
MAX_ROWS = 20_000
_MAX_SMALL_ROWS = 8
_NONE = "–"
_SCRIPTS = ("report.js", "pictures.js", "points.js", "curves.js", "matrix.js")


def render_page(title: str, byline: str, headline: Headline, sections: Sequence[Section]) -> str:
    """Return the page. byline: one line that says when, by what and from what."""
    style_text = _read_asset("report.css")
    script_text = f'"use strict";\n(() => {{\n{"".join(map(_read_asset, _SCRIPTS))}start();\n}})();'
    environment = Environment(
        autoescape=True,
        # By default a misspelt name would be an empty text on the page.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    warning_blocks = [
        (section, block)
        for section in sections
        for block in section.blocks
        if isinstance(block, Note) and block.kind == "warning"
    ]
    return environment.from_string(_read_asset("page.html.j2")).render(
        title=title,
        made=byline,
        headline=headline,
        sections=sections,
        warnings=warning_blocks,
        style=Markup(style_text),
        script=Markup(script_text),
        # The policy of the page runs the script of this hash, and no other.
        script_hash=base64.b64encode(hashlib.sha256(script_text.encode()).digest()).decode(),
        table=_TableView,
        prose=prose,
        map_data=_map_data,
        curve_data=_curve_data,
        matrix_data=_matrix_data,
        base64=lambda content: base64.b64encode(content).decode(),
        safe=Markup,
        kind=lambda block: type(block).__name__,
    )


def _finalize(value: Any) -> Any:
    # Every text that the template writes, except Markup, whose parts were made plain before.
    return value if isinstance(value, Markup) or not isinstance(value, str) else plain_text(value)


def prose(text: str) -> Markup:
    """Return a sentence as escaped HTML, with text in back-quotes set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(plain_text(text)))))


class _TableView:
    """A table as JSON values, for the template and for the script, which write them alike."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.total = len(table.frame)
        self.values = [_column_values(table, column) for column in table.columns]
        self.columns = [
            replace(column, format="small") if _needs_exponents(column, values) else column
            for column, values in zip(table.columns, self.values, strict=True)
        ]
        self.rows = len(self.values[0]) if self.values else 0
        self.interactive = table.sortable and self.rows > 1
        self.paged = self.interactive and self.rows > table.page
        self.narrow = len(self.columns) <= _NARROW and not (
            table.wide or table.search or table.filters
        )
        # Small tables are sorted too, but need no filter and no pages.
        self.tools = self.paged or (
            self.rows > _MAX_SMALL_ROWS and bool(table.filters or table.search or table.switch)
        )

    def first_rows(self) -> list[list[str]]:
        """Return the cells that the page shows before its script runs, or without it."""
        shown_rows = range(min(self.rows, self.table.page) if self.paged else self.rows)
        return [
            [
                format_cell(values[row], column.format)
                for values, column in zip(self.values, self.columns, strict=True)
            ]
            for row in shown_rows
        ]

    def shares(self) -> list[list[float]]:
        """Return each number's share of its row's sum, for shading; column 0 is the row's name."""
        cell_numbers = np.array(self.values[1:], float).T
        row_sums = cell_numbers.sum(1, keepdims=True)
        return np.round(cell_numbers / np.where(row_sums > 0, row_sums, 1), 4).tolist()  # type: ignore[no-any-return]

    def data(self) -> Markup:
        """Return the rows for the script, safe inside a <script> element."""
        row_switch = self.table.switch
        return script_json(
            {
                "name": self.table.name,
                "columns": [
                    {
                        "name": column.name,
                        "title": plain_text(column.title),
                        "format": column.format,
                    }
                    for column in self.columns
                ],
                "values": [_packed_words(values) for values in self.values],
                "rows": self.rows,
                "total": self.total,
                "page": self.table.page,
                "sortable": self.interactive,
                "filters": list(self.table.filters) if self.tools else [],
                "search": self.table.search and self.tools,
                "switch": (
                    {
                        "label": plain_text(row_switch[1]),
                        "rows": np.flatnonzero(
                            self.table.frame[row_switch[0]].to_numpy()[: self.rows]
                        ).tolist(),
                    }
                    if row_switch and self.tools
                    else None
                ),
                # JSON has no sets.
                "marked": sorted(self.table.marked),
            }
        )


def _map_data(block: PointMap) -> Markup:
    parts: dict[str, Any] = {"ids": block.ids}
    for position, layout in enumerate(block.layouts):
        parts[f"x{position}"] = np.ascontiguousarray(layout.places[:, 0])
        parts[f"y{position}"] = np.ascontiguousarray(layout.places[:, 1])
        if layout.rows is not None:
            parts[f"rows{position}"] = layout.rows
    for position, colouring in enumerate(block.colourings):
        parts[f"codes{position}"] = colouring.codes
    return script_json(
        {
            "name": block.name,
            "points": len(block.ids),
            "layouts": [plain_text(layout.title) for layout in block.layouts],
            "colourings": [
                {
                    "title": plain_text(colouring.title),
                    "words": list(map(plain_text, colouring.words)),
                    "low": colouring.low,
                    "high": colouring.high,
                }
                for colouring in block.colourings
            ],
            "packed": packed(parts),
        }
    )


def _curve_data(block: CurveSet) -> Markup:
    parts: dict[str, Any] = {}
    for position, curve in enumerate(block.curves):
        parts[f"thresholds{position}"] = curve.thresholds
        parts[f"found{position}"] = curve.true_positives
        parts[f"false{position}"] = curve.false_positives
    return script_json(
        {
            "chosen": block.chosen,
            "curves": [
                {
                    "name": plain_text(curve.name),
                    "positives": curve.positives,
                    "negatives": curve.negatives,
                    "auc": round(curve.auc, 6) if math.isfinite(curve.auc) else None,
                    "average_precision": round(curve.average_precision, 6)
                    if math.isfinite(curve.average_precision)
                    else None,
                }
                for curve in block.curves
            ],
            "packed": packed(parts),
        }
    )


def _matrix_data(block: Matrix) -> Markup:
    parts: dict[str, Any] = {"counts": block.counts.astype(np.uint32).ravel()}
    for position, (_, order) in enumerate(block.orders):
        parts[f"order{position}"] = order.astype(np.uint32)
    return script_json(
        {
            "classes": list(map(plain_text, block.classes)),
            "orders": [plain_text(title) for title, _ in block.orders],
            "packed": packed(parts),
        }
    )


def format_cell(cell_value: Any, format: Format) -> str:
    """Return a value as it is written on the page; `report.js` has the same rules."""
    if cell_value is None:
        return _NONE
    if format == "count":
        return f"{int(cell_value):,}"
    if format == "share":
        return f"{_fixed_point(cell_value * 100, 2)} %"
    if format == "seconds":
        return _fixed_point(cell_value, 1 if abs(cell_value) >= 100 else 2)
    if format == "bytes":
        return bytes_text(cell_value)
    if format == "small" or (format == "number" and abs(cell_value) >= 1e9):
        exponent_text = f"{cell_value:.2e}" if cell_value else "0"
        return re.sub(r"e([+-])0*(\d)", r"e\1\2", exponent_text)
    if format == "number":
        return _fixed_point(cell_value, 1 if abs(cell_value) >= 1000 else 4)
    if format == "yes":
        return "yes" if cell_value else "no"
    return str(cell_value)


def _fixed_point(value: float, digits: int) -> str:
    # As JavaScript's toFixed rounds, so that both write the same: the double's exact value, ties
    # away from zero. Without a "-0.0000".
    rounded = Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{rounded if rounded else abs(rounded):,}"


def _needs_exponents(column: Column, values: list[Any]) -> bool:
    """Return whether all numbers of a column are below 0.001: four digits would say 0.0000."""
    return column.format == "number" and 0 < max(map(abs, filter(None, values)), default=0) < 1e-3


def _column_values(table: Table, column: Column) -> list[Any]:
    column_values = table.frame[column.name].tolist()[:MAX_ROWS]
    if column.format == "text":
        return [
            None if value is None or value != value else plain_text(value)
            for value in column_values
        ]
    if column.format == "yes":
        return list(map(bool, column_values))
    return [_rounded_number(value, column.format) for value in column_values]


def _rounded_number(value: Any, format: Format) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    # Six digits are more than any cell shows, and half the bytes of all of them.
    return int(value) if format in ("count", "bytes") else float(f"{value:.6g}")


def _packed_words(column_values: list[Any]) -> Any:
    """Return texts that repeat as a list of distinct words and codes; other values unchanged."""
    if not column_values or not isinstance(column_values[0], str) or None in column_values:
        return column_values
    distinct_words = list(dict.fromkeys(column_values))
    # Words that hardly repeat, such as ids, would get longer by their codes.
    if len(distinct_words) * 2 > len(column_values):
        return column_values
    code_of_word = {word: word_code for word_code, word in enumerate(distinct_words)}
    return {"words": distinct_words, "codes": [code_of_word[value] for value in column_values]}


@cache
def _read_asset(name: str) -> str:
    return (files("headrace.pipelines.report.page") / name).read_text(encoding="utf-8")
