"""The selected model of a run (the winner, or the ensemble if it is better), and its predictions of
the test split.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.heads.arrays import Array
from headrace.heads.data.side_columns import taps_of
from headrace.heads.data.task import Task
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.models.ensemble import ENSEMBLE_DESCRIPTION
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.model import ensemble_is_selected
from headrace.pipelines.models.reference import ModelAverage, ModelRef, WeightedModel
from headrace.pipelines.recipe.finetune_spec import model_spec
from headrace.pipelines.records import RunDamaged, read_record
from headrace.pipelines.selection.ensemble_store import member_name

JsonObject = Mapping[str, Any]


@dataclass(frozen=True)
class SelectedModel:
    """The selected model, and the record of its evaluation on the test split."""

    ensemble: JsonObject | None  # contents of ensemble.json; None: the winner is selected
    test_evaluation: JsonObject | None  # None: it was not evaluated on the test split
    damage: str = ""  # a sentence if the record that says which model is selected is damaged

    @property
    def name(self) -> str:
        """Its name in a sentence."""
        if self.damage:
            return "the selected model"
        return "the winner" if self.ensemble is None else "the ensemble"

    @property
    def heads(self) -> str:
        """Its members in words, such as "2 heads and 1 network"."""
        if self.ensemble is None:
            return "the winner"
        kinds = [member["kind"] for member in self.ensemble["members"]]
        networks = kinds.count("finetune")
        heads = len(kinds) - networks
        counts = ((heads, "head"), (networks, "network"))
        return " and ".join(count_text(count, word) for count, word in counts if count)


def find_selected(run: FinishedRun) -> SelectedModel:
    """Return the selected model of the run's last call."""
    try:
        if not ensemble_is_selected(run.paths):
            return SelectedModel(None, run.winner_evaluation)
    # One damaged record does not cost the page, but the winner's score must not stand in its place.
    except (ModelError, RunDamaged) as error:
        return SelectedModel(None, None, damage=str(error))
    ensemble = read_record(run.paths.ensemble / ENSEMBLE_DESCRIPTION)
    if "unit_rule" in ensemble:  # a temperature of units is stored with their rule
        ensemble["temperature"] = ensemble["unit_rule"]["temperature"]
    evaluation = run.current_evaluation(
        lambda model: _is_ensemble(model, ensemble, run.bank.task_digest)
    )
    return SelectedModel(ensemble, evaluation)


def _is_ensemble(identity: JsonObject, ensemble: JsonObject, task: str) -> bool:
    """Return whether the model of a recorded evaluation, by its identity, is this ensemble."""
    if (
        "ensemble" not in identity
        or identity["train"] != task
        or identity["temperature"] != ensemble["temperature"]
    ):
        return False
    recorded = [
        (member_name(member["bank"], member["spec"]), member["weight"], member["temperature"])
        for member in identity["ensemble"]
    ]
    return recorded == [
        (member["model"], member["weight"], member.get("temperature", 1.0))
        for member in ensemble["members"]
    ]


@dataclass(frozen=True)
class TestPredictions:
    """The selected model's predictions of the test split, as in its recorded evaluation."""

    test: Task
    target: Array  # (n, ...) of the rows that were scored: images, or units
    predicted: Array  # (n, C) of these rows
    of_images: Array  # (N, C) of the images; without temperature if units were scored


def test_predictions(run: FinishedRun, selected: SelectedModel) -> TestPredictions | str:
    """Return the selected model's predictions of the test split, or a text that says why not.

    They are made only for a model whose evaluation is on record, and on the rows of that record, so
    that a report adds no evaluation of the test split.
    """
    if selected.damage:
        return selected.damage
    evaluation = selected.test_evaluation
    if evaluation is None:
        return f"{selected.name} has not been shown the test split"
    if isinstance(run.images, str):
        return run.images
    test = run.images.dataset.test
    identity = evaluation["winner"]
    # Scores on other images would be an evaluation that is not on record.
    if identity["test"] != test.digest:
        return f"the test images have changed since {selected.name} was shown them"
    try:
        if selected.ensemble is None:
            temperature = evaluation.get("temperature", 1.0)
            model = ModelAverage.of_one(_recorded_model(run, identity), temperature, test)
        else:
            members = (
                WeightedModel(
                    member["weight"], member.get("temperature", 1.0), _recorded_model(run, member)
                )
                for member in identity["ensemble"]
            )
            model = ModelAverage(tuple(members), identity["temperature"])
        target, predicted, of_images = model.predict_scored(test, trust_code=run.trust_code)
    # A page without the test images is still a page.
    except (HeadraceError, OSError, KeyError) as error:
        return f"the predictions of the test images cannot be made again: {error}"
    return TestPredictions(test, target, predicted, of_images)


def _recorded_model(run: FinishedRun, recorded: JsonObject) -> ModelRef:
    """Return the head or network that an evaluation's record names."""
    kind = model_spec(recorded["spec"]).kind
    reads_images = kind == "finetune"  # and no features
    folder = run.paths.finetune if reads_images else run.paths.banks
    inputs = tuple(recorded["inputs"])
    taps = () if reads_images else taps_of(inputs)
    return ModelRef(
        kind=kind,
        spec=recorded["spec"],
        results_path=folder / recorded["bank"],
        inputs=inputs,
        run=run.paths,
        feature_paths=tuple(view.path for name in taps for view in run.open_features(name)),
    )
