"""Features on disk: immutable HDF5 shards that can be trusted. The format is in FORMAT.md."""

from headrace.cache.batches import Batch
from headrace.cache.check import check_shard
from headrace.cache.compression import require_hdf5plugin
from headrace.cache.encoding import RoundOff
from headrace.cache.errors import (
    CacheError,
    ExtraMissing,
    FeatureSetMissing,
    HeadraceError,
    ManifestCorrupt,
    NotStorable,
    PublishFailed,
    RowsMissing,
    ShardCorrupt,
    ShardMissing,
    ShardUnreadable,
    SpecMismatch,
)
from headrace.cache.feature_set import FeatureSet, list_feature_sets, open_feature_set
from headrace.cache.files import LEASE_S, lease, publish_bytes, publish_replace
from headrace.cache.manifest import ShardEntry
from headrace.cache.planner import DiskTooSmall, TapCost, plan_taps, require_space, stored_bytes
from headrace.cache.publish import create_feature_set, feature_set_path, publish_shard, shard_path
from headrace.cache.shard import Failure
from headrace.cache.spec import STORAGE_DTYPES, FeatureSpec, spec_difference

__all__ = [
    "LEASE_S",
    "STORAGE_DTYPES",
    "Batch",
    "CacheError",
    "DiskTooSmall",
    "ExtraMissing",
    "Failure",
    "FeatureSet",
    "FeatureSetMissing",
    "FeatureSpec",
    "HeadraceError",
    "ManifestCorrupt",
    "NotStorable",
    "PublishFailed",
    "RoundOff",
    "RowsMissing",
    "ShardCorrupt",
    "ShardEntry",
    "ShardMissing",
    "ShardUnreadable",
    "SpecMismatch",
    "TapCost",
    "check_shard",
    "create_feature_set",
    "feature_set_path",
    "lease",
    "list_feature_sets",
    "open_feature_set",
    "plan_taps",
    "publish_bytes",
    "publish_replace",
    "publish_shard",
    "require_hdf5plugin",
    "require_space",
    "shard_path",
    "spec_difference",
    "stored_bytes",
]
