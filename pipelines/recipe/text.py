"""The text of a recipe: YAML nodes with line numbers, and messages about wrong keys and values."""

import contextlib
import difflib
import re
import typing
from pathlib import Path
from typing import Any

import pydantic
import yaml

from headrace.cache.errors import HeadraceError

# In the location of an error in a union, pydantic names the member that it tried; these parts are
# not keys of the file.
_UNION_TAGS = (
    *("literal", "tuple", "function", "constrained", "str", "float", "int", "bool", "list"),
    "BoxesSection",  # images.boxes is a section or a word
)

# Far above any recipe (the longest of ours has 4 kB); PyYAML reads this much in some seconds.
MAX_CHARACTERS = 256 * 1024
_MAX_VALUES = 50_000  # keys and values, those of an anchor counted at each use
# In characters: Python takes quadratic time for long numbers, and refuses to print them.
_MAX_NUMBER_LENGTH = 400
_MAX_PROBLEMS = 20  # problems with a message of their own; the others are counted
# Keys of earlier versions, with the sections that they are in, and their names today.
RENAMED_KEYS = {
    "thaw": "finetune",
    "screen": "input_halving",
    "imported": "external_features",
    "compute.unit_images": "images_per_shard",
    "cluster.deadline_s": "task_timeout_s",
    "ensemble.members": "max_members",
    "ensemble.networks": "max_backbones",
    "ensemble.network_price": "min_gain_per_backbone",
    "finetune.promote": "top_k",
    "finetune.depths": "train_above",
    "finetune.warm_up": "warmup_fraction",
    "finetune.clip": "grad_clip_norm",
    "finetune.reuse.cut": "train_above",
    "input_halving.images": "sample_fractions",
    "input_halving.keep": "keep_fraction",
    "input_halving.least": "min_inputs",
}
# Keys of other tools, and their names here.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "n_neighbors": "k",
    "model": "backbones",
    "models": "backbones",
    "data": "images",
    "dataset": "images",
    "num_workers": "workers",
    "cv": "folds",
    "test_size": "test_fraction",
    "random_state": "seed",
    "img_size": "image_size",
}
_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


# What is wrong with the text, by words of PyYAML's complaint.
_YAML_HINTS = {
    "'\\t'": "Indent with blanks, not tabs",
    "mapping values": "Here or in the line above, a key lacks its colon and blank (key: value), or "
    "the keys of a section begin in different columns",
    "escape": "In double quotes a backslash begins an escape: write paths in single quotes, or "
    "with /",
}


class RecipeError(HeadraceError, ValueError):
    """The recipe cannot be used; the message names the file, the line and the nearest valid key."""


_QUOTED = re.compile(r"(?<!\w)'([^'\s]+)'")


@contextlib.contextmanager
def naming_lines(path: Path) -> typing.Iterator[None]:
    """Put the recipe's line before the message of a HeadraceError from the block, if the message
    quotes a name (of a network, a tap, a column) that exactly one line of the recipe has.
    """
    try:
        yield
    except HeadraceError as error:
        message = str(error)
        quoted = _QUOTED.search(message)
        if quoted and str(path) not in message and len(error.args) == 1:
            word = re.compile(rf"(?<![\w-]){re.escape(quoted[1])}(?![\w-])")
            text = path.read_text(encoding="utf-8", errors="replace")
            line_numbers = [
                line_number
                for line_number, line in enumerate(text.splitlines(), 1)
                if word.search(line.partition(" #")[0])
            ]
            # Of several lines the wrong one might be named.
            if len(line_numbers) == 1:
                error.args = (f"{path}, line {line_numbers[0]}: {message}",)
        raise


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with a line number in all its errors."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        # Python's own errors, as of int("foo") for `!!int foo`, or of a date with month 13.
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from None


def read_yaml(
    text: str,
    path: Path,
    valid_keys: typing.Iterable[str],
    empty_sections: typing.Collection[str] = (),
) -> tuple[yaml.MappingNode, Any]:
    """Return the root node, which knows its lines, and the values.

    valid_keys: of a recipe. empty_sections: "KEY" or "KEY.KEY" of those that may be empty: one
    below which nothing stands is {} and not None, which it is in YAML.

    Raises RecipeError.
    """
    loader: _Loader | None = None
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            f"{path}: {len(text):,} characters; a recipe has {MAX_CHARACTERS:,} at most. Long "
            "lists of images belong into a table: images: {table: images.csv}"
        )
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(
                f"{path}: a recipe is a mapping with the keys {', '.join(valid_keys)}"
            )
        if _refuse_odd_nodes(root, path, node_ids_above=set(), known_sizes={}) > _MAX_VALUES:
            raise RecipeError(
                f"{path}: its anchors (&…, *…) stand for more than {_MAX_VALUES:,} keys and "
                "values; write what is meant"
            )
        _fill_empty_sections(root, "", empty_sections)
        return root, loader.construct_document(root)
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{path}, line {line_number}: this is not YAML: the character {error.character!r}: "
            f"{error.reason}. Delete it"
        ) from None
    except yaml.constructor.ConstructorError as error:
        line_number = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(
            f"{path}, line {line_number}: this value cannot be read: {error.problem}. Expected "
            "text, a number, a list or a mapping, without a tag (!…); put text in quotes"
        ) from None
    except yaml.YAMLError as error:
        problem_mark = getattr(error, "problem_mark", None)
        line_text = f", line {problem_mark.line + 1}" if problem_mark else ""
        problem_text = str(getattr(error, "problem", None) or error)
        hints = [hint for words, hint in _YAML_HINTS.items() if words in problem_text]
        raise RecipeError(
            f"{path}{line_text}: this is not YAML: {'. '.join([problem_text, *hints])}"
        ) from None
    except RecursionError:
        line_number = loader.line + 1 if loader else 1
        raise RecipeError(
            f"{path}, line {line_number}: lists or mappings stand too deep in each other; a recipe "
            "needs six levels at most"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _fill_empty_sections(
    node: yaml.MappingNode, prefix: str, section_names: typing.Collection[str]
) -> None:
    for position, (key, value) in enumerate(node.value):
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and not prefix:
            _fill_empty_sections(value, f"{name}.", section_names)
        # `null` and `~` leave a section out.
        elif name in section_names and value.tag.endswith(":null") and not value.value:
            empty = yaml.MappingNode("tag:yaml.org,2002:map", [], value.start_mark, value.end_mark)
            node.value[position] = (key, empty)


def _refuse_odd_nodes(
    node: yaml.Node, path: Path, *, node_ids_above: set[int], known_sizes: dict[int, int]
) -> int:
    """Raise RecipeError for repeated keys, keys that are not scalars, merge keys, overlong numbers,
    and anchors that contain themselves. Return the number of keys and values, with anchors written
    out.

    node_ids_above: ids of the nodes around this one. known_sizes: numbers of keys and values by id
    of nodes that were checked before.
    """
    line_number = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        if node.tag != _TEXT and len(node.value) > _MAX_NUMBER_LENGTH:
            raise RecipeError(
                f"{path}, line {line_number}: a number of {len(node.value):,} characters; put text "
                "in quotes"
            )
        return 1
    # A node with an anchor is checked once: nine anchors of ten items each stand for a billion.
    if id(node) in known_sizes:
        return known_sizes[id(node)]
    if id(node) in node_ids_above:
        raise RecipeError(
            f"{path}, line {line_number}: what stands here holds itself, by its anchor (&…). Write "
            "it out"
        )
    node_ids_above.add(id(node))
    inner_nodes = list(node.value)
    if isinstance(node, yaml.MappingNode):
        inner_nodes = [inner for pair in node.value for inner in pair]
        key_lines: dict[str, int] = {}
        for key, _ in node.value:
            line_number = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                raise RecipeError(
                    f"{path}, line {line_number}: a {kind} stands where a key is expected. Write: "
                    "key: value"
                )
            # PyYAML expands merge keys before anything can be counted, and a few nested lines of
            # them fill the memory.
            if key.tag == _MERGE:
                raise RecipeError(
                    f"{path}, line {line_number}: merge keys (<<) are not read in a recipe. Write "
                    "the keys that are meant here; a list or mapping as a whole can be used "
                    "again: C: &grid [0.1, 1], and C: *grid"
                )
            # PyYAML takes the last of two equal keys without a word, and the first would be lost.
            if key.value in key_lines:
                raise RecipeError(
                    f"{path}, line {line_number}: the key {_short(key.value)!r} stands already in "
                    f"line {key_lines[key.value]}"
                )
            key_lines[key.value] = line_number
    known_sizes[id(node)] = 1 + sum(
        _refuse_odd_nodes(inner, path, node_ids_above=node_ids_above, known_sizes=known_sizes)
        for inner in inner_nodes
    )
    node_ids_above.remove(id(node))
    return known_sizes[id(node)]


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"


def own_problems(problems: typing.Sequence[Any]) -> list[Any]:
    """Return the problems without those that follow from others (a list is called too short if one
    of its items was refused) or come from the wrong member of a union.
    """
    inner_locations = {
        problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))
    }
    problems = [
        problem
        for problem in problems
        if problem["type"] != "too_short" or problem["loc"] not in inner_locations
    ]
    # For a key that takes a word or a list, pydantic reports both; the one that fits the user's
    # value is kept.
    by_keys: dict[tuple[Any, ...], dict[str, Any]] = {}
    for problem in problems:
        by_keys.setdefault(_keys(problem), {})[problem["type"]] = problem
    kept = []
    for problem in problems:
        by_type = by_keys[_keys(problem)]
        hides = {"literal_error": "tuple_type", "tuple_type": "string_type"}.get(problem["type"])
        if hides in by_type:
            continue
        if problem["type"] == "tuple_type" and "literal_error" in by_type:
            problem = {**problem, "words": by_type["literal_error"]["ctx"]["expected"]}
        kept.append(problem)
    return kept


def _keys(problem: Any) -> tuple[Any, ...]:
    """Return the location of a pydantic error as keys of the file, without union tags."""
    location = problem["loc"]
    # The last part of an unknown key's location is the user's word, even if it is `list`.
    n_known = len(location) - (problem["type"] == "extra_forbidden")
    return (
        *(key_part for key_part in location[:n_known] if not _is_union_tag(key_part)),
        *location[n_known:],
    )


# Messages in place of pydantic's own, by type of error.
_PLAIN_MESSAGES = {
    "bool_parsing": "true or false is expected",
    "float_parsing": "a number is expected",
    "float_type": "a number is expected",
    "int_from_float": "a whole number is expected",
    "int_parsing": "a whole number is expected",
    "int_type": "a whole number is expected",
    "path_type": "one path is expected",
    "string_type": "a text is expected",
}


def explain_all(
    problems: typing.Sequence[Any],
    root: yaml.MappingNode,
    path: Path,
    model: type[pydantic.BaseModel],
    set_places: typing.Mapping[tuple[str | int, ...], str],
) -> str:
    """Return a line for each of the first pydantic errors, and one that counts the others.

    set_places: texts such as "--set task.folds=1", by keys, for values that are not in the file.
    """
    user_problems = own_problems(problems)
    lines = [
        explain(problem, root, path, model, set_places) for problem in user_problems[:_MAX_PROBLEMS]
    ]
    if len(user_problems) > _MAX_PROBLEMS:
        lines.append(f"{path}: and {len(user_problems) - _MAX_PROBLEMS:,} more of such")
    return "\n".join(lines)


def explain(
    problem: Any,
    root: yaml.MappingNode,
    path: Path,
    model: type[pydantic.BaseModel],
    set_places: typing.Mapping[tuple[str | int, ...], str],
) -> str:
    """Return one line for a pydantic error: file, line, key, the mistake, the nearest key."""
    location = list(_keys(problem))
    line_number, is_in_file = _line_of(root, location)
    place_text = f"{path}, line {line_number}"
    for keys, set_place in set_places.items():
        # A wrong section of an overridden key (heads.logisti.C) is not in the file either.
        is_above = not is_in_file and keys[: len(location)] == tuple(location)
        if is_above or tuple(location[: len(keys)]) == keys:
            place_text, is_in_file = set_place, True
    return f"{place_text}: {_explain_value(problem, location, model, is_in_file=is_in_file)}"


def explain_section(
    error: pydantic.ValidationError, section: str, model: type[pydantic.BaseModel]
) -> str:
    """Return a line for each of the first errors of a section of a recipe that is no text: the key,
    the mistake, the nearest key.
    """
    return "\n".join(
        _explain_value(problem, [section, *_keys(problem)], model, is_in_file=True)
        for problem in own_problems(error.errors())[:_MAX_PROBLEMS]
    )


def _explain_value(
    problem: Any,
    location: list[str | int],
    model: type[pydantic.BaseModel],
    *,
    is_in_file: bool,
) -> str:
    """Return the key, the mistake and the nearest key of a pydantic error."""
    dotted_key = ".".join(_short(str(key_part)) for key_part in location)
    if (new_name := renamed_key(problem)) is not None:
        return f"the key {dotted_key!r} is called {new_name!r} now"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {dotted_key!r}: {_key_hint(model, location)}"
    if problem["type"] == "missing":
        return f"the key {dotted_key!r} is missing"
    if problem["type"] == "tuple_type" and isinstance(problem["input"], dict):
        return f"{dotted_key}: a list is expected: write '- ' before its first key"
    if problem["type"] == "tuple_type" and is_in_file:
        given = _short(str(problem["input"]))
        item = f"{{name: {given}}}" if location == ["backbones"] else given
        words = f"{problem['words']} or " if "words" in problem else ""
        return f"{dotted_key}: {words}a list is expected, found {given}: write [{item}]"
    if problem["type"] == "model_type":
        hint = _section_hint(problem["input"], _keys_at(model, location))
        return f"{dotted_key}: {hint}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = re.sub("Input should be (?=greater|less)", "expected a number ", message)
    message = message.replace("Input should be", "expected")
    message = _PLAIN_MESSAGES.get(problem["type"], message)
    # The whole recipe's check (two backbones of one name) has no key.
    if not dotted_key:
        return message
    if is_in_file and not isinstance(problem["input"], dict):
        message += f" (found {_short(repr(problem['input']))}{_value_hint(problem)})"
    return f"{dotted_key}: {message}"


def _key_hint(model: type[pydantic.BaseModel], location: list[str | int]) -> str:
    """Return the key that an unknown one may mean, and the keys of its section."""
    valid_keys = _keys_at(model, location[:-1])
    # C is a key, and c a likely way to write it.
    keys_by_lower = {name.lower(): name for name in valid_keys}
    word = str(location[-1]).lower().replace("-", "_")[:80]
    word = _OTHER_NAMES.get(word, word)
    misspelt, alike = (
        [keys_by_lower[name] for name in difflib.get_close_matches(word, keys_by_lower, 1, cutoff)]
        for cutoff in (0.8, 0.6)
    )
    # Such as `budget` for `budget_minutes`, which is too different for a misspelling.
    longer = [name for name in valid_keys if name.startswith(f"{word}_")]
    # A mistaken setting of a head can only mean a key of another kind of head.
    prefix = "heads." if location[0] == "heads" and len(location) > 2 else ""
    elsewhere = [key for key in _sections_that_have(model, word) if key.startswith(prefix)]
    nearest_keys = [*misspelt, *longer, *elsewhere, *alike]
    hint = f"did you mean {nearest_keys[0]!r}? " if nearest_keys else ""
    hint += f"Valid here: {', '.join(valid_keys)}"
    if location[:-1] == ["heads"] and not misspelt:
        hint += ". For others of scikit-learn, sklearn: [{estimator: sklearn.svm.SVC}]"
    return hint


def _value_hint(problem: Any) -> str:
    """Return what to write instead of a value such as 25 %, 0,25, [30] or an unquoted yes."""
    value, expected = problem["input"], problem["type"]
    if isinstance(value, list):
        return f"; write {value[0]}" if len(value) == 1 else "; expected one value, no list"
    if expected == "string_type" and not isinstance(value, (type(None), dict)):
        return "; YAML reads it so: put what you wrote in quotes"
    if expected == "less_than" and problem["ctx"]["lt"] == 1 and 1 < float(value) <= 100:
        return f"; write {float(value) / 100:g}"  # float() because it may be in quotes
    if expected == "float_parsing" and re.fullmatch(r"\d+([.,]\d+)? ?%?", value):
        parsed = float(value.rstrip(" %").replace(",", "."))
        return f"; write {parsed / 100 if value.endswith('%') else parsed:g}"
    return ""


def _section_hint(found: object, keys: typing.Sequence[str]) -> str:
    """Return what to write instead of a word, a list or a boolean in place of a section."""
    found_text = "" if isinstance(found, list) else f", found {_short(repr(found))}"
    if isinstance(found, list) and found and all(word in keys for word in found):
        example = f"{{{', '.join(f'{word}: {{}}' for word in found)}}}"
    elif isinstance(found, bool):
        found_text, example = f", found {str(found).lower()}", "{}"
    elif found is None:
        found_text, example = ", found nothing", f"{{{keys[0]}: …}}"
    elif isinstance(found, str) and found not in keys:
        example = f"{{{keys[0]}: {_short(found)}}}"
    else:
        word = found if isinstance(found, str) else keys[0]
        example = f"{{{word}: …}}"
    return f"a section with keys is expected{found_text}: write {example}. Keys: {', '.join(keys)}"


def renamed_key(problem: Any) -> str | None:
    """Return today's name of a key of earlier versions; None for any other problem."""
    if problem["type"] != "extra_forbidden":
        return None
    keys = [part for part in problem["loc"] if isinstance(part, str) and not _is_union_tag(part)]
    return RENAMED_KEYS.get(".".join(keys))


def _is_union_tag(part: object) -> bool:
    return isinstance(part, str) and (
        part in _UNION_TAGS or part.startswith(tuple(f"{tag}[" for tag in _UNION_TAGS))
    )


def _line_of(node: yaml.Node, location: typing.Sequence[str | int]) -> tuple[int, bool]:
    """Return the line (from 1) of the deepest part of the location that is in the file, and whether
    all of it is.
    """
    line_number = node.start_mark.line + 1
    for key_part in location:
        # By what is to come next: the node whose line is shown, and the node to search on.
        nodes: dict[str | int, tuple[yaml.Node, yaml.Node]] = {}
        if isinstance(node, yaml.MappingNode):
            nodes = {key.value: (key, value) for key, value in node.value}
            key_part = str(key_part)
        elif isinstance(node, yaml.SequenceNode):
            nodes = dict(enumerate(zip(node.value, node.value, strict=True)))
        if key_part not in nodes:
            return line_number, False
        shown, node = nodes[key_part]
        line_number = shown.start_mark.line + 1
    return line_number, True


def _keys_at(model: type[pydantic.BaseModel], location: typing.Sequence[str | int]) -> list[str]:
    for key_part in location:
        if isinstance(key_part, str):
            model = next(_models_in(model.model_fields[key_part].annotation))
    return list(model.model_fields)


def _sections_that_have(model: type[pydantic.BaseModel], key: str) -> typing.Iterator[str]:
    """Yield the places of this key, in lower case, in all sections, such as "task.folds"."""
    for section_name, field in model.model_fields.items():
        for section in _models_in(field.annotation):
            own = [name for name in section.model_fields if name.lower() == key]
            for name in (*own, *_sections_that_have(section, key)):
                yield f"{section_name}.{name}"


def _models_in(annotation: Any) -> typing.Iterator[type[pydantic.BaseModel]]:
    if typing.get_origin(annotation) is None and isinstance(annotation, type):
        if issubclass(annotation, pydantic.BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
