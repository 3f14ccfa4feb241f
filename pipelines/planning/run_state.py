"""The state of a run: what it reads, what the cache and the run's directory hold, and the plan of
what is missing. Each stage returns a newer state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from rich.console import Console

from headrace.cache.count_text import count_text
from headrace.cache.format.sealed import SealBroken
from headrace.cache.publish import feature_set_path
from headrace.extract.images.changes import compare_listings, read_listing, write_listing
from headrace.extract.images.content_hashes import UnreadableSample
from headrace.extract.sources.listing import Listing
from headrace.heads.data.side_columns import save_side_columns, taps_of
from headrace.heads.data.task import save_task
from headrace.pipelines.feature_input import FeatureInput
from headrace.pipelines.finetune.stage import FinetuneOutcome
from headrace.pipelines.models.reference import ModelAverage, ModelRef, model_ref
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.planning.accounting import Accounting, count_entries
from headrace.pipelines.planning.cost_model import measured_rates
from headrace.pipelines.planning.dataset import (
    Dataset,
    check_metric,
    drop_rows,
    make_dataset,
    read_samples,
)
from headrace.pipelines.planning.devices import find_heads_device
from headrace.pipelines.planning.extraction import missing_units, require_decodable
from headrace.pipelines.planning.leaderboard import Winner, trained_specs
from headrace.pipelines.planning.networks import cached_contents, failed_contents
from headrace.pipelines.planning.plan import Plan, feature_plan, plan_run
from headrace.pipelines.planning.recipe_inputs import (
    InputViews,
    Networks,
    check_writable,
    head_inputs,
    read_contents,
    read_networks,
    remember_taps,
    require_libraries,
    weights_notes,
)
from headrace.pipelines.recipe.grid import (
    RequestedHeads,
    check_kinds,
    requested_heads,
    side_columns_note,
)
from headrace.pipelines.recipe.load import Recipe, RecipeError
from headrace.pipelines.records import write_record
from headrace.pipelines.selection.correction import CorrectedScore
from headrace.pipelines.selection.ensemble import Ensemble
from headrace.pipelines.selection.evaluation_record import TestResult
from headrace.pipelines.selection.halving import InputHalving


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


@dataclass(frozen=True)
class RankedModels:
    """The trained heads and networks, ranked, and the one that is selected."""

    heads: pd.DataFrame  # one row per head (spec x fold); see select.collect_heads
    board: pd.DataFrame  # one row per (inputs, spec), best first; see select.rank_heads
    winner: Winner  # the first row of the board
    selection: CorrectedScore | None  # the winner's corrected score, and the settings tied with it
    ensemble: Ensemble | None  # if the recipe asks for one
    model: ModelAverage  # the selected model: the ensemble if it is `chosen`, else the winner


@dataclass(frozen=True)
class RunState:
    """A run before a stage: its inputs, and the results of earlier stages."""

    recipe: Recipe
    # id, path, content (None where the file cannot be read), and the user's columns
    samples: pd.DataFrame
    unreadable: tuple[UnreadableSample, ...]
    dataset: Dataset  # of the rows that every input has
    notes: tuple[str, ...]  # peculiarities of the images and networks, for the user
    accounting: Accounting | None  # None for samples given from Python
    metric: str
    feature_inputs: Mapping[str, FeatureInput]  # by their names on the leaderboard
    plan: Plan
    inventory: Inventory | None = None  # None for feature sets given from Python
    failed_images: int = 0
    input_halving: InputHalving | None = None
    finetuned: FinetuneOutcome | None = None
    selected: RankedModels | None = None
    test: TestResult | None = None

    @property
    def feature_paths(self) -> dict[str, tuple[Path, ...]]:
        """Directories of the feature sets, view by view, by name."""
        return {name: feature_input.views for name, feature_input in self.feature_inputs.items()}

    @property
    def paths(self) -> RunPaths:
        """The files of the run."""
        return self.recipe.paths

    def model_of(self, row: pd.Series) -> ModelRef:
        """Return the model of a row of the leaderboard."""
        return model_ref(row, self.paths, self.feature_inputs)


def read_run_state(
    recipe: Recipe,
    *,
    write: bool = True,
    retry_failed: bool = False,
    console: Console | None = None,
) -> RunState:
    """Read what the recipe names and what exists of its results, and plan the rest.

    write: off for a dry run, see `take_inventory`. retry_failed: plan heads that failed again.
    console: shows the progress of reading many images. Raises HeadraceError, before anything
    costly, for whatever cannot work.
    """
    inventory = take_inventory(recipe, write=write, console=console)
    state = state_of(inventory, retry_failed=retry_failed)
    if write:
        remember_taps(recipe, inventory.networks)
    return state


def take_inventory(
    recipe: Recipe, *, write: bool = True, console: Console | None = None
) -> Inventory:
    """Read what the recipe names.

    write: off for a dry run, which makes no file but an index of content hashes, and that only in
    a cache that exists.
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


def state_of(inventory: Inventory, *, retry_failed: bool) -> RunState:
    """Return the run state from what the cache and the run's directory hold now.

    Raises DataError if no image is left.
    """
    recipe, all_rows = inventory.recipe, inventory.dataset
    needed_samples = inventory.needed_images()
    units = missing_units(recipe, needed_samples, inventory.networks)
    # All heads are compared on the rows that all inputs have. If a failed image is repaired, the
    # rows are others, and so are the task's digest and the names of its banks.
    network_specs = [spec for _, features in inventory.networks for spec in features.specs]
    failed_reasons = failed_contents(recipe.cache, network_specs)
    require_decodable(needed_samples, failed_reasons)
    dataset = drop_rows(all_rows, failed_reasons)
    needed_contents = set(needed_samples["content"])
    feature_plans = [
        feature_plan(
            input_name,
            input_views.views,
            # External features cannot be extracted, and images without a label may lack them.
            needed_contents if input_views.backbone else inventory.labelled_contents,
            [cached_contents(recipe.cache, spec) for spec in input_views.views],
        )
        for input_name, input_views in inventory.inputs.items()
    ]
    plan = plan_run(
        features=feature_plans,
        units=units,
        images=len(needed_contents),
        requested=inventory.requested,
        task=dataset.train,
        rates=measured_rates(recipe.paths.logs),
        trained=lambda group: trained_specs(recipe.paths.banks, group, retry_failed=retry_failed),
    )
    accounting = count_entries(inventory.listing, len(inventory.unreadable), all_rows, dataset)
    return RunState(
        recipe=recipe,
        samples=inventory.samples,
        unreadable=inventory.unreadable,
        dataset=dataset,
        notes=(
            *inventory.changes,
            *inventory.listing.notes,
            *(f"left out: {item}" for item in inventory.listing.left_out),
            *dataset.notes,
            *weights_notes(inventory.networks),
            *(side_columns_note(recipe.heads) if recipe.task.side_columns else ()),
        ),
        accounting=accounting,
        metric=inventory.metric,
        feature_inputs={
            input_name: FeatureInput(
                input_name,
                tuple(feature_set_path(recipe.cache, spec) for spec in input_views.views),
                input_views.backbone,
            )
            for input_name, input_views in inventory.inputs.items()
        },
        plan=plan,
        inventory=inventory,
    )


def replan_heads(state: RunState, *, retry_failed: bool) -> RunState:
    """Return the state with banks planned anew by what has been trained and measured since."""
    plan, paths = state.plan, state.paths
    replanned = plan_run(
        features=plan.features,
        units=plan.units,
        images=plan.images,
        requested=plan.requested,
        task=state.dataset.train,
        rates=measured_rates(paths.logs),
        trained=lambda group: trained_specs(paths.banks, group, retry_failed=retry_failed),
    )
    return replace(state, plan=replanned)


def write_inputs(state: RunState) -> None:
    """Write what workers read before they train, and what the next call compares itself with."""
    paths, task = state.paths, state.dataset.train
    task_path = paths.task(task.digest)
    task_path.parent.mkdir(parents=True, exist_ok=True)
    paths.banks.mkdir(parents=True, exist_ok=True)
    # Banks read this file, which has no test row.
    save_task(task, task_path, groups=state.dataset.groups)
    if task.side is not None:
        save_side_columns(task.side, paths.side_columns(task.side.fingerprint))
    # With it the next call finds images that are new, changed, renamed or removed.
    write_listing(paths.listing, content_listing(state.samples))
    if state.accounting is not None:
        write_record(paths.accounting, asdict(state.accounting))


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


def content_listing(samples: pd.DataFrame) -> dict[str, str]:
    """Return {id: content hash} of the images that can be read."""
    readable = samples[samples["content"].notna()]
    return dict(zip(readable["id"].astype(str), readable["content"].astype(str), strict=True))
