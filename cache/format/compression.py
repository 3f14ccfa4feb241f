"""Reading bitshuffle-LZ4 shards, which the library hdf5plugin decompresses."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError


def read_compressed_rows(shard_path: Path, row_selection: Any) -> npt.NDArray[Any]:
    """Return rows (n, *shape) of a verified shard, in the dtype in which its file stores them.

    row_selection: a slice, or increasing positions.

    Raises HeadraceError without hdf5plugin.
    """
    require_hdf5plugin(f"{shard_path} is compressed")
    # Through a Python file, as in `validate_shard`: HDF5 locks a file that it opens by name.
    with shard_path.open("rb") as shard_file, h5py.File(shard_file, "r") as hdf5_file:
        return np.asarray(hdf5_file["features"][row_selection])


def require_hdf5plugin(why: str) -> Any:
    """Return hdf5plugin, whose import registers HDF5 filters. Raises HeadraceError without it."""
    try:
        import hdf5plugin
    except ImportError as error:
        raise HeadraceError(
            f"{why}, and the library hdf5plugin is not installed: pip install 'headrace[compress]'"
        ) from error
    return hdf5plugin
