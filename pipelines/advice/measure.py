"""Gathers the evidence of a run, measuring what is missing, and asks for the advice."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import open_feature_set
from headrace.heads.bank import BankJob
from headrace.heads.data.task import Task
from headrace.heads.evaluate.intervals import mean_loss_interval, proportion_interval
from headrace.heads.spec import HeadSpec, spec_from_json
from headrace.pipelines.advice.decide import (
    STARVED_SHARE,
    THIN_ROWS,
    Advice,
    ClassEvidence,
    Evidence,
    PilotEvidence,
    TapEvidence,
    decide,
)
from headrace.pipelines.advice.reference import reference_evidence
from headrace.pipelines.advice.taps import transfer_scores
from headrace.pipelines.selection.estimate import Estimate
from headrace.pipelines.selection.learning_curves import (
    LearningCurve,
    error_with_more,
    fit_power_law,
    gain_from_more,
    learning_curve,
    linear_specs,
    row_draws,
    row_errors,
    weighted_errors,
)
from headrace.pipelines.selection.predictions import (
    HeldOut,
    held_out,
    read_predictions,
    whole_heads,
)

Floats = npt.NDArray[np.float64]

RESAMPLES = 400
TIMES = (2, 4)  # as many images
_CURVED = ("logistic", "ridge", "mlp")  # kinds whose winner is drawn a curve of its own


class NothingToWeigh(HeadraceError, ValueError):
    """There is no head to give advice on."""


def advise_on(
    board: pd.DataFrame,
    task: Task,
    directories: Mapping[str, Sequence[Path]],
    folder: Path,
    train_all: Callable[[Sequence[BankJob]], None],
    *,
    groups: npt.NDArray[Any] | None = None,
    deeper: Callable[[Sequence[str]], Sequence[str]] = list,
    reference: tuple[Mapping[str, Sequence[Path]], npt.NDArray[np.bytes_]] | None = None,
) -> Advice:
    """The advice for a ranked leaderboard (best first) of a task.

    directories: of the feature sets by the names that `inputs` of the board use. folder: where what
    is measured is kept.
    train_all: runs the bank jobs of the learning curve. deeper: sorts names of feature sets of one
    network, early to late; by default they are in that order. reference: feature sets and images of
    another run to measure the distance to.
    """
    held = held_out(task, groups)
    whole = whole_heads(board).reset_index(drop=True)
    tuned = whole["kind"] == "finetune"
    heads, networks = whole[~tuned].reset_index(drop=True), whole[tuned].reset_index(drop=True)
    draws = row_draws(held.fold, held.groups, RESAMPLES)
    best = heads.iloc[:1]
    found = _predictions(best, held)
    if not found:
        raise NothingToWeigh(
            "no head of this run is whole, with a stored prediction for each validation image: "
            "look at heads.parquet, call `headrace run` again, and then ask for advice"
        )
    predicted = found[0]
    wrong = _wrong(task, held, predicted)
    error = _error(task, held, wrong, draws)
    scores = transfer_scores(task, directories, folder)
    evidence: dict[str, Any] = {"gain": {}, "ahead": {}, "curve": {}}
    if len(task.ids) >= THIN_ROWS:
        # Linear heads on all positions of a map would be very wide: the curve of the best other
        # head says as much.
        flat = heads[
            [not any(name.endswith(".map") for name in inputs) for inputs in heads["inputs"]]
        ]
        drawn = flat.iloc[0] if len(flat) else heads.iloc[0]
        features = [path for name in drawn["inputs"] for path in directories[name]]
        curve = learning_curve(
            task, features, curve_specs(task, drawn), folder / "curves", train_all, groups=groups
        )
        own = np.isin(held.rows, curve.rows)
        law = fit_power_law(curve.sizes, weighted_errors(curve.wrong, draws[own]))
        evidence["gain"] = {times: gain_from_more(law, curve.sizes[-1], times) for times in TIMES}
        today = _error(task, held, curve.wrong[-1], draws[own], own)
        evidence["ahead"] = {
            times: error_with_more(today, gain) for times, gain in evidence["gain"].items()
        }
        evidence["curve"] = {"images": curve.sizes.tolist(), "error": curve.errors.tolist()}
        if task.kind == "single":
            evidence["per_class"] = class_evidence(task, held, wrong, curve, draws, own)
    if task.kind == "single":
        sure = predicted.max(1) >= np.median(predicted.max(1))
        evidence["surest"] = _error(task, held, wrong[sure], draws[sure], sure)
    by_depth = (
        {name: directories[name] for name in _deepest_last(directories, deeper)}
        if reference
        else {}
    )
    return decide(
        Evidence(
            images=len(task.ids),
            classes=len(task.classes) if task.kind == "single" else 0,
            error=error,
            **({"surest": None} | evidence),
            taps=tap_evidence(heads, held, directories, draws, deeper),
            pilots=pilot_evidence(networks, held, error, draws),
            scores=tuple(asdict(each) for each in scores),
            reference=()
            if reference is None
            else reference_evidence(by_depth, task.content, *reference),
        )
    )


def _deepest_last(
    directories: Mapping[str, Sequence[Path]], deeper: Callable[[Sequence[str]], Sequence[str]]
) -> list[str]:
    """All names, network by network, each early to late."""
    networks: dict[tuple[str, ...], list[str]] = {}
    for name, views in directories.items():
        spec = open_feature_set(views[0]).spec
        networks.setdefault((spec.backbone, spec.weights, spec.preprocessing), []).append(name)
    return [name for names in networks.values() for name in deeper(names)]


def curve_specs(task: Task, winner: pd.Series) -> list[HeadSpec]:
    """The heads of the learning curve: linear ones of several strengths, and the winner's own."""
    own = spec_from_json(winner["spec"])
    linear = linear_specs(task, getattr(own, "class_weight", "none"))
    return list(dict.fromkeys([*linear, *([own] if own.kind in _CURVED else [])]))


def class_evidence(
    task: Task,
    held: HeldOut,
    wrong: Floats,
    curve: LearningCurve,
    draws: Floats,
    own: npt.NDArray[np.bool_],
) -> tuple[ClassEvidence, ...]:
    """Each class's error, its lag behind the middle class, and its own learning curve. own:
    held-out rows of the curve.
    """
    of_class = [held.target == c for c in range(len(task.classes))]
    present = [c for c, rows in enumerate(of_class) if rows[own].any()]
    errors = {
        c: _error(held.task, held, wrong[of_class[c]], draws[of_class[c]], of_class[c])
        for c in present
    }
    found = []
    for c in present:
        others = [errors[other] for other in present if other != c]
        if not others:
            continue
        values = np.median([[each.value, *each.draws] for each in others], axis=0)
        middle = Estimate(float(values[0]), values[1:])
        rows = of_class[c][own]
        sizes = np.maximum(curve.class_sizes[:, c], 1)
        law = fit_power_law(
            sizes, np.nan_to_num(weighted_errors(curve.wrong[:, rows], draws[own][rows]))
        )
        images = int((task.target == c).sum())
        needed = np.clip(
            law.images_for(np.array([middle.value, *middle.draws])) - images, 0, 3 * images
        )
        each = ClassEvidence(
            name=task.classes[c],
            images=images,
            error=errors[c],
            gap=errors[c].minus(middle),
            gain=gain_from_more(law, float(sizes[-1]), 2),
            needed=Estimate(float(needed[0]), needed[1:]),
        )
        if each.unseen:
            counts = [float((task.target == other).sum()) for other in present if other != c]
            most = max(STARVED_SHARE * float(np.median(counts)) - images, images)
            each = replace(each, needed=Estimate(most, np.array([images, most])))
        found.append(each)
    return tuple(found)


def tap_evidence(
    heads: pd.DataFrame,
    held: HeldOut,
    directories: Mapping[str, Sequence[Path]],
    draws: Floats,
    deeper: Callable[[Sequence[str]], Sequence[str]],
) -> tuple[TapEvidence, ...]:
    """The best head on each tap alone, of the network that has the best of them; of two reductions
    of a tap the better.
    """
    alone = heads[[len(inputs) == 1 for inputs in heads["inputs"]]]
    alone = alone.assign(name=[inputs[0] for inputs in alone["inputs"]]).drop_duplicates(
        "name"
    )  # best first
    specs = {name: open_feature_set(directories[name][0]).spec for name in alone["name"]}
    if not specs:
        return ()
    network = {
        name: (spec.backbone, spec.weights, spec.preprocessing) for name, spec in specs.items()
    }
    alone = alone[[network[name] == network[alone["name"].iloc[0]] for name in alone["name"]]]
    alone = alone.assign(tap=[specs[name].tap for name in alone["name"]]).drop_duplicates("tap")
    errors = {
        alone["name"].iloc[place]: _estimate(_wrong(held.task, held, predicted), draws)
        for place, predicted in _predictions(alone, held).items()
    }
    best = min(errors.values(), key=lambda each: each.value)
    order = [
        name for name in deeper([name for name in directories if name in errors]) if name in errors
    ]
    return tuple(TapEvidence(name, errors[name], errors[name].minus(best)) for name in order)


def pilot_evidence(
    networks: pd.DataFrame, held: HeldOut, error: Estimate, draws: Floats
) -> tuple[PilotEvidence, ...]:
    """Networks that were trained deeper, against the best head on the same rows."""
    pilots = []
    for place, predicted in _predictions(networks, held).items():
        row, spec = networks.iloc[place], json.loads(networks["spec"].iloc[place])
        train_above = spec.get("train_above")
        pilots.append(
            PilotEvidence(
                name=f"{row['kind']} {row['settings']}",
                tap=None if train_above in ("all", "head", None) else train_above,
                scratch=spec.get("start") == "random" and train_above == "all",
                gain=error.minus(_estimate(_wrong(held.task, held, predicted), draws)),
            )
        )
    return tuple(pilots)


def _predictions(rows: pd.DataFrame, held: HeldOut) -> dict[int, npt.NDArray[np.float32]]:
    """(N, C) of each row of a leaderboard, by its place; rows without stored predictions are
    absent.
    """
    return {
        int(place): predicted
        for places, block in read_predictions(rows, held)
        for place, predicted in zip(places, block, strict=True)
    }


def _wrong(task: Task, held: HeldOut, predicted: npt.NDArray[np.float32]) -> Floats:
    return np.asarray(row_errors(task, held.target, predicted[None])[0])


def _error(
    task: Task,
    held: HeldOut,
    wrong: Floats,
    draws: Floats,
    rows: npt.NDArray[np.bool_] | None = None,
) -> Estimate:
    """A mean error of held-out rows (n,) with its interval over groups; rows:

    (N,) which of the held-out rows they are.
    """
    groups = held.groups if rows is None else held.groups[rows]
    ends = (proportion_interval if task.kind != "regression" else mean_loss_interval)(wrong, groups)
    return replace(_estimate(wrong, draws), ends=ends)


def _estimate(wrong: Floats, draws: Floats) -> Estimate:
    values = weighted_errors(wrong[None], draws)[0]
    return Estimate(float(values[0]), values[1:])
