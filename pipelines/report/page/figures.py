"""The charts: matplotlib's SVG with the page's CSS colours, to follow light and dark mode.

Each is drawn 360 pixels wide, the width of a telephone, and scales up from there.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headrace.heads.arrays import Doubles, Index
from headrace.pipelines.report.page.blocks import plain_text

WIDTH = 360  # CSS pixels
_MAX_POINTS = 3000  # of a scatter chart; more are counted in hexagons
_MAX_VECTOR_POINTS = 500  # more are drawn as one raster image, which keeps the page small
# Placeholder colours of the drawing, which `_svg_text` replaces by the page's CSS variables. The
# series' are Okabe and Ito's, which colour-blind people can tell apart; marks differ as well.
_INK, _MUTED, _RULE = "#010101", "#020202", "#030303"
_BOTH_SCHEMES = "#3b8ec4"
_SERIES = ("#040401", "#040402", "#040403", "#040404", "#040405", "#040406")
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)},
}
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = (0, (4, 3))  # lengths in points of dashes and of the gaps between them, from 0 on
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headrace",  # the same data give the same bytes
    "text.parse_math": False,  # a class called "$x" is no formula
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def series_color(series_index: int) -> str:
    """Return the placeholder colour of a series, counted from 0."""
    return _SERIES[series_index % len(_SERIES)]


def dot_chart(
    labels: Sequence[str],
    values_by_series: Mapping[str, Sequence[float]],
    errors_by_series: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
) -> str:
    """Return a chart of a line per label; on it a mark and an error bar per series (nan: none)."""
    with rc_context(_STYLE):
        n_series = len(values_by_series)
        legend_lines = (n_series + 2) // 3
        figure, axes = _make_axes(0.21 * len(labels) + 0.85 + 0.16 * legend_lines)
        for series_index, (series_name, series_values) in enumerate(values_by_series.items()):
            # Marks on one line stand above each other, so that equal values do not hide each other.
            shift = (series_index - (n_series - 1) / 2) * min(0.22, 0.6 / n_series)
            axes.errorbar(
                np.asarray(series_values, float),
                np.arange(len(labels)) + shift,
                xerr=np.nan_to_num(np.asarray(errors_by_series[series_name], float)),
                fmt=_MARKS[series_index % len(_MARKS)],
                color=series_color(series_index),
                markersize=4.5,
                elinewidth=1,
                label=series_name,
            )
        _label_lines(axes, labels, xlabel)
        if n_series > 1:
            figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1)
        return _svg_text(figure)


def bar_chart(
    labels: Sequence[str], lengths_by_part: Mapping[str, Sequence[float]], *, xlabel: str
) -> str:
    """Return a chart of one stacked bar per label."""
    with rc_context(_STYLE):
        figure, axes = _make_axes(0.2 * len(labels) + 0.9)
        bar_starts = np.zeros(len(labels))
        for series_index, (part_name, bar_lengths) in enumerate(lengths_by_part.items()):
            axes.barh(
                np.arange(len(labels)),
                bar_lengths,
                left=bar_starts,
                height=0.7,
                color=series_color(series_index),
                label=part_name,
            )
            bar_starts = bar_starts + np.asarray(bar_lengths, float)
        _label_lines(axes, labels, xlabel)
        if len(lengths_by_part) > 1:
            figure.legend(loc="outside upper left", ncols=3, columnspacing=1)
        return _svg_text(figure)


def reliability_chart(
    confidence: Doubles, share_right: Doubles, bin_counts: Index, count_label: str, series_name: str
) -> str:
    """Return a chart of the share right against confidence, by bin, and of the bins' counts."""
    with rc_context(_STYLE):
        # Not from pyplot, which would keep every figure in memory until it is closed.
        figure = Figure(figsize=(WIDTH / 72, 4.4), layout="constrained")
        axes, count_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot([0, 1], [0, 1], color=_MUTED, linestyle=_DASHES, linewidth=1, label="perfect")
        axes.plot(
            confidence,
            share_right,
            marker="o",
            color=series_color(0),
            linewidth=1.5,
            markersize=5,
            label=series_name,
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="share right")
        axes.legend(loc="upper left")
        count_axes.bar(confidence, bin_counts, width=0.045, color=series_color(0))
        count_axes.set(xlabel="predicted probability", ylabel=count_label, ylim=(0, None))
        for sub_axes in (axes, count_axes):
            sub_axes.tick_params(length=0)
        return _svg_text(figure)


def scatter_chart(
    true_values: Doubles, predicted_values: Doubles, *, xlabel: str, ylabel: str
) -> str:
    """Return a chart of predicted against true values; of many points, counts in hexagons."""
    with rc_context(_STYLE):
        figure, axes = _make_axes(4.0)
        lowest = float(min(true_values.min(), predicted_values.min()))
        highest = float(max(true_values.max(), predicted_values.max()))
        is_raster = len(true_values) > _MAX_VECTOR_POINTS
        # So many points would hide each other, and take long to draw in the browser.
        if len(true_values) > _MAX_POINTS:
            axes.hexbin(
                true_values,
                predicted_values,
                gridsize=40,
                bins="log",
                mincnt=1,
                cmap="cividis",
                rasterized=True,
            )
        else:
            axes.plot(
                true_values,
                predicted_values,
                "o",
                # CSS cannot recolour a raster: one colour that shows on light and on dark
                color=_BOTH_SCHEMES if is_raster else series_color(0),
                markersize=2.5,
                alpha=0.5,
                markeredgewidth=0,
                rasterized=is_raster,
            )
        axes.plot(
            [lowest, highest], [lowest, highest], color=_MUTED, linestyle=_DASHES, linewidth=1
        )
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.tick_params(length=0)
        return _svg_text(figure)


def learning_curve(measured: pd.DataFrame, extrapolated: pd.DataFrame) -> str:
    """Return a chart of the error in per cent against the images trained on: a line of what was
    measured, and a dashed one in a band.

    Columns: images and error; of `extrapolated` also low and high, the band. Errors are 0 to 1.
    """
    with rc_context(_STYLE):
        figure, axes = _make_axes(3.4)
        axes.plot(
            measured["images"],
            100 * measured["error"],
            marker=_MARKS[0],
            color=series_color(0),
            markersize=4,
            label="measured",
        )
        axes.plot(
            extrapolated["images"],
            100 * extrapolated["error"],
            linestyle=_DASHES,
            color=series_color(1),
            markersize=4,
            label="extrapolated",
        )
        axes.fill_between(
            extrapolated["images"],
            100 * extrapolated["low"],
            100 * extrapolated["high"],
            color=series_color(1),
            alpha=0.15,
            linewidth=0,
        )
        # Sizes grow by factors: evenly spaced, the small ones would lie on each other.
        axes.set_xscale("log")
        axes.set(xlabel="images trained on", ylabel="error (%)")
        axes.tick_params(length=0, which="both")
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1)
        return _svg_text(figure)


def _shorten(text: str) -> str:
    """Return the text; longer than 26 letters, with its middle left out."""
    # The middle, because names of taps differ at both ends: the backbone, and the layer.
    return text if len(text) <= 26 else f"{text[:13]}…{text[-12:]}"


def _label_lines(axes: Axes, labels: Sequence[str], xlabel: str) -> None:
    axes.set_yticks(np.arange(len(labels)), [_shorten(label) for label in labels])
    # The first label at the top, as in the table below the chart.
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", visible=False)
    axes.tick_params(length=0)


def _make_axes(height_inches: float) -> tuple[Figure, Axes]:
    # Matplotlib's 72 points to the inch become the pixels of the SVG's viewBox.
    figure = Figure(figsize=(WIDTH / 72, min(height_inches * 1.05, 30)), layout="constrained")
    return figure, figure.subplots()


def _svg_text(figure: Figure) -> str:
    """Return the figure as an `<svg>` element: unique ids, no fixed size, the page's colours."""
    svg_file = io.StringIO()
    with warnings.catch_warnings():
        # The browser draws the letters with its own font; matplotlib's only measures them, and may
        # lack some.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(
            svg_file,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg_text = plain_text(svg_file.getvalue())
    # Without the declaration of XML and the document type, which cannot stand inside HTML.
    svg_text = svg_text[svg_text.index("<svg") :]
    # Nothing but addresses of namespaces, in a page that promises to load nothing from the network.
    svg_text = re.sub(r"<metadata>.*?</metadata>", "", svg_text, flags=re.S)
    # The size is the page's, by its style sheet; the viewBox keeps the proportions.
    for name in ("height", "width"):
        svg_text = re.sub(rf'(<svg[^>]*?) {name}="[^"]*"', r"\1", svg_text, count=1)
    svg_text = _unique_ids(svg_text)
    for colour, variable in _VARIABLES.items():
        svg_text = svg_text.replace(colour, variable)
    # The page's font: a browser without matplotlib's would draw a serif one.
    svg_text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", svg_text)
    return svg_text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _unique_ids(svg_text: str) -> str:
    """Drop ids that nothing refers to, and make the others differ from those of other figures."""
    id_prefix = f"f{hashlib.sha256(svg_text.encode()).hexdigest()[:8]}-"
    # Clip paths and markers are referred to; matplotlib gives most other elements an id, too.
    used_ids = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', svg_text))
    svg_text = re.sub(
        r' id="([^"]+)"',
        lambda id_match: f' id="{id_prefix}{id_match[1]}"' if id_match[1] in used_ids else "",
        svg_text,
    )
    return re.sub(r'(xlink:href="#|url\(#)', rf"\1{id_prefix}", svg_text)
