"""The shape of the tree: the packages listed are the folders on disk, arrows run one way, imports
stay light.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.imports import loaded_after

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "cache": {"cache"},
    "extract": {"extract", "cache"},
    "heads": {"heads", "cache"},
    "pipelines": {"pipelines", "extract", "heads", "cache"},
}


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever in it, fully named."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_run_one_way(package):
    """cache imports none of ours; extract and heads import cache, never each other; pipelines
    imports all three.
    """
    for file in sorted((ROOT / package).rglob("*.py")):
        ours = {name.split(".")[1] for name in imports(file) if name.startswith("headrace.")}
        assert ours <= ALLOWED[package], (
            f"{file.relative_to(ROOT)} imports {ours - ALLOWED[package]}"
        )


ROOMS = {
    "evidence": set(),
    "finetune": set(),
    "doctor": set(),
    "deliver": {"finetune"},
    "report": {"evidence", "deliver"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_run_one_way_within_pipelines(room):
    """Also those that a function follows when it runs."""
    for file in sorted((ROOT / "pipelines" / room).glob("*.py")):
        names = (
            name.split(".") for name in imports(file) if name.startswith("headrace.pipelines.")
        )
        others = {name[2] for name in names} & ROOMS.keys() - {room}
        assert others <= ROOMS[room], f"{file.relative_to(ROOT)} imports {others - ROOMS[room]}"


def test_no_module_is_imported_by_its_bare_folder_name():
    """`import cache` would give a second copy whose classes are not the same classes."""
    for package in ALLOWED:
        for file in sorted((ROOT / package).rglob("*.py")):
            bare = {name.split(".")[0] for name in imports(file)} & set(ALLOWED)
            assert not bare, f"{file.relative_to(ROOT)} imports {bare}"


def test_listed_packages_are_the_folders_on_disk():
    """A folder that is not listed would be missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]["packages"]
    on_disk = {"headrace"} | {
        "headrace." + ".".join(file.parent.relative_to(ROOT).parts)
        for package in ALLOWED
        for file in (ROOT / package).rglob("__init__.py")
    }
    assert set(listed) == on_disk
    assert (ROOT / "api" / "py.typed").exists()  # of the whole package (PEP 561)


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file with the name that is called, without what stands before the
    last dot.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield (node.func.id if isinstance(node.func, ast.Name) else node.func.attr), node


def sources() -> list[Path]:
    """The files of the four packages."""
    return [file for package in ALLOWED for file in sorted((ROOT / package).rglob("*.py"))]


def test_consoles_are_made_in_one_place():
    """There text is text.

    A console of rich's own takes brackets in a folder's name for colours, and `:dog:` for a
    picture.
    """
    for file in sources():
        for name, call in calls(file):
            where = f"{file.relative_to(ROOT)}, line {call.lineno}"
            keywords = {keyword.arg for keyword in call.keywords}
            assert name != "Console", f"{where}: use pipelines.console.make_console"
            assert name != "from_markup", f"{where}: give the text a style"
            assert name != "TextColumn" or "markup" in keywords, f"{where}: markup=False"
        assert "rich.print" not in imports(file)


def opens_text(name: str, call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a text file: open(FILE, MODE), PATH.open(MODE),
    os.fdopen(NUMBER, MODE), …

    Image.open(FILE) and other libraries' have an argument that is no mode.
    """
    if name in ("read_text", "write_text"):
        return True
    if name not in ("open", "fdopen"):
        return False
    at = 1 if name == "fdopen" or isinstance(call.func, ast.Name) else 0
    mode = next((keyword.value for keyword in call.keywords if keyword.arg == "mode"), None)
    mode = mode or next(iter(call.args[at : at + 1]), ast.Constant("r"))
    return isinstance(mode, ast.Constant) and re.fullmatch("[rwxat+]+", str(mode.value)) is not None


def test_text_files_name_their_encoding():
    """What is written on one machine is read on another, whatever the locales are:

    UTF-8, and said so.
    """
    for file in sources():
        for name, call in calls(file):
            named = any(keyword.arg == "encoding" for keyword in call.keywords)
            where = f"{file.relative_to(ROOT)}, line {call.lineno}"
            assert named or not opens_text(name, call), f'{where}: {name}(…, encoding="utf-8")'


def test_a_logistic_head_needs_neither_torch_nor_torchvision():
    """A worker that trains a logistic head on the CPU pays for no deep-learning import."""
    code = (
        "import numpy as np\n"
        "from headrace import LogisticHead\n"
        "X = np.random.default_rng(0).normal(size=(40, 5))\n"
        "head = LogisticHead().fit(X, X[:, 0] > 0)\n"
        "assert head.score(X, X[:, 0] > 0) > 0.9\n"
    )
    assert not {"torch", "torchvision", "timm"} & loaded_after(code)


def test_help_needs_no_heavy_import():
    """`headrace --help` and bad input answer at once."""
    heavy = {"torch", "torchvision", "timm", "distributed", "sklearn", "scipy", "pandas"}
    assert not heavy & loaded_after("import headrace.pipelines.cli.main")
    assert not {"torch", "sklearn", "scipy"} & loaded_after("import headrace.heads.bank")
    assert not {"torch", "sklearn"} & loaded_after(
        "import headrace.pipelines.run, headrace.pipelines.cli.status"
    )
