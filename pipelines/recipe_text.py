"""The text of a recipe: nodes that know their lines, and the lesson that a wrong key or value is answered with."""

import difflib
import typing
from pathlib import Path
from typing import Any

import pydantic
import yaml

from headrace.cache import HeadraceError

# pydantic keeps its own messages for what a union was tried as; these parts of an error's location are no keys of the file.
_UNION_TAGS = ("literal", "tuple", "function", "constrained", "str", "float", "int", "bool", "list")


class RecipeError(HeadraceError, ValueError):
    """The recipe cannot be used: names the file, the line, and the nearest valid key or value."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose every complaint about a value has a line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        # What int("foo") for `!!int foo`, or datetime for a thirteenth month, answers.
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


def read_yaml(text: str, path: Path, valid: typing.Iterable[str]) -> tuple[yaml.MappingNode, Any]:
    """The nodes, which know their lines, and the values. valid: the keys of a recipe. Raises RecipeError."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(valid)}")
        _refuse_odd_nodes(root, path, above=set(), seen=set())
        return root, loader.construct_document(root)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{path}, line {line}: this is not YAML: the character {error.character!r}: {error.reason}. Delete it"
        ) from None
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(
            f"{path}, line {line}: this value cannot be read: {error.problem}. Expected text, a number, a list or a "
            "mapping, without a tag (!…); put text in quotes"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: this is not YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        line = loader.line + 1 if loader else 1
        raise RecipeError(
            f"{path}, line {line}: lists or mappings stand too deep in each other; a recipe needs six levels at most"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_odd_nodes(node: yaml.Node, path: Path, *, above: set[int], seen: set[int]) -> None:
    """Refuses repeated keys, keys that are no words, and anchors inside themselves.

    above: ids of the nodes that this one stands in; seen: of those that are known to be good, as an anchor's may be.
    """
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    if id(node) in above:
        raise RecipeError(
            f"{path}, line {node.start_mark.line + 1}: what stands here holds itself, by its anchor (&…). Write it out"
        )
    above.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_odd_nodes(item, path, above=above, seen=seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                raise RecipeError(f"{path}, line {line}: a {kind} stands where a key is expected. Write: key: value")
            # YAML's loader lets the last of two equal keys win in silence: half of what the user wrote would be lost.
            if key.value in lines:
                raise RecipeError(
                    f"{path}, line {line}: the key {key.value!r} stands already in line {lines[key.value]}"
                )
            lines[key.value] = line
            _refuse_odd_nodes(value, path, above=above, seen=seen)
    above.remove(id(node))
    seen.add(id(node))


def own_problems(problems: typing.Sequence[typing.Any]) -> list[typing.Any]:
    """Without the complaints that a list is too short where one of its items was refused: the user's list is not."""

    def follows(problem: typing.Any) -> bool:
        loc = problem["loc"]
        return problem["type"] == "too_short" and any(
            len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in problems
        )

    return [problem for problem in problems if not follows(problem)]


def explain(problem: typing.Any, root: yaml.MappingNode, path: Path, model: type[pydantic.BaseModel]) -> str:
    """One line for one pydantic error: file, line, key, what is wrong, the nearest valid key."""
    location = [part for part in problem["loc"] if not _is_union_tag(part)]
    line, found = _line_of(root, location)
    where = f"{path}, line {line}"
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        valid = _keys_at(model, location[:-1])
        lower = {name.lower(): name for name in valid}
        close = difflib.get_close_matches(str(location[-1]).lower(), lower, n=1, cutoff=0.4)
        nearest = [lower[name] for name in close]
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        return f"{where}: unknown key {key!r}: {hint}Valid here: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"{where}: the key {key!r} is missing"
    if problem["type"] == "tuple_type" and found and not isinstance(problem["input"], dict):
        return f"{where}: {key}: a list is expected, found {problem['input']}: write [{problem['input']}]"
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = "" if not found or isinstance(problem["input"], dict | list) else f" (found {problem['input']!r})"
    return f"{where}: {key}: {message}{value}" if key else f"{where}: {message}"


def _is_union_tag(part: object) -> bool:
    return isinstance(part, str) and (part in _UNION_TAGS or part.startswith(tuple(f"{tag}[" for tag in _UNION_TAGS)))


def _line_of(node: yaml.Node, location: typing.Sequence[str | int]) -> tuple[int, bool]:
    """The line (from 1) of the deepest part of the location that stands in the file, and whether all of it does."""
    line = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if str(part) not in pairs:
                return line, False
            key, node = pairs[str(part)]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line, False
    return line, True


def _keys_at(model: type[pydantic.BaseModel], location: typing.Sequence[str | int]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        model = next(m for m in _models_in(model.model_fields[part].annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> typing.Iterator[type[pydantic.BaseModel]]:
    if typing.get_origin(annotation) is None and isinstance(annotation, type):
        if issubclass(annotation, pydantic.BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
