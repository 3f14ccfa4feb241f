"""verify, repair, gc, rm, export, and the planner."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from support.caches import (
    flip,
    given,
    hashes,
    leftovers,
    make_feature_set,
    make_spec,
    shard_bytes,
    unit_arguments,
    unit_name,
)
from support.file_system_faults import in_child, start_child, wait_for
from support.runs import headrace

from headrace.cache.disk_space import plan_taps, require_disk_space, stored_bytes
from headrace.cache.errors import CacheError, HeadraceError, ShardUnreadable
from headrace.cache.exchange.export import EXPORTS
from headrace.cache.feature_set import open_feature_set
from headrace.cache.format.shard import FailedSample
from headrace.cache.integrity.garbage import find_garbage, interrupted_removals, remove_feature_set
from headrace.cache.integrity.repair import repair
from headrace.cache.integrity.verify import verify_bytes, verify_recompute, verify_sources
from headrace.cache.publish import create_feature_set, feature_set_path, publish_shard, shard_path

SPEC = make_spec()


def test_verify_finds_nothing_in_a_whole_cache(tmp_path):
    """No false alarm, in any dtype, compressed or not."""
    for dtype in ("float16", "bfloat16", "uint8"):
        for compression in (None, "bitshuffle-lz4"):
            root = tmp_path / f"{dtype}{compression}"
            directory = make_feature_set(
                root, 2, make_spec(dtype, (3, 2, 2)), compression=compression
            )
            assert verify_bytes(directory) == []


def test_repair_redoes_only_what_is_broken(tmp_path):
    """One flipped, one deleted, one truncated of six: these three go, and extracting them gives the
    first cache again.
    """
    directory = make_feature_set(tmp_path, 6)
    whole = shard_bytes(directory)
    flip(shard_path(directory, unit_name(1)), 40_000)
    shard_path(directory, unit_name(3)).unlink()
    os.truncate(shard_path(directory, unit_name(4)), 5000)
    inodes = {
        unit_number: shard_path(directory, unit_name(unit_number)).stat().st_ino
        for unit_number in (0, 2, 5)
    }
    repair_result = repair(directory)
    assert repair_result.removed_units == (unit_name(1), unit_name(4))
    assert repair_result.missing_units == (unit_name(3),)
    assert repair_result.listed_units == ()
    assert repair_result.rewritten_files == ("manifest.jsonl",)
    assert verify_bytes(directory) == []
    assert open_feature_set(directory).n_rows == 24
    make_feature_set(tmp_path, 6)
    assert shard_bytes(directory) == whole
    assert {
        unit_number: shard_path(directory, unit_name(unit_number)).stat().st_ino
        for unit_number in inodes
    } == inodes


def test_repair_of_the_small_files(tmp_path):
    """A lost or broken manifest and spec are written again from the shards, byte for byte, without
    computing a row.
    """
    directory = make_feature_set(tmp_path, 4)
    names = ("manifest.jsonl", "spec.json")
    before = {name: (directory / name).read_bytes() for name in names}
    for name in names:
        (directory / name).write_bytes(before[name][:50] + b"?" + before[name][51:])
    repair_result = repair(directory)
    assert repair_result.rewritten_files == ("spec.json", "manifest.jsonl")
    assert {name: (directory / name).read_bytes() for name in names} == before
    (directory / "manifest.jsonl").unlink()
    assert repair(directory).listed_units == tuple(
        unit_name(unit_number) for unit_number in range(4)
    )
    assert {name: (directory / name).read_bytes() for name in names} == before


def test_repair_without_a_whole_shard(tmp_path):
    """A broken spec that no shard knows cannot be repaired, and the message says what to do."""
    directory = make_feature_set(tmp_path, 1)
    flip(directory / "spec.json", 77)
    flip(shard_path(directory, unit_name(0)), 40_000)
    with pytest.raises(CacheError, match="headrace cache rm"):
        repair(directory)


def test_repair_deletes_nothing_that_might_be_whole(tmp_path, monkeypatch):
    """A shard that the operating system does not let be read is named, by verify and by repair, and
    stays.
    """
    directory = make_feature_set(tmp_path, 2)
    whole = shard_bytes(directory)
    original = open

    def refusing(path, *arguments, **options):
        if str(path).endswith("u0001.h5"):
            raise OSError(errno.EMFILE, "Too many open files")
        return original(path, *arguments, **options)

    monkeypatch.setattr("headrace.cache.checksum.open", refusing, raising=False)
    (problem,) = verify_bytes(directory)
    assert (problem.kind, "EMFILE" in problem.message) == ("unreadable", True)
    with pytest.raises(ShardUnreadable, match=r"u0001\.h5 cannot be read: EMFILE"):
        repair(directory)
    assert shard_bytes(directory) == whole


def test_a_shard_that_somebody_has_open_is_whole(tmp_path):
    """A user who looks at a shard with h5py, in this very process, is in nobody's way."""
    directory = make_feature_set(tmp_path, 1)
    with h5py.File(shard_path(directory, unit_name(0))) as file:
        assert file["features"].shape == (8, 12)
        assert verify_bytes(directory) == []
        assert repair(directory).was_consistent
        assert open_feature_set(directory)[:].shape == (8, 12)


def test_repair_while_others_extract(tmp_path):
    """Repairing again and again during an extraction loses no unit that was published meanwhile."""
    directory = create_feature_set(tmp_path, SPEC)
    child = start_child(
        lambda: [
            publish_shard(directory, **unit_arguments(SPEC, unit_number))
            for unit_number in range(60)
        ]
    )
    seen = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        repair_result = repair(directory)
        assert repair_result.removed_units == repair_result.missing_units == ()
        assert len(repair_result.intact_units) >= seen
        seen = len(repair_result.intact_units)
    assert [problem.kind for problem in verify_bytes(directory)] == []
    assert len(open_feature_set(directory).entries) == 60


def test_repairs_at_once(tmp_path):
    """Four repairs of the same broken set agree."""
    directory = make_feature_set(tmp_path, 8)
    flip(shard_path(directory, unit_name(2)), 40_000)
    (directory / "manifest.jsonl").write_bytes(b"?\n")
    children = [start_child(lambda: repair(directory)) for _ in range(4)]
    assert [wait_for(pid) for pid in children] == [0] * 4
    assert verify_bytes(directory) == []
    assert open_feature_set(directory).n_rows == 56


def test_verify_sources(tmp_path):
    """A source image that has changed by a byte, or is gone, is named; also one that could not be
    decoded.
    """
    directory = create_feature_set(tmp_path, SPEC)
    names, content = [f"{index}.png" for index in range(6)], hashes(0, 6)
    failure = FailedSample(names[5], content[5], "not an image")
    publish_shard(
        directory,
        "a",
        features=np.ones((5, 12)),
        ids=names[:5],
        content_hashes=content[:5],
        failures=[failure],
    )
    features = open_feature_set(directory)
    current = {**dict(zip(names, content, strict=True)), "new.png": hashes(50, 1)[0]}
    assert verify_sources(features, current) == []
    changed = {**current, names[1]: hashes(60, 1)[0], names[3]: None, names[5]: hashes(61, 1)[0]}
    del changed[names[4]]
    source_problems = verify_sources(features, changed)
    assert [problem.id for problem in source_problems] == [names[1], names[3], names[4], names[5]]
    assert f"its hash is {hashes(60, 1)[0]}, was {content[1]}" in source_problems[0].message
    assert "can no longer be read" in source_problems[1].message
    assert "no longer in the data set" in source_problems[2].message
    assert [problem.is_harmless for problem in source_problems] == [False, False, True, False]
    publish_shard(
        directory,
        "b",
        features=np.ones((1, 12)),
        ids=[names[1]],
        content_hashes=[changed[names[1]]],
    )
    again = verify_sources(open_feature_set(directory), changed)
    assert [problem.id for problem in again] == [names[3], names[4], names[5]]
    third = {
        **changed,
        names[1]: hashes(62, 1)[0],
    }  # neither of the two images that have had this name
    assert (
        "or another data set's, of this name"
        in verify_sources(open_feature_set(directory), third)[0].message
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "uint8"])
def test_verify_recompute(tmp_path, dtype):
    """Rows computed again agree within the tolerance; another resize, a NaN, or rows of other
    samples do not.
    """
    spec = make_spec(dtype)
    features = open_feature_set(make_feature_set(tmp_path, 4, spec))
    values, _, content = given(spec, range(4))
    by_content = dict(zip(content, values, strict=True))
    wobble = np.random.default_rng(0).normal(size=12) * 1e-4

    def again(_ids, hashes):
        return np.stack([by_content[value] + wobble for value in hashes])

    recompute_result = verify_recompute(features, again, 10)
    assert recompute_result.n_rows == 10
    assert recompute_result.is_equal
    assert recompute_result.largest_difference <= recompute_result.tolerance < 0.05
    for wrong in (
        lambda ids, hashes: again(ids, hashes) + 0.1,
        lambda ids, hashes: again(ids, hashes)[::-1],
        lambda ids, hashes: np.where(again(ids, hashes) > 1, np.nan, again(ids, hashes)),
    ):
        recompute_result = verify_recompute(features, wrong, 32)
        assert not recompute_result.is_equal
        assert recompute_result.worst_id in features.ids()


def test_gc_removes_what_no_recipe_uses(tmp_path):
    """Only the feature sets that are not named go, and only when names are given; stale temporaries
    go, fresh ones stay.
    """
    keep, drop = make_feature_set(tmp_path, 1), make_feature_set(tmp_path, 1, make_spec(tap="x"))
    old, fresh = keep / "shards" / ".u.h5.1.partial", keep / "shards" / ".u.h5.2.partial"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    garbage = find_garbage(tmp_path)
    assert garbage.feature_sets == ()
    assert garbage.temporaries == (old,)
    assert garbage.bytes == 4
    garbage = find_garbage(tmp_path, [keep.name])
    assert garbage.feature_sets == (drop,)
    assert garbage.bytes > drop.stat().st_size
    garbage.remove()
    assert not drop.exists()
    assert not old.exists()
    assert fresh.exists()
    assert open_feature_set(keep).n_rows == 8
    assert find_garbage(tmp_path, [keep.name]).bytes == 0


def test_an_interrupted_removal_is_finished(tmp_path):
    """A removed feature set disappears at once; what an interruption leaves of it is garbage, and
    not listed.
    """
    directory = make_feature_set(tmp_path, 1)

    def work():
        shutil.rmtree = lambda *_: os._exit(0)
        remove_feature_set(directory)

    assert in_child(work) == 0
    assert not directory.exists()
    garbage = find_garbage(tmp_path, [])
    assert garbage.feature_sets == ()
    assert len(garbage.trash) == 1
    garbage.remove()
    assert list((tmp_path / "features").iterdir()) == []


@pytest.mark.parametrize(
    ("moment", "name", "status"),
    [
        ("shutil.rmtree", "blocks.4.avg", 0),
        ("pathlib.Path.unlink", "blocks.5.avg", 2),
        ("pathlib.Path.rmdir", "blocks.4.avg", 0),
    ],
)
def test_an_interrupted_removal_is_finished_by_the_same_call(
    tmp_path, monkeypatch, moment, name, status
):
    """By its tap too, whatever of it is gone; another name is still told to be none."""
    directory = make_feature_set(tmp_path, 1)
    monkeypatch.setattr(moment, lambda *_: os._exit(0))
    assert in_child(lambda: remove_feature_set(directory)) == 0
    monkeypatch.undo()
    assert len(interrupted_removals(tmp_path)) == 1
    command_result = headrace("cache", "rm", name, "--yes", "--cache", tmp_path, cwd=tmp_path)
    assert command_result.returncode == status, command_result.stderr
    assert list((tmp_path / "features").iterdir()) == []


def test_only_feature_sets_are_removed(tmp_path):
    """`rm` refuses any other directory."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(CacheError, match="not a feature set"):
        remove_feature_set(tmp_path / "photos")
    assert (tmp_path / "photos" / "a.jpg").exists()


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("kind", EXPORTS)
def test_exports_hold_the_rows(tmp_path, kind, dtype):
    """What other programs read is what the feature set holds, with ids and content hashes, and the
    spec where it fits.
    """
    spec = make_spec(dtype, (3, 2, 2))
    features = open_feature_set(make_feature_set(tmp_path, 3, spec))
    target = tmp_path / "out" / f"features.{kind}"
    EXPORTS[kind](features, target)
    if kind == "npy":
        values = np.load(target)
        lines = (tmp_path / "out" / "features.rows.csv").read_text().splitlines()
        ids, content = zip(*(line.split(",")[1:] for line in lines[1:]), strict=True)
    elif kind == "parquet":
        table = pq.read_table(target)
        values = np.stack(table["features"].to_numpy()).reshape(features.shape)
        ids, content = table["id"].to_pylist(), table["content"].to_pylist()
        assert json.loads(table.schema.metadata[b"headrace"]) == json.loads(spec.to_json())
        assert pq.ParquetFile(target).num_row_groups == 3
    else:
        group = zarr.open_group(target, mode="r")
        values = group["features"][:]
        ids, content = (
            [bytes(row).rstrip(b"\0").decode() for row in group[name][:]]
            for name in ("id", "content")
        )
        assert group.attrs["headrace"] == json.loads(spec.to_json())
    assert np.array_equal(values, features[:])
    assert values.dtype == features.dtype
    assert list(ids) == features.ids()
    assert list(content) == features.content_hashes().astype(str).tolist()
    with pytest.raises(CacheError, match="is there already"):
        EXPORTS[kind](features, target)


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_that_fails_leaves_nothing(tmp_path, kind):
    """An export of a broken feature set ends with the shard's name, and without half a file."""
    directory = make_feature_set(tmp_path, 3)
    flip(shard_path(directory, unit_name(2)), 40_000)
    with pytest.raises(CacheError, match=r"u0002\.h5"):
        EXPORTS[kind](open_feature_set(directory), tmp_path / "out" / "x")
    assert list((tmp_path / "out").glob("*")) == [] if (tmp_path / "out").exists() else True


def test_export_of_no_rows(tmp_path):
    """An empty feature set exports as an empty table."""
    features = open_feature_set(create_feature_set(tmp_path, SPEC))
    for kind, export in EXPORTS.items():
        export(features, tmp_path / f"x.{kind}")
    assert np.load(tmp_path / "x.npy").shape == (0, 12)
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 0
    assert zarr.open_group(tmp_path / "x.zarr", mode="r")["features"].shape == (0, 12)


@pytest.mark.parametrize(("module", "extra"), [("zarr", "export"), ("hdf5plugin", "compress")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, extra):
    """Without the optional library the error says what to install, and nothing is written."""
    monkeypatch.setitem(sys.modules, module, None)
    needs = {
        "zarr": lambda: EXPORTS["zarr"](
            open_feature_set(make_feature_set(tmp_path, 1)), tmp_path / "x.zarr"
        ),
        "hdf5plugin": lambda: make_feature_set(tmp_path, 1, compression="bitshuffle-lz4"),
    }
    with pytest.raises(HeadraceError, match=rf"pip install 'headrace\[{extra}\]'"):
        needs[module]()
    assert leftovers(tmp_path) == []


def test_compression_pays_on_sparse_maps(tmp_path):
    """A spatial map after a ReLU, nine tenths of it zero, takes less than two thirds of
    the bytes.
    """
    spec = make_spec(shape=(64, 7, 7))
    values = np.random.default_rng(0).normal(size=(64, 64, 7, 7)).astype(np.float32)
    values = np.maximum(values - 1.28, 0)
    sizes = {}
    for compression in (None, "bitshuffle-lz4"):
        directory = create_feature_set(tmp_path / str(compression), spec)
        arguments = {**unit_arguments(spec, 0, rows=64), "features": values}
        sizes[compression] = publish_shard(directory, **arguments, compression=compression).bytes
        assert np.array_equal(open_feature_set(directory)[:], values.astype(np.float16))
    assert sizes["bitshuffle-lz4"] < 0.66 * sizes[None]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "uint8"])
@pytest.mark.parametrize("shape", [(4,), (320,), (16, 7, 7)])
def test_planned_bytes_are_enough(tmp_path, dtype, shape):
    """What the planner says is never less than what is written, and for large rows not
    much more.
    """
    spec = make_spec(dtype, shape)
    directory = create_feature_set(tmp_path, spec)
    for unit_number in range(3):
        publish_shard(directory, **unit_arguments(spec, unit_number, rows=100))
    written = sum(path.stat().st_size for path in directory.rglob("*.h5"))
    planned = stored_bytes(spec, 300, 100)
    assert written <= planned <= 1.25 * written + 20_000 * 3


def test_taps_that_fit(tmp_path):
    """Taps are taken in order while they fit; what is too large is said to be, and smaller ones
    after it still fit.
    """
    small, large = make_spec(shape=(100,)), make_spec(shape=(1000, 14, 14), tap="y")
    costs = plan_taps([(small, 1000), (large, 1000), (small, 500)], 10_000_000)
    assert [cost.fits_budget for cost in costs] == [True, False, True]
    assert all(cost.fits_budget for cost in plan_taps([(large, 10**9)], None))
    require_disk_space(tmp_path / "not" / "yet", costs[:1])
    with pytest.raises(
        CacheError,
        match=r"0\.39 GB and 0\.10 GB of the free space may be used.*y\.map.*Nothing was extracted",
    ):
        require_disk_space(tmp_path, costs, free_bytes=100_000_000)


OPEN_MANY = """
import resource, sys
from pathlib import Path
from headrace import open_feature_set

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
features = open_feature_set(Path(sys.argv[1]))
features.read([5_000_000])
print(features.n_rows, peak() - before)
"""


def test_ten_million_rows(tmp_path):
    """10 million rows in 2,000 shards: opening and reading one row takes less than 200 MB beyond
    the imports.
    """
    from headrace.cache.format.checksummed_lines import to_checksummed_line
    from headrace.cache.manifest import read_manifest

    spec = make_spec(shape=(4,))
    directory = create_feature_set(tmp_path, spec)
    rows = 5000
    number = 1000
    arguments = unit_arguments(spec, number, rows=rows, failed=0)
    publish_shard(directory, **arguments)
    entry = read_manifest(directory)[unit_name(number)].to_dict()
    lines = [to_checksummed_line({**entry, "unit": unit_name(index)}) for index in range(2000)]
    (directory / "manifest.jsonl").write_bytes(b"".join(lines))
    output = subprocess.run(
        [sys.executable, "-c", OPEN_MANY, directory], check=True, capture_output=True, text=True
    ).stdout.split()
    assert int(output[0]) == 10_000_000
    assert int(output[1]) < 200_000_000


def test_messages_name_the_errno(tmp_path, monkeypatch):
    """A directory that cannot be written to is an error that says so."""
    monkeypatch.setattr(
        os, "mkdir", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system"))
    )
    with pytest.raises(CacheError, match="EROFS"):
        create_feature_set(tmp_path, SPEC)
    assert not feature_set_path(tmp_path, SPEC).exists()
