"""The recipe's backbones as specs of `headrace.extract`, and what the cache holds of them."""

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from headrace.cache.feature_set import open_feature_set
from headrace.cache.publish import feature_set_path, is_feature_set
from headrace.cache.spec import FeatureSpec
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.spec_cache import (
    FeatureOptions,
    TapFeatures,
    build_feature_specs,
    load_feature_specs,
)
from headrace.pipelines.cluster.fork_server import call_forked, imports_of
from headrace.pipelines.planning.devices import find_device
from headrace.pipelines.recipe.load import Recipe
from headrace.pipelines.recipe.sections import Backbone


def backbone_spec(backbone: Backbone, recipe: Recipe) -> BackboneSpec:
    """Return the spec of a backbone: its fields in the recipe except taps, views and names, and how
    the section `images` has pixels read.
    """
    spec_fields = backbone.model_dump(exclude={"alias", "taps", "views", "band_ranges"})
    images = recipe.images
    return BackboneSpec(
        **spec_fields,
        pixel_range=backbone.band_ranges or images.pixel_range,
        pixel_dtype=images.pixel_dtype,
        nodata=images.nodata,
        decode=images.decode,
    )


def storage_options(backbone: Backbone, recipe: Recipe) -> FeatureOptions:
    """Return the dtypes and views that the recipe stores, as arguments of `load_feature_specs`."""
    views = backbone.views
    options = FeatureOptions(
        dtype=recipe.storage.dtype,
        compute_dtype=recipe.storage.precision,
        views={"flips": 4, "dihedral": 8}[views] if isinstance(views, str) else views,
    )
    if isinstance(views, str):
        options["symmetric"] = True
    return options


def tap_features(backbone: Backbone, recipe: Recipe, *, forked: bool) -> TapFeatures:
    """Return the feature sets of a backbone. Raises BackboneError.

    forked: if the cache does not know them and a network must be built, build it in a process
    forked from the workers' server, where that spares this process the import of PyTorch.
    """
    build: Callable[..., TapFeatures] = build_feature_specs
    # The workers' server imports PyTorch in any case, and this process need not.
    local_cpu = recipe.cluster.where == "local" and find_device(recipe.compute.device) == "cpu"
    own_network = backbone.name.startswith("python:")
    if forked and local_cpu and "torch" not in sys.modules and not own_network:
        imports = imports_of(backbone.name for backbone in recipe.backbones)
        build = functools.partial(call_forked, imports, build_feature_specs)
    return load_feature_specs(
        backbone_spec(backbone, recipe),
        backbone.taps,
        cache_root=recipe.cache,
        build=build,
        **storage_options(backbone, recipe),
    )


def cached_contents(cache_root: Path, spec: FeatureSpec) -> set[str]:
    """Return the content hashes that a feature set has, as rows or as recorded failures; none if
    there is no such feature set.
    """
    feature_path = feature_set_path(cache_root, spec)
    if not is_feature_set(feature_path):
        return set()
    return set(open_feature_set(feature_path).cached_hashes())


def failed_contents(cache_root: Path, specs: Iterable[FeatureSpec]) -> dict[str, str]:
    """Return {content hash: reason} of the images that some feature set has recorded as failed."""
    feature_paths = (feature_set_path(cache_root, spec) for spec in specs)
    return {
        failure.content_hash: failure.reason
        for feature_path in feature_paths
        if is_feature_set(feature_path)
        for failure in open_feature_set(feature_path).failures()
    }
