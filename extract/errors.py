"""Errors about images and networks, and parts of their messages."""

import contextlib
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError


class SourceError(HeadraceError, ValueError):
    """A source of images (folder, table, archive, array) cannot be used as the options say."""


class BackboneError(HeadraceError, ValueError):
    """A network, its weights, its preprocessing or a tap cannot be used as the options say."""


class ImageError(Exception):
    """One image cannot be decoded; the text is the reason that is recorded beside its id.

    It never stops a run.
    """


def nearest_names(word: str, options: Iterable[str], count: int = 4) -> str:
    """Return "a, b, c", the options most similar to `word`, for an error message; or "(none)"."""
    choices = list(dict.fromkeys(options))
    close = difflib.get_close_matches(word, choices, n=count, cutoff=0.5)
    return ", ".join(close or choices[:count]) or "(none)"


def missing_path_message(path: Path, expected: str) -> str:
    """Return the message for a path that is absent (with a similar name), or a file where a folder
    is expected, or the reverse.
    """
    if path.exists():
        return f"{path} is {'a folder' if path.is_dir() else 'a file'}; expected {expected}."
    if hint := pointer_hint(path):
        return f"{path}: no such file or folder.{hint}"
    parent = path.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    hint = (
        f" Did you mean {parent / close[0]}?"
        if close
        else f" The nearest folder that exists is {parent}."
    )
    return f"{path}: no such file or folder.{hint}"


def pointer_hint(path: Path) -> str:
    """Return what brings an absent path here, if it is an address, or where DVC keeps it elsewhere;
    otherwise "".
    """
    if path.parts and re.fullmatch(r"[a-z][a-z0-9]+:", path.parts[0]):
        return " It is an address, and files are read from disk: download them first."
    pointer = path.with_name(f"{path.name}.dvc")
    return f" {pointer} says where it is: dvc pull {pointer}." if pointer.is_file() else ""


def as_yaml_list(names: Iterable[str]) -> str:
    """Return names as a recipe's list, quoted where YAML needs it: `[a.png, "2020"]`."""
    return f"[{', '.join(map(_quote_for_yaml, names))}]"


def _quote_for_yaml(name: str) -> str:
    import yaml

    if re.fullmatch(r"[\w./ -]+", name):
        # ValueError: 2020-13-45 has the form of a date and is none.
        with contextlib.suppress(yaml.YAMLError, ValueError):
            if yaml.safe_load(name) == name:  # 2020, no and ~ are no text in YAML
                return name
    quoted = json.dumps(name, ensure_ascii=False)
    # YAML reads some other characters as ends of lines, and refuses the lone surrogates of names
    # that are no UTF-8.
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


def check_unique_ids(ids: Iterable[str], source: str) -> None:
    """Raise SourceError naming the ids that occur more than once."""
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise SourceError(
            f"{source}: {count_text(len(repeated), 'id occurs', 'ids occur')} more than once, for "
            f"example {', '.join(map(repr, repeated[:3]))}. Each row needs its own id: name a "
            "column that has one with id_column, or drop the duplicates. Where several people have "
            "labelled an image, write one row for it, with the label that they agree on."
        )
