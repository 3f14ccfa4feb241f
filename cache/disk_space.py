"""Disk space of feature sets, computed before anything is extracted."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

from headrace.cache.errors import CacheError
from headrace.cache.format.encoding import NUMPY_DTYPES
from headrace.cache.format.shard import USER_BLOCK_BYTES
from headrace.cache.spec import FeatureSpec

# Measured: superblock, object headers, attributes and the spec's text, beyond the user block.
_HEADER_BYTES = 8192
_ID_BYTES = 64  # an id is a path relative to the data set, rarely longer

# Share of the free space that is left: a file system that is filled to the last byte becomes slow,
# and others use it too.
RESERVED_SHARE = 0.02


@dataclass(frozen=True)
class TapCost:
    """Disk space of one feature set."""

    spec: FeatureSpec
    n_rows: int  # still to be extracted
    n_bytes: int  # of these rows
    fits_budget: bool  # together with the taps before it that fit


def stored_bytes(spec: FeatureSpec, n_rows: int, rows_per_shard: int = 1024) -> int:
    """Return the bytes on disk of `n_rows` uncompressed rows.

    An upper bound where ids have at most 64 bytes and shards at least `rows_per_shard` rows.
    """
    # 32 bytes of content hash per row.
    row_bytes = prod(spec.shape) * NUMPY_DTYPES[spec.dtype].itemsize + 32 + _ID_BYTES
    return n_rows * row_bytes + ceil(n_rows / rows_per_shard) * (USER_BLOCK_BYTES + _HEADER_BYTES)


def plan_taps(
    requested_taps: Iterable[tuple[FeatureSpec, int]], budget_bytes: int | None
) -> list[TapCost]:
    """Return the cost of each (spec, rows still to be extracted), in the given order.

    budget_bytes: disk space for all, given to the first ones first; None for no budget.
    """
    costs, remaining_bytes = [], budget_bytes
    for spec, n_rows in requested_taps:
        tap_bytes = stored_bytes(spec, n_rows)
        fits_budget = remaining_bytes is None or tap_bytes <= remaining_bytes
        if fits_budget and remaining_bytes is not None:
            remaining_bytes -= tap_bytes
        costs.append(TapCost(spec, n_rows, tap_bytes, fits_budget))
    return costs


def require_disk_space(
    cache_root: Path, costs: Sequence[TapCost], free_bytes: int | None = None
) -> None:
    """Raise CacheError, naming the largest tap, unless all fit on the disk of `cache_root`.

    free_bytes: to plan for another machine's disk.
    """
    if not costs:
        return
    # The cache need not exist yet: the nearest parent that does is on the same disk.
    existing_path = next(
        path for path in (cache_root, *cache_root.absolute().parents) if path.exists()
    )
    available_bytes = shutil.disk_usage(existing_path).free if free_bytes is None else free_bytes
    needed_bytes = sum(cost.n_bytes for cost in costs)
    usable_bytes = int(available_bytes * (1 - RESERVED_SHARE))
    if needed_bytes > usable_bytes:
        largest_tap = max(costs, key=lambda cost: cost.n_bytes)
        raise CacheError(
            f"{cache_root}: the features need {needed_bytes / 1e9:.2f} GB and "
            f"{usable_bytes / 1e9:.2f} GB of the free space may be used. "
            f"The largest tap is {largest_tap.spec.name} with {largest_tap.n_bytes / 1e9:.2f} GB; "
            "leave it out, pool it (avg instead of map), store it as uint8, or give another cache "
            "directory. Nothing was extracted"
        )
