"""Calls of the command line that are killed: a project in which every stage occurs, what kills, and
when two results are equal.

A call is started in a session of its own. A watcher waits until the k-th new file of a pattern
appears, then for a random moment, and sends SIGKILL: to the driver alone, or to all its processes.
"""

import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from support import forks
from support.forks import ONE_THREAD
from support.runs import fresh_headrace, headrace, make_photos

from headrace.cache.integrity.garbage import STALE_S, find_garbage
from headrace.cache.manifest import read_manifest
from headrace.pipelines.cluster.task_log import read_log
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.run import remove_leftovers

# A network that is small and needs no library: what a kill costs is little more than starting
# processes.
NETWORK = """\
import torch
from headrace import Preprocessing


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 5, stride=2)
        self.second = torch.nn.Conv2d(8, 16, 3, stride=2)
        self.third = torch.nn.Conv2d(16, 16, 3)
        self.fourth = torch.nn.Conv2d(16, 16, 3)

    def forward(self, pixels):
        found = torch.relu(self.second(torch.relu(self.first(pixels))))
        return torch.relu(self.fourth(torch.relu(self.third(found))))


def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Small()
    size = {"resize": (32, 32), "crop": (32, 32), "mode": "squash", "interpolation": "bilinear"}
    return made, Preprocessing(**size, mean=(0.5,) * 3, std=(0.25,) * 3)
"""
TRUST = ("--trust-code", "small_network:make")
# Heads that are held back, so that a network has something to win and an ensemble something to
# average.
RECIPE = """\
images:
  folder: ../photos
task:
  folds: 2
  metric: log_loss
backbones:
  - name: python:small_network:make
    taps: [second.avg, third.map, fourth.avg]
heads:
  logistic:
    C: [0.0001, 0.001]
    inputs: [[second.avg], [fourth.avg], all]
  ridge:
    alpha: [100000.0]
    inputs: [[second.avg], [fourth.avg]]
  knn:
    k: [17]
    inputs: [[second.avg], [fourth.avg]]
  mlp:
    hidden: [[4]]
    dropout: [0]
    epochs: 2
    inputs: [[fourth.avg]]
finetune:
  train_above: [third]
  learning_rate: [1.0e-2, 1.0e-12]
  epochs: 2
  batch_size: 16
ensemble:
  min_gain_per_backbone: 0
compute:
  workers: %d
  images_per_shard: 4
"""
# Units of several images, tabular columns beside them, rows without a label.
UNITS_RECIPE = """\
images:
  table: ../units.csv
task:
  unit: patient
  side_columns: [age, site]
  folds: 2
  metric: log_loss
backbones:
  - name: python:small_network:make
    taps: [second.avg, fourth.avg]
heads:
  logistic:
    C: [0.01]
    inputs: [[second.avg], [fourth.avg]]
  bags:
    pooling: [attention, mean]
    hidden: [[4]]
    dropout: [0]
    learning_rate: [1.0e-2]
    epochs: 4
    inputs: [[second.avg]]
ensemble:
  min_gain_per_backbone: 0
compute:
  workers: %d
  images_per_shard: 4
"""
RECIPES = {"photos": RECIPE, "units": UNITS_RECIPE}
CACHE, RUN = "headrace-cache", "headrace-runs/recipe"
PREDICTED = 600  # images: three parts
SHARED = 1100  # images: enough for worker processes to be started
DELAY_S = 0.2
FORKED_DELAY = 0.25  # of a fresh call's
CALL_S = 600  # no call takes so long, on whatever machine
RUN_CALL = ("run", "recipe.yaml")
EXTRACT_CALL = ("extract", "recipe.yaml")
REPORT_CALL = ("report", "recipe.yaml", "--tables")
PREDICT_CALL = ("predict", RUN, "../many", "--out", "predictions.csv", "--workers", "1", *TRUST)
SHARED_CALL = ("predict", RUN, "../more", "--out", "shared.csv", "--workers", "2", *TRUST)
UPDATE_CALL = (
    *("predict", RUN, "../units.csv", "--out", "updated.csv", "--update-cache", "--workers", "1"),
    *TRUST,
)
UNITS_CALL = ("predict", RUN, "../units.csv", "--out", "units.csv", "--no-cache", *TRUST)
EXPORT_CALL = ("export", RUN, "model", "--format", "safetensors", "--force", *TRUST)
PROGRAM_CALL = ("export", RUN, "program", "--format", "torch", "--force", *TRUST)
# What a process holds while it lives; after a call that has ended there is none of them, whoever
# made it.
HELD = re.compile(r".*\.(lease|driver|lock)(\..*)?|\.headrace-.*")
# Fields of JSON and columns of tables that tell when, how long and from which checkpoint, and
# digests of bytes with such.
TIMES = {
    "seconds",
    "evaluated",
    "ended",
    "time",
    "train_seconds",
    "predicted_seconds",
    "step_seconds",
    "started",
}
TIMES |= {"seal", "check", "listing", "pilot", "predicted_gain", "model_digest", "resumed_from"}
# What each call did and took, what only saves time, digests of tables that hold times, and the
# number of workers.
UNCOMPARED = {
    "logs",
    "backbones",
    "__pycache__",
    "stages.jsonl",
    "environments.jsonl",
    "contents.parquet",
}
UNCOMPARED |= {"images.parquet", "tables.json", "recipe.yaml", "recipe.json"}


@dataclass(frozen=True)
class Trigger:
    """When to kill: so many new files of a pattern, then a moment of up to `delay_s`."""

    pattern: str  # below the project; none: at any moment of the call
    count: int = 1
    delay_s: float = DELAY_S


@dataclass(frozen=True)
class Case:
    """A call, what is there before it, and the moments at which it is killed, one after
    the other.
    """

    call: tuple[str, ...]
    start: str  # which of the reference's states
    triggers: tuple[Trigger, ...]
    share: int  # kills, of 240
    chain: int  # kills before a call is left to end
    workers: int = 1
    recipe: str = "photos"


@dataclass
class Tally:
    """What came of a case."""

    kills: int = 0
    group: int = 0  # of them, of all processes
    calls: int = 0  # that were left to end
    missed: int = 0  # calls that ended before they were killed
    leftovers: Counter[str] = field(
        default_factory=Counter
    )  # temporaries of killed calls, by kind; gone afterwards
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def shards(count: int) -> Trigger:
    return Trigger(f"{CACHE}/features/*/shards/*.h5", count)


_EXTRACT = (
    Trigger(f"{RUN}/logs/*.jsonl"),
    Trigger(f"{CACHE}/leases/*.lease"),
    Trigger(f"{CACHE}/features/*/spec.json"),
    shards(1),
    shards(2),
    Trigger(f"{CACHE}/features/*/shards/.*.partial", delay_s=0.0),
    Trigger(f"{CACHE}/contents.parquet"),
    Trigger(f"{CACHE}/features/*/manifest.jsonl", delay_s=0.02),
    shards(7),
    Trigger(f"{RUN}/tasks/*.npz"),
    Trigger(f"{CACHE}/leases/*.driver", delay_s=4.0),
    shards(4),
)
_HEADS = (
    Trigger(f"{RUN}/banks/*.h5"),
    Trigger(f"{RUN}/tasks/*.npz"),
    Trigger(f"{RUN}/banks/.*.partial", delay_s=0.0),
    Trigger(f"{RUN}/leases/bank*.lease"),
    Trigger(f"{RUN}/banks/*.h5", 2),
    Trigger(f"{RUN}/leases/*.driver", 2, delay_s=2.0),
    Trigger(f"{RUN}/banks/*.h5", 1, delay_s=0.05),
)
_FINETUNE = (
    Trigger(f"{RUN}/finetune/images.*"),
    Trigger(f"{RUN}/leases/pilot*.lease", delay_s=1.0),
    Trigger(f"{RUN}/finetune/parts/*/checkpoint*"),
    Trigger(f"{RUN}/finetune/parts/*/fold*.json", delay_s=0.0),
    Trigger(f"{RUN}/finetune/parts/*/.*.partial", 2, delay_s=0.0),
    Trigger(f"{RUN}/finetune/parts/*/fold*.h5"),
    Trigger(f"{RUN}/finetune/*.h5", delay_s=0.05),
    Trigger(f"{RUN}/finetune/models/*/.*.partial", delay_s=0.0),
    Trigger(f"{RUN}/finetune/models/*/network.safetensors", delay_s=0.02),
    Trigger(f"{RUN}/finetune/candidates.json"),
    Trigger(f"{RUN}/finetune/parts/*/fold-full.json", delay_s=0.0),
    Trigger(f"{RUN}/leases/finetune*.lease"),
)
_CONCLUDE = (
    Trigger(f"{RUN}/leaderboard.csv", delay_s=0.05),
    Trigger(f"{RUN}/heads.parquet", delay_s=0.05),
    Trigger(f"{RUN}/conclude.lock"),
    Trigger(f"{RUN}/selection.json", delay_s=0.05),
    Trigger(f"{RUN}/winner/*.safetensors", delay_s=0.0),
    Trigger(f"{RUN}/winner/*.json"),
    Trigger(f"{RUN}/ensemble/members/*/*.safetensors", delay_s=0.0),
    Trigger(f"{RUN}/ensemble/ensemble.json"),
    Trigger(f"{RUN}/test-evaluations.lock", delay_s=0.05),
    Trigger(f"{RUN}/test-evaluations.jsonl", delay_s=0.0),
    Trigger(f"{RUN}/.test-evaluations.jsonl", delay_s=0.05),
    Trigger(f"{RUN}/.*.partial", 3, delay_s=0.0),
    Trigger(f"{RUN}/stages.jsonl", delay_s=0.02),
    Trigger(f"{RUN}/ensemble/.*.partial", delay_s=0.0),
)
_REPORT = (
    Trigger(f"{RUN}/signatures.npz"),
    Trigger(""),
    Trigger(f"{RUN}/.*.partial", delay_s=0.0),
    Trigger(f"{RUN}/report.html", delay_s=0.1),
    Trigger(f"{RUN}/report-tables/*.csv", 3, delay_s=0.1),
    Trigger(f"{RUN}/report-tables/.*.partial", delay_s=0.02),
)
_PREDICT = (
    Trigger("predictions.csv.parts"),
    Trigger("predictions.csv.parts/*.parquet"),
    Trigger("predictions.csv.parts/.*.partial", delay_s=0.0),
    Trigger("predictions.csv.parts/table.partial", delay_s=0.02),
    Trigger("predictions.csv", delay_s=0.01),
    Trigger("predictions.csv.json", delay_s=0.0),
)
_SHARED = (
    Trigger("shared.csv.parts/*.parquet"),
    Trigger("shared.csv.parts", delay_s=4.0),
    Trigger("shared.csv.parts/*.parquet", 2),
)
_EXPORT = (
    Trigger(".model.*.partial"),
    Trigger(".model.*.partial/*.safetensors"),
    Trigger(".model.*.partial/model.json", delay_s=0.005),
    Trigger("model/model.json", delay_s=0.02),
)
_PROGRAM = (Trigger(".program.*.partial", delay_s=6.0), Trigger(".program.*.partial/model.pt2"))
_UPDATE = (
    Trigger(f"{CACHE}/contents.parquet"),
    Trigger(f"{CACHE}/leases/*.lease"),
    shards(1),
    Trigger(f"{CACHE}/features/*/shards/.*.partial", delay_s=0.0),
    shards(8),
    Trigger("updated.csv", delay_s=0.05),
    Trigger("updated.units.csv", delay_s=0.0),
)
_UNITS = (
    Trigger(f"{RUN}/tasks/side-*.npz", delay_s=0.02),
    Trigger(f"{RUN}/tasks/*.npz"),
    Trigger(f"{RUN}/banks/*.h5", 2),
    Trigger(f"{RUN}/leaderboard.csv", delay_s=0.05),
    Trigger(f"{RUN}/instance-weights.csv", delay_s=0.02),
    Trigger(f"{RUN}/winner/head.json", delay_s=0.0),
    Trigger(f"{RUN}/winner/*.safetensors", delay_s=0.0),
    Trigger(f"{RUN}/predictions.parquet", delay_s=0.0),
    Trigger(f"{RUN}/unit-predictions.parquet", delay_s=0.0),
)
_PREDICT_UNITS = (
    Trigger("", delay_s=0.5),
    Trigger("units.csv.parts/*.parquet"),
    Trigger(".units.*.partial", delay_s=0.0),
    Trigger("units.csv", delay_s=0.0),
    Trigger("units.units.csv", delay_s=0.0),
)
_ANYWHERE = (Trigger(""),)

CASES = {
    "extract": Case(RUN_CALL, "empty", _EXTRACT, 30, 6),
    "extract, two workers": Case(RUN_CALL, "empty", _EXTRACT, 10, 5, workers=2),
    "heads": Case(RUN_CALL, "extracted", _HEADS, 25, 5),
    "heads, two workers": Case(RUN_CALL, "extracted", _HEADS, 10, 5, workers=2),
    "fine-tune": Case(RUN_CALL, "trained", _FINETUNE, 40, 8),
    "ensemble, winner, test": Case(RUN_CALL, "finetuned", _CONCLUDE, 35, 7),
    "anywhere": Case(RUN_CALL, "empty", _ANYWHERE, 10, 5),
    "report": Case(REPORT_CALL, "finished", _REPORT, 15, 5),
    "predict": Case(PREDICT_CALL, "finished", _PREDICT, 10, 5),
    "predict, two workers": Case(SHARED_CALL, "finished", _SHARED, 5, 5),
    "export": Case(EXPORT_CALL, "finished", _EXPORT, 8, 4),
    "export, torch": Case(PROGRAM_CALL, "finished", _PROGRAM, 2, 2),
    "extract alone": Case(EXTRACT_CALL, "empty", _EXTRACT[1:8], 10, 5),
    "units: predict --update-cache": Case(UPDATE_CALL, "uncached", _UPDATE, 10, 5, recipe="units"),
    "units: heads": Case(RUN_CALL, "extracted", _UNITS, 15, 5, recipe="units"),
    "units: predict": Case(UNITS_CALL, "finished", _PREDICT_UNITS, 5, 5, recipe="units"),
}
KILLS = sum(case.share for case in CASES.values())


class Bench:
    """A folder with the images, the states of an uninterrupted reference, and its results by call.

    forked: calls are forks (forks.py) instead of fresh interpreters, and several times as fast, as
    are the moments of kills. recipe: one of RECIPES.
    """

    def __init__(self, folder: Path, *, forked: bool = False, recipe: str = "photos") -> None:
        self.folder, self.forked, self.recipe = folder, forked, RECIPES[recipe]
        folder.mkdir(exist_ok=True)
        self.project = (
            folder / "project"
        )  # every chain runs here: tables name their files by absolute paths
        self.results: dict[tuple[str, ...], dict[str, Any]] = {}
        self.took: dict[tuple[str, ...], float] = {}  # seconds of the calls that nobody killed
        make_photos(folder / "photos", n=48)
        for number in range(
            0, 48, 7
        ):  # in the other class's folder: no head is sure, and an average is better
            name = ("coarse", "fine")[number % 2]
            (folder / "photos" / name / f"{number:03}.png").rename(
                folder / "photos" / ("fine", "coarse")[number % 2] / f"{number:03}.png"
            )
        write_units(folder)
        self.project.mkdir()
        (self.project / "recipe.yaml").write_text(self.recipe % 1)
        (self.project / "small_network.py").write_text(NETWORK)
        self._keep("empty", None)
        self._note(RUN_CALL)
        self._keep("finished", None)
        shutil.copytree(folder / "states/finished", folder / "states/uncached", symlinks=True)
        shutil.rmtree(folder / "states/uncached" / CACHE)
        self._keep("extracted", ())
        heads = ("recipe.json", "images.json", "accounting.json", "tasks", "banks")
        self._keep("trained", heads)
        self._keep("finetuned", (*heads, "finetune"))

    def _keep(self, name: str, of_run: Sequence[str] | None) -> None:
        """Keep the project as it is; of the run's directory only what has these names, if there are
        any.
        """
        kept = self.folder / "states" / name
        shutil.copytree(self.project, kept, symlinks=True)
        for path in [] if of_run is None else list((kept / RUN).iterdir()):
            if path.name not in of_run:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def restore(self, name: str, workers: int) -> None:
        """Put the project into a state of the reference."""
        shutil.rmtree(self.project)
        shutil.copytree(self.folder / "states" / name, self.project, symlinks=True)
        (self.project / "recipe.yaml").write_text(self.recipe % workers)

    def reference(self, call: tuple[str, ...], start: str = "finished") -> dict[str, Any]:
        """The result of a call that was not interrupted, from this state."""
        if call not in self.results:
            for name, count in (("many", PREDICTED), ("more", SHARED)):
                if f"../{name}" in call and not (self.folder / name).exists():
                    make_photos(self.folder / name, n=count, seed=1)
            self.restore(start, 1)
            self._note(call)
        return self.results[call]

    def call(self, call: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        """Call headrace and wait for the end."""
        function = headrace if self.forked else fresh_headrace
        return function(
            *call, cwd=self.project, timeout=CALL_S, env=os.environ | ONE_THREAD, **options
        )

    def _start(self, call: Sequence[str], said: Any) -> Any:
        """Start a call as the first process of a session of its own."""
        environment = os.environ | ONE_THREAD
        if self.forked:
            return forks.start(call, cwd=self.project, stdout=said, stderr=said, env=environment)
        command = [sys.executable, "-m", "headrace.pipelines", *call]
        return subprocess.Popen(
            command,
            cwd=self.project,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env=environment,
        )

    def _note(self, call: tuple[str, ...]) -> None:
        began = time.monotonic()
        done = self.call(call)
        assert done.returncode == 0, done.stderr or done.stdout
        self.took[call] = time.monotonic() - began
        self.results[call] = result(self.project)

    def kill(self, case: Case, kills: int, seed: int, first: int = 0) -> Tally:
        """Kill the case's call so often, in chains: killed, called again and killed again, and in
        the end left to end.

        first: the trigger to begin with.
        """
        tally, draw, began = Tally(), random.Random(seed), time.monotonic()
        expected = self.reference(case.call, case.start)
        order = list(case.triggers[first % len(case.triggers) :])
        while tally.kills < kills and tally.missed < 3 * kills + 20:
            self.restore(case.start, case.workers)
            groups: list[int] = []
            stamps: dict[Path, int] = {}
            for _ in range(min(case.chain, kills - tally.kills)):
                order = order or list(case.triggers)
                trigger = order.pop(0)
                killed = self._kill_once(case, trigger, draw, tally, groups)
                tally.faults += [
                    f"{trigger.pattern}: {fault}" for fault in redone(self.project, stamps)
                ]
                stamps |= published(self.project)
                if not killed:  # it has done everything, and nothing is left that could be killed
                    break
            left = age_temporaries(self.project)
            # A call that was killed between linking a file and removing its temporary leaves two
            # names of one file, whose time is now the old one.
            stamps = {
                path: stamp for path, stamp in published(self.project).items() if path in stamps
            }
            tally.leftovers.update(_kind(path) for path in left)
            done = self.call(case.call)
            tally.calls += 1
            tally.faults += self._compare(case, expected, stamps, done)
            tally.faults += [
                f"a process of killed call {group} lives on" for group in groups if lives(group)
            ]
        tally.seconds = time.monotonic() - began
        return tally

    def _kill_once(
        self, case: Case, trigger: Trigger, draw: random.Random, tally: Tally, groups: list[int]
    ) -> bool:
        before = seen(self.project, trigger.pattern)
        whole = draw.random() < 0.5
        longest = (
            trigger.delay_s * (FORKED_DELAY if self.forked else 1)
            if trigger.pattern
            else self.took[case.call]
        )
        delay = draw.uniform(0, longest)
        with (self.folder / "said.txt").open("wb") as said:
            process = self._start(case.call, said)
            appeared = not trigger.pattern or wait_until(
                lambda: len(seen(self.project, trigger.pattern) - before) >= trigger.count, process
            )
            if appeared and not ends_within(process, delay):
                (os.killpg if whole else os.kill)(process.pid, signal.SIGKILL)
            status = process.wait()
        groups.append(process.pid)
        if status == -signal.SIGKILL:
            tally.kills += 1
            tally.group += whole
        else:
            tally.missed += 1
            if status:
                tally.faults.append(
                    f"it ended by itself with {status}: "
                    f"{(self.folder / 'said.txt').read_text()[-2000:]}"
                )
        return status == -signal.SIGKILL

    def _compare(
        self,
        case: Case,
        expected: Mapping[str, Any],
        stamps: dict[Path, int],
        done: subprocess.CompletedProcess[str],
    ) -> list[str]:
        """What is wrong after a chain's last call, which was left to end."""
        if done.returncode:
            return [
                (
                    f"the call after it ended with {done.returncode}: "
                    f"{(done.stderr or done.stdout)[-2000:]}"
                )
            ]
        faults = redone(self.project, stamps) + tasks_done_twice(self.project)
        # What is left in a run's directory is for the next run, what is left in a cache for
        # `headrace cache gc`.
        if case.call != RUN_CALL:
            remove_leftovers(RunPaths(self.project / RUN), self.project / CACHE)
        find_garbage(self.project / CACHE).remove()
        found = result(self.project)
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                faults.append(f"{name} is not there")
            elif name not in expected:
                faults.append(f"{name} is left")
            elif found[name] != expected[name]:
                faults.append(f"{name} differs: {_difference(expected[name], found[name])}")
        return faults


def write_units(folder: Path) -> None:
    """Write units.csv: four photos a patient, each with an age or none and a site; the patients of
    the last sixth have no label.
    """
    rows = []
    for number, path in enumerate(sorted((folder / "photos").rglob("*.png"), key=lambda p: p.name)):
        patient, kind = number // 8 * 2 + number % 2, ("coarse", "fine")[number % 2]
        rows.append(
            {
                "path": path.relative_to(folder),
                "label": kind if number < 40 else "",
                "patient": f"p{patient:02}",
                "age": "" if number % 5 == 0 else 20 + number,
                "site": ("north", "south", "")[2 if number % 7 == 0 else number % 2],
            }
        )
    pd.DataFrame(rows).to_csv(folder / "units.csv", index=False)


def seen(project: Path, pattern: str) -> set[tuple[str, int, int]]:
    """What a pattern finds now; a file that was replaced is another one."""
    found = set()
    for path in project.glob(pattern) if pattern else ():
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        found.add((str(path), status.st_ino, status.st_mtime_ns))
    return found


def wait_until(is_so: Any, process: Any) -> bool:
    """Wait; False if the process ends before, or is taken for hung."""
    deadline = time.monotonic() + CALL_S
    while process.poll() is None:
        if is_so():
            return True
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGABRT)
        time.sleep(0.008)  # looking takes a millisecond, of a processor that the call wants
    return False


def ends_within(process: Any, seconds: float) -> bool:
    """Whether a process ends by itself before so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def lives(group: int) -> bool:
    """Whether a process of a group lives on for a minute.

    (One that nobody has waited for yet does not.)
    """
    deadline = time.monotonic() + 60
    while any(_is_in(group, stat) for stat in Path("/proc").glob("[0-9]*/stat")):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)
    return False


def _is_in(group: int, stat: Path) -> bool:
    try:
        state, _, found = stat.read_text().rpartition(") ")[2].split()[:3]
    except (OSError, ValueError):
        return False
    return int(found) == group and state not in "ZX"


def published(project: Path) -> dict[Path, int]:
    """The files that are published once and never again, with their stamps."""
    patterns = (
        f"{CACHE}/features/*/shards/*.h5",
        f"{RUN}/banks/*.h5",
        f"{RUN}/finetune/parts/*/fold-[0-9].h5",
    )
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in project.glob(pattern)}


def redone(project: Path, stamps: Mapping[Path, int]) -> list[str]:
    """Which of the files that had been published are gone or were written again."""
    now = published(project)
    return [
        f"{path.relative_to(project)} was {'written again' if path in now else 'removed'}"
        for path, stamp in stamps.items()
        if now.get(path) != stamp
    ]


def tasks_done_twice(project: Path) -> list[str]:
    """Tasks that more than one call has finished.

    A pilot measures, and is work in flight until its network is decided on.
    """
    finished: Counter[str] = Counter()
    for path in (project / RUN / "logs").glob("*.jsonl"):
        for event in read_log(path):
            skipped = isinstance(event.get("result"), dict) and event["result"].get("skipped")
            if (
                event["event"] == "finished"
                and not skipped
                and not event["task"].startswith("pilot-")
            ):
                finished[event["task"]] += 1
            if event["event"] in ("failed", "died", "quarantined"):
                finished[f"{event['task']} ({event['event']})"] += 2
    return [f"{task} was done {count} times" for task, count in finished.items() if count > 1]


def age_temporaries(project: Path) -> list[Path]:
    """Make what killed calls have left look as old as it is when it may go; returns it, without
    the locks, of which a whole one goes at once and one without all of its name later.
    """
    left = [path for path in project.rglob("*.partial") if path.parent.suffix != ".partial"]
    then = time.time() - 2 * STALE_S
    for path in (*left, *project.rglob("*.driver")):
        os.utime(path, (then, then))
    return left


def _kind(path: Path) -> str:
    """Of what a temporary is one."""
    return re.sub(r"[0-9a-f]{16,}|\d{8}T\d+Z-.*(?=\.partial)", "*", path.name)


def result(project: Path) -> dict[str, Any]:
    """What a user has of a project: every file but logs, by its contents, without times and digests
    of them.
    """
    found: dict[str, Any] = {}
    for path in sorted(project.rglob("*")):
        name = str(path.relative_to(project))
        parts = path.relative_to(project).parts
        if path.is_dir() or UNCOMPARED & {*parts, name}:
            continue
        if HELD.fullmatch(path.name) and path.name != ".headrace-export":
            found[name] = "held"
        else:
            found[name] = contents(path, project)
    return found


def contents(path: Path, project: Path) -> Any:
    """What has to be equal of a file."""
    data = path.read_bytes()
    if "shards" in path.parts or path.name == "spec.json":
        return hashlib.sha256(data).hexdigest()
    if path.name == "manifest.jsonl":
        return {unit: str(entry) for unit, entry in read_manifest(path.parent).items()}
    if path.name.endswith("test-evaluations.jsonl"):
        return [_timeless(json.loads(line)) for line in data.splitlines()]
    if path.suffix == ".json":
        return _timeless(json.loads(data))
    if path.suffix == ".h5":
        return _arrays(path)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load

        return {name: _digest(value) for name, value in load(data).items()}
    if path.suffix == ".npz":
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return {name: _digest(stored[name]) for name in stored.files if name not in TIMES}
    if path.suffix == ".parquet":
        return _rows(pd.read_parquet(path).astype(str).to_csv(index=False), path)
    if path.suffix == ".csv":
        return _rows(data.decode().replace(str(project), "."), path)
    if path.suffix == ".html":
        return _page(data.decode())
    if path.suffix == ".pt2":
        return _program(path)
    return hashlib.sha256(data).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(each) for name, each in value.items() if name not in TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def _arrays(path: Path) -> dict[str, str]:
    found = {}
    with h5py.File(path) as file:

        def note(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and name not in TIMES:
                found[name] = _digest(item[()])

        file.visititems(note)
        found["headrace"] = str(file.attrs.get("headrace"))
    return found


def _digest(value: Any) -> str:
    array = np.asarray(value)
    data = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
    return f"{array.dtype} {array.shape} {hashlib.sha256(data).hexdigest()}"


def _rows(text: str, path: Path) -> list[dict[str, str]]:
    """Rows of a table without the columns of times; of the report's tables of times, what they are
    about.
    """
    if path.stem in ("stages", "calls", "versions", "bytes", "cost"):
        return []
    rows = csv.DictReader(io.StringIO(text))
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def _page(text: str) -> str:
    """The report without the moment at which it was written."""
    return re.sub(r"written \d{4}-\d\d-\d\d \d\d:\d\d UTC", "written", text)


def _program(path: Path) -> dict[str, str]:
    """Weights of a torch.export program; its text holds paths of a temporary folder."""
    import torch

    return {
        name: _digest(value.detach().numpy())
        for name, value in torch.export.load(path).state_dict.items()
    }


def _difference(expected: Any, found: Any) -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        names = [
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        ]
        return "; ".join(
            f"{name}: {_difference(expected.get(name), found.get(name))}"
            for name in sorted(names)[:4]
        )
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return f"{len(expected)} rows, then {len(found)}"
        return next(
            _difference(one, other)
            for one, other in zip(expected, found, strict=True)
            if one != other
        )
    one, other = str(expected), str(found)
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    return (
        f"{one[max(0, place - 60) : place + 60]!r} became "
        f"{other[max(0, place - 60) : place + 60]!r}"
    )


def shares(kills: int, names: Sequence[str] = tuple(CASES)) -> Iterator[tuple[str, int]]:
    """So many kills, over these cases; each has one at least."""
    left, total = kills, sum(CASES[name].share for name in names)
    for place, name in enumerate(names):
        more = len(names) - place - 1
        own = max(1, round(CASES[name].share * kills / total)) if more else left
        own = min(own, left - more)
        left -= own
        yield name, own
