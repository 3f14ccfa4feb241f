"""A finished run in MLflow and TensorBoard: told whole, told once, and only where the library is
there.
"""

import importlib.util
import warnings
from dataclasses import replace

import pytest
from support.models import run_here
from support.runs import RECIPE, make_photos

from headrace.cache.errors import HeadraceError
from headrace.pipelines import trackers as logs
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.run import run_recipe

LOG = """\
log:
  mlflow: tracking
  tensorboard: events
  experiment: stripes
  settings: 3
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run that was told, and its result."""
    folder = tmp_path_factory.mktemp("logs")
    make_photos(folder / "photos", n=30)
    (folder / "recipe.yaml").write_text(RECIPE + LOG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own future
        return folder, run_here(folder / "recipe.yaml")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_is_told_once(told):
    """The scores of the run, its files, the three best settings below it; a second telling changes
    nothing.
    """
    from mlflow import MlflowClient

    folder, result = told
    section = load_recipe(folder / "recipe.yaml").log
    # As trained anew, on a slower machine.
    slower = replace(result, board=result.board.assign(train_seconds=1e3))
    assert "MLflow knows it" in logs.log_run(section, slower)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/tracking/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("stripes").experiment_id])
    (whole,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == whole.info.run_id]
    assert len(runs) == 4
    assert len(below) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert whole.data.metrics["validation_accuracy"] == result.winner.score
    assert whole.data.metrics["test_accuracy"] == result.test.value
    assert whole.data.params["winner_kind"] == result.winner.kind
    assert {run.data.metrics["accuracy"] for run in below} == set(result.board["accuracy"].head(3))
    assert {file.path for file in client.list_artifacts(whole.info.run_id)} == {
        "leaderboard.csv",
        "recipe.json",
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_is_told_once(told):
    """Event files with the scores and the hyperparameters; none is added by a second telling."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, result = told
    section = load_recipe(folder / "recipe.yaml").log
    (place,) = (folder / "events" / "stripes").iterdir()
    before = sorted(place.rglob("*"))
    assert "TensorBoard knows it" in logs.log_run(section, result)
    assert sorted(place.rglob("*")) == before
    events = EventAccumulator(str(place)).Reload()
    assert events.Scalars("test_accuracy")[0].value == pytest.approx(result.test.value)
    assert sum(path.is_dir() for path in place.iterdir()) == 3
    best = EventAccumulator(str(place / "0001")).Reload()
    assert best.Scalars("accuracy")[0].value == pytest.approx(result.winner.score)


def test_a_missing_library_is_told_before_the_run(told, monkeypatch):
    """With the words to install it; nothing was extracted for nothing."""
    folder, _ = told
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HeadraceError, match=r"headrace\[mlflow\]"):
        run_recipe(load_recipe(folder / "recipe.yaml"))


def test_a_tracking_address_is_taken_as_it_is(tmp_path):
    """A path is a folder with a SQLite file in it."""
    assert logs.mlflow_uri("http://server:5000") == "http://server:5000"
    assert logs.mlflow_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
