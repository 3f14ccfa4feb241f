"""The pages: built without a warning and read without a network, complete, and without a name that
does not exist.
"""

import ast
import html.parser
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest
import sphinx
import yaml
from sphinx.search.en import SearchEnglish
from sphinx.util.inventory import InventoryFile
from support import runs
from typer.main import get_command
from typer.testing import CliRunner

import headrace
from headrace.pipelines.cli.cache.app import app as cache_app
from headrace.pipelines.cli.cluster import app as cluster_app
from headrace.pipelines.cli.main import app
from headrace.pipelines.recipe.load import Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(
        page
        for page in DOCS.rglob("*.md")
        if "_site" not in page.parts and page.parent.name != "reference"
    ),
]
CLI = (DOCS / "reference" / "cli.md").read_text()
RECIPE = (DOCS / "reference" / "recipe.md").read_text()


def name_of(page):
    """Short, for the tests' names."""
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    """The fenced code blocks of one language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", folder / "trees"]
    script = Path(sphinx.__file__).with_name("__main__.py")
    # What it builds stays until it ends: looking through all of it for garbage is a third of the time.
    done = runs.headrace(
        *options,
        DOCS,
        folder / "html",
        cwd=ROOT,
        timeout=500,
        first="import gc; gc.disable()",
        script=script,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


class Links(html.parser.HTMLParser):
    """What a page points to, what it loads by itself, and the places in it that can be
    pointed to.
    """

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.places = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.places |= {values.get("id"), values.get("name")}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        loaded = values.get("src") or (values.get("href") if tag == "link" else None)
        if loaded and values.get("rel") not in ("index", "search", "next", "prev", "genindex"):
            self.loads.append(loaded)


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    """Each page and each place in it exists; no page needs a network."""
    pages = {file: Links(file.read_text()) for file in site.rglob("*.html")}
    assert len(pages) > 10
    for file, found in pages.items():
        for link in found.loads:
            assert not re.match(r"(https?:)?//", link), f"{file.name} loads {link}"
        for link in found.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, place = unquote(link).partition("#")
            page = (file.parent / target).resolve() if target else file
            assert page.exists(), f"{file.name} links to {link}"
            if place and page in pages:
                assert place in pages[page].places, f"{file.name} links to {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("hugging face", "extraction"),
        ("windows", "install"),
        ("multi-label", "multi-label"),
        ("patients", "gallery/patients"),
    ],
)
def test_the_search_of_the_site_finds(site, query, page):
    """A page that has every word of the query, by the site's own index."""
    script = (site / "searchindex.js").read_text()
    index = json.loads(script.removeprefix("Search.setIndex(").rstrip(")\n; "))
    stem = SearchEnglish({}).stem

    def pages_with(word):
        found = [index[table].get(stem(word), []) for table in ("terms", "titleterms")]
        return {number for each in found for number in (each if isinstance(each, list) else [each])}

    found = set.intersection(*map(pages_with, re.findall(r"\w+", query)))
    assert page in {index["docnames"][number] for number in found}


def documented_names(site):
    """Every Python name that the site's index has, by kind: {"function": {"headrace.x.y", ...}}."""
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    return {
        kind.removeprefix("py:"): set(names)
        for kind, names in inventory.items()
        if kind.startswith("py:")
    }


def resolve(name):
    """The object of a dotted name: import the longest module in it, then look up attributes."""
    words = name.split(".")
    for size in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:size]))
        except ModuleNotFoundError:
            continue
        for word in words[size:]:
            found = getattr(found, word)
        return found
    raise AssertionError(f"no module of {name}")


@pytest.mark.slow
def test_every_name_of_the_public_face_is_documented(site):
    """The names in `headrace.__all__`, and no other names of `headrace` itself."""
    names = set().union(*documented_names(site).values())
    documented = {name for name in names if re.fullmatch(r"headrace\.[A-Za-z]\w+", name)}
    documented = {name for name in documented if not inspect.ismodule(resolve(name))}
    public = set(headrace.__all__) - {"__version__"}
    assert {name.removeprefix("headrace.") for name in documented} == public


@pytest.mark.slow
def test_every_documented_name_exists_and_says_what_it_is(site):
    """Functions, classes and methods have docstrings of their own; constants exist."""
    names = documented_names(site)
    for name in sorted(names["function"] | names["class"] | names["exception"] | names["method"]):
        assert resolve(name).__doc__, name
    for name in sorted(names["data"]):
        resolve(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "package",
    [
        "cache",
        "extract",
        "heads",
        "pipelines.advice",
        "pipelines.finetune",
        "pipelines.models",
        "pipelines.report",
        "pipelines.selection",
    ],
)
def test_the_packages_have_their_functions_in_the_reference(site, package):
    """Several names of each package: no topic is left out of the Python pages."""
    home = f"headrace.{package}."
    names = documented_names(site)
    found = {name for name in names["function"] | names["class"] if name.startswith(home)}
    assert len(found) >= 2, package


def helped():
    """What `--help` itself shows: {full name of a command: its options}."""
    runner, found = CliRunner(), {}

    def walk(command, words):
        text = runner.invoke(app, [*words, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        options = set(
            re.findall(
                r"(?<![\w-])--[a-z][a-z-]+", "\n".join(re.findall(r"^│ [ *]*(--.*)$", text, re.M))
            )
        )
        children = getattr(command, "commands", {})
        if not children:
            found[" ".join(["headrace", *words])] = options - {"--help"}
        for name, child in children.items():
            walk(child, [*words, name])

    walk(get_command(app), [])
    return found


HELPED = helped()


def test_every_command_and_option_is_documented_and_every_documented_one_exists():
    """reference/cli.md against what `--help` prints."""
    sections = dict(re.findall(r"^## (headrace [^\n]*)\n(.*?)(?=^## |\Z)", CLI, re.S | re.M))
    assert set(sections) == set(HELPED)
    assert any(HELPED.values())
    for name, text in sections.items():
        listed = set(
            re.findall(r"`(--[a-z][a-z-]+)`", "\n".join(re.findall(r"^\| (`-.*?) \|", text, re.M)))
        )
        assert listed == HELPED[name], name


def test_paragraphs_of_help_wrap_where_the_terminal_ends():
    """No line of a docstring breaks where the source had ended it."""
    for commands in (app, cache_app, cluster_app):
        for command in commands.registered_commands:
            assert not re.search(r"[^\n]\n[^\n]", command.help), command.callback


def test_every_command_shows_an_example_in_a_line_of_its_own():
    """And the example is of that command, with options that it has (as `headrace --help` shows them
    in its reference).
    """
    for name, text in re.findall(r"^## (headrace [^\n]*)\n(.*?)(?=^## |\Z)", CLI, re.S | re.M):
        (example,) = re.findall(r"^```sh\n(.*?)\n```", text, re.S | re.M)
        assert example.startswith(name), name
        assert {word for word in shlex.split(example) if word.startswith("--")} <= HELPED[name], (
            name
        )


def test_every_recipe_key_is_documented_and_every_documented_one_exists():
    """reference/recipe.md against the recipe's JSON schema."""
    schema = Recipe.model_json_schema()
    expected = {("", key) for key in schema["properties"]}

    def walk(node, path):
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
            expected.update((".".join(path), key) for key in node.get("properties", {}))
        for key, child in node.get("properties", {}).items():
            walk(child, (*path, key))
        for child in [*node.get("anyOf", []), node.get("items", {})]:
            if isinstance(child, dict) and child:
                walk(child, path)

    for key, child in schema["properties"].items():
        walk(child, (key,))
    documented = set()
    for title, text in re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", RECIPE, re.S | re.M):
        section = "" if title == "Top level" else title
        documented |= {(section, key) for key in re.findall(r"^\| `(\w+)` \|", text, re.M)}
    assert documented == expected


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_pages_exist(page):
    """Each `headrace …` in a block of commands is a command with options that it has."""
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["headrace"] or words[1:2] in (
            ["--help"],
            ["--version"],
            ["--install-completion"],
        ):
            continue
        names = [" ".join(words[:size]) for size in (2, 3)]
        name = next((name for name in names if name in HELPED), None)
        assert name, f"{page.name}: there is no command {line!r}"
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= HELPED[name] | {"--help"}, f"{page.name}: {line!r}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_in_the_pages_are_valid(page):
    """Each block of YAML is a recipe, or a part of one with right keys and values."""
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        Recipe.model_validate(
            {"images": {"folder": "photos"}, "backbones": [{"name": "timm:resnet18"}], **values}
        )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_pages_imports_what_there_is(page):
    """Each block of Python can be read, and every name that it takes from headrace is there."""
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headrace"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), (
                        f"{page.name}: {node.module} has no {alias.name}"
                    )
