"""Training networks: what trains and what stays, curves that survive a kill, failures that are
told, files that come back.
"""

import dataclasses
import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import forks
from support.networks import LOGISTIC, Case, make_case

from headrace.cache.errors import HeadraceError, PublishFailed
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.preprocessing import render_crop
from headrace.heads.data.task import REFIT
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.results import read_bank
from headrace.heads.spec import spec_to_json
from headrace.pipelines.cluster.fork_server import start_server
from headrace.pipelines.finetune import (
    checkpoint as checkpoint_module,
    task as task_module,
    train as train_module,
)
from headrace.pipelines.finetune.checkpoint import load_checkpoint
from headrace.pipelines.finetune.data import random_flips
from headrace.pipelines.finetune.task import FoldJob, part_path, pilot, publish_result, train_fold
from headrace.pipelines.finetune.train import _rate_schedule
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.network import load_network
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec, model_spec

# relative: a training that was killed against one that was not, on one machine with as many threads
SAME_CURVE = 1e-6
NEW = MLPSpec(hidden=(8,))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("training"))


def losses(result: dict[str, object]) -> list[float]:
    return [row["validation_loss"] for row in result["curve"]]  # type: ignore[attr-defined, index]


def test_a_spec_survives_json() -> None:
    """As every other spec does; equal specs give equal text."""
    spec = FineTuneSpec(head=spec_to_json(LOGISTIC), train_above="layer3", augment="flips")
    assert model_spec(spec_to_json(spec)) == spec


@pytest.mark.parametrize(
    ("start", "cut"), [("head", "layer3.map"), ("pretrained", "layer3.map"), ("head", None)]
)
def test_only_what_lies_above_the_cut_trains(case: Case, start: str, cut: str | None) -> None:
    """Parameters below the node and every running statistic are those of the backbone, bit for bit;
    above, all move.
    """
    head = LOGISTIC if start == "head" else NEW
    job = case.job(head, cut=cut, start=start, out=f"above-{start}-{cut}")
    train_fold(FoldJob(job, REFIT, epochs=2))
    trained = load_network(job.model).network.backbone.state_dict()
    for name, before in load_backbone(job.backbone).module.state_dict().items():
        moves = name.startswith("layer4.") and not name.endswith(
            ("running_mean", "running_var", "num_batches_tracked")
        )
        assert torch.equal(before, trained[name]) != moves, name


def test_from_the_cached_map_nothing_below_the_cut_runs(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image is decoded and no layer below the cut is called."""
    job = case.job(out="nothing-below")
    monkeypatch.setattr("headrace.extract.run.rendering.decode_pixels", None)
    called: list[str] = []
    make = task_module.Network

    def watched(*args: object, **options: object) -> object:
        network = make(*args, **options)  # type: ignore[arg-type]
        for name, child in network.backbone.named_modules():
            child.register_forward_pre_hook(lambda _m, _a, name=name: called.append(name))
        return network

    monkeypatch.setattr(task_module, "Network", watched)
    train_fold(FoldJob(job, 0))
    assert any(name.startswith("layer4") for name in called)
    assert not any(name.startswith(("conv1", "layer1", "layer2", "layer3")) for name in called)


def test_training_from_maps_is_training_from_images(case: Case) -> None:
    """The two ways give the same validation curve up to the maps' float16: in float32, since a
    processor with tile instructions would train in bfloat16, which is coarser.
    """
    by_map = train_fold(FoldJob(case.job(out="by-map", precision="float32"), 0))
    by_image = train_fold(FoldJob(case.job(cut=None, out="by-image", precision="float32"), 0))
    np.testing.assert_allclose(losses(by_map), losses(by_image), rtol=0.02)


def test_where_the_network_cannot_be_cut_training_runs_from_the_images(tmp_path: Path) -> None:
    """Inside a residual block the map is not all there is: the pilot says so, and the folds train
    as without the map.
    """
    case = make_case(tmp_path, images=24, taps=("layer3.0.conv1.map", "layer4.avg"))
    curves = []
    for cut in ("layer3.0.conv1.map", None):
        job = case.job(cut=cut, train_above="layer3.0.conv1", epochs=1, out=f"cut {cut}")
        found = pilot(job)
        assert found.split_parity is None
        assert ("also reads what lies below it" in str(found.no_split_reason)) == bool(cut)
        curves.append([row["validation_loss"] for row in train_fold(FoldJob(job, 0))["curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=SAME_CURVE)


def test_rates_fall_with_depth_and_time(case: Case) -> None:
    """Each block learns at layer_decay times the one above; warm-up rises, the cosine ends near
    zero; biases do not decay.
    """
    opened = task_module._open_job(case.job(cut=None, train_above="all", layer_decay=0.5))
    training = task_module._make_training(
        FoldJob(case.job(cut=None, train_above="all", layer_decay=0.5), 0), opened
    )
    rates = sorted(set(training.learning_rates), reverse=True)
    assert len(rates) == len(training.plan.blocks)
    np.testing.assert_allclose(rates, [1e-3 * 0.5**height for height in range(len(rates))])
    for group in training.optimizer.param_groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}
    factors = [_rate_schedule(step, 100, 0.1) for step in range(100)]
    assert factors[0] < factors[5] < factors[10] == max(factors)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.01


def test_a_wide_head_moves_as_slowly_as_a_narrow_one(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rate falls with the number of its inputs, so that a step moves its output by as much; the
    blocks keep theirs.
    """
    rates = {}
    for wide in (512, 16):
        monkeypatch.setattr(train_module, "WIDE", wide)
        job = case.job(cut=None, train_above="all", layer_decay=0.5)
        training = task_module._make_training(FoldJob(job, 0), task_module._open_job(job))
        rates[wide] = training.learning_rates
    inputs = training.network.head.layers[0].weight.shape[1]
    assert inputs > 16
    assert rates[512][:2] == [1e-3, 1e-3]  # weights and biases
    np.testing.assert_allclose(rates[16][:2], 1e-3 * 16 / inputs)
    assert rates[16][2:] == rates[512][2:]


def test_the_start_of_fine_tuning_is_the_head(case: Case) -> None:
    """Epoch 0 of the curve is the cached head's own validation loss."""
    job = case.job(out="epoch-zero")
    bank = read_bank(job.head_result)
    validation, held = bank.validation(LOGISTIC, 1), bank.rows(1)
    assert validation is not None
    expected = -np.log(validation[np.arange(len(held)), bank.target[held]]).mean()
    assert losses(train_fold(FoldJob(job, 1)))[0] == pytest.approx(expected, rel=0.02)


def test_from_scratch_forgets_the_pretrained_parameters(case: Case) -> None:
    """Every parameter that a tap needs is drawn anew, by the seed; the statistics of batch
    normalization are trained.
    """
    jobs = [
        case.job(NEW, cut=None, train_above="all", start="random", seed=seed, out=f"scratch{seed}")
        for seed in (0, 7)
    ]
    states = []
    for job in jobs:
        train_fold(FoldJob(job, REFIT, epochs=1))
        states.append(load_network(job.model).network.backbone.state_dict())
    before = load_backbone(jobs[0].backbone).module.state_dict()
    for name in before:
        if name.startswith("layer") and before[name].is_floating_point():
            if name.endswith(("running_mean", "running_var")):
                assert not torch.equal(states[0][name], before[name]), name
            elif before[name].ndim > 1:
                assert not torch.allclose(states[0][name], states[1][name], atol=1e-2), name


def test_results_are_bank_results(case: Case) -> None:
    """Out-of-fold predictions of every row, tied to ids and content; the network on all rows is
    there; no fold is done twice.
    """
    job = case.job(out="results")
    done = [train_fold(FoldJob(job, fold)) for fold in range(2)]
    train_fold(FoldJob(job, REFIT, epochs=2))
    bank = read_bank(publish_result(job, {}))
    assert bank.out_of_fold_predictions(job.spec).shape == (48, 2)
    assert np.isfinite(bank.out_of_fold_predictions(job.spec)).all()
    assert bank.ids.tolist() == case.task.ids.tolist()
    assert bank.table["kind"].unique().tolist() == ["finetune"]
    assert bank.table["accuracy"][:2].notna().all()
    (
        Path(job.folder) / "checkpoint-0.safetensors"
    ).touch()  # as of a process that died before it removed it
    again = train_fold(FoldJob(job, 0))
    assert again["skipped"]
    assert again["curve"] == done[0]["curve"]
    assert not list(Path(job.folder).glob("checkpoint*")), "a finished fold needs none"


def test_a_saved_network_predicts_from_images_alone(case: Case) -> None:
    """Its directory holds everything: equal predictions from another process's view of it, and
    refusals that teach.
    """
    job = case.job(taps=("layer2.avg", "layer4.max"), out="saved")
    train_fold(FoldJob(job, REFIT, epochs=2))
    saved = load_network(job.model)
    paths = sorted((case.root / "photos").rglob("*.png"))[:6]
    pixels = np.stack(
        [render_crop(decode_image(path.read_bytes()), saved.model.preprocessing) for path in paths]
    )
    predicted = saved.predict_proba(pixels)
    assert predicted.shape == (6, 2)
    np.testing.assert_allclose(predicted.sum(1), 1, rtol=1e-5)
    right = [
        saved.model.classes[row.argmax()] == path.parent.name
        for row, path in zip(predicted, paths, strict=True)
    ]
    assert all(right)
    with pytest.raises(ModelError, match="is not there"):
        load_network(case.root / "nowhere")
    weights = Path(job.model) / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="has changed since it was written"):
        load_network(job.model)
    weights.write_bytes(b"another program's file" * 50)
    with pytest.raises(ModelError, match="not a saved network"):
        load_network(job.model)


@pytest.mark.slow
def test_a_killed_training_ends_on_the_same_curve(case: Case) -> None:
    """SIGKILL at random moments, again and again: the curve of the training that ran through, from
    checkpoints.
    """
    settings = {
        "epochs": 9,
        "patience": 9,
        "augment": "flips",
        "dropout": 0.3,
        "cut": None,
        "train_above": "layer2",
    }
    whole = train_fold(FoldJob(case.job(out="whole", **settings), 0))
    job = case.job(out="killed", **settings)
    job = dataclasses.replace(job, task=case.job(out="whole", **settings).task)
    random, kills = np.random.default_rng(0), 0
    context = multiprocessing.get_context(start_server(forks.modules()))  # imports cost 4 s each
    checkpoint = Path(job.folder) / "checkpoint-0.safetensors"
    for _ in range(8):
        process = context.Process(target=train_fold, args=(FoldJob(job, 0),))
        process.start()
        # Imports take a varying time: the kill comes some moments after the training has visibly
        # gone on.
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.is_alive() and not (
            checkpoint.exists() and checkpoint.stat().st_mtime_ns != before
        ):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.2))
        if process.is_alive() and kills < 3:
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join()
        if part_path(job, 0).exists():
            break
    assert kills >= 1
    result = train_fold(FoldJob(job, 0))
    assert result["resumed_from"] > 0
    np.testing.assert_allclose(losses(result), losses(whole), rtol=SAME_CURVE)
    assert result["best_epoch"] == whole["best_epoch"]


def test_a_checkpoint_of_another_training_is_not_gone_on_from(case: Case, tmp_path: Path) -> None:
    """Another spec, or a damaged file: training starts from its beginning."""
    opened = task_module._open_job(case.job())
    training = task_module._make_training(FoldJob(case.job(), 0), opened)
    path = tmp_path / "checkpoint.safetensors"
    training.run(path, "this one")
    assert load_checkpoint(path, "this one") is not None
    assert load_checkpoint(path, "another") is None
    path.write_bytes(path.read_bytes()[:-10])
    assert load_checkpoint(path, "this one") is None


def test_a_loss_that_is_no_number_is_told(case: Case) -> None:
    """An absurd rate ends in a failure that says what to lower, not in a network of NaN."""
    with pytest.raises(HeadraceError, match="lower learning_rate"):
        train_fold(
            FoldJob(
                case.job(
                    learning_rate=1e30,
                    epochs=8,
                    warmup_fraction=0.0,
                    grad_clip_norm=1e30,
                    out="nan",
                ),
                0,
            )
        )


def test_a_batch_that_does_not_fit_is_halved(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for five rows at a time: gradients of the parts add up to those of the whole batch."""
    whole = train_fold(FoldJob(case.job(out="fits"), 0))
    forward, sizes = task_module.Network.forward, []

    def small(self: object, inputs: torch.Tensor, held: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append(len(inputs))
        if torch.is_grad_enabled() and len(inputs) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, inputs, held)  # type: ignore[arg-type]

    monkeypatch.setattr(task_module.Network, "forward", small)
    parts = train_fold(FoldJob(case.job(out="halves"), 0))
    assert parts["micro_batch"] == 4
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-3)

    def none(self: object, inputs: torch.Tensor, held: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_grad_enabled() and bool(
            inputs.any()
        ):  # not the zeros by which the network is looked at
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            )
        return forward(self, inputs, held)  # type: ignore[arg-type]

    monkeypatch.setattr(task_module.Network, "forward", none)
    with pytest.raises(HeadraceError, match="not even one image fits into memory"):
        train_fold(FoldJob(case.job(out="none-fits"), 0))


def test_a_full_disk_leaves_nothing_half_written(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that cannot be written names the errno; the head's files are as they were."""
    job = case.job(out="full-disk")
    head = Path(job.head_result).read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(PublishFailed, match=r"ENOSPC|No space left"):
            train_fold(FoldJob(job, 0))
    assert Path(job.head_result).read_bytes() == head
    assert not list(Path(job.folder).glob("*.h5"))
    assert (
        checkpoint_module.load_checkpoint(
            Path(job.folder) / "checkpoint-0.safetensors", f"{job.key} 0"
        )
        is None
    )


def test_time_that_is_up_ends_training_at_the_best_epoch_so_far(case: Case) -> None:
    """A limit in seconds is looked at after each epoch; one epoch is always done."""
    result = train_fold(FoldJob(case.job(epochs=50, patience=50, out="time"), 0, seconds=0.0))
    assert result["stopped"] == "time"
    assert result["epochs"] == 1


def test_flips_turn_whole_images(tmp_path: Path) -> None:
    """Each row is as it was, or mirrored; pixels have their channels last, maps first; both ways
    occur.
    """
    draw = np.random.default_rng(0)
    pixels = torch.arange(64 * 2 * 3 * 3).view(64, 2, 3, 3)
    flipped = random_flips(pixels, "flip", draw, channels_last=True)
    same = [torch.equal(a, b) for a, b in zip(flipped, pixels, strict=True)]
    mirrored = [torch.equal(a, b.flip(1)) for a, b in zip(flipped, pixels, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 16 < sum(same) < 48
    maps = torch.arange(64 * 3 * 2 * 3).view(64, 3, 2, 3)
    found = random_flips(maps, "flips", draw, channels_last=False)
    ways = [
        [torch.equal(a, b.flip(axes)) for axes in ([], [1], [2], [1, 2])]
        for a, b in zip(found, maps, strict=True)
    ]
    assert np.array(ways).any(1).all()
    assert np.array(ways).any(0).all()
