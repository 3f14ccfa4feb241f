"""The stage that selects a model: heads and networks are ranked on validation folds, the winner's
score is corrected for its selection, and an ensemble is tried.
"""

import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from headrace.cache.atomic_io import PARTIAL_SUFFIX, lease, sync_directory
from headrace.cache.count_text import count_text
from headrace.heads.data.side_columns import taps_of
from headrace.heads.predict import probability_floor
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.models.head import HEAD_FILES
from headrace.pipelines.models.image_parts import ImageParts, trained_parts
from headrace.pipelines.models.network import NETWORK_FILES
from headrace.pipelines.planning.leaderboard import (
    NoWinner,
    choose_winner,
    collect_heads,
    rank_heads,
)
from headrace.pipelines.planning.run_state import RankedModels, RunState
from headrace.pipelines.records import publish_table, write_record
from headrace.pipelines.selection.calibration import temperature_of
from headrace.pipelines.selection.cautions import grid_edges, hidden_classes, near_duplicates
from headrace.pipelines.selection.correction import CorrectedScore, assess_selection
from headrace.pipelines.selection.ensemble import Ensemble, build_ensemble
from headrace.pipelines.selection.ensemble_store import save_ensemble
from headrace.pipelines.selection.instance_weights import instance_weights, weighted_heads
from headrace.pipelines.selection.predictions import complete_heads, validation_rows
from headrace.pipelines.stages.extract import write_failed_images
from headrace.pipelines.stages.services import Services


def select(state: RunState, services: Services) -> RunState:
    """Return the state with the leaderboard and the selected model, both on disk.

    Raises NoWinner if no setting was trained in every fold.
    """
    services.release_client()  # nothing is trained from here on, so a cluster's jobs end
    # If several drivers work on one run, one at a time writes the tables.
    with services.timed("select") as report_done, lease(state.paths.conclusion_lock):
        task, metric, finetuned = state.dataset.train, state.metric, state.finetuned
        heads = collect_heads(state.paths.banks, state.plan, task.digest)
        if finetuned is not None and len(finetuned.rows):
            heads = pd.concat([heads, finetuned.rows], ignore_index=True)
        leaderboard = rank_heads(heads, metric, state.plan.input_widths, state.plan.n_folds)
        failed_images = write_failed_images(state)
        publish_table(
            state.paths.leaderboard, _text_inputs(leaderboard).to_csv(index=False).encode()
        )
        publish_table(state.paths.heads, _text_inputs(heads).to_parquet(index=False))
        try:
            winner = choose_winner(leaderboard, heads, metric)
        except NoWinner:
            # The winner on disk is an earlier call's, and not of this leaderboard.
            paths = state.paths
            withdraw(paths.winner, paths.ensemble, paths.predictions, paths.unit_predictions)
            raise
        selection = correct_for_selection(state, leaderboard)
        notes = (*state.notes, *_cautions(state, leaderboard))
        best_row = leaderboard.iloc[0]
        winner_temperature = temperature_of(best_row, task)
        _save_winner(state, best_row, winner.score, winner_temperature)
        ensemble = combine_heads(state, leaderboard)
        write_instance_weights(state, leaderboard, ensemble)
        report_done(f"{count_text(len(leaderboard), 'setting')} ranked")
    return replace(
        state,
        failed_images=failed_images,
        selected=RankedModels(heads, leaderboard, winner, winner_temperature, selection, ensemble),
        notes=notes if finetuned is None else (*notes, *finetuned.notes),
    )


def _save_winner(state: RunState, row: pd.Series, score: float, temperature: float) -> None:
    """Write the winner, trained on every training row, in place of an earlier winner: head.* for a
    head, network.* for a network.

    Raises ModelError for a network whose file is gone or damaged.
    """
    winner, task, rule = state.model_of(row), state.dataset.train, None
    if state.recipe.task.unit is not None:
        # The temperature was fitted on units, and their images have none, as in `save_ensemble`.
        floor = probability_floor(winner.spec, task.kind, len(task.classes))
        rule = UnitRule(state.recipe.task.unit, task.unit_aggregation, temperature, floor)
        temperature = 1.0
    metrics = {f"validation_{state.metric}": score}
    model = winner.load(task, metrics, temperature, rule, _image_parts(state))
    model.save(state.paths.winner)
    # A reader would take the files of an earlier winner of the other kind for this one's.
    for name in HEAD_FILES if winner.kind == "finetune" else NETWORK_FILES:
        (state.paths.winner / name).unlink(missing_ok=True)


def _cautions(state: RunState, board: pd.DataFrame) -> list[str]:
    """Return notes on this result, from stored predictions, features and a few images."""
    task = state.dataset.train
    validation = validation_rows(task, state.dataset.groups)
    final_heads = complete_heads(board)
    hidden_note = hidden_classes(final_heads, validation, state.metric)
    readable = state.samples.dropna(subset=["content"])[["content", "path"]].astype(str)
    duplicate_note = near_duplicates(
        task,
        state.dataset.test,
        state.feature_paths,
        dict(zip(readable["content"], readable["path"], strict=True)),
        state.recipe.images.pixel_range,
    )
    edge_notes = grid_edges(final_heads, state.metric)
    return [*edge_notes, *(note for note in (hidden_note, duplicate_note) if note is not None)]


def write_instance_weights(
    state: RunState, leaderboard: pd.DataFrame, ensemble: Ensemble | None
) -> None:
    """Write the weights of images in their units, by the selected ensemble or else by the best head
    that predicts units, if any.
    """
    task = state.dataset.train
    members = ensemble.members if ensemble is not None and ensemble.chosen else ()
    heads = weighted_heads(
        complete_heads(leaderboard), [(member.weight, member.row) for member in members]
    )
    if task.units is None or not heads:
        withdraw(state.paths.instance_weights)
        return
    weights = instance_weights(heads, dict(zip(task.ids, task.units, strict=True)))
    publish_table(
        state.paths.instance_weights, weights.to_csv(index=False, float_format="%.6g").encode()
    )


def correct_for_selection(state: RunState, leaderboard: pd.DataFrame) -> CorrectedScore | None:
    """Write and return the correction of the winner's score, from stored predictions."""
    validation = validation_rows(state.dataset.train, state.dataset.groups)
    input_halving = state.input_halving
    halving_luck = None
    best_taps = taps_of(leaderboard.iloc[0]["inputs"])
    if input_halving is not None and best_taps in input_halving.row_errors:
        image_errors = input_halving.row_errors[best_taps][validation.images]
        images_per_row = np.bincount(validation.row_of_image)
        row_errors = np.bincount(validation.row_of_image, image_errors) / images_per_row
        halving_luck = (input_halving.selection_luck, row_errors)
    selection = assess_selection(
        complete_heads(leaderboard), validation, state.metric, halving_luck=halving_luck
    )
    if selection is None:
        withdraw(state.paths.selection, state.paths.comparisons)
        return None
    setting_columns = ["rank", "inputs", "kind", "settings", state.metric]
    comparison_table = _text_inputs(leaderboard)[setting_columns].merge(
        selection.table, on="rank", how="left"
    )
    write_record(state.paths.selection, selection.summary())
    publish_table(state.paths.comparisons, comparison_table.to_csv(index=False).encode())
    return selection


def combine_heads(state: RunState, leaderboard: pd.DataFrame) -> Ensemble | None:
    """Write the ensemble as a model directory and return it, if the recipe asks for one."""
    ensemble_section, ensemble = state.recipe.ensemble, None
    if ensemble_section is not None:
        validation = validation_rows(state.dataset.train, state.dataset.groups)
        ensemble = build_ensemble(
            complete_heads(leaderboard), validation, state.metric, ensemble_section
        )
    if ensemble is None:
        withdraw(state.paths.ensemble)
        return None
    models = [state.model_of(member.row) for member in ensemble.members]
    unit_column, parts, train = state.recipe.task.unit, _image_parts(state), state.dataset.train
    save_ensemble(state.paths.ensemble, ensemble, models, train, unit_column, parts)
    return ensemble


def _image_parts(state: RunState) -> ImageParts | None:
    images = state.recipe.images
    source = images.source() if images.has_source else None
    return trained_parts(source, state.samples["path"].astype(str))


def withdraw(*results: Path) -> None:
    """Remove results of an earlier call."""
    for result_path in results:
        if result_path.is_dir():
            # Renamed first, so that no reader sees half of it.
            hidden_name = f".{result_path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
            result_path.rename(result_path.with_name(hidden_name))
            sync_directory(result_path.parent)
        else:
            result_path.unlink(missing_ok=True)
        # A process that dies after the rename leaves a name that nobody reads; the next withdrawal
        # removes it.
        for remains in result_path.parent.glob(f".{result_path.name}.*{PARTIAL_SUFFIX}"):
            if remains.is_dir():
                shutil.rmtree(remains, ignore_errors=True)


def _text_inputs(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(inputs=[" + ".join(inputs) for inputs in table["inputs"]])
