"""The plan of a run: `--dry-run` prints it, `run` carries it out, resuming is planning again."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set as AbstractSet
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from headrace.cache.disk_space import plan_taps, require_disk_space, stored_bytes
from headrace.cache.errors import CacheError
from headrace.cache.spec import FeatureSpec
from headrace.extract.run.plan import ExtractJob
from headrace.heads.data.side_columns import SIDE_COLUMNS, taps_of
from headrace.heads.data.task import Task
from headrace.heads.spec import Halving, HeadSpec, spec_to_json
from headrace.pipelines.planning.cost_model import (
    MAX_BANK_SPECS,
    BankSizes,
    Estimate,
    Rates,
    bank_seconds,
    specs_per_bank,
    unit_seconds,
)
from headrace.pipelines.recipe.grid import RequestedHeads

# The specs in each results file of a bank group (one task, features and kind), by its path.
SpecsByFile = Mapping[str, frozenset[HeadSpec]]
# Part of every bank's name. To be raised when training changes so that a spec gives another head.
SOLVER_VERSION = 1

_UNMEASURED = Rates()


@dataclass(frozen=True)
class FeaturePlan:
    """One input of heads, a tap of a backbone in all its views, and how much of it is cached."""

    # on the leaderboard: "blocks.4.avg", after the backbone's alias if there are several backbones
    name: str
    specs: tuple[FeatureSpec, ...]  # one feature set per view
    rows_cached: int  # images of this run that have every view, or a recorded failure, already
    rows_total: int
    rows_missing: int  # summed over the views

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's row."""
        return self.specs[0].shape

    @property
    def bytes_new(self) -> int:
        """Bytes on disk of the missing rows, with their ids and headers."""
        return stored_bytes(self.specs[0], self.rows_missing)


def feature_plan(
    input_name: str,
    specs: Sequence[FeatureSpec],
    run_contents: AbstractSet[str],
    cached: Sequence[Collection[str]],
) -> FeaturePlan:
    """Return how much of an input the cache holds.

    specs: of its views. run_contents: content hashes of the run's images. cached: those that each
    view has.
    """
    cached_images = [frozenset(run_contents).intersection(contents) for contents in cached]
    in_every_view = frozenset(run_contents).intersection(*cached_images)
    rows_missing = sum(len(run_contents) - len(contents) for contents in cached_images)
    return FeaturePlan(
        input_name, tuple(specs), len(in_every_view), len(run_contents), rows_missing
    )


@dataclass(frozen=True)
class BankPlan:
    """Heads of one kind to train on the same features in one pass."""

    inputs: tuple[str, ...]  # names of the feature sets, side by side
    group: str  # from `bank_group`: the first half of the results file's name
    specs: tuple[HeadSpec, ...]
    halving: Halving | None = None
    assumed_s: float = 0.0  # core-seconds by the unmeasured cost model; not part of the name
    # Specs that failed are trained again under the next number, because the results file of the
    # failure stays.
    attempt: int = 0

    @property
    def kind(self) -> str:
        return self.specs[0].kind

    @property
    def key(self) -> str:
        """The second half of the results file's name: a hash of the specs in it."""
        return _hash(str(self.attempt), *(spec_to_json(spec) for spec in self.specs))


@dataclass(frozen=True)
class Plan:
    """All work to be done, and how much is done already."""

    features: tuple[FeaturePlan, ...]
    units: tuple[ExtractJob, ...]
    images: int  # readable images of the run
    images_new: int  # of which these go through a network
    requested: tuple[RequestedHeads, ...]
    banks: tuple[BankPlan, ...]
    n_folds: int
    estimate: Estimate
    unmeasured: frozenset[str]  # kinds of heads to train whose cost is only assumed
    fingerprints: Mapping[str, Sequence[str]]  # of the feature sets, view by view, by input
    input_widths: Mapping[str, int]  # numbers per image in one view, by input

    @property
    def forward_device(self) -> str:
        """The device of the forward pass; "cpu" if nothing is to be extracted."""
        return self.units[0].device if self.units else "cpu"

    @property
    def heads_total(self) -> int:
        """How many heads are requested: specs × folds."""
        return self.n_folds * sum(len(heads.specs) for heads in self.requested)

    @property
    def heads_new(self) -> int:
        """How many of these are to be trained."""
        return self.n_folds * sum(len(bank.specs) for bank in self.banks)


def bank_group(
    task_digest: str, requested: RequestedHeads, fingerprints: Mapping[str, Sequence[str]]
) -> str:
    """Return a hash of what the heads of a bank share: a group and a spec together identify a head.

    fingerprints: of each input's feature sets, view by view.
    """
    view_fingerprints = [
        fingerprint for input_name in requested.inputs for fingerprint in fingerprints[input_name]
    ]
    # The settings that survive halving depend on all that took part, so all are in the hash.
    competitors = repr(requested.halving) + "".join(
        spec_to_json(spec) for spec in requested.specs if requested.halving
    )
    return _hash(
        str(SOLVER_VERSION), task_digest, requested.specs[0].kind, competitors, *view_fingerprints
    )


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def plan_run(
    *,
    features: Sequence[FeaturePlan],
    units: Sequence[ExtractJob],
    images: int,
    requested: Sequence[RequestedHeads],
    task: Task | None,
    trained: Callable[[str], SpecsByFile],
    rates: Rates = _UNMEASURED,
) -> Plan:
    """Return the plan of what is requested and missing. It is pure, except that `trained` reads.

    images: see `Plan`. task: of the training rows; None if no heads are requested.
    trained: returns the specs in each results file of a group.
    rates: measured costs, which decide how large banks are.
    """
    fingerprints = {
        feature.name: [spec.fingerprint for spec in feature.specs] for feature in features
    }
    input_widths = {feature.name: prod(feature.shape) for feature in features}
    if task is not None and task.side is not None:
        fingerprints[SIDE_COLUMNS] = [task.side.fingerprint]
        input_widths[SIDE_COLUMNS] = task.side.n_inputs

    def sizes(inputs: Sequence[str]) -> BankSizes:
        assert task is not None
        # A classifier of two classes is assumed to cost as much as one of two outputs.
        n_outputs = max(2, len(task.classes))
        n_features = sum(len(fingerprints[name]) * input_widths[name] for name in inputs)
        return len(task.ids), n_features, n_outputs, task.n_folds

    def bank_size(heads: RequestedHeads) -> int:
        return specs_per_bank(heads.specs, sizes(heads.inputs), rates)

    banks = tuple(
        replace(bank, assumed_s=bank_seconds(bank.specs, sizes(bank.inputs), _UNMEASURED))
        for bank in _missing_banks(
            requested, fingerprints, "" if task is None else task.digest, trained, bank_size
        )
    )
    heads_s = sum(bank_seconds(bank.specs, sizes(bank.inputs), rates) for bank in banks)
    extraction_s = unit_seconds(units, rates)
    on_gpu = bool(units) and units[0].device != "cpu"
    kinds = {bank.kind for bank in banks}
    return Plan(
        estimate=Estimate(
            core_s=heads_s + (0.0 if on_gpu else extraction_s),
            gpu_s=extraction_s if on_gpu else 0.0,
            measured=kinds <= rates.cost_ratios.keys() and (not units or rates.image_s is not None),
        ),
        unmeasured=frozenset(kinds - rates.cost_ratios.keys()),
        fingerprints=fingerprints,
        input_widths=input_widths,
        features=tuple(features),
        units=tuple(units),
        images=images,
        # An image in several units, each of another network, counts once.
        images_new=len({content for job in units for content in job.contents}),
        requested=tuple(requested),
        banks=banks,
        n_folds=0 if task is None else task.n_folds,
    )


def keep_inputs(plan: Plan, kept_inputs: Collection[tuple[str, ...]]) -> Plan:
    """Return the plan with only the heads on these taps, with or without side columns."""
    requested = tuple(heads for heads in plan.requested if taps_of(heads.inputs) in kept_inputs)
    banks = tuple(bank for bank in plan.banks if taps_of(bank.inputs) in kept_inputs)
    return replace(plan, requested=requested, banks=banks)


def check_space(plan: Plan, cache_root: Path, budget_gb: float | None) -> None:
    """Raise CacheError if the missing features exceed the budget (GB) or the disk's free space,
    naming what fits and what does not.
    """
    budget_bytes = None if budget_gb is None else int(budget_gb * 1e9)
    missing_features = [feature for feature in plan.features if feature.rows_missing]
    tap_costs = plan_taps(
        [(feature.specs[0], feature.rows_missing) for feature in missing_features], budget_bytes
    )
    named_costs = zip([feature.name for feature in missing_features], tap_costs, strict=True)
    cost_of_name = dict(named_costs)
    fitting_names = [name for name, cost in cost_of_name.items() if cost.fits_budget]
    refused_taps = [
        f"{name} ({cost.n_bytes / 1e9:.3f} GB)"
        for name, cost in cost_of_name.items()
        if not cost.fits_budget
    ]
    if refused_taps:
        raise CacheError(
            f"storage.budget_gb is {budget_gb:g}: in the recipe's order, "
            f"{', '.join(fitting_names) or 'no tap'} fits, and {', '.join(refused_taps)} does not. "
            "Leave it out, reduce it (avg instead of map), or raise the budget. Nothing was "
            "extracted"
        )
    require_disk_space(cache_root, tap_costs)


def _missing_banks(
    requested: Sequence[RequestedHeads],
    fingerprints: Mapping[str, Sequence[str]],
    task_digest: str,
    trained: Callable[[str], SpecsByFile],
    bank_size: Callable[[RequestedHeads], int],
) -> Iterator[BankPlan]:
    """Yield the banks of specs that have not been trained.

    bank_size: returns how many specs make a bank.
    """
    trained_by_group: dict[str, SpecsByFile] = {}
    # Sorted, so that workers read one feature set after the other.
    for heads in sorted(requested, key=lambda heads: heads.inputs):
        group = bank_group(task_digest, heads, fingerprints)
        if group not in trained_by_group:
            trained_by_group[group] = trained(group)
        result_files = trained_by_group[group]
        file_stems = {Path(file).stem for file in result_files}
        trained_specs = frozenset[HeadSpec]().union(*result_files.values())
        # Specs are cut into banks before the trained ones are dropped, so that another driver or a
        # later call makes the same banks.
        n_specs = MAX_BANK_SPECS if heads.halving else bank_size(heads)
        for start in range(0, len(heads.specs), n_specs):
            bank_specs = heads.specs[start : start + n_specs]
            missing = tuple(spec for spec in bank_specs if spec not in trained_specs)
            if missing:
                bank = BankPlan(heads.inputs, group, missing, heads.halving)
                while f"{bank.group}-{bank.key}" in file_stems:
                    bank = replace(bank, attempt=bank.attempt + 1)
                yield bank
