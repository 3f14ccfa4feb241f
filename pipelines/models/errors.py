"""What can be wrong with a stored model, and with a network that is put together from one."""

from headrace.cache.errors import HeadraceError


class ModelError(HeadraceError, ValueError):
    """A directory holds no model that this version can use, or the model does not serve."""


class CannotSplit(HeadraceError, ValueError):
    """The network cannot be run from the output of that node on."""
