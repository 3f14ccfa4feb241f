"""Errors of stored models, and of networks that are put together from them."""

from headrace.cache.errors import HeadraceError


class ModelError(HeadraceError, ValueError):
    """A directory holds no model that this version can use, or not one for this purpose."""


class CannotSplit(HeadraceError, ValueError):
    """The network cannot be run from the output of that node on."""
