"""A decision about a network holds as long as the network and its results are there and whole."""

import json

import pytest
from support.models import run_here
from support.networks import WEAK_HEAD_RECIPE
from support.runs import make_photos

from headrace.cache.format.sealed import is_sealed_file
from headrace.pipelines.finetune import stage
from headrace.pipelines.models.network import WEIGHTS, load_network
from headrace.pipelines.paths import RunPaths

FINETUNE = """\
finetune: {train_above: [layer3], learning_rate: [0.001], epochs: 2, batch_size: 16}
compute: {workers: 1, images_per_shard: 64}
"""


@pytest.mark.slow
def test_what_is_damaged_is_trained_again_and_what_is_whole_is_not(tmp_path):
    """A flipped bit in a network, damaged or removed results, a changed decision: each ends
    in the same run.
    """
    make_photos(tmp_path / "photos", n=32)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(WEAK_HEAD_RECIPE + FINETUNE)
    first = run_here(recipe)
    paths = first.paths
    assert first.winner.kind == "finetune"
    assert first.finetuned.trained == 1
    model = next((paths.finetune / "models").glob("*/network.safetensors"))
    result = next(paths.finetune.glob("*.h5"))
    decisions = paths.finetune_decisions
    whole = model.read_bytes()
    model.write_bytes(whole[:5000])
    assert not is_sealed_file(model)  # a cut network is a damaged one, as that with a flipped bit
    model.write_bytes(whole)
    flip = bytearray(whole)
    flip[-2000] ^= 64
    part = bytearray(result.read_bytes())
    part[9000] ^= 1
    changed = decisions.read_bytes().replace(b'"kept"', b'"lost"')
    for file, data, trained in (
        (model, bytes(flip), 1),
        (result, bytes(part), 1),
        (result, None, 1),
        (decisions, changed, 1),
        (decisions, decisions.read_bytes(), 0),
    ):
        file.unlink()
        if data is not None:
            file.write_bytes(data)
        again = run_here(recipe)
        assert again.finetuned.trained == trained, file
        assert again.board[["kind", "settings", "log_loss"]].equals(
            first.board[["kind", "settings", "log_loss"]]
        ), file
        assert again.test == first.test, file
        load_network(model.parent)
        load_network(paths.winner)
    assert len(paths.test_evaluations.read_text().splitlines()) == 1
    assert next(iter(json.loads(decisions.read_bytes()).values()))["decision"] == "kept"


def test_a_damaged_network_that_another_driver_has_removed_is_no_error(tmp_path, monkeypatch):
    paths = RunPaths(tmp_path)
    paths.finetune_model("key").mkdir(parents=True)
    (paths.finetune_model("key") / WEIGHTS).touch()
    monkeypatch.setattr(stage, "is_sealed_file", lambda path: path.unlink())
    assert not stage._has_its_files(paths, "key", "kept")
