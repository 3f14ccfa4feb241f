"""The inventory of a run, read once at its start: images, content hashes, networks, inputs."""

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console

from headrace.cache.count_text import count_text
from headrace.cache.exchange.external import external_feature_sets
from headrace.cache.format.compression import require_hdf5plugin
from headrace.cache.format.sealed import SealBroken
from headrace.cache.spec import FeatureSpec
from headrace.extract.images.changes import compare_listings, read_listing
from headrace.extract.images.content_hashes import UnreadableSample, content_hashes
from headrace.extract.sources.listing import Listing
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.spec_cache import TapFeatures, save_feature_specs
from headrace.heads.data.side_columns import SIDE_COLUMNS, taps_of
from headrace.pipelines.cluster.progress import Advance, show_progress
from headrace.pipelines.paths import content_index
from headrace.pipelines.planning.dataset import Dataset, check_metric, make_dataset, read_samples
from headrace.pipelines.planning.devices import find_heads_device
from headrace.pipelines.planning.networks import (
    backbone_spec,
    cached_contents,
    storage_options,
    tap_features,
)
from headrace.pipelines.recipe.grid import RequestedHeads, check_kinds, requested_heads
from headrace.pipelines.recipe.load import Recipe, RecipeError
from headrace.pipelines.recipe.targets import DataError

_MANY_FILES = 2000  # progress is shown from here on; fewer are read in a moment

# each network with the feature sets to store of it
Networks = tuple[tuple[BackboneSpec, TapFeatures], ...]


@dataclass(frozen=True)
class InputViews:
    """The feature sets of one input of heads, one per view, cached or not."""

    views: tuple[FeatureSpec, ...]
    backbone: BackboneSpec | None  # None for external features


@dataclass(frozen=True)
class Inventory:
    """The inputs of a run, which do not change while it is at work."""

    recipe: Recipe
    listing: Listing
    # id, path, content (None where the file cannot be read), and the user's columns
    samples: pd.DataFrame
    unreadable: tuple[UnreadableSample, ...]
    dataset: Dataset  # of every image whose file can be read, even if it cannot be decoded
    metric: str
    networks: Networks  # in the recipe's order
    inputs: Mapping[str, InputViews]  # by their names on the leaderboard
    requested: tuple[RequestedHeads, ...]
    changes: tuple[str, ...]  # notes on images that are new, gone or changed since the last call

    def needed_images(self) -> pd.DataFrame:
        """Return the samples that the task has rows of, labelled or not."""
        contents = self.labelled_contents | set(self.dataset.unlabelled.content.astype(str))
        return self.samples[self.samples["content"].isin(contents)]

    @property
    def labelled_contents(self) -> set[str]:
        """The content hashes of images to train or test on."""
        dataset = self.dataset
        return {*dataset.train.content.astype(str), *dataset.test.content.astype(str)}


def require_libraries(recipe: Recipe) -> None:
    """Raise HeadraceError if a library that the recipe's storage or compute asks for is missing."""
    if recipe.storage.compression != "none":
        require_hdf5plugin("storage.compression needs a library")
    if recipe.compute.runtime == "openvino":
        # Imports torch, which a run with all features in the cache does without.
        from headrace.extract.taps.openvino_forward import require_openvino

        require_openvino()


def take_inventory(
    recipe: Recipe, *, write: bool = True, console: Console | None = None
) -> Inventory:
    """Read what the recipe names.

    write: off for a dry run, which writes nothing, not even the index of content hashes.
    console: shows the progress of reading many images.
    Raises HeadraceError, before anything costly, for whatever in the recipe cannot work.
    """
    metric = check_metric(recipe.task)
    check_kinds(recipe.heads, recipe.task.kind, has_units=recipe.task.unit is not None)
    find_heads_device(recipe)  # refuses a GPU that is not there
    require_libraries(recipe)
    check_writable(recipe)
    listing = read_samples(recipe)
    samples = listing.samples
    # Targets, groups and folds that cannot work are the commonest mistakes: they are found before
    # any image is read or network built, as if every image could be read and none were a copy.
    make_dataset(samples, [f"{row:032}" for row in range(len(samples))], recipe.task)
    networks = read_networks(recipe, write=write)
    inputs = head_inputs(recipe, networks)
    requested = requested_heads(
        recipe.heads, list(inputs), side_columns=bool(recipe.task.side_columns)
    )
    _check_views(requested, inputs)
    content_by_row, unreadable = read_contents(recipe, samples, write=write, console=console)
    samples = samples.assign(content=pd.Series(content_by_row, index=samples.index, dtype=object))
    inventory = Inventory(
        recipe=recipe,
        listing=listing,
        samples=samples,
        unreadable=unreadable,
        dataset=make_dataset(samples, content_by_row, recipe.task),
        metric=metric,
        networks=networks,
        inputs=inputs,
        requested=tuple(requested),
        changes=tuple(_changes(recipe.paths.listing, samples)),
    )
    _check_external(inventory)
    return inventory


def read_networks(recipe: Recipe, *, write: bool) -> Networks:
    """Return the recipe's networks. write: as of `take_inventory`. Raises BackboneError."""
    return tuple(
        (backbone_spec(backbone, recipe), tap_features(backbone, recipe, forked=write))
        for backbone in recipe.backbones
    )


def remember_taps(recipe: Recipe, networks: Networks) -> None:
    """Store the taps' specs in the cache, so that the next call builds no network to know them."""
    for backbone, (network, features) in zip(recipe.backbones, networks, strict=True):
        options = storage_options(backbone, recipe)
        save_feature_specs(network, backbone.taps, features, cache_root=recipe.cache, **options)


def weights_notes(networks: Networks) -> tuple[str, ...]:
    """Return a sentence for each network whose weights file does not match it exactly."""
    return tuple(features.weights_note for _, features in networks if features.weights_note)


def content_listing(samples: pd.DataFrame) -> dict[str, str]:
    """Return {id: content hash} of the images that can be read."""
    readable = samples[samples["content"].notna()]
    return dict(zip(readable["id"].astype(str), readable["content"].astype(str), strict=True))


def read_contents(
    recipe: Recipe, samples: pd.DataFrame, *, write: bool, console: Console | None = None
) -> tuple[list[str | None], tuple[UnreadableSample, ...]]:
    """Return the content hash of each sample (None if its file cannot be read), and the reasons.

    write, console: as in `take_inventory`. Raises DataError if no file can be read.
    """
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        advance: Advance | None = None

        def on_read(_n_read: int, n_files: int) -> None:
            nonlocal advance
            if advance is None and console is not None and n_files >= _MANY_FILES:
                advance = stack.enter_context(show_progress(console, "read", n_files, "files"))
            if advance is not None:
                advance(1)

        # A first dry run leaves no cache behind; afterwards the index is worth keeping.
        has_cache = write or recipe.cache.exists()
        index = content_index(recipe.cache) if has_cache else Path(scratch) / "contents.parquet"
        contents = content_hashes(samples, index, on_read)
    if len(contents.unreadable) == len(samples):
        first_sample = contents.unreadable[0]
        raise DataError(
            f"none of the {count_text(len(samples), 'image')} can be read; the first is "
            f"{first_sample.path} ({first_sample.reason}). Relative paths start from images.root, "
            "by default the table's own folder"
        )
    return list(contents.hashes), contents.unreadable


def check_writable(recipe: Recipe) -> None:
    """Raise RecipeError if the run's directory or the cache cannot be made or written to."""
    for recipe_key, folder in (("out", recipe.paths.root), ("cache", recipe.cache)):
        existing_path = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing_path.is_dir():
            raise RecipeError(
                f"{recipe_key}: {existing_path} is a file; expected a folder, or a path where one "
                "can be made"
            )
        if not os.access(existing_path, os.W_OK | os.X_OK):
            raise RecipeError(
                f"{recipe_key}: {existing_path} cannot be written to. Set `{recipe_key}` in the "
                "recipe to a folder that can"
            )


def _changes(listing_path: Path, samples: pd.DataFrame) -> list[str]:
    """Return notes on images that are new, changed, renamed or removed since the last call."""
    try:
        listing_before = read_listing(listing_path)
    except SealBroken as error:
        return [
            f"{listing_path} has changed since it was written ({error}): what is new since the "
            "last call cannot be told"
        ]
    if not listing_before:
        return []
    changes = compare_listings(listing_before, content_listing(samples))
    counts = {
        kind: len(getattr(changes, kind)) for kind in ("new", "changed", "renamed", "removed")
    }
    counts_text = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return [f"images since the last call: {counts_text}"] if counts_text else []


def head_inputs(recipe: Recipe, networks: Networks) -> dict[str, InputViews]:
    """Return every input of heads by its name on the leaderboard."""
    inputs: dict[str, InputViews] = {}
    for backbone, (network, features) in zip(recipe.backbones, networks, strict=True):
        prefix = f"{backbone.alias or backbone.name}:" if len(networks) > 1 else ""
        for spec in features.specs:
            name = prefix + spec.name
            views = inputs[name].views if name in inputs else ()
            inputs[name] = InputViews((*views, spec), network)
    if SIDE_COLUMNS in inputs or SIDE_COLUMNS in recipe.external_features:
        raise RecipeError(
            f"{SIDE_COLUMNS!r} is what leaderboards call the columns of task.side_columns: give "
            "the network another alias, or import the features under another name"
        )
    for external_name in recipe.external_features:
        if external_name in inputs:
            raise RecipeError(
                f"external_features: {external_name!r} is also the name of a tap, or stands twice: "
                "import it under another name"
            )
        inputs[external_name] = InputViews((_external_spec(recipe, external_name),), None)
    return inputs


def _external_spec(recipe: Recipe, external_name: str) -> FeatureSpec:
    feature_sets = external_feature_sets(recipe.cache, external_name)
    if len(feature_sets) != 1:
        names = {feature_set.spec.tap for feature_set in external_feature_sets(recipe.cache)}
        raise RecipeError(
            f"external_features: there are {len(feature_sets)} feature sets {external_name!r} in "
            f"{recipe.cache}; imported are: {', '.join(sorted(names)) or 'none'}. Import it first: "
            f"headrace cache import FILE --name {external_name} --recipe recipe.yaml"
        )
    return feature_sets[0].spec


def _check_external(inventory: Inventory) -> None:
    """Raise RecipeError, naming the first image, if external features lack a row."""
    # No network here can make them. Images without a label may lack them, and get no prediction.
    samples = inventory.samples
    needed = samples[samples["content"].isin(inventory.labelled_contents)]
    for external_name in inventory.recipe.external_features:
        (spec,) = inventory.inputs[external_name].views
        absent = needed[~needed["content"].isin(cached_contents(inventory.recipe.cache, spec))]
        if len(absent):
            raise RecipeError(
                f"external_features: {external_name!r} has no row for {len(absent):,} of "
                f"{count_text(len(needed), 'image')}, first {absent['id'].iloc[0]!r}: import "
                "features of them all, or leave these images out of the table"
            )


def _check_views(requested: Sequence[RequestedHeads], inputs: Mapping[str, InputViews]) -> None:
    """Raise RecipeError for a head on taps of different views: their rows differ."""
    for heads in requested:
        taps = taps_of(heads.inputs)
        view_sets = {tuple(spec.view for spec in inputs[name].views) for name in taps}
        if len(view_sets) > 1:
            counts_text = ", ".join(f"{name} has {len(inputs[name].views)}" for name in taps)
            raise RecipeError(
                f"heads: the taps of an input have different views ({counts_text}) and cannot "
                "stand side by side: give their backbones the same views, or take each tap alone, "
                "inputs: [each]"
            )
