"""`headrace status`: how far a run is, by its logs, so that any node with its disk can ask."""

import dataclasses
import datetime
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.cache.count_text import count_text
from headrace.pipelines.cli.json_output import DriverOutput, StatusOutput, print_json
from headrace.pipelines.cluster.progress import rate_and_left
from headrace.pipelines.cluster.task_leases import driver_lives
from headrace.pipelines.cluster.task_log import read_log
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.run_directory import find_run

_N_DRIVERS_SHOWN = 5  # the latest


@dataclass(frozen=True)
class DriverStatus:
    """The state of a driver, which is one call of `headrace run`."""

    driver: str
    state: str  # running, finished, failed, stopped (Ctrl-C), gone (killed, or its machine is down)
    started: datetime.datetime
    heard: datetime.datetime  # the time of its last line in the log
    stage: str
    done: int
    total: int
    unit: str
    failed: int  # images or heads of the stage, each of them a row with its reason
    running: Mapping[str, str]  # worker by task
    deaths: int  # of workers
    dashboard: str | None
    waits: str | None  # why there is no worker
    error: str | None
    left_s: float  # at the stage's rate so far; nan before anything is done


def run_status(run: Path) -> list[DriverStatus]:
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
    return [
        status
        if status.state != "running" or driver_lives(paths.leases, status.driver)
        else dataclasses.replace(status, state="gone", running={}, dashboard=None, waits=None)
        for status in statuses
    ]


def _driver_status(events: Iterable[Mapping[str, Any]], driver: str) -> DriverStatus:
    read_at = datetime.datetime.now(datetime.UTC)
    first_event_at = last_event_at = stage_began = read_at
    stage: Mapping[str, Any] = {}
    progress: Mapping[str, Any] = {}
    running: dict[str, str] = {}
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
            running.clear()
        elif kind == "cluster":
            dashboard = event.get("dashboard")
        elif kind == "waiting":
            waits = event["reason"]
        elif kind == "started":
            waits = None
            running[event["task"]] = event["worker"]
        elif kind in ("finished", "failed", "died"):
            running.pop(event["task"], None)
        elif kind == "progress":
            progress = event
        elif kind == "end":
            error = event.get("error")
    done, total = int(progress.get("done", 0)), int(stage.get("total", 0))
    state = "running" if not event_counts["end"] else "failed" if error else "finished"
    if error is not None and error.startswith(KeyboardInterrupt.__name__):
        state, error = "stopped", None
    return DriverStatus(
        driver=driver,
        state=state,
        started=first_event_at,
        heard=last_event_at,
        stage=str(stage.get("stage", "plan")),
        done=done,
        total=total,
        unit=str(stage.get("unit", "")),
        failed=int(progress.get("failed", 0)),
        running=running if state == "running" else {},
        deaths=event_counts["died"],
        dashboard=dashboard if state == "running" else None,
        waits=waits if state == "running" else None,
        error=error,
        left_s=rate_and_left(done, total, (read_at - stage_began).total_seconds())[1],
    )


def print_status_json(run: Path) -> None:
    """Print the drivers of a run, the latest last, as one JSON object. Raises InvalidInput."""
    paths = find_run(run)
    drivers = []
    for status in run_status(paths.root):
        fields = {
            field.name: getattr(status, field.name)
            for field in dataclasses.fields(status)
            if field.name != "running"
        }
        n_workers = len(set(status.running.values()))
        drivers.append(DriverOutput(**fields, workers=n_workers))
    print_json(StatusOutput(out=str(paths.root), drivers=tuple(drivers)))


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
    table.add_column("failed", justify="right")
    for column in ("workers", "deaths"):
        table.add_column(column, justify="right")
    for status in drivers[-_N_DRIVERS_SHOWN:]:
        is_running = status.state == "running" and not math.isnan(status.left_s)
        table.add_row(
            f"{status.started:%m-%d %H:%M:%S}",
            status.state,
            status.stage,
            f"{status.done:,}/{status.total:,} {status.unit}" if status.unit else "",
            f"{status.left_s // 60:.0f}:{status.left_s % 60:02.0f}" if is_running else "",
            f"{status.failed:,}",
            f"{len(set(status.running.values())):,}",
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
        how = "killed" if drivers[-1].state == "gone" else "stopped by Ctrl-C"
        console.print(
            f"The last driver was {how}. What is finished is kept; the same command goes on from "
            "there."
        )
