"""Backbone, taps and head as one differentiable network.

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

_HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Network(nn.Module):
    """A copy of a backbone with a head on its taps, from pixels, or maps of a node, to logits (n,
    C).

    taps: in the order of the head's features. split_node: the node whose maps are the inputs; None:
    inputs are pixels. Features of taps below the node (`taps_below`) cannot be computed from its
    maps, and are further inputs.
    """

    def __init__(
        self, backbone: Backbone, taps: Sequence[Tap], head: Head, *, split_node: str | None = None
    ) -> None:
        super().__init__()
        self.preprocessing = backbone.preprocessing
        # As in extraction: on a CPU convolutions are 1.5 times as fast with channels last.
        self.backbone = copy.deepcopy(backbone.module).eval().requires_grad_(False)
        self.backbone.to(memory_format=torch.channels_last)
        self.head = head
        # In a tuple, because nn.Module would take a module for a child, to be moved and saved too.
        self._source_module = (backbone.module,)
        self.split_node, self.taps = split_node, tuple(taps)
        nodes = backbone_nodes(backbone)
        self._tap_nodes = [(tap, nodes[tap.node]) for tap in taps]
        self._make_normalizer = functools.partial(make_normalizer, backbone)
        self._normalize: Callable[[Tensor], Tensor] = self._make_normalizer("cpu")
        self.input_shape = (
            backbone.preprocessing.pixel_shape if split_node is None else nodes[split_node].shape
        )
        self._body: nn.Module | None = None
        self._dtypes: dict[Tap, torch.dtype] = {}
        position = {node.name: index for index, node in enumerate(nodes.nodes)}
        split_position = -1 if split_node is None else position[split_node]
        if split_node is not None:
            self._body = part_above(self.backbone, nodes[split_node])
        depths = [position[node.name] - split_position for _, node in self._tap_nodes]
        below = [pair for pair, depth in zip(self._tap_nodes, depths, strict=True) if depth < 0]
        self.taps_below = tuple(tap for tap, _ in below)
        self.n_features_below = sum(math.prod(tap_shape(tap, node)) for tap, node in below)
        if self.taps_below and head.spatial:
            raise CannotSplit(
                f"a convolution head on maps below the split {split_node} has nothing that could "
                "be trained there"
            )
        self._at_split = [(tap, node) for tap, node in self._tap_nodes if node.name == split_node]
        above = [pair for pair, depth in zip(self._tap_nodes, depths, strict=True) if depth > 0]
        split_module = "" if split_node is None else f"{nodes[split_node].module}."
        for tap, node in above:
            if split_module.startswith(f"{node.module}."):
                raise CannotSplit(
                    f"{tap} is the output of a module that {split_node} lies in, which cannot be "
                    "seen from inside: split elsewhere, or train from the images"
                )
        self._capture = TapCapture(self.backbone, above)

    @property
    def source_module(self) -> nn.Module:
        """The backbone that this is a copy of, without hooks."""
        return self._source_module[0]

    def round_to(self, dtypes: Sequence[str]) -> "Network":
        """Round each tap's features to their dtype in the cache, which the head was trained on."""
        self._dtypes = {
            tap: _HALF_DTYPES[dtype]
            for (tap, _), dtype in zip(self._tap_nodes, dtypes, strict=True)
            if dtype in _HALF_DTYPES
        }
        return self

    def to(self, *args: Any, **kwargs: Any) -> "Network":
        """Move the network as nn.Module.to does; inputs are then expected on that device."""
        super().to(*args, **kwargs)
        self._normalize = self._make_normalizer(str(next(self.parameters()).device))
        return self

    def forward(self, inputs: Tensor, features_below: Tensor | None = None) -> Tensor:
        """Return the logits (n, C).

        inputs: pixels (n, H, W, channels) of the preprocessing's pixel_dtype, or maps of the split
        node (n, channels, h, w).
        features_below: (n, D) of `taps_below`.
        """
        return self.head(self.features(inputs, features_below))  # type: ignore[no-any-return]

    def features(self, inputs: Tensor, features_below: Tensor | None = None) -> Tensor:
        """Return the head's input: (n, D), or for a convolution head maps."""
        outputs_of_tap: dict[Tap, Tensor] = {}
        traced_body: nn.Module = self.backbone
        if self.split_node is None:
            inputs = self._normalize(inputs)
        else:
            assert self._body is not None
            traced_body = self._body
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            for tap, node in self._at_split:
                outputs_of_tap[tap] = pool_output(inputs, tap.pooling, node)
        outputs_of_tap |= self._capture.run(traced_body, inputs)
        feature_blocks, first_column = [], 0
        for tap, node in self._tap_nodes:
            if tap in outputs_of_tap:
                tap_features = outputs_of_tap[tap]
            else:
                assert features_below is not None, f"{tap} lies below the split and has to be given"
                n_columns = math.prod(tap_shape(tap, node))
                tap_features = features_below[:, first_column : first_column + n_columns]
                first_column += n_columns
            if tap in self._dtypes:
                tap_features = tap_features.to(self._dtypes[tap])
            tap_features = tap_features.float()
            feature_blocks.append(tap_features if self.head.spatial else tap_features.flatten(1))
        return feature_blocks[0] if len(feature_blocks) == 1 else torch.cat(feature_blocks, dim=1)
