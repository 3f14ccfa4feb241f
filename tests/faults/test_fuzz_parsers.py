"""Damaged and hostile files: a seeded share of benchmarks/fuzz_parsers.py, and the bombs that it
has found, one by one.
"""

import gzip
import importlib.util
import os
import sys
import time
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from headrace.cache.errors import ExternalFeaturesInvalid
from headrace.cache.exchange.external_files import read_external_features
from headrace.extract.errors import SourceError
from headrace.extract.images.locators import read_bytes
from headrace.extract.sources.array import read_array
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.table import read_table_file
from headrace.heads.persist import load_head
from headrace.pipelines.models.ensemble import EnsembleModel
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.network import NetworkModel

_FILE = Path(__file__).parents[2] / "benchmarks" / "fuzz_parsers.py"
_SPEC = importlib.util.spec_from_file_location("fuzz_parsers", _FILE)
fuzz_parsers = importlib.util.module_from_spec(_SPEC)
sys.modules["fuzz_parsers"] = fuzz_parsers
_SPEC.loader.exec_module(fuzz_parsers)
SHARE = 12
FEW = 4  # of those that build a network for each
SLOW = (
    *("network", "network-text", "exported-head", "exported-text", "exported-weights", "ensemble"),
    *("beside-text", "sent-run"),
)


@pytest.mark.parametrize("name", fuzz_parsers.CASES)
def test_damage_is_refused_or_harmless(tmp_path, name):
    """Every format: what comes out of its parser is a result, an ImageError, a HeadraceError or an
    OSError.
    """
    case = fuzz_parsers.CASES[name]._replace(bombs=list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, data in enumerate(
            fuzz_parsers.inputs(case, FEW if name in SLOW else SHARE, seed=7)
        ):
            path = tmp_path / f"{number}{case.suffix}"
            path.write_bytes(data)
            assert fuzz_parsers.outcome(case, path) in ("parsed", "refused"), number


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(
            "png",
            "npy-image",
            "npy",
            "npz",
            "h5",
            "ppm",
            "gif",
            "idx",
            "pth",
            "safetensors",
            "model",
            "network-text",
        ),
        *(
            "features-npy",
            "features-npz",
            "features-h5",
            "features-parquet",
            "ids-npy",
            "side-json",
            "tiff-bands",
            "tiles",
            "tiles-npy",
        ),
    ],
)
def test_bombs_are_refused_soon(tmp_path, name):
    """Terabytes that are declared, links to other files, pickles that call: each is refused, and
    nothing is computed for it.
    """
    case = fuzz_parsers.CASES[name]
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, data in enumerate(case.bombs()):
            path = tmp_path / f"{number}{case.suffix}"
            path.write_bytes(data)
            assert fuzz_parsers.outcome(case, path) in ("parsed", "refused"), number
    assert time.process_time() - began < 60


@pytest.mark.parametrize(
    "how", ["external storage", "external link", "soft link", "virtual", "soft group"]
)
def test_an_array_file_reads_no_other_file(tmp_path, how):
    """HDF5 that points out of itself is refused when it is listed, and by its locator; no byte of
    another file is an image.
    """
    secret, sent = tmp_path / "secret.h5", tmp_path / "sent.h5"
    with h5py.File(secret, "w") as file:
        file["own/x"] = np.frombuffer(b"SECRET!!" * 40, np.uint8).reshape(5, 8, 8)
    with h5py.File(sent, "w") as file:
        if how == "external storage":
            file.create_dataset(
                "x", (5, 8, 8), "u1", external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
            )
        elif how == "external link":
            file["x"] = h5py.ExternalLink(str(secret), "own/x")
        elif how == "soft link":
            file["y"] = np.zeros((5, 8, 8), np.uint8)
            file["x"] = h5py.SoftLink("/y")
        elif how == "virtual":
            layout = h5py.VirtualLayout((5, 8, 8), "u1")
            layout[:] = h5py.VirtualSource(str(secret), "own/x", (5, 8, 8))
            file.create_virtual_dataset("x", layout)
        else:
            file["g"] = h5py.ExternalLink(str(secret), "own")
    key = "g/x" if how == "soft group" else "x"
    with pytest.raises(SourceError, match="are not followed"):
        read_array(ImageSource("array", sent, array_key=key), labelled=False)
    with pytest.raises(OSError, match="are not followed"):
        read_bytes(f"{sent}::h5:{key}:0")


@pytest.mark.parametrize("how", ["external storage", "external link", "soft link", "virtual"])
def test_imported_features_come_from_their_own_file(tmp_path, how):
    """As with images: an HDF5 file that is imported names no other file; what it names is not
    there, or is refused.
    """
    secret, sent = tmp_path / "secret.h5", tmp_path / "sent.h5"
    with h5py.File(secret, "w") as file:
        file["own/x"] = np.linspace(0, 1, 40, dtype=np.float32).reshape(5, 8)
    with h5py.File(sent, "w") as file:
        file["id"] = [b"a", b"b", b"c", b"d", b"e"]
        if how == "external storage":
            file.create_dataset(
                "features", (5, 8), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
            )
        elif how == "external link":
            file["features"] = h5py.ExternalLink(str(secret), "own/x")
        elif how == "soft link":
            file["features"] = h5py.SoftLink("/elsewhere")
        else:
            layout = h5py.VirtualLayout((5, 8), "f4")
            layout[:] = h5py.VirtualSource(str(secret), "own/x", (5, 8))
            file.create_virtual_dataset("features", layout)
    with pytest.raises(ExternalFeaturesInvalid, match=r"with --key; it has id|lie in other files"):
        read_external_features(sent, feature_key="features")


@pytest.mark.parametrize("kind", ["npy", "npz", "h5"])
def test_arrays_of_python_objects_are_refused(tmp_path, kind):
    """As images, as features and as ids: unpickling them would call what they say."""
    array, file = np.array([{"a": 1}] * 8, dtype=object), tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(file, array, allow_pickle=True)
    elif kind == "npz":
        np.savez(file, images=array)
    else:
        with h5py.File(file, "w") as opened:
            opened.create_dataset("images", (8,), dtype=h5py.ref_dtype)
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join("abcdefgh"))
    with pytest.raises(SourceError):
        read_array(ImageSource("array", file), labelled=False)
    with pytest.raises(ExternalFeaturesInvalid):
        read_external_features(file, ids_path=ids)
    if kind == "npy":
        np.save(tmp_path / "features.npy", np.eye(8, 5))
        with pytest.raises(ExternalFeaturesInvalid, match="could run code"):
            read_external_features(tmp_path / "features.npy", ids_path=file)


def test_a_table_does_not_decompress_without_end(tmp_path):
    """A gigabyte of zeros in a megabyte is no table; one whose rows repeat is."""
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(bytes(1 << 24)) * 64)
    with pytest.raises(SourceError, match="more than 200 times its size"):
        read_table_file(tmp_path / "bomb.csv.gz")
    (tmp_path / "rows.csv.gz").write_bytes(
        gzip.compress(b"path,label\n" + b"a.png,cat\n" * 100_000)
    )
    assert len(read_table_file(tmp_path / "rows.csv.gz").frame) == 100_000


def test_a_table_of_a_million_columns_is_refused(tmp_path):
    """Names are compared once each."""
    (tmp_path / "wide.csv").write_text(",".join(f"c{n}" for n in range(200_000)))
    began = time.process_time()
    with pytest.raises(SourceError, match="200,000 columns"):
        read_table_file(tmp_path / "wide.csv")
    assert time.process_time() - began < 20


@pytest.mark.slow
def test_the_whole_share_runs_in_processes_of_its_own(capsys, monkeypatch):
    """What the command does: a process per format with bounded memory, a table, one JSON object,
    exit status 0.
    """
    monkeypatch.setattr(sys, "argv", ["fuzz_parsers.py", "--count", "5", "--case", "ppm"])
    with pytest.raises(SystemExit) as end:
        fuzz_parsers.main()
    assert end.value.code == 0
    assert '"faults": 0' in capsys.readouterr().out.splitlines()[-1]


def test_devices_are_not_read(tmp_path):
    """A stranger's folder may hold links to /dev/zero, which has no end; here to one that has."""
    names = ("0.png", "head.safetensors", "network.safetensors", "ensemble.json")
    for name in names:
        (tmp_path / name).symlink_to(os.devnull)
    readers = (
        lambda: read_bytes(str(tmp_path / "0.png")),
        lambda: load_head(tmp_path),
        lambda: NetworkModel.load(tmp_path),
        lambda: EnsembleModel.load(tmp_path),
    )
    for read in readers:
        with pytest.raises((OSError, ModelError), match="neither a file nor a link to one"):
            read()
