"""Progress for people (a live view) and for logs (plain lines), from the same few calls."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

Advance = Callable[[int], None]
# Without a terminal: a line at most this often, so that a log stays short.
_LOG_INTERVAL_S = 5.0


class _RateColumn(ProgressColumn):
    """Things per second since the stage began, and the time left at that rate."""

    def render(self, task: Task) -> Text:
        return Text(rate_and_left(task.completed, task.total or 0, task.elapsed or 0.0, task.fields["unit"]))


def rate_and_left(done: float, total: float, elapsed_s: float, unit: str) -> str:
    """ "42.1 images/s, 0:31 left"; empty until something is done."""
    if not done or not elapsed_s:
        return ""
    rate = done / elapsed_s
    left = int((total - done) / rate)
    return f"{rate:,.1f} {unit}/s, {left // 60}:{left % 60:02d} left"


@contextlib.contextmanager
def stage(console: Console, title: str, total: int, unit: str) -> Iterator[Advance]:
    """Show how far a stage is. The block calls what it is given with the number of things just done."""
    if not console.is_terminal:
        yield from _log_lines(console, title, total, unit)
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:>7,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        TimeElapsedColumn(),
        _RateColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        bar = progress.add_task(title, total=total, unit=unit)
        yield lambda count: progress.advance(bar, count)


def _log_lines(console: Console, title: str, total: int, unit: str) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _LOG_INTERVAL_S or done >= total:
            last = now
            console.print(
                f"{title}: {done:,}/{total:,} {unit} ({rate_and_left(done, total, now - start, unit)})", highlight=False
            )

    yield advance
