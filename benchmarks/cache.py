"""The cache against the bare operating system: every case times both sides in turn, in one process,
on one file system.

    python benchmarks/cache.py [--quick] [--case shuffled] [--folder DIR]

A ratio is ours over theirs in bytes per second, the best of several rounds each; 1.0 is the speed
of the bare system. The last line is JSON {measure: figure}. Figures of one machine stand in docs/;
put --folder on the disk you mean.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.console import Console
from rich.table import Table

from headrace.cache.checksum import shard_checksum
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.cache.format.checksummed_lines import to_checksummed_line
from headrace.cache.integrity.verify import verify_bytes
from headrace.cache.manifest import read_manifest
from headrace.cache.publish import create_feature_set, feature_set_path, publish_shard, shard_path
from headrace.cache.spec import STORAGE_DTYPES, FeatureSpec

COLUMNS = 1280
BATCH = 256

Figures = dict[str, float]
Row = tuple[str, str, str, str, str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds in all")
    parser.add_argument(
        "--case", choices=CASES, action="append", help="only this case (may be repeated)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write; default: the system's temporary folder"
    )
    arguments = parser.parse_args()
    table = Table(
        "case", "ours", "theirs", "ratio", "wanted", title="headrace cache", title_justify="left"
    )
    figures: Figures = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "state")
        for name in arguments.case or CASES:
            rows, found = CASES[name](Path(folder) / name, arguments.quick)
            for row in rows:
                table.add_row(*row)
            figures |= found
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


def spec(
    dtype: str = "float16", shape: tuple[int, ...] = (COLUMNS,), tap: str = "blocks.6"
) -> FeatureSpec:
    return FeatureSpec(
        "benchmark", "0" * 64, tap, "avg", "{}", '{"index":0}', "none", "float32", dtype, shape
    )


def fill(folder: Path, rows: int, shards: int) -> Path:
    """A feature set of random float16 rows."""
    directory = create_feature_set(folder, spec())
    generator = np.random.default_rng(0)
    for index, part in enumerate(np.array_split(np.arange(rows), shards)):
        values = generator.standard_normal((len(part), COLUMNS), np.float32).astype(np.float16)
        publish_shard(directory, **unit(index, values, part))
    return directory


def unit(index: int, values: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    content = [hashlib.sha256(b"%d" % row).hexdigest()[:32] for row in rows.tolist()]
    return {
        "unit": f"u{index:05d}",
        "features": values,
        "ids": [f"{row}.png" for row in rows],
        "content_hashes": content,
    }


def best(sides: dict[str, Callable[[], Iterable[Any]]], rounds: int) -> dict[str, float]:
    """Seconds of each side: the sum over its steps of each step's fastest round.

    The sides take turns round by round, and steps are timed one by one, so that another process on
    the same core spoils some steps of some rounds and not the figure.
    """
    fastest: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name, work in sides.items():
            steps = []
            iterator = iter(work())
            running = True
            while running:
                started = time.perf_counter()
                running = next(iterator, None) is not None
                steps.append(time.perf_counter() - started)
            fastest[name] = np.minimum(fastest.get(name, np.inf), steps)
    return {name: float(steps.sum()) for name, steps in fastest.items()}


def once(work: Callable[[], Any]) -> Callable[[], Iterable[Any]]:
    """A side of one step."""

    def steps() -> Iterable[bool]:
        work()
        yield True

    return steps


def speed(amount: float, seconds: float) -> str:
    return f"{amount / seconds / 1e9:.2f} GB/s"


def shuffled(folder: Path, quick: bool) -> tuple[list[Row], Figures]:
    """Random 256-row batches:

    `FeatureSet.read` against a bare memmap of the same rows, and against h5py.
    """
    table: list[Row] = []
    figures: Figures = {}
    sizes = (
        [(20_000, 1), (20_000, 40)]
        if quick
        else [(20_000, 1), (20_000, 40), (400_000, 4), (400_000, 1600)]
    )
    for rows, shards in sizes:
        features = open_feature_set(fill(folder / f"{rows}-{shards}", rows, shards))
        bare_file = folder / f"{rows}-{shards}.bin"
        features[:].tofile(bare_file)
        bare = np.memmap(bare_file, np.float16, "r", shape=(rows, COLUMNS))
        h5_file = folder / f"{rows}-{shards}.h5"
        with h5py.File(h5_file, "w") as file:
            file["features"] = bare
        order = (
            np.random.default_rng(1).permutation(rows)[: 20_000 // BATCH * BATCH].reshape(-1, BATCH)
        )
        amount = order.size * COLUMNS * 2
        features.verify_shards()
        seconds = best(shuffled_sides(features, bare, order), 15)
        few = order[:8]
        with h5py.File(h5_file) as file:
            seconds |= best(h5py_side(file["features"], few), 2)
        seconds["h5py"] *= len(order) / len(few)
        ratio, against_h5py = seconds["bare"] / seconds["ours"], seconds["h5py"] / seconds["ours"]
        as_float32 = seconds["bare as float32"] / seconds["ours as float32"]
        what = f"{rows:,} x {COLUMNS} in {shards} shards"
        ours = speed(amount, seconds["ours"])
        table += [
            (
                f"shuffled 256-row batches, {what}",
                ours,
                f"memmap {speed(amount, seconds['bare'])}",
                f"{ratio:.2f}",
                ">= 0.80",
            ),
            (
                "  the same, as float32",
                speed(amount, seconds["ours as float32"]),
                f"memmap {speed(amount, seconds['bare as float32'])}",
                f"{as_float32:.2f}",
                "",
            ),
            (
                "  the same",
                ours,
                f"h5py {speed(amount, seconds['h5py'])}",
                f"{against_h5py:.1f}",
                ">= 5",
            ),
        ]
        key = f"{rows}_rows_{shards}_shards"
        figures[f"shuffled_over_memmap_{key}"] = ratio
        figures[f"shuffled_over_h5py_{key}"] = against_h5py
        figures[f"shuffled_float32_over_memmap_{key}"] = as_float32
    return table, figures


def shuffled_sides(
    features: FeatureSet, bare: np.ndarray, order: np.ndarray
) -> dict[str, Callable[[], Any]]:
    return {
        "ours": lambda: (features.read(batch, None) for batch in order),
        "bare": lambda: (bare[batch] for batch in order),
        "ours as float32": lambda: (features.read(batch) for batch in order),
        "bare as float32": lambda: (bare[batch].astype(np.float32) for batch in order),
    }


def h5py_side(in_file: h5py.Dataset, order: np.ndarray) -> dict[str, Callable[[], Any]]:
    # Sorted, because h5py reads rows in increasing order only.
    return {"h5py": lambda: (in_file[np.sort(batch)] for batch in order)}


def batches(folder: Path, quick: bool) -> tuple[list[Row], Figures]:
    """One epoch of `iter_batches`, shuffled, against shuffled batches from a bare memmap."""
    rows = 20_000 if quick else 200_000
    features = open_feature_set(fill(folder, rows, max(1, rows // 500)))
    bare_file = folder / "bare.bin"
    features[:].tofile(bare_file)
    bare = np.memmap(bare_file, np.float16, "r", shape=(rows, COLUMNS))
    order = np.random.default_rng(1).permutation(rows)
    amount = rows * COLUMNS * 2
    seconds = best(
        {
            "ours": lambda: features.iter_batches(BATCH, seed=0, dtype=None),
            "bare": lambda: (bare[order[start : start + BATCH]] for start in range(0, rows, BATCH)),
        },
        5,
    )
    ratio = seconds["bare"] / seconds["ours"]
    row = (
        f"an epoch of iter_batches, {rows:,} rows",
        speed(amount, seconds["ours"]),
        f"memmap {speed(amount, seconds['bare'])}",
        f"{ratio:.2f}",
        ">= 0.80",
    )
    return [row], {"epoch_over_memmap": ratio}


def sequential(folder: Path, quick: bool) -> tuple[list[Row], Figures]:
    """All rows in order, 1,024 at a time into one array, against `readinto` of the same bytes into
    one buffer.
    """
    rows = 20_000 if quick else 200_000
    features = open_feature_set(fill(folder, rows, max(1, rows // 10_000)))
    bare_file = folder / "bare.bin"
    features[:].tofile(bare_file)
    step = 1024
    buffer = memoryview(bytearray(step * COLUMNS * 2))
    features.verify_shards()

    def raw() -> Iterable[int]:
        with open(bare_file, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield count

    array = np.empty((step, COLUMNS), np.float16)

    def ours() -> Iterable[np.ndarray]:
        for at in range(0, rows, step):
            yield features.read(slice(at, at + step), out=array[: min(step, rows - at)])

    seconds = best({"ours": ours, "raw": raw}, 15)
    amount = rows * COLUMNS * 2
    ratio = seconds["raw"] / seconds["ours"]
    row = (
        f"sequential, {rows:,} rows, {step} at a time",
        speed(amount, seconds["ours"]),
        f"readinto {speed(amount, seconds['raw'])}",
        f"{ratio:.2f}",
        ">= 0.80",
    )
    return [row], {"sequential_over_readinto": ratio}


def publish(folder: Path, quick: bool) -> tuple[list[Row], Figures]:
    """`publish_shard` against write + fsync of as many bytes; rows in the storage dtype, and rows
    to be converted.
    """
    table: list[Row] = []
    figures: Figures = {}
    rounds = 3 if quick else 8
    for rows in (2_000,) if quick else (2_000, 20_000, 90_000):
        amount = rows * COLUMNS * 2
        values = np.random.default_rng(0).standard_normal((rows, COLUMNS), np.float32)
        data = {"float16": values.astype(np.float16), "float32": values}
        raw_bytes = data["float16"].tobytes()
        directory = create_feature_set(folder / str(rows), spec())
        units = iter(range(1000))
        arguments = unit(0, data["float16"], np.arange(rows))
        raw_file = folder / "raw.bin"

        def ours(
            given: str,
            arguments: dict[str, Any] = arguments,
            data: dict[str, np.ndarray] = data,
            units: Any = units,
            directory: Path = directory,
        ) -> None:
            name = f"u{next(units):05d}"
            publish_shard(directory, **{**arguments, "unit": name, "features": data[given]})
            shard_path(directory, name).unlink()

        def raw(
            raw_bytes: bytes = raw_bytes, raw_file: Path = raw_file, name: Path | None = None
        ) -> None:
            descriptor = os.open(raw_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            view = memoryview(raw_bytes)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            os.close(descriptor)
            if name is not None:
                os.link(raw_file, name)
            raw_file.unlink()

        def durable(raw_bytes: bytes = raw_bytes, place: Path = folder / "durable") -> None:
            """What no publisher can leave out: raw, a name, the name on the disk, a line that
            acknowledges it on the disk.
            """
            place.mkdir(exist_ok=True)
            raw(raw_bytes, place / ".hidden", place / "shard")
            directory = os.open(place, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
            manifest = os.open(place / "manifest", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(manifest, b"x" * 300)
            os.fsync(manifest)
            os.close(manifest)
            (place / "shard").unlink()

        seconds = best(
            {
                "ours": once(lambda: ours("float16")),
                "raw": once(raw),
                "durable": once(durable),
                "converted": once(lambda: ours("float32")),
            },
            rounds,
        )
        for name, what in (
            ("ours", "publish a shard of {} MB, given as float16"),
            ("converted", "publish a shard of {} MB, given as float32"),
            ("durable", "  write, fsync, link, fsync, append, fsync: {} MB"),
        ):
            ratio = seconds["raw"] / seconds[name]
            table.append(
                (
                    what.format(f"{amount / 1e6:.0f}"),
                    speed(amount, seconds[name]),
                    f"write + fsync {speed(amount, seconds['raw'])}",
                    f"{ratio:.2f}",
                    ">= 0.70" if name == "ours" else "",
                )
            )
            figures[f"publish_over_write_{rows}_rows_{name}"] = ratio
    return table, figures


def verify(folder: Path, quick: bool) -> tuple[list[Row], Figures]:
    """`verify_bytes` of a set in memory: digest, structure, manifest; and hashing alone."""
    directory = fill(folder, 20_000 if quick else 400_000, 2 if quick else 8)
    paths = sorted((directory / "shards").iterdir())
    amount = sum(path.stat().st_size for path in paths)
    seconds = best(
        {
            "ours": once(lambda: verify_bytes(directory)),
            "one": lambda: (shard_checksum(path) for path in paths),
            "sha256": lambda: (
                hashlib.file_digest(path.open("rb"), "sha256") for path in paths[:1]
            ),
        },
        4,
    )
    fraction = paths[0].stat().st_size / amount
    rows: list[Row] = [
        (
            f"verify {amount / 1e6:,.0f} MB from memory",
            speed(amount, seconds["ours"]),
            f"sha256, one thread {speed(amount * fraction, seconds['sha256'])}",
            f"{seconds['sha256'] / fraction / seconds['ours']:.1f}",
            ">= 4 GB/s",
        ),
        ("  digest alone, one thread", speed(amount, seconds["one"]), "", "", ""),
    ]
    return rows, {"verify_gb_per_s": amount / seconds["ours"] / 1e9}


OPEN = """
import contextlib, resource, sys, time
from pathlib import Path
from headrace import open_feature_set
def peak():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0])
# Linux forgets the peak of the imports on this word; elsewhere it may hide part of what opening takes.
with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")
if not Path("/proc/self/status").exists():
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
started = time.perf_counter()
features = open_feature_set(Path(sys.argv[1]))
opened = time.perf_counter()
features.read([0])
print(features.n_rows, opened - started, time.perf_counter() - opened)
print(peak() - before)
"""


def opening(folder: Path, quick: bool) -> tuple[list[Row], Figures]:
    """Open 10 million rows in 2,000 shards (one real shard, the manifest of 2,000) in a fresh
    process.
    """
    directory = create_feature_set(folder, spec(shape=(4,)))
    publish_shard(directory, **unit(0, np.zeros((5000, 4), np.float16), np.arange(5000)))
    entry = next(iter(read_manifest(directory).values())).to_dict()
    lines = [to_checksummed_line({**entry, "unit": f"u{index:05d}"}) for index in range(2000)]
    (directory / "manifest.jsonl").write_bytes(b"".join(lines))
    runs = [
        subprocess.run(
            [sys.executable, "-c", OPEN, str(directory)], check=True, capture_output=True, text=True
        ).stdout
        for _ in range(1 if quick else 5)
    ]
    rows, seconds, first = min(
        (tuple(map(float, run.split()[:3])) for run in runs), key=lambda found: found[1]
    )
    megabytes = (
        max(float(run.split()[3]) for run in runs) * (1 if sys.platform == "darwin" else 1024) / 1e6
    )
    table: list[Row] = [
        (f"open {rows:,.0f} rows in 2,000 shards", f"{seconds * 1e3:.0f} ms", "", "", "< 1 s"),
        ("  and the first row", f"{first * 1e3:.0f} ms", "", "", ""),
        ("  memory beyond the imports", f"{megabytes:.0f} MB", "", "", "< 200 MB"),
    ]
    return table, {"open_ten_million_rows_s": seconds, "open_ten_million_rows_mb": megabytes}


def dtypes(folder: Path, quick: bool) -> tuple[list[Row], Figures]:
    """What each storage dtype costs in round-off and in the accuracy of a head, and what
    compression gains, on real features: the demo's solar cells and network (needs the extra
    `demo`).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    table: list[Row] = []
    figures: Figures = {}
    pooled, labels = solar_features(folder, "conv_head.avg", 300 if quick else None)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=300))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    for dtype in ("float32", *(name for name in STORAGE_DTYPES if name != "float32")):
        directory = create_feature_set(folder / "again", spec(dtype, pooled.shape[1:], "avg"))
        for index, part in enumerate(np.array_split(np.arange(len(pooled)), 8)):
            publish_shard(directory, **unit(index, pooled[part], part))
        features = open_feature_set(directory)
        accuracy = float(
            np.mean(cross_val_predict(head, features.read(slice(None)), labels, cv=folds) == labels)
        )
        error = features.quantization_error.relative_rms
        table.append(
            (
                f"{dtype}, {len(pooled):,} solar cells, conv_head.avg",
                f"{100 * accuracy:.2f} % accuracy",
                f"float32 {100 * figures.get('accuracy_float32', accuracy):.2f} %",
                f"rms {error:.1e}",
                "",
            )
        )
        figures |= {f"accuracy_{dtype}": accuracy, f"round_off_rms_{dtype}": error}
    for tap in ("conv_head.map", "blocks.4.map"):
        maps, _ = solar_features(folder, tap, 64 if quick else 256)
        sizes, seconds = {}, {}
        for compression in (None, "bitshuffle-lz4"):
            directory = create_feature_set(
                folder / str(compression), spec("float16", maps.shape[1:], tap)
            )
            arguments = unit(0, maps, np.arange(len(maps)))
            sizes[compression] = publish_shard(
                directory, **arguments, compression=compression
            ).bytes
            features = open_feature_set(directory)
            features.verify_shards()
            seconds |= {
                compression: best(
                    {"x": once(lambda features=features: features.read(slice(None), None))}, 3
                )["x"]
            }
        zeros = float((maps == 0).mean())
        ratio = sizes[None] / sizes["bitshuffle-lz4"]
        table.append(
            (
                f"bitshuffle-LZ4, {tap}, {100 * zeros:.0f} % zeros",
                (
                    f"{sizes['bitshuffle-lz4'] / 1e6:.1f} MB, read at "
                    f"{speed(sizes[None], seconds['bitshuffle-lz4'])}"
                ),
                f"plain {sizes[None] / 1e6:.1f} MB, {speed(sizes[None], seconds[None])}",
                f"{ratio:.2f}",
                "",
            )
        )
        figures[f"lz4_gain_{tap}"] = ratio
    return table, figures


def solar_features(folder: Path, tap: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """float32 features of the demo's images by the demo's network, and whether each cell is
    defective.
    """
    from headrace.extract.images.content_hashes import content_hashes
    from headrace.extract.run.plan import BackboneFeatures, plan_work_units
    from headrace.extract.run.work_unit import run_work_unit
    from headrace.extract.taps.spec_cache import load_feature_specs
    from headrace.pipelines.cli.demo import write_demo
    from headrace.pipelines.planning.dataset import list_samples
    from headrace.pipelines.planning.networks import backbone_spec
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(write_demo(folder / "demo"))
    samples = list_samples(recipe)
    if limit:
        samples = samples.sample(limit, random_state=0)
    samples = samples.assign(content=content_hashes(samples, folder / "contents.parquet").hashes)
    backbone = backbone_spec(recipe.backbones[0], recipe)
    specs = load_feature_specs(backbone, [tap], dtype="float32", cache_root=folder).specs
    for job in plan_work_units(
        samples, [BackboneFeatures(backbone, specs, [()])], cache_root=folder
    ):
        run_work_unit(job)
    features = open_feature_set(feature_set_path(folder, specs[0]))
    return features.load(samples["content"].tolist()), (samples["label"] == "defective").to_numpy()


CASES: dict[str, Callable[[Path, bool], tuple[list[Row], Figures]]] = {
    "shuffled": shuffled,
    "batches": batches,
    "sequential": sequential,
    "publish": publish,
    "verify": verify,
    "opening": opening,
    "dtypes": dtypes,
}


if __name__ == "__main__":
    main()
