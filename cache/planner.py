"""How many bytes a feature set will take, said before anything is extracted."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

from headrace.cache.errors import CacheError
from headrace.cache.format.encoding import STORED_DTYPES
from headrace.cache.format.shard import USER_BLOCK_BYTES
from headrace.cache.spec import FeatureSpec

# Measured: superblock, object headers, attributes and the spec's text, beyond the user block.
_HEADER_BYTES = 8192
_ID_BYTES = 64  # a path relative to the data set, rarely longer

# A file system that is filled to the last byte becomes slow, and others use it too.
RESERVE = 0.02


@dataclass(frozen=True)
class TapCost:
    """What storing one feature set will take."""

    spec: FeatureSpec
    rows: int
    bytes: int
    fits: bool  # together with all that come before it


def stored_bytes(spec: FeatureSpec, rows: int, rows_per_shard: int = 1024) -> int:
    """Bytes on disk of `rows` uncompressed rows; never less than what will be written."""
    row_bytes = prod(spec.shape) * STORED_DTYPES[spec.dtype].itemsize + 32 + _ID_BYTES
    return rows * row_bytes + ceil(rows / rows_per_shard) * (USER_BLOCK_BYTES + _HEADER_BYTES)


def plan_taps(wanted: Iterable[tuple[FeatureSpec, int]], budget_bytes: int | None) -> list[TapCost]:
    """Cost of each (spec, rows still to be extracted), in the order of preference;
    None: no budget.
    """
    costs, left = [], budget_bytes
    for spec, rows in wanted:
        size = stored_bytes(spec, rows)
        fits = left is None or size <= left
        if fits and left is not None:
            left -= size
        costs.append(TapCost(spec, rows, size, fits))
    return costs


def require_disk_space(
    cache_root: Path, costs: Sequence[TapCost], free_bytes: int | None = None
) -> None:
    """Raise CacheError, naming what to leave out, unless all of it fits on `cache_root`'s disk
    with some to spare.

    free_bytes: for planning another machine's disk.
    """
    if not costs:
        return
    existing = next(path for path in (cache_root, *cache_root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free if free_bytes is None else free_bytes
    needed, usable = sum(cost.bytes for cost in costs), int(free * (1 - RESERVE))
    if needed > usable:
        largest = max(costs, key=lambda cost: cost.bytes)
        raise CacheError(
            f"{cache_root}: the features need {needed / 1e9:.2f} GB and {usable / 1e9:.2f} GB are "
            f"free. The largest tap is {largest.spec.name} with {largest.bytes / 1e9:.2f} GB; "
            "leave it out, pool it (avg instead of map), store it as uint8, or give another cache "
            "directory. Nothing was extracted"
        )
