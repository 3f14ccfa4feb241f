"""Errors of fine-tuning."""

from headrace.cache.errors import HeadraceError


class FinetuneRefused(HeadraceError, ValueError):
    """The head and the backbone at hand do not make a network that predicts as the cached head
    does, or none at all.
    """


class TrainingFailed(HeadraceError, RuntimeError):
    """A network's training cannot go on: its loss is not finite, or it does not fit into memory."""
