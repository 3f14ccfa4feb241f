"""What a run has to do, computed and not done:

`--dry-run` prints it, `run` does it, resuming is planning again.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from headrace.cache.errors import CacheError
from headrace.cache.planner import plan_taps, require_disk_space, stored_bytes
from headrace.cache.spec import FeatureSpec
from headrace.extract.run.plan import ExtractJob
from headrace.heads.spec import Halving, HeadSpec, spec_to_json
from headrace.pipelines.planning.cost_model import (
    MAX_BANK_SPECS,
    Estimate,
    Rates,
    bank_s,
    specs_per_bank,
    units_s,
)
from headrace.pipelines.recipe.grid import Wanted

# The published heads of one (task, features, kind): the specs in each of its results files.
Trained = Mapping[str, frozenset[HeadSpec]]
# Part of every bank's name: bump when a change to training changes what the same spec gives.
SOLVER_VERSION = 1

_UNMEASURED = Rates()


@dataclass(frozen=True)
class FeaturePlan:
    """One input that heads can be given: a tap of a backbone, in all its views."""

    # As the leaderboard writes it: "blocks.4.avg", with the backbone's alias before it when there
    # are several.
    name: str
    specs: tuple[FeatureSpec, ...]  # one feature set per view
    rows_known: int  # images of this run that have every view, or a recorded failure, already
    rows_total: int
    rows_missing: int  # summed over the views

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's row."""
        return self.specs[0].shape

    @property
    def bytes_new(self) -> int:
        """On disk, ids and headers counted."""
        return stored_bytes(self.specs[0], self.rows_missing)


def feature_plan(
    name: str,
    specs: Sequence[FeatureSpec],
    images: AbstractSet[str],
    known: Sequence[Collection[str]],
) -> FeaturePlan:
    """How much of these views of a tap is there, given the content hashes that each view has."""
    there = [frozenset(images).intersection(contents) for contents in known]
    everywhere = frozenset(images).intersection(*there)
    missing = sum(len(images) - len(contents) for contents in there)
    return FeaturePlan(name, tuple(specs), len(everywhere), len(images), missing)


@dataclass(frozen=True)
class BankPlan:
    """Heads of one kind to train on the same features in one pass."""

    inputs: tuple[str, ...]  # names of the feature sets, side by side
    group: str  # names (task, features, kind): the first half of the results file's name
    specs: tuple[HeadSpec, ...]
    halving: Halving | None = None
    # core-seconds, as assumed before anything was measured; no part of what the bank is
    assumed_s: float = 0.0
    # of these very specs: those that failed are trained again, beside the results that say so
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
    """Everything that is to be done, and how much is there."""

    features: tuple[FeaturePlan, ...]
    units: tuple[ExtractJob, ...]
    images: int  # readable images of the run
    images_new: int  # of which these go through a network
    wanted: tuple[Wanted, ...]
    banks: tuple[BankPlan, ...]
    heads_total: int  # specs × folds
    heads_new: int
    folds: int
    estimate: Estimate
    unmeasured: frozenset[str]  # kinds of heads to train whose cost is only assumed


def bank_group(task_digest: str, wanted: Wanted, fingerprints: Mapping[str, Sequence[str]]) -> str:
    """Names what the heads of a bank share. Heads of equal spec in equal groups are the same heads.

    `fingerprints` are those of each input's feature sets, view by view.
    """
    inputs = [fingerprint for name in wanted.inputs for fingerprint in fingerprints[name]]
    # Who survives halving depends on everyone that took part.
    rivals = repr(wanted.halving) + "".join(
        spec_to_json(spec) for spec in wanted.specs if wanted.halving
    )
    return _hash(str(SOLVER_VERSION), task_digest, wanted.specs[0].kind, rivals, *inputs)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def plan_run(
    *,
    features: Sequence[FeaturePlan],
    units: Sequence[ExtractJob],
    images: int,
    images_new: int,
    wanted: Sequence[Wanted],
    task_digest: str,
    folds: int,
    trained: Callable[[str], Trained],
    rows: int,
    outputs: int,
    rates: Rates = _UNMEASURED,
) -> Plan:
    """The plan, from what there is.

    `trained` maps a group to the specs in each of its published results files. rows, outputs: of
    the task. rates: what has been measured, which decides how large banks are. Pure but for
    `trained`.
    """
    widths = {feature.name: len(feature.specs) * prod(feature.shape) for feature in features}

    def width(inputs: Sequence[str]) -> int:
        return sum(widths[name] for name in inputs)

    def size(each: Wanted) -> int:
        return specs_per_bank(each.specs, rows, width(each.inputs), outputs, folds, rates)

    banks = list(_missing_banks(wanted, fingerprints_of(features), task_digest, trained, size))
    banks = [
        replace(
            bank,
            assumed_s=bank_s(bank.specs, rows, width(bank.inputs), outputs, folds, _UNMEASURED),
        )
        for bank in banks
    ]
    heads_s = [
        bank_s(bank.specs, rows, width(bank.inputs), outputs, folds, rates) for bank in banks
    ]
    extraction_s = units_s(units, rates)
    on_gpu = bool(units) and units[0].device != "cpu"
    kinds = {bank.kind for bank in banks}
    return Plan(
        estimate=Estimate(
            core_s=sum(heads_s) + (0.0 if on_gpu else extraction_s),
            gpu_s=extraction_s if on_gpu else 0.0,
            measured=kinds <= rates.kinds.keys() and (not units or rates.image_s is not None),
        ),
        unmeasured=frozenset(kinds - rates.kinds.keys()),
        features=tuple(features),
        units=tuple(units),
        images=images,
        images_new=images_new,
        wanted=tuple(wanted),
        banks=tuple(banks),
        heads_total=folds * sum(len(each.specs) for each in wanted),
        heads_new=folds * sum(len(bank.specs) for bank in banks),
        folds=folds,
    )


def check_space(plan: Plan, cache_root: Path, budget_gb: float | None) -> None:
    """Raises CacheError, naming what fits and what does not, before anything is extracted."""
    budget = None if budget_gb is None else int(budget_gb * 1e9)
    missing = [feature for feature in plan.features if feature.rows_missing]
    costs = plan_taps([(feature.specs[0], feature.rows_missing) for feature in missing], budget)
    fitting = [feature.name for feature, cost in zip(missing, costs, strict=True) if cost.fits]
    refused = [
        f"{feature.name} ({cost.bytes / 1e9:.3f} GB)"
        for feature, cost in zip(missing, costs, strict=True)
        if not cost.fits
    ]
    if refused:
        raise CacheError(
            f"storage.budget_gb is {budget_gb:g}: in the recipe's order, "
            f"{', '.join(fitting) or 'no tap'} fits, and {', '.join(refused)} does not. Leave it "
            "out, reduce it (avg instead of map), or raise the budget. Nothing was extracted"
        )
    require_disk_space(cache_root, costs)


def fingerprints_of(features: Sequence[FeaturePlan]) -> dict[str, list[str]]:
    """The fingerprints of each input's feature sets, view by view."""
    return {feature.name: [spec.fingerprint for spec in feature.specs] for feature in features}


def _missing_banks(
    wanted: Sequence[Wanted],
    fingerprints: Mapping[str, Sequence[str]],
    task_digest: str,
    trained: Callable[[str], Trained],
    size: Callable[[Wanted], int],
) -> Iterator[BankPlan]:
    """Banks in the order of their inputs, so that workers read one feature set after the other."""
    known: dict[str, Trained] = {}
    for each in sorted(wanted, key=lambda each: each.inputs):
        group = bank_group(task_digest, each, fingerprints)
        if group not in known:
            known[group] = trained(group)
        files = known[group]
        names = {Path(file).stem for file in files}
        there = frozenset[HeadSpec]().union(*files.values())
        # Cut before what is there is left out: another driver, or a later call, then makes the same
        # banks.
        count = MAX_BANK_SPECS if each.halving else size(each)
        for start in range(0, len(each.specs), count):
            missing = tuple(spec for spec in each.specs[start : start + count] if spec not in there)
            if missing:
                bank = BankPlan(each.inputs, group, missing, each.halving)
                while f"{bank.group}-{bank.key}" in names:
                    bank = replace(bank, attempt=bank.attempt + 1)
                yield bank
