"""Writes the pages that the code knows best: reference/cli.md from the commands,
reference/recipe.md from the recipe's model, reference/json.md from what `--json` prints.

python docs/generate.py            # write them
python docs/generate.py --check    # say which are not what the code says, exit code 1
"""

import enum
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
from typer.main import get_command

from headrace.pipelines.cli.json_output import ERROR, OUTPUTS
from headrace.pipelines.cli.main import app
from headrace.pipelines.recipe.field_comments import field_comments
from headrace.pipelines.recipe.load import Recipe

FOLDER = Path(__file__).parent / "reference"
COMPLETION = (
    "install_completion",
    "show_completion",
)  # Typer's own, described in the page's introduction


def main() -> int:
    """Write the pages, or compare them."""
    stale = [
        page for page, text in pages().items() if not page.exists() or page.read_text() != text
    ]
    if "--check" in sys.argv[1:]:
        for page in stale:
            sys.stderr.write(f"{page.name} is not what the code says. Write it again: make docs\n")
        return 1 if stale else 0
    for page in stale:
        page.write_text(pages()[page])
    return 0


def pages() -> dict[Path, str]:
    """The generated pages: path and text."""
    return {
        FOLDER / "cli.md": cli_page(),
        FOLDER / "recipe.md": recipe_page(),
        FOLDER / "json.md": json_page(),
    }


# What --json prints


def json_page() -> str:
    """The objects that commands print with --json: every field, its type and its comment."""
    text = [
        (
            "<!-- Written by docs/generate.py from the objects themselves: do not edit, run `make "
            "docs`. -->\n\n# JSON output\n"
        ),
        "Every command but `demo` takes `--json`: the standard output is one JSON object then, "
        "progress goes to the standard error, and the exit code is the same as without it. A call "
        "that ends without its result prints an object with the one key `error`, and the message "
        "on the standard error too; one that ends with 1 and an object of its own (a problem that "
        "`doctor` or `cache verify` found, predictions that all failed) says in it what is wrong. "
        "`headrace schema 'cache ls'` prints an object's JSON Schema, `headrace schema recipe` "
        "that of recipes. Times are seconds and sizes bytes; a number that was not measured is "
        "null.\n",
    ]
    for command, model in OUTPUTS.items():
        title = "Errors" if command == ERROR else f"headrace {command} --json"
        text += [f"## {title}\n", *object_rows(model)]
    parts = dict.fromkeys(part for model in OUTPUTS.values() for part in parts_of(model))
    for part in parts:
        text += [f"## {part.__name__}\n", *object_rows(part)]
    return "\n".join(text)


def object_rows(model: type[pydantic.BaseModel]) -> list[str]:
    """The docstring, unless it only names the command, and the table of the fields."""
    schema = model.model_json_schema(mode="serialization")
    docstring = inspect.cleandoc(model.__doc__ or "")
    meaning = docstring.partition(": ")[2] if docstring.startswith("`headrace") else docstring
    comments = {
        name: comment
        for base in reversed(model.__mro__)
        if issubclass(base, pydantic.BaseModel) and base.model_fields
        for name, comment in field_comments(base).items()
    }
    rows = [f"{meaning[0].upper()}{meaning[1:]}\n"] if meaning else []
    rows += ["| field | value | |\n|---|---|---|"]
    for name, field in schema["properties"].items():
        kind = cell(json_kind(field))
        rows.append(f"| `{name}` | {kind} | {cell(comments.get(name, ''))} |")
    return [*rows, ""]


def json_kind(schema: dict[str, Any]) -> str:
    """A JSON schema in words, objects by their names: `list of Setting`, `number or null`."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(json_kind(part) for part in schema["anyOf"])
    if schema.get("type") == "array" and schema.get("items"):
        return f"list of {json_kind(schema['items'])}"
    if schema.get("type") == "null":
        return "null"
    if schema.get("format") == "date-time":
        return "time, ISO 8601"
    return kind_text(schema, {})


def parts_of(model: type[pydantic.BaseModel]) -> Iterator[type[pydantic.BaseModel]]:
    """The objects inside an object, each before its own parts."""
    for field in model.model_fields.values():
        if found := child_model(field.annotation):
            yield found[0]
            yield from parts_of(found[0])


# The command line


def cli_page() -> str:
    """Every command with its help, arguments and options."""
    root = get_command(app)
    commands = [
        (name, command)
        for name, command in walk(root, "headrace")
        if not hasattr(command, "commands")
    ]
    parts = [
        (
            "<!-- Written by docs/generate.py from the commands themselves: do not edit, run `make "
            "docs`. -->\n\n# Commands\n"
        ),
        paragraphs(root.help),
        "Exit codes: 0 done; 1 something is wrong with what was looked at; 2 a mistake in what was "
        "asked, told in one message; 130 interrupted.\n\n"
        "`headrace --install-completion` teaches your shell (bash, zsh, fish, PowerShell) to "
        "complete commands and options with the Tab key; `headrace --show-completion` prints what "
        "that would add. `headrace --version` prints the version.\n",
        "| command | what it does |\n|---|---|\n"
        + "".join(
            f"| [`{name}`](#{name.replace(' ', '-')}) | {cell(first_sentence(command.help))} |\n"
            for name, command in commands
        ),
    ]
    return "\n".join(parts) + "".join(command_text(name, command) for name, command in commands)


def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A command and all below it, with their full names."""
    yield name, command
    for child, sub in getattr(command, "commands", {}).items():
        if not sub.hidden:
            yield from walk(sub, f"{name} {child}")


def command_text(name: str, command: Any) -> str:
    """One command's section."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [
        p
        for p in command.params
        if p.param_type_name == "option" and p.name not in COMPLETION and not p.hidden
    ]
    usage = " ".join([name, *(["[OPTIONS]"] if options else []), *(metavar(p) for p in arguments)])
    hints = typing.get_type_hints(command.callback)
    text = f"\n## {name}\n\n```\n{usage}\n```\n\n{paragraphs(command.help)}\n"
    for title, parameters in (("argument", arguments), ("option", options)):
        if parameters:
            text += f"| {title} | default | what it is |\n|---|---|---|\n"
            for p in parameters:
                text += (
                    f"| {spelling(p, hints.get(p.name))} | {default_text(p)} | {cell(p.help)} |\n"
                )
            text += "\n"
    return text.rstrip("\n") + "\n"


def metavar(argument: Any) -> str:
    """RECIPE, [FOLDER], IMAGES..., as the usage line of `--help` has it."""
    name = argument.metavar or argument.name.upper()
    name += "..." if argument.nargs != 1 else ""
    return name if argument.required else f"[{name}]"


def spelling(parameter: Any, annotation: Any) -> str:
    """`--out`, `-o` PATH, or an argument's name."""
    if parameter.param_type_name == "argument":
        return f"`{metavar(parameter).strip('[]')}`"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} {cell(value_text(annotation))}"


def value_text(annotation: Any) -> str:
    """What an option expects: PATH, NUMBER, TEXT, or its choices."""
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    if inner:
        if typing.get_origin(annotation) is typing.Literal:
            return "one of " + ", ".join(map(str, inner))
        return value_text(inner[0]) + (
            ", repeated" if typing.get_origin(annotation) in (list, tuple) else ""
        )
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(str(choice.value) for choice in annotation)
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def default_text(parameter: Any) -> str:
    """As it would be typed; nothing for a switch or what has no default."""
    if parameter.required:
        return "required"
    value = parameter.default
    if (
        value is None
        or value is False
        or callable(value)
        or value == ()
        or type(value).__name__ == "Sentinel"
    ):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def paragraphs(text: str | None) -> str:
    """Help as Markdown: `Example: COMMAND` becomes a block that can be copied."""
    out = []
    for paragraph in inspect.cleandoc(text or "").replace("\b\n", "").split("\n\n"):
        before, mark, command = " ".join(paragraph.split()).partition("Example: ")
        out.append(
            f"{before.rstrip()}\n\n```sh\n{command}\n```\n".lstrip() if mark else f"{before}\n"
        )
    return "\n".join(out)


def first_sentence(text: str | None) -> str:
    """Of a help text, without its example."""
    first = inspect.cleandoc(text or "").split("\n\n")[0]
    return " ".join(first.split()).partition(" Example: ")[0]


# The recipe


def recipe_page() -> str:
    """Every key of the recipe: type, default and the comment that stands beside it in the code."""
    text = [
        (
            "<!-- Written by docs/generate.py from the recipe's model: do not edit, run `make "
            "docs`. -->\n\n# Recipe keys\n"
        ),
        "A recipe is a YAML file; `headrace init` writes one with comments. Relative paths start "
        "from the recipe's folder. A key that does not exist, or a value that cannot be, is "
        "answered with the line and the nearest right one. Where a list is asked for, every "
        "combination of the lists of a section is tried.\n",
    ]
    for path, model, many in sections(Recipe, ()):
        title = ".".join(path) if path else "Top level"
        text += [f"## {title}\n", f"{inspect.cleandoc(model.__doc__ or '')}\n"]
        if many:
            text += ["A list of these.\n"]
        rows = field_comments(model)
        text += ["| key | value | default | |\n|---|---|---|---|"]
        schema = model.model_json_schema(by_alias=True)
        for name, field in model.model_fields.items():
            child = child_model(field.annotation)
            if child:
                link = ".".join((*path, name))
                kind = (
                    f"{'list of sections' if child[1] else 'section'}, see "
                    f"[{link}](#{link.replace('.', '')})"
                )
            else:
                kind = cell(kind_text(schema["properties"][name], schema.get("$defs", {})))
            text += [
                (
                    f"| `{name}` | {kind} | {field_default(field, child)} | "
                    f"{cell(rows.get(name, ''))} |"
                )
            ]
        text += [""]
    return "\n".join(text)


def sections(
    model: type[pydantic.BaseModel], path: tuple[str, ...], many: bool = False
) -> Iterator[Any]:
    """Each section once: its place in the file, its model, and whether it is a list of them."""
    yield path, model, many
    for name, field in model.model_fields.items():
        if child := child_model(field.annotation):
            yield from sections(child[0], (*path, name), child[1])


def child_model(annotation: Any) -> tuple[type[pydantic.BaseModel], bool] | None:
    """The model that a field holds, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation, False
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return next(
            (found for part in typing.get_args(annotation) if (found := child_model(part))), None
        )
    if origin in (tuple, list):
        return next(
            ((f[0], True) for part in typing.get_args(annotation) if (f := child_model(part))), None
        )
    return None


def kind_text(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words: `list of (number > 0)`, `one of: none, balanced`."""
    if "$ref" in schema:
        return kind_text(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return "one of: " + ", ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        kinds = [
            kind_text(part, definitions) for part in schema["anyOf"] if part.get("type") != "null"
        ]
        return ", or ".join(dict.fromkeys(kinds))
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            return (
                f"list of {len(schema['prefixItems'])}: "
                f"{kind_text(schema['prefixItems'][0], definitions)}"
            )
        inner = kind_text(schema["items"], definitions) if schema.get("items") else "anything"
        inner = inner.replace("one of: ", "")
        return f"list of {inner}" if " " not in inner else f"list of ({inner})"
    if kind == "object":
        extra = schema.get("additionalProperties")
        inner = kind_text(extra, definitions) if isinstance(extra, dict) and extra else "anything"
        return f"mapping of names to {inner}"
    if kind in ("number", "integer"):
        limits = [
            f"{sign} {schema[key]:g}"
            for key, sign in (
                ("exclusiveMinimum", ">"),
                ("minimum", "≥"),
                ("exclusiveMaximum", "<"),
                ("maximum", "≤"),
            )
            if key in schema
        ]
        return " ".join(
            ["number" if kind == "number" else "whole number", ", ".join(limits)]
        ).strip()
    if kind == "boolean":
        return "true or false"
    if kind == "string":
        return "path" if schema.get("format") == "path" else "text"
    return "anything"


def field_default(field: Any, child: Any) -> str:
    """As it would be written in YAML; "required" where there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == () or (child and isinstance(value, pydantic.BaseModel)):
        if child and isinstance(value, pydantic.BaseModel):
            given = sorted(value.model_fields_set)
            return cell(", ".join(given)) if given else "its defaults"
        return ""
    return f"`{cell(yaml_text(value))}`"


def yaml_text(value: Any) -> str:
    """One line of YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def cell(text: str | None) -> str:
    """Fit for a cell of a Markdown table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
