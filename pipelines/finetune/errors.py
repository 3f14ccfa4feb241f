"""What fine-tuning refuses, and what can fail in it."""

from headrace.cache.errors import HeadraceError

DIFFERENTIABLE = ("logistic", "ridge", "mlp", "conv")  # kinds of heads that gradients pass through


class FinetuneRefused(HeadraceError, ValueError):
    """The head and the backbone at hand do not make a network that predicts as the cached head
    does, or none at all.
    """


class CannotCut(HeadraceError, ValueError):
    """The network cannot be run from the output of that node on."""


class TrainingFailed(HeadraceError, RuntimeError):
    """A network's training cannot go on: its loss is not finite, or it does not fit into memory."""
