"""What runs on GPUs, tried without one: stand-ins note what they are asked for."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.run import work_unit as unit_module
from headrace.extract.run.device import try_batch_sizes
from headrace.extract.run.plan import ExtractJob
from headrace.extract.run.work_unit import run_work_unit
from headrace.extract.spec import BackboneSpec, Sample
from headrace.extract.taps.describe import feature_specs
from headrace.extract.taps.resolve import resolve_taps
from headrace.heads import bank
from headrace.heads.data.task import Task
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.spec import Halving


@pytest.mark.parametrize(("fits", "found"), [(1, 1), (2, 2), (9, 8), (31, 16), (32, 32), (100, 64)])
def test_where_32_images_do_not_fit_the_batch_is_halved(fits, found):
    """The largest power of two that fits, down to a single image."""

    def rate(count):
        if count > fits:
            raise torch.OutOfMemoryError
        return float(count)

    assert try_batch_sizes(rate) == found


def job_of(folder, seeds, number):
    """A unit of two images and a network of random weights for each seed."""
    rng = np.random.default_rng(number)
    samples = []
    for index in range(2):
        path = folder / f"{number}-{index}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        samples.append(Sample(path.name, str(path), hash_bytes(path.read_bytes())))
    networks = []
    for seed in seeds:
        spec = BackboneSpec("timm:test_resnet", f"random:{seed}", image_size=32)
        backbone = load_backbone(spec)
        networks.append(
            (spec, tuple(feature_specs(backbone, resolve_taps(backbone, ["layer2.avg"]))))
        )
    return ExtractJob(str(folder / "cache"), f"unit{number}", tuple(networks), tuple(samples))


def test_networks_are_made_once_however_many_a_run_has(tmp_path, monkeypatch):
    """Six networks, three units: each is copied and tuned once; a run of other networks takes their
    place.
    """
    made = Counter()
    real = unit_module.make_forward

    def counting(backbone, *args, **kwargs):
        made[backbone.spec.weights] += 1
        return real(backbone, *args, **kwargs)

    monkeypatch.setattr(unit_module, "make_forward", counting)
    for name in ("_backbones", "_forwards"):
        monkeypatch.setattr(unit_module, name, unit_module._RecentValues())
    loaded = Counter()
    monkeypatch.setattr(
        unit_module,
        "load_backbone",
        lambda spec: loaded.update([spec.weights]) or load_backbone(spec),
    )
    jobs = [job_of(tmp_path, range(6), number) for number in range(3)]
    for job in jobs:
        run_work_unit(job)
    assert made == loaded == {f"random:{seed}": 1 for seed in range(6)}
    assert len(unit_module._forwards._values) == 6
    run_work_unit(job_of(tmp_path, [7], 3))
    assert len(unit_module._forwards._values) == unit_module._MIN_KEPT_NETWORKS


@pytest.mark.parametrize(
    ("room", "halving", "where"),
    [
        (9, None, [("cuda", 5)]),
        (2, None, [("cuda", 5), ("cuda", 2), ("cuda", 3), ("cuda", 1), ("cuda", 2)]),
        (0, None, [("cuda", 5), ("cuda", 2), *[("cuda", 1), ("cpu", 1)] * 2]),
        (2, Halving(), [("cuda", 5), ("cpu", 5)]),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_heads_that_do_not_fit_a_gpu_are_trained_in_smaller_groups_then_on_the_cpu(
    monkeypatch, room, halving, where, error
):
    """None of them fails for it; those that compete with one another stay together."""
    tried = []

    def fitter(kind, data, options):
        device = options.device

        def fit(specs):
            tried.append((device, len(specs)))
            if device == "cuda" and len(specs) > room:
                raise error
            return [bank.FitResult(spec, 0, {}, 0.0, 0.0, 1, 0.0, None, None) for spec in specs]

        return fit

    monkeypatch.setattr(bank, "_fitter", fitter)
    monkeypatch.setattr(bank, "check_device", lambda device: None)
    rows = np.arange(4)
    task = Task(
        "single",
        ("a", "b"),
        rows.astype(str),
        rows.astype("S32"),
        rows % 2,
        rows.astype(np.int16) % 2,
        rows * 1.0,
    )
    specs = [LogisticSpec(C=float(c)) for c in range(1, 6)]
    fits = bank.fit_bank(np.zeros((4, 2)), task, specs, device="cuda", halving=halving)
    assert [fit.spec for fit in fits] == specs
    assert all(fit.error is None for fit in fits)
    assert tried[: len(where)] == where
