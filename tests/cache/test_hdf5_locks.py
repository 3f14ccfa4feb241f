"""HDF5 files are read where another program holds HDF5's lock on them, or where the disk has no
locks, as NFS without its lock daemon ("No locks available").
"""

import fcntl
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from headrace.cache.exchange.external_files import read_external_features
from headrace.extract.images.locators import open_array
from headrace.extract.sources.array import read_array
from headrace.extract.sources.source import ImageSource

READERS: dict[str, Callable[[Path], object]] = {
    "features": lambda path: read_external_features(path, feature_key="features", id_key="id"),
    "array": lambda path: open_array(str(path), "h5", "images"),
    "images": lambda path: read_array(ImageSource("array", str(path), array_key="images")),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_locked_file_is_read(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((3, 8, 8, 3), np.uint8)
        file["features"] = np.ones((3, 2), np.float32)
        file["id"] = [b"a", b"b", b"c"]
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="unable to lock"):
            h5py.File(path, "r")
        READERS[reader](path)
