"""The run: from a recipe to a ranked leaderboard.

Names are imported when first used, so that `--help` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.pipelines.deliver.model import Model, load_model
    from headrace.pipelines.init import write_recipe
    from headrace.pipelines.notebook import extract_features, train_heads
    from headrace.pipelines.plan import Plan
    from headrace.pipelines.prepare import Survey, survey
    from headrace.pipelines.recipe import Recipe, RecipeError, load_recipe
    from headrace.pipelines.run import RunResult, run_recipe
    from headrace.pipelines.submit import RunIncomplete
    from headrace.pipelines.winner import TestResult

_HOME = {
    "Model": "deliver.model",
    "Plan": "plan",
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "RunIncomplete": "submit",
    "RunResult": "run",
    "Survey": "prepare",
    "TestResult": "winner",
    "extract_features": "notebook",
    "load_model": "deliver.model",
    "load_recipe": "recipe",
    "run_recipe": "run",
    "survey": "prepare",
    "train_heads": "notebook",
    "write_recipe": "init",
}

__all__ = [
    "Model",
    "Plan",
    "Recipe",
    "RecipeError",
    "RunIncomplete",
    "RunResult",
    "Survey",
    "TestResult",
    "extract_features",
    "load_model",
    "load_recipe",
    "run_recipe",
    "survey",
    "train_heads",
    "write_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """For tab completion: the names that are imported when first used too."""
    return __all__
