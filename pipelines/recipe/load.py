"""Loading of the recipe: the file that describes a run."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic

from headrace.cache.home import expand_home
from headrace.extract.spec import PACKAGE_PREFIX, absolute_name, is_weights_file
from headrace.heads.sklearn.kind import SKLEARN
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.heads import HEAD_GRIDS, Heads
from headrace.pipelines.recipe.overrides import apply_overrides, read_overrides
from headrace.pipelines.recipe.sections import (
    Backbone,
    ClusterSection,
    Compute,
    EnsembleSection,
    FinetuneSection,
    Images,
    InputHalvingSection,
    LogSection,
    Storage,
    TaskSection,
)
from headrace.pipelines.recipe.text import MAX_CHARACTERS, RecipeError, explain_all, read_yaml
from headrace.pipelines.recipe.values import Section

__all__ = ["Recipe", "RecipeError", "check_recipe", "load_recipe", "on_cluster", "parse_recipe"]


# Sections that may be empty, and take their defaults then.
_EMPTY_SECTIONS = (
    *("finetune", "input_halving", "ensemble"),
    *(f"heads.{kind}" for kind in HEAD_GRIDS if kind != SKLEARN.name),
)


class Recipe(Section):
    """A run. Relative paths start from the recipe's own folder."""

    images: Images
    task: TaskSection = TaskSection()
    backbones: tuple[Backbone, ...] = ()
    heads: Heads = Heads(logistic=HEAD_GRIDS["logistic"](), mlp=HEAD_GRIDS["mlp"]())
    finetune: FinetuneSection | None = None  # `finetune: {}` takes the defaults
    # features of other programs, under the names that `headrace cache import` gave them
    external_features: tuple[str, ...] = ()
    # `input_halving: {}` takes the defaults; default: every input gets every head
    input_halving: InputHalvingSection | None = None
    ensemble: EnsembleSection | None = None  # `ensemble: {}` takes the defaults
    storage: Storage = Storage()
    cache: Path = Path("headrace-cache")
    out: Path | None = None  # default: headrace-runs/<name of the recipe>
    compute: Compute = Compute()
    cluster: ClusterSection = ClusterSection()
    log: LogSection | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _heads_of_the_task(cls, values: Any) -> Any:
        """Default to ridge heads for a regression, as logistic heads cannot predict numbers."""
        task = values.get("task") if isinstance(values, dict) else None
        if isinstance(task, dict) and task.get("kind") == "regression" and "heads" not in values:
            return {**values, "heads": {"ridge": {}, "mlp": {}}}
        return values

    @pydantic.model_validator(mode="after")
    def _sections_fit_together(self) -> "Recipe":
        backbone_names = [backbone.alias or backbone.name for backbone in self.backbones]
        repeated_names = {name for name in backbone_names if backbone_names.count(name) > 1}
        if repeated_names:
            raise ValueError(
                f"two backbones are called {repeated_names.pop()!r}: give each its own `alias`"
            )
        if self.ensemble is not None and self.task.unit_aggregation == "max":
            raise ValueError(
                "the largest of averages is not the average of the largest: leave `ensemble` out, "
                "or set task.unit_aggregation: mean"
            )
        if not backbone_names and not self.external_features:
            raise ValueError(
                "the key 'backbones' is missing: name at least one network (or `external_features`)"
            )
        return self

    @property
    def paths(self) -> RunPaths:
        """The files of the recipe's run."""
        assert self.out is not None  # load_recipe gives it a default
        return RunPaths(self.out)


def load_recipe(path: str | Path, *, settings: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe; relative paths in it become absolute.

    settings: "KEY=VALUE" that override the recipe, such as "task.folds=3". Raises RecipeError,
    which names the file, the line and the nearest valid key.
    """
    path = Path(path)
    try:
        with path.open("rb") as recipe_file:
            # No more than a recipe can have, in 4 bytes per character: the file may be anything.
            data = recipe_file.read(4 * MAX_CHARACTERS + 4)
        # Windows' shells write UTF-16 with a byte order mark.
        is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = data.decode("utf-16" if is_utf16 else "utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"{path}: no such recipe. Write one with: headrace init FOLDER") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise RecipeError(
            f"{path}: not a recipe (a YAML text file). For a folder of images, write one with: "
            f"headrace init {shlex.quote(str(path))}"
        ) from None
    return parse_recipe(text, path, settings=settings)


def on_cluster(recipe: Recipe, where: str) -> Recipe:
    """Return the recipe with another `cluster.where`. Raises RecipeError for an unknown one."""
    try:
        section = ClusterSection.model_validate(recipe.cluster.model_dump() | {"where": where})
    except pydantic.ValidationError as error:
        raise RecipeError(
            f"--cluster {where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from None
    return recipe.model_copy(update={"cluster": section})


def strictly(recipe: Recipe) -> Recipe:
    """Return the recipe with `compute.strict`: an image that cannot be decoded stops the run."""
    compute = recipe.compute.model_copy(update={"strict": True})
    return recipe.model_copy(update={"compute": compute})


def parse_recipe(text: str, recipe_path: Path, *, settings: Iterable[str] = ()) -> Recipe:
    """Read and check the text of the recipe at `recipe_path`, from whose folder relative paths
    start. Raises RecipeError, as `load_recipe` does.
    """
    root_node, values = read_yaml(text, recipe_path, Recipe.model_fields, _EMPTY_SECTIONS)
    overrides = read_overrides(settings)
    try:
        recipe = Recipe.model_validate(apply_overrides(values, overrides))
    except pydantic.ValidationError as error:
        set_places = {override.keys: f"--set {override.text}" for override in overrides}
        raise RecipeError(
            explain_all(error.errors(), root_node, recipe_path, Recipe, set_places)
        ) from None
    return _absolute(recipe, recipe_path)


def check_recipe(values: dict[str, Any], folder: Path) -> Recipe:
    """Return a recipe from values instead of a file; relative paths start from `folder`.

    Raises RecipeError.
    """
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise RecipeError("; ".join(problems)) from None
    return _absolute(recipe, folder / "recipe.yaml")


def _absolute(recipe: Recipe, recipe_path: Path) -> Recipe:
    recipe_folder = recipe_path.absolute().parent

    def resolve(value: Path | None) -> Path | None:
        return None if value is None else (recipe_folder / expand_home(value))

    sources = ("folder", "table", "tar", "zip", "array", "labels", "unlabelled", "detections")
    images = recipe.images.model_copy(
        update={name: resolve(getattr(recipe.images, name)) for name in (*sources, "root")}
    )
    backbones = tuple(
        backbone.model_copy(
            update={"weights": _weights_file(backbone.weights, recipe_folder)}
            | _located(backbone, recipe_folder)
        )
        for backbone in recipe.backbones
    )
    cluster = recipe.cluster.model_copy(update={"tls": resolve(recipe.cluster.tls)})
    out_folder = resolve(recipe.out) or recipe_folder / "headrace-runs" / recipe_path.stem
    return recipe.model_copy(
        update={
            "images": images,
            "backbones": backbones,
            "cache": resolve(recipe.cache),
            "out": out_folder,
            "cluster": cluster,
            "log": _absolute_log(recipe.log, recipe_folder),
        }
    )


def _located(backbone: Backbone, recipe_folder: Path) -> dict[str, str]:
    """Return the absolute name of a backbone in a folder, with its name in the recipe as alias."""
    name = absolute_name(backbone.name, recipe_folder)
    # The leaderboard keeps the name of the recipe: an absolute path would be long, and another
    # elsewhere.
    return {} if name == backbone.name else {"name": name, "alias": backbone.alias or backbone.name}


def _absolute_log(log: LogSection | None, recipe_folder: Path) -> LogSection | None:
    if log is None:
        return None
    mlflow_uri = (
        log.mlflow
        # An address of a server starts from no folder.
        if log.mlflow is None or "://" in log.mlflow
        else str(recipe_folder / expand_home(log.mlflow))
    )
    tensorboard_folder = (
        None if log.tensorboard is None else recipe_folder / expand_home(log.tensorboard)
    )
    return log.model_copy(update={"mlflow": mlflow_uri, "tensorboard": tensorboard_folder})


def _weights_file(weights: str | None, recipe_folder: Path) -> str | None:
    """Return the name of a weights file as a path from the recipe's folder; packages and the tags
    of libraries unchanged.
    """
    if weights is None or not is_weights_file(weights) or weights.startswith(PACKAGE_PREFIX):
        return weights
    return str(recipe_folder / expand_home(weights))
