"""The shape of the tree: the packages listed are the folders on disk, arrows run one way, imports
stay light.
"""

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.imports import loaded_after_each

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "cache": {"cache"},
    "extract": {"extract", "cache"},
    "heads": {"heads", "cache"},
    "pipelines": {"pipelines", "extract", "heads", "cache"},
}


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(file: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file."""
    return tuple(ast.walk(parsed(file)))


@functools.cache
def imports(file: Path, *, types: bool = True, functions: bool = True) -> set[str]:
    """Every module that a file imports, wherever in it, fully named; also `a.b` for the name b of a
    module a, which may be a module.

    types: also what is imported for type checkers alone. functions: also what functions import.
    """
    names: set[str] = set()
    everything = types and functions
    for node in nodes_of(file) if everything else nodes(parsed(file), types, functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def nodes(tree: ast.AST, types: bool, functions: bool) -> Iterator[ast.AST]:
    """All nodes of a tree; with `types` off, without those under `if TYPE_CHECKING:`, and with
    `functions` off, without those in functions.
    """
    yield tree
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if (types or not typing_only) and (functions or not isinstance(node, ast.FunctionDef)):
            yield from nodes(node, types, functions)


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


# Rooms of each package (its folders, and the files beside them), lowest level first: a room imports
# from the levels below it alone, also in functions, never from its own level or above.
LEVELS = {
    "cache": (
        {"count_text", "errors", "out_of_memory", "text"},
        {
            "atomic_io",
            "file_stamps",
            "home",
            "ids",
            "mapping",
            "row_index",
            "spec",
            "torch_dataset",
        },
        {"format"},
        {"manifest", "disk_space"},
        {"checksum"},
        {"publish"},
        {"reader"},
        {"batches"},
        {"feature_set"},
        {"integrity"},
        {"exchange"},
    ),
    "extract": (
        {"cores", "errors"},
        {"images"},
        {"sources", "spec"},
        {"backbones"},
        {"taps"},
        {"run"},
    ),
    "heads": (
        {"arrays", "errors"},
        {"data", "spec"},
        {"evaluate"},
        {"link"},
        {"layers", "unit_rule"},
        {"kind"},
        {"linear", "neighbors", "networks"},
        # Kinds of head that build on those above, and any new one: see `level_of_rooms`.
        {"bags", "discriminant", "sklearn"},
        {"kinds"},
        {"predict", "results"},
        {"bank", "estimators", "persist"},
    ),
    "pipelines": (
        {
            "console",
            "errors",
            "feature_input",
            "number_format",
            "paths",
            "records",
            "thread_memory",
        },
        {"environment", "given_images", "moved_paths", "recipe"},
        {"cluster", "run_directory"},
        {"doctor", "models"},
        {"finetune", "selection"},
        {"export", "planning", "predict"},
        {"finished", "stages"},
        {"result"},
        {"advice", "report", "trackers"},
        {"run"},
        {"api", "cli"},
        {"__main__"},
    ),
}


def level_of_rooms(package: str) -> dict[str, int]:
    """{room: its level}. A folder of `heads` with a kind.py need not be listed."""
    levels = {room: level for level, rooms in enumerate(LEVELS[package]) for room in rooms}
    kinds = {file.parent.name for file in (ROOT / "heads").glob("*/kind.py")}
    return dict.fromkeys(kinds, levels["bags"]) | levels if package == "heads" else levels


@pytest.mark.parametrize("package", LEVELS)
def test_arrows_run_downwards_between_rooms(package):
    """Also those that a function follows when it runs."""
    levels = level_of_rooms(package)
    for file in sorted((ROOT / package).rglob("*.py")):
        room = file.relative_to(ROOT / package).parts[0].removesuffix(".py")
        names = (name.split(".") for name in imports(file))
        imported = {name[2] for name in names if name[:2] == ["headrace", package] and name[2:]}
        for other in imported - {room}:
            assert levels[other] < levels[room], (
                f"{file.relative_to(ROOT)}: {room} (level {levels[room]}) imports {other} "
                f"(level {levels[other]})"
            )


@pytest.mark.parametrize("package", LEVELS)
def test_no_modules_import_each_other(package):
    """Neither directly nor in a circle, neither openly nor in functions; for types alone they may.

    A kind of head (kind.py) stands beside the specs that its solver reads, and looks the solver up
    in functions, so that a list of the kinds imports none.
    """
    modules = {module_name(file): file for file in (ROOT / package).rglob("*.py")}
    remaining = {
        name: imports(file, types=False, functions=file.name != "kind.py") & modules.keys() - {name}
        for name, file in modules.items()
    }
    while free := [name for name, others in remaining.items() if not others & remaining.keys()]:
        for name in free:
            del remaining[name]
    assert not remaining, f"in circles, or above one: {', '.join(sorted(remaining))}"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "headrace." + ".".join(part for part in parts if part != "__init__")


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
    for node in nodes_of(file):
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


def test_what_imports_and_a_logistic_head_need():
    """`headrace --help` and bad input answer at once; a second call on a finished run, with or
    without networks, reads tables only; a worker that trains a logistic head on the CPU pays for no
    deep-learning import. In one interpreter: what comes later has no less loaded.
    """
    head = (
        "import numpy as np\n"
        "from headrace import LogisticHead\n"
        "X = np.random.default_rng(0).normal(size=(40, 5))\n"
        "head = LogisticHead().fit(X, X[:, 0] > 0)\n"
        "assert head.score(X, X[:, 0] > 0) > 0.9"
    )
    torch = {"torch", "torchvision", "timm"}
    numeric = {"sklearn", "scipy"}
    by_help, by_bank, by_run, by_finetuning, by_head = loaded_after_each(
        "import headrace.pipelines.cli.main",
        "import headrace.heads.bank",
        "import headrace.pipelines.run, headrace.pipelines.cli.status",
        "import headrace.pipelines.finetune.stage",
        head,
    )
    assert not (torch | numeric | {"distributed", "pandas", "pydantic"}) & by_help
    assert not (torch | numeric) & by_bank
    assert not (torch | {"sklearn"}) & by_run
    assert not torch & by_finetuning
    assert not torch & by_head
