"""Backbone, taps and head as one network whose predictions gradients pass through.

n images, H × W pixels, D features side by side, C outputs.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headrace.extract.backbones.backbone import Backbone
from headrace.extract.taps.capture import TapCapture
from headrace.extract.taps.forward import make_normalizer
from headrace.extract.taps.resolve import Tap, backbone_nodes, pool_output, tap_shape
from headrace.pipelines.models.errors import CannotSplit
from headrace.pipelines.models.split_network import part_above
from headrace.pipelines.models.torch_head import Head

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Network(nn.Module):
    """A copy of a backbone with a head on its taps: pixels, or maps of the cut, to logits (n, C).

    taps: in the order in which the head's features stand side by side. cut: the node that inputs
    are maps of; None: inputs are pixels. Features of taps below the cut cannot be computed, and are
    given (`features_below`).
    """

    def __init__(
        self, backbone: Backbone, taps: Sequence[Tap], head: Head, *, split_node: str | None = None
    ) -> None:
        super().__init__()
        self.preprocessing = backbone.preprocessing
        # As in extraction: convolutions on a CPU are half as fast again with their channels last.
        self.backbone = copy.deepcopy(backbone.module).eval().requires_grad_(False)
        self.backbone.to(memory_format=torch.channels_last)
        self.head = head
        self._untouched = (backbone.module,)  # in a tuple, so that it is no part of this module
        self.split_node, self.taps = split_node, tuple(taps)
        nodes = backbone_nodes(backbone)
        self._placed = [(tap, nodes[tap.node]) for tap in taps]
        self._make_normalizer = functools.partial(make_normalizer, backbone)
        self._normalize: Callable[[Tensor], Tensor] = self._make_normalizer("cpu")
        self.input_shape = (
            (*backbone.preprocessing.crop, 3) if split_node is None else nodes[split_node].shape
        )
        self._body: nn.Module | None = None
        self._dtypes: dict[Tap, torch.dtype] = {}
        names = [node.name for node in nodes.nodes]
        first = -1 if split_node is None else names.index(split_node)
        if split_node is not None:
            self._body = part_above(self.backbone, nodes[split_node])
        self.taps_below = tuple(tap for tap, node in self._placed if names.index(node.name) < first)
        self.n_features_below = sum(
            math.prod(tap_shape(tap, node)) for tap, node in self._placed if tap in self.taps_below
        )
        if self.taps_below and head.spatial:
            raise CannotSplit(
                f"a convolution head on maps below the split {split_node} has nothing that could "
                "be trained "
                "there"
            )
        self._live = [tap for tap in taps if tap not in self.taps_below]
        self._at_split = [(tap, node) for tap, node in self._placed if node.name == split_node]
        above = [
            (tap, node)
            for tap, node in self._placed
            if tap in self._live and node.name != split_node
        ]
        if split_node is not None and (
            around := [
                tap
                for tap, node in above
                if f"{nodes[split_node].module}.".startswith(f"{node.module}.")
            ]
        ):
            raise CannotSplit(
                f"{around[0]} is the output of a module that {split_node} lies in, which "
                "cannot be seen "
                "from inside: split elsewhere, or train from the images (leave the map out)"
            )
        self._capture = TapCapture(self.backbone, above)

    @property
    def untouched(self) -> nn.Module:
        """The backbone that this is a copy of, without hooks."""
        return self._untouched[0]

    def round_to(self, dtypes: Sequence[str]) -> "Network":
        """From now on round each tap's features to what they are stored in, as the cached head has
        seen them.
        """
        self._dtypes = {
            tap: _HALVES[dtype]
            for (tap, _), dtype in zip(self._placed, dtypes, strict=True)
            if dtype in _HALVES
        }
        return self

    def to(self, *args: Any, **kwargs: Any) -> "Network":
        """As nn.Module.to; inputs are then expected on that device."""
        super().to(*args, **kwargs)
        self._normalize = self._make_normalizer(str(next(self.parameters()).device))
        return self

    def forward(self, inputs: Tensor, features_below: Tensor | None = None) -> Tensor:
        """inputs: uint8 pixels (n, H, W, 3), or maps of the cut (n, channels, h, w); held:

        (n, features of `features_below`).
        """
        return self.head(self.features(inputs, features_below))  # type: ignore[no-any-return]

    def features(self, inputs: Tensor, features_below: Tensor | None = None) -> Tensor:
        """What the head is given: (n, D), or for a convolution head maps."""
        captured: dict[Tap, Tensor] = {}
        body: nn.Module = self.backbone
        if self.split_node is None:
            inputs = self._normalize(inputs)
        else:
            assert self._body is not None
            body = self._body
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            for tap, node in self._at_split:
                captured[tap] = pool_output(inputs, tap.pooling, node)
        captured |= self._capture.run(body, inputs)
        columns, start = [], 0
        for tap, node in self._placed:
            if tap in captured:
                column = captured[tap]
            else:
                assert features_below is not None, f"{tap} lies below the split and has to be given"
                width = math.prod(tap_shape(tap, node))
                column = features_below[:, start : start + width]
                start += width
            if tap in self._dtypes:
                column = column.to(self._dtypes[tap])
            column = column.float()
            columns.append(column if self.head.spatial else column.flatten(1))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
