"""Sphinx builds the site from the Markdown in this folder:

`make docs`, warnings are errors, nothing is fetched.
"""

import importlib.metadata
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

project = "headrace"
author = "the headrace authors"
copyright = author
version = release = importlib.metadata.version("headrace")

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_site", "**/.ipynb_checkpoints"]
nitpicky = False

# Notebooks are shown with the outputs that they keep; tests/docs/test_notebooks.py runs them.
nb_execution_mode = "off"
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "alphabetical"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
default_role = "code"
# A field called `bytes` beside the type of that name: autodoc's cross-references take one for the
# other.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = "headrace"
html_copy_source = False
html_show_sphinx = False
html_theme_options: dict[str, Any] = {}

# Pages of the tree that the site shows under another name, because they stand where the code is.
SHOWN_AS = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "concepts/architecture.md",
    "CHANGELOG.md": "changelog.md",
    "cache/FORMAT.md": "reference/format.md",
}


def point_into_the_site(text: str, folder: str, page: str) -> str:
    """Links to files outside docs/ point to the page that shows the file; other files are named and
    not linked.

    folder: where the text's own links start, from the root of the tree; page: the page that shows
    it, from docs/.
    """

    def target(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[2]))
        if path in SHOWN_AS:
            path = f"docs/{SHOWN_AS[path]}"
        if path.startswith("docs/"):
            link = posixpath.relpath(path, posixpath.dirname(f"docs/{page}"))
            return f"[{found[1]}]({link}{found[3] or ''})"
        return f"`{path}`"

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)", target, text)


def read_page(app: Any, name: str, source: list[str]) -> None:
    """Of a page in docs/."""
    if not name.startswith("notebooks/"):
        source[0] = point_into_the_site(source[0], posixpath.dirname(f"docs/{name}"), name)


def read_included(app: Any, path: Path, name: str, source: list[str]) -> None:
    """Of a page elsewhere that one in docs/ shows."""
    file = Path(app.srcdir, path).resolve().relative_to(ROOT).as_posix()
    source[0] = point_into_the_site(
        source[0], posixpath.dirname(file), SHOWN_AS[file]
    )  # `name` lacks its folder


def markdown_to_rst(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings are plain text with `code` in single back-quotes; autodoc expects
    reStructuredText.
    """
    if lines and lines[0].startswith(
        "Alias for field number"
    ):  # what Python itself says of a named tuple's field
        lines.clear()
    text = "\n".join(lines)
    parts = re.split(r"(``[^`]+``|`[^`]+`)", text)
    for at, part in enumerate(parts):
        if part.startswith("`"):
            parts[at] = f"``{part.strip('`')}``"
        else:
            parts[at] = re.sub(r"(?<=\w)_(?=\W|$)|[*|]", lambda found: "\\" + found[0], part)
    out: list[str] = []
    for line in "".join(parts).split("\n"):
        indented = line.startswith("    ") and line.strip()
        if indented and out and out[-1].strip() and not out[-1].startswith("    "):
            out += ["", "::", ""] if not out[-1].rstrip().endswith("::") else [""]
        elif out and out[-1].startswith("    ") and line.strip() and not indented:
            out.append("")
        out.append(line)
    lines[:] = out


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-docstring", markdown_to_rst)
