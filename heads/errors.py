"""The error of heads that cannot be trained, read or used."""

from headrace.cache.errors import HeadraceError


class HeadError(HeadraceError, ValueError):
    """Features, settings or a stored head cannot be used as the caller asks."""
