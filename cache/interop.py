"""A feature set as a dask array and as a torch Dataset. Neither library is imported before it is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import dask.array
    import torch.utils.data

    from headrace.cache.feature_set import FeatureSet
    from headrace.cache.manifest import ShardEntry
    from headrace.cache.spec import FeatureSpec


def to_dask_array(features: "FeatureSet", dtype: npt.DTypeLike = None) -> "dask.array.Array":
    """(N, *shape), one chunk per shard that has rows. A task carries a path and an entry; the worker reads the shard."""
    import dask.array
    from dask.delayed import delayed

    dtype = features.dtype if dtype is None else np.dtype(dtype)
    shape = features.spec.shape
    read = delayed(read_shard, pure=True)
    parts = [
        dask.array.from_delayed(read(features.path, features.spec, entry, dtype), (entry.rows, *shape), dtype)
        for entry in features.entries
        if entry.rows
    ]
    if not parts:
        return dask.array.zeros((0, *shape), dtype=dtype)
    return dask.array.concatenate(parts, axis=0)


def read_shard(path: Path, spec: "FeatureSpec", entry: "ShardEntry", dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """(entry.rows, *shape): all rows of one shard."""
    from headrace.cache.feature_set import FeatureSet

    return FeatureSet(path, spec, (entry,)).read(slice(None), dtype)


def to_torch_dataset(features: "FeatureSet", dtype: npt.DTypeLike) -> "torch.utils.data.Dataset[Any]":
    """See `FeatureSet.to_torch_dataset`."""
    from headrace.cache.torch_dataset import FeatureDataset

    return FeatureDataset(features, np.dtype(dtype))
