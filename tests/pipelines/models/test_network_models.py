"""Runs that a network has won, and one whose answer is an ensemble with a network in it: their
report in a browser, their predictions, and what is exported of them where headrace is not
installed.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from support.browser import BROWSER
from support.exports import run_alone
from support.models import run_here
from support.networks import WEAK_HEAD_RECIPE
from support.runs import make_photos

from headrace.pipelines.export.output_check import TOLERANCE
from headrace.pipelines.export.write import export_model
from headrace.pipelines.models.model import load_model
from headrace.pipelines.models.network import NetworkModel
from headrace.pipelines.predict.bulk import predict_table
from headrace.pipelines.predict.listing import list_images
from headrace.pipelines.report.build import write_report
from headrace.pipelines.selection.ensemble import Member, build_ensemble

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
]  # three runs with networks, and their exports

RECIPE = (
    WEAK_HEAD_RECIPE
    + """\
finetune:
  learning_rate: [0.001]
  epochs: {epochs}
  patience: {epochs}
  batch_size: 16
  {networks}
{rest}cache: cache
out: runs/{name}
"""
)
REUSE = (
    "top_k: 0\n  reuse: [{train_above: layer3, inputs: [layer4.avg], hidden: [8], start: "
    "[pretrained]}]"
)
RUNS = {
    "fine-tuned": {"epochs": 4, "networks": "train_above: [layer3]", "rest": ""},
    "reused": {"epochs": 6, "networks": REUSE, "rest": ""},
    "ensemble": {"epochs": 6, "networks": REUSE, "rest": "ensemble: {}\n"},
}


def a_network_and_a_head(board, held, metric, section, **rest):
    """The run's ensemble with its members given: on images this easy to tell, the network alone is
    the best.
    """
    found = build_ensemble(board, held, metric, section, **rest)
    network, head = (board[board["kind"] == kind].iloc[0] for kind in ("finetune", "logistic"))
    members = Member(0.4, 0.9, network, ("trained",)), Member(0.6, 0.3, head, ("frozen",))
    return dataclasses.replace(found, members=members, temperature=1.2, chosen=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The images, the cache, and the runs."""
    folder = tmp_path_factory.mktemp("networks")
    make_photos(folder / "photos", n=48)
    return folder


@pytest.fixture(scope="module", params=RUNS)
def run(request, root) -> Path:
    """The directory of a finished run."""
    recipe = root / f"{request.param}.yaml"
    recipe.write_text(RECIPE.format(name=request.param, **RUNS[request.param]))
    with mock.patch("headrace.pipelines.stages.select.build_ensemble", a_network_and_a_head):
        result = run_here(recipe)
    assert result.winner.kind == "finetune"
    assert (result.ensemble is not None and result.ensemble.chosen) == (request.param == "ensemble")
    return result.paths.root


@pytest.fixture(scope="module")
def exported(run) -> Path:
    """Its answer in every format; the graph of the reused network is part of the ensemble's."""
    out = run.parent / f"{run.name}-exported"
    graphs = [] if run.name == "reused" else ["torch", "onnx"]
    found = export_model(load_model(run), out, [*graphs, "safetensors"])
    assert max(found.differences.values()) < 1e-4
    return out


def test_the_answer_predicts_alike_everywhere(run, exported, root):
    """By `headrace predict`, as safetensors, and as ONNX without headrace; the torch program was
    compared when it was made.
    """
    model = load_model(run)
    assert any(isinstance(member, NetworkModel) for member in model.members)
    assert (len(model.members) > 1) == (run.name == "ensemble")
    paths = sorted((root / "photos").rglob("*.png"))[::9]
    expected = model.predict_proba(paths)
    assert np.ptp(expected[:, 0]) > 0.01
    if (exported / "model.onnx").exists():
        np.testing.assert_allclose(run_alone(exported, paths, "onnx"), expected, atol=TOLERANCE)
    np.testing.assert_allclose(load_model(exported).predict_proba(paths), expected, atol=1e-6)
    predict_table(
        model,
        list_images(paths).samples,
        exported.with_suffix(".csv"),
        "csv",
        console=Console(quiet=True),
    )
    table = pd.read_csv(exported.with_suffix(".csv"))
    np.testing.assert_allclose(table[["p_coarse", "p_fine"]], expected, atol=1e-5)


def test_the_card_says_which_network_it_is_and_what_it_scored(run, exported):
    """The trained part and its start in words, and the test score of this very model."""
    card = (exported / "MODEL_CARD.md").read_text()
    result = json.loads((run / "test-evaluations.jsonl").read_text())["result"]
    assert f"**test log_loss** | {result['value']:.4f}" in card
    assert "everything above `layer3`" in card
    assert ("which started pretrained" in card) == (run.name != "fine-tuned")
    assert '"hidden"' not in card


@pytest.fixture(scope="module")
def browser():
    """One Chromium for the tests of this file."""
    if BROWSER is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=BROWSER, timeout=120_000)
        yield chromium
        chromium.close()


def test_the_report_tells_of_the_network(run, browser):
    """A page without an error, with what each network gained, and with the test score beside the
    name of what has it.
    """
    report = write_report(run, tables=True)
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report.page.as_uri())
    page.wait_for_selector("html[data-ready=yes]", state="attached")
    assert said == []
    text = page.inner_text("body")
    page.set_viewport_size({"width": 360, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, (
        "nothing but tables scrolls sideways"
    )
    page.close()
    assert "of another version" not in text
    assert "1 of 1 network kept" in text
    tables = {path.stem: path for path in report.tables if path.suffix == ".csv"}
    assert pd.read_csv(tables["networks"])["decision"].tolist() == ["kept"]
    evaluation = json.loads((run / "test-evaluations.jsonl").read_text())
    counts = pd.read_csv(tables["confusion-test"]).iloc[:, 1:].to_numpy()
    assert counts.sum() == evaluation["result"]["images"]
    assert np.trace(counts) / counts.sum() == pytest.approx(
        evaluation["result"]["metrics"]["accuracy"]
    )
    scored = pd.read_csv(tables["metrics"]).set_index("metric")
    if run.name == "ensemble":
        about = json.loads((run / "ensemble" / "ensemble.json").read_text())
        assert scored.loc["log loss", "validation"] == pytest.approx(about["nested"]["value"])
        assert "Every metric of the ensemble" in text
        assert "for this ensemble" in text
    else:
        board = pd.read_csv(run / "leaderboard.csv")
        assert scored.loc["log loss", "validation"] == pytest.approx(board["log_loss"][0])
        assert "for this winner" in text
    shutil.rmtree(run / "report-tables")
