"""Where a run's workers train heads: what the recipe says, and a GPU by itself only for one worker
that has it alone.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headrace.heads.errors import HeadError
from headrace.heads.kinds import HEAD_KINDS
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.planning import devices
from headrace.pipelines.planning.run_state import read_run_state
from headrace.pipelines.recipe.load import parse_recipe
from headrace.pipelines.recipe.text import RecipeError
from headrace.pipelines.stages.train import bank_jobs

RECIPE = (
    "images: {{folder: photos}}\nbackbones: [{{name: 'timm:test_resnet'}}]\ncompute: "
    "{{{compute}}}\n{more}"
)


def recipe_of(compute="", more=""):
    return parse_recipe(RECIPE.format(compute=compute, more=more), Path("recipe.yaml"))


def test_a_gpu_is_taken_by_the_only_worker_of_this_machine(monkeypatch):
    """auto: one worker has it; of several, or on a cluster, none does; without a GPU all are on the
    CPU.
    """
    assert devices.find_heads_device(recipe_of("workers: 1")) in ("cpu", "cuda")
    monkeypatch.setattr(
        devices, "find_device", lambda wanted: "cuda" if wanted == "auto" else wanted
    )
    assert devices.find_heads_device(recipe_of("workers: 1")) == "cuda"
    assert devices.find_heads_device(recipe_of("workers: 8"), workers=1) == "cuda"
    monkeypatch.setattr(devices, "find_device", lambda wanted: "mps")
    assert devices.find_heads_device(recipe_of("workers: 1")) == "cpu"
    monkeypatch.setattr(
        devices, "find_device", lambda wanted: "cuda" if wanted == "auto" else wanted
    )
    assert devices.find_heads_device(recipe_of("workers: 1"), workers=8) == "cpu"
    assert devices.find_heads_device(recipe_of()) == "cpu"
    assert devices.find_heads_device(recipe_of("workers: 1, heads_device: cpu")) == "cpu"
    assert devices.find_heads_device(recipe_of("workers: 1", "cluster: {where: slurm}")) == "cpu"
    assert (
        devices.find_heads_device(recipe_of("heads_device: cuda", "cluster: {where: slurm}"))
        == "cuda"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_done(tmp_path):
    """By the dry run too: the key is named, and what to give instead."""
    with pytest.raises(HeadError, match=r"'cuda' cannot be used .* compute\.heads_device: cpu"):
        devices.find_heads_device(recipe_of("heads_device: cuda"))
    with pytest.raises(HeadError, match="cannot be used on this machine"):
        read_run_state(
            recipe_of("heads_device: cuda").model_copy(update={"out": tmp_path / "run"}),
            write=False,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_goes_to_the_banks_that_can_use_it(tmp_path, device):
    """Others are left on the CPU, where they compute whatever they are told."""
    banks = [
        SimpleNamespace(kind=kind, inputs=(), halving=None, specs=(), group=kind, key="0")
        for kind in HEAD_KINDS
    ]
    found = SimpleNamespace(
        paths=RunPaths(tmp_path),
        plan=SimpleNamespace(banks=banks),
        feature_paths={},
        dataset=SimpleNamespace(train=SimpleNamespace(digest="0" * 24, side=None)),
    )
    given = dict(zip(HEAD_KINDS, [job.device for job in bank_jobs(found, device)], strict=True))
    able = {name for name, kind in HEAD_KINDS.items() if kind.uses_gpu}
    assert able == {"logistic", "mlp", "conv", "bags"}
    assert {kind for kind, where in given.items() if where == device} >= able
    assert {where for kind, where in given.items() if kind not in able} == {"cpu"}
    assert all(job.device == "cpu" for job in bank_jobs(found, "cpu"))


@pytest.mark.parametrize(
    "device", ["auto", "cpu", "cuda", "cuda:1", "xpu", "xpu:3", "mps", "hpu:0", "mtia"]
)
def test_a_recipe_takes_any_device_of_torchs(device):
    assert recipe_of(f"device: '{device}', heads_device: '{device}'").compute.device == device


@pytest.mark.parametrize("device", ["gpu", "cuad", "cuda:", "cuda:x", "cpu:0", "mps:1", "", "meta"])
def test_a_recipe_with_another_device_is_answered_with_those_that_there_are(device):
    with pytest.raises(RecipeError, match="such as cuda, xpu or mps; of several with its number"):
        recipe_of(f"device: '{device}'")


def test_torch_is_asked_for_a_device_where_there_can_be_one(monkeypatch):
    """auto: what torch says, under whatever name."""
    monkeypatch.setattr(devices, "_may_have_accelerator", lambda: True)
    for seen, device in ((torch.device("xpu"), "xpu"), (None, "cpu")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda seen=seen, **_: seen)
        assert devices.find_device("auto") == device
    assert devices.find_device("cuda:1") == "cuda:1"
