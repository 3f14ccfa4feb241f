"""A run that fine-tunes: candidates in order of gain per hour, the budget kept, rollback, rows on
the board, the network as winner.
"""

import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from dask.distributed import Client
from rich.console import Console
from support import forks
from support.evidence import feature_inputs_of
from support.networks import LOGISTIC, SMALL, WEAK_HEAD_RECIPE, Case, make_case
from support.runs import headrace, make_photos

from headrace.cache.errors import HeadraceError
from headrace.heads.evaluate.metrics import score
from headrace.heads.evaluate.temperature import with_temperature
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.neighbors.kind import KNNSpec
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.results import read_bank
from headrace.pipelines.cluster.submit import Outcome, TaskOptions, is_machine_fault
from headrace.pipelines.cluster.task_log import read_log
from headrace.pipelines.finetune import stage as stage_module, task as task_module
from headrace.pipelines.finetune.candidates import (
    PilotResult,
    list_candidates,
    predicted_gain,
    training_seconds,
)
from headrace.pipelines.finetune.stage import (
    FinetuneInputs,
    compare_with_head,
    finetune_candidates,
)
from headrace.pipelines.finetune.train import Training
from headrace.pipelines.models.model import load_model
from headrace.pipelines.models.reference import model_ref, paths_of_content
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.load import RecipeError
from headrace.pipelines.recipe.sections import FinetuneSection, ReuseSection
from headrace.pipelines.records import read_record
from headrace.pipelines.run_directory import results_file
from headrace.pipelines.selection.ensemble import Ensemble, Member
from headrace.pipelines.selection.ensemble_store import save_ensemble
from headrace.pipelines.stages.evaluate import evaluate_model
from headrace.pipelines.stages.select import rank_heads

QUIET = Console(quiet=True)


pytestmark = pytest.mark.usefixtures("one_thread")


class HereClient:
    """Stands for a Dask client whose only worker is this process."""

    def nthreads(self) -> dict[str, int]:
        return {"here": 1}


def no_client() -> Client:
    raise AssertionError("nothing is to be trained, so no worker is needed")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks run in this process, one after the other; the keys of those that ran."""
    keys: list[str] = []

    def run_tasks(
        _client: object, function: Any, jobs: Any, *, options: TaskOptions
    ) -> Iterator[Outcome[Any, Any]]:
        assert options.leases is not None
        for key, job in jobs:
            keys.append(key)
            try:
                yield Outcome(job, function(job), None)
            except Exception as error:  # noqa: BLE001
                yield Outcome(
                    job,
                    None,
                    f"{type(error).__name__}: {error}",
                    machine_fault=is_machine_fault(error),
                )

    monkeypatch.setattr(stage_module, "run_tasks", run_tasks)
    return keys


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("stage"))


def board_of(case: Case, *heads: tuple[Any, tuple[str, ...]]) -> pd.DataFrame:
    """The leaderboard of these heads."""
    tables = []
    for spec, taps in heads:
        path = case.bank(spec, *taps)
        table = read_bank(path).table
        tables.append(table.assign(path=path, inputs=pd.Series([taps] * len(table), dtype=object)))
    widths = dict.fromkeys(case.directories, 1)
    return rank_heads(pd.concat(tables, ignore_index=True), "log_loss", widths, 2)


def inputs_of(case: Case, out: Path) -> FinetuneInputs:
    paths = RunPaths(out)
    paths.task(case.task.digest).parent.mkdir(parents=True)
    paths.task(case.task.digest).write_bytes((case.root / "task.npz").read_bytes())
    images = pd.DataFrame(
        read_record(case.root / "images.json")["paths"].items(), columns=["content", "path"]
    )
    feature_inputs = feature_inputs_of(case.directories, SMALL)
    return FinetuneInputs(paths, case.task, "log_loss", feature_inputs, images, "cpu")


SECTION = FinetuneSection(train_above=("layer3",), epochs=3, learning_rate=(1e-3,), batch_size=16)
WEAK = LogisticSpec(C=1e-4)  # leaves much to gain


@pytest.mark.slow
def test_what_is_better_is_kept_and_what_is_not_is_rolled_back(
    case: Case, tmp_path: Path, here: list[str]
) -> None:
    """Compared on the same rows: a head with much to gain becomes a network, a rate of nothing
    leaves the head.
    """
    board = board_of(case, (WEAK, ("layer4.avg",)))
    section = SECTION.model_copy(update={"learning_rate": (1e-3, 1e-12)})
    inputs = inputs_of(case, tmp_path)
    result = finetune_candidates(inputs, board, section, HereClient, QUIET, TaskOptions())  # type: ignore[arg-type]
    compared = result.compared.set_index("settings")["decision"].to_dict()
    assert [decision for text, decision in compared.items() if "lr=0.001" in text] == ["kept"]
    assert [decision for text, decision in compared.items() if "lr=1e-12" in text] == [
        "rolled back"
    ]
    assert result.compared["log_loss"].notna().all()
    assert (result.compared["low"] <= result.compared["log_loss"]).all()
    ranked = rank_heads(
        pd.concat([_heads(board), result.rows]), "log_loss", dict.fromkeys(case.directories, 1), 2
    )
    assert ranked.iloc[0]["kind"] == "finetune"
    assert ranked.iloc[0]["final"]
    assert not ranked.iloc[-1]["final"], (
        "what was rolled back ranks last: there is no network on all rows"
    )
    assert result.rows["error"].isna().all()
    kept = next(
        one
        for one in list_candidates(board, section, inputs.feature_inputs)[0]
        if one.spec.learning_rate == 1e-3
    )
    assert (inputs.paths.finetune_model(kept.key) / "network.safetensors").exists()
    again = compare_with_head(inputs, kept)
    assert again["gain"] > 0
    assert again["gain_low"] <= again["gain"] <= again["gain_high"]
    ran = len(here)
    repeated = finetune_candidates(inputs, board, section, no_client, QUIET, TaskOptions())
    assert len(here) == ran, "a second call trains nothing and looks at no network"
    pd.testing.assert_frame_equal(repeated.compared, result.compared)


def _heads(board: pd.DataFrame) -> pd.DataFrame:
    parts = []
    for _, row in board.iterrows():
        table = read_bank(row["path"]).table
        parts.append(
            table.assign(
                path=row["path"], inputs=pd.Series([row["inputs"]] * len(table), dtype=object)
            )
        )
    return pd.concat(parts, ignore_index=True)


def test_an_ensemble_with_a_network_is_shown_the_test_split_and_can_be_taken_away(
    case: Case, tmp_path: Path, here: list[str]
) -> None:
    """What is on record is the members' weighted mean, the network's part from the images; the
    stored directory predicts the same.
    """
    inputs = inputs_of(case, tmp_path)
    test = dataclasses.replace(
        case.task, ids=case.task.ids[::3], content=case.task.content[::3], target=case.task.target[::3],
        fold=case.task.fold[::3], weight=case.task.weight[::3],
    )  # fmt: skip
    board = board_of(case, (WEAK, ("layer4.avg",)))
    finetuned = finetune_candidates(inputs, board, SECTION, HereClient, QUIET, TaskOptions())  # type: ignore[arg-type]
    ranked = rank_heads(
        pd.concat([_heads(board), finetuned.rows]),
        "log_loss",
        dict.fromkeys(case.directories, 1),
        2,
    )
    assert set(ranked["kind"]) == {"logistic", "finetune"}
    weights = {"logistic": 0.25, "finetune": 0.75}
    members = tuple(
        Member(weights[row["kind"]], 0.8, row, ("a network",)) for _, row in ranked.iterrows()
    )
    numbers = dict.fromkeys(
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
            "level",
        ),
        0.5,
    )
    ensemble = Ensemble("log_loss", members, 1.3, 2, 48, **numbers, chosen=True, metrics={})  # type: ignore[arg-type]
    evaluations = tmp_path / "evaluations.jsonl"
    models = [model_ref(member.row, inputs.paths, inputs.feature_inputs) for member in members]
    average = ensemble.average_of(models)
    shown = evaluate_model(evaluations, average, test, case.task.digest, "log_loss")
    mean = np.zeros((len(test.ids), 2))
    for member, model in zip(members, models, strict=True):
        mean += member.weight * with_temperature("single", model.predict_rows(test)[1], 0.8)
    expected = with_temperature("single", mean, 1.3)
    assert shown.metrics["log_loss"] == pytest.approx(
        score("single", test.target, expected, "log_loss"), rel=1e-6
    )
    assert shown.images == len(test.ids)
    assert len(evaluations.read_text().splitlines()) == 1
    stored = save_ensemble(tmp_path / "ensemble", ensemble, models, case.task)
    assert sum((stored.parent / one["model"] / "network.safetensors").exists()
               for one in json.loads(stored.read_text())["members"]) == 1  # fmt: skip
    taken = load_model(stored.parent).predict_proba(
        paths_of_content(case.root / "images.json", test.content)
    )
    np.testing.assert_allclose(taken, expected, atol=2e-3)


def test_the_budget_is_kept_and_a_larger_one_is_used(
    case: Case, tmp_path: Path, here: list[str]
) -> None:
    """No fold is trained that the budget has no room for; with more of it, the same
    call goes on.
    """
    board = board_of(case, (WEAK, ("layer4.avg",)))
    inputs = inputs_of(case, tmp_path)
    poor = SECTION.model_copy(update={"budget_minutes": 1e-9})
    result = finetune_candidates(inputs, board, poor, HereClient, QUIET, TaskOptions())  # type: ignore[arg-type]
    assert result.compared["decision"].tolist() == ["", "over budget"]
    assert result.trained == 0
    assert [key for key in here if not key.startswith("pilot")] == []
    finetune_candidates(inputs, board, poor, no_client, QUIET, TaskOptions())
    rich = SECTION.model_copy(update={"budget_minutes": 10.0})
    result = finetune_candidates(inputs, board, rich, HereClient, QUIET, TaskOptions())  # type: ignore[arg-type]
    assert result.compared["decision"].tolist() == ["", "kept"]
    assert result.trained == 1
    assert result.compared["minutes"].iloc[1] < 10


def test_partial_reuse_is_compared_from_both_starts(
    case: Case, tmp_path: Path, here: list[str]
) -> None:
    """The blocks above the cut, pretrained and drawn anew, under a new head: two rows beside the
    head's.
    """
    board = board_of(case, (WEAK, ("layer4.avg",)))
    section = SECTION.model_copy(
        update={
            "top_k": 0,
            "reuse": (ReuseSection(train_above="layer3", inputs=("layer4.avg",), hidden=(8,)),),
        }
    )
    result = finetune_candidates(
        inputs_of(case, tmp_path), board, section, HereClient, QUIET, TaskOptions()
    )  # type: ignore[arg-type]
    assert result.compared["approach"].tolist() == ["head", "partial reuse", "partial reuse"]
    assert {
        "pretrained" in text or "random" in text for text in result.compared["settings"][1:]
    } == {True}
    assert result.compared["log_loss"].notna().all()
    wrong = SECTION.model_copy(
        update={"reuse": (ReuseSection(train_above="layer3", inputs=("layer9.avg",)),)}
    )
    with pytest.raises(RecipeError, match="which no backbone gives"):
        list_candidates(board, wrong, feature_inputs_of(case.directories, SMALL))


def test_a_failure_is_a_row_and_the_head_stays(
    case: Case, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that ends in NaN: a failed row with its reason, and the best head still leads the
    board. The next call leaves it so; asked to try what failed again, it trains the folds that are
    missing.
    """
    board = board_of(case, (WEAK, ("layer4.avg",)))
    inputs = inputs_of(case, tmp_path)

    def fails(_training: Training, _epoch: int) -> float:
        raise HeadraceError(
            "the training loss of epoch 1 is not finite: lower learning_rate (it is 0.001)"
        )

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_train_epoch", fails)
        result = finetune_candidates(inputs, board, SECTION, HereClient, QUIET, TaskOptions())  # type: ignore[arg-type]
    ranked = rank_heads(
        pd.concat([_heads(board), result.rows]), "log_loss", dict.fromkeys(case.directories, 1), 2
    )
    assert ranked["kind"].tolist() == ["logistic", "finetune"]
    assert ranked["failed"].tolist() == [0, 2]
    assert result.compared["decision"].tolist() == ["", "failed"]
    assert any("lower learning_rate" in note for note in result.notes)
    assert read_bank(board.iloc[0]["path"]).table["error"].isna().all()
    ran = len(here)
    again = finetune_candidates(inputs, board, SECTION, no_client, QUIET, TaskOptions())
    assert len(here) == ran, "a failure is not tried again unasked"
    pd.testing.assert_frame_equal(again.compared, result.compared)
    result = finetune_candidates(
        inputs, board, SECTION, HereClient, QUIET, TaskOptions(), retry_failed=True
    )  # type: ignore[arg-type]
    assert result.compared["decision"].tolist() == ["", "kept"]
    assert result.rows["error"].isna().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pilot", "train_fold"])
def test_a_full_disk_decides_nothing(
    case: Case, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In a pilot and in a fold: the run ends with the reason, and the next call decides as if
    nothing had been.
    """
    board, inputs = board_of(case, (WEAK, ("layer4.avg",))), inputs_of(case, tmp_path)

    def full(_job: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(task_module, name, full)
        with pytest.raises(HeadraceError, match="No space left on device"):
            finetune_candidates(inputs, board, SECTION, HereClient, QUIET, TaskOptions())  # type: ignore[arg-type]
    assert not inputs.paths.finetune_decisions.exists()
    result = finetune_candidates(inputs, board, SECTION, HereClient, QUIET, TaskOptions())  # type: ignore[arg-type]
    assert result.compared["decision"].tolist() == ["", "kept"]


def test_a_rate_that_is_far_too_large_is_told(case: Case, tmp_path: Path, here: list[str]) -> None:
    """Where already the pilot's steps end in NaN, nothing is trained, and the note says what to
    lower.
    """
    board = board_of(case, (WEAK, ("layer4.avg",)))
    section = SECTION.model_copy(
        update={"learning_rate": (1e30,), "grad_clip_norm": 1e30, "warmup_fraction": 0.0}
    )
    inputs = inputs_of(case, tmp_path)
    result = finetune_candidates(inputs, board, section, HereClient, QUIET, TaskOptions())  # type: ignore[arg-type]
    assert result.compared["decision"].tolist()[1] in ("failed", "refused")
    assert any("lower learning_rate" in note for note in result.notes)


def test_a_network_that_is_not_the_heads_is_refused_on_record(
    case: Case, tmp_path: Path, here: list[str]
) -> None:
    """The parity check stands before training: another mean, and nothing is trained; the reason is
    on record.
    """
    board = board_of(case, (WEAK, ("layer4.avg",)))
    other = dataclasses.replace(SMALL, mean=(0.4, 0.4, 0.4))
    inputs = dataclasses.replace(
        inputs_of(case, tmp_path), feature_inputs=feature_inputs_of(case.directories, other)
    )
    result = finetune_candidates(inputs, board, SECTION, HereClient, QUIET, TaskOptions())  # type: ignore[arg-type]
    assert result.compared["decision"].tolist() == ["", "refused"]
    assert any("preprocessing" in note for note in result.notes)
    assert not [key for key in here if not key.startswith("pilot")]
    record = read_record(inputs.paths.finetune_decisions)
    assert [one["decision"] for one in record.values()] == ["refused"]


def test_candidates_are_what_the_recipe_asks_for(case: Case) -> None:
    """The best heads, one of each inputs and kind, above each node; those without gradients are
    told and passed over.
    """
    board = board_of(
        case,
        (LOGISTIC, ("layer4.avg",)),
        (LogisticSpec(C=0.5), ("layer4.avg",)),
        (KNNSpec(k=1), ("layer4.avg",)),
        (MLPSpec(hidden=(4,), epochs=2), ("layer4.max",)),
    )
    feature_inputs = feature_inputs_of(case.directories, SMALL)
    section = FinetuneSection(top_k=3, train_above=("layer3", "all", "scratch"))
    found, notes = list_candidates(board, section, feature_inputs)
    assert len(found) == 6, "two heads, three nodes to train above"
    assert any("knn" in note for note in notes)
    assert {one.label for one in found} == {"fine-tuned", "from scratch"}
    assert {bool(one.split_maps) for one in found if one.spec.train_above == "layer3"} == {True}, (
        "the map of layer3 is cached"
    )
    assert not any(one.split_maps for one in found if one.spec.train_above == "all")
    assert len({one.key for one in found}) == 6
    found, notes = list_candidates(board, section, feature_inputs_of(case.directories, None))
    assert not found
    assert any("not recorded" in note for note in notes)


def test_a_network_among_several_is_trained_from_its_own_cached_map(case: Case) -> None:
    """Inputs are called BACKBONE:TAP then, where the backbone's name may hold a colon itself."""
    board = board_of(case, (LOGISTIC, ("layer4.avg",)))
    board["inputs"] = [(f"timm:{SMALL.name}:layer4.avg",)]
    feature_inputs = {
        f"timm:{backbone.name}:{name}": dataclasses.replace(feature_input, backbone=backbone)
        for backbone in (SMALL, dataclasses.replace(SMALL, name="other"))
        for name, feature_input in feature_inputs_of(case.directories).items()
    }
    other_map = feature_inputs["timm:other:layer3.map"]
    feature_inputs["timm:other:layer3.map"] = dataclasses.replace(other_map, views=(Path("other"),))
    section = FinetuneSection(train_above=("layer3",))
    (candidate,) = list_candidates(board, section, feature_inputs)[0]
    assert candidate.split_maps == feature_inputs[f"timm:{SMALL.name}:layer3.map"].views


def test_a_network_that_stands_twice_is_trained_from_the_map_of_its_own_views(case: Case) -> None:
    board = board_of(case, (LOGISTIC, ("layer4.avg",)))
    board["inputs"] = [("plain:layer4.avg",)]
    own_inputs = {
        name: dataclasses.replace(each, backbone=SMALL)
        for name, each in feature_inputs_of(case.directories).items()
    }
    feature_inputs = {f"plain:{name}": each for name, each in own_inputs.items()} | {
        f"flipped:{name}": dataclasses.replace(each, views=(*each.views, Path("flipped")))
        for name, each in own_inputs.items()
    }
    section = FinetuneSection(train_above=("layer3",))
    (candidate,) = list_candidates(board, section, feature_inputs)[0]
    assert candidate.split_maps == own_inputs["layer3.map"].views


def test_gain_and_cost_are_predicted_from_what_was_measured(case: Case) -> None:
    """More is expected of what helped before; cost grows with epochs and the measured step."""
    board = board_of(case, (WEAK, ("layer4.avg",)))
    feature_inputs = feature_inputs_of(case.directories, SMALL)
    (one,) = list_candidates(board, SECTION, feature_inputs)[0]
    prior = predicted_gain(one, "log_loss", {})
    assert 0 < prior < one.head["log_loss"]
    assert (
        predicted_gain(one, "log_loss", {"head": [0.5]})
        > prior
        > predicted_gain(one, "log_loss", {"head": [-0.2]})
    )
    measured = PilotResult(None, None, None, 0.5, steps=10, evaluation_share=0.0, blocks=1)
    assert training_seconds(one, measured, 2) == pytest.approx(10 * 0.5 * 3 * 3)


RECIPE = (
    WEAK_HEAD_RECIPE
    + """\
finetune:
  train_above: [layer3]
  learning_rate: [0.001]
  epochs: 4
  batch_size: 16
  budget_minutes: 5
compute:
  workers: 2
"""
)


def test_what_another_driver_has_trained_is_not_over_budget(tmp_path: Path) -> None:
    """Decisions of several drivers stand side by side, and none that was paid for is lost."""
    paths = RunPaths(tmp_path)
    paths.finetune.mkdir(parents=True)
    decide = stage_module._record_decision
    decide(paths, "a", {"decision": "kept", "seconds": 3.0})
    decide(paths, "b", {"decision": "over budget"})
    found = decide(paths, "a", {"decision": "over budget"})
    assert found == read_record(paths.finetune_decisions)
    assert {key: record["decision"] for key, record in found.items()} == {
        "a": "kept",
        "b": "over budget",
    }
    assert decide(paths, "b", {"decision": "rolled back"})["b"]["decision"] == "rolled back"


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run that two drivers were started for together, and what each of them said."""
    folder = tmp_path_factory.mktemp("two")
    make_photos(folder / "photos", n=48)
    (folder / "recipe.yaml").write_text(RECIPE)
    drivers = []
    for number in range(2):
        with (folder / f"said{number}.txt").open("w") as said:
            command = ("run", "recipe.yaml", "--workers", "1")
            drivers.append(forks.start(command, cwd=folder, stdout=said, stderr=said))
    ended = [driver.wait(300) for driver in drivers]
    said = [(folder / f"said{number}.txt").read_text() for number in range(2)]
    assert ended == [0, 0], said
    return folder, said


@pytest.mark.slow
def test_two_drivers_share_the_networks_of_a_run(run_of_two: tuple[Path, list[str]]) -> None:
    """Started together, both end well with the same winner; every fold is trained once, whichever
    of them trained it, and every task is in the logs.
    """
    folder, said = run_of_two
    assert all("Winner: finetune fine-tuned above layer3" in each for each in said)
    run = folder / "headrace-runs" / "recipe"
    events = [event for log in (run / "logs").glob("*.jsonl") for event in read_log(log)]
    folds = [
        event
        for event in events
        if event["event"] == "finished" and event["task"].startswith("finetune-")
    ]
    trained = [event["task"] for event in folds if not event["result"]["skipped"]]
    assert (
        len(trained) == len(set(trained)) == len({event["task"] for event in folds}) == 3
    )  # two folds, all rows
    assert {event["stage"] for event in events if event["event"] == "stage"} >= {
        "finetune: pilots",
        "finetune: train",
    }
    assert not list((run / "leases").glob("*.lease"))


@pytest.mark.slow
def test_a_network_can_win_a_run(run_of_two: tuple[Path, list[str]]) -> None:
    """From a recipe to the test split: the network is the winner, its directory lies in winner/,
    the evaluation is on record, and another call does nothing.
    """
    folder, said = run_of_two
    for each in said:
        assert "Head against networks" in each
        assert "Test log_loss" in each
    run = folder / "headrace-runs" / "recipe"
    assert sorted(path.name for path in (run / "winner").iterdir()) == [
        "network.json",
        "network.safetensors",
    ]
    about = json.loads((run / "winner" / "network.json").read_text())
    assert about["kind"] == "network"
    assert about["classes"] == ["coarse", "fine"]
    assert len((run / "test-evaluations.jsonl").read_text().splitlines()) == 1
    before = {
        path: path.stat().st_mtime_ns for path in (run / "finetune").rglob("*") if path.is_file()
    }
    done = headrace("run", "recipe.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {
        path: path.stat().st_mtime_ns for path in (run / "finetune").rglob("*") if path.is_file()
    } == before
    assert len((run / "test-evaluations.jsonl").read_text().splitlines()) == 1


def test_results_of_a_moved_or_copied_run_are_its_own(tmp_path: Path) -> None:
    """The run's directory counts first, whatever path the leaderboard has stored; what is not there
    is where it was.
    """
    paths = RunPaths(tmp_path / "here")
    for folder in (paths.banks, paths.finetune, tmp_path / "there" / "banks"):
        folder.mkdir(parents=True)
    stored = tmp_path / "there" / "banks" / "a.h5"
    stored.touch()
    assert results_file(paths, str(stored)) == stored
    (paths.banks / "a.h5").touch()
    assert results_file(paths, str(stored)) == paths.banks / "a.h5", "of a copied run, the copy"
    (paths.finetune / "b.h5").touch()
    assert results_file(paths, tmp_path / "gone" / "finetune" / "b.h5") == paths.finetune / "b.h5"
    assert (
        results_file(paths, tmp_path / "gone" / "banks" / "b.h5")
        == tmp_path / "gone" / "banks" / "b.h5"
    )
