"""Descriptions of backbones before they are used, and the feature sets of their taps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from headrace.cache.spec import STORAGE_DTYPES, FeatureSpec
from headrace.extract.backbones.backbone import Backbone, build_untrained, load_backbone
from headrace.extract.backbones.nodes import Layout, find_nodes
from headrace.extract.errors import BackboneError
from headrace.extract.images.decoding import DECODER
from headrace.extract.images.views import Augmentation, Symmetries, ViewMethod, view_json
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.forward import COMPUTE_DTYPES, make_forward
from headrace.extract.taps.left_out import require_loaded
from headrace.extract.taps.resolve import Tap, auto_taps, backbone_nodes, tap_shape


@dataclass(frozen=True)
class TapInfo:
    """One node that can be tapped."""

    node: str
    layout: Layout
    shape: tuple[int, ...]  # of one image's output, unpooled
    map_bytes: int  # per image as float16, unpooled
    avg_bytes: int  # per image as float16, averaged over positions
    cost: float  # share of the whole forward that is spent to reach it, 0 to 1


@dataclass(frozen=True)
class BackboneInfo:
    """A backbone, described."""

    name: str
    preprocessing: str  # canonical JSON, as FeatureSpec.preprocessing
    parameters: int
    multiply_adds: int  # of one image's whole forward
    taps: tuple[TapInfo, ...]  # in running order
    auto: tuple[Tap, ...]  # what "auto" picks


def describe_backbone(spec: BackboneSpec) -> BackboneInfo:
    """Describe a backbone, without loading or downloading its weights. Raises BackboneError."""
    module, preprocessing = build_untrained(spec)
    nodes = find_nodes(module, preprocessing.pixel_shape, spec.name, spec.prefix_tokens)
    return BackboneInfo(
        name=spec.name,
        preprocessing=preprocessing.to_json(),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        multiply_adds=nodes.multiply_adds,
        taps=tuple(
            TapInfo(
                node=node.name,
                layout=node.layout,
                shape=node.shape,
                map_bytes=2 * prod(node.shape),
                avg_bytes=2 * tap_shape(Tap(node.name, "avg"), node)[0],
                cost=node.cost,
            )
            for node in nodes.nodes
        ),
        auto=auto_taps(nodes),
    )


def measure_rate(spec: BackboneSpec) -> float:
    """Return images per second of the pass on the CPU to the taps that `auto` picks, without
    decoding, on all threads of this process.

    spec: weights may be random, for they do not change the rate. Raises BackboneError.
    """
    backbone = load_backbone(spec)
    forward = make_forward(backbone, auto_taps(backbone_nodes(backbone)), device="cpu")
    n_batch = 8  # as extraction on a CPU takes them
    pixels = torch.zeros((n_batch, *backbone.preprocessing.pixel_shape), dtype=torch.uint8)
    forward(pixels)  # the first pass also compiles and allocates
    n_images, started_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started_s) < 3 or not n_images:
        forward(pixels)
        n_images += n_batch
    return n_images / elapsed_s


def feature_specs(
    backbone: Backbone,
    taps: Sequence[Tap],
    *,
    dtype: str = "float16",
    compute_dtype: str = "float32",
    views: int = 1,
    augmentation: Augmentation | None = None,
    symmetric: bool = False,
) -> tuple[FeatureSpec, ...]:
    """Return the feature sets of these taps, tap by tap, and within a tap view by view.

    views: how many, the evaluation crop included. augmentation: how the others are drawn at random.
    symmetric: they are not drawn, but are the crop mirrored (up to 4 views) and turned (up to 8).
    Raises BackboneError,
    also if a tap depends on weights that a checkpoint lacks; warns of those that it lacks above the
    taps.
    """
    for name, dtype_value, valid_values in (
        ("dtype", dtype, STORAGE_DTYPES),
        ("compute_dtype", compute_dtype, COMPUTE_DTYPES),
    ):
        if dtype_value not in valid_values:
            raise BackboneError(
                f"{name} is {dtype_value!r}; expected one of {', '.join(valid_values)}"
            )
    if views < 1:
        raise BackboneError(f"views is {views}; expected at least 1, the evaluation crop")
    if symmetric:
        _check_symmetric(backbone.preprocessing.crop, views)
    view_method: ViewMethod = Symmetries() if symmetric else augmentation or Augmentation()
    nodes = backbone_nodes(backbone)
    require_loaded(backbone, taps, nodes)
    return tuple(
        FeatureSpec(
            backbone=backbone.spec.name,
            weights=backbone.weights,
            tap=tap.node,
            pooling=tap.pooling,
            preprocessing=backbone.preprocessing.to_json(),
            view=view_json(view, view_method),
            decoder=DECODER,
            compute_dtype=compute_dtype,
            dtype=dtype,
            shape=tap_shape(tap, nodes[tap.node]),
        )
        for tap in taps
        for view in range(views)
    )


def _check_symmetric(crop: tuple[int, int], views: int) -> None:
    if views > 8:
        raise BackboneError(
            f"views is {views}; expected at most 8, the number of symmetries of a square"
        )
    if views > 4 and crop[0] != crop[1]:
        raise BackboneError(
            f"a crop of {crop[0]} × {crop[1]} pixels (height × width) cannot be turned by a "
            "quarter: ask for the four mirrored views (views: flips), or for a square crop "
            "(image_size)"
        )
