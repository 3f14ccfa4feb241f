"""Flipped bits, truncated, missing, swapped and forged files: found before a single row is used,
and named.
"""

import hashlib
import os
import shutil

import h5py
import hdf5plugin
import numpy as np
import pytest
import xxhash
from support.cache_flips import flip_many
from support.caches import (
    flip,
    given,
    make_feature_set,
    make_spec,
    shard_bytes,
    unit_arguments,
    unit_name,
)

from headrace.cache.errors import (
    CacheError,
    ManifestCorrupt,
    ShardCorrupt,
    ShardMissing,
    SpecMismatch,
)
from headrace.cache.feature_set import list_feature_sets, open_feature_set
from headrace.cache.format.checksummed_lines import to_checksummed_line
from headrace.cache.format.shard import USER_BLOCK_BYTES, user_block
from headrace.cache.integrity.repair import repair
from headrace.cache.integrity.verify import verify_bytes
from headrace.cache.manifest import read_manifest
from headrace.cache.publish import create_feature_set, publish_shard, shard_path


def test_flipped_bits(tmp_path):
    """150 flips: each one found, in every kind of file."""
    assert flip_many(make_feature_set(tmp_path, 1, make_spec("uint8")), 150, 0) >= 150


@pytest.mark.slow
@pytest.mark.parametrize("compression", [None, "bitshuffle-lz4"])
def test_many_flipped_bits(tmp_path, compression):
    """400 flips in plain and 400 in compressed shards, data and metadata: each one found.

    benchmarks/cache_faults.py has more.
    """
    spec = make_spec(shape=(40, 3, 3))
    directory = make_feature_set(tmp_path, 2, spec, compression=compression)
    assert flip_many(directory, 400, 1) >= 400


@pytest.mark.slow
def test_every_bit_of_manifest_and_spec(tmp_path):
    """Each single bit of the small files: found, also the one that ends the last line."""
    directory = make_feature_set(tmp_path, 1)
    for name in ("manifest.jsonl", "spec.json"):
        path = directory / name
        data = path.read_bytes()
        for bit in range(len(data) * 8):
            flip(path, bit)
            with pytest.raises(CacheError, match=name.replace(".", r"\.")):
                open_feature_set(directory)
            path.write_bytes(data)


def test_a_damaged_spec_names_the_command_that_mends_it(tmp_path):
    """Whatever has changed: a field's name, a value, its type. What another version wrote has its
    own name, and is no damage.
    """
    directory = make_feature_set(tmp_path, 1)
    path, spec = directory / "spec.json", make_spec()
    data = path.read_bytes()
    for old, new in (
        (b'"weights"', b'"weighvs"'),
        (b"blocks.4", b"blocks.5"),
        (b"[12]", b'"12"'),
        (b"[12]", b"[-2]"),
    ):
        path.write_bytes(data.replace(old, new))
        for call in (
            lambda: open_feature_set(directory),
            lambda: create_feature_set(tmp_path, spec),
        ):
            with pytest.raises(CacheError, match=r"spec.*headrace cache repair"):
                call()
        assert repair(directory).rewritten_files == ("spec.json",)
        assert path.read_bytes() == data
    newer = data.replace(b'"weights"', b'"weight_set"')
    directory = directory.rename(
        directory.with_name(hashlib.sha256(newer.strip()).hexdigest()[:24])
    )
    (directory / "spec.json").write_bytes(newer)
    with pytest.raises(SpecMismatch, match="other fields than this version"):
        open_feature_set(directory)


def test_truncated_at_every_length(tmp_path):
    """A shard cut off anywhere is found: by its size in the file system, its digest,
    its structure.
    """
    directory = make_feature_set(tmp_path, 1)
    path = shard_path(directory, unit_name(0))
    data = path.read_bytes()
    for length in [*range(0, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ShardCorrupt, match=path.name):
            open_feature_set(directory)[:]
    path.write_bytes(data + b"\0")
    with pytest.raises(ShardCorrupt, match=path.name):
        open_feature_set(directory)[:]


def test_truncated_manifest(tmp_path):
    """A manifest that lost lines is short of rows, never wrong; `verify` names the shards it does
    not list.
    """
    directory = make_feature_set(tmp_path, 3)
    path = directory / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    assert [entry.unit for entry in open_feature_set(directory).entries] == [unit_name(0)]
    assert [(problem.kind, problem.path.stem) for problem in verify_bytes(directory)] == [
        ("unlisted", unit_name(1)),
        ("unlisted", unit_name(2)),
    ]


def test_missing_shard(tmp_path):
    """A shard that was deleted is named, by reading and by `verify`."""
    directory = make_feature_set(tmp_path, 3)
    shard_path(directory, unit_name(1)).unlink()
    features = open_feature_set(directory)
    assert len(features.read(range(8))) == 8
    with pytest.raises(
        ShardMissing, match=r"u0001\.h5 is listed in the manifest and is not there.*cache repair"
    ):
        features.read([8])
    assert [(problem.kind, problem.path.stem) for problem in verify_bytes(directory)] == [
        ("missing", unit_name(1))
    ]


def test_swapped_shards(tmp_path):
    """Two whole shards under each other's names: both found."""
    directory = make_feature_set(tmp_path, 3)
    one, other = shard_path(directory, unit_name(0)), shard_path(directory, unit_name(2))
    one.rename(tmp_path / "x")
    other.rename(one)
    (tmp_path / "x").rename(other)
    with pytest.raises(
        ShardCorrupt, match="another shard than the one that was published under this name"
    ):
        open_feature_set(directory)[0]
    assert [problem.path.stem for problem in verify_bytes(directory)] == [
        unit_name(0),
        unit_name(2),
    ]


def test_shard_of_another_feature_set(tmp_path):
    """A shard of the same unit of another tap, listed with its own digest: refused by its
    fingerprint.
    """
    directory = make_feature_set(tmp_path, 1)
    other = make_feature_set(tmp_path, 1, make_spec(tap="blocks.3"))
    for name in ("shards/u0000.h5", "manifest.jsonl"):
        shutil.copy(other / name, directory / name)
    with pytest.raises(ShardCorrupt, match="its fingerprint is"):
        open_feature_set(directory)[0]


def test_shard_under_another_unit(tmp_path):
    """A whole shard that is listed under another unit's name: refused by the unit it says it is."""
    directory = make_feature_set(tmp_path, 2)
    entry = read_manifest(directory)[unit_name(1)]
    shutil.copy(shard_path(directory, unit_name(1)), shard_path(directory, unit_name(0)))
    with (directory / "manifest.jsonl").open("ab") as file:
        file.write(to_checksummed_line({**entry.to_dict(), "unit": unit_name(0)}))
    with pytest.raises(ShardCorrupt, match="its unit is 'u0001', expected 'u0000'"):
        open_feature_set(directory)[0]


def test_renamed_feature_set(tmp_path):
    """A directory renamed to another fingerprint is refused."""
    directory = make_feature_set(tmp_path, 1)
    renamed = directory.rename(directory.with_name("0" * 24))
    with pytest.raises(ManifestCorrupt, match="its fingerprint is"):
        open_feature_set(renamed)


@pytest.mark.parametrize("name", ["manifest.jsonl", "spec.json"])
def test_brackets_in_thousands_of_levels(tmp_path, name):
    """Python's JSON parser ends in a RecursionError, which is no ValueError."""
    directory = make_feature_set(tmp_path, 1)
    (directory / name).write_bytes(b"[" * 10_000 + b"]" * 10_000 + b"}\n")
    with pytest.raises(ManifestCorrupt, match="recursion"):
        open_feature_set(directory)
    assert repair(directory).rewritten_files == (name,)


def test_a_change_after_verification_is_noticed(tmp_path):
    """This machine remembers what it verified; a byte changed since then, times set back, is
    noticed all the same.
    """
    directory = make_feature_set(tmp_path, 1)
    path = shard_path(directory, unit_name(0))
    long_ago = path.stat().st_mtime - 1000
    os.utime(path, (long_ago, long_ago))
    open_feature_set(directory).verify_shards()
    before = path.stat()
    flip(path, 8 * (path.stat().st_size - 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(ShardCorrupt):
        open_feature_set(directory).verify_shards()


def test_a_shard_is_hashed_once(tmp_path, monkeypatch):
    """The second opening recognizes a settled shard without reading it; a new one is not trusted to
    its time stamp.
    """
    import headrace.cache.checksum as check

    directory = make_feature_set(tmp_path, 2)
    hashed = []
    original = check.verify_shard
    monkeypatch.setattr(
        check, "verify_shard", lambda *args: hashed.append(args[0]) or original(*args)
    )
    for _ in range(2):
        open_feature_set(directory).verify_shards()
    assert len(hashed) == 4
    monkeypatch.setattr("headrace.cache.file_stamps._CLOCK_TICK_NS", 0)
    for _ in range(3):
        assert open_feature_set(directory)[:].shape == (16, 12)
    assert len(hashed) == 6


def test_without_a_home(tmp_path, monkeypatch):
    """Where nothing can be remembered, everything works; a broken memory is no memory."""
    directory = make_feature_set(tmp_path, 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_feature_set(directory)[:]) == 8
    state = tmp_path / "state"
    monkeypatch.setenv("XDG_CACHE_HOME", str(state))
    monkeypatch.setattr("headrace.cache.file_stamps._CLOCK_TICK_NS", 0)
    open_feature_set(directory).verify_shards()
    (memory,) = (path for path in state.rglob("*") if path.is_file())
    data = memory.read_bytes()
    for bit in range(0, len(data) * 8, 53):
        flip(memory, bit)
        assert np.array_equal(
            open_feature_set(directory)[:], given(make_spec(), [0])[0].astype(np.float16)
        )
        memory.write_bytes(data)


# -- hostile shards: everything an attacker controls is consistent, digests and manifest too


def forge(directory, change):
    """Let `change(h5py.File)` rewrite the shard of unit 0, and make digests and manifest agree with
    the result.
    """
    path = shard_path(directory, unit_name(0))
    entry = read_manifest(directory)[unit_name(0)]
    image = directory / "image.h5"
    image.write_bytes(path.read_bytes()[USER_BLOCK_BYTES:])
    with h5py.File(image, "r+") as file:
        change(file)
    body = image.read_bytes()
    image.unlink()
    digest = xxhash.xxh3_128_hexdigest(body)
    path.write_bytes(user_block(digest) + body)
    changed = {**entry.to_dict(), "xxh3": digest, "bytes": path.stat().st_size}
    (directory / "manifest.jsonl").write_bytes(to_checksummed_line(changed))


def replace(name, make):
    def change(file):
        del file[name]
        make(file)

    return change


def external_storage(file):
    file.create_dataset("features", (8, 12), "<f2", external=[("/etc/passwd", 0, 192)])


def virtual(file):
    layout = h5py.VirtualLayout((8, 12), "<f2")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (8, 12))
    file.create_virtual_dataset("features", layout)


def terabytes(file):
    """4 TB declared, nothing stored."""
    space = h5py.h5s.create_simple((2**38 * 8 // 12, 12))
    h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F16LE, space)


def chunked_terabytes(file):
    file.create_dataset("features", (2**38, 12), "<f2", chunks=(8, 12))


def set_attribute(name, value):
    def change(file):
        file.attrs[name] = value

    return change


HOSTILE = {
    "external link": (
        replace("features", lambda f: f.__setitem__("features", h5py.ExternalLink("/x.h5", "/a"))),
        "link",
    ),
    "soft link": (
        replace("features", lambda f: f.__setitem__("features", h5py.SoftLink("/content"))),
        "link",
    ),
    "external storage": (replace("features", external_storage), "stored in other files"),
    "virtual": (replace("features", virtual), "virtual"),
    "4 TB": (replace("features", terabytes), "shape"),
    "4 TB in chunks": (replace("features", chunked_terabytes), "shape"),
    "gzip": (
        replace(
            "features", lambda f: f.create_dataset("features", (8, 12), "<f2", compression="gzip")
        ),
        r"filters \[1\]",
    ),
    "chunks that are missing": (
        replace("features", lambda f: f.create_dataset("features", (8, 12), "<f2", chunks=(1, 12))),
        "filters",
    ),
    "compressed, chunks missing": (
        replace(
            "features",
            lambda f: f.create_dataset(
                "features",
                (8, 12),
                "<f2",
                chunks=(1, 12),
                compression=hdf5plugin.Bitshuffle.filter_id,
            ),
        ),
        "0 stored chunks, expected 8",
    ),
    "never allocated": (
        replace("features", lambda f: f.create_dataset("features", (8, 12), "<f2")),
        "0 stored bytes, expected 192",
    ),
    "another type": (
        replace("features", lambda f: f.create_dataset("features", data=np.zeros((8, 12), "<i2"))),
        "another type",
    ),
    "big-endian": (
        replace("features", lambda f: f.create_dataset("features", data=np.zeros((8, 12), ">f2"))),
        "another type",
    ),
    "a group": (replace("features", lambda f: f.create_group("features")), "is not a data set"),
    "missing list": (replace("failed_id", lambda f: None), "expected exactly"),
    "something more": (lambda f: f.create_dataset("__code__", data=[1]), "expected exactly"),
    "many things more": (
        lambda f: [f.create_group(f"g{index}") for index in range(2000)],
        "2006 objects",
    ),
    "text that points into a heap": (
        replace("id", lambda f: f.create_dataset("id", (8,), h5py.string_dtype())),
        "text of another kind",
    ),
    "fewer ids": (
        replace("id", lambda f: f.create_dataset("id", data=np.zeros(7, "S4"))),
        r"shape \(7,\)",
    ),
    "more rows": (
        replace("content", lambda f: f.create_dataset("content", data=np.zeros(9, "S32"))),
        r"expected \(9, ",
    ),
    "rows in two axes": (
        replace("content", lambda f: f.create_dataset("content", data=np.zeros((8, 1), "S32"))),
        "2 axes",
    ),
    "other format": (set_attribute("format", np.bytes_(b"something")), "its format is 'something'"),
    "format from a heap": (set_attribute("format", "headrace shard"), "not fixed-length text"),
    "newer version": (set_attribute("version", 3), "its version is"),
    "version as text": (set_attribute("version", np.bytes_(b"2")), "not a number"),
    "an object reference": (
        replace("failed_reason", lambda f: f.create_dataset("failed_reason", (1,), h5py.ref_dtype)),
        "another type",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_shard(tmp_path, case):
    """A forged shard whose digests agree is refused by its structure, by reading, `verify`, and
    repair's adoption.
    """
    change, message = HOSTILE[case]
    directory = make_feature_set(tmp_path, 1)
    forge(directory, change)
    features = open_feature_set(directory)
    for read in (
        lambda: features[0],
        lambda: features.content_hashes(),
        lambda: features.ids(),
        features.verify_shards,
    ):
        with pytest.raises(ShardCorrupt, match=f"u0000\\.h5: .*{message}.*cache repair"):
            read()
    assert [problem.kind for problem in verify_bytes(directory)] == ["corrupt"]


def test_forging_changes_nothing_else(tmp_path):
    """The forger itself makes shards that are accepted when the change is none, so the refusals
    above are for the change.
    """
    directory = make_feature_set(tmp_path, 1)
    forge(directory, lambda file: None)
    assert np.array_equal(
        open_feature_set(directory)[:], given(make_spec(), [0])[0].astype(np.float16)
    )


def test_data_outside_the_file(tmp_path):
    """An HDF5 image whose data lie behind the end of the file (cut, digests made to agree) is
    refused.
    """
    directory = make_feature_set(tmp_path, 1, make_spec(shape=(5000,)))
    path = shard_path(directory, unit_name(0))
    entry = read_manifest(directory)[unit_name(0)]
    body = path.read_bytes()[USER_BLOCK_BYTES:-20_000]
    digest = xxhash.xxh3_128_hexdigest(body)
    path.write_bytes(user_block(digest) + body)
    (directory / "manifest.jsonl").write_bytes(
        to_checksummed_line({**entry.to_dict(), "xxh3": digest})
    )
    with pytest.raises(ShardCorrupt):
        open_feature_set(directory)[0]


def test_manifest_lies_about_rows(tmp_path):
    """A manifest that declares other counts than its shards hold is refused before anything is
    addressed by them.
    """
    directory = make_feature_set(tmp_path, 1)
    entry = read_manifest(directory)[unit_name(0)].to_dict()
    for change in ({"rows": 10**9}, {"rows": 7}, {"rows": -1}, {"failed": 2}):
        (directory / "manifest.jsonl").write_bytes(to_checksummed_line({**entry, **change}))
        with pytest.raises(CacheError, match=r"rows|failed"):
            open_feature_set(directory).verify_shards()
        assert [problem.kind for problem in verify_bytes(directory)] in (["corrupt"], ["manifest"])


def test_other_feature_sets_are_not_touched(tmp_path):
    """One broken feature set does not keep the others of a cache from being read."""
    good, bad = make_feature_set(tmp_path, 1), make_feature_set(tmp_path, 1, make_spec(tap="x"))
    flip(shard_path(bad, unit_name(0)), 8 * 4200)
    assert len(list_feature_sets(tmp_path)) == 2
    assert len(open_feature_set(good)[:]) == 8
    before = shard_bytes(good)
    publish_shard(create_feature_set(tmp_path, make_spec()), **unit_arguments(make_spec(), 0))
    assert shard_bytes(good) == before
