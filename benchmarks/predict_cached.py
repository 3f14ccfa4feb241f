"""Predicting images whose features are cached, against running a network on them.

    python benchmarks/predict_cached.py [--quick] [--case known] [--folder DIR]

known: the command `headrace predict` on image files that the index of the cache knows, whole: its
start, the listing of the folder, the stamps of the files, the features, the table. Theirs: the same
head on the same features from one .npy file with scikit-learn, its table written by pandas.
pixels: the same command with --no-cache, on fewer images; the ratio is per image.
The last line is JSON {measure: figure}.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from headrace.cache.publish import create_feature_set, publish_shard
from headrace.extract.images.content_hashes import content_hashes, hash_bytes
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.spec_cache import load_feature_specs
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.persist import TrainedHead, save_head
from headrace.pipelines.paths import content_index

BACKBONE = BackboneSpec("torchvision:resnet18", weights="random:0", image_size=64)
CLASSES = ("a", "b", "c", "d")
ROWS_PER_SHARD = 1024
CASES = ("known", "pixels")

PREDICT = """\
import sys
from headrace.pipelines.cli.main import main
sys.argv = ["headrace", *sys.argv[1:]]
main()
"""
THEIRS = """\
import sys
import numpy as np, pandas as pd
from sklearn.linear_model import LogisticRegression
folder, out = sys.argv[1:]
X = np.load(f"{folder}/features.npy").astype(np.float32)
head = np.load(f"{folder}/head.npz")
model = LogisticRegression()
model.coef_, model.intercept_, model.classes_ = head["W"], head["b"], np.arange(len(head["b"]))
p = model.predict_proba(X)
pd.DataFrame(p).assign(c=p.argmax(1)).to_csv(out)
"""


def png(number: int) -> bytes:
    """A picture of 8 x 8 pixels whose bytes no other number has."""
    rows = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + checksum

    header = (8).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw, 1)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make(folder: Path, n_images: int) -> None:
    """Write images, their features in a cache and in one .npy file, and a head on them."""
    photos, cache = folder / "photos", folder / "headrace-cache"
    photos.mkdir(parents=True)
    files = [png(number) for number in range(n_images)]
    for number, data in enumerate(files):
        (photos / f"{number:06}.png").write_bytes(data)
    (spec,) = load_feature_specs(BACKBONE, ["layer4.avg"], cache_root=cache).specs
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n_images, *spec.shape)).astype(np.float16)
    directory = create_feature_set(cache, spec)
    for start in range(0, n_images, ROWS_PER_SHARD):
        rows = slice(start, start + ROWS_PER_SHARD)
        publish_shard(
            directory,
            f"{start:06}",
            features=features[rows],
            ids=[f"{number:06}.png" for number in range(n_images)][rows],
            content_hashes=[hash_bytes(data) for data in files[rows]],
            failures=[],
        )
    np.save(folder / "features.npy", features)
    weight = rng.normal(size=(len(CLASSES), *spec.shape)).astype(np.float32) / 20
    bias = np.zeros(len(CLASSES), np.float32)
    np.savez(folder / "head.npz", W=weight, b=bias)
    head = TrainedHead(
        LogisticSpec(C=1.0),
        "single",
        CLASSES,
        (spec,),
        {},
        {"weight": weight, "bias": bias},
        ({"name": BACKBONE.name, "weights": BACKBONE.weights, "image_size": 64},),
    )
    save_head(folder / "model", head)
    paths = [str(photos / f"{number:06}.png") for number in range(n_images)]
    time.sleep(3)  # a file that was written a moment ago is not remembered
    content_hashes(pd.DataFrame({"id": paths, "path": paths}), content_index(cache))


def seconds(code: str, *arguments: str, rounds: int = 3) -> tuple[float, float]:
    """The shortest of several calls, each a fresh interpreter: on the wall, and of the CPU, which
    other programs on the machine do not stretch.
    """
    times = []
    for _ in range(rounds):
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times.append((time.perf_counter() - started, cpu_s))
    wall_times, cpu_times = zip(*times, strict=True)
    return min(wall_times), min(cpu_times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    parser.add_argument("--case", choices=CASES, action="append", help="only this case")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    cases = arguments.case or CASES
    n_images = 10_000 if arguments.quick else 100_000
    table = Table("case", "ours", "theirs", "ratio", title="headrace predict, cached images")
    figures = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make(folder, n_images)
        model, photos, cache = (
            str(folder / part) for part in ("model", "photos", "headrace-cache")
        )
        options = ("--out", str(folder / "p.csv"), "--force", "--cache", cache)
        known_s, known_cpu_s = seconds(PREDICT, "predict", model, photos, *options)
        figures |= {"known_s": known_s, "known_cpu_s": known_cpu_s}
        if "known" in cases:
            theirs_s, theirs_cpu_s = seconds(THEIRS, name, str(folder / "theirs.csv"))
            figures |= {"theirs_s": theirs_s, "theirs_cpu_s": theirs_cpu_s}
            table.add_row(
                f"known: {n_images:,} images",
                f"{known_s:.2f} s ({known_cpu_s:.2f} CPU)",
                f"{theirs_s:.2f} s ({theirs_cpu_s:.2f} CPU)",
                f"{theirs_cpu_s / known_cpu_s:.2f}",
            )
        if "pixels" in cases:
            n_few = n_images // 50
            few = folder / "few"
            few.mkdir()
            for number in range(n_few):
                (few / f"{number:06}.png").write_bytes(png(number))
            options = ("--out", str(folder / "few.csv"), "--force", "--no-cache")
            _, pixels_s = seconds(PREDICT, "predict", model, str(few), *options, rounds=1)
            figures["pixels_ms_per_image"] = 1000 * pixels_s / n_few
            figures["times_faster"] = pixels_s / n_few / (known_cpu_s / n_images)
            table.add_row(
                f"pixels: {n_few:,} images",
                f"{1000 * known_cpu_s / n_images:.3f} CPU ms/image",
                f"{1000 * pixels_s / n_few:.2f} CPU ms/image",
                f"{figures['times_faster']:.0f}",
            )
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
