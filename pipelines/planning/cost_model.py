"""The cost of work: assumed at first, measured as soon as the run has done work of its kind.

The assumptions are for one core of 2020s hardware (docs/scale.md says where they were measured). N
rows, D features, C outputs. A run that is large by these assumptions begins with a small bank of
each kind of head, and is then planned by the time that those took.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from headrace.extract.run.plan import ExtractJob
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.spec import HeadSpec
from headrace.pipelines.cluster.task_log import read_log

# Seconds of a bank. Tasks of 5 to 60 s are long beside the milliseconds between them, and short
# enough to lose when a worker dies.
TARGET_S = 30.0
# A run of more core-seconds than this in kinds never measured begins with a probe of each: a bank
# of PROBE_SPECS specs.
PROBE_S = 600.0
PROBE_SPECS = 2
MAX_BANK_SPECS = 64  # columns enough for matrix products to be efficient
_IMAGE_S = {"cpu": 0.03, "cuda": 0.0005}  # seconds per image and network, at 224 pixels
_BANK_S = 0.08  # seconds to read the task and publish results


BankSizes = tuple[int, int, int, int]  # of a bank: rows, features, outputs and folds


@dataclass(frozen=True)
class Rates:
    """The rates measured in a run; nothing at first."""

    image_s: float | None = None  # a worker's seconds per image, for all networks of a work unit
    # measured seconds divided by assumed ones, by kind of head
    cost_ratios: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """The time that a plan will take, in seconds of one core and of one GPU."""

    core_s: float
    gpu_s: float
    measured: bool  # whether all of it rests on rates measured in this run


def measured_rates(log_folder: Path) -> Rates:
    """Return the rates that the logs of a run's earlier calls show."""
    n_images = image_s = 0.0
    assumed_s: defaultdict[str, float] = defaultdict(float)
    measured_s: defaultdict[str, float] = defaultdict(float)
    for log_path in sorted(log_folder.glob("*.jsonl")) if log_folder.is_dir() else ():
        for event in read_log(log_path):
            result = event.get("result")
            if event["event"] == "finished" and isinstance(result, dict) and "decode_s" in result:
                unit_s = result["decode_s"] + result["forward_s"] + result["publish_s"]
                # A work unit that another driver had published took no time.
                n_images += result["rows"] if unit_s else 0
                image_s += unit_s
            elif event["event"] == "cost":
                assumed_s[event["kind"]] += event["assumed_s"]
                measured_s[event["kind"]] += event["seconds"]
    return Rates(
        image_s / n_images if n_images else None,
        {kind: measured_s[kind] / assumed_s[kind] for kind in assumed_s},
    )


def bank_seconds(specs: Sequence[HeadSpec], sizes: BankSizes, rates: Rates) -> float:
    """Return a bank's core-seconds: a fit of each spec per fold, and one on all rows."""
    shared_s, spec_s = _cost(specs[0], sizes)
    return (_BANK_S + shared_s + len(specs) * spec_s) * rates.cost_ratios.get(specs[0].kind, 1.0)


def _cost(spec: HeadSpec, sizes: BankSizes) -> tuple[float, float]:
    """Return the assumed core-seconds that all specs of a bank share, and those that each adds."""
    n_rows, n_features, n_outputs, n_folds = sizes
    return HEAD_KINDS[spec.kind].cost(spec, n_rows, n_features, n_outputs, n_folds + 1)


def specs_per_bank(specs: Sequence[HeadSpec], sizes: BankSizes, rates: Rates) -> int:
    """Return how many specs make a bank of about TARGET_S, or of twice what they share."""
    shared_s, spec_s = _cost(specs[0], sizes)
    # A power of two, so that small changes of the rates leave the banks as they are, and their
    # results are found again.
    n_specs = MAX_BANK_SPECS
    while (
        n_specs > 1
        and bank_seconds(list(specs[:1]) * n_specs, sizes, rates) > TARGET_S
        # Each bank repeats what its specs share: smaller ones would do little else.
        and n_specs * spec_s > shared_s
    ):
        n_specs //= 2
    return n_specs


def unit_seconds(units: Sequence[ExtractJob], rates: Rates) -> float:
    """Return the device seconds of work units; the cost of an image grows with its pixels."""
    total_s = 0.0
    for job in units:
        sides = (_crop_side(spec.preprocessing) for _, specs in job.networks for spec in specs)
        relative_side = max([224, *sides]) / 224
        image_s = _IMAGE_S["cpu" if job.device == "cpu" else "cuda"]
        assumed_s = image_s * len(job.networks) * relative_side**2
        total_s += len(job.samples) * (rates.image_s or assumed_s)
    return total_s


def _crop_side(preprocessing: str) -> int:
    crop = json.loads(preprocessing).get("crop", 224)
    return int(prod(crop) ** 0.5) if isinstance(crop, list) else int(crop)
