"""`headrace status`: how far a run is, by its logs, so that any node with its disk can ask."""

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.cache.count_text import count_text
from headrace.pipelines.cli.json_output import DriverOutput, DriverState
from headrace.pipelines.cli.options import print_json
from headrace.pipelines.cluster.progress import rate_and_left
from headrace.pipelines.cluster.task_leases import driver_lives
from headrace.pipelines.cluster.task_log import read_log
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.run_directory import find_run

_N_DRIVERS_SHOWN = 5  # the latest


def run_status(run: Path) -> list[DriverOutput]:
    """Return the run's drivers, the latest last.

    run: its directory, or its recipe. Raises InvalidInput.
    """
    paths = find_run(run)
    logs = sorted(paths.logs.glob("*.jsonl"))
    if not logs:
        raise InvalidInput(
            f"{paths.root} holds no logs: nothing has worked on it, or logs/ was removed. "
            "`headrace run RECIPE` writes one"
        )
    statuses = [_driver_status(read_log(log), log.stem) for log in logs]
    # A driver that was killed, or whose machine is down, writes no end into its log.
    return [
        status
        if status.state != "running" or driver_lives(paths.leases, status.driver)
        else status.model_copy(
            update={"state": "gone", "workers": 0, "dashboard": None, "waits": None}
        )
        for status in statuses
    ]


def _driver_status(events: Iterable[Mapping[str, Any]], driver: str) -> DriverOutput:
    read_at = datetime.datetime.now(datetime.UTC)
    first_event_at = last_event_at = stage_began = read_at
    stage: Mapping[str, Any] = {}
    progress: Mapping[str, Any] = {}
    worker_of_task: dict[str, str] = {}
    event_counts: Counter[str] = Counter()
    dashboard: str | None = None
    waits: str | None = None
    error: str | None = None
    for event in events:
        kind, last_event_at = event["event"], datetime.datetime.fromisoformat(event["time"])
        if not event_counts:
            first_event_at = last_event_at
        event_counts[kind] += 1
        if kind == "stage":
            stage, progress, stage_began = event, {}, last_event_at
            worker_of_task.clear()
        elif kind == "cluster":
            dashboard = event.get("dashboard")
        elif kind == "waiting":
            waits = event["reason"]
        elif kind == "started":
            waits = None
            worker_of_task[event["task"]] = event["worker"]
        elif kind in ("finished", "failed", "died"):
            worker_of_task.pop(event["task"], None)
        elif kind == "progress":
            progress = event
        elif kind == "end":
            error = event.get("error")
    done, total = int(progress.get("done", 0)), int(stage.get("total", 0))
    is_running = not event_counts["end"]
    state: DriverState = "running" if is_running else "failed" if error else "finished"
    # Ctrl-C is no failure: the same command goes on from there.
    if error is not None and error.startswith(KeyboardInterrupt.__name__):
        state, error = "stopped", None
    return DriverOutput(
        driver=driver,
        state=state,
        started=first_event_at,
        heard=last_event_at,
        stage=str(stage.get("stage", "plan")),
        done=done,
        total=total,
        unit=str(stage.get("unit", "")),
        failed=int(progress.get("failed", 0)),
        workers=len(set(worker_of_task.values())) if is_running else 0,
        deaths=event_counts["died"],
        dashboard=dashboard if is_running else None,
        waits=waits if is_running else None,
        error=error,
        left_s=rate_and_left(done, total, (read_at - stage_began).total_seconds())[1],
    )


def print_status_json(run: Path) -> None:
    """Print the drivers of a run, the latest last, as one JSON object. Raises InvalidInput."""
    root = find_run(run).root
    print_json("status", out=root, drivers=run_status(root))


def show_status(console: Console, run: Path) -> None:
    """Print the latest drivers of a run, given by its directory or its recipe.

    Raises InvalidInput.
    """
    paths = find_run(run)
    drivers = run_status(paths.root)
    console.print(f"Run {paths.root}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("started (UTC)", "state", "stage", "done", "left"):
        table.add_column(column, no_wrap=True)
    for column in ("failed", "workers", "deaths"):
        table.add_column(column, justify="right")
    for status in drivers[-_N_DRIVERS_SHOWN:]:
        left_s = status.left_s if status.state == "running" else None
        table.add_row(
            f"{status.started:%m-%d %H:%M:%S}",
            status.state,
            status.stage,
            f"{status.done:,}/{status.total:,} {status.unit}" if status.unit else "",
            "" if left_s is None else f"{left_s // 60:.0f}:{left_s % 60:02.0f}",
            f"{status.failed:,}",
            f"{status.workers:,}",
            f"{status.deaths:,}",
        )
    console.print(table)
    if len(drivers) > _N_DRIVERS_SHOWN:
        console.print(
            f"and {count_text(len(drivers) - _N_DRIVERS_SHOWN, 'earlier call')}; "
            f"logs of all are in {paths.logs}"
        )
    for status in drivers[-_N_DRIVERS_SHOWN:]:
        if status.dashboard:
            console.print(f"dashboard: {status.dashboard}", soft_wrap=True)
        if status.waits:
            console.print(status.waits, soft_wrap=True, markup=False)
        if status.error:
            console.print(f"{status.driver}: {status.error}", style="red", soft_wrap=True)
    if drivers[-1].state in ("gone", "stopped"):
        how_ended = "killed" if drivers[-1].state == "gone" else "stopped by Ctrl-C"
        console.print(
            f"The last driver was {how_ended}. What is finished is kept; the same command goes on "
            "from there."
        )
