"""What every reader of a finished run asks first: is it one, with which recipe was it made, where are its files now."""

from pathlib import Path

import pydantic

from headrace.cache import HeadraceError
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe import Recipe


class NotARun(HeadraceError, ValueError):
    """The folder is no finished run: says what is missing and how to make it."""


def stored_recipe(paths: RunPaths) -> Recipe:
    """The recipe that a run was made with. Raises NotARun for one of another version of headrace."""
    try:
        return Recipe.model_validate_json(paths.recipe.read_text())
    except pydantic.ValidationError as error:
        raise NotARun(
            f"{paths.recipe} is not of this version of headrace ({error.error_count()} keys differ): run the recipe again"
        ) from None


def results_file(paths: RunPaths, stored: str | Path) -> Path:
    """A results file by the path that the leaderboard has of it.

    The run's own directory counts first: of a run that was moved it holds the file, and of one that was copied the
    original may have changed since.
    """
    stored = Path(stored)
    folder = paths.thaw if stored.parent.name == paths.thaw.name else paths.banks
    here = folder / stored.name
    return here if here.exists() else stored
