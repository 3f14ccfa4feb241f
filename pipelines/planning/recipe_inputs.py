"""What runs and extractions read of a recipe: networks, inputs of heads, content hashes."""

import contextlib
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console

from headrace.cache.count_text import count_text
from headrace.cache.exchange.external import external_feature_sets
from headrace.cache.format.compression import require_hdf5plugin
from headrace.cache.spec import FeatureSpec
from headrace.extract.images.content_hashes import UnreadableSample, content_hashes
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.spec_cache import TapFeatures, save_feature_specs
from headrace.heads.data.side_columns import SIDE_COLUMNS
from headrace.pipelines.cluster.progress import Advance, show_progress
from headrace.pipelines.paths import content_index
from headrace.pipelines.planning.networks import (
    backbone_spec,
    storage_options,
    tap_features,
)
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


def require_libraries(recipe: Recipe) -> None:
    """Raise HeadraceError if a library that the recipe's storage or compute asks for is missing."""
    if recipe.storage.compression != "none":
        require_hdf5plugin("storage.compression needs a library")
    if recipe.compute.runtime == "openvino":
        # Imports torch, which a run with all features in the cache does without.
        from headrace.extract.taps.openvino_forward import require_openvino

        require_openvino()


def read_networks(recipe: Recipe, *, write: bool) -> Networks:
    """Return the recipe's networks.

    write: off for a dry run, which has no workers whose server could build a network that the cache
    does not know. Raises BackboneError.
    """
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


def read_contents(
    recipe: Recipe, samples: pd.DataFrame, *, write: bool, console: Console | None = None
) -> tuple[list[str | None], tuple[UnreadableSample, ...]]:
    """Return the content hash of each sample (None if its file cannot be read), and the reasons.

    write: off for a dry run, which leaves no index of them where there is no cache. console: shows
    the progress of reading many images. Raises DataError if no file can be read.
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


def head_inputs(recipe: Recipe, networks: Networks) -> dict[str, InputViews]:
    """Return every input of heads by its name on the leaderboard. Raises RecipeError for two of one
    name, and for external features that are not imported.
    """
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
            f"headrace cache import FILE --name {shlex.quote(external_name)} --recipe recipe.yaml"
        )
    return feature_sets[0].spec
