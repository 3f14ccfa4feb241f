"""The format is fixed: golden bytes, and what h5py alone sees of a shard."""

import dataclasses
import json
import re
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash
from support.caches import make_feature_set, make_spec, shard_bytes, unit_name

from headrace.cache.feature_set import open_feature_set
from headrace.cache.integrity.verify import verify_bytes
from headrace.cache.manifest import read_manifest
from headrace.cache.publish import shard_path
from headrace.cache.spec import STORAGE_DTYPES

GOLDEN = Path(__file__).parent / "golden"
CACHE = Path(__file__).parents[2] / "cache"
CASES = [*STORAGE_DTYPES, "compressed"]


def golden_set(root, case):
    """The feature set whose bytes are under `golden/<case>`: exact numbers, so that any machine
    makes the same.
    """
    compression = "bitshuffle-lz4" if case == "compressed" else None
    spec = make_spec("float16" if compression else case, (3, 2, 2))
    return make_feature_set(root, 1, spec, compression=compression)


@pytest.mark.parametrize("case", CASES)
def test_golden_bytes_are_read(case):
    """A feature set written by the first version of this format is read by today's code, every byte
    checked.
    """
    (directory,) = (GOLDEN / case / "features").iterdir()
    assert verify_bytes(directory) == []
    features = open_feature_set(directory)
    expected = np.array(json.loads((GOLDEN / "expected.json").read_text()), np.float32)
    bound = {
        "float32": 0,
        "float16": 2**-10,
        "bfloat16": 2**-7,
        "compressed": 2**-10,
        "uint8": 0.013,
    }[case]
    assert np.abs(features.read(slice(None)) - expected).max() <= bound
    assert features.ids()[3] == "Zelle 3 è.png"
    assert features.failures()[0].reason == "truncated: 12 bytes are missing"


@pytest.mark.parametrize("case", CASES)
def test_golden_bytes_are_written(tmp_path, case):
    """Today's code writes the same bytes, with the HDF5 version that laid out the golden ones."""
    (golden,) = (GOLDEN / case / "features").iterdir()
    written = golden_set(tmp_path, case)
    assert written.name == golden.name
    assert (written / "spec.json").read_bytes() == (golden / "spec.json").read_bytes()
    version = (GOLDEN / "hdf5-version.txt").read_text().strip()
    if h5py.version.hdf5_version != version:
        pytest.skip(f"the golden shards were laid out by HDF5 {version}")
    assert shard_bytes(written) == shard_bytes(golden)
    entries = [
        {
            unit: dataclasses.replace(entry, written_by="")
            for unit, entry in read_manifest(path).items()
        }
        for path in (written, golden)
    ]
    assert entries[0] == entries[1]


def test_bytes_do_not_depend_on_the_clock(tmp_path):
    """Written at another time, shards are the same bytes: HDF5 keeps no time stamps in them."""
    first = shard_bytes(make_feature_set(tmp_path / "a", 2))
    time.sleep(1.1)  # HDF5 counts seconds
    assert shard_bytes(make_feature_set(tmp_path / "b", 2)) == first


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_a_stranger_can_read_a_shard(tmp_path, dtype):
    """With h5py alone, by what FORMAT.md says: names, attributes, the digest in the user block, and
    the numbers.
    """
    features = open_feature_set(make_feature_set(tmp_path, 1, make_spec(dtype, (4, 3, 3))))
    path = shard_path(features.path, unit_name(0))
    data = path.read_bytes()
    first, digest = data[:4096].decode().splitlines()[:2]
    assert first == "headrace shard 2"
    assert digest == f"xxh3_128 {xxhash.xxh3_128_hexdigest(data[4096:])}"
    with h5py.File(path) as file:
        assert file.attrs["format"].decode() == "headrace shard"
        assert file.attrs["fingerprint"].decode() == features.path.name
        assert json.loads(file.attrs["spec"])["tap"] == "blocks.4"
        table = file["features"]
        assert table.attrs["axes"].decode() == "sample, channel, y, x"
        assert table.attrs["units"].decode().startswith("activation")
        stored = table[:]
        if dtype == "bfloat16":
            assert "float32 = bits << 16" in table.attrs["encoding"].decode()
            stored = (stored.astype("u4") << 16).view("f4")
        if dtype == "uint8":
            stored = (
                file["offset"][:].reshape(-1, 1, 1) + file["scale"][:].reshape(-1, 1, 1) * stored
            )
        assert [value.decode() for value in file["id"][:]] == features.ids()
        assert np.array_equal(file["content"][:], features.content_hashes())
        assert file["failed_reason"][0].decode() == features.failures()[0].reason
    assert np.allclose(stored, features[:], atol=1e-6)


def test_format_page_names_what_is_there(tmp_path):
    """Every data set and attribute of a shard, and every key of a manifest's line, stands in
    FORMAT.md; nothing else.
    """
    page = (CACHE / "FORMAT.md").read_text()
    directory = make_feature_set(tmp_path, 1, make_spec("uint8", (4, 3, 3)))
    with h5py.File(shard_path(directory, unit_name(0))) as file:
        there = {*file, *file.attrs, *file["features"].attrs}
    there |= set(json.loads((directory / "manifest.jsonl").read_text()))
    assert there == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    for dtype in STORAGE_DTYPES:
        assert f"\n| {dtype} |" in page
