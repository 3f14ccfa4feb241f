"""Single damages of every kind of file that headrace writes, and what its commands make of them.

    python benchmarks/damages.py [--quick] [--project NAME] [--case KIND] [--count N] [--seed N]

Two projects: photos with heads, networks, an ensemble and a prediction that was killed half-way; a
table with units of several images, bags and side columns. Each is a finished run, its cache and
exported models. One file is damaged: a bit flips, a stretch becomes zeros or noise, the end is missing, all is missing, the file
is gone. Then one of the commands that read it is called. It has to end with the result that it has
on whole files, or to say which file is damaged; and then the command that its message names has to
mend it. Counted, by kind of file:

    same      exit 0 and the right result: the damage does not matter, or was mended on the way
    told      exit 0, and what is missing from the result is said in it, with the file's name
    refused   an error that names the file; the command in it was called, and the right result came
              after it
    SILENT    exit 0 and another result
    TRACE     a traceback, or an error that does not name the file
    BLOCKED   the command that was named does not help

The commands run in forks of one process, so that a damage takes a second or two. Leave the tree as
it is meanwhile: pages and exports hold some of its source. The last line is one JSON
object with the counts; the exit status is 1 after a fault.
"""

import argparse
import collections
import contextlib
import gc
import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

COUNT, QUICK = 3000, 60  # over both projects
TIME_S = 1800  # for one command, however busy the machine is

import pandas as pd
from support.kills import CACHE, RUN, UNITS_RECIPE, contents, write_units
from support.runs import make_photos

# Heads that are held back, so that a network has something to win and an ensemble something to
# average.
RECIPE = """\
images:
  folder: ../photos
task:
  folds: 2
  metric: log_loss
backbones:
  - name: torchvision:squeezenet1_1
    weights: random:0
    image_size: 32
    crop_fraction: 1.0
    taps: [features.5.avg, features.10.map, features.12.avg]
heads:
  logistic:
    C: [0.0001, 0.001]
    inputs: [[features.5.avg], [features.12.avg], all]
  ridge:
    alpha: [100000.0]
    inputs: [[features.5.avg], [features.12.avg]]
  knn:
    k: [17]
    inputs: [[features.5.avg], [features.12.avg]]
  mlp:
    hidden: [[4]]
    dropout: [0]
    epochs: 2
    inputs: [[features.12.avg]]
  sklearn:
    - estimator: sklearn.naive_bayes.GaussianNB
      inputs: [[features.12.avg]]
finetune:
  train_above: [features.10]
  learning_rate: [3.0e-4]
  epochs: 2
  batch_size: 16
ensemble:
  min_gain_per_backbone: 0
compute:
  workers: 1
  images_per_shard: 16
"""

ENSEMBLE = (
    f"{RUN}/ensemble"  # not the selected model, and a model all the same: heads and a network
)


# The network is one that a model may name without leave.
UNITS = UNITS_RECIPE.replace("second.avg", "features.5.avg").replace(
    "fourth.avg", "features.12.avg"
).replace(
    "  - name: python:small_network:make\n",
    "  - name: torchvision:squeezenet1_1\n    weights: random:0\n    image_size: 32\n"
    "    crop_fraction: 1.0\n",
) % 1  # fmt: skip


def _predicts(model: str, out: str, images: str, *more: str) -> tuple[str, ...]:
    return ("predict", model, images, "--out", out, "--workers", "1", *more)


class Project(NamedTuple):
    """A recipe, what is called, and which of the files afterwards are a command's result."""

    recipe: str
    commands: Mapping[str, tuple[str, ...]]
    results: Mapping[str, tuple[str, ...]]
    finish: Callable[[Path], None]  # makes what else there is, once the recipe was run


_RUN_RESULTS = (f"{RUN}/*.csv", f"{RUN}/*.parquet", f"{RUN}/selection.json", f"{RUN}/winner/*", f"{RUN}/ensemble/**/*",
                f"{RUN}/finetune/models/*/*", f"{CACHE}/features/*/shards/*.h5")  # fmt: skip
_COMMANDS = {
    "run": ("run", "recipe.yaml"),
    "report": ("report", "recipe.yaml"),
    "export": ("export", "recipe.yaml", "again", "--format", "safetensors"),
    "status": ("status", "recipe.yaml"),
    "cache ls": ("cache", "ls"),
    "cache verify": ("cache", "verify"),
}
_RESULTS = {
    "run": _RUN_RESULTS,
    "report": (f"{RUN}/report.html",),
    "export": ("again/*.safetensors", "again/model.json", "again/preprocess.py"),
}
EXPORTED = {"recipe.yaml": "model", ENSEMBLE: "both"}
PHOTOS = {
    **_COMMANDS,
    "predict": _predicts("recipe.yaml", "predicted.csv", "../photos/coarse"),
    "predict again": _predicts("recipe.yaml", "half.csv", "../many"),
    "predict from export": _predicts("model", "taken.csv", "../photos/coarse"),
    "predict of the average": _predicts(ENSEMBLE, "average.csv", "../photos/coarse"),
    "predict from its export": _predicts("both", "both.csv", "../photos/coarse"),
    "advise": ("advise", "recipe.yaml"),
}
TABLE = {
    **_COMMANDS,
    "extract": ("extract", "recipe.yaml"),
    "predict": _predicts("recipe.yaml", "predicted.csv", "../units.csv"),
    "predict from pixels": _predicts("recipe.yaml", "pixels.csv", "../units.csv", "--no-cache"),
    "predict into the cache": _predicts("recipe.yaml", "new.csv", "../new.csv", "--update-cache"),
    "predict from export": _predicts("model", "taken.csv", "../units.csv"),
    "predict of the average": _predicts(ENSEMBLE, "average.csv", "../units.csv"),
    "predict from its export": _predicts("both", "both.csv", "../units.csv"),
    "report of two": ("report", "recipe.yaml", "other.yaml"),
}


def _tables(commands: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The tables that predict commands write, of images and of units."""
    return {
        name: (words[4], words[4].replace(".csv", ".units.csv"))
        for name, words in commands.items()
        if words[0] == "predict"
    }


class Outcome(NamedTuple):
    """What a command ended with."""

    status: int
    said: str
    result: Mapping[str, Any]


def call(project: Path, argv: Sequence[str], results: Sequence[str] = ()) -> Outcome:
    """Call a command in a fork; what it ended with, and what it made of these files."""
    status, said = fork_command(project, argv)
    return Outcome(status, said, result_of(project, results) if status == 0 else {})


def fork_command(
    project: Path, argv: Sequence[str], before: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Call a command in a fork that has everything imported; its exit status, minus the signal that
    killed it, and what it said.

    before: called in the fork, before the command.
    """
    said = project.parent / "said.txt"
    pid = os.fork()
    if pid == 0:
        _become(project, argv, said, before)
    deadline = time.monotonic() + TIME_S
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 1, f"no end after {TIME_S} s\n{said.read_text(errors='replace')}"
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1]), said.read_text(errors="replace")


def _become(
    project: Path, argv: Sequence[str], said: Path, before: Callable[[], None] = lambda: None
) -> None:
    from support.forks import fork_workers

    from headrace.pipelines.cli.main import main

    os.setsid()
    os.chdir(project)
    sys.path.insert(0, str(project))  # where a recipe's own network is
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = ["headrace", *argv]
    status = 1
    try:
        fork_workers()  # from this process, instead of an interpreter that imports everything anew
        before()
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - a fork must not return into its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_known: dict[tuple[Path, int, int, int], Any] = {}  # contents of files that are links to whole ones


def result_of(project: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """What is in the files of these patterns, without times."""
    found = {}
    for pattern in patterns:
        for path in sorted(project.glob(pattern)):
            if path.is_file():
                status = path.stat()
                stamp = (path, status.st_ino, status.st_mtime_ns, status.st_size)
                if status.st_nlink == 1:  # of this call alone: its number is given away again
                    found[str(path.relative_to(project))] = _contents(path, project)
                    continue
                if stamp not in _known:
                    _known[stamp] = _contents(path, project)
                found[str(path.relative_to(project))] = _known[stamp]
    return found


def _contents(path: Path, project: Path) -> Any:
    found = contents(path, project)
    if path.suffix == ".html":  # what the calls took, and when
        times = r"<dt>time</dt>.*?</div>|<section id=\"(cost|provenance)\".*?</section>"
        return re.sub(times, "", found, flags=re.S)
    return found


def build(folder: Path, setup: Project) -> Path:
    """The project with everything in it; returns it."""
    project = folder / "project"
    project.mkdir()
    make_photos(folder / "photos", n=48)
    make_photos(folder / "many", n=520, seed=1)
    for number in range(
        0, 48, 7
    ):  # in the other class's folder: no head is sure, and an average is better
        name, other = ("coarse", "fine") if number % 2 == 0 else ("fine", "coarse")
        (folder / "photos" / name / f"{number:03}.png").rename(
            folder / "photos" / other / f"{number:03}.png"
        )
    write_units(folder)
    (project / "recipe.yaml").write_text(setup.recipe)
    _finish(project, setup.commands["run"])
    setup.finish(project)
    _finish(project, setup.commands["report"])
    for run, exported in EXPORTED.items():
        _finish(project, ("export", run, exported, "--format", "safetensors"))
    return project


def finish_photos(project: Path) -> None:
    """Advice, and a bulk prediction that is killed when its first part is there."""
    _finish(project, PHOTOS["advise"])
    pid = os.fork()
    if pid == 0:
        _become(project, PHOTOS["predict again"], project.parent / "said.txt")
    while not list(project.glob("half.csv.parts/*.parquet")):
        time.sleep(0.001)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def finish_table(project: Path) -> None:
    """A second run, and a table of images that the cache does not know."""
    (project / "other.yaml").write_text(UNITS.replace("C: [0.01]", "C: [1.0]"))
    _finish(project, ("run", "other.yaml"))
    new = pd.read_csv(project.parent / "units.csv").head(16)
    new["path"] = [f"many/{(n % 2 and 'fine') or 'coarse'}/{n:03}.png" for n in range(16)]
    new.to_csv(project.parent / "new.csv", index=False)


def _finish(project: Path, argv: Sequence[str]) -> None:
    done = call(project, argv)
    assert done.status == 0, done.said


_COMPARED = {"report of two": (f"{RUN}/compare-other.html",), "extract": _RUN_RESULTS[-1:]}
_ADVISED = {"advise": (f"{RUN}/advice/advice.json",)}
PROJECTS = {
    "photos": Project(RECIPE, PHOTOS, {**_RESULTS, **_tables(PHOTOS), **_ADVISED}, finish_photos),
    "table": Project(UNITS, TABLE, {**_RESULTS, **_tables(TABLE), **_COMPARED}, finish_table),
}


def readers(
    files: Sequence[str], scratch: Callable[[], Path], commands: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Of each file, the commands that open it."""
    found: dict[str, list[str]] = {name: [] for name in files}
    for command, argv in commands.items():
        copy = scratch()
        opened = copy.parent / "opened.txt"
        pid = os.fork()
        if pid == 0:
            descriptor = os.open(opened, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

            def note(event: str, arguments: tuple[Any, ...], descriptor: int = descriptor) -> None:
                if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
                    os.write(descriptor, os.fsencode(arguments[0]) + b"\n")

            sys.addaudithook(note)
            _become(copy, argv, copy.parent / "said.txt")
        os.waitpid(pid, 0)
        lines = {
            os.path.relpath(os.path.join(copy, line), copy)
            for line in opened.read_text(errors="replace").splitlines()
        }
        for name in files:
            if name in lines:
                found[name].append(command)
    return found


def kind_of(name: str) -> str:
    """The file's kind: its path, with what differs from run to run left out."""
    name = re.sub(r"\d{8}T\d{6}Z-.+?-\d+-[0-9a-f]{4}|[0-9a-f]{12,}", "*", name)
    name = re.sub(r"(-tables/\.?)[\w-]+(?=\.(csv|parquet))", r"\1*", name)
    name = re.sub(r"(fold-)\d|\b\d+-\d+(?=[-.])", r"\1*", name)
    return re.sub(r"(\*[-.])+\*|half\.csv\.parts/[\d*-]+|logs/.*(?=\.jsonl)", lambda found: found[0].split("/")[0] + "/*"
                  if "/" in found[0] else "*", name)  # fmt: skip


def damaged(data: bytes, draw: random.Random) -> tuple[str, bytes | None]:
    """One damage of these bytes, with its name; None where the file is gone."""
    how = draw.choices(("bit", "zeros", "noise", "cut", "empty", "gone"), (60, 8, 8, 12, 6, 6))[0]
    if how == "gone" or not data:
        return "gone", None
    if how == "empty":
        return how, b""
    if how == "cut":
        return how, data[: draw.randrange(len(data))]
    found = bytearray(data)
    if how == "bit":
        bit = draw.randrange(8 * len(data))
        found[bit // 8] ^= 1 << bit % 8
        return f"bit {bit}", bytes(found)
    start = draw.randrange(len(data))
    length = min(draw.choice((1, 16, 512, 4096)), len(data) - start)
    found[start : start + length] = bytes(length) if how == "zeros" else draw.randbytes(length)
    return f"{how} {start}+{length}", bytes(found)


def recipe_of(name: str) -> str:
    """The recipe of the run that a file belongs to."""
    return "other.yaml" if "-runs/other/" in name else "recipe.yaml"


def mending(said: str, name: str) -> list[tuple[str, ...]]:
    """The commands that a message about a file names, the recipe and the paths filled in."""
    found: list[tuple[str, ...]] = []
    run, folder = next(
        (each for each in EXPORTED.items() if name.startswith(f"{each[1]}/")),
        ("recipe.yaml", "model"),
    )
    for text in re.findall(
        r"`((?:headrace|rm) [^`]+)`|(?:[Tt]ype|with): ((?:headrace|rm) [^\n;]+)", said
    ):
        meant = {"RECIPE": recipe_of(name), "RUN": run, "FOLDER": folder}
        words = [meant.get(word, word) for word in shlex.split(text[0] or text[1])]
        if words[0] == "rm" or words[1] in (
            "run",
            "cache",
            "advise",
            "export",
            "predict",
            "report",
        ):
            found.append(tuple(words))
    return found


def judge(
    project: Path, setup: Project, name: str, command: str, whole: Mapping[str, Outcome]
) -> tuple[str, str]:
    """Call the command and, where it refuses, what its message names; the verdict, with why."""
    right, argv, results = whole[command], setup.commands[command], setup.results.get(command, ())
    done = call(project, argv, results)
    base = Path(name).name
    if "Traceback" in done.said or done.status not in (0, 1, 2):
        return "TRACE", done.said
    if done.status == 0:
        if done.result == right.result:
            return "same", ""
        pages = [project / result for result in results if result.endswith(".html")]
        text = "".join(page.read_text(errors="replace") for page in pages)
        told = base in done.said or base in text or "Not measured: " in text
        return ("told", "") if told else ("SILENT", difference(right.result, done.result))
    if base not in done.said and Path(name).parent.name not in done.said.replace("\n", ""):
        return "TRACE", f"the file is not named: {done.said}"
    said = done.said
    for words in mending(done.said, name) or [("headrace", "run", recipe_of(name))]:
        if words[0] == "rm":
            for path in words[1:]:
                (project / path).unlink()
            continue
        mended = call(project, words[1:])
        said += f"\n$ {shlex.join(words)} -> {mended.status}\n{mended.said}"
        if "Traceback" in mended.said:
            return "TRACE", said
    again = call(project, argv, results)
    # The page of heads that were trained again has other times in it.
    tables = argv[0] == "report" and result_of(project, setup.results["run"]) == whole["run"].result
    if again.status == 0 and (again.result == right.result or tables):
        return "refused", ""
    return (
        "BLOCKED",
        (
            f"{said}\n$ again -> "
            f"{again.status}\n{again.said}\n{difference(right.result, again.result)}"
        ),
    )


def difference(right: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Where two results differ."""
    from support.kills import _difference

    return _difference(right, found)


def main() -> int:
    """Build, damage, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} damages, not {COUNT}")
    parser.add_argument("--project", choices=PROJECTS, help="this one alone")
    parser.add_argument("--case", help="only kinds of file in whose name this is")
    parser.add_argument("--count", type=int, help="so many damages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--show", type=int, default=2000, help="characters of a fault that are printed"
    )
    parser.add_argument("--folder", type=Path, help="keep the project there, for the next call")
    options = parser.parse_args()
    count = options.count or (QUICK if options.quick else COUNT)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).absolute()
        folder.mkdir(exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/state"
        names = [options.project] if options.project else list(PROJECTS)
        total: collections.Counter[str] = collections.Counter()
        import_everything()
        for name in names:
            (folder / name).mkdir(exist_ok=True)
            total += measure(
                folder / name,
                PROJECTS[name],
                count // len(names),
                options.seed,
                options.case,
                options.show,
            )
    print(json.dumps(total))
    return int(any(word.isupper() for word in total))


def measure(
    folder: Path, setup: Project, count: int, seed: int, only: str | None, show: int
) -> collections.Counter[str]:
    """Damage so many files and print the table; counts of verdicts, damages, kinds and seconds."""
    whole, project = (
        folder / "whole",
        folder / "project",
    )  # damaged always at the same path: tables have absolute ones
    if not whole.exists():
        build(folder, setup).rename(whole)

    def restored() -> Path:
        shutil.rmtree(project, ignore_errors=True)
        shutil.copytree(whole, project, symlinks=True, copy_function=link_or_copy)
        return project

    files = sorted(
        str(path.relative_to(whole))
        for path in whole.rglob("*")
        if path.is_file() and path.stat().st_size
    )
    read_by = readers(files, restored, setup.commands)
    right = {}
    for command, argv in setup.commands.items():
        right[command] = call(restored(), argv, setup.results.get(command, ()))
        assert right[command].status == 0, right[command].said
    kinds = collections.defaultdict(list)
    for name in files:
        if read_by[name] and not name.endswith(".yaml"):
            kinds[kind_of(name)].append(name)
    unread = sorted({kind_of(name) for name in files if not read_by[name]} - kinds.keys())
    chosen = [kind for kind in sorted(kinds) if only is None or only in kind]
    draw, table = random.Random(seed), collections.defaultdict(collections.Counter)
    faults: list[str] = []
    began = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):  # what was counted until then is printed
        for number in range(count):
            kind = chosen[number % len(chosen)]
            name = draw.choice(kinds[kind])
            command = draw.choice(read_by[name])
            target = restored() / name
            how, data = damaged(target.read_bytes(), draw)
            target.unlink()
            if data is not None:
                target.write_bytes(data)
            verdict, why = judge(project, setup, name, command, right)
            table[kind][verdict] += 1
            if verdict.isupper():
                faults.append(kind)
                print(f"{number}: {verdict}: {name}: {how}: {command}\n{why[-show:]}\n", flush=True)
            if number % 20 == 19:
                print(f"{number + 1:,} damages, {len(faults)} faults", file=sys.stderr, flush=True)
    shutil.rmtree(project)
    verdicts = ("same", "told", "refused", "SILENT", "TRACE", "BLOCKED")
    print(f"{'kind of file':<64}{'files':>6}" + "".join(f"{word:>9}" for word in verdicts))
    for kind in chosen:
        print(
            f"{kind:<64}{len(kinds[kind]):>6}"
            + "".join(f"{table[kind][word]:>9,}" for word in verdicts)
        )
    print(f"read by none of these commands: {', '.join(unread)}")
    total = sum(table.values(), collections.Counter())
    total["damages"] = sum(total.values())
    total.update(kinds=len(chosen), s=round(time.monotonic() - began))
    return total


def link_or_copy(source: str, target: str) -> None:
    """Link a file that is only ever replaced, and copy a manifest, which grows in its place."""
    (shutil.copy2 if source.endswith("manifest.jsonl") else os.link)(source, target)


def import_everything() -> None:
    """So that a fork starts at once."""
    import torch
    from support.forks import modules

    for name in modules():
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()  # or every fork would look through all of this for garbage


if __name__ == "__main__":
    sys.exit(main())
