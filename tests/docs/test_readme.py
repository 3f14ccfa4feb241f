"""The README does what it says: its commands, its recipe and its Python run as written, and its
tree is the tree.
"""

import os
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from support import runs
from typer.main import get_command
from typer.testing import CliRunner

import headrace
from headrace.pipelines.cli.main import app
from headrace.pipelines.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(language, text=README):
    """The fenced code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of photos, as a reader of the README has one."""
    folder = tmp_path_factory.mktemp("readme")
    runs.make_photos(folder / "photos", n=40)
    return folder


def test_the_two_commands_are_words_of_the_makefile():
    """`make demo` and `make test`."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    asked = set(re.findall(r"^make ([a-z]+)", "\n".join(blocks("sh")), re.M))
    assert {"demo", "test"} <= asked <= targets


@pytest.mark.slow
def test_its_commands_run_as_written(folder):
    """init, and the recipe that the README shows; test_newcomer.py runs the others on its folder."""
    commands = [
        line
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("headrace ")
    ]
    assert [command.split()[1] for command in commands] == ["init", "run", "run", "report"]
    done = runs.headrace(*shlex.split(commands[0], comments=True)[1:], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (recipe,) = blocks("yaml")
    (folder / "readme.yaml").write_text(recipe)
    assert load_recipe(folder / "readme.yaml").images.folder == folder / "photos"
    done = runs.headrace("run", "readme.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_its_python_runs_as_written(folder):
    """Each block is a script of its own, run where the photos are."""
    for number, block in enumerate(blocks("python")):
        script = folder / f"block{number}.py"
        script.write_text(block)
        done = runs.headrace(cwd=folder, script=script)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        assert done.stdout


EXAMPLES = blocks("python", (ROOT / "docs/reference/python/examples.md").read_text())


@pytest.mark.slow
def test_the_examples_of_public_names_run(folder, monkeypatch):
    """In order, as one program."""
    monkeypatch.chdir(folder)
    names = {"__name__": "examples"}
    for block in EXAMPLES:
        exec(block, names)


def test_every_public_name_and_method_has_an_example():
    """Of classes, the methods that headrace defines; of models, those that all of them have."""
    text = "\n".join(EXAMPLES)
    public = {name: getattr(headrace, name) for name in headrace.__all__}
    assert not [name for name in public if not re.search(rf"\b{name}\b", text)]
    methods = {
        method
        for thing in public.values()
        if isinstance(thing, type)
        for method in methods_of(thing)
    }
    methods |= set.intersection(*(methods_of(kind) for kind in typing.get_args(headrace.Model)))
    assert len(methods) > 15
    assert not [name for name in methods if not re.search(rf"\.{name}\(", text)]


def methods_of(kind):
    """Public methods of a class that are not a library's."""
    return {
        name
        for name in dir(kind)
        if not name.startswith("_")
        and getattr(getattr(kind, name), "__module__", "").startswith("headrace")
    }


def test_its_tree_is_the_tree():
    """The folders are those on disk, and each module begins with what it is for, as the README
    says.
    """
    tree = README.split("## The tree")[1]
    packages = re.findall(r"^([a-z]+)/ ", tree, re.M)
    assert packages == ["extract", "cache", "heads", "pipelines"]
    for package in packages:
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert text.startswith('"""') or file.name == "__init__.py" or not text, file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_tree_resolves(page):
    """Pictures and pages."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_references_of_commands_and_recipe_keys_are_what_the_code_says():
    """docs/reference/cli.md and recipe.md, which are written by docs/generate.py."""
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_command_and_option_has_help():
    """`--help` says what each is for."""

    def walk(command, name):
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None) or parameter.name in (
                "install_completion",
                "show_completion",
            ), f"{name} {parameter.name}"
        for child, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{name} {child}")

    walk(get_command(app), "headrace")


def test_help_names_values_by_words():
    """PATH and NUMBER, where typer would write Python's types: <list[Path]>, <bool> of --help."""
    for command in (["cache", "gc"], ["report"], ["cache", "import"], []):
        shown = CliRunner().invoke(app, [*command, "--help"]).output
        assert not re.search(r"<(list|bool|str|int|float|path)", shown)
    assert "PATH ..." in CliRunner().invoke(app, ["cache", "gc", "--help"]).output


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_example_recipe_is_valid(recipe):
    """Every key of every example is one that headrace knows."""
    load_recipe(recipe)


def test_the_shell_completes_commands():
    """What `headrace --install-completion` puts into the shell asks the program, and it answers."""
    environment = os.environ | {
        "_HEADRACE_COMPLETE": "complete_bash",
        "COMP_WORDS": "headrace pre",
        "COMP_CWORD": "1",
    }
    headrace = Path(sys.executable).with_name("headrace")
    done = subprocess.run([headrace], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["predict"]
