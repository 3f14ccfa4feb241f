"""Successive halving across feature sets and sizes of training data: all inputs start on few
images, the promising go on.

Jamieson and Talwalkar 2016, with the share of the images as the resource. Which inputs stay depends
on validation folds of the training rows alone, as everything that chooses does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.bank import BankJob
from headrace.heads.data.task import Task
from headrace.pipelines.planning.plan import Plan
from headrace.pipelines.recipe.sections import ScreenSection
from headrace.pipelines.selection.correction import choice_luck
from headrace.pipelines.selection.learning_curves import learning_curve, linear_specs

Inputs = tuple[str, ...]


@dataclass(frozen=True)
class Screening:
    """Which inputs went on, and what each round said."""

    kept: tuple[Inputs, ...]
    # share of the images, error of each input that took part
    rounds: tuple[tuple[float, Mapping[Inputs, float]], ...]
    # by how much the error of the best of all inputs is luckier than that of the best of the kept
    # ones
    luck: float = 0.0
    # (rows of the task,) of each input in the first round, nan where a row is not held out
    wrong: Mapping[Inputs, npt.NDArray[np.float64]] = field(default_factory=dict, compare=False)


def screen_inputs(
    wanted: Sequence[Inputs],
    task: Task,
    directories: Mapping[str, Sequence[Path]],
    section: ScreenSection,
    folder: Path,
    train_all: Callable[[Sequence[BankJob]], None],
    groups: npt.NDArray[Any] | None = None,
) -> Screening:
    """Linear heads on a share of the images for each input; the best share of the inputs goes on to
    the next round.

    groups: as in `learning_curve`. Inputs with a map are not screened: they stay. Results are kept
    in `folder`; a second call trains nothing.
    """
    alive = [
        inputs
        for inputs in dict.fromkeys(wanted)
        if not any(name.endswith(".map") for name in inputs)
    ]
    maps = [inputs for inputs in dict.fromkeys(wanted) if inputs not in alive]
    rounds = []
    wrong: dict[Inputs, npt.NDArray[np.float64]] = {}
    for fraction in section.images:
        if len(alive) <= section.least:
            break
        errors = {}
        for inputs in alive:
            features = [path for name in inputs for path in directories[name]]
            curve = learning_curve(
                task,
                features,
                linear_specs(task),
                folder,
                train_all,
                groups=groups,
                fractions=(fraction,),
            )
            errors[inputs] = float(curve.errors[0])
            if inputs not in wrong:
                wrong[inputs] = np.full(len(task.fold), np.nan)
                wrong[inputs][curve.rows] = curve.wrong[0]
        rounds.append((fraction, errors))
        # A tie goes to the narrower input, then to the recipe's order.
        ranked = sorted(alive, key=lambda inputs: (errors[inputs], len(inputs)))
        most = max(section.least, ceil(section.keep * len(alive)))
        alive = [inputs for inputs in alive if inputs in ranked[:most]]
    together = np.unique(task.content if groups is None else groups, return_inverse=True)[1]
    luck = _luck(wrong, alive, task, together)
    return Screening((*alive, *maps), tuple(rounds), luck, wrong)


def _luck(
    wrong: Mapping[Inputs, npt.NDArray[np.float64]],
    kept: Sequence[Inputs],
    task: Task,
    groups: npt.NDArray[np.int64],
) -> float:
    if len(wrong) <= len(kept):
        return 0.0
    table = np.stack(list(wrong.values()))
    held = np.isfinite(table).all(0)
    stayed = np.array([inputs in kept for inputs in wrong])
    luck = [
        choice_luck(-table[part][:, held], task.fold[held], groups[held])
        for part in (np.ones_like(stayed), stayed)
    ]
    return max(0.0, luck[0] - luck[1])


def screened_plan(plan: Plan, kept: Sequence[Inputs]) -> Plan:
    """The plan with the heads on these inputs only."""
    wanted = tuple(each for each in plan.wanted if each.inputs in kept)
    banks = tuple(bank for bank in plan.banks if bank.inputs in kept)
    return replace(
        plan,
        wanted=wanted,
        banks=banks,
        heads_total=plan.folds * sum(len(each.specs) for each in wanted),
        heads_new=plan.folds * sum(len(bank.specs) for bank in banks),
    )
