"""Functions for notebooks and scripts: images to features, and features to a leaderboard."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pydantic
from dask.distributed import Client
from rich.console import Console

from headrace.cache.count_text import count_text
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.cache.publish import feature_set_path
from headrace.extract.images.content_hashes import HASH_DIGITS, content_hashes
from headrace.extract.run.plan import BackboneFeatures, plan_work_units
from headrace.extract.sources.read import SourceWarning
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.spec_cache import (
    find_backbone_spec,
    load_feature_specs,
    save_feature_specs,
)
from headrace.pipelines.cluster.clients import local_client
from headrace.pipelines.cluster.fork_server import imports_of
from headrace.pipelines.cluster.submit import TaskOptions, announced
from headrace.pipelines.console import make_console
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.feature_input import FeatureInput
from headrace.pipelines.given_images import ImagesLike, image_table
from headrace.pipelines.paths import content_index
from headrace.pipelines.planning.cost_model import measured_rates
from headrace.pipelines.planning.dataset import (
    check_metric,
    drop_rows,
    make_dataset,
    require_task_columns,
)
from headrace.pipelines.planning.devices import find_device
from headrace.pipelines.planning.leaderboard import trained_specs
from headrace.pipelines.planning.networks import cached_contents
from headrace.pipelines.planning.plan import feature_plan, plan_run
from headrace.pipelines.planning.run_state import RunState, write_inputs
from headrace.pipelines.recipe.grid import check_kinds, requested_heads
from headrace.pipelines.recipe.heads import Heads
from headrace.pipelines.recipe.load import Recipe, RecipeError
from headrace.pipelines.recipe.sections import Compute, Images, TaskSection
from headrace.pipelines.recipe.text import explain_section
from headrace.pipelines.result import RunResult, run_result
from headrace.pipelines.stages.evaluate import evaluate
from headrace.pipelines.stages.extract import extract_missing
from headrace.pipelines.stages.select import select
from headrace.pipelines.stages.services import ClientOpener, Services, opener_of
from headrace.pipelines.stages.train import train

Section = TypeVar("Section", bound=pydantic.BaseModel)


def extract_features(
    images: ImagesLike,
    backbone: BackboneSpec | str,
    taps: str | Sequence[str] = "auto",
    *,
    cache: str | Path = "headrace-cache",
    dtype: str = "float16",
    images_per_shard: int | None = None,
    device: str = "auto",
    workers: int | None = None,
    console: Console | None = None,
    client: Client | None = None,
) -> dict[str, FeatureSet]:
    """Return features of images, {"blocks.4.avg": FeatureSet, ...}, from the cache, into which a
    network first puts those that are missing.

    images: a folder, a table, an archive or an array file; a list of paths; a DataFrame with the
    column `path`; torchvision's ImageFolder, in place of whose transform the network's own
    preprocessing is used. Only images that the cache lacks go through the network. Files that
    cannot be read are left out with a SourceWarning. Images that cannot be decoded have no row;
    each FeatureSet lists them with their reasons in `failures()`.
    taps: layers with a pooling, such as "layer3.avg"; "auto" picks some of every network.
    dtype: of the stored features, float16, bfloat16, float32 or uint8.
    images_per_shard: images of one task, written as one file; default: by device and feature sizes.
    device: "auto" is a GPU if there is one.
    console: for progress; default: below the cell in a notebook, silent in a script.
    client: a Dask client to work on; default: a cluster of `workers` processes on this machine.
    Raises HeadraceError.

    A script needs the usual `if __name__ == "__main__":`, because worker processes import it.
    """
    cache = Path(cache).absolute()
    samples = _with_content(image_table(images, labelled=False), cache)
    network = BackboneSpec(backbone) if isinstance(backbone, str) else backbone
    features = load_feature_specs(network, taps, cache_root=cache, dtype=dtype)
    if features.weights_note:
        from headrace.extract.taps.left_out import WeightsWarning  # imports PyTorch

        warnings.warn(features.weights_note, WeightsWarning, stacklevel=2)
    save_feature_specs(network, taps, features, dtype=dtype, cache_root=cache)
    specs = features.specs
    cached = [cached_contents(cache, spec) for spec in specs]
    device = find_device(device)
    units = plan_work_units(
        samples,
        [BackboneFeatures(network, specs, cached)],
        cache_root=cache,
        images_per_shard=images_per_shard,
        device=device,
    )
    if units:
        # For a CPU one process per core is fastest. A GPU is fed from this process.
        opened = (
            _opener(workers, client, imports_of([network.name]))("extract", device)
            if device == "cpu"
            else nullcontext()
        )
        with opened as workers_client:
            console = console or _progress_console()
            extract_missing(units, workers_client, console, announced(TaskOptions(), console))
    return {spec.name: open_feature_set(feature_set_path(cache, spec)) for spec in specs}


def feature_matrix(features: FeatureSet, images: ImagesLike) -> npt.NDArray[np.float32]:
    """Return the features of N images in the order in which they are given, (N, *shape) float32,
    for code of your own; the rows of a feature set have an order of their own.

    shape: (D,) of a vector, (D, h, w) of a map.
    images: as of `extract_features`. Rows are found by the bytes of the images. Raises CacheError
    for an image without a row, InvalidInput for a file that cannot be read.
    """
    if not isinstance(features, FeatureSet):
        raise InvalidInput(
            f"features are given as {type(features).__name__}. Expected one FeatureSet, such as "
            f"features[{next(iter(features), 'TAP') if isinstance(features, Mapping) else 'TAP'!r}]"
        )
    cache_root = features.path.parent.parent
    samples = _with_content(image_table(images, labelled=False), cache_root, strict=True)
    return features.load(samples["content"].tolist())


def train_heads(
    features: Mapping[str, FeatureSet] | FeatureSet,
    samples: ImagesLike,
    *,
    heads: Heads | Mapping[str, Any] | str | Sequence[str] = "logistic",
    task: TaskSection | Mapping[str, Any] | None = None,
    out: str | Path = "headrace-runs/notebook",
    workers: int | None = None,
    console: Console | None = None,
    options: TaskOptions | None = None,
    client: Client | None = None,
) -> RunResult:
    """Train a grid of heads on features, rank them on validation folds, and score the winner on the
    test split.

    samples: as `images` of `extract_features`, with the columns that the task names (`label` by
    default).
    heads: as in a recipe, {"logistic": {"C": [0.01, 1]}}; names alone are kinds with their default
    grids. task: as in a recipe, {"target": "label", "folds": 5}. out: the run's directory.
    The result's `board` is the leaderboard and `heads` every single head, both as DataFrames;
    calling again with more heads trains only the new ones. console: as for `extract_features`.
    options: how tasks are watched over, such as their timeout. client: a Dask client to work on;
    default: a cluster of `workers` processes on this machine. Raises HeadraceError.
    """
    recipe = _recipe_of(heads, task, Path(out).absolute())
    check_kinds(recipe.heads, recipe.task.kind, has_units=recipe.task.unit is not None)
    state = _state_of(recipe, _feature_sets(features), samples)
    write_inputs(state)
    console, options = console or _progress_console(), options or TaskOptions()
    with Services(console, options, _opener(workers, client), workers) as services:
        for stage in (train, select, evaluate):
            state = stage(state, services)
    return run_result(state)


def _recipe_of(
    heads: Heads | Mapping[str, Any] | str | Sequence[str],
    task: TaskSection | Mapping[str, Any] | None,
    out: Path,
) -> Recipe:
    """Return a recipe without images and backbones: the features are given."""
    if isinstance(heads, Iterable) and not isinstance(heads, Heads | Mapping):
        heads = {name: {} for name in ([heads] if isinstance(heads, str) else heads)}
    return Recipe.model_construct(
        images=Images.model_construct(),
        task=_section(TaskSection, "task", {} if task is None else task),
        heads=_section(Heads, "heads", heads),
        compute=Compute(heads_device="cpu"),
        out=out,
    )


def _section(model: type[Section], name: str, values: Any) -> Section:
    """Return a section of a recipe. Raises RecipeError for wrong keys and values."""
    if isinstance(values, model):
        return values
    try:
        return model.model_validate(dict(values) if isinstance(values, Mapping) else values)
    except pydantic.ValidationError as error:
        raise RecipeError(explain_section(error, name, Recipe)) from None


def _state_of(recipe: Recipe, features: Mapping[str, FeatureSet], samples: ImagesLike) -> RunState:
    """Return the state of a run before training. Raises InvalidInput if an image has no row."""
    paths = recipe.paths
    labelled_samples = image_table(samples, labelled=True)
    require_task_columns(labelled_samples, recipe.task, "the table of images")
    if not features:
        raise InvalidInput("no features are given. Expected those of extract_features")
    samples_with_content = _with_content(labelled_samples, paths.root)
    dataset = make_dataset(
        samples_with_content, samples_with_content["content"].tolist(), recipe.task
    )
    failed_reasons = {
        failure.content_hash: failure.reason
        for feature in features.values()
        for failure in feature.failures()
    }
    dataset = drop_rows(dataset, failed_reasons)
    needed_contents = {*dataset.train.content.astype(str), *dataset.test.content.astype(str)}
    feature_plans = [
        feature_plan(name, [feature.spec], needed_contents, [feature.cached_hashes()])
        for name, feature in features.items()
    ]
    for plan in feature_plans:
        if plan.rows_cached < plan.rows_total:
            raise InvalidInput(
                f"{plan.name} has features of {plan.rows_cached:,} of these {plan.rows_total:,} "
                "images: extract_features first"
            )
    return RunState(
        recipe=recipe,
        samples=samples_with_content,
        unreadable=(),
        dataset=dataset,
        notes=dataset.notes,
        accounting=None,
        metric=check_metric(recipe.task),
        feature_inputs={
            # A feature set is the folder CACHE/features/FINGERPRINT.
            name: FeatureInput(
                name, (feature.path,), find_backbone_spec(feature.path.parent.parent, feature.spec)
            )
            for name, feature in features.items()
        },
        plan=plan_run(
            features=feature_plans,
            units=[],
            images=len(needed_contents),
            requested=requested_heads(
                recipe.heads, list(features), side_columns=bool(recipe.task.side_columns)
            ),
            task=dataset.train,
            rates=measured_rates(paths.logs),
            trained=lambda group: trained_specs(paths.banks, group),
        ),
    )


def _progress_console() -> Console:
    """Return a console that shows progress in a notebook, and nothing in a script."""
    console = make_console(stderr=True)
    console.quiet = not console.is_jupyter
    return console


def _opener(
    workers: int | None, client: Client | None, module_names: Sequence[str] = ()
) -> ClientOpener:
    if client is not None:
        return opener_of(client)
    return lambda role, device: local_client(workers, module_names=module_names)


def _feature_sets(features: Any) -> dict[str, FeatureSet]:
    if isinstance(features, FeatureSet):
        return {features.spec.name: features}
    is_mapping = isinstance(features, Mapping)
    if not is_mapping or not all(isinstance(value, FeatureSet) for value in features.values()):
        raise InvalidInput(
            f"features are given as {type(features).__name__}. Expected those of extract_features, "
            "{tap: FeatureSet}. An array of your own is trained on by LogisticHead(C=1).fit(X, y), "
            "or becomes an input of a recipe: headrace cache import --help"
        )
    return dict(features)


def _with_content(samples: pd.DataFrame, root: Path, *, strict: bool = False) -> pd.DataFrame:
    """Return the samples whose files can be read, with the hash of their bytes as `content`.

    Warns of files that cannot be read. Raises InvalidInput if none can, or, where it is strict, if
    one cannot.
    """
    # Another column of this name is the caller's own, such as captions.
    if "content" in samples and _are_hashes(samples["content"].dropna()):
        return samples
    found = content_hashes(samples, content_index(root))
    if found.unreadable:
        first = found.unreadable[0]
        unreadable_text = (
            f"{len(found.unreadable):,} of {count_text(len(samples), 'image')} cannot be read, "
            f"first {first.path} ({first.reason})"
        )
        if strict or len(found.unreadable) == len(samples):
            raise InvalidInput(f"{unreadable_text}. Paths start from {Path.cwd()}")
        warnings.warn(f"left out: {unreadable_text}", SourceWarning, stacklevel=3)
    with_content = samples.assign(
        content=pd.Series(found.hashes, index=samples.index, dtype=object)
    )
    return with_content[with_content["content"].notna()]


def _are_hashes(values: pd.Series) -> bool:
    is_hash = values.astype(str).str.fullmatch(f"[0-9a-f]{{{HASH_DIGITS}}}")
    return len(values) > 0 and bool(is_hash.all())
