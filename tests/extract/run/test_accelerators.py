"""Extraction on accelerators, tried without one: see `support.accelerators`."""

import copy
import inspect
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from support.accelerators import Noted, cuda_graphs, cuda_on_cpu, fake_cuda, simulate

from headrace.cache.feature_set import open_feature_set
from headrace.cache.publish import feature_set_path
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.backbones.fused import fold_batch_norms
from headrace.extract.errors import BackboneError
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.run import device as device_module, work_unit as unit_module
from headrace.extract.run.cuda_graph import GraphedForward
from headrace.extract.run.device import BatchLimit, check_device, find_batch_size, launch_forward
from headrace.extract.run.plan import ExtractJob
from headrace.extract.run.work_unit import run_work_unit
from headrace.extract.spec import BackboneSpec, Sample
from headrace.extract.taps import forward as forward_module
from headrace.extract.taps.describe import feature_specs
from headrace.extract.taps.forward import hook_forward, make_forward, make_normalizer
from headrace.extract.taps.resolve import Tap, backbone_nodes, resolve_taps

RESNET = BackboneSpec("timm:test_resnet", "random:0", image_size=32, crop_fraction=1.0)
VIT = BackboneSpec("timm:test_vit", "random:0")
TAPS = {
    RESNET.name: ["layer1.avg", "layer2.map", "layer4.avg"],
    VIT.name: ["blocks.1.avg", "norm.avg"],
}


@pytest.fixture(autouse=True)
def _new_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept of a test's networks for the next one."""
    for name in ("_backbones", "_forwards"):
        monkeypatch.setattr(unit_module, name, unit_module._RecentValues())


def images(folder: Path, count: int) -> list[Sample]:
    """So many images, the seventh of which is none."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        if index == 6:
            path.write_bytes(b"no image")
        samples.append(Sample(path.name, str(path), hash_bytes(path.read_bytes())))
    return samples


def job_on(device: str, folder: Path, samples: list[Sample], **options: Any) -> ExtractJob:
    backbone = load_backbone(RESNET)
    specs = tuple(feature_specs(backbone, resolve_taps(backbone, TAPS[RESNET.name])))
    cache = str(folder / device.replace(":", ""))
    return ExtractJob(cache, "unit", ((RESNET, specs),), tuple(samples), device=device, **options)


def features(job: ExtractJob) -> list[np.ndarray]:
    (_, specs) = job.networks[0]
    paths = [feature_set_path(Path(job.cache_root), spec) for spec in specs]
    return [open_feature_set(path).read(slice(None)) for path in paths]


def test_features_by_openvino_are_those_of_pytorch(tmp_path: Path) -> None:
    samples = images(tmp_path, 11)
    by_torch = job_on("cpu", tmp_path / "torch", samples)
    by_openvino = job_on("cpu", tmp_path / "openvino", samples, runtime="openvino")
    run_work_unit(by_torch)
    assert run_work_unit(by_openvino).rows == 10
    for ours, theirs in zip(features(by_openvino), features(by_torch), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_features_of_an_accelerator_are_those_of_the_cpu(tmp_path: Path, device: str) -> None:
    """A whole unit: batches found by trying, results waited for on the device's own stream."""
    samples = images(tmp_path, 23)
    on_cpu = job_on("cpu", tmp_path, samples)
    on_device = job_on(device, tmp_path, samples)
    run_work_unit(on_cpu)
    with cuda_on_cpu() as noted:
        report = run_work_unit(on_device)
    assert (report.rows, len(report.failed)) == (22, 1)
    for ours, theirs in zip(features(on_device), features(on_cpu), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)
    recorded = [event for event in noted.events if event != "waited"]
    assert set(recorded) == {f"recorded on the stream of {device}"}
    assert noted.events.count("waited") == len(recorded) > 0
    assert set(noted.current) == ({1} if device == "cuda:1" else {0} if ":" in device else set())


@pytest.mark.parametrize("room", [1, 2, 5, 16])
def test_a_batch_that_does_not_fit_is_halved_and_its_activations_are_let_go(
    tmp_path: Path, room: int
) -> None:
    """Nothing is lost but the time; when the cache is emptied, none of the pass's tensors is held."""
    samples = images(tmp_path, 23)
    on_cpu = job_on("cpu", tmp_path, samples)
    on_device = job_on("cuda:1", tmp_path, samples, batch_size=16)
    run_work_unit(on_cpu)
    with cuda_on_cpu(room=room) as noted:
        assert run_work_unit(on_device).rows == 22
    for ours, theirs in zip(features(on_device), features(on_cpu), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)
    assert set(noted.alive_when_emptied) <= {0}
    assert (len(noted.alive_when_emptied) > 0) == (room < 16)


def test_an_image_that_does_not_fit_alone_says_so(tmp_path: Path) -> None:
    with (
        cuda_on_cpu(room=0),
        pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"),
    ):
        run_work_unit(job_on("cuda", tmp_path, images(tmp_path, 3), batch_size=4))


@pytest.mark.parametrize(("room", "found"), [(1, 1), (3, 2), (9, 8), (40, 32)])
def test_batch_sizes_are_tried_down_to_one(monkeypatch: pytest.MonkeyPatch, room, found) -> None:
    """The largest power of two that fits, here where a larger one is never worth it."""
    monkeypatch.setattr(device_module, "_WORTH_DOUBLING", 1e9)
    backbone = load_backbone(RESNET)
    taps = resolve_taps(backbone, ["layer1.avg"])
    with cuda_on_cpu(room=room):
        forward = make_forward(backbone, taps, device="cuda:1")
        assert find_batch_size(forward, (32, 32, 3), "cuda:1") == found


@pytest.mark.parametrize(
    ("count", "limit", "shapes"),
    [(22, 16, {16, 8}), (5, 16, {8}), (16, 16, {16}), (1, 16, {1}), (50, 48, {48, 2})],
)
def test_batches_have_few_shapes(count: int, limit: int, shapes: set[int]) -> None:
    """Filled up to a power of two or the limit; what was filled in is in no output."""
    pixels = torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8)
    seen = set()

    def forward(batch: torch.Tensor) -> list[torch.Tensor]:
        seen.add(len(batch))
        return [batch.float().mean((1, 2))]

    with cuda_on_cpu():
        (output,) = launch_forward(forward, pixels, "cuda", BatchLimit(limit))()
    assert seen == shapes
    np.testing.assert_array_equal(output, pixels.float().mean((1, 2)))


def graphed_resnet() -> GraphedForward:
    backbone = load_backbone(RESNET)
    return GraphedForward(make_forward(backbone, resolve_taps(backbone, TAPS[RESNET.name])))


def pixels_of(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)


def test_one_graph_serves_every_batch_of_a_unit(tmp_path: Path) -> None:
    """The ragged one at the end too, filled up to the same size; features are those of the CPU."""
    samples = images(tmp_path, 23)
    on_cpu = job_on("cpu", tmp_path, samples)
    on_device = job_on("cuda:1", tmp_path, samples, batch_size=8, cuda_graphs=True)
    run_work_unit(on_cpu)
    with cuda_on_cpu() as noted, cuda_graphs(noted):
        run_work_unit(on_device)
    for ours, theirs in zip(features(on_device), features(on_cpu), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)
    assert noted.batches == {1, 8}  # one image compares the folded network on the CPU
    assert [event for event in noted.events if "of cuda:1" not in event and event != "waited"] == [
        "the side stream waits for the default stream",
        "the default stream waits for the side stream",
        "recording on the side stream, thread_local",
        *["replayed on the default stream"] * 3,  # the first is compared with the pass
    ]


def test_this_pytorch_takes_what_the_stand_in_takes() -> None:
    assert {"stream", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph).parameters)
    assert callable(torch.cuda.CUDAGraph.replay)
    assert callable(torch.cuda.Stream.wait_stream)


def test_a_graph_reads_each_batch_anew() -> None:
    forward, noted = graphed_resnet(), Noted()
    with cuda_graphs(noted):
        for pixels in (pixels_of(4), pixels_of(4).flip(0), pixels_of(4)):
            found = [output.clone() for output in forward.replay(pixels)]
            for ours, theirs in zip(found, forward(pixels), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert noted.events.count("recording on the side stream, thread_local") == 1


def test_after_a_lack_of_memory_a_smaller_batch_is_recorded_anew() -> None:
    """And nothing holds the graph of the larger one."""
    backbone = load_backbone(RESNET)
    taps = resolve_taps(backbone, TAPS[RESNET.name])
    pixels, limit = pixels_of(23), BatchLimit(16)
    expected = make_forward(backbone, taps)(pixels)
    with cuda_on_cpu(room=5) as noted, cuda_graphs(noted):
        forward = GraphedForward(make_forward(backbone, taps, device="cuda"))
        found = launch_forward(forward, pixels, "cuda", limit)()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert limit.images == 4
    assert set(noted.alive_when_emptied) == {0}
    assert noted.events.count("recording on the side stream, thread_local") == 1


def test_a_pass_that_cannot_be_recorded_runs_without_a_graph() -> None:
    """One warning, and one attempt."""
    forward, noted = graphed_resnet(), Noted()
    refusal = "operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA"
    with cuda_graphs(noted, refusal), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for pixels in (pixels_of(4), pixels_of(2)):
            for ours, theirs in zip(forward.replay(pixels), forward(pixels), strict=True):
                assert torch.equal(ours, theirs)
    assert [str(warning.message) for warning in warned] == [
        "the pass runs without a CUDA graph: operation not permitted when stream is capturing"
    ]
    assert noted.events.count("recording on the side stream, thread_local") == 1


def test_a_graph_with_other_outputs_than_the_pass_is_done_without() -> None:
    """Here the pass takes a value of its first batch for a constant, as `item` would."""

    def brightness(pixels: torch.Tensor) -> list[torch.Tensor]:
        return [pixels.float().mean((1, 2)) * float(np.asarray(pixels).max())]

    forward, noted, pixels = GraphedForward(brightness), Noted(), pixels_of(4)
    with (
        cuda_graphs(noted),
        pytest.warns(RuntimeWarning, match="without a CUDA graph: its outputs are others"),
    ):
        assert torch.equal(forward.replay(pixels)[0], brightness(pixels)[0])


@pytest.mark.parametrize(
    "message",
    ["CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory"],
)
def test_libraries_without_an_exception_of_their_own_run_out_of_memory_too(message: str) -> None:
    def forward(batch: torch.Tensor) -> list[torch.Tensor]:
        if len(batch) > 2:
            raise RuntimeError(message)
        return [batch.float()]

    limit = BatchLimit(8)
    with cuda_on_cpu():
        (output,) = launch_forward(forward, torch.zeros(7, 1, 1, 3), "cuda", limit)()
    assert (len(output), limit.images) == (7, 2)


def test_other_errors_of_a_pass_are_not_taken_for_a_lack_of_memory() -> None:
    def forward(batch: torch.Tensor) -> list[torch.Tensor]:
        raise RuntimeError("device-side assert triggered")

    with cuda_on_cpu(), pytest.raises(RuntimeError, match="device-side assert"):
        launch_forward(forward, torch.zeros(7, 1, 1, 3), "cuda", BatchLimit(8))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:2", "the last of 2 here is cuda:1. Use that one"),
        ("xpu", "sees cuda and no xpu here. Use device cuda or cpu"),
        ("gpu", "expected cpu, or an accelerator of PyTorch's: cuda, xpu or mps"),
    ],
)
def test_a_device_that_is_not_there_is_answered_with_one_that_is(device, message) -> None:
    with cuda_on_cpu():
        check_device("cuda:1")
        with pytest.raises(BackboneError, match=message):
            check_device(device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spec", [RESNET, VIT], ids=["resnet", "vit"])
def test_every_tensor_of_a_pass_is_on_its_device(spec: BackboneSpec, dtype: str) -> None:
    """Simulated tensors: none is left on the CPU or on the first GPU, outputs have their shapes."""
    device = "cuda:1"
    backbone = load_backbone(spec)
    taps = resolve_taps(backbone, TAPS[spec.name])
    nodes = backbone_nodes(backbone)
    expected = [list(out.shape[1:]) for out in make_forward(backbone, taps)(_pixels(backbone, 1))]
    module = copy.deepcopy(backbone.module)
    with fake_cuda() as noted:
        simulate(module, device)
        with (
            mock.patch.object(forward_module.copy, "deepcopy", lambda module: module),
            mock.patch.object(forward_module, "backbone_nodes", return_value=nodes),
            mock.patch.object(forward_module, "_for_accelerator", return_value=module),
            mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module),
            # Simulated tensors have no values to compare.
            mock.patch.object(forward_module, "require_repeatable"),
        ):
            moved = SimpleNamespace(
                spec=backbone.spec, module=module, preprocessing=backbone.preprocessing
            )
            forward = make_forward(moved, taps, device=device, compute_dtype=dtype)  # type: ignore[arg-type]
        pixels = torch.zeros((5, *backbone.preprocessing.crop, 3), dtype=torch.uint8)
        outputs = forward(pixels.to(device))
        assert {str(output.device) for output in outputs} == {device}
        assert [list(output.shape[1:]) for output in outputs] == expected
        launch_forward(forward, pixels, device, BatchLimit(2))
    assert noted.events == [f"recorded on the stream of {device}"]


def test_simulated_tensors_of_two_devices_do_not_mix() -> None:
    """What the test above would see."""
    with fake_cuda(), pytest.raises(RuntimeError, match="devices"):
        torch.zeros(1, device="cuda:0") + torch.zeros(1, device="cuda:1")


def _pixels(backbone: Any, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, *backbone.preprocessing.crop, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _outputs(backbone: Any, module: torch.nn.Module) -> list[torch.Tensor]:
    nodes = backbone_nodes(backbone)
    taps = [(tap, nodes[tap.node]) for tap in resolve_taps(backbone, TAPS[backbone.spec.name])]
    normalize = make_normalizer(backbone, "cpu")
    return hook_forward(copy.deepcopy(module), taps, normalize, "float32")(_pixels(backbone, 3))


def test_folded_norms_are_gone_and_change_nothing_but_the_last_digits() -> None:
    backbone = load_backbone(RESNET)
    for module in backbone.module.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -1, 1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    image = make_normalizer(backbone, "cpu")(_pixels(backbone, 1))
    folded = fold_batch_norms(backbone.module, {"layer1", "layer2", "layer4"}, image)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    for ours, theirs in zip(
        _outputs(backbone, folded),
        _outputs(backbone, backbone.module),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    load_backbone.__globals__["_load_cached"].cache_clear()


def test_a_tapped_convolution_keeps_its_norm() -> None:
    """Its own output is asked for, and not what the norm makes of it."""
    backbone = load_backbone(RESNET)
    image = make_normalizer(backbone, "cpu")(_pixels(backbone, 1))
    folded = fold_batch_norms(backbone.module, {"layer1.0.conv1"}, image)
    kept = [
        name for name, module in folded.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
    ]
    assert kept == ["layer1.0.bn1"]


def test_a_network_without_norms_is_not_copied() -> None:
    backbone = load_backbone(VIT)
    image = make_normalizer(backbone, "cpu")(_pixels(backbone, 1))
    assert fold_batch_norms(backbone.module, set(), image) is backbone.module


def test_the_network_on_an_accelerator_is_folded() -> None:
    backbone = load_backbone(RESNET)
    nodes = backbone_nodes(backbone)
    taps = [(tap, nodes[tap.node]) for tap in (Tap("layer2", "avg"), Tap("layer4", "avg"))]
    network = forward_module._for_accelerator(backbone, taps)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_units_at_a_time_share_a_network(tmp_path: Path) -> None:
    """As on a worker with a GPU: the taps of one thread's batch are never those of another's."""
    jobs = []
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        samples = images(folder, 9)[:6]
        for sample in samples:
            with Image.open(sample.path) as image:
                changed = np.asarray(image) // (number + 1)
            Image.fromarray(changed).save(sample.path)
        samples = [Sample(s.id, s.path, hash_bytes(Path(s.path).read_bytes())) for s in samples]
        jobs.append(job_on("cpu", folder, samples, batch_size=1))
    with ThreadPoolExecutor(2) as pool:
        assert [report.rows for report in pool.map(run_work_unit, jobs)] == [6] * 6
    at_a_time = [features(job) for job in jobs]
    for number, job in enumerate(jobs):
        alone = replace(job, cache_root=str(tmp_path / str(number) / "alone"))
        run_work_unit(alone)
        for ours, theirs in zip(at_a_time[number], features(alone), strict=True):
            assert np.array_equal(ours, theirs)
