"""Values that override the recipe: `headrace run recipe.yaml --set task.folds=3`."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.pipelines.recipe.text import RecipeError, read_yaml


@dataclass(frozen=True)
class Override:
    """One `KEY=VALUE`."""

    text: str
    keys: tuple[str | int, ...]  # of task.folds, or backbones.0.taps: items of lists from 0
    value: Any


def read_overrides(settings: Iterable[str]) -> list[Override]:
    """Read each `KEY=VALUE`, the value as in YAML. Raises RecipeError."""
    overrides = []
    for text in settings:
        key_text, equals, value_text = text.partition("=")
        keys = tuple(int(key) if key.isdecimal() else key for key in key_text.strip().split("."))
        if not equals or "" in keys:
            raise RecipeError(
                f"--set {text}: expected KEY=VALUE, a key of the recipe with dots between its "
                "levels: --set task.folds=3"
            )
        # As a recipe with one key, so that a value means the same in both.
        _, values = read_yaml(f"value: {value_text}", Path(f"--set {text}"), ["value"])
        if set(values) != {"value"}:
            raise RecipeError(f"--set {text}: expected one value; give each key its own --set")
        overrides.append(Override(text, keys, values["value"]))
    return overrides


def apply_overrides(values: dict[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """Return the recipe's values with the overrides. Raises RecipeError for a key inside a value
    that is not a mapping, and for an item that a list does not have.
    """
    # The caller's values stay as they are in the file.
    changed = copy.deepcopy(values)
    for override in overrides:
        section: Any = changed
        for depth, key in enumerate(override.keys):
            section_name = ".".join(map(str, override.keys[:depth])) or "the recipe"
            if isinstance(section, list):
                if not isinstance(key, int) or key >= len(section):
                    expected = f"the number of an item, from 0 to {len(section) - 1}"
                    raise RecipeError(
                        f"--set {override.text}: {section_name} is a list of {len(section)}; "
                        f"expected {expected if section else 'a whole list, [...]'}, found {key!r}"
                    )
            elif not isinstance(section, dict):
                raise RecipeError(
                    f"--set {override.text}: {section_name} is {section!r} in the recipe, which "
                    "has no keys inside"
                )
            if depth == len(override.keys) - 1:
                section[key] = override.value
                break
            # A section without values (`finetune:`) is None in YAML, but still a section.
            if isinstance(section, dict) and section.get(key) is None:
                section[key] = {}
            section = section[key]
    return changed
