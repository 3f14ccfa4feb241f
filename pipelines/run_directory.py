"""A run's directory: which run is meant, its recipe, and where its files are now."""

import os
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pydantic

from headrace.cache.errors import HeadraceError
from headrace.cache.home import expand_home
from headrace.pipelines.moved_paths import moved_path
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.load import Recipe, RecipeError, load_recipe
from headrace.pipelines.recipe.text import renamed_key
from headrace.pipelines.records import read_record

_RECIPE_BYTES = 1 << 20  # no recipe is larger, and a video that is given by mistake is not read


class NotARun(HeadraceError, ValueError):
    """What was given is no run, or no finished one: says what is missing and what to type."""


class RunReadOnly(HeadraceError, PermissionError):
    """A result would go into a run's directory, which cannot be written to."""


def find_run(run: str | Path, *, or_model: bool = False) -> RunPaths:
    """Return the run that is meant, ended or not, by its recipe or its directory.

    or_model: the caller takes a model directory as well, which the message then says. Raises
    NotARun, saying what to type; RecipeError for a recipe with a mistake in it.
    """
    path = expand_home(run)
    expected = (
        "Expected a recipe (recipe.yaml) or the directory of its run (headrace-runs/NAME)"
        + (
            (
                ", or a directory with a model: RUN/winner, or what `headrace export --format "
                "safetensors` wrote"
            )
            if or_model
            else ""
        )
    )
    if path.is_dir():
        if is_run(RunPaths(path)):
            return RunPaths(path)
        raise NotARun(
            f"{run} is not a run's directory: it has no recipe.json. "
            f"{_did_you_mean(path) or expected}"
        )
    if not path.is_file():
        wrong = "it is neither a file nor a folder" if path.exists() else "no such file or folder"
        raise NotARun(f"{run}: {wrong}. {_did_you_mean(path) or expected}")
    paths = RunPaths(
        _recipe_out(path, f"{run} is neither a recipe nor a run. {_did_you_mean(path) or expected}")
    )
    if not is_run(paths):
        raise NotARun(
            f"{run} has not been run yet: {paths.root} holds no run. Type: headrace run "
            f"{shlex.quote(str(run))}"
        )
    return paths


def is_run(paths: RunPaths) -> bool:
    """Whether a call of `headrace run` or `train_heads` has begun to write there."""
    return paths.recipe.is_file() or paths.heads.is_file() or any(paths.logs.glob("*.jsonl"))


def require_finished(paths: RunPaths, *files: Path) -> None:
    """Raise NotARun, with what to type, unless the run has left these files of its end."""
    for file in files:
        if file.exists():
            continue
        if file == paths.recipe and paths.heads.is_file():
            raise NotARun(
                f"{paths.root} has no {file.name}: its heads were trained from Python, by "
                "train_heads, and without a recipe it is not known where its images are. Write "
                "one, and type: headrace run RECIPE"
            )
        raise NotARun(
            f"{paths.root} has no {file.name}: the run has not come to its end, or failed "
            f"(headrace status {shlex.quote(str(paths.root))}). Go on with: headrace run RECIPE"
        )


def require_writable(paths: RunPaths, instead: str) -> None:
    """Raise RunReadOnly, with what to type, where nothing can be written into the run."""
    if not os.access(paths.root, os.W_OK):
        raise RunReadOnly(f"{paths.root} cannot be written to. Type: {instead}")


def _recipe_out(path: Path, otherwise: str) -> Path:
    """Return where the run of a recipe is. A recipe may have any name; a file that is named as one
    is told its mistakes, any other one gets `otherwise`.
    """
    has_recipe_name = path.suffix in (".yaml", ".yml")
    # recipe.json of a run is no recipe to go by: it says where the run was made, and the run may
    # have been moved.
    if not has_recipe_name and (
        is_run(RunPaths(path.parent)) or path.stat().st_size > _RECIPE_BYTES
    ):
        raise NotARun(otherwise)
    try:
        out = load_recipe(path).out
    except RecipeError:
        if has_recipe_name:
            raise
        raise NotARun(otherwise) from None
    assert out is not None  # load_recipe gives it a default
    return out


def _did_you_mean(path: Path) -> str:
    """Return a question naming runs perhaps meant: around the path, below it, or like it."""
    parents = (above for above in list(path.parents)[:3] if above.name)
    existing_runs = (
        candidate
        for candidate in (*parents, *_runs_below(path), Path("headrace-runs") / path.stem)
        if is_run(RunPaths(candidate))
    )
    candidate_runs = list(dict.fromkeys(islice(existing_runs, 3)))
    return f"Did you mean {' or '.join(map(str, candidate_runs))}?" if candidate_runs else ""


def _runs_below(folder: Path) -> Iterator[Path]:
    for pattern in ("*/recipe.json", "*/*/recipe.json"):
        yield from (path.parent for path in sorted(folder.glob(pattern)))


def stored_recipe(paths: RunPaths) -> Recipe:
    """The recipe that a run was made with, its paths as they are now if both were moved.

    Raises NotARun for one of another version of headrace, RunDamaged for a changed one.
    """
    try:
        recipe = Recipe.model_validate(read_record(paths.recipe))
    except pydantic.ValidationError as error:
        renamed = {str(problem["loc"][-1]): renamed_key(problem) for problem in error.errors()}
        names = "".join(f"; {old} is called {new} now" for old, new in renamed.items() if new)
        raise NotARun(
            f"{paths.recipe} is not of this version of headrace ({error.error_count()} keys "
            f"differ{names}): run the recipe again"
        ) from None
    if recipe.out is None:
        return recipe
    before, now = recipe.out, paths.root.absolute()

    def moved(path: Path | None) -> Path | None:
        return None if path is None else moved_path(path, before, now)

    images = {name: moved(value) for name, value in recipe.images if isinstance(value, Path)}
    backbones = (
        backbone.model_copy(
            update={
                "weights": str(moved_path(Path(backbone.weights), before, now))
                if backbone.weights
                else None
            }
        )
        for backbone in recipe.backbones
    )
    return recipe.model_copy(
        update={
            "images": recipe.images.model_copy(update=images),
            "backbones": tuple(backbones),
            "cache": moved(recipe.cache),
            "out": now,
            "cluster": recipe.cluster.model_copy(update={"tls": moved(recipe.cluster.tls)}),
        }
    )


def results_file(paths: RunPaths, stored: str | Path) -> Path:
    """Return where a results file is now, from the path that the leaderboard has of it.

    The run's own directory counts first: of a run that was moved it holds the file, and of one that
    was copied the original may have changed since.
    """
    stored = Path(stored)
    folder = paths.finetune if stored.parent.name == paths.finetune.name else paths.banks
    path_in_run = folder / stored.name
    return path_in_run if path_in_run.exists() else stored
