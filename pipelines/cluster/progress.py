"""Progress for people (a live view) and for machines (lines of JSON where there is no terminal),
from the same calls.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

# Without a terminal: a line at most this often, so that a log stays short.
_LOG_INTERVAL_S = 5.0


class Advance(Protocol):
    """What a stage's block calls: how many things were just done, and what else is
    worth showing.
    """

    def __call__(self, count: int, details: Mapping[str, float] | None = None) -> None: ...


class _RateColumn(ProgressColumn):
    """Things per second since the stage began, and the time left at that rate."""

    def render(self, task: Task) -> Text:
        rate_per_s, left_s = rate_and_left(task.completed, task.total or 0, task.elapsed or 0.0)
        return Text(
            (
                f"{rate_per_s:,.1f} {task.fields['unit']}/s, "
                f"{left_s // 60:.0f}:{left_s % 60:02.0f} left"
            )
            if rate_per_s
            else ""
        )


def rate_and_left(n_done: float, n_total: float, elapsed_s: float) -> tuple[float, float]:
    """Return things per second, and seconds left at that rate; (0, nan) until something is done."""
    if not n_done or not elapsed_s:
        return 0.0, float("nan")
    rate = n_done / elapsed_s
    return rate, (n_total - n_done) / rate


@contextlib.contextmanager
def show_progress(console: Console, stage_name: str, n_total: int, unit: str) -> Iterator[Advance]:
    """Show how far a stage is, on a terminal as a bar, otherwise as lines of JSON."""
    if not console.is_terminal:
        yield _log_lines(console, stage_name, n_total, unit)
        return
    columns = (
        TextColumn("{task.description:<8}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:>7,.0f}/{task.total:,.0f} {task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        _RateColumn(),
        TextColumn("{task.fields[details]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        progress_bar = progress.add_task(stage_name, total=n_total, unit=unit, details="")

        def advance(count: int, details: Mapping[str, float] | None = None) -> None:
            progress.update(progress_bar, advance=count, details=_details_text(details or {}))

        yield advance


def _details_text(details: Mapping[str, float]) -> str:
    """Return "decode 3 % · network 95 % · 2 failed": shares as per cent, counts as they are, zeros
    left out.
    """
    detail_texts = []
    for name, value in details.items():
        if name.endswith("_share"):
            detail_texts.append(f"{name.removesuffix('_share')} {value:.0%}")
        elif value:
            detail_texts.append(f"{value:,.0f} {name}")
    return " · ".join(detail_texts)


def _log_lines(console: Console, stage_name: str, n_total: int, unit: str) -> Advance:
    started_at = logged_at = time.monotonic()
    n_done = 0

    def advance(count: int, details: Mapping[str, float] | None = None) -> None:
        nonlocal n_done, logged_at
        n_done += count
        now = time.monotonic()
        if now - logged_at >= _LOG_INTERVAL_S or n_done >= n_total:
            logged_at = now
            rate_per_s, left_s = rate_and_left(n_done, n_total, now - started_at)
            log_line = {
                "stage": stage_name,
                "done": n_done,
                "total": n_total,
                "unit": unit,
                "per_s": rate_per_s,
                "left_s": left_s,
            }
            json_text = json.dumps(
                {
                    key: round(value, 3) if isinstance(value, float) else value
                    for key, value in (log_line | dict(details or {})).items()
                }
            )
            console.print(json_text, soft_wrap=True)

    return advance
