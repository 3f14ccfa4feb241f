"""Descriptions of the recipe's keys for the reference page and the JSON Schema: the comments beside
them in the source.
"""

import ast
import functools
import inspect
import sys

from headrace.pipelines.recipe.heads import HeadGrid, Heads, SklearnGrid


def field_comments(model: type) -> dict[str, str]:
    """Return, by field, the comment beside it in the source, or the lines of comment above it.

    For a section that is derived from a head's spec: the comments in the spec and in the section's
    base classes.
    """
    if issubclass(model, HeadGrid) and model is not SklearnGrid:
        # From HeadGrid down to the section's own base; the section itself has no source.
        sources = [*model.__mro__[model.__mro__.index(HeadGrid) :: -1][:-1], model.head_kind.spec]
        return {name: text for source in sources for name, text in _source_comments(source).items()}
    if model is Heads:  # its sections have no comments
        return {}
    return _source_comments(model)


def _source_comments(model: type) -> dict[str, str]:
    """Return the comments of the fields in the source of one class."""
    lines, classes = _parsed_source(model.__module__)
    comments = {}
    for node in classes[model.__name__].body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        assert node.end_lineno
        last_line = lines[node.end_lineno - 1]
        beside = last_line[node.end_col_offset :].partition("#")[2].strip()
        above: list[str] = []
        line_index = node.lineno - 2
        while line_index >= 0 and lines[line_index].strip().startswith("#"):
            above.insert(0, lines[line_index].strip().lstrip("# "))
            line_index -= 1
        comments[node.target.id] = beside or " ".join(above)
    return comments


@functools.cache
def _parsed_source(module_name: str) -> tuple[list[str], dict[str, ast.ClassDef]]:
    """Return the lines of a module's source, and its classes by name."""
    # Parsed once: `inspect.getsource` of a class parses the whole module, for each of 30 classes,
    # which was most of the time of `headrace init`.
    source = inspect.getsource(sys.modules[module_name])
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return source.splitlines(), classes
