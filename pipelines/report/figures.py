"""The charts, drawn by matplotlib as SVG whose colours are the page's own, so that they follow
light and dark.

Each is drawn for 360 pixels of width, which a telephone has, and scales up from there.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headrace.pipelines.report.blocks import plain

WIDTH = 360  # CSS pixels
# Colours that stand in the drawing for the page's variables. Series are Okabe and Ito's, which
# colour-blind people tell apart; kinds differ by their mark as well.
_INK, _MUTED, _RULE = "#010101", "#020202", "#030303"
_SERIES = ("#040401", "#040402", "#040403", "#040404", "#040405", "#040406")
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)},
}
MARKS = ("o", "s", "^", "D", "v", "P", "X")
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


def series(number: int) -> str:
    """The colour of a series, from 0 on."""
    return _SERIES[number % len(_SERIES)]


def dots(
    labels: Sequence[str],
    values: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
) -> str:
    """One line per label, one mark per series on it, with a bar of ± its error; nan where a series
    has none.
    """
    with rc_context(_STYLE):
        figure, axes = _axes(0.21 * len(labels) + 0.85 + 0.16 * ((len(values) + 2) // 3))
        rows = np.arange(len(labels))
        for number, (name, points) in enumerate(values.items()):
            shift = (number - (len(values) - 1) / 2) * min(0.22, 0.6 / max(len(values), 1))
            axes.errorbar(
                np.asarray(points, float),
                rows + shift,
                xerr=np.nan_to_num(np.asarray(errors[name], float)),
                fmt=MARKS[number % len(MARKS)],
                color=series(number),
                markersize=4.5,
                elinewidth=1,
                label=name,
            )
        axes.set_yticks(rows, [shorten(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0)
        if len(values) > 1:
            figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1)
        return _svg(figure)


def bars(labels: Sequence[str], parts: Mapping[str, Sequence[float]], *, xlabel: str) -> str:
    """One bar per label, made of the parts."""
    with rc_context(_STYLE):
        figure, axes = _axes(0.2 * len(labels) + 0.9)
        left = np.zeros(len(labels))
        for number, (name, lengths) in enumerate(parts.items()):
            axes.barh(
                np.arange(len(labels)),
                lengths,
                left=left,
                height=0.7,
                color=series(number),
                label=name,
            )
            left = left + np.asarray(lengths, float)
        axes.set_yticks(np.arange(len(labels)), [shorten(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0)
        if len(parts) > 1:
            figure.legend(loc="outside upper left", ncols=3, columnspacing=1)
        return _svg(figure)


def reliability(
    confidence: npt.NDArray[np.float64],
    correct: npt.NDArray[np.float64],
    rows: npt.NDArray[np.int64],
    unit: str,
    who: str,
) -> str:
    """Share of right predictions against confidence, bin by bin, over the counts of the bins."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, 4.4), layout="constrained")
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot([0, 1], [0, 1], color=_MUTED, linestyle=(0, (4, 3)), linewidth=1, label="perfect")
        axes.plot(
            confidence, correct, marker="o", color=series(0), linewidth=1.5, markersize=5, label=who
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="share right")
        axes.legend(loc="upper left")
        counts.bar(confidence, rows, width=0.045, color=series(0))
        counts.set(xlabel="predicted probability", ylabel=unit, ylim=(0, None))
        for part in (axes, counts):
            part.tick_params(length=0)
        return _svg(figure)


def heat(shares: npt.NDArray[np.float64], *, xlabel: str, ylabel: str) -> str:
    """A matrix too large for a table: shares from 0 to 1 as colours."""
    with rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = _axes(4.2)
        shown = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(shown, ax=axes, shrink=0.7, label="share of the row")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        return _svg(figure)


def scatter(
    truth: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64], *, xlabel: str, ylabel: str
) -> str:
    """Predicted against true values; beyond a few thousand points, how many fall in each cell."""
    with rc_context(_STYLE):
        figure, axes = _axes(4.0)
        low, high = (
            float(min(truth.min(), predicted.min())),
            float(max(truth.max(), predicted.max())),
        )
        if len(truth) > 3000:
            axes.hexbin(
                truth, predicted, gridsize=40, bins="log", mincnt=1, cmap="cividis", rasterized=True
            )
        else:
            axes.plot(
                truth,
                predicted,
                "o",
                color=series(0),
                markersize=2.5,
                alpha=0.5,
                markeredgewidth=0,
                rasterized=len(truth) > 500,
            )
        axes.plot([low, high], [low, high], color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.tick_params(length=0)
        return _svg(figure)


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    dashed: Sequence[str] = (),
    xlabel: str,
    ylabel: str,
    log: bool = True,
) -> str:
    """Lines over x, each with a band (low, high) where one is given; the `dashed` ones are
    extrapolated.
    """
    with rc_context(_STYLE):
        figure, axes = _axes(3.4)
        for number, (name, (x, y)) in enumerate(lines.items()):
            style = (0, (4, 3)) if name in dashed else "-"
            mark = "" if name in dashed else MARKS[number % len(MARKS)]
            axes.plot(
                x, y, linestyle=style, marker=mark, color=series(number), markersize=4, label=name
            )
            if name in bands:
                axes.fill_between(x, *bands[name], color=series(number), alpha=0.15, linewidth=0)
        if log:
            axes.set_xscale("log")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.tick_params(length=0, which="both")
        if len(lines) > 1:
            figure.legend(loc="outside upper left", ncols=2, columnspacing=1)
        return _svg(figure)


def shorten(text: str, length: int = 26) -> str:
    """The text with its middle left out where it is longer than `length`."""
    return (
        text
        if len(text) <= length
        else f"{text[: length // 2]}…{text[len(text) - length // 2 + 1 :]}"
    )


def _axes(inches: float) -> tuple[Figure, Axes]:
    # 72 points of matplotlib's to the inch are the pixels of the viewBox.
    figure = Figure(figsize=(WIDTH / 72, min(inches * 1.05, 30)), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    """The figure as an `<svg>` element for a page: no ids that another figure has, no fixed size,
    the page's colours.
    """
    stored = io.StringIO()
    with warnings.catch_warnings():
        # The letters are the browser's own: matplotlib's font measures them, and need not have them
        # all.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(
            stored,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = plain(stored.getvalue())
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
    text = _own_ids(text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", text)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _own_ids(text: str) -> str:
    """Only ids that something refers to stay, and they are unlike those of every other figure."""
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(
        r' id="([^"]+)"',
        lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "",
        text,
    )
    return re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}", text)
