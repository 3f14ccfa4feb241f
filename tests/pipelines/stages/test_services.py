"""What stages share: a client is started when there is work, and ends with the services."""

from contextlib import contextmanager

import pytest
from rich.console import Console
from support.models import client_here
from support.runs import RECIPE, make_photos

from headrace.pipelines.cluster.submit import TaskOptions
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.planning.run_state import read_run_state, write_inputs
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.run import run_recipe
from headrace.pipelines.stages import train as train_module
from headrace.pipelines.stages.services import Services, opener_of
from headrace.pipelines.stages.train import train


def test_a_client_is_opened_at_first_use_and_ends_with_the_services():
    """Once for all stages; not at all where nothing asks for it."""
    events = []

    @contextmanager
    def open_client(role, device):
        events.append((role, device))
        yield object()
        events.append("ended")

    with Services(Console(quiet=True), TaskOptions(), open_client) as services:
        assert events == []
        assert services.client() is services.client()
        assert events == [("train", "cpu")]
    assert events == [("train", "cpu"), "ended"]


@pytest.mark.slow
def test_a_client_that_was_closed_is_told():
    with client_here() as client:
        opener_of(client)
    with pytest.raises(InvalidInput, match="the Dask client is closed"):
        opener_of(client)


def test_a_large_run_begins_with_a_probe_and_plans_the_rest_anew(tmp_path, monkeypatch):
    """A little of each kind that was never measured; the other heads are planned by what that
    took, and none is trained twice.
    """
    make_photos(tmp_path / "photos", n=40)
    text = RECIPE.replace("[0.01, 1]", "[0.01, 0.1, 1, 10]")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    monkeypatch.setattr(train_module, "PROBE_S", 0.0)
    with client_here() as client:
        result = run_recipe(recipe, console=Console(quiet=True), client=client)
    assert result.failed_heads == 0
    assert (result.heads["fold"] >= 0).sum() == ((3 + 1) * 4 + 1) * 3
    files = {path.stem.rpartition("-")[0] for path in result.paths.banks.iterdir()}
    assert len(list(result.paths.banks.iterdir())) > len(files), "a probe and the rest of its kind"
    state = read_run_state(recipe)
    assert state.plan.banks == ()
    assert state.plan.unmeasured == frozenset()
    write_inputs(state)
    with (
        client_here() as client,
        Services(Console(quiet=True), TaskOptions(), opener_of(client)) as services,
    ):
        assert train(state, services) is state
        assert services.stages[-1].did == "nothing missing"
