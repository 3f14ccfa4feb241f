"""Finding of a run by its recipe or directory, and of its files after it was moved."""

import os
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pydantic

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.home import expand_home
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.moved_paths import moved_path
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.load import Recipe, RecipeError, load_recipe
from headrace.pipelines.recipe.text import renamed_key
from headrace.pipelines.records import read_record

_MAX_RECIPE_BYTES = 1 << 20  # so that a video, given by mistake, is not read to the end


def find_run(run: str | Path, *, or_model: bool = False) -> RunPaths:
    """Return the run, finished or not, of a recipe or a directory.

    or_model: whether the caller also takes a model directory; only the message depends on it.
    Raises InvalidInput, with what to type instead; RecipeError for a recipe with a mistake in it.
    """
    path = expand_home(run)
    if path.is_dir() and is_run(RunPaths(path)):
        return RunPaths(path)
    expected = "Expected a recipe (recipe.yaml) or the directory of its run (headrace-runs/NAME)"
    if or_model:
        expected += (
            ", or a directory with a model: RUN/winner, or what `headrace export --format "
            "safetensors` wrote"
        )
    hint = _did_you_mean(path) or expected
    if path.is_dir():
        raise InvalidInput(f"{run} is not a run's directory: it has no recipe.json. {hint}")
    if not path.is_file():
        wrong = "it is neither a file nor a folder" if path.exists() else "no such file or folder"
        raise InvalidInput(f"{run}: {wrong}. {hint}")
    paths = RunPaths(_recipe_out(path, f"{run} is neither a recipe nor a run. {hint}"))
    if not is_run(paths):
        raise InvalidInput(
            f"{run} has not been run yet: {paths.root} holds no run. Type: headrace run "
            f"{shlex.quote(str(run))}"
        )
    return paths


def is_run(paths: RunPaths) -> bool:
    """Return whether `headrace run` or `train_heads` has begun to write there."""
    return paths.recipe.is_file() or paths.heads.is_file() or any(paths.logs.glob("*.jsonl"))


def require_finished(paths: RunPaths, *files: Path) -> None:
    """Raise InvalidInput, with what to type, unless these files of a finished run are there."""
    for file in files:
        if file.exists():
            continue
        if file == paths.recipe and paths.heads.is_file():
            raise InvalidInput(
                f"{paths.root} has no {file.name}: its heads were trained from Python, by "
                "train_heads, and without a recipe it is not known where its images are. Write "
                "one, and type: headrace run RECIPE"
            )
        raise InvalidInput(
            f"{paths.root} has no {file.name}: the run has not come to its end, or failed "
            f"(headrace status {shlex.quote(str(paths.root))}). Go on with: headrace run RECIPE"
        )


def require_writable(paths: RunPaths, instead: str) -> None:
    """Raise HeadraceError, with what to type, if nothing can be written into the run."""
    if not os.access(paths.root, os.W_OK):
        raise HeadraceError(f"{paths.root} cannot be written to. Type: {instead}")


def _recipe_out(path: Path, otherwise: str) -> Path:
    """Return the run directory of a recipe. otherwise: the message for a file that is none."""
    # A recipe may have any name. A mistake in a .yaml file is reported as such; a file with another
    # name may be no recipe at all.
    has_recipe_name = path.suffix in (".yaml", ".yml")
    # Not from a run's own recipe.json: its `out` may be where the run was before it was moved.
    if not has_recipe_name and (
        is_run(RunPaths(path.parent)) or path.stat().st_size > _MAX_RECIPE_BYTES
    ):
        raise InvalidInput(otherwise)
    try:
        out = load_recipe(path).out
    except RecipeError:
        if has_recipe_name:
            raise
        raise InvalidInput(otherwise) from None
    assert out is not None  # load_recipe gives it a default
    return out


def _did_you_mean(path: Path) -> str:
    """Return a question that names runs above, below or with the name of a path; "" for none."""
    parents = (above for above in list(path.parents)[:3] if above.name)
    existing_runs = (
        candidate
        for candidate in (*parents, *_runs_below(path), Path("headrace-runs") / path.stem)
        if is_run(RunPaths(candidate))
    )
    candidate_runs = list(dict.fromkeys(islice(existing_runs, 3)))
    return f"Did you mean {' or '.join(map(str, candidate_runs))}?" if candidate_runs else ""


def _runs_below(folder: Path) -> Iterator[Path]:
    # No deeper, for the folder may be a home directory or a disk of images.
    for pattern in ("*/recipe.json", "*/*/recipe.json"):
        yield from (path.parent for path in sorted(folder.glob(pattern)))


def stored_recipe(paths: RunPaths) -> Recipe:
    """Return the recipe that a run was made with; if the run was moved, with paths as they are now.

    Raises InvalidInput for one of another version of headrace, RunDamaged for a changed one.
    """
    try:
        recipe = Recipe.model_validate(read_record(paths.recipe))
    except pydantic.ValidationError as error:
        renamed = {str(problem["loc"][-1]): renamed_key(problem) for problem in error.errors()}
        names = "".join(f"; {old} is called {new} now" for old, new in renamed.items() if new)
        raise InvalidInput(
            f"{paths.recipe} is not of this version of headrace "
            f"({count_text(error.error_count(), 'key differs', 'keys differ')}{names}): run the "
            "recipe again"
        ) from None
    if recipe.out is None:
        return recipe
    before, now = recipe.out, paths.root.absolute()

    def moved(path: Path | None) -> Path | None:
        return None if path is None else moved_path(path, before, now)

    def moved_weights(weights: str | None) -> str | None:
        return str(moved_path(Path(weights), before, now)) if weights else None

    images = {name: moved(value) for name, value in recipe.images if isinstance(value, Path)}
    return recipe.model_copy(
        update={
            "images": recipe.images.model_copy(update=images),
            "backbones": tuple(
                backbone.model_copy(update={"weights": moved_weights(backbone.weights)})
                for backbone in recipe.backbones
            ),
            "cache": moved(recipe.cache),
            "out": now,
            "cluster": recipe.cluster.model_copy(update={"tls": moved(recipe.cluster.tls)}),
        }
    )


def results_file(paths: RunPaths, stored: str | Path) -> Path:
    """Return the path of a results file as it is now, from its path in the leaderboard."""
    stored = Path(stored)
    folder = paths.finetune if stored.parent.name == paths.finetune.name else paths.banks
    # The file in the run's own directory comes first: the run may be a copy, and the original, to
    # which the stored path still leads, may have changed since.
    path_in_run = folder / stored.name
    return path_in_run if path_in_run.exists() else stored
