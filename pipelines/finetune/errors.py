"""Errors of fine-tuning."""

from headrace.cache.errors import HeadraceError


class FinetuneRefused(HeadraceError, ValueError):
    """Head and backbone cannot be made one network, or it does not predict as the cached head."""


class TrainingFailed(HeadraceError, RuntimeError):
    """A network's training cannot go on: its loss is not finite, or it does not fit into memory."""
