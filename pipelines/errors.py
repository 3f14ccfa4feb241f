"""Errors that any command can raise."""

from headrace.cache.errors import HeadraceError


class InvalidInput(HeadraceError, ValueError):
    """An argument, a file or a run that was named cannot be used for what was asked."""


class OutputExists(HeadraceError, FileExistsError):
    """A file or folder that would be written is there already, and is left as it is."""
