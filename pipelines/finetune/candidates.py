"""Candidates of fine-tuning: networks that start from the best heads, partial reuse, training from
scratch; and the gain and time to expect of each.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.extract.spec import BackboneSpec
from headrace.heads.data.side_columns import SIDE_COLUMNS
from headrace.heads.evaluate.metrics import METRICS
from headrace.heads.kinds import HEAD_KINDS, spec_from_json
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.spec import HeadSpec, spec_to_json
from headrace.pipelines.feature_input import FeatureInput
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec
from headrace.pipelines.recipe.load import RecipeError
from headrace.pipelines.recipe.sections import FinetuneSection

# The share of its head's errors that a candidate is expected to remove, by its start: a prior,
# updated by each finished candidate.
PRIOR = {"head": 0.15, "pretrained": 0.10, "random": 0.05, "scratch": 0.0}
PRIOR_WEIGHT = 2.0  # the prior counts as this many finished candidates
DIFFERENTIABLE = tuple(kind.name for kind in HEAD_KINDS.values() if kind.differentiable)


@dataclass(frozen=True)
class Candidate:
    """A network that could be trained, and the leaderboard's row that it has to beat."""

    label: str  # "fine-tuned", "partial reuse" or "from scratch"
    inputs: tuple[str, ...]  # names of the taps that its head reads
    spec: FineTuneSpec
    backbone: BackboneSpec
    features: tuple[Path, ...]  # feature sets of `inputs`, view by view
    split_maps: tuple[Path, ...]  # cached maps to train from, view by view; (): from the images
    # the leaderboard's row to beat: of the head that it starts from, or of the best head
    head: pd.Series

    @property
    def start(self) -> str:
        """The key of its prior in PRIOR."""
        return "scratch" if self.label == "from scratch" else self.spec.start

    @property
    def key(self) -> str:
        """The name of its training and its files, from `training_key`."""
        files = (*self.features, *self.split_maps, Path(self.head["path"]))
        return training_key(self.spec, self.backbone, files)


def training_key(spec: FineTuneSpec, backbone: BackboneSpec, files: Iterable[Path]) -> str:
    """Return 16 hex digits of a hash of everything that a training depends on: settings, network,
    and the names of its input files, which contain digests of their contents.
    """
    names = [path.name for path in files]
    fields = dataclasses.asdict(backbone)
    # Added later: networks that were trained before keep their names.
    if fields["resize_mode"] is None:
        del fields["resize_mode"]
    backbone_json = json.dumps(fields, sort_keys=True)
    text = "\0".join([*names, backbone_json, spec_to_json(spec)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_differentiable(spec: HeadSpec) -> None:
    """Raise ModelError for a head that is not differentiable."""
    if spec.kind not in DIFFERENTIABLE:
        raise ModelError(
            f"a {spec.kind} head is no function that gradients pass through: fine-tune a head of "
            f"kind {', '.join(DIFFERENTIABLE)}"
        )


def list_candidates(
    board: pd.DataFrame, section: FinetuneSection, feature_inputs: Mapping[str, FeatureInput]
) -> tuple[list[Candidate], list[str]]:
    """Return every network that the recipe asks for, and notes on heads that cannot be fine-tuned.

    board: heads only, best first. Raises RecipeError if the inputs of partial reuse are not taps of
    a backbone.
    """
    notes: list[str] = []
    candidates: list[Candidate] = []
    n_finetuned = 0
    complete_rows = board[(board["failed"] == 0) & board["final"]]
    for _, row in complete_rows.drop_duplicates(["inputs", "kind"]).iterrows():
        if n_finetuned == section.top_k:
            break
        reason = _no_finetune_reason(row, feature_inputs)
        if reason:
            notes.append(
                f"{row['kind']} on {' + '.join(row['inputs'])} is not fine-tuned: {reason}"
            )
            continue
        n_finetuned += 1
        candidates += _candidates_of_head(row, section, feature_inputs)
    for reuse_section in section.reuse:
        for input_name in reuse_section.inputs:
            if input_name not in feature_inputs:
                raise RecipeError(
                    f"finetune.reuse: inputs names {input_name!r}, which no backbone gives. There "
                    f"are: {', '.join(feature_inputs)}"
                )
        if not len(complete_rows):
            continue
        inputs, train_above = reuse_section.inputs, reuse_section.train_above
        if reason := _several_networks_reason(inputs, feature_inputs):
            notes.append(f"partial reuse above {train_above} is left out: {reason}")
            continue
        head_json = _new_head(section, reuse_section.hidden)
        candidates += [
            _make_candidate("partial reuse", inputs, spec, complete_rows.iloc[0], feature_inputs)
            for start_from in reuse_section.start
            for spec in _finetune_specs(section, head_json, train_above, start_from)
        ]
    # Two entries of `reuse` may ask for the same network.
    return list({candidate.key: candidate for candidate in candidates}.values()), notes


def _candidates_of_head(
    row: pd.Series, section: FinetuneSection, feature_inputs: Mapping[str, FeatureInput]
) -> Iterator[Candidate]:
    for train_above in section.train_above:
        if train_above == "scratch":
            head_spec = spec_from_json(row["spec"])
            hidden = head_spec.hidden if isinstance(head_spec, MLPSpec) else ()
            head_json = _new_head(section, hidden)
            finetune_specs = _finetune_specs(section, head_json, "all", "random")
            label = "from scratch"
        else:
            finetune_specs = _finetune_specs(section, row["spec"], train_above, "head")
            label = "fine-tuned"
        for spec in finetune_specs:
            yield _make_candidate(label, row["inputs"], spec, row, feature_inputs)


def _new_head(section: FinetuneSection, hidden: tuple[int, ...]) -> str:
    return spec_to_json(MLPSpec(hidden=hidden, dropout=section.dropout, seed=section.seed))


def _finetune_specs(
    section: FinetuneSection, head_json: str, train_above: str, start_from: Any
) -> Iterator[FineTuneSpec]:
    varied_fields = ("head", "train_above", "start", "learning_rate", "kind")
    shared_values = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(FineTuneSpec)
        if field.name not in varied_fields
    }
    for learning_rate in section.learning_rate:
        yield FineTuneSpec(head_json, train_above, start_from, learning_rate, **shared_values)


def _make_candidate(
    label: str,
    inputs: Sequence[str],
    spec: FineTuneSpec,
    row: pd.Series,
    feature_inputs: Mapping[str, FeatureInput],
) -> Candidate:
    backbone = feature_inputs[inputs[0]].backbone
    assert backbone is not None
    feature_paths = tuple(path for name in inputs for path in feature_inputs[name].views)
    split_maps: tuple[Path, ...] = ()
    if spec.start != "random" or spec.train_above != "all":  # not from scratch
        # With several backbones "layer3.map" is called "timm:resnet18:layer3.map", and one backbone
        # may stand twice, with other views.
        prefix, colon, _ = inputs[0].rpartition(":")
        map_name = f"{prefix}{colon}{spec.train_above}.map"
        if map_name in feature_inputs:
            split_maps = feature_inputs[map_name].views
    return Candidate(label, tuple(inputs), spec, backbone, feature_paths, split_maps, row)


def _no_finetune_reason(row: pd.Series, feature_inputs: Mapping[str, FeatureInput]) -> str | None:
    if row["kind"] not in DIFFERENTIABLE:
        return f"no gradient passes through a {row['kind']} head"
    if SIDE_COLUMNS in row["inputs"]:
        return "it reads side columns, and a network reads images alone"
    return _several_networks_reason(row["inputs"], feature_inputs)


def _several_networks_reason(
    inputs: Sequence[str], feature_inputs: Mapping[str, FeatureInput]
) -> str | None:
    networks = {feature_inputs[name].backbone for name in inputs}
    if None in networks:
        return "which network made its features is not recorded"
    return None if len(networks) == 1 else "its features are of several networks"


def headroom(candidate: Candidate, metric: str) -> float:
    """Return how far the score of the candidate's head is from a perfect one, >= 0."""
    # The perfect score of a loss or an error is 0, of all others 1.
    perfect_score = 1.0 if METRICS[metric].higher_is_better else 0.0
    return abs(perfect_score - float(candidate.head[metric]))


def predicted_gain(
    candidate: Candidate, metric: str, measured: Mapping[str, Sequence[float]]
) -> float:
    """Return the expected gain of the candidate over its head: a share of its headroom.

    measured: the shares that finished candidates have gained, by their start. They are averaged
    with the prior.
    """
    measured_shares = measured.get(candidate.start, ())
    prior_sum = PRIOR[candidate.start] * PRIOR_WEIGHT
    expected_share = (prior_sum + sum(measured_shares)) / (PRIOR_WEIGHT + len(measured_shares))
    return headroom(candidate, metric) * expected_share


@dataclass(frozen=True)
class PilotResult:
    """What the pilot of a candidate, `task.pilot`, has checked and measured."""

    parity: Mapping[str, float] | None  # fields of ParityResult; None for a new head
    split_parity: Mapping[str, float] | None  # the same from cached maps
    # why the network cannot run from these maps; it then trains from the images
    no_split_reason: str | None
    step_seconds: float
    steps: int  # per epoch and fold
    evaluation_share: float  # validation rows over training rows
    blocks: int  # how many are trained


def training_seconds(candidate: Candidate, measured: PilotResult, n_folds: int) -> float:
    """Return the seconds of all folds and of the network on all rows, if none stops early."""
    # A forward pass takes about a third of a training step.
    epoch_seconds = measured.steps * measured.step_seconds * (1 + measured.evaluation_share / 3)
    return epoch_seconds * candidate.spec.epochs * (n_folds + 1)
