"""A finished run's directory, read for advice: its leaderboard, task and feature sets, without
looking at an image.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pandas as pd

from headrace.cache.publish import feature_set_path
from headrace.cache.spec import FeatureSpec
from headrace.heads.data.task import Task, read_task
from headrace.heads.results import read_bank
from headrace.pipelines.finished import find_run, require_finished, results_file, stored_recipe
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.load import Recipe
from headrace.pipelines.records import read_table


@dataclass(frozen=True)
class RunFiles:
    """What advice needs of a finished run."""

    paths: RunPaths
    recipe: Recipe
    board: pd.DataFrame  # best first; `inputs` are tuples of names
    task: Task
    groups: npt.NDArray[Any] | None
    # of the feature sets, view by view, in the recipe's order
    directories: Mapping[str, tuple[Path, ...]]


def read_run_files(run: Path) -> RunFiles:
    """Read a finished run, given by its directory or its recipe.

    Raises NotARun, saying what is missing.
    """
    paths = RunPaths(find_run(run).root.absolute())  # workers are told where things lie
    require_finished(paths, paths.recipe, paths.leaderboard)
    recipe = stored_recipe(paths)
    board = pd.read_csv(
        read_table(paths.leaderboard), keep_default_na=False, na_values={"standard_error": [""]}
    )
    board["inputs"] = [tuple(text.split(" + ")) for text in board["inputs"]]
    board["path"] = [str(results_file(paths, path)) for path in board["path"]]
    first = read_bank(board["path"].iloc[0])
    task, beside = read_task(paths.task(first.task))
    return RunFiles(
        paths,
        recipe,
        board,
        task,
        beside.get("groups"),
        _feature_sets(board, recipe.cache),
    )


def _feature_sets(board: pd.DataFrame, cache: Path) -> dict[str, tuple[Path, ...]]:
    """By name, in the order of the widest head's inputs: those are in the recipe's order."""
    found: dict[str, tuple[Path, ...]] = {}
    rows = board.drop_duplicates("inputs")
    for inputs, path in sorted(
        zip(rows["inputs"], rows["path"], strict=True), key=lambda each: -len(each[0])
    ):
        specs = [
            FeatureSpec.from_json(json.dumps(feature["spec"]))
            for feature in read_bank(path).features
        ]
        views = max(1, len(specs) // len(inputs))
        for place, name in enumerate(inputs):
            own: Sequence[FeatureSpec] = specs[place * views : (place + 1) * views]
            if name not in found and own:
                found[name] = tuple(feature_set_path(cache, spec) for spec in own)
    return found
