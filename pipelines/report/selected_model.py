"""What the run answers with, the winner or the ensemble whose gain has an interval above 0, and how
it did on the test split.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import Task
from headrace.heads.evaluate.ensemble import average
from headrace.heads.predict import tempered
from headrace.heads.spec import spec_from_json
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.models.model import ENSEMBLE, ensemble_is_selected
from headrace.pipelines.records import read_record
from headrace.pipelines.selection.winner import predict_test

Found = Mapping[str, Any]


@dataclass(frozen=True)
class SelectedModel:
    """The selected model, and the record of its being shown the test split."""

    ensemble: Found | None  # what ensemble.json says, where the ensemble is the selected model
    test_evaluation: Found | None  # None: it has not been shown the test split

    @property
    def name(self) -> str:
        """As a sentence names it."""
        return "the winner" if self.ensemble is None else "the ensemble"

    @property
    def heads(self) -> str:
        """What it consists of, in a few words."""
        if self.ensemble is None:
            return "the winner"
        kinds = [member["kind"] for member in self.ensemble["members"]]
        networks = kinds.count("finetune")
        heads = len(kinds) - networks
        words = [
            f"{count} {word}{'s' if count > 1 else ''}"
            for count, word in ((heads, "head"), (networks, "network"))
            if count
        ]
        return " and ".join(words)


def find_selected(run: FinishedRun) -> SelectedModel:
    """The selected model of the run's last call."""
    if not ensemble_is_selected(run.paths):
        return SelectedModel(None, run.winner_evaluation)
    ensemble = read_record(run.paths.ensemble / ENSEMBLE)
    own = [
        evaluation
        for evaluation in run.test_evaluations
        if _is_ensemble(evaluation["winner"], ensemble, run.bank.task)
    ]
    return SelectedModel(ensemble, own[-1] if own else None)


def _is_ensemble(shown: Found, ensemble: Found, task: str) -> bool:
    if (
        "ensemble" not in shown
        or shown["train"] != task
        or shown["temperature"] != ensemble["temperature"]
    ):
        return False
    # As the ensemble's members are named where they are stored.
    names = [
        hashlib.sha256(f"{each['bank']} {each['spec']}".encode()).hexdigest()[:16]
        for each in shown["ensemble"]
    ]
    recorded = [
        (f"members/{name}", each["weight"], each.get("temperature", 1.0))
        for name, each in zip(names, shown["ensemble"], strict=True)
    ]
    return recorded == [
        (member["model"], member["weight"], member.get("temperature", 1.0))
        for member in ensemble["members"]
    ]


def test_predictions(
    run: FinishedRun, selected: SelectedModel
) -> tuple[Task, npt.NDArray[Any], npt.NDArray[Any]] | str:
    """The test task, the targets (n,) and the selected model's predictions (n, C) of its rows: what
    its evaluation has scored.

    Only for a model whose evaluation is on record, on the very rows of that record: nothing new
    is learned of the test split. Otherwise the reason why not.
    """
    evaluation = selected.test_evaluation
    if evaluation is None:
        return f"{selected.name} has not been shown the test split"
    if isinstance(run.images, str):
        return run.images
    test = run.images.dataset.test
    if evaluation["winner"]["test"] != test.digest:
        return f"the test images have changed since {selected.name} was shown them"
    shown = evaluation["winner"]
    lone = {**shown, "temperature": evaluation.get("temperature", 1.0)}
    members = shown.get("ensemble", [lone])
    try:
        found = [_predict(run, member, test) for member in members]
    except (HeadraceError, OSError, KeyError) as error:
        return f"the predictions of the test images cannot be made again: {error}"
    target, predicted = found[0]
    if selected.ensemble is not None:
        weights = np.array([member["weight"] for member in members])
        mean = average(weights, np.stack([own for _, own in found]))
        predicted = tempered(mean, test.kind, shown["temperature"])
    return test, target, predicted


def _predict(
    run: FinishedRun, member: Found, test: Task
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Targets and predictions of one head or network of an evaluation's record, at its
    temperature.
    """
    kind = spec_from_json(member["spec"]).kind
    network = kind == "finetune"  # reads the images, no features
    path = (run.paths.finetune if network else run.paths.banks) / member["bank"]
    names = [] if network else member["inputs"]
    features = [view for name in names for view in run.open_features(name)]
    row = pd.Series({"kind": kind, "spec": member["spec"], "path": str(path)})
    own = member.get("temperature", 1.0)
    return predict_test(row, features, test, temperature=own, trust_code=run.trust_code)
