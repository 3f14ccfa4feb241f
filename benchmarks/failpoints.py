"""A death at every kind of system call by which headrace changes a disk, and what the same command
makes of it afterwards.

    python benchmarks/failpoints.py [--quick] [--case COMMAND] [--count N] [--seed N]

Each command runs in a fork, its tasks too, so that one process makes every call. First it is
watched: every call that makes, writes, renames, links or removes something, by its kind (which
call, on which kind of file). Then, for each kind, it is killed at one of them, drawn at random:
before it, and for a write also when half is written. The same command is then called again, and has
to end with the result of the uninterrupted one, with nothing left behind. The last line is one JSON
object; the exit status is 1 after a fault.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

from damages import fork_command, import_everything, kind_of
from support.kills import (
    CACHE,
    EXPORT_CALL,
    EXTRACT_CALL,
    ONE_THREAD,
    PREDICT_CALL,
    REPORT_CALL,
    RUN,
    RUN_CALL,
    UNITS_CALL,
    UPDATE_CALL,
    Bench,
    _difference,
    age_temporaries,
    result,
    tasks_done_twice,
)

QUICK = 40

# The recipe, the state of the project before it, and the command. The later stages of a run first:
# a kind is tried once, where it is cheapest.
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "conclude": ("photos", "finetuned", RUN_CALL),
    "fine-tune": ("photos", "trained", RUN_CALL),
    "heads": ("photos", "extracted", RUN_CALL),
    "extract": ("photos", "empty", RUN_CALL),
    "extract alone": ("photos", "empty", EXTRACT_CALL),
    "report": ("photos", "finished", REPORT_CALL),
    "report elsewhere": (
        "photos",
        "finished",
        ("report", "recipe.yaml", "--tables", "--out", "made/page.html"),
    ),
    "predict": ("photos", "finished", PREDICT_CALL),
    "export": ("photos", "finished", EXPORT_CALL),
    "advise": ("photos", "finished", ("advise", "recipe.yaml")),
    "init": ("photos", "finished", ("init", "../photos", "--out", "made.yaml", "--force")),
    "cache rm": ("photos", "finished", ("cache", "rm", "fourth.avg", "--yes")),
    "cache export": ("photos", "finished", ("cache", "export", "fourth.avg", "features.npy")),
    "units": ("units", "extracted", RUN_CALL),
    "predict units": ("units", "finished", UNITS_CALL),
    "predict --update-cache": ("units", "uncached", UPDATE_CALL),
    "report of two": ("units", "finished", ("report", RUN, "other", "--out", "two.html")),
}
_AUDITED = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "os.chmod",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Kind = tuple[str, str]  # the call, and the kind of file


def watch(project: Path, on_call: Callable[[Kind, Callable[[], None]], None]) -> None:
    """Call `on_call` before each system call of this process that changes something below the
    project, for ever.

    Its second argument writes half of what a write would write.
    """

    def noted(call: str, path: Any, half: Callable[[], None] = lambda: None) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            name = os.path.relpath(os.path.abspath(os.fsdecode(path)), project)
            if not name.startswith(".."):
                on_call((call, kind_of(name)), half)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDITED:
            noted(
                event.removeprefix("os."),
                arguments[1 if event in ("os.rename", "os.link", "os.symlink") else 0],
            )
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            noted("open", arguments[0])

    def standing_in(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def stand_in(descriptor: int, *arguments: Any) -> Any:
            def half() -> None:
                if name == "write":
                    data = memoryview(arguments[0]).cast("B")
                    original(descriptor, data[: len(data) // 2])

            with contextlib.suppress(OSError):
                noted(name, os.readlink(f"/proc/self/fd/{descriptor}"), half)
            return original(descriptor, *arguments)

        return stand_in

    sys.addaudithook(audit)
    for name in ("write", "fsync", "ftruncate"):
        setattr(os, name, standing_in(name))


def in_one_process() -> None:
    """Tasks run in this process, one after the other, and no worker is started."""
    from headrace.pipelines.cluster import clients, submit

    def run_tasks(
        _client: Any, function: Any, jobs: Any, *, options: Any = None, split: Any = None
    ) -> Iterator[Any]:
        for key, job in jobs:
            leases = options.leases if options else None
            if leases is None or leases.acquire(key):
                options and options.on_event("started", task=key, worker="here", attempt=1)
                done = function(job)
                options and options.on_event("finished", task=key, seconds=0.0, result=done)
                yield submit.Outcome(job, done, None)
                if leases is not None:
                    leases.release(key)

    @contextlib.contextmanager
    def opened(*_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(dashboard_link=None, nthreads=lambda: {"here": 1})

    stands_in = {
        submit.run_tasks: run_tasks,
        clients.open_client: opened,
        clients.local_client: opened,
    }
    for name, module in list(sys.modules.items()):
        for function, instead in stands_in.items() if name.startswith("headrace.") else ():
            if vars(module).get(function.__name__) is function:
                setattr(module, function.__name__, instead)


def call(
    project: Path, argv: Sequence[str], before: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Call a command in a fork that does everything itself; its exit status, and what it said."""

    def alone() -> None:
        in_one_process()
        before()

    return fork_command(project, argv, alone)


def calls_of(bench: Bench, state: str, argv: Sequence[str]) -> tuple[list[Kind], dict[str, Any]]:
    """The kinds of the command's calls, in their order, and its result."""
    bench.restore(state, 1)
    listed = bench.folder / "calls.txt"
    listed.unlink(missing_ok=True)

    def before() -> None:
        descriptor = os.open(listed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        write = os.write
        watch(
            bench.project,
            lambda kind, _: write(descriptor, f"{json.dumps(kind)}\n".encode()) and None,
        )

    status, said = call(bench.project, argv, before)
    assert status == 0, said
    return [tuple(json.loads(line)) for line in listed.read_text().splitlines()], tidied(bench)


def tidied(bench: Bench) -> dict[str, Any]:
    """The project's contents, once what only waits for the next run or for `cache gc` is gone."""
    from headrace.cache.integrity.garbage import find_garbage
    from headrace.pipelines.paths import RunPaths
    from headrace.pipelines.run import remove_leftovers

    age_temporaries(bench.project)
    remove_leftovers(RunPaths(bench.project / RUN), bench.project / CACHE)
    find_garbage(bench.project / CACHE).remove()
    return result(bench.project)


def death(
    bench: Bench, case: str, kind: Kind, number: int, *, half: bool, right: dict[str, Any]
) -> list[str] | None:
    """Kill the case's command at the number-th call of the kind, call it again; what is wrong
    then. None: the command ended before, as it should.
    """
    _, state, argv = CASES[case]
    bench.restore(state, 1)
    count = 0

    def die(found: Kind, write_half: Callable[[], None]) -> None:
        nonlocal count
        count += found == kind
        if found == kind and count == number:
            if half:
                write_half()
            os.kill(os.getpid(), signal.SIGKILL)

    status, said = call(bench.project, argv, lambda: watch(bench.project, die))
    if status != -signal.SIGKILL:
        return [f"it ended by itself with {status}: {said[-1500:]}"] if status else None
    age_temporaries(bench.project)
    status, said = call(bench.project, argv)
    if status:
        return [f"the same command then ends with {status}: {said[-1500:]}"]
    twice = tasks_done_twice(bench.project)
    found = tidied(bench)
    faults = [f"{name}: {_difference(right.get(name), found.get(name))}"
              for name in sorted(right.keys() | found.keys()) if right.get(name) != found.get(name)]  # fmt: skip
    return faults + twice


def main() -> int:
    """Watch, kill, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK} deaths, evenly over all kinds"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="may be given several times")
    parser.add_argument(
        "--count", type=int, help="so many deaths, evenly over all kinds; default: every kind"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= ONE_THREAD
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/state"
        return measure(
            Path(scratch),
            options.case,
            options.count or (QUICK if options.quick else None),
            options.seed,
        )


def measure(folder: Path, only: list[str] | None, count: int | None, seed: int) -> int:
    """Every death that was asked for, and the table; 1 after a fault."""
    import_everything()
    benches, draw = {}, random.Random(seed)
    for recipe in dict.fromkeys(CASES[case][0] for case in only or CASES):
        benches[recipe] = Bench(folder / recipe, forked=True, recipe=recipe)
    if only is None or "predict" in only:
        benches["photos"].reference(PREDICT_CALL)  # makes its images
    if "units" in benches:
        finished = benches["units"].folder / "states/finished"
        shutil.copytree(finished / RUN, finished / "other")
    points: list[tuple[str, Kind, int, bool]] = []
    rights, known = {}, set()
    for case, (recipe, state, argv) in CASES.items():
        if only is None or case in only:
            calls, rights[case] = calls_of(benches[recipe], state, argv)
            for kind, times in collections.Counter(calls).items():
                if kind not in known:
                    points += [
                        (case, kind, draw.randint(1, times), half)
                        for half in {False, kind[0] == "write"}
                    ]
            known |= set(calls)
    chosen = points if count is None else points[:: max(1, len(points) // count)]
    table = collections.defaultdict(collections.Counter)
    faults, began = 0, time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):  # what was counted until then is printed
        for place, (case, kind, number, half) in enumerate(chosen):
            if place % 20 == 0:
                print(
                    f"{place:,} of {len(chosen):,} deaths, {faults} faults",
                    file=sys.stderr,
                    flush=True,
                )
            wrong = death(
                benches[CASES[case][0]], case, kind, number, half=half, right=rights[case]
            )
            table[case].update(deaths=wrong is not None, missed=wrong is None, faults=bool(wrong))
            if wrong:
                faults += 1
                print(
                    f"{case}: {'in' if half else 'before'} {kind[0]} {number} of {kind[1]}",
                    *wrong,
                    sep="\n    ",
                    flush=True,
                )
    print(f"{'command':<16}{'kinds of calls':>16}{'deaths':>8}{'missed':>8}{'faults':>8}")
    for case in rights:
        kinds = len({kind for name, kind, _, _ in points if name == case})
        found = "".join(f"{table[case][each]:>8}" for each in ("deaths", "missed", "faults"))
        print(f"{case:<16}{kinds:>16}{found}")
    seconds, deaths = (
        round(time.monotonic() - began),
        sum(each["deaths"] for each in table.values()),
    )
    kinds = len({point[:2] for point in points})
    print(json.dumps({"kinds": kinds, "deaths": deaths, "faults": faults, "s": seconds}))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
