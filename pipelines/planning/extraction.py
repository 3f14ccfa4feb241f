"""Planning of an extraction without a task: which images of a source lack which feature sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console

from headrace.cache.count_text import count_text
from headrace.cache.publish import feature_set_path
from headrace.extract.images.content_hashes import UnreadableSample
from headrace.extract.run.plan import BackboneFeatures, ExtractJob, plan_work_units
from headrace.extract.sources.listing import Listing
from headrace.pipelines.planning.cost_model import measured_rates
from headrace.pipelines.planning.dataset import read_samples
from headrace.pipelines.planning.devices import find_device
from headrace.pipelines.planning.networks import cached_contents, failed_contents
from headrace.pipelines.planning.plan import Plan, feature_plan, plan_run
from headrace.pipelines.planning.recipe_inputs import (
    Networks,
    check_writable,
    head_inputs,
    read_contents,
    read_networks,
    remember_taps,
    require_libraries,
    weights_notes,
)
from headrace.pipelines.recipe.load import Recipe, RecipeError
from headrace.pipelines.recipe.targets import DataError


@dataclass(frozen=True)
class Extraction:
    """Images, networks, and the plan of what the cache lacks of their features."""

    recipe: Recipe  # its sections `task` and `heads` are not used
    listing: Listing
    samples: pd.DataFrame  # id, path, content (None where the file cannot be read)
    unreadable: tuple[UnreadableSample, ...]
    networks: Networks
    plan: Plan  # without heads

    @property
    def feature_paths(self) -> dict[str, tuple[Path, ...]]:
        """Directories of the feature sets, view by view, by name."""
        return {
            feature.name: tuple(feature_set_path(self.recipe.cache, spec) for spec in feature.specs)
            for feature in self.plan.features
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """Peculiarities of the images and networks, for the user."""
        return (
            *self.listing.notes,
            *(f"left out: {item}" for item in self.listing.left_out),
            *weights_notes(self.networks),
        )


def read_extraction(
    recipe: Recipe, *, write: bool = True, console: Console | None = None
) -> Extraction:
    """Read what the recipe's images and backbones name, and plan what is missing.

    write: off for a dry run, see `take_inventory`. console: shows how far the reading of many
    images is. Raises HeadraceError, before anything costly, for whatever cannot work.
    """
    require_libraries(recipe)
    if not recipe.backbones:
        raise RecipeError("there is no network to extract with: name one under `backbones`")
    check_writable(recipe)
    listing = read_samples(recipe, labelled=False)
    networks = read_networks(recipe, write=write)
    samples = listing.samples[["id", "path"]]
    contents, unreadable = read_contents(recipe, samples, write=write, console=console)
    samples = samples.assign(content=pd.Series(contents, index=samples.index, dtype=object))
    if write:
        remember_taps(recipe, networks)
    plan = plan_features(recipe, samples, networks)
    return Extraction(recipe, listing, samples, unreadable, networks, plan)


def plan_features(recipe: Recipe, samples: pd.DataFrame, networks: Networks) -> Plan:
    """Return the plan of the features that the cache lacks.

    samples: columns `id`, `path`, `content`. Raises DataError if every image has failed.
    """
    all_specs = [spec for _, features in networks for spec in features.specs]
    require_decodable(samples, failed_contents(recipe.cache, all_specs))
    units = missing_units(recipe, samples, networks)
    contents = set(samples["content"].dropna())
    feature_plans = [
        feature_plan(
            input_name,
            input_views.views,
            contents,
            [cached_contents(recipe.cache, spec) for spec in input_views.views],
        )
        for input_name, input_views in head_inputs(recipe, networks).items()
    ]
    return plan_run(
        features=feature_plans,
        units=units,
        images=len(contents),
        requested=(),
        task=None,
        rates=measured_rates(recipe.paths.logs),
        trained=lambda group: {},
    )


def missing_units(recipe: Recipe, samples: pd.DataFrame, networks: Networks) -> list[ExtractJob]:
    """Return the work units that extract what the cache lacks of these samples.

    samples: columns `id`, `path`, `content`.
    """
    return plan_work_units(
        samples,
        [
            BackboneFeatures(
                network,
                features.specs,
                [cached_contents(recipe.cache, spec) for spec in features.specs],
            )
            for network, features in networks
        ],
        cache_root=recipe.cache,
        images_per_shard=recipe.compute.images_per_shard,
        device=find_device(recipe.compute.device),
        batch_size=recipe.compute.batch_size,
        compile=recipe.compute.compile,
        cuda_graphs=recipe.compute.cuda_graphs,
        runtime=recipe.compute.runtime,
        compression=None if recipe.storage.compression == "none" else recipe.storage.compression,
        strict=recipe.compute.strict,
    )


def require_decodable(samples: pd.DataFrame, failed_reasons: Mapping[str, str]) -> None:
    """Raise DataError if every image has failed. failed_reasons: by content hash."""
    # With the reason of the first: mostly it is that of all.
    if len(samples) and samples["content"].isin(list(failed_reasons)).all():
        first_sample = samples.iloc[0]
        raise DataError(
            f"none of the {count_text(len(samples), 'image')} can be used; the first is "
            f"{first_sample['path']}: {failed_reasons[first_sample['content']]}"
        )
