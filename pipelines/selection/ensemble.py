"""The ensemble of a run: picked from stored predictions, scored on rows that had no part in picking
it, kept only if better.

K candidates, N held-out rows. Each head first gets a temperature of its own, so that heads that are
too unsure (support vectors, ridge) or too sure have their say; the average gets another. The score
is nested: for each part of the rows, heads are calibrated, picked and weighted on the other parts
alone, and that ensemble predicts the part. What it has to beat is nested just so: for each part,
the head that is best on the other parts. The ensemble that is kept is picked on all rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.ensemble import (
    EnsembleLimits,
    average,
    element_loss,
    greedy_weights,
    loss_elements,
)
from headrace.heads.evaluate.metrics import METRICS, all_metrics
from headrace.heads.evaluate.temperature import fit_temperature, fit_temperatures, with_temperature
from headrace.heads.evaluate.weighted import weighted_scores
from headrace.heads.predict import floor_of
from headrace.heads.results import read_bank
from headrace.pipelines.recipe.sections import EnsembleSection
from headrace.pipelines.selection.correction import (
    LEVEL,
    nested_choice,
    no_narrower,
    resampled_rows,
)
from headrace.pipelines.selection.predictions import (
    PARTS,
    ValidationRows,
    read_predictions,
    selection_parts,
)

BUDGET = 4e8  # elements that all rounds may look at together: a few seconds
RESAMPLES = 1000


@dataclass(frozen=True)
class Member:
    """One head of an ensemble."""

    weight: float
    temperature: float  # of its own predictions, before they are averaged
    row: pd.Series  # of the leaderboard: inputs, kind, settings, spec, path, …
    networks: tuple[str, ...]  # the forward passes that it needs


@dataclass(frozen=True)
class Ensemble:
    """What averaging heads is worth.

    Scores are nested: no row was scored by an ensemble that it helped to pick.
    """

    metric: str
    members: tuple[Member, ...]  # by weight, largest first
    temperature: float
    candidates: int  # heads that members were picked from
    images: int
    value: float  # nested
    low: float  # 95 % interval of `value`
    high: float
    # the leaderboard's winner on the same rows, the luck of having been picked on them included
    winner: float
    single: float  # nested too: on each part of the rows, the head that is best on the others
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

    def summary(self) -> dict[str, Any]:
        """For JSON, without the members."""
        values = {
            name: value for name, value in vars(self).items() if name not in ("members", "metrics")
        }
        return {name: None if value != value else value for name, value in values.items()}


def build_ensemble(
    board: pd.DataFrame,
    held: ValidationRows,
    metric: str,
    section: EnsembleSection,
    *,
    seed: int = 0,
) -> Ensemble | None:
    """Pick an ensemble from the whole heads of a leaderboard (best first); None where there are
    fewer than two.

    Deterministic in the seed. It is `chosen` when it has several members and, on the same rows, is
    better than choosing the best head: the interval of the gain, of the level `section.confidence`,
    lies above 0. Both are without the luck of the rows that they were picked on.
    """
    kind = held.task.kind
    limits = EnsembleLimits(
        section.max_members, section.max_backbones, section.min_gain_per_backbone, section.rounds
    )
    found, predicted = _candidates(board, held, section)
    if len(found) < 2:
        return None
    networks = [_networks(row) for _, row in found.iterrows()]
    floors = [floor_of(spec, kind, len(held.task.classes)) for spec in found["spec"]]
    plain = np.zeros(predicted.shape[1:])
    nested = plain.copy()
    part = selection_parts(held, seed)
    for number in np.unique(part):
        inside, outside = np.flatnonzero(part != number), np.flatnonzero(part == number)
        own_temperatures = fit_temperatures(
            kind, held.target[inside], predicted[:, inside], held.weight[inside], floors
        )
        told = _calibrated(kind, predicted, own_temperatures, floors)
        elements = loss_elements(kind, held.target[inside], told[:, inside])
        weights = greedy_weights(kind, elements, networks, limits)
        used = np.flatnonzero(weights)
        own = average(weights[used], told[used])
        temperature = fit_temperature(kind, held.target[inside], own[inside], held.weight[inside])
        plain[outside] = own[outside]
        nested[outside] = with_temperature(kind, own[outside], temperature)
    temperatures = fit_temperatures(kind, held.target, predicted, held.weight, floors)
    told = _calibrated(kind, predicted, temperatures, floors)
    weights = greedy_weights(kind, loss_elements(kind, held.target, told), networks, limits)
    order = sorted(np.flatnonzero(weights), key=lambda place: -weights[place])
    members = [
        Member(float(weights[k]), float(temperatures[k]), found.iloc[k], tuple(sorted(networks[k])))
        for k in order
    ]
    first = predicted[int(found["rank"].argmin())]
    single = nested_choice(board.reset_index(drop=True), held, metric, part)
    return _judged(
        held,
        metric,
        section,
        np.stack([nested, single, first.astype(np.float64)]),
        members,
        len(found),
        seed,
        temperature=fit_temperature(kind, held.target, plain, held.weight),
    )


def _judged(
    held: ValidationRows,
    metric: str,
    section: EnsembleSection,
    predicted: npt.NDArray[np.float64],
    members: Sequence[Member],
    candidates: int,
    seed: int,
    temperature: float,
) -> Ensemble:
    """predicted: (3, N, C), the nested ensemble's, the nested single heads' and the winner's."""
    kind = held.task.kind
    drawn = resampled_rows(held.fold, held.groups, RESAMPLES, seed + 1)
    weightings = np.concatenate([np.ones((len(drawn), 1)), drawn], axis=1)
    scores = weighted_scores(kind, held.target, predicted, held.fold, metric, weightings)
    gains = (scores[0] - scores[1]) * (1 if METRICS[metric].higher_is_better else -1)
    low, high = np.nanquantile(scores[0, 1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = no_narrower(
        held, predicted[0], metric, float(scores[0, 0]), (float(low), float(high))
    )
    level = section.confidence
    gain_low, gain_high = np.nanquantile(gains[1:], [(1 - level) / 2, (1 + level) / 2])
    probability_better = float((gains[1:] > 0).mean())
    return Ensemble(
        metric=metric,
        members=tuple(members),
        temperature=temperature,
        candidates=candidates,
        images=len(held.rows),
        value=float(scores[0, 0]),
        low=low,
        high=high,
        winner=float(scores[2, 0]),
        single=float(scores[1, 0]),
        gain=float(gains[0]),
        gain_low=float(gain_low),
        gain_high=float(gain_high),
        level=level,
        probability_better=probability_better,
        chosen=bool(len(members) > 1 and gain_low > 0),
        metrics=all_metrics(kind, held.target, predicted[0]),
    )


def _candidates(
    board: pd.DataFrame, held: ValidationRows, section: EnsembleSection
) -> tuple[pd.DataFrame, npt.NDArray[np.float32]]:
    """The heads to pick from, cheap before dear, and their predictions (K, N, C).

    The best by their own loss, the winner, and the best of each (inputs, kind): what is unlike the
    others helps most.
    """
    kind = held.task.kind
    board = board.reset_index(drop=True)
    loss = np.full(len(board), np.nan)
    for places, block in read_predictions(board, held):
        loss[places] = element_loss(kind, loss_elements(kind, held.target, block))
    usable = board.assign(loss=loss)[np.isfinite(loss)].sort_values("loss", kind="stable")
    elements = len(held.rows) * (1 if kind == "single" else max(1, len(held.task.classes)))
    most = int(min(section.candidates, max(20, BUDGET / (elements * section.rounds * (PARTS + 1)))))
    best_of_each = usable.drop_duplicates(["inputs", "kind"]).index[: most // 2]
    wanted = [*usable.sort_values("rank").index[:1], *best_of_each, *usable.index]
    chosen = usable.loc[list(dict.fromkeys(wanted))[:most]].sort_values(
        ["features", "loss"], ignore_index=True
    )
    predicted: npt.NDArray[np.float32] | None = None
    for places, block in read_predictions(chosen, held):
        if predicted is None:
            predicted = np.zeros((len(chosen), *block.shape[1:]), np.float32)
        predicted[places] = block
    return chosen, predicted if predicted is not None else np.zeros(
        (0, len(held.rows), 1), np.float32
    )


def _networks(row: pd.Series) -> frozenset[str]:
    """The forward passes that a head needs: a network with other weights or another preprocessing
    is another one.
    """
    features = [feature["spec"] for feature in read_bank(row["path"]).features]
    if row["kind"] == "finetune":  # its own weights, whatever it started from
        return frozenset([f"fine-tuned {hashlib.sha256(row['spec'].encode()).hexdigest()[:8]}"])
    looks = [hashlib.sha256(spec["preprocessing"].encode()).hexdigest()[:8] for spec in features]
    return frozenset(
        f"{spec['backbone']} ({spec['weights'][:8]}/{look})"
        for spec, look in zip(features, looks, strict=True)
    )


def _calibrated(
    kind: TaskKind,
    predicted: npt.NDArray[np.float32],
    temperatures: npt.NDArray[np.float64],
    floors: Sequence[float],
) -> npt.NDArray[np.float32]:
    """(K, N, C) each head's predictions at its own temperature."""
    told = np.empty_like(predicted)
    for place, (temperature, floor) in enumerate(zip(temperatures, floors, strict=True)):
        told[place] = with_temperature(kind, predicted[place], float(temperature), floor)
    return told
