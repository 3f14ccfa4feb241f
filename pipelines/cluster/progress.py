"""Display of progress: a bar on a terminal and in a notebook, otherwise lines of text or JSON."""

import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from headrace.pipelines.console import PlainConsole

# On narrower terminals the bar is short, and the elapsed time and shares of work are left out.
_NARROW_COLUMNS = 110
_LOG_INTERVAL_S = 5.0  # between lines of a log, so that it stays short
_NOTEBOOK_INTERVAL_S = 0.25  # a notebook's line is overwritten, so it can be more often
# For this long after the first results, more of them say nothing about the rate: workers that began
# together end together.
_SETTLED_S = 3.0


class Advance(Protocol):
    """A function that a stage calls when `count` more things are done. details: shown beside."""

    def __call__(self, count: int, details: Mapping[str, float] | None = None) -> None: ...


class _RateColumn(ProgressColumn):
    """A column with the rate and the time left."""

    def render(self, task: Task) -> Text:
        meter: _Meter = task.fields["meter"]
        return Text(rate_text(*meter.rate_and_left(), unit=meter.unit))


def rate_and_left(n_done: float, n_total: float, elapsed_s: float) -> tuple[float, float]:
    """Return things per second, and seconds left at that rate; (0, nan) until something is done."""
    # nan, and not infinity: so far nothing at all is known of the time left.
    if not n_done or not elapsed_s:
        return 0.0, float("nan")
    rate = n_done / elapsed_s
    return rate, (n_total - n_done) / rate


def rate_text(rate_per_s: float, left_s: float, *, unit: str) -> str:
    """Return a text such as "12.3 images/s, 0:18 left"; "" if no rate is known."""
    if not rate_per_s:
        return ""
    left_text = "" if math.isnan(left_s) else f", {left_s // 60:.0f}:{left_s % 60:02.0f} left"
    return f"{rate_per_s:,.1f} {unit}/s{left_text}"


@dataclass
class _Meter:
    """How far a stage is, and its rate."""

    stage_name: str
    n_total: int
    unit: str
    n_done: int = 0
    started_s: float = field(default_factory=time.monotonic)
    n_first: int = 0  # things done when the first results came
    first_s: float | None = None  # and the time of that

    def add(self, count: int) -> None:
        self.n_done += count
        if self.first_s is None and self.n_done:
            self.n_first, self.first_s = self.n_done, time.monotonic()

    def rate_and_left(self) -> tuple[float, float]:
        now = time.monotonic()
        # The time until the first results, in which workers import modules and load networks, is
        # left out as soon as later results tell the rate.
        if self.first_s is not None and now - self.first_s > max(
            _SETTLED_S, 0.5 * (self.first_s - self.started_s)
        ):
            n_since = self.n_done - self.n_first
            rate, _ = rate_and_left(n_since, self.n_total, now - self.first_s)
            return rate, (self.n_total - self.n_done) / rate if rate else float("nan")
        return rate_and_left(self.n_done, self.n_total, now - self.started_s)

    def text(self, details: Mapping[str, float]) -> str:
        """Return a text such as "extract 10/80 images · 12.3 images/s, 0:18 left · 2 failed"."""
        texts = (
            f"{self.stage_name} {self.n_done:,}/{self.n_total:,} {self.unit}",
            rate_text(*self.rate_and_left(), unit=self.unit),
            _details_text(details),
        )
        return " · ".join(filter(None, texts))


@contextlib.contextmanager
def show_progress(console: Console, stage_name: str, n_total: int, unit: str) -> Iterator[Advance]:
    """Show the progress of a stage in the block, which calls the given function."""
    meter = _Meter(stage_name, n_total, unit)
    as_json = isinstance(console, PlainConsole) and console.json_progress
    if console.is_jupyter and not (console.quiet or as_json):
        yield _notebook_line(meter)
        sys.stderr.write("\n")
        return
    if as_json or not console.is_terminal:
        yield _log_lines(console, meter, as_json=as_json)
        return
    is_narrow = console.width < _NARROW_COLUMNS
    columns = (
        _text_column("{task.description:<8}"),
        BarColumn(bar_width=8 if is_narrow else 20),
        _text_column("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        *(() if is_narrow else (TimeElapsedColumn(),)),
        _RateColumn(Column(no_wrap=True)),
        _text_column("{task.fields[details]}", style="dim"),
    )
    # Rich's ten times a second would take time from a core that works on the stage.
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        progress_bar = progress.add_task(
            stage_name, total=n_total, unit=unit, details="", meter=meter
        )

        def advance(count: int, details: Mapping[str, float] | None = None) -> None:
            meter.add(count)
            shown = {
                name: value
                for name, value in (details or {}).items()
                if not (is_narrow and name.endswith("_share"))
            }
            progress.update(progress_bar, advance=count, details=_details_text(shown))

        yield advance


def _text_column(text: str, style: str = "none") -> TextColumn:
    return TextColumn(text, style=style, markup=False, table_column=Column(no_wrap=True))


def _details_text(details: Mapping[str, float]) -> str:
    """Return a text such as "decode 3 % · network 95 % · 2 failed", without counts of zero."""
    detail_texts = []
    for name, value in details.items():
        if name.endswith("_share"):
            detail_texts.append(f"{name.removesuffix('_share')} {value:.0%}")
        elif value:
            detail_texts.append(f"{value:,.0f} {name}")
    return " · ".join(detail_texts)


def _at_intervals(
    meter: _Meter, interval_s: float, shown_at: float, show: Callable[[Mapping[str, float]], None]
) -> Advance:
    """Return an Advance that calls `show` at most every interval_s, and at the end.

    shown_at: time of the monotonic clock that counts as the first call.
    """

    def advance(count: int, details: Mapping[str, float] | None = None) -> None:
        nonlocal shown_at
        meter.add(count)
        now = time.monotonic()
        if now - shown_at >= interval_s or meter.n_done >= meter.n_total:
            shown_at = now
            show(details or {})

    return advance


def _notebook_line(meter: _Meter) -> Advance:
    """Return an Advance that overwrites one line of the cell's standard error."""

    # Rich's own bar would need ipywidgets.
    def show(details: Mapping[str, float]) -> None:
        filled = "█" * (20 * meter.n_done // max(meter.n_total, 1))
        sys.stderr.write(f"\r|{filled:<20}| {meter.text(details):<100}")
        sys.stderr.flush()

    return _at_intervals(meter, _NOTEBOOK_INTERVAL_S, -math.inf, show)


def _log_lines(console: Console, meter: _Meter, *, as_json: bool) -> Advance:
    def show(details: Mapping[str, float]) -> None:
        line = f"{datetime.datetime.now():%H:%M:%S} {meter.text(details)}"
        console.print(_json_line(meter, details) if as_json else line, soft_wrap=True)

    return _at_intervals(meter, _LOG_INTERVAL_S, meter.started_s, show)


def _json_line(meter: _Meter, details: Mapping[str, float]) -> str:
    rate_per_s, left_s = meter.rate_and_left()
    values = {
        "stage": meter.stage_name,
        "done": meter.n_done,
        "total": meter.n_total,
        "unit": meter.unit,
        "per_s": rate_per_s,
        "left_s": left_s,
        **details,
    }
    for name, value in values.items():
        if isinstance(value, float):
            values[name] = None if math.isnan(value) else round(value, 3)  # JSON has no nan
    return json.dumps(values)
