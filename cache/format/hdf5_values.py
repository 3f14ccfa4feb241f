"""Values of HDF5 files that other programs have written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

# Prints the values as Latin-1, one character for each byte, so that JSON keeps all of them.
_PROGRAM = """\
import json, sys, h5py
with h5py.File(sys.argv[1], "r", locking=False) as file:
    data_set = file[sys.argv[2]]
    values = data_set[()].reshape(-1).tolist()
json.dump([value.decode("latin-1") for value in values], sys.stdout)
"""


def open_hdf5(path: str | Path) -> h5py.File:
    """Open a file for reading, without HDF5's lock. Raises OSError."""
    # Network disks may have no locks (errno 37), and other programs hold theirs while they read.
    return h5py.File(path, "r", locking=False)


def find_data_sets(hdf5_file: h5py.File) -> dict[str, h5py.Dataset]:
    """Return the data sets of a file, at any depth, by their names: `train/images`."""
    data_sets: dict[str, h5py.Dataset] = {}

    def add(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            data_sets[name] = item

    hdf5_file.visititems(add)
    return data_sets


def read_values(path: str | Path, data_set: h5py.Dataset) -> npt.NDArray[Any]:
    """Return all values of a data set, in its shape; variable-length text as bytes objects.

    Raises ValueError for variable-length values that are no text, and for text that cannot be read.
    """
    if not data_set.dtype.hasobject:
        values: npt.NDArray[Any] = data_set[()]
        return values
    if h5py.check_string_dtype(data_set.dtype) is None:
        raise ValueError(f"{data_set.name!r} has values of any length that are no text")
    # Variable-length text is stored as references into a heap of the file. Where those of a damaged
    # file lead nowhere, the HDF5 library crashes with its process: so another process reads it.
    # -P: modules of the current folder, which may be a stranger's, are not imported.
    program = [sys.executable, "-P", "-c", _PROGRAM, str(path), data_set.name]
    done = subprocess.run(program, capture_output=True, check=False)
    if done.returncode < 0:
        raise ValueError(f"the HDF5 library crashed at the text of {data_set.name!r}")
    if done.returncode:
        last_line = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ValueError(f"the text of {data_set.name!r} cannot be read ({last_line})")
    texts = np.empty(data_set.size, object)
    texts[:] = [value.encode("latin-1") for value in json.loads(done.stdout)]
    return texts.reshape(data_set.shape)
