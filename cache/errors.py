"""Errors that the user's input or the machine can cause.

A message states the value, what was expected, where it is, and what to type next.
"""


class HeadraceError(Exception):
    """Base of errors that input or machine caused; the command line prints it and exits with 2."""


class CacheError(HeadraceError):
    """The feature cache cannot be used as requested: rows are missing, ids are ambiguous, a value
    cannot be stored, the disk is too small.
    """


class FeatureSetMissing(CacheError, FileNotFoundError):
    """There is no feature set in this directory."""


class ShardMissing(CacheError, FileNotFoundError):
    """The manifest lists a shard that is not on disk."""


class ShardCorrupt(CacheError, ValueError):
    """The bytes of a shard are not those published, or its structure is not the format's."""


class ShardUnreadable(CacheError, OSError):
    """The system refused to read a shard, which may be intact; the message names the errno."""


class ManifestCorrupt(CacheError, ValueError):
    """A line of a manifest, or the spec beside it, is not what was written."""


class SpecMismatch(CacheError, ValueError):
    """A feature set on disk has another spec; the message names the field and both values."""


class ExternalFeaturesInvalid(CacheError, ValueError):
    """A file of another program does not hold features with ids, as described by the options."""


class PublishFailed(CacheError, OSError):
    """The operating system refused a write; the message names the errno.

    Nothing was published and no temporary file is left.
    """
