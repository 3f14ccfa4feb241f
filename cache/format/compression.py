"""Reading bitshuffle-LZ4 shards, which the library hdf5plugin decompresses."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError


def read_compressed_rows(path: Path, rows: Any) -> npt.NDArray[Any]:
    """Stored rows (n, *shape) of a checked shard; rows: a slice, or increasing positions.

    Raises HeadraceError.
    """
    require_hdf5plugin(f"{path} is compressed")
    with path.open("rb") as bytes_of_it, h5py.File(bytes_of_it, "r") as file:
        return np.asarray(file["features"][rows])


def require_hdf5plugin(why: str) -> Any:
    """The module hdf5plugin; importing it is what makes its filters known to HDF5."""
    try:
        import hdf5plugin
    except ImportError as error:
        raise HeadraceError(
            f"{why}, and the library hdf5plugin is not installed: pip install 'headrace[compress]'"
        ) from error
    return hdf5plugin
