"""What is printed: the user's text as it is, whatever the output can encode; tables whose columns
and bytes can be relied on.
"""

import csv
import io
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table
from support.models import run_here
from support.runs import headrace, make_photos

from headrace.pipelines.cli.main import main
from headrace.pipelines.cli.run import finetune_table
from headrace.pipelines.cli.status import show_status
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.cluster.task_log import task_log
from headrace.pipelines.console import escape_unencodable, make_console, valid_text
from headrace.pipelines.finished import read_finished_run
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.predict.tables import TableBlock, table_writer

# markup, an emoji code, and what is highlighted
HOSTILE = "[draft] [/rare] :dog: [link=x]y[/link] 42 'a'"
NO_UTF8 = os.fsdecode(b"caf\xe9.png")
RECIPE = """\
images: {folder: photos}
task: {folds: 2}
backbones: [{name: "torchvision:resnet18", weights: "random:0", image_size: 32, taps: [layer1.avg]}]
heads: {logistic: {C: [1], inputs: [each]}}
compute: {workers: 1}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a finished run, whose name and classes are out to be taken for
    something else.
    """
    folder = tmp_path_factory.mktemp("console") / "[draft] :dog: café"
    make_photos(folder / "photos", n=24)
    (folder / "photos" / "fine").rename(folder / "photos" / "[rare] :cat: fin é")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    run_here(folder / "recipe.yaml")
    return folder


# What PYTHONIOENCODING=ascii does.
ASCII = (
    "import sys; sys.stdout.reconfigure(encoding='ascii'); sys.stderr.reconfigure(encoding='ascii')"
)


def test_text_is_printed_as_it_is(capsys, monkeypatch):
    """No markup, no emoji, no highlighting: in lines, in cells and in titles, also on a terminal
    with colours.
    """
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = make_console()
    console.print(HOSTILE, soft_wrap=True)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    said = capsys.readouterr().out
    assert said.startswith(f"{HOSTILE}\n")
    assert said.count(HOSTILE) == 4


def test_what_a_terminal_would_obey_is_shown(capsys):
    """A name with control characters neither colours nor overwrites what stands around it."""
    make_console().print("a\x1b[31m\r\x07\u202eb", soft_wrap=True)
    assert capsys.readouterr().out == "a\\x1b[31m\\r\\x07\\u202eb\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "\\xe9 \\u2013"), ("latin-1", "é \\u2013"), ("utf-8", "é –")]
)
def test_no_output_is_too_narrow_for_a_character(monkeypatch, encoding, shown):
    """What an encoding lacks becomes an escape, and so do the bytes of a file name that is no
    UTF-8.
    """
    written = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        escape_unencodable()
        make_console().print(f"é – {NO_UTF8}", soft_wrap=True)
        sys.stdout.write(f"{NO_UTF8}\n")  # as click and typer do, without a console
        sys.stdout.flush()
        sys.stdout.detach()
    assert written.getvalue().decode(encoding) == f"{shown} caf\\xe9.png\ncaf\\udce9.png\n"


def test_bytes_that_are_no_utf8_are_escaped_and_nothing_else():
    """Under an ASCII locale Python holds every byte of a name as a surrogate; those that are UTF-8
    together are text again.
    """
    assert valid_text("café") == "café"
    assert valid_text(NO_UTF8) == "caf\\xe9.png"
    assert valid_text(b"caf\xc3\xa9".decode("ascii", "surrogateescape")) == "café"
    assert valid_text("\ud800é") == "\\ud800é"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "recipe.yaml"),
        ("run", "recipe.yaml", "--dry-run"),
        ("report", "recipe.yaml"),
        ("status", "recipe.yaml"),
    ],
    ids=" ".join,
)
def test_commands_end_well_where_the_output_is_ascii(run, arguments):
    """In a folder and with classes whose names are no ASCII, and full of brackets."""
    done = headrace(*arguments, cwd=run, first=ASCII, text=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii()
    assert b"Traceback" not in done.stderr
    assert arguments[0] == "report" or b"[draft] :dog: caf\\xe9" in done.stdout.replace(b"\n", b"")


def test_an_interpreter_is_told_so_by_its_environment(run):
    """As by a locale."""
    command = [sys.executable, "-m", "headrace.pipelines", "status", "recipe.yaml"]
    done = subprocess.run(
        command,
        cwd=run,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"[draft] :dog: caf\\xe9" in done.stdout.replace(b"\n", b"")


@pytest.mark.slow
def test_predictions_on_the_screen_are_utf8_whatever_the_locale(run, tmp_path):
    """Byte for byte the table that a file would hold; what is said beside it is the locale's."""
    new = tmp_path / "é[x].png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(new)
    screen = headrace("predict", "recipe.yaml", new, "--out", "-", cwd=run, first=ASCII, text=False)
    assert screen.returncode == 0, screen.stderr.decode()
    file = headrace("predict", "recipe.yaml", new, "--out", tmp_path / "p.csv", cwd=run)
    assert file.returncode == 0, file.stderr
    assert screen.stdout == (tmp_path / "p.csv").read_bytes()
    header, row = csv.reader(screen.stdout.decode("utf-8").splitlines())
    assert header == ["file", "class", "probability", "p_[rare] :cat: fin é", "p_coarse", "error"]
    assert row[0] == str(new)
    assert screen.stderr.isascii()


def test_no_command_prints_pillows_warnings(monkeypatch):
    """Of a photo's damaged EXIF block, say, once for each picture of a report."""
    monkeypatch.setattr(sys, "argv", ["headrace", "--version"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with pytest.raises(SystemExit):
            main()
        for module_name in ("PIL.TiffImagePlugin", "elsewhere"):
            warnings.warn_explicit(f"of {module_name}", UserWarning, "file.py", 1, module_name)
    assert [str(warning.message) for warning in caught] == ["of elsewhere"]


def test_an_error_shows_the_name_that_was_given(run, monkeypatch, capsys):
    """Brackets, an emoji code, and a byte that is no UTF-8: one sentence, exit code 2."""
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", ["headrace", "status", f"[/x] :dog: {NO_UTF8}"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(
        "Error: [/x] :dog: caf\\xe9.png: no such file or folder."
    )


def test_a_project_whose_name_is_no_utf8_is_told(tmp_path, monkeypatch, capsys):
    """Tables of results hold paths as UTF-8: the name is said before anything is written, and what
    to do.
    """
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    make_photos(folder / "photos", n=4)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["headrace", "run", "recipe.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "caf\\xe9" in (said := capsys.readouterr().err)
    assert "is no UTF-8" in said
    assert "`out`" in said
    assert sorted(path.name for path in folder.iterdir()) == ["photos", "recipe.yaml"]


def test_images_may_lie_in_folders_whose_names_are_no_utf8(tmp_path):
    """And their classes may be called so; the run knows its recipe again."""
    photos = tmp_path / os.fsdecode(b"ph\xe9")
    make_photos(photos, n=24)
    (photos / "fine").rename(photos / os.fsdecode(b"fin\xe9"))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("photos", '"ph\\uDCE9"'), encoding="utf-8")
    run_here(tmp_path / "recipe.yaml")
    report = read_finished_run(tmp_path / "recipe.yaml")
    assert report.recipe.images.folder == photos
    assert not isinstance(report.images, str), report.images
    assert [valid_text(name) for name in report.classes] == ["coarse", "fin\\xe9"]


def test_status_shows_an_error_as_it_was(tmp_path, capsys):
    """The reason why a driver ended may quote anything."""
    with pytest.raises(OSError, match="full"), task_log(RunPaths(tmp_path)):
        raise OSError(f"{HOSTILE}: the disk is full")
    show_status(make_console(), tmp_path)
    assert f"OSError: {HOSTILE}: the disk is full" in capsys.readouterr().out


def write_table(path, task_kind, classes, files=("a.png",), errors=(None,)):
    """A table of these rows with the numbers 0.5."""
    block = TableBlock(
        list(files), np.full((len(files), len(classes)), 0.5, np.float32), list(errors)
    )
    with table_writer(path, path.suffix[1:], task_kind, classes) as write:
        write(block)


@pytest.mark.parametrize(
    ("task_kind", "classes", "expected"),
    [
        ("regression", ("file", "y", "error"), ["file", "file_", "y", "error_", "error"]),
        (
            "regression",
            ("error_", "error", "class"),
            ["file", "error_", "error__", "class", "error"],
        ),
        (
            "single",
            ("robability", "x"),
            ["file", "class", "probability", "p_robability", "p_x", "error"],
        ),
        (
            "multi",
            (NO_UTF8, "caf\\xe9.png"),
            ["file", "class", "p_caf\\xe9.png", "p_caf\\xe9.png_", "error"],
        ),
        ("multi", ("class", "error"), ["file", "class", "p_class", "p_error", "error"]),
    ],
)
def test_no_two_columns_have_one_name(tmp_path, task_kind, classes, expected):
    """A target or class whose column's name is taken has `_` after it; nothing is lost, in any
    format.
    """
    for kind in ("csv", "parquet", "jsonl"):
        write_table(tmp_path / f"p.{kind}", task_kind, classes)
    (header, _) = csv.reader((tmp_path / "p.csv").read_text(encoding="utf-8").splitlines())
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert header == list(table.columns) == expected
    assert table["file"].tolist() == ["a.png"]
    assert (table[expected[-1 - len(classes) : -1]] == 0.5).all(axis=None)
    (line,) = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    numbers = json.loads(line)["values" if task_kind == "regression" else "probabilities"]
    assert list(numbers.values()) == [0.5] * len(classes)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_tables_name_files_whose_names_are_no_utf8(tmp_path, kind):
    """The same text in every format, which is valid UTF-8: an escape for each byte that is none."""
    files = [NO_UTF8, "é\n[x].png"]
    write_table(tmp_path / f"p.{kind}", "regression", (NO_UTF8,), files, [None, f"{NO_UTF8}: gone"])
    if kind == "jsonl":
        lines = [
            json.loads(line)
            for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert [line["file"] for line in lines] == ["caf\\xe9.png", "é\n[x].png"]
        assert [line.get("error") for line in lines] == [None, "caf\\xe9.png: gone"]
        return
    table = (
        pd.read_csv(tmp_path / "p.csv")
        if kind == "csv"
        else pd.read_parquet(tmp_path / "p.parquet")
    )
    assert list(table.columns) == ["file", "caf\\xe9.png", "error"]
    assert table["file"].tolist() == ["caf\\xe9.png", "é\n[x].png"]
    assert table["error"].tolist()[1] == "caf\\xe9.png: gone"


def test_a_notebook_shows_progress_in_one_line_without_widgets(capsys):
    """Written over as work is done; a quiet console shows none."""
    console = Console(force_jupyter=True)
    for console.quiet in (False, True):
        with show_progress(console, "extract", 4, "images") as advance:
            advance(1)
            advance(3, {"decode_share": 0.5, "failed": 2})
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.split("\r")[-1].startswith(f"|{'█' * 20}| extract 4/4 images · ")
    assert line.rstrip().endswith("decode 50% · 2 failed")


@pytest.mark.parametrize("width", [80, 132])
def test_the_gain_of_a_network_is_the_difference_of_the_scores_beside_it(width):
    """And nothing is cut on a narrow screen."""
    row = {"approach": "fine-tuned above blocks.4", "inputs": ("tap",), "settings": "epochs=4"}
    row |= {"accuracy": 0.85, "low": 0.82, "high": 0.88, "minutes": 3.2, "decision": "kept"}
    row |= {"gain": 0.0175, "gain_low": 0.004, "gain_high": 0.03}
    compared = SimpleNamespace(compared=pd.DataFrame([row]))
    result = SimpleNamespace(metric="accuracy", names=("tap",), finetuned=compared, ensemble=None)
    console = Console(width=width, file=io.StringIO())
    console.print(finetune_table(console, result))
    text = " ".join(console.file.getvalue().split())
    assert "…" not in text
    for shown in ("85.00 %", "83.25 %", "1.75 %", "3.2", "kept"):
        assert shown in text
