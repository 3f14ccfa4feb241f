"""Measurement of the evidence for advice: errors with intervals, learning curves, taps.

N held-out rows, C classes, B resamples.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.feature_set import open_feature_set
from headrace.cache.spec import FeatureSpec
from headrace.heads.arrays import Array, Doubles, Floats, Mask
from headrace.heads.bank import BankJob
from headrace.heads.data.side_columns import taps_of
from headrace.heads.data.task import Task
from headrace.heads.evaluate.intervals import mean_loss_interval, proportion_interval
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
from headrace.pipelines.advice.transferability import transferability_scores
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.recipe.finetune_spec import model_spec
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
    ValidationRows,
    complete_heads,
    read_predictions,
    validation_rows,
)

RESAMPLES = 400  # of the validation rows
IMAGE_FACTORS = (2, 4)  # how many times as many images the curve is extrapolated to
# Kinds of head that are trained for the learning curve if the winner is one, beside linear heads.
_CURVE_KINDS = ("logistic", "ridge", "mlp")


FeaturePaths = Mapping[str, Sequence[Path]]  # of the feature sets' views, by name
SortByDepth = Callable[[Sequence[str]], Sequence[str]]


def advise_on(
    board: pd.DataFrame,
    task: Task,
    feature_paths: FeaturePaths,
    results_folder: Path,
    train_all: Callable[[Sequence[BankJob]], None],
    *,
    groups: Array | None = None,
    sort_by_depth: SortByDepth = list,
    reference: tuple[FeaturePaths, npt.NDArray[np.bytes_]] | None = None,
) -> Advice:
    """Return the advice for a ranked leaderboard of a task.

    board: best first; `inputs` are tuples of names of feature sets.
    feature_paths: directories of the feature sets, by these names.
    results_folder: where measurements stay; a second call trains nothing.
    train_all: trains the bank jobs of the learning curve.
    groups: (rows of the task,) rows of one group are resampled together.
    sort_by_depth: sorts names of feature sets of one backbone, early to late; by default they are
    in that order.
    reference: feature sets and image contents of another run to measure the distance to.

    Raises InvalidInput; HeadraceError where features are missing.
    """
    task = replace(task, units=None)  # advice is on single images, also if units are predicted
    validation = validation_rows(task, groups)
    complete = complete_heads(board)
    is_network = complete["kind"] == "finetune"
    heads = complete[~is_network].reset_index(drop=True)
    networks = complete[is_network].reset_index(drop=True)
    draws = row_draws(validation.fold, validation.groups, RESAMPLES)
    best_predictions = _predictions(heads.iloc[:1], validation)
    if not best_predictions:
        raise InvalidInput(
            "no head of this run is whole, with a stored prediction for each validation image: "
            "look at heads.parquet, call `headrace run` again, and then ask for advice"
        )
    predicted = best_predictions[0]
    losses = _row_losses(validation, predicted)
    error = _error_estimate(validation, losses, draws)
    scores = transferability_scores(task, feature_paths, results_folder)
    evidence: dict[str, Any] = {}  # fields of `Evidence` that not every task has
    if len(task.ids) >= THIN_ROWS:
        curve = _measured_curve(
            heads, task, feature_paths, results_folder / "curves", train_all, groups
        )
        evidence |= _curve_evidence(validation, losses, curve, draws)
    if task.kind == "single":
        confidence = predicted.max(1)
        sure = confidence >= np.median(confidence)
        evidence["surest"] = _error_estimate(validation, losses[sure], draws[sure], sure)
    if reference is not None:
        by_depth = _sort_all_by_depth(feature_paths, sort_by_depth)
        sorted_paths = {name: feature_paths[name] for name in by_depth}
        evidence["reference"] = reference_evidence(sorted_paths, task.content, *reference)
    return decide(
        Evidence(
            images=len(task.ids),
            classes=len(task.classes) if task.kind == "single" else 0,
            error=error,
            taps=tap_evidence(heads, validation, feature_paths, draws, sort_by_depth),
            pilots=pilot_evidence(networks, validation, error, draws),
            scores=tuple(asdict(score) for score in scores),
            **evidence,
        )
    )


def _measured_curve(
    heads: pd.DataFrame,
    task: Task,
    feature_paths: FeaturePaths,
    results_folder: Path,
    train_all: Callable[[Sequence[BankJob]], None],
    groups: Array | None,
) -> LearningCurve:
    """Return the learning curve on the inputs of the best head that reads no map."""
    # Linear heads on all positions of a map would be very wide, and say no more.
    reads_map = [any(name.endswith(".map") for name in inputs) for inputs in heads["inputs"]]
    without_map = heads[~np.array(reads_map)]
    best_head = (without_map if len(without_map) else heads).iloc[0]
    features = [path for name in taps_of(best_head["inputs"]) for path in feature_paths[name]]
    # Linear heads, and the winner's settings.
    winner_spec = model_spec(best_head["spec"])
    specs = linear_specs(task, getattr(winner_spec, "class_weight", "none"))
    if winner_spec.kind in _CURVE_KINDS:
        specs.append(winner_spec)
    specs = list(dict.fromkeys(specs))
    return learning_curve(task, features, specs, results_folder, train_all, groups=groups)


def _curve_evidence(
    validation: ValidationRows, losses: Doubles, curve: LearningCurve, draws: Doubles
) -> dict[str, Any]:
    """Return the fields of `Evidence` that come from a learning curve."""
    in_curve = np.isin(validation.images, curve.rows)
    law = fit_power_law(curve.sizes, weighted_errors(curve.wrong, draws[in_curve]))
    gains = {factor: gain_from_more(law, curve.sizes[-1], factor) for factor in IMAGE_FACTORS}
    error_today = _error_estimate(validation, curve.wrong[-1], draws[in_curve], in_curve)
    evidence = {
        "gain": gains,
        "ahead": {factor: error_with_more(error_today, gain) for factor, gain in gains.items()},
        "curve": {"images": curve.sizes.tolist(), "error": curve.errors.tolist()},
    }
    if validation.task.kind == "single":
        evidence["per_class"] = class_evidence(validation, losses, curve, draws, in_curve)
    return evidence


def _sort_all_by_depth(feature_paths: FeaturePaths, sort_by_depth: SortByDepth) -> list[str]:
    """Return all names, backbone by backbone, those of each from early to late."""
    names_of_backbone: dict[tuple[str, ...], list[str]] = {}
    for name, views in feature_paths.items():
        backbone_key = _backbone_key(open_feature_set(views[0]).spec)
        names_of_backbone.setdefault(backbone_key, []).append(name)
    return [name for names in names_of_backbone.values() for name in sort_by_depth(names)]


def _backbone_key(spec: FeatureSpec) -> tuple[str, ...]:
    return spec.backbone, spec.weights, spec.preprocessing


def class_evidence(
    validation: ValidationRows,
    losses: Doubles,
    curve: LearningCurve,
    draws: Doubles,
    in_curve: Mask,
) -> tuple[ClassEvidence, ...]:
    """Return each class's error, its lag behind the median class, and its own learning curve.

    losses: (N,) of the best head. draws: (N, 1 + B). in_curve: (N,) which rows the curve has.
    """
    task = validation.task
    rows_of_class = [validation.target == c for c in range(len(task.classes))]
    present = [c for c, rows in enumerate(rows_of_class) if rows[in_curve].any()]
    errors = {
        c: _error_estimate(validation, losses[rows], draws[rows], rows)
        for c, rows in enumerate(rows_of_class)
        if c in present
    }
    evidence = []
    for c in present:
        other_errors = [errors[other_class] for other_class in present if other_class != c]
        if not other_errors:
            continue
        values = np.median([[error.value, *error.draws] for error in other_errors], axis=0)
        median_error = Estimate(float(values[0]), values[1:])
        row_mask = rows_of_class[c][in_curve]
        sizes = np.maximum(curve.class_sizes[:, c], 1)
        curve_errors = weighted_errors(curve.wrong[:, row_mask], draws[in_curve][row_mask])
        law = fit_power_law(sizes, np.nan_to_num(curve_errors))
        n_images = int((task.target == c).sum())
        more_images = law.images_for(np.array([median_error.value, *median_error.draws])) - n_images
        # The power law is trusted up to four times the images: beyond, it may ask for millions.
        more_images = np.clip(more_images, 0, 3 * n_images)
        class_entry = ClassEvidence(
            name=task.classes[c],
            images=n_images,
            error=errors[c],
            gap=errors[c].minus(median_error),
            gain=gain_from_more(law, float(sizes[-1]), 2),
            needed=Estimate(float(more_images[0]), more_images[1:]),
        )
        if class_entry.unseen:
            other_counts = [float((task.target == k).sum()) for k in present if k != c]
            target_count = STARVED_SHARE * float(np.median(other_counts))
            needed = max(target_count - n_images, n_images)
            class_entry = replace(
                class_entry, needed=Estimate(needed, np.array([n_images, needed]))
            )
        evidence.append(class_entry)
    return tuple(evidence)


def tap_evidence(
    heads: pd.DataFrame,
    validation: ValidationRows,
    feature_paths: FeaturePaths,
    draws: Doubles,
    sort_by_depth: SortByDepth,
) -> tuple[TapEvidence, ...]:
    """Return the error of the best head on each tap alone, early to late, for the backbone that has
    the best of these heads. A tap with several poolings is there with the best one.
    """
    single_input = heads[[len(inputs) == 1 for inputs in heads["inputs"]]]
    names_of_heads = [inputs[0] for inputs in single_input["inputs"]]
    specs = {name: open_feature_set(feature_paths[name][0]).spec for name in names_of_heads}
    if not specs:
        return ()
    backbones = [_backbone_key(specs[name]) for name in names_of_heads]
    tap_names = [specs[name].tap for name in names_of_heads]
    best_of_tap = single_input.assign(name=names_of_heads, tap=tap_names)
    # The board is best first, and so is each tap's first head.
    best_of_tap = best_of_tap[[key == backbones[0] for key in backbones]].drop_duplicates("tap")
    errors = {
        best_of_tap["name"].iloc[index]: _estimate(_row_losses(validation, predicted), draws)
        for index, predicted in _predictions(best_of_tap, validation).items()
    }
    best_error = min(errors.values(), key=lambda error: error.value)
    return tuple(
        TapEvidence(name, errors[name], errors[name].minus(best_error))
        for name in sort_by_depth([name for name in feature_paths if name in errors])
    )


def pilot_evidence(
    networks: pd.DataFrame, validation: ValidationRows, head_error: Estimate, draws: Doubles
) -> tuple[PilotEvidence, ...]:
    """Return the gain of each fine-tuned network over the best head, on the same rows."""
    pilots = []
    for index, predicted in _predictions(networks, validation).items():
        network, spec = networks.iloc[index], json.loads(networks["spec"].iloc[index])
        train_above = spec["train_above"]
        pilots.append(
            PilotEvidence(
                name=f"{network['kind']} {network['settings']}",
                tap=None if train_above == "all" else train_above,
                scratch=spec["start"] == "random" and train_above == "all",
                gain=head_error.minus(_estimate(_row_losses(validation, predicted), draws)),
            )
        )
    return tuple(pilots)


def _predictions(board: pd.DataFrame, validation: ValidationRows) -> dict[int, Floats]:
    """Return out-of-fold predictions (N, C) by position in the board; heads without are absent."""
    return {
        int(index): predicted
        for indices, block in read_predictions(board, validation)
        for index, predicted in zip(indices, block, strict=True)
    }


def _row_losses(validation: ValidationRows, predicted: Floats) -> Doubles:
    """Return the error (N,) of each row for predictions (N, C)."""
    return np.asarray(row_errors(validation.task, validation.target, predicted[None])[0])


def _error_estimate(
    validation: ValidationRows, losses: Doubles, draws: Doubles, row_mask: Mask | None = None
) -> Estimate:
    """Return the mean of losses (n,) with its interval over groups.

    draws: (n, 1 + B) from `row_draws`. row_mask: (N,) the n rows, by default all held-out ones.
    """
    groups = validation.groups if row_mask is None else validation.groups[row_mask]
    is_regression = validation.task.kind == "regression"
    interval = mean_loss_interval if is_regression else proportion_interval
    return replace(_estimate(losses, draws), ends=interval(losses, groups))


def _estimate(losses: Doubles, draws: Doubles) -> Estimate:
    mean_errors = weighted_errors(losses[None], draws)[0]
    return Estimate(float(mean_errors[0]), mean_errors[1:])
