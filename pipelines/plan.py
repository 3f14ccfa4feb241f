"""What a run has to do, computed and not done: `--dry-run` prints it, `run` does it, resuming is planning again."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from headrace.cache import FeatureSpec
from headrace.extract import ExtractJob
from headrace.heads import HeadSpec, spec_to_json
from headrace.pipelines.grid import Wanted

# The published heads of one (task, features, kind): the specs in each of its results files.
Trained = Mapping[str, frozenset[HeadSpec]]
# Part of every bank's name: bump when a change to training changes what the same spec gives.
SOLVER_VERSION = 1
# Heads in one bank: enough columns for wide products, few enough that a death loses little.
MAX_BANK_SPECS = 64


@dataclass(frozen=True)
class FeaturePlan:
    """One feature set of the run: what it is called, and how much of it is there."""

    name: (
        str  # as the leaderboard writes it: "blocks.4.avg", with the backbone's alias before it when there are several
    )
    spec: FeatureSpec
    rows_known: int  # images of this run that have a row, or a recorded failure, already
    rows_total: int

    @property
    def bytes_new(self) -> int:
        item = {"float32": 4, "uint8": 1}.get(self.spec.dtype, 2)
        return (self.rows_total - self.rows_known) * prod(self.spec.shape) * item


@dataclass(frozen=True)
class BankPlan:
    """Heads of one kind to train on the same features in one pass."""

    inputs: tuple[str, ...]  # names of the feature sets, side by side
    group: str  # names (task, features, kind): the first half of the results file's name
    specs: tuple[HeadSpec, ...]

    @property
    def kind(self) -> str:
        return self.specs[0].kind

    @property
    def key(self) -> str:
        """The second half of the results file's name: a hash of the specs in it."""
        return _hash(*(spec_to_json(spec) for spec in self.specs))


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


def bank_group(task_digest: str, fingerprints: Sequence[str], kind: str) -> str:
    """Names what the heads of a bank share. Heads of equal spec in equal groups are the same heads."""
    return _hash(str(SOLVER_VERSION), task_digest, kind, *fingerprints)


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
) -> Plan:
    """The plan, from what there is.

    `trained` maps a group to the specs in each of its published results files. Pure but for it.
    """
    fingerprint = {feature.name: feature.spec.fingerprint for feature in features}
    banks = list(_missing_banks(wanted, fingerprint, task_digest, trained))
    return Plan(
        features=tuple(features),
        units=tuple(units),
        images=images,
        images_new=images_new,
        wanted=tuple(wanted),
        banks=tuple(banks),
        heads_total=folds * sum(len(specs) for _, specs in wanted),
        heads_new=folds * sum(len(bank.specs) for bank in banks),
        folds=folds,
    )


def _missing_banks(
    wanted: Sequence[Wanted], fingerprint: Mapping[str, str], task_digest: str, trained: Callable[[str], Trained]
) -> Iterator[BankPlan]:
    for inputs, specs in wanted:
        group = bank_group(task_digest, [fingerprint[name] for name in inputs], specs[0].kind)
        there = frozenset[HeadSpec]().union(*trained(group).values())
        missing = [spec for spec in specs if spec not in there]
        for start in range(0, len(missing), MAX_BANK_SPECS):
            yield BankPlan(inputs, group, tuple(missing[start : start + MAX_BANK_SPECS]))
