"""The errors that a user can cause.

A message says what was found, what was expected, where, and what to type next.
"""


class HeadraceError(Exception):
    """Base of every error that the user's input or machine caused; the command line prints it and
    exits with 2.
    """


class CacheError(HeadraceError):
    """The feature cache cannot be used as asked."""


class FeatureSetMissing(CacheError, FileNotFoundError):
    """There is no feature set in this directory."""


class ShardMissing(CacheError, FileNotFoundError):
    """The manifest lists a shard that is not on disk."""


class ShardCorrupt(CacheError, ValueError):
    """A shard's bytes are not the ones that were published, or its structure is not the
    format's.
    """


class ShardUnreadable(CacheError, OSError):
    """The operating system refused to read a shard; names the errno. The shard may be whole."""


class ManifestCorrupt(CacheError, ValueError):
    """A line of a manifest (or the spec beside it) is not the one that was written."""


class SpecMismatch(CacheError, ValueError):
    """A feature set on disk was made by another spec; names the field and both values."""


class ExternalFeaturesInvalid(CacheError, ValueError):
    """A file of another program does not hold features with ids, as asked."""


class PublishFailed(CacheError, OSError):
    """The operating system refused a write; names the errno.

    Nothing was published and no temporary file is left.
    """
