"""The errors that a user can cause. Each message says what was found, what was expected, where, and what to type next."""


class HeadraceError(Exception):
    """Base of every error that the user's input or machine caused; the command line prints it alone, with exit code 2."""


class CacheError(HeadraceError):
    """The feature cache cannot be used as asked."""


class ShardMissing(CacheError, FileNotFoundError):
    """The manifest lists a shard that is not on disk."""


class ShardCorrupt(CacheError, ValueError):
    """A shard's bytes are not the ones that were published, or its structure is not the format's."""


class SpecMismatch(CacheError, ValueError):
    """A feature set on disk was made by another spec; names the field and both values."""


class PublishFailed(CacheError, OSError):
    """The operating system refused a write; names the errno. Nothing was published and no temporary file is left."""
