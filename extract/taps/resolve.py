"""Taps: a node of a network and how its output is pooled.

Legend: N images, C channels, H x W positions, T tokens.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from headrace.extract.backbones.backbone import Backbone
from headrace.extract.backbones.nodes import LOGITS, PRE_LOGITS, Node, Nodes, find_nodes, is_square
from headrace.extract.errors import BackboneError, nearest_names

_POOLING = re.compile(r"avg|mean|max|gem|map|cls|vector|grid[1-9][0-9]?")
POOLINGS = "avg, max, gem, gridK (grid2 …), map, and for transformers cls"
_GEM_POWER = 3.0  # generalized mean, as trained for retrieval by Radenovic et al. 2018
_GEM_FLOOR = 1e-6  # activations below it count as it: powers of negative numbers are not defined
# Automatic taps have a middle block at this many of the last resolutions. Earlier maps are large,
# take long to pool, and did not help.
N_MIDDLE_BLOCKS = 2
N_LAST_BLOCKS = 4  # of a transformer: automatic taps have their class tokens
_MAX_PREFIX_TOKENS = 16  # that an error message suggests
MAX_AUTO_FEATURES = 8192  # of all automatic taps together: 16 KB an image


@dataclass(frozen=True)
class Tap:
    """One node and its pooling, "blocks.4.avg"."""

    node: str
    # avg, max, gem, gridK, map; cls for a class token; vector for outputs that have no positions
    pooling: str

    def __str__(self) -> str:
        return f"{self.node}.{self.pooling}"


def parse_tap(text: str) -> Tap:
    """Parse "blocks.4.avg": node "blocks.4", pooling "avg"; "mean" and no pooling mean "avg".

    Raises BackboneError for a text without a node.
    """
    node, _, pooling = text.strip().rpartition(".")
    if not text.strip():
        raise BackboneError("a tap is empty; expected a node and a pooling, such as layer4.avg")
    if not _POOLING.fullmatch(pooling):
        node, pooling = text.strip(), "avg"
    if not node:
        raise BackboneError(
            f"tap {text!r} names a pooling and no node; expected something like layer4.{pooling}"
        )
    return Tap(node, "avg" if pooling == "mean" else pooling)


def resolve_taps(backbone: Backbone, taps: str | Sequence[str]) -> tuple[Tap, ...]:
    """Return the taps that a user asked for, checked against the network; "auto" picks them.

    Raises BackboneError, naming the nearest nodes.
    """
    nodes = backbone_nodes(backbone)
    if taps == "auto":
        if backbone.spec.name.startswith("onnx:"):
            _require_named_blocks(nodes, backbone.spec.name)
        return tuple(_check_tap(tap, nodes, backbone.spec.name) for tap in auto_taps(nodes))
    tap_texts = [taps] if isinstance(taps, str) else list(taps)
    if not tap_texts:
        raise BackboneError(
            f"{backbone.spec.name}: no taps are asked for; name at least one, or auto"
        )
    return tuple(
        dict.fromkeys(_check_tap(parse_tap(text), nodes, backbone.spec.name) for text in tap_texts)
    )


def _require_named_blocks(nodes: Nodes, backbone_name: str) -> None:
    """Raise BackboneError for an ONNX file with tokens whose names do not tell the blocks."""
    tokens = [node.name for node in nodes.nodes if node.layout == "NTC"]
    blocks = _token_blocks(nodes)
    if tokens and not (blocks and all(re.search(r"\d\.", block.name) for block in blocks)):
        raise BackboneError(
            f"{backbone_name}: auto cannot tell the blocks of a transformer in this ONNX file; "
            f"name the taps, such as {tokens[-1]}.avg. All values: headrace backbones "
            f"{backbone_name}"
        )


def tap_shape(tap: Tap, node: Node) -> tuple[int, ...]:
    """Return the shape of one image's pooled output."""
    height, width, channels = _map_extent(node)
    if tap.pooling == "map":
        return (channels, height, width)
    if tap.pooling.startswith("grid"):
        cells = int(tap.pooling[4:])
        return (channels, cells, cells)
    return (channels,)


def pool_output(output: Tensor, pooling: str, node: Node) -> Tensor:
    """Pool a node's output (N, ...) to (N, *tap_shape); averages are computed in float32."""
    if pooling == "vector":
        return output
    if pooling == "cls":
        return output[:, 0]
    if pooling == "map":
        return _as_map(output, node)
    if pooling.startswith("grid"):
        grid = _as_map(output, node).float()
        return F.adaptive_avg_pool2d(grid, int(pooling.removeprefix("grid")))
    # Over the axes in their own order: no map is made of tokens first.
    axes = {"NCHW": (2, 3), "NHWC": (1, 2), "NTC": (1,)}[node.layout]
    if node.layout == "NTC":
        assert node.n_prefix_tokens is not None, f"nothing explains the tokens of {node.name}"
        output = output[:, node.n_prefix_tokens :]
    if pooling == "max":
        return output.amax(dim=axes)
    if pooling == "gem":
        powers = output.float().clamp(min=_GEM_FLOOR).pow(_GEM_POWER)
        return powers.mean(dim=axes).pow(1 / _GEM_POWER)
    return output.float().mean(dim=axes)


@functools.lru_cache(maxsize=8)
def backbone_nodes(backbone: Backbone) -> Nodes:
    """Return the nodes of a loaded backbone at its own input size, found once a process."""
    spec, image_shape = backbone.spec, backbone.preprocessing.pixel_shape
    return find_nodes(backbone.module, image_shape, spec.name, spec.prefix_tokens)


def auto_taps(nodes: Nodes) -> tuple[Tap, ...]:
    """Return the automatic taps in running order, the input of the classifier last.

    These are averages and maxima of the last block at each resolution but the first, of the last
    five at most, and of a middle block at the last two. Of a plain transformer they are averages
    and maxima of the block at each quarter, and class tokens of the last blocks.

    Maxima and middles are what far domains gain from (docs/defaults.md, and for transformers
    docs/decisions/019-taps-of-transformers.md). Together the taps have at most MAX_AUTO_FEATURES
    features, or as many as the last blocks have.
    """
    blocks = _token_blocks(nodes)
    taps = _token_taps(nodes, blocks) if blocks else _stage_taps(nodes)
    if PRE_LOGITS in nodes.names:
        taps.append(Tap(PRE_LOGITS, "vector"))
    return tuple(taps) or _output_taps(nodes)


def _output_taps(nodes: Nodes) -> tuple[Tap, ...]:
    """Return the taps of the network's output, or, if that is no tensor but a dictionary, of the
    last output that is one.
    """
    for node in reversed(nodes.nodes):
        if node.layout == "NC":
            return (Tap(node.name, "vector"),)
        if node.n_prefix_tokens is not None:
            return tuple(Tap(node.name, pooling) for pooling in ("avg", "max"))
    return (Tap(LOGITS, "vector"),)


def _token_taps(nodes: Nodes, blocks: list[Node]) -> list[Tap]:
    """Return the automatic taps of a transformer but for the classifier's input, in running order.

    The first quarters are left out if all have more than MAX_AUTO_FEATURES.
    """
    n_classifier_inputs = nodes[PRE_LOGITS].shape[0] if PRE_LOGITS in nodes.names else 0
    # Those that linear probes of self-supervised networks take.
    with_class_token = [block for block in blocks[-N_LAST_BLOCKS:] if block.has_class_token]
    features_left = (
        MAX_AUTO_FEATURES - n_classifier_inputs - sum(block.shape[1] for block in with_class_token)
    )
    pooled: list[Node] = []
    for quarter in (4, 3, 2, 1):
        block = blocks[math.ceil(len(blocks) * quarter / 4) - 1]
        if not pooled or 2 * block.shape[1] <= features_left:
            pooled.append(block)
            features_left -= 2 * block.shape[1]
    return [
        Tap(block.name, pooling)
        for block in blocks
        for pooling in ("cls", "avg", "max")
        if block in (with_class_token if pooling == "cls" else pooled)
    ]


def _stage_taps(nodes: Nodes) -> list[Tap]:
    """Return the automatic taps of maps, in running order."""
    map_nodes = [node for node in nodes.nodes if node.layout in ("NCHW", "NHWC")]
    n_classifier_inputs = nodes[PRE_LOGITS].shape[0] if PRE_LOGITS in nodes.names else 0
    stage_ends = _last_blocks(map_nodes)
    trunk_names = _trunk_block_names(map_nodes)
    last_blocks: list[Node] = []
    middle_blocks: list[Node] = []
    for end in stage_ends:
        resolution_nodes = [
            node for node in map_nodes if _map_extent(node)[:2] == _map_extent(end)[:2]
        ]
        blocks = [node for node in resolution_nodes if node.name in trunk_names] or [end]
        inner_blocks = [
            node
            for node in resolution_nodes
            if re.fullmatch(re.escape(blocks[-1].name) + r"(\.blocks)?\.\d+", node.name)
        ]
        last_block = blocks[-1]
        # Only pooled or resized: its maxima are those of the block before.
        if last_blocks and last_block.cost <= last_blocks[-1].cost:
            continue
        last_blocks.append(last_block)
        # A middle block must be separated by products from both ends: else it is the last block
        # before its activation, or the block before, pooled.
        previous_cost = max(
            (node.cost for node in map_nodes[: map_nodes.index(resolution_nodes[0])]), default=0.0
        )
        if middle_candidates := [
            node
            for node in blocks[:-1] or inner_blocks[:-1]
            if previous_cost < node.cost < last_block.cost
        ]:
            middle_blocks.append(middle_candidates[len(middle_candidates) // 2])
    # A convolution follows the last block.
    if stage_ends and _map_extent(stage_ends[-1])[2] != _map_extent(last_blocks[-1])[2]:
        last_blocks.append(stage_ends[-1])
    # Its average, normalized at most, is the classifier's input, which would be taken twice.
    if last_blocks and _map_extent(last_blocks[-1])[2] == n_classifier_inputs:
        last_blocks.pop()
    features_left = (
        MAX_AUTO_FEATURES
        - n_classifier_inputs
        - sum(2 * _map_extent(node)[2] for node in last_blocks)
    )
    for middle in reversed(middle_blocks[-N_MIDDLE_BLOCKS:]):
        if (n_features := 2 * _map_extent(middle)[2]) <= features_left:
            last_blocks.append(middle)
            features_left -= n_features
    picked_names = {node.name for node in last_blocks}
    return [
        Tap(node.name, pooling)
        for node in map_nodes
        if node.name in picked_names
        for pooling in ("avg", "max")
    ]


def _trunk_block_names(maps: list[Node]) -> frozenset[str]:
    """Return the names of the network's row of blocks.

    Of the families of names that differ in a number at their end, it is the one of most
    resolutions, then the least nested.
    """
    families: dict[str, list[Node]] = {}
    for node in maps:
        if (family := re.sub(r"\d+[a-z]?$", "", node.name)) != node.name:
            families.setdefault(family, []).append(node)

    def reach(family: str) -> tuple[int, int, int]:
        return (
            len({_map_extent(node)[:2] for node in families[family]}),
            -family.count("."),
            len(families[family]),
        )

    longest = families[max(families, key=reach)] if families else []
    return frozenset(node.name for node in longest)


def _last_blocks(map_nodes: list[Node]) -> list[Node]:
    """Return the last block at each resolution, at most five of them, in running order."""
    resolutions = list(dict.fromkeys(_map_extent(node)[:2] for node in map_nodes))
    largest = max((height * width for height, width in resolutions), default=0)
    last_blocks = []
    for height, width in resolutions:
        # The first resolution shows edges and colours; a single position is the pooled output,
        # which is also that of pre_logits.
        if height * width in (largest, 1):
            continue
        resolution_nodes = [node for node in map_nodes if _map_extent(node)[:2] == (height, width)]
        shallowest = min(node.name.count(".") for node in resolution_nodes)
        # A stage begins with convolutions at the resolution of the one before, which must not be
        # taken for that one's last block. Whole stages have shorter names.
        last_blocks.append(
            [node for node in resolution_nodes if node.name.count(".") == shallowest][-1]
        )
    # Attention matrices and windows look like maps of other resolutions, but lie deep inside the
    # blocks.
    max_nesting = min((node.name.count(".") for node in last_blocks), default=0) + 2
    last_blocks = [node for node in last_blocks if node.name.count(".") <= max_nesting]
    node_order = {node.name: node_index for node_index, node in enumerate(map_nodes)}
    return sorted(last_blocks, key=lambda node: node_order[node.name])[-5:]


def _token_blocks(nodes: Nodes) -> list[Node]:
    """Return the outputs of a plain transformer's blocks in running order; none for other networks.

    A block's output is its last node.
    """
    blocks_of_family: dict[str, dict[str, Node]] = {}
    for node in nodes.nodes:
        # The first number that ends a part of the name: blocks.3.mlp, encoder.encoder_layer_3.
        match = re.match(r"(.*?)(\d+)(?=\.|$)", node.name)
        if node.layout == "NTC" and match is not None:
            blocks_of_family.setdefault(match[1], {})[match[2]] = node
    blocks = max(blocks_of_family.values(), key=len, default={})
    return list(blocks.values()) if len(blocks) >= 4 else []


def _check_tap(tap: Tap, nodes: Nodes, backbone_name: str) -> Tap:
    """Return the tap, with the pooling "vector" if its node's output is a vector.

    Raises BackboneError if the node is absent, or its output cannot be pooled so.
    """
    if tap.node in nodes.repeated:
        raise BackboneError(
            f"{backbone_name}: {tap.node} runs more than once in one forward, so it names no "
            "single output. Tap the block around it: "
            f"{tap.node.rpartition('.')[0] or '(the network)'}. List the taps: headrace backbones "
            f"{backbone_name}"
        )
    if tap.node not in nodes.names:
        parent = tap.node.rpartition(".")[0]
        poolings = f"The poolings of {parent} are {POOLINGS}. " if parent in nodes.names else ""
        raise BackboneError(
            f"{backbone_name} has no node {tap.node!r}. Nearest: "
            f"{nearest_names(tap.node, nodes.names)}. {poolings}List all of them: headrace "
            f"backbones {backbone_name}"
        )
    node = nodes[tap.node]
    if node.layout == "NC":
        if tap.pooling == "cls" or tap.pooling.startswith("grid"):
            raise BackboneError(
                f"{backbone_name}: {tap} has nothing to pool: it is a vector of {node.shape[0]} "
                "values"
            )
        return Tap(tap.node, "vector")
    if tap.pooling == "vector":
        raise BackboneError(
            f"{backbone_name}: {tap.node} has shape {node.shape}, not a vector. Poolings: "
            f"{POOLINGS}"
        )
    if tap.pooling == "cls" and not node.has_class_token:
        raise BackboneError(f"{backbone_name}: {tap.node} has no class token; try {tap.node}.avg")
    if node.layout == "NTC" and tap.pooling != "cls" and node.n_prefix_tokens is None:
        raise BackboneError(_unexplained_tokens_message(tap, node, backbone_name))
    if (
        node.layout == "NTC"
        and (tap.pooling == "map" or tap.pooling.startswith("grid"))
        and not is_square(node.shape[0] - (node.n_prefix_tokens or 0))
    ):
        raise BackboneError(
            f"{backbone_name}: the {node.shape[0]} tokens of {tap.node} make no square map; try "
            f"{tap.node}.avg"
        )
    return tap


def _unexplained_tokens_message(tap: Tap, node: Node, backbone_name: str) -> str:
    """Return the message for tokens of which nothing says how many are not patches."""
    n_tokens = node.shape[0]
    counts = [count for count in range(_MAX_PREFIX_TOKENS + 1) if is_square(n_tokens - count)]
    if counts:
        side = math.isqrt(n_tokens - counts[0])
        reading = (
            f"{n_tokens} would be {side} x {side} patches and {counts[0]} more (class, register "
            f"and distillation tokens). If so, say prefix_tokens: {counts[0]} in the recipe's "
            f"backbone, or BackboneSpec(..., prefix_tokens={counts[0]})"
        )
    else:
        reading = (
            "Say how many come before the patches: prefix_tokens: 5 in the recipe's backbone for a "
            "class token and four registers, or BackboneSpec(..., prefix_tokens=5)"
        )
    return (
        f"{backbone_name}: {tap} would average or map {n_tokens} tokens, and nothing explains "
        f"which of them are patches. {reading}"
    )


def _map_extent(node: Node) -> tuple[int, int, int]:
    """Return (H, W, C) of a node's output; vectors have one position."""
    if node.layout == "NCHW":
        return node.shape[1], node.shape[2], node.shape[0]
    if node.layout == "NHWC":
        return node.shape[0], node.shape[1], node.shape[2]
    if node.layout == "NTC":
        side = math.isqrt(node.shape[0] - (node.n_prefix_tokens or 0))
        return side, side, node.shape[1]
    return 1, 1, node.shape[0]


def _as_map(output: Tensor, node: Node) -> Tensor:
    """Return a view (N, C, H, W) of a node's output."""
    if node.layout == "NHWC":
        return output.permute(0, 3, 1, 2)
    if node.layout == "NTC":
        height, width, _ = _map_extent(node)
        return (
            output[:, node.n_prefix_tokens :]
            .reshape(-1, height, width, output.shape[2])
            .permute(0, 3, 1, 2)
        )
    return output
