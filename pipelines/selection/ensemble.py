"""Ensembles: picked from stored predictions, scored on rows that had no part in picking them.

K candidates, N held-out rows, C outputs. The score is nested: for each part of the rows, heads are
calibrated, picked and weighted on the other parts alone, and that ensemble predicts the part. The
ensemble that is stored is picked on all rows.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from headrace.heads.arrays import Array, Doubles, Floats, Index
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.ensemble import (
    EnsembleLimits,
    average,
    element_loss,
    greedy_weights,
    loss_elements,
)
from headrace.heads.evaluate.metrics import all_metrics, sign, weighted_scores
from headrace.heads.evaluate.temperature import fit_temperature, fit_temperatures, with_temperature
from headrace.heads.predict import probability_floor
from headrace.heads.results import read_bank
from headrace.pipelines.models.reference import ModelAverage, ModelRef, WeightedModel
from headrace.pipelines.recipe.sections import EnsembleSection
from headrace.pipelines.selection.correction import ENDS, nested_choice, no_narrower, resampled_rows
from headrace.pipelines.selection.predictions import (
    ValidationRows,
    read_predictions,
    selection_parts,
    stacked_predictions,
)

BUDGET = 4e8  # elements that all rounds may look at together: a few seconds
RESAMPLES = 1000  # of the validation rows, for the gain's interval


@dataclass(frozen=True)
class Member:
    """One head of an ensemble."""

    weight: float
    temperature: float  # of its own predictions, before they are averaged
    row: pd.Series  # of the leaderboard: inputs, kind, settings, spec, path, …
    networks: tuple[str, ...]  # the forward passes that it needs


@dataclass(frozen=True)
class Ensemble:
    """A weighted average of heads, and its scores.

    Scores are nested: no row was scored by an ensemble that it helped to pick.
    """

    metric: str
    members: tuple[Member, ...]  # by weight, largest first
    temperature: float
    candidates: int  # heads that members were picked from
    images: int  # held-out rows
    value: float  # nested score, in `metric`
    low: float  # 95 % interval of `value`
    high: float
    # score of the leaderboard's winner on the same rows; too good, as it was picked on them
    winner: float
    # nested score of the best single head: each part of the rows by the head best on the others
    single: float
    gain: float  # by how much the ensemble is better than `single`, positive = better
    gain_low: float  # paired interval of `gain`, of the level `level`
    gain_high: float
    level: float
    probability_better: float  # share of the resamples in which it is better
    chosen: bool  # whether it is the selected model: `gain_low` is above 0
    metrics: dict[str, float]  # nested, all of the task's

    @property
    def networks(self) -> tuple[str, ...]:
        """All forward passes that a prediction needs."""
        return tuple(sorted({name for member in self.members for name in member.networks}))

    def average_of(self, models: Sequence[ModelRef]) -> ModelAverage:
        """Return the average of the members' models, given in order."""
        return ModelAverage(
            tuple(
                WeightedModel(member.weight, member.temperature, model)
                for member, model in zip(self.members, models, strict=True)
            ),
            self.temperature,
        )

    def summary(self) -> dict[str, Any]:
        """Return a dictionary for JSON, without the members; an undefined number is None."""
        return {
            name: None if value != value else value
            for name, value in vars(self).items()
            if name not in ("members", "metrics")
        }


def build_ensemble(
    board: pd.DataFrame, validation: ValidationRows, metric: str, section: EnsembleSection
) -> Ensemble | None:
    """Pick an ensemble from the complete heads of a leaderboard (best first); None below two.

    It is `chosen` if it has several members and its nested score is better than that of the best
    single head: the interval of the gain, of the level `section.confidence`, lies above 0.
    """
    task_kind = validation.task.kind
    limits = EnsembleLimits(
        section.max_members, section.max_backbones, section.min_gain_per_backbone, section.rounds
    )
    candidates, predicted = _candidates(board, validation, section)
    if len(candidates) < 2:
        return None
    networks_by_head = _networks_by_head(candidates)
    n_classes = len(validation.task.classes)
    floors = [probability_floor(spec, task_kind, n_classes) for spec in candidates["spec"]]

    def weights_from(rows: Index | slice) -> tuple[Array, Array, Array]:
        """Return weights (K,) and temperatures (K,) from some rows, and all predictions at them."""
        # So that under-confident heads (support vectors, ridge) and over-confident ones carry their
        # weight in the average.
        temperatures = _member_temperatures(validation, rows, predicted, floors)
        at_temperature = _calibrated(task_kind, predicted, temperatures, floors)
        losses = loss_elements(task_kind, validation.target[rows], at_temperature[:, rows])
        weights = greedy_weights(task_kind, losses, networks_by_head, limits)
        return weights, temperatures, at_temperature

    part_of_row = selection_parts(validation)
    nested_average, nested_ensemble = _nested_predictions(
        validation, part_of_row, predicted.shape[2], weights_from
    )
    weights, temperatures, _ = weights_from(slice(None))
    members = []
    for k in sorted(np.flatnonzero(weights), key=lambda head: -weights[head]):
        networks = tuple(sorted(networks_by_head[k]))
        members.append(
            Member(float(weights[k]), float(temperatures[k]), candidates.iloc[k], networks)
        )
    winner_predictions = predicted[int(candidates["rank"].argmin())]
    # The single head that it has to beat must not have been chosen on these rows either.
    nested_single = nested_choice(board.reset_index(drop=True), validation, metric, part_of_row)
    return _assess_ensemble(
        validation,
        metric,
        section,
        np.stack([nested_ensemble, nested_single, winner_predictions.astype(np.float64)]),
        members,
        len(candidates),
        fit_temperature(task_kind, validation.target, nested_average, validation.weight),
    )


def _nested_predictions(
    validation: ValidationRows,
    part_of_row: Index,
    n_outputs: int,
    weights_from: Callable[[Index], tuple[Array, ...]],
) -> Doubles:
    """Return predictions (2, N, C) of each part of the rows by the ensemble that the other parts
    pick, before and after its temperature.
    """
    task_kind, nested = validation.task.kind, np.zeros((2, len(validation), n_outputs))
    for part_number in np.unique(part_of_row):
        inside = np.flatnonzero(part_of_row != part_number)
        outside = np.flatnonzero(part_of_row == part_number)
        weights, _, predicted = weights_from(inside)
        used_heads = np.flatnonzero(weights)
        part_average = average(weights[used_heads], predicted[used_heads])
        temperature = fit_temperature(
            task_kind, validation.target[inside], part_average[inside], validation.weight[inside]
        )
        nested[0, outside] = part_average[outside]
        nested[1, outside] = with_temperature(task_kind, part_average[outside], temperature)
    return nested


def _assess_ensemble(
    validation: ValidationRows,
    metric: str,
    section: EnsembleSection,
    predicted: Doubles,
    members: Sequence[Member],
    n_candidates: int,
    temperature: float,
) -> Ensemble:
    """Return the ensemble with its nested scores and gain.

    predicted: (3, N, C) by the nested ensembles, the nested single heads, and the winner.
    """
    task_kind = validation.task.kind
    drawn_counts = resampled_rows(validation.fold, validation.groups, RESAMPLES, 1)
    weightings = np.concatenate([np.ones((len(drawn_counts), 1)), drawn_counts], axis=1)
    scores = weighted_scores(
        task_kind, validation.target, predicted, validation.fold, metric, weightings
    )
    gains = (scores[0] - scores[1]) * sign(metric)
    low, high = np.nanquantile(scores[0, 1:], ENDS)
    low, high = no_narrower(
        validation, predicted[0], metric, float(scores[0, 0]), (float(low), float(high))
    )
    level = section.confidence
    gain_low, gain_high = np.nanquantile(gains[1:], [(1 - level) / 2, (1 + level) / 2])
    return Ensemble(
        metric=metric,
        members=tuple(members),
        temperature=temperature,
        candidates=n_candidates,
        images=len(validation),
        value=float(scores[0, 0]),
        low=low,
        high=high,
        winner=float(scores[2, 0]),
        single=float(scores[1, 0]),
        gain=float(gains[0]),
        gain_low=float(gain_low),
        gain_high=float(gain_high),
        level=level,
        probability_better=float((gains[1:] > 0).mean()),
        chosen=bool(len(members) > 1 and gain_low > 0),
        metrics=all_metrics(task_kind, validation.target, predicted[0]),
    )


def _candidates(
    board: pd.DataFrame, validation: ValidationRows, section: EnsembleSection
) -> tuple[pd.DataFrame, Floats]:
    """Return the heads to pick from and their predictions (K, N, C).

    They are the winner, the best of each (inputs, kind), and then the heads of least loss.
    """
    task_kind = validation.task.kind
    board = board.reset_index(drop=True)
    head_losses = np.full(len(board), np.nan)
    for positions, block in read_predictions(board, validation):
        head_losses[positions] = element_loss(
            task_kind, loss_elements(task_kind, validation.target, block)
        )
    usable = board.assign(loss=head_losses)[np.isfinite(head_losses)].sort_values(
        "loss", kind="stable"
    )
    n_outputs = 1 if task_kind == "single" else max(1, len(validation.task.classes))
    # The choice is made without each part in turn, and once on all rows.
    n_choices = len(np.unique(selection_parts(validation))) + 1
    n_elements = len(validation) * n_outputs * section.rounds * n_choices
    max_candidates = int(min(section.candidates, max(20, BUDGET / n_elements)))
    # Half of the places, for heads that err differently, which help most: the best ones are often
    # near copies.
    best_of_each = usable.drop_duplicates(["inputs", "kind"]).index[: max_candidates // 2]
    preference = [*usable.sort_values("rank").index[:1], *best_of_each, *usable.index]
    # Fewest features first: the greedy choice gives ties to the first.
    chosen = usable.loc[list(dict.fromkeys(preference))[:max_candidates]].sort_values(
        ["features", "loss"], ignore_index=True
    )
    # Each has its predictions, since its loss is finite.
    return chosen, stacked_predictions(chosen, validation)[1]


def _networks_by_head(candidates: pd.DataFrame) -> list[frozenset[str]]:
    """Return by head a name for each forward pass that it needs."""
    is_network = candidates["kind"] == "finetune"
    # Once for each bank, which has the results of many heads.
    networks_of_bank = {
        results_path: _networks_of_bank(results_path)
        for results_path in candidates["path"][~is_network].unique()
    }
    return [
        # a fine-tuned network has weights of its own
        frozenset([f"fine-tuned {_short_digest(spec)}"]) if fine_tuned else networks_of_bank[path]
        for fine_tuned, spec, path in zip(
            is_network, candidates["spec"], candidates["path"], strict=True
        )
    ]


def _networks_of_bank(results_path: str) -> frozenset[str]:
    # One backbone with other weights or another preprocessing is another forward pass.
    specs = [feature["spec"] for feature in read_bank(results_path).features]
    return frozenset(
        f"{spec['backbone']} ({spec['weights'][:8]}/{_short_digest(spec['preprocessing'])})"
        for spec in specs
    )


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _member_temperatures(
    validation: ValidationRows, rows: Index | slice, predicted: Floats, floors: Sequence[float]
) -> Doubles:
    """Return the temperature (K,) of each candidate, fitted on some of the rows."""
    if validation.task.units is not None:
        # Without temperatures, averaging over members and aggregating over a unit's images give the
        # same in either order.
        return np.ones(len(predicted))
    return fit_temperatures(
        validation.task.kind,
        validation.target[rows],
        predicted[:, rows],
        validation.weight[rows],
        floors,
    )


def _calibrated(
    task_kind: TaskKind, predicted: Floats, temperatures: Doubles, floors: Sequence[float]
) -> Floats:
    """Return each head's predictions (K, N, C) at its own temperature."""
    at_temperature = np.empty_like(predicted)
    for head, (temperature, floor) in enumerate(zip(temperatures, floors, strict=True)):
        at_temperature[head] = with_temperature(
            task_kind, predicted[head], float(temperature), floor
        )
    return at_temperature
