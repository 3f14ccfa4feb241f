"""Units of work: nothing lost, nothing twice, no row shifted; views, devices, and what may fail in
between.
"""

import dataclasses
import functools
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.malformed_images import malformed_corpus

from headrace.cache.errors import SpecMismatch
from headrace.cache.feature_set import open_feature_set
from headrace.cache.publish import feature_set_path
from headrace.cache.spec import FeatureSpec
from headrace.extract.backbones.backbone import Backbone, load_backbone
from headrace.extract.errors import BackboneError, SourceError
from headrace.extract.images.content_hashes import content_hashes
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.preprocessing import DecodedImage, Preprocessing, decode_pixels
from headrace.extract.images.views import (
    Augmentation,
    Symmetries,
    parse_view,
    render_view,
    view_json,
)
from headrace.extract.run import rendering as decode_module
from headrace.extract.run.device import BatchLimit, launch_forward, try_batch_sizes
from headrace.extract.run.plan import BackboneFeatures, ExtractJob, plan_work_units
from headrace.extract.run.work_unit import run_work_unit, run_work_units
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.describe import feature_specs
from headrace.extract.taps.forward import Forward, make_forward
from headrace.extract.taps.resolve import resolve_taps

SMALL = BackboneSpec("timm:mobilenetv3_small_050", "random:0", image_size=32, crop_fraction=1.0)
TAPS = ["blocks.1.avg", "blocks.3.max", "pre_logits"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_images(folder: Path, count: int, seed: int = 0) -> pd.DataFrame:
    """Noise PNGs of different sizes; columns id, path, content."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        path = folder / f"{index:03}.png"
        Image.fromarray(
            random.integers(0, 256, (40 + index % 5, 36 + index % 7, 3), np.uint8)
        ).save(path)
        rows.append((path.name, str(path)))
    return with_content(pd.DataFrame(rows, columns=["id", "path"]), folder)


def with_content(samples: pd.DataFrame, folder: Path) -> pd.DataFrame:
    contents = content_hashes(samples, folder.parent / f"{folder.name}-index.parquet")
    return samples.assign(content=list(contents.hashes))


def specs_of(
    backbone: BackboneSpec = SMALL, taps: list[str] | None = None, **options: object
) -> tuple[FeatureSpec, ...]:
    loaded = load_backbone(backbone)
    return feature_specs(loaded, resolve_taps(loaded, taps or TAPS), **options)  # type: ignore[arg-type]


def known(cache: Path, specs: tuple[FeatureSpec, ...]) -> list[set[str]]:
    paths = [feature_set_path(cache, spec) for spec in specs]
    return [
        set(open_feature_set(path).cached_hashes()) if path.exists() else set() for path in paths
    ]


def plan_units(
    samples: pd.DataFrame,
    *,
    backbone: BackboneSpec,
    specs: tuple[FeatureSpec, ...],
    known: list[set[str]],
    **options: Any,
) -> list[ExtractJob]:
    return plan_work_units(samples, [BackboneFeatures(backbone, specs, known)], **options)


def extract(
    samples: pd.DataFrame, cache: Path, specs: tuple[FeatureSpec, ...], **options: object
) -> list[ExtractJob]:
    jobs = plan_units(
        samples, backbone=SMALL, specs=specs, known=known(cache, specs), cache_root=cache, **options
    )  # type: ignore[arg-type]
    for job in jobs:
        run_work_unit(job)
    return jobs


def stored(cache: Path, spec: FeatureSpec, samples: pd.DataFrame) -> np.ndarray:
    """(N, *shape) in the order of `samples`, looked up by content."""
    return np.asarray(
        open_feature_set(feature_set_path(cache, spec)).load(list(samples["content"]))
    )


@functools.cache
def plain_pass(backbone: BackboneSpec, tap: str) -> tuple[Backbone, Forward]:
    loaded = load_backbone(backbone)
    return loaded, make_forward(loaded, resolve_taps(loaded, [tap]))


def alone(sample: pd.Series, backbone: BackboneSpec, spec: FeatureSpec) -> np.ndarray:
    """The reference: one image through the plain pass."""
    loaded, forward = plain_pass(backbone, spec.name)
    index, augmentation = parse_view(spec.view)
    image = decode_image(Path(sample["path"]).read_bytes())
    pixels = render_view(image, sample["content"], index, augmentation, loaded.preprocessing)
    (out,) = forward(torch.from_numpy(pixels.copy())[None])
    return out[0].numpy()


def shard_bytes(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*.h5"))}


def test_rows_belong_to_their_images(tmp_path: Path) -> None:
    """Every stored row is what its image gives alone, for every tap and view, across batches and
    units.
    """
    samples = make_images(tmp_path / "images", 21)
    specs = specs_of(views=2)
    jobs = extract(samples, tmp_path / "cache", specs, images_per_shard=9, batch_size=4)
    assert [len(job.contents) for job in jobs] == [9, 9, 3]
    for spec in specs:
        found = stored(tmp_path / "cache", spec, samples).astype(np.float32)
        for row in (0, 8, 9, 20):
            expected = alone(samples.iloc[row], SMALL, spec)
            assert np.abs(found[row] - expected).max() <= 2e-3 * max(1.0, np.abs(expected).max()), (
                spec.name,
                row,
            )


def test_compressed_shards_hold_the_same_rows(tmp_path: Path) -> None:
    """Compression is how a shard is written, no part of what it is: the fingerprint is the same,
    and so are the rows.
    """
    samples = make_images(tmp_path / "images", 6)
    specs = specs_of()
    extract(samples, tmp_path / "plain", specs)
    extract(samples, tmp_path / "packed", specs, compression="bitshuffle-lz4")
    for spec in specs:
        assert np.array_equal(
            stored(tmp_path / "plain", spec, samples), stored(tmp_path / "packed", spec, samples)
        )
    assert shard_bytes(tmp_path / "plain").keys() == shard_bytes(tmp_path / "packed").keys()
    assert shard_bytes(tmp_path / "plain") != shard_bytes(tmp_path / "packed")


def test_second_run_does_nothing(tmp_path: Path) -> None:
    """Neither re-ordering, nor renaming, nor a duplicate is new; a new image, and only it, is."""
    samples = make_images(tmp_path / "images", 10)
    specs = specs_of()
    extract(samples, tmp_path / "cache", specs)
    shuffled = samples.sample(frac=1, random_state=1).assign(
        id=lambda frame: "renamed-" + frame["id"]
    )
    assert extract(pd.concat([shuffled, shuffled.head(3)]), tmp_path / "cache", specs) == []
    (tmp_path / "images/extra.png").write_bytes(make_png(5))
    extra = pd.DataFrame({"id": ["x"], "path": [str(tmp_path / "images/extra.png")]})
    more = with_content(pd.concat([samples, extra]), tmp_path / "images")
    jobs = extract(more, tmp_path / "cache", specs)
    assert [job.contents for job in jobs] == [(more["content"].iloc[-1],)]


def make_png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 30, 3), np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def test_missing_taps_alone_are_computed(tmp_path: Path) -> None:
    """A tap that is added later is extracted alone, and for all images; the others are
    not touched.
    """
    samples = make_images(tmp_path / "images", 6)
    first, both = specs_of(taps=["blocks.3.max"]), specs_of(taps=["blocks.3.max", "blocks.1.avg"])
    extract(samples, tmp_path / "cache", first)
    before = shard_bytes(tmp_path / "cache")
    jobs = extract(samples, tmp_path / "cache", both)
    assert [[spec.name for _, specs in job.networks for spec in specs] for job in jobs] == [
        ["blocks.1.avg"]
    ]
    after = shard_bytes(tmp_path / "cache")
    assert {name: after[name] for name in before} == before
    assert extract(samples, tmp_path / "cache", both) == []


@pytest.mark.slow
def test_interrupted_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before, within and after units of three shards, the finished cache has the same
    bytes.
    """
    samples = make_images(tmp_path / "images", 12)
    specs = specs_of()
    extract(samples, tmp_path / "whole", specs, images_per_shard=5)
    expected = shard_bytes(tmp_path / "whole")
    assert len(expected) == 3 * 3
    from headrace.extract.run import work_unit as unit_module

    publish = unit_module.publish_shard
    lock = threading.Lock()
    for survivors in (0, 1, 4, 8):  # none, within the first unit, the second and the last
        cache = tmp_path / f"cut-{survivors}"
        left = [survivors]

        def limited(*args: object, left: list[int] = left, **options: object) -> object:
            with lock:
                if left[0] == 0:
                    raise OSError("killed")
                left[0] -= 1
            return publish(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(unit_module, "publish_shard", limited)
        with pytest.raises(OSError, match="killed"):
            extract(samples, cache, specs, images_per_shard=5)
        monkeypatch.setattr(unit_module, "publish_shard", publish)
        assert len(shard_bytes(cache)) == survivors
        extract(samples, cache, specs, images_per_shard=5)
        assert shard_bytes(cache) == expected


def test_run_units_is_run_unit_in_a_row(tmp_path: Path) -> None:
    """The overlapping form gives the same bytes and one report per unit, in order."""
    samples = make_images(tmp_path / "images", 14)
    specs = specs_of()
    extract(samples, tmp_path / "a", specs, images_per_shard=4)
    jobs = plan_units(
        samples,
        backbone=SMALL,
        specs=specs,
        known=[set()] * 3,
        cache_root=tmp_path / "b",
        images_per_shard=4,
    )
    reports = list(run_work_units(jobs))
    assert [report.work_unit for report in reports] == [job.work_unit for job in jobs]
    assert [report.rows for report in reports] == [4, 4, 4, 2]
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


@pytest.mark.slow
def test_several_backbones_decode_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks with different inputs, three views of one: each file is decoded once."""
    samples = make_images(tmp_path / "images", 7)
    other = BackboneSpec("torchvision:squeezenet1_1", "random:0", image_size=40)
    networks = [
        BackboneFeatures(SMALL, specs_of(views=3), [set()] * 9),
        BackboneFeatures(other, specs_of(other, ["features.5.avg"]), [set()]),
    ]
    decoded: list[int] = []

    def counting(data: bytes, how: Preprocessing, *, in_parts: bool) -> DecodedImage:
        decoded.append(len(data))
        return decode_pixels(data, how, in_parts=in_parts)

    monkeypatch.setattr(decode_module, "decode_pixels", counting)
    jobs = plan_work_units(samples, networks, cache_root=tmp_path / "cache")
    assert len(jobs) == 1
    assert run_work_unit(jobs[0]).rows == 7
    assert len(decoded) == 7
    for network in networks:
        for spec in network.specs:
            expected = alone(samples.iloc[3], network.backbone, spec)
            found = stored(tmp_path / "cache", spec, samples)[3].astype(np.float32)
            assert np.abs(found - expected).max() <= 2e-3 * max(1.0, np.abs(expected).max())


def test_malformed_images_shift_no_row(tmp_path: Path) -> None:
    """Hundreds of broken files among good ones: each listed once with its reason, every good row
    its own image's.
    """
    folder = tmp_path / "images"
    good = make_images(folder, 30)
    corpus = malformed_corpus()
    rows = []
    for index, data in enumerate(corpus):
        path = folder / f"odd-{index:03}.jpg"
        path.write_bytes(data)
        rows.append((path.name, str(path)))
    odd = pd.DataFrame(rows, columns=["id", "path"])
    # Good images between the odd ones, in an order that would show any shift
    mixed = (
        pd.concat([good[["id", "path"]], odd]).sample(frac=1, random_state=0).reset_index(drop=True)
    )
    mixed = with_content(mixed, folder)
    specs = specs_of()
    jobs = plan_units(
        mixed,
        backbone=SMALL,
        specs=specs,
        known=[set()] * 3,
        cache_root=tmp_path / "cache",
        images_per_shard=64,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reports = [run_work_unit(job) for job in jobs]
    decodable = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data, content in zip(
            corpus, mixed.set_index("id").loc[odd["id"], "content"], strict=True
        ):
            try:
                decode_image(data)
                decodable.add(content)
            except Exception:  # noqa: BLE001
                pass
    failed = [failure for report in reports for failure in report.failed]
    assert len(odd) >= 300
    assert {failure.content_hash for failure in failed} == set(mixed["content"]) - set(
        good["content"]
    ) - decodable
    assert all(failure.reason for failure in failed)
    assert sum(report.rows for report in reports) == len(good) + len(decodable)
    for spec in specs:
        feature_set = open_feature_set(feature_set_path(tmp_path / "cache", spec))
        assert {failure.content_hash for failure in feature_set.failures()} == {
            failure.content_hash for failure in failed
        }
        assert set(feature_set.cached_hashes()) == set(mixed["content"])
        found = stored(tmp_path / "cache", spec, good).astype(np.float32)
        for row in range(0, 30, 7):
            expected = alone(good.iloc[row], SMALL, spec)
            assert np.abs(found[row] - expected).max() <= 2e-3 * max(1.0, np.abs(expected).max())


def test_a_file_that_changed_or_went_is_not_recorded(tmp_path: Path) -> None:
    """Its features would be another image's, and its failure another content's: it is reported, and
    lacking ever after.
    """
    samples = make_images(tmp_path / "images", 5)
    specs = specs_of()
    (job,) = plan_units(
        samples, backbone=SMALL, specs=specs, known=[set()] * 3, cache_root=tmp_path / "cache"
    )
    Path(samples["path"][1]).write_bytes(make_png(9))
    Path(samples["path"][3]).unlink()
    report = run_work_unit(job)
    assert report.rows == 3
    assert report.failed == ()
    assert [name for name, _ in report.unread] == ["001.png", "003.png"]
    assert "changed since" in report.unread[0][1]
    there = set(open_feature_set(feature_set_path(tmp_path / "cache", specs[0])).cached_hashes())
    assert there == set(samples["content"]) - {samples["content"][1], samples["content"][3]}


def test_a_disk_that_was_away(tmp_path: Path) -> None:
    """A unit of which nothing, or not all, could be read is finished by the next run, whatever its
    name.
    """
    samples = make_images(tmp_path / "images", 6)
    specs = specs_of()
    jobs = plan_units(
        samples,
        backbone=SMALL,
        specs=specs,
        known=[set()] * 3,
        cache_root=tmp_path / "cache",
        images_per_shard=3,
    )
    (tmp_path / "images").rename(tmp_path / "away")
    assert [(report.rows, len(report.unread)) for report in run_work_units(jobs)] == [
        (0, 3),
        (0, 3),
    ]
    assert shard_bytes(tmp_path / "cache") == {}
    (tmp_path / "away").rename(tmp_path / "images")
    Path(samples["path"][1]).rename(tmp_path / "1.png")
    extract(samples, tmp_path / "cache", specs, images_per_shard=3)
    (tmp_path / "1.png").rename(samples["path"][1])
    extract(samples, tmp_path / "cache", specs, images_per_shard=3)
    assert known(tmp_path / "cache", specs) == [set(samples["content"])] * 3


def test_strict_stops(tmp_path: Path) -> None:
    """At the first undecodable image, naming it, with nothing published."""
    samples = make_images(tmp_path / "images", 3)
    (tmp_path / "images/001.png").write_bytes(b"broken")
    samples = with_content(samples[["id", "path"]], tmp_path / "images")
    specs = specs_of()
    (job,) = plan_units(
        samples,
        backbone=SMALL,
        specs=specs,
        known=[set()] * 3,
        cache_root=tmp_path / "c",
        strict=True,
    )
    with pytest.raises(SourceError, match=r"001.png: not an image"):
        run_work_unit(job)
    assert shard_bytes(tmp_path / "c") == {}


def test_other_weights_on_the_worker_are_refused(tmp_path: Path) -> None:
    """A worker whose file differs from the planner's must not fill the planner's feature sets."""
    samples = make_images(tmp_path / "images", 2)
    backbone = load_backbone(SMALL)
    path = tmp_path / "weights.pth"
    torch.save(backbone.module.state_dict(), path)
    spec = BackboneSpec(SMALL.name, str(path), image_size=32, crop_fraction=1.0)
    specs = specs_of(spec)
    (job,) = plan_units(
        samples, backbone=spec, specs=specs, known=[set()] * 3, cache_root=tmp_path / "cache"
    )
    other = {
        name: tensor + 1 if "weight" in name else tensor
        for name, tensor in backbone.module.state_dict().items()
    }
    torch.save({**other, "classifier.bias": torch.zeros_like(other["classifier.bias"])}, path)
    with pytest.raises(SpecMismatch, match="the weights on this machine"):
        run_work_unit(job)


def test_values_that_the_storage_cannot_hold_fail_alone(tmp_path: Path) -> None:
    """One image whose features overflow float16 is a failure of that feature set; the others, and
    float32, are kept.
    """
    samples = make_images(tmp_path / "images", 3)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "images/001.png")
    samples = with_content(samples[["id", "path"]], tmp_path / "images")
    loud = BackboneSpec(f"python:{__name__}:loud_on_white", None)
    loaded = load_backbone(loud)
    taps = resolve_taps(loaded, ["1.max"])
    specs = (*feature_specs(loaded, taps), *feature_specs(loaded, taps, dtype="float32"))
    (job,) = plan_units(
        samples, backbone=loud, specs=specs, known=[set()] * 2, cache_root=tmp_path / "cache"
    )
    assert run_work_unit(job).rows == 3
    half, full = (open_feature_set(feature_set_path(tmp_path / "cache", spec)) for spec in specs)
    assert [failure.id for failure in half.failures()] == ["001.png"]
    assert "which float16 cannot hold" in half.failures()[0].reason
    assert list(full.failures()) == []
    assert len(full) == 3
    assert len(half) == 2


def loud_on_white() -> tuple[torch.nn.Module, object]:
    """A layer that gives 1e5 on white, and nothing on noise."""

    layer = torch.nn.Conv2d(3, 2, 16, stride=16)
    with torch.no_grad():
        layer.weight.fill_(0)
        layer.bias.fill_(-3e5)
        layer.weight += 4e5 / (3 * 256)
    how = Preprocessing((32, 32), (32, 32), "squash", "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return torch.nn.Sequential(layer, torch.nn.ReLU()), how


def test_views_depend_on_content_and_number_alone(tmp_path: Path) -> None:
    """The same again, another for another view, seed or content; the flip and the crop move, the
    size does not.
    """
    backbone = load_backbone(SMALL)
    image = decode_image(make_png(1))
    how, augmentation = backbone.preprocessing, Augmentation()

    def view(content: str, index: int, augmentation: Augmentation = augmentation) -> bytes:
        pixels = render_view(image, content, index, augmentation, how)
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        return pixels.tobytes()

    drawn = [
        view("a", 1),
        view("a", 2),
        view("b", 1),
        view("a", 1, Augmentation(seed=1)),
        view("a", 0),
    ]
    assert len(set(drawn)) == 5
    assert view("a", 1) == drawn[0]
    assert view("b", 0) == drawn[4], "view 0 is the evaluation crop"
    for index in (0, 3):
        assert parse_view(view_json(index, augmentation)) == (index, augmentation)
    assert view_json(0, Augmentation(seed=5)) == view_json(0, Augmentation())


def test_symmetric_views_are_those_of_the_square() -> None:
    """Eight different pictures, closed under mirroring and turning; the first four need no square
    crop; the name says which.
    """
    image = decode_image(make_png(1))
    how = load_backbone(SMALL).preprocessing
    views = [render_view(image, "a", index, Symmetries(), how) for index in range(8)]
    crop = render_view(image, "a", 0, Augmentation(), how)
    turned = [np.rot90(each, quarters) for each in (crop, crop[:, ::-1]) for quarters in range(4)]
    assert {view.tobytes() for view in views} == {
        np.ascontiguousarray(each).tobytes() for each in turned
    }
    assert len({view.tobytes() for view in views}) == 8
    for view, expected in zip(
        views, (crop, crop[:, ::-1], crop[::-1], crop[::-1, ::-1]), strict=False
    ):
        assert np.array_equal(view, expected)
    for index in range(8):
        assert parse_view(view_json(index, Symmetries()))[0] == index
    assert parse_view(view_json(5, Symmetries())) == (5, Symmetries())
    assert view_json(0, Symmetries()) == view_json(0, Augmentation()), (
        "the evaluation crop is extracted once for all"
    )
    wide = dataclasses.replace(how, crop=(16, 32))
    assert render_view(image, "a", 3, Symmetries(), wide).shape == (16, 32, 3)


def test_views_of_extreme_shapes() -> None:
    """One pixel wide, one pixel high, larger than the network's input: always the
    network's size.
    """
    how = load_backbone(SMALL).preprocessing
    for size in ((1, 1), (1, 300), (300, 1), (500, 20)):
        for mode in ("RGB", "L"):
            for index in range(4):
                pixels = render_view(Image.new(mode, size), "x", index, Augmentation(), how)
                assert pixels.shape == (32, 32, 3)


Pass = Callable[[torch.Tensor], list[torch.Tensor]]


def out_of_memory_above(limit: int, forward: Pass) -> tuple[Pass, list[int]]:
    """A pass that runs out of memory on larger batches, and the sizes that were tried."""
    tried: list[int] = []

    def limited(pixels: torch.Tensor) -> list[torch.Tensor]:
        tried.append(len(pixels))
        if len(pixels) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pixels)

    return limited, tried


def test_out_of_memory_halves_the_batch() -> None:
    """The batch is not lost, the features are the same to rounding, and the size that failed is not
    tried again.
    """
    backbone = load_backbone(SMALL)
    forward = make_forward(backbone, resolve_taps(backbone, TAPS))
    pixels = torch.randint(0, 256, (22, 32, 32, 3), dtype=torch.uint8)
    expected = forward(pixels)
    limited, tried = out_of_memory_above(5, forward)
    limit = BatchLimit(16)
    for _ in range(2):
        found = launch_forward(limited, pixels, "cpu", limit)()
        for ours, theirs in zip(found, expected, strict=True):
            assert np.abs(ours - theirs.numpy()).max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert limit.images == 4
    assert [size for size in tried if size > 5] == [16, 8]
    hopeless, _ = out_of_memory_above(0, forward)
    with pytest.raises(torch.OutOfMemoryError):
        launch_forward(hopeless, pixels, "cpu", BatchLimit(4))


def test_out_of_memory_in_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit whose passes run out of memory above 3 images is finished all the same."""
    from headrace.extract.run import work_unit as unit_module

    samples = make_images(tmp_path / "images", 11)
    specs = specs_of()
    extract(samples, tmp_path / "whole", specs, batch_size=11)
    real = unit_module._forward
    monkeypatch.setattr(
        unit_module, "_forward", lambda *args: out_of_memory_above(3, real(*args))[0]
    )
    extract(samples, tmp_path / "halved", specs, batch_size=11)
    for spec in specs:
        ours, theirs = (
            stored(tmp_path / name, spec, samples).astype(float) for name in ("halved", "whole")
        )
        assert np.abs(ours - theirs).max() <= 2e-3 * max(1.0, np.abs(theirs).max())


def test_batch_sizes_are_found_by_trying() -> None:
    """Doubled while it pays and fits."""

    def fits(limit: int, rates: dict[int, float]) -> Callable[[int], float]:
        def rate(count: int) -> float:
            if count > limit:
                raise torch.OutOfMemoryError
            return rates[count]

        return rate

    rising = {32: 1.0, 64: 1.5, 128: 2.0, 256: 2.05, 512: 2.1, 1024: 9.0}
    assert try_batch_sizes(fits(2000, rising)) == 128
    assert try_batch_sizes(fits(100, rising)) == 64
    assert try_batch_sizes(fits(1, rising)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    samples = make_images(tmp_path / "images", 1)
    specs = specs_of()
    for device, message in (
        ("cuda", "sees no GPU here. Use device cpu"),
        ("gpu", "expected cpu, or an accelerator of PyTorch's: cuda, xpu or mps"),
    ):
        (job,) = plan_units(
            samples,
            backbone=SMALL,
            specs=specs,
            known=[set()] * 3,
            cache_root=tmp_path / "c",
            device=device,
        )
        with pytest.raises(BackboneError, match=message):
            run_work_unit(job)


def test_jobs_are_small_and_travel(tmp_path: Path) -> None:
    samples = make_images(tmp_path / "images", 4)
    (job,) = plan_units(
        samples, backbone=SMALL, specs=specs_of(), known=[set()] * 3, cache_root=tmp_path / "cache"
    )
    assert pickle.loads(pickle.dumps(job)) == job
    assert len(pickle.dumps(job)) < 5000


def test_units_of_large_taps_are_smaller(tmp_path: Path) -> None:
    """No shard of the largest tap exceeds 256 MB, whatever the unit size that was meant."""
    specs = specs_of(
        BackboneSpec(SMALL.name, "random:0", image_size=224),
        ["conv_stem.map", "blocks.3.avg"],
        dtype="float32",
    )
    samples = pd.DataFrame(
        {"id": map(str, range(4000)), "path": "x", "content": [f"{n:032x}" for n in range(4000)]}
    )
    jobs = plan_units(samples, backbone=SMALL, specs=specs, known=[set()] * 2, cache_root=tmp_path)
    largest = max(int(np.prod(spec.shape)) * 4 for spec in specs)
    assert all(len(job.contents) * largest <= 256 * 2**20 for job in jobs)
    assert sum(len(job.contents) for job in jobs) == 4000
    small = specs_of(taps=["blocks.3.avg"])
    sizes = {
        device: len(
            plan_units(
                samples, backbone=SMALL, specs=small, known=[()], cache_root=tmp_path, device=device
            )[0].samples
        )
        for device in ("cpu", "cuda")
    }
    assert sizes["cuda"] > sizes["cpu"] >= 100  # a GPU's batches are no larger than its units
