"""What there is: images, content hashes, networks, features in the cache, heads on disk.

Ends in the plan.
"""

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from headrace.cache.exchange.external import external_feature_sets
from headrace.cache.feature_set import open_feature_set
from headrace.cache.format.compression import require_hdf5plugin
from headrace.cache.integrity.sealed import SealBroken
from headrace.cache.publish import feature_set_path, is_feature_set
from headrace.cache.spec import FeatureSpec
from headrace.extract.images.changes import compare_listings, read_listing
from headrace.extract.images.content_hashes import Unreadable, content_hashes
from headrace.extract.run.plan import Network, plan_networks
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.spec_cache import (
    Storing,
    backbone_features,
    build_features,
    remember_features,
)
from headrace.heads.bank import check_device
from headrace.heads.evaluate.metrics import DEFAULT_METRIC, METRICS
from headrace.pipelines.paths import RunPaths, content_index
from headrace.pipelines.planning.accounting import Accounting, account
from headrace.pipelines.planning.cost_model import measured_rates
from headrace.pipelines.planning.dataset import Dataset, drop_rows, make_dataset, read_samples
from headrace.pipelines.planning.leaderboard import trained_in
from headrace.pipelines.planning.plan import Plan, feature_plan, plan_run
from headrace.pipelines.recipe.grid import Wanted, check_kinds, wanted_heads
from headrace.pipelines.recipe.load import Recipe, RecipeError
from headrace.pipelines.recipe.sections import Backbone, TaskSection
from headrace.pipelines.recipe.targets import DataError


@dataclass(frozen=True)
class Survey:
    """Everything that a run knows before it starts."""

    paths: RunPaths
    samples: (
        pd.DataFrame
    )  # id, path, content (None where the file cannot be read), and the user's columns
    unreadable: tuple[Unreadable, ...]
    dataset: Dataset
    notes: tuple[str, ...]  # what a careful person would want to be told
    accounting: (
        Accounting | None
    )  # where every entry of the source went; None for samples that a program gave
    metric: str
    # Of the feature sets, view by view, by the names that the leaderboard gives them.
    directories: Mapping[str, tuple[Path, ...]]
    backbones: Mapping[str, BackboneSpec | None]  # the network of each of them, where it is known
    plan: Plan


def survey(recipe: Recipe, *, write: bool = True, retry_failed: bool = False) -> Survey:
    """Look at everything and plan; with `write` off, nothing is written, not even the index of
    content hashes.

    Raises HeadraceError, before anything costly, for whatever in the recipe cannot work.
    """
    paths = run_paths(recipe)
    metric = check_metric(recipe.task)
    check_kinds(recipe.heads, recipe.task.kind)
    find_heads_device(recipe)  # refuses a GPU that is not there
    if recipe.storage.compression != "none":
        require_hdf5plugin("storage.compression needs a library")
    for key, folder in (("out", paths.root), ("cache", recipe.cache)):
        _check_writable(key, folder)
    listed = read_samples(recipe)
    samples = listed.samples
    # Before anything is read or built, as if every image were there and none a copy: targets,
    # groups and folds that cannot work are the commonest mistakes.
    make_dataset(samples, [f"{row:032}" for row in range(len(samples))], recipe.task)
    networks = [_network(backbone, recipe, run=write) for backbone in recipe.backbones]
    inputs = _inputs(recipe, networks)
    wanted = wanted_heads(recipe.heads, list(inputs))
    _check_views(wanted, {name: [spec for spec, _ in views] for name, views in inputs.items()})
    with tempfile.TemporaryDirectory() as scratch:
        # A first dry run leaves no cache behind; afterwards the index is worth keeping.
        index = (
            content_index(recipe.cache)
            if write or recipe.cache.exists()
            else Path(scratch) / "contents.parquet"
        )
        contents = content_hashes(samples, index)
    if len(contents.unreadable) == len(samples):
        first = contents.unreadable[0]
        raise DataError(
            f"none of the {len(samples):,} images can be read; the first is {first.path} "
            f"({first.reason}). Relative paths start from images.root, by default the table's own "
            "folder"
        )
    samples = samples.assign(
        content=pd.Series(list(contents.hashes), index=samples.index, dtype=object)
    )
    dataset = make_dataset(samples, contents.hashes, recipe.task)
    readable = samples[samples["content"].notna()]
    needed = readable[
        readable["content"].isin(
            {*dataset.train.content.astype(str), *dataset.test.content.astype(str)}
        )
    ]
    units = plan_networks(
        needed,
        networks,
        cache_root=recipe.cache,
        unit_rows=recipe.compute.images_per_shard,
        device=find_device(recipe.compute.device),
        batch_size=recipe.compute.batch_size,
        compile=recipe.compute.compile,
        compression=None if recipe.storage.compression == "none" else recipe.storage.compression,
        strict=recipe.compute.strict,
    )
    _check_imported(recipe, inputs, needed)
    # All heads are compared on the rows that all inputs have; a row that is mended comes back, as
    # another task.
    failed = _failed(recipe.cache, networks)
    _require_decodable(needed, failed)
    whole, dataset = dataset, drop_rows(dataset, frozenset(failed))
    images = set(needed["content"])
    features = [
        feature_plan(name, [spec for spec, _ in views], images, [known for _, known in views])
        for name, views in inputs.items()
    ]
    plan = plan_run(
        features=features,
        units=units,
        images=len(images),
        images_new=len({content for job in units for content in job.contents}),
        wanted=wanted,
        task_digest=dataset.train.digest,
        folds=dataset.train.n_folds,
        rows=len(dataset.train.ids),
        outputs=max(2, len(dataset.train.classes)),
        rates=measured_rates(paths.logs),
        trained=lambda group: trained_in(paths.banks, group, retry_failed=retry_failed),
    )
    if write:
        for backbone, network in zip(recipe.backbones, networks, strict=True):
            remember_features(
                network.backbone,
                backbone.taps,
                network.specs,
                cache_root=recipe.cache,
                **storing(backbone, recipe),
            )
    directories = {
        feature.name: tuple(feature_set_path(recipe.cache, spec) for spec in feature.specs)
        for feature in features
    }
    accounting = account(listed, len(contents.unreadable), whole, dataset)
    notes = (*_changes(paths.listing, samples), *listed.notes, *accounting.lines(), *dataset.notes)
    backbones: dict[str, BackboneSpec | None] = dict.fromkeys(inputs)  # imported features have none
    backbones |= {name: network.backbone for name, (network, _) in _named(recipe, networks)}
    return Survey(
        paths,
        samples,
        contents.unreadable,
        dataset,
        notes,
        accounting,
        metric,
        directories,
        backbones,
        plan,
    )


def run_paths(recipe: Recipe) -> RunPaths:
    """Where the files of the recipe's run lie."""
    assert recipe.out is not None  # load_recipe gives it a default
    return RunPaths(recipe.out)


def _check_writable(key: str, folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise RecipeError(
            f"{key}: {existing} is a file; expected a folder, or a path where one can be made"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RecipeError(
            f"{key}: {existing} cannot be written to. Set `{key}` in the recipe to a folder that "
            "can"
        )


def listing(samples: pd.DataFrame) -> dict[str, str]:
    """{id: content hash} of the images that can be read."""
    readable = samples[samples["content"].notna()]
    return dict(zip(readable["id"].astype(str), readable["content"].astype(str), strict=True))


def _changes(path: Path, samples: pd.DataFrame) -> list[str]:
    try:
        before = read_listing(path)
    except SealBroken as error:
        return [
            (
                f"{path} has changed since it was written ({error}): what is new since the last "
                "call cannot be told"
            )
        ]
    if not before:
        return []
    changes = compare_listings(before, listing(samples))
    counts = {
        kind: len(getattr(changes, kind)) for kind in ("new", "changed", "renamed", "removed")
    }
    found = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return [f"images since the last call: {found}"] if found else []


def _inputs(
    recipe: Recipe, networks: Sequence[Network]
) -> dict[str, list[tuple[FeatureSpec, Collection[str]]]]:
    """By the name that the leaderboard gives it: each tap's views, with the content hashes that
    each has.
    """
    inputs: dict[str, list[tuple[FeatureSpec, Collection[str]]]] = {}
    for name, (network, place) in _named(recipe, networks):
        inputs.setdefault(name, []).append((network.specs[place], network.known[place]))
    for name in recipe.imported:
        if name in inputs:
            raise RecipeError(
                f"imported: {name!r} is also the name of a tap, or stands twice: import it under "
                "another name"
            )
        inputs[name] = [_imported(recipe, name)]
    return inputs


def _imported(recipe: Recipe, name: str) -> tuple[FeatureSpec, Collection[str]]:
    found = external_feature_sets(recipe.cache, name)
    if len(found) != 1:
        there = (
            ", ".join(sorted({each.spec.tap for each in external_feature_sets(recipe.cache)}))
            or "none"
        )
        raise RecipeError(
            f"imported: there are {len(found)} feature sets {name!r} in {recipe.cache}; imported "
            f"are: {there}. Import it first: headrace cache import FILE --name {name} --recipe "
            "recipe.yaml"
        )
    return found[0].spec, found[0].known()


def _check_imported(
    recipe: Recipe,
    inputs: Mapping[str, Sequence[tuple[FeatureSpec, Collection[str]]]],
    needed: pd.DataFrame,
) -> None:
    """Nothing here can make up for rows that an import lacks.

    Raises RecipeError, naming the first image.
    """
    for name in recipe.imported:
        ((_, known),) = inputs[name]
        absent = needed[~needed["content"].isin(known)]
        if len(absent):
            raise RecipeError(
                f"imported: {name!r} has no row for {len(absent):,} of {len(needed):,} images, "
                f"first {absent['id'].iloc[0]!r}: import features of them all, or leave these "
                "images out of the table"
            )


def _named(
    recipe: Recipe, networks: Sequence[Network]
) -> Iterator[tuple[str, tuple[Network, int]]]:
    """Every feature set with the name that the leaderboard gives it:

    (name, (its network, its place there)).
    """
    for backbone, network in zip(recipe.backbones, networks, strict=True):
        prefix = f"{backbone.alias or backbone.name}:" if len(networks) > 1 else ""
        for place, spec in enumerate(network.specs):
            yield prefix + spec.name, (network, place)


def find_device(wanted: str) -> str:
    """ "auto" is a GPU where PyTorch sees one. It is asked only then, because asking
    imports torch.
    """
    if wanted != "auto":
        return wanted
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def find_heads_device(recipe: Recipe, workers: int | None = None) -> str:
    """Where this run's workers train heads; `workers` overrides the recipe's.

    "auto" is a GPU for the one worker of this machine: several would each want its memory, and
    workers of a cluster are given none for heads. Raises BadBank where a GPU is asked for by name
    and this machine, which would train, has none.
    """
    wanted, here = recipe.compute.heads_device, recipe.cluster.where in ("local", "cuda")
    if wanted == "auto":
        return find_device("auto") if here and (workers or recipe.compute.workers) == 1 else "cpu"
    if here:
        check_device(wanted)
    return wanted


def storing(backbone: Backbone, recipe: Recipe) -> Storing:
    """How the recipe has features computed and stored, as `backbone_features` takes it."""
    views = backbone.views
    number = {"flips": 4, "dihedral": 8}[views] if isinstance(views, str) else views
    stored = Storing(
        dtype=recipe.storage.dtype, compute_dtype=recipe.storage.precision, views=number
    )
    return Storing(**stored, symmetric=True) if isinstance(views, str) else stored


def backbone_spec(backbone: Backbone, recipe: Recipe) -> BackboneSpec:
    """The recipe's backbone as `headrace.extract` takes it: its fields, less taps, views and names,
    and the images' range.
    """
    fields = backbone.model_dump(exclude={"alias", "taps", "views"})
    return BackboneSpec(**fields, pixel_range=recipe.images.pixel_range)


def _check_views(wanted: Sequence[Wanted], specs: Mapping[str, Sequence[FeatureSpec]]) -> None:
    """Raises RecipeError for a head's input whose parts have different views: their rows could not
    stand side by side.
    """
    for each in wanted:
        if len({tuple(spec.view for spec in specs[name]) for name in each.inputs}) > 1:
            found = ", ".join(f"{name} has {len(specs[name])}" for name in each.inputs)
            raise RecipeError(
                f"heads: the taps of an input have different views ({found}) and cannot stand side "
                "by side: give their backbones the same views, or take each tap alone, inputs: "
                "[each]"
            )


def _network(backbone: Backbone, recipe: Recipe, *, run: bool) -> Network:
    spec = backbone_spec(backbone, recipe)
    build = _build_forked(recipe) if run and _forks(backbone, recipe) else build_features
    specs = backbone_features(
        spec, backbone.taps, cache_root=recipe.cache, build=build, **storing(backbone, recipe)
    )
    return Network(spec, specs, [_known(recipe.cache, feature) for feature in specs])


def _forks(backbone: Backbone, recipe: Recipe) -> bool:
    """Whether a run is spared importing PyTorch in this process, for workers will have it from the
    server that they are forked from.
    """
    here = recipe.cluster.where == "local" and find_device(recipe.compute.device) == "cpu"
    return here and "torch" not in sys.modules and not backbone.name.startswith("python:")


def _build_forked(recipe: Recipe) -> Callable[..., tuple[FeatureSpec, ...]]:
    from headrace.pipelines.cluster.fork_server import call_forked, imports_of

    imports = imports_of(backbone.name for backbone in recipe.backbones)
    return functools.partial(call_forked, imports, build_features)


def _failed(cache: Path, networks: Sequence[Network]) -> dict[str, str]:
    """{content hash: reason} of the images that some feature set of the run has
    recorded as failed.
    """
    paths = [feature_set_path(cache, spec) for network in networks for spec in network.specs]
    failures = (
        failure
        for path in paths
        if is_feature_set(path)
        for failure in open_feature_set(path).failures()
    )
    return {failure.content_hash: failure.reason for failure in failures}


def _require_decodable(needed: pd.DataFrame, failed: Mapping[str, str]) -> None:
    """Raises DataError, with the first reason, where no image is left: it is the same one for all
    of them, as a rule.
    """
    if len(needed) and needed["content"].isin(list(failed)).all():
        first = needed.iloc[0]
        raise DataError(
            f"none of the {len(needed):,} images can be used; the first is {first['path']}: "
            f"{failed[first['content']]}"
        )


def _known(cache: Path, spec: FeatureSpec) -> set[str]:
    path = feature_set_path(cache, spec)
    return set(open_feature_set(path).known()) if is_feature_set(path) else set()


def check_metric(section: TaskSection) -> str:
    """The metric that ranks, by default that of the task's kind.

    Raises RecipeError for one that the task does not have.
    """
    kind = section.kind
    metric = section.metric or DEFAULT_METRIC[kind]
    if metric not in METRICS or kind not in METRICS[metric].tasks:
        valid = [name for name, known in METRICS.items() if kind in known.tasks]
        raise RecipeError(
            f"task.metric {metric!r} is no metric of a {kind} task. There are: {', '.join(valid)}"
        )
    return metric
