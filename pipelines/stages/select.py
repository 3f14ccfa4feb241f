"""The stage that selects a model: heads and networks are ranked on validation folds, the winner's
score is corrected for its selection, and an ensemble is tried.
"""

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from headrace.cache.atomic_io import PARTIAL_SUFFIX, lease, sync_directory
from headrace.cache.count_text import count_text
from headrace.heads.data.side_columns import taps_of
from headrace.heads.data.task import REFIT
from headrace.heads.evaluate.metrics import METRICS
from headrace.heads.results import read_bank
from headrace.heads.spec import spec_to_json
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.models.head import HEAD_FILES
from headrace.pipelines.models.image_parts import ImageParts, trained_parts
from headrace.pipelines.models.network import NETWORK_FILES
from headrace.pipelines.models.reference import ModelAverage
from headrace.pipelines.planning.leaderboard import NoWinner, choose_winner
from headrace.pipelines.planning.plan import Plan, bank_group
from headrace.pipelines.planning.run_state import RankedModels, RunState
from headrace.pipelines.recipe.finetune_spec import model_spec
from headrace.pipelines.recipe.settings_text import settings_text
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
        temperature = temperature_of(best_row, task)
        model = ModelAverage.of_one(state.model_of(best_row), temperature, task)
        _save_winner(state, model, winner.score)
        ensemble = combine_heads(state, leaderboard)
        if ensemble is not None and ensemble.chosen:
            model = ensemble.average_of([state.model_of(member.row) for member in ensemble.members])
        write_instance_weights(state, leaderboard, ensemble)
        report_done(f"{count_text(len(leaderboard), 'setting')} ranked")
    return replace(
        state,
        failed_images=failed_images,
        selected=RankedModels(heads, leaderboard, winner, selection, ensemble, model),
        notes=notes if finetuned is None else (*notes, *finetuned.notes),
    )


def collect_heads(banks_folder: Path, plan: Plan, task_digest: str) -> pd.DataFrame:
    """Return one row per head (spec × fold, and the refit on all rows) that the plan asks for and
    that has been trained.

    Columns: inputs (tuple of names), kind, spec (JSON), fold, the metrics, objective, gap,
    iterations, seconds, error, and path (its results file).
    """
    head_tables = []
    # Read once per group: scikit-learn estimators of different settings share one.
    tables_by_group: dict[str, pd.DataFrame] = {}
    for heads in plan.requested:
        group = bank_group(task_digest, heads, plan.fingerprints)
        spec_texts = {spec_to_json(spec) for spec in heads.specs}
        if group not in tables_by_group:
            tables_by_group[group] = _group_table(banks_folder, group)
        head_table = tables_by_group[group]
        if not len(head_table):
            continue
        head_table = head_table[head_table["spec"].isin(spec_texts)]
        # A spec that several files hold counts once: from the file where it failed least.
        is_failed = head_table["error"].notna()
        failures = is_failed.groupby([head_table["spec"], head_table["path"]]).sum().reset_index()
        best_files = failures.sort_values(["error", "path"]).drop_duplicates("spec")
        head_table = head_table.merge(best_files[["spec", "path"]], on=["spec", "path"])
        inputs = pd.Series([heads.inputs] * len(head_table), head_table.index, dtype=object)
        head_tables.append(head_table.assign(inputs=inputs))
    return pd.concat(head_tables, ignore_index=True) if head_tables else pd.DataFrame()


def _group_table(banks_folder: Path, group: str) -> pd.DataFrame:
    bank_tables = [
        read_bank(results_path).table.assign(path=str(results_path))
        for results_path in sorted(banks_folder.glob(f"{group}-*.h5"))
    ]
    filled_tables = [table for table in bank_tables if len(table)]
    return pd.concat(filled_tables, ignore_index=True) if filled_tables else pd.DataFrame()


def rank_heads(
    heads: pd.DataFrame, metric: str, input_widths: Mapping[str, int], n_folds: int
) -> pd.DataFrame:
    """Return the leaderboard, best first: by mean `metric` over validation folds; ties go to fewer
    features, then to the smaller log loss.

    Columns: rank, inputs, kind, settings, the metric's mean (named as the metric), standard_error
    (of that mean over folds), folds, features (how many numbers the head reads), train_seconds,
    failed (folds without a head, or where the metric is undefined), final (whether there is a refit
    on all rows: halving makes none of the settings that it stopped), spec, path.

    input_widths: numbers per image, by input.
    """
    fold_heads = heads[heads["fold"] != REFIT]
    # A regression has none, and no ties either.
    log_loss = "log_loss" if "log_loss" in heads else metric
    by_setting = fold_heads.assign(
        _complete=fold_heads["error"].isna() & fold_heads[metric].notna()
    ).groupby(["inputs", "spec"], sort=False)
    leaderboard = by_setting.agg(
        kind=("kind", "first"),
        **{metric: (metric, "mean")},
        standard_error=(metric, "sem"),
        folds=("fold", "size"),
        train_seconds=("seconds", "sum"),
        complete=("_complete", "sum"),
        path=("path", "first"),
        # On few images many strengths have the same accuracy, and the strongest regularization is
        # hardly surer than a guess.
        tie_break=(log_loss, "mean"),
    ).reset_index()
    leaderboard["failed"] = n_folds - leaderboard["complete"].astype(int)
    final_heads = heads[(heads["fold"] == REFIT) & heads["error"].isna()]
    final_keys = set(zip(final_heads["inputs"], final_heads["spec"], strict=True))
    leaderboard["final"] = [
        key in final_keys for key in zip(leaderboard["inputs"], leaderboard["spec"], strict=True)
    ]
    leaderboard["features"] = [
        sum(input_widths[name] for name in inputs) for inputs in leaderboard["inputs"]
    ]
    leaderboard["settings"] = [settings_text(model_spec(spec)) for spec in leaderboard["spec"]]
    # A spec that failed in any fold, or is not final, ranks after all others, because its mean is
    # over fewer folds or fewer epochs.
    leaderboard = leaderboard.sort_values(
        ["failed", "final", metric, "features", "tie_break", "spec"],
        ascending=[True, False, not METRICS[metric].higher_is_better, True, True, True],
        ignore_index=True,
    )
    leaderboard.insert(0, "rank", np.arange(1, len(leaderboard) + 1))
    columns = ["rank", "inputs", "kind", "settings", metric, "standard_error", "folds", "features"]
    return leaderboard[[*columns, "train_seconds", "failed", "final", "spec", "path"]]


def _save_winner(state: RunState, model: ModelAverage, score: float) -> None:
    """Write the winner, trained on every training row, in place of an earlier winner: head.* for a
    head, network.* for a network.

    Raises ModelError for a network whose file is gone or damaged.
    """
    ((_, temperature, winner),) = model.members
    task, rule = state.dataset.train, None
    if state.recipe.task.unit is not None:
        unit_column, aggregation = state.recipe.task.unit, task.unit_aggregation
        rule = UnitRule(unit_column, aggregation, model.temperature, model.floor)
    metrics = {f"validation_{state.metric}": score}
    loaded_winner = winner.load(task, metrics, temperature, rule, _image_parts(state))
    loaded_winner.save(state.paths.winner)
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
