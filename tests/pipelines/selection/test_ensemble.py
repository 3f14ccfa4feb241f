"""The ensemble of a run: honest about itself, chosen only when it is better, stored as a model
directory.
"""

import json

import numpy as np
import pandas as pd
import pytest
from support.evidence import feature_inputs_of, store_taps, stored, task_of

from headrace.extract.spec import BackboneSpec
from headrace.heads.bank import BankJob, train_bank
from headrace.heads.data.task import Task, save_task
from headrace.heads.evaluate.metrics import score
from headrace.heads.evaluate.temperature import fit_temperature, with_temperature
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.persist import load_head
from headrace.heads.results import read_bank
from headrace.heads.spec import spec_to_json
from headrace.pipelines.models.image_parts import ImageParts
from headrace.pipelines.models.model import load_model
from headrace.pipelines.models.reference import model_ref
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.sections import EnsembleSection
from headrace.pipelines.selection.correction import nested_choice
from headrace.pipelines.selection.ensemble import Ensemble, Member, build_ensemble
from headrace.pipelines.selection.ensemble_store import save_ensemble
from headrace.pipelines.selection.predictions import stacked_predictions, validation_rows
from headrace.pipelines.stages.evaluate import evaluate_model

ROWS = 240


def independent_heads(rng, heads, strength):
    """Probabilities (K, N, 2) of heads whose errors are independent; at strength 0 they know
    nothing.
    """
    target = rng.integers(0, 2, ROWS)
    logit = strength * (2 * target - 1) + rng.normal(0, 1, (heads, ROWS))
    second = 1 / (1 + np.exp(-1.5 * logit))
    return target, [np.stack([1 - p, p], axis=1) for p in second]


@pytest.mark.parametrize("metric", ["accuracy", "log_loss", "auc"])
def test_heads_that_err_apart_are_combined(tmp_path, metric):
    """Better on rows that did not pick it, by an interval above 0, and so it is the
    selected model.
    """
    target, outputs = independent_heads(np.random.default_rng(0), 8, 0.8)
    board, task = stored(tmp_path, "single", metric, outputs, target)
    found = build_ensemble(board, validation_rows(task), metric, EnsembleSection())
    assert found.chosen
    assert found.gain_low > 0
    assert len(found.members) >= 4
    assert sum(member.weight for member in found.members) == pytest.approx(1)
    assert found.winner == pytest.approx(board[metric].iloc[0], abs=1e-6)
    assert found.low < found.value < found.high
    assert found.networks == ("b (00000000/44136fa3)",)


def test_heads_that_are_right_but_unsure_have_their_say(tmp_path):
    """Half of them tell which side an image is on and hardly how surely, as support vectors do:
    they are picked as if they had told honest probabilities, which is what their own temperatures
    make of them.
    """
    target, outputs = independent_heads(np.random.default_rng(0), 8, 0.8)
    board, task = stored(tmp_path, "single", "accuracy", outputs, target)
    honest = build_ensemble(board, validation_rows(task), "accuracy", EnsembleSection())
    (tmp_path / "unsure").mkdir()
    unsure = [
        with_temperature("single", each, 4.0 if k % 2 else 1.0) for k, each in enumerate(outputs)
    ]
    board, task = stored(tmp_path / "unsure", "single", "accuracy", unsure, target)
    found = build_ensemble(board, validation_rows(task), "accuracy", EnsembleSection())

    def unsure_share(ensemble):
        return sum(
            member.weight
            for member in ensemble.members
            if json.loads(member.row["spec"])["alpha"] % 2 == 0
        )

    assert unsure_share(found) == pytest.approx(unsure_share(honest), abs=0.15)
    assert found.value == pytest.approx(honest.value, abs=0.01)
    told = {
        int(json.loads(member.row["spec"])["alpha"]) - 1: member.temperature
        for member in found.members
    }
    assert max(told[k] for k in told if k % 2) < 0.5 * min(told[k] for k in told if not k % 2)


@pytest.mark.slow
def test_heads_that_know_nothing_are_not_combined(tmp_path):
    """Thirty of them, in five worlds: an ensemble fits their noise, its nested score knows that it is
    worth nothing, and it is never the selected model. The best single head is worth nothing either,
    though the leaderboard's winner looks better.
    """
    values, singles, winners = [], [], []
    for seed in range(5):
        target, outputs = independent_heads(np.random.default_rng(seed), 30, 0.0)
        board, task = stored(tmp_path, "single", "accuracy", outputs, target)
        found = build_ensemble(board, validation_rows(task), "accuracy", EnsembleSection())
        assert not found.chosen
        values.append(found.value)
        singles.append(found.single)
        winners.append(found.winner)
        held = validation_rows(task)
        inside = np.stack(
            [
                with_temperature(
                    "single",
                    outputs[int(json.loads(member.row["spec"])["alpha"]) - 1],
                    member.temperature,
                )
                for member in found.members
            ]
        )
        weights = [member.weight for member in found.members]
        assert (
            score("single", held.target, np.tensordot(weights, inside, 1)[held.images], "accuracy")
            > found.value
        )
    chance = 3 * 0.5 / np.sqrt(5 * ROWS)
    assert np.mean(values) == pytest.approx(0.5, abs=chance)
    assert np.mean(singles) == pytest.approx(0.5, abs=chance)
    assert np.mean(winners) > 0.5 + chance


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("single", "accuracy"), ("single", "log_loss"), ("multi", "auc"), ("regression", "rmse")],
)
def test_a_choice_is_nested_part_by_part(tmp_path, kind, metric):
    """Each part is predicted by the head that a plain loop finds best on the other parts, at the
    temperature that they give.
    """
    board, task = stored(tmp_path, kind, metric, rows=120)
    held = validation_rows(task)
    part = np.random.default_rng(1).integers(0, 5, len(held.images))
    nested = nested_choice(board, held, metric, part)
    predicted = dict(zip(*stacked_predictions(board, held), strict=True))
    for number in range(5):
        inside = part != number
        scores = {
            place: np.mean([score(kind, held.target[rows], own[rows], metric)
                            for rows in (inside & (held.fold == fold) for fold in range(4))])
            for place, own in predicted.items()
        }  # fmt: skip
        best = (min if metric in ("log_loss", "rmse") else max)(scores, key=scores.get)
        temperature = fit_temperature(kind, held.target[inside], predicted[best][inside])
        expected = with_temperature(kind, predicted[best][~inside], temperature)
        np.testing.assert_allclose(nested[~inside], expected, rtol=1e-6)


@pytest.mark.parametrize(("kind", "metric"), [("multi", "average_precision"), ("regression", "r2")])
def test_other_tasks(tmp_path, kind, metric):
    """Several labels, several numbers; two folds only, so that the parts are the ensemble's own."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, (ROWS, 2)) if kind == "multi" else rng.normal(size=(ROWS, 2))
    outputs = [target + rng.normal(0, 0.7, target.shape) for _ in range(6)]
    outputs = (
        [1 / (1 + np.exp(-4 * (each - 0.5))) for each in outputs] if kind == "multi" else outputs
    )
    board, task = stored(tmp_path, kind, metric, outputs, target, folds=2)
    found = build_ensemble(board, validation_rows(task), metric, EnsembleSection(max_members=4))
    assert found.chosen
    assert 1 < len(found.members) <= 4
    assert found.value == pytest.approx(found.metrics[metric], abs=0.05)


def test_the_same_call_gives_the_same_ensemble(tmp_path):
    """And one head makes none."""
    target, outputs = independent_heads(np.random.default_rng(0), 8, 0.8)
    board, task = stored(tmp_path, "single", "accuracy", outputs, target)
    first, again = (
        build_ensemble(board, validation_rows(task), "accuracy", EnsembleSection())
        for _ in range(2)
    )
    assert first.summary() == again.summary()
    assert (
        build_ensemble(board.head(1), validation_rows(task), "accuracy", EnsembleSection()) is None
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two banks on two taps: the task, the test rows, the feature sets, and rows of a
    leaderboard.
    """
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, ROWS)
    taps = {
        f"{name}.avg": np.eye(3)[target] @ rng.normal(size=(3, 6)) + rng.normal(0, 1.5, (ROWS, 6))
        for name in "ab"
    }
    directories = store_taps(folder / "cache", taps)
    whole = task_of(target)
    rows = np.arange(ROWS) < 180
    train, test = (Task(whole.kind, whole.classes, *[getattr(whole, name)[keep] for name in
                   ("ids", "content", "target", "fold", "weight")]) for keep in (rows, ~rows))  # fmt: skip
    save_task(train, folder / "task.npz")
    board = []
    for name, spec in (("a.avg", LogisticSpec(0.1)), ("b.avg", RidgeSpec(1.0))):
        path = str(folder / f"{name}.h5")
        train_bank(BankJob(str(folder / "task.npz"), (str(directories[name][0]),), (spec,), path))
        board.append(
            {
                "inputs": (name,),
                "kind": spec.kind,
                "settings": "",
                "spec": spec_to_json(spec),
                "path": path,
            }
        )
    return (
        folder,
        taps,
        directories,
        train,
        test,
        pd.DataFrame(board).assign(rank=[1, 2], accuracy=0.5, features=6),
    )


def combined(board, weights, metric="accuracy"):
    members = tuple(
        Member(weight, 0.5 + weight, row, ("b",))
        for weight, (_, row) in zip(weights, board.iterrows(), strict=True)
    )
    numbers = {"level": 0.95} | dict.fromkeys(
        (
            "value",
            "low",
            "high",
            "winner",
            "single",
            "gain",
            "gain_low",
            "gain_high",
            "probability_better",
        ),
        0.5,
    )
    return Ensemble(metric, members, 1.5, 2, 180, **numbers, chosen=True, metrics={metric: 0.5})


def models_of(ensemble, folder, directories, backbone=None):
    feature_inputs = feature_inputs_of(directories, backbone)
    return [model_ref(member.row, RunPaths(folder), feature_inputs) for member in ensemble.members]


def test_the_stored_ensemble_predicts_what_was_tested(trained):
    """From its directory alone: the members' heads, each at its own temperature, weights and
    temperature give the score on record. A second call reads the record, and another ensemble is
    another evaluation.
    """
    folder, taps, directories, train, test, board = trained
    backbone = BackboneSpec("torchvision:resnet18", weights="random:0")
    ensemble = combined(board, (0.25, 0.75))
    models = models_of(ensemble, folder, directories, backbone)
    parts = ImageParts(min_confidence=0.3)
    path = save_ensemble(folder / "ensemble", ensemble, models, train, image_parts=parts)
    assert load_model(path.parent).image_parts == parts
    described = json.loads(path.read_text())
    assert (described["format"], described["kind"], described["task_kind"]) == (
        2,
        "ensemble",
        "single",
    )
    heads = [(load_head(path.parent / member["model"]), member) for member in described["members"]]
    assert [head.backbones[0]["name"] for head, _ in heads] == ["torchvision:resnet18"] * 2
    assert [head.temperature for head, _ in heads] == [member["temperature"] for _, member in heads]
    mean = sum(
        member["weight"] * head.predict_proba(taps[member["inputs"][0]][180:].astype(np.float32))
        for head, member in heads
    )
    predicted = with_temperature("single", mean, described["temperature"])
    evaluations = folder / "evaluations.jsonl"

    def evaluated(ensemble):
        average = ensemble.average_of(models)
        return evaluate_model(evaluations, average, test, train.digest, ensemble.metric)

    result = evaluated(ensemble)
    assert result.metrics["accuracy"] == score("single", test.target, predicted, "accuracy")
    assert result.metrics["log_loss"] == pytest.approx(
        score("single", test.target, predicted, "log_loss"), rel=1e-5
    )
    assert evaluated(ensemble) == result
    assert len(evaluations.read_text().splitlines()) == 1
    assert evaluated(combined(board, (0.5, 0.5))).n_evaluations == 2


def test_members_that_left_are_removed(trained):
    """What lies in the directory is what ensemble.json names."""
    folder, _, directories, train, _, board = trained
    for ensemble in (combined(board, (0.25, 0.75)), combined(board.head(1), (1.0,))):
        models = models_of(ensemble, folder, directories)
        path = save_ensemble(folder / "smaller", ensemble, models, train)
    (member,) = json.loads(path.read_text())["members"]
    assert [each.name for each in (folder / "smaller" / "members").iterdir()] == [
        member["model"].split("/")[1]
    ]
    assert load_head(path.parent / member["model"]).spec == LogisticSpec(0.1)
    assert read_bank(board["path"][0]).task_digest == train.digest
