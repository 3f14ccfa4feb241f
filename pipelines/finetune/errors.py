"""Errors of fine-tuning."""

from headrace.cache.errors import HeadraceError


class FinetuneRefused(HeadraceError, ValueError):
    """Head and backbone make no network, or none that predicts as the cached head does."""


class TrainingFailed(HeadraceError, RuntimeError):
    """A network's training cannot go on: its loss is not finite, or it does not fit into memory."""
