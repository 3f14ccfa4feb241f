"""Capture of taps: hooks pool the outputs of a network's nodes while the network runs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from headrace.extract.backbones.nodes import LOGITS, PRE_LOGITS, Node, output_tensor
from headrace.extract.taps.resolve import Tap, pool_output

# Poolings that are views of the output itself, which the network may overwrite in place later.
_VIEWS = ("map", "vector", "cls")


# Not an Exception, so that no handler in a network's own code stops it.
class _AllCaptured(BaseException):
    """Ends a forward pass once every tap has its output."""


class TapCapture:
    """Forward hooks on `module`, attached for good, that pool the outputs of `taps`.

    taps: each with its node of the network. stops_early: whether a pass ends at the deepest tap.
    """

    def __init__(
        self, module: nn.Module, taps: Sequence[tuple[Tap, Node]], *, stops_early: bool = True
    ) -> None:
        self.stops_early = stops_early
        self.captured: dict[Tap, Tensor] = {}
        taps_of_node: dict[str, tuple[Node, list[Tap]]] = {}
        for tap, node in dict(taps).items():
            taps_of_node.setdefault(node.name, (node, []))[1].append(tap)
        # Logits are what the network returns, also where only its upper part runs.
        returned = LOGITS in taps_of_node and not taps_of_node[LOGITS][0].module
        self._logits = taps_of_node.pop(LOGITS) if returned else None
        # The hooks are methods and not closures: in a deep copy of a module that holds a TapCapture
        # they belong to the copy, and two copies never see each other's outputs.
        for node, node_taps in taps_of_node.values():
            tapped = module.get_submodule(node.module)
            if node.name == PRE_LOGITS:
                tapped.register_forward_pre_hook(
                    functools.partial(self._capture_input, node, node_taps)
                )
            else:
                tapped.register_forward_hook(
                    functools.partial(self._capture_output, node, node_taps)
                )
        self.n_taps = len(dict(taps))

    def run(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> dict[Tap, Tensor]:
        """Run `network`, which contains the hooked modules, and return {tap: pooled output}.

        Outputs have the shape (N, *tap_shape). A capture without taps runs nothing.
        """
        captured: dict[Tap, Tensor] = {}
        self.captured = captured
        try:
            if self.n_taps:
                logits = network(inputs)
                if self._logits is not None:
                    self._pool(*self._logits, logits)
        except _AllCaptured:
            pass
        finally:
            # Also after a device ran out of memory: the next try needs what the outputs take.
            self.captured = {}
        return captured

    def _capture_input(
        self, node: Node, taps: Sequence[Tap], _module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        self._capture(node, taps, args[0])

    def _capture_output(
        self, node: Node, taps: Sequence[Tap], _module: nn.Module, _args: Any, output: Any
    ) -> None:
        self._capture(node, taps, output_tensor(output))

    def _capture(self, node: Node, taps: Sequence[Tap], output: Tensor) -> None:
        self._pool(node, taps, output)
        if self.stops_early and len(self.captured) == self.n_taps:
            raise _AllCaptured

    def _pool(self, node: Node, taps: Sequence[Tap], output: Tensor) -> None:
        for tap in taps:
            pooled = pool_output(output, tap.pooling, node)
            self.captured[tap] = pooled.clone() if tap.pooling in _VIEWS else pooled
