"""Successive halving of inputs: linear heads on few images for every input, on more for the best.

Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization", with the share of the images as the resource. Inputs are compared on validation
folds of the training rows alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import numpy as np

from headrace.heads.arrays import Array, Doubles, Index
from headrace.heads.bank import BankJob
from headrace.heads.data.side_columns import taps_of
from headrace.heads.data.task import Task
from headrace.pipelines.recipe.sections import InputHalvingSection
from headrace.pipelines.selection.correction import choice_luck
from headrace.pipelines.selection.learning_curves import learning_curve, linear_specs

Inputs = tuple[str, ...]


@dataclass(frozen=True)
class InputHalving:
    """Outcome of a successive halving of inputs."""

    selected_inputs: tuple[Inputs, ...]
    # for each round the share of the images, and the mean error of each input
    rounds: tuple[tuple[float, Mapping[Inputs, float]], ...]
    # see `_selection_luck`; a difference of error rates, >= 0
    selection_luck: float = 0.0
    # errors (rows of the task,) of each input in its first round; nan where a row is not held out
    row_errors: Mapping[Inputs, Doubles] = field(default_factory=dict, compare=False)


def halve_inputs(
    candidate_inputs: Sequence[Inputs],
    task: Task,
    feature_paths: Mapping[str, Sequence[Path]],
    section: InputHalvingSection,
    results_folder: Path,
    train_all: Callable[[Sequence[BankJob]], None],
    groups: Array | None = None,
) -> InputHalving:
    """Train linear heads on a share of the images for each input, round by round, and drop the
    worst inputs after each round.

    candidate_inputs: names of feature sets that a head reads side by side. Inputs with a map take
    no part: they are always selected.
    results_folder: where the trained banks stay; a second call trains nothing.
    train_all: trains bank jobs, for example on a cluster.
    groups: (rows of the task,) as in `learning_curve`.
    """
    # Inputs with and without side columns are one candidate, measured by its taps alone.
    unique_inputs = list(dict.fromkeys(taps_of(inputs) for inputs in candidate_inputs))
    remaining = [
        inputs for inputs in unique_inputs if not any(name.endswith(".map") for name in inputs)
    ]
    map_inputs = [inputs for inputs in unique_inputs if inputs not in remaining]
    rounds = []
    row_errors: dict[Inputs, Doubles] = {}
    for sample_fraction in section.sample_fractions:
        if len(remaining) <= section.min_inputs:
            break
        mean_errors = {}
        for inputs in remaining:
            curve = learning_curve(
                task,
                [path for name in inputs for path in feature_paths[name]],
                linear_specs(task),
                results_folder,
                train_all,
                groups=groups,
                fractions=(sample_fraction,),
            )
            mean_errors[inputs] = float(curve.errors[0])
            if inputs not in row_errors:
                row_errors[inputs] = np.full(len(task.fold), np.nan)
                row_errors[inputs][curve.rows] = curve.wrong[0]
        rounds.append((sample_fraction, mean_errors))
        # Ties go to the input of fewer feature sets, then to the recipe's order (a stable sort).
        ranked = sorted(remaining, key=lambda inputs: (mean_errors[inputs], len(inputs)))
        n_kept = max(section.min_inputs, ceil(section.keep_fraction * len(remaining)))
        remaining = [inputs for inputs in remaining if inputs in ranked[:n_kept]]
    group_codes = np.unique(task.content if groups is None else groups, return_inverse=True)[1]
    selection_luck = _selection_luck(row_errors, remaining, task, group_codes)
    return InputHalving((*remaining, *map_inputs), tuple(rounds), selection_luck, row_errors)


def _selection_luck(
    row_errors: Mapping[Inputs, Doubles],
    selected_inputs: Sequence[Inputs],
    task: Task,
    group_codes: Index,
) -> float:
    """Return `choice_luck` of choosing among all inputs less that of choosing among the selected
    ones, which is corrected when the winner is chosen; >= 0.
    """
    if len(row_errors) <= len(selected_inputs):
        return 0.0
    error_table = np.stack(list(row_errors.values()))
    measured_rows = np.isfinite(error_table).all(0)
    is_selected = np.array([inputs in selected_inputs for inputs in row_errors])
    luck_of_all, luck_of_selected = (
        choice_luck(
            -error_table[input_mask][:, measured_rows],
            task.fold[measured_rows],
            group_codes[measured_rows],
        )
        for input_mask in (np.ones_like(is_selected), is_selected)
    )
    # By chance of the resamples the difference can be a little below 0.
    return max(0.0, luck_of_all - luck_of_selected)
