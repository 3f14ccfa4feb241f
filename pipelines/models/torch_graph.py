"""A model as one torch module from pixels to probabilities: normalization, networks, taps, rounding
of features, heads, average.

Decoding, resizing and cropping of files are not part of it (`GraphInput.preprocessing`).
"""

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headrace.cache.spec import FeatureSpec
from headrace.extract.backbones.backbone import Backbone, load_backbone
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.images.views import Symmetries, is_exact_view, parse_view, view_json
from headrace.extract.run.work_unit import check_backbone_identity
from headrace.extract.taps.capture import TapCapture
from headrace.extract.taps.resolve import Tap, backbone_nodes
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.torch_head import tempered

if TYPE_CHECKING:
    from headrace.pipelines.models.head import HeadModel
    from headrace.pipelines.models.model import Model
    from headrace.pipelines.models.network import NetworkModel

_CROP = view_json(0, Symmetries())  # the view that is the unmirrored evaluation crop
# Heads were trained and scored on stored features, which are rounded. A difference in the last bit
# of a float32 can round to the other neighbour in float16: hence the tolerance of exports.
_ROUND_OFF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class GraphInput:
    """One input of the graph: pixels (n, *preprocessing.pixel_shape) of its pixel_dtype."""

    name: str
    preprocessing: Preprocessing


class _Taps(nn.Module):
    """From pixels (n, H, W, C) to the features of one network's taps, rounded as stored."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, features: Sequence[FeatureSpec]) -> None:
        super().__init__()
        # A copy, because the loaded backbone is shared in this process, and hooks are put on this.
        self.network = copy.deepcopy(backbone.module)
        preprocessing = backbone.preprocessing
        channel_mean, channel_std = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        # Folded into one product and one sum, for fast graphs; in float64 until the last step.
        self.register_buffer("scale", (1 / (255 * channel_std)).float())
        self.register_buffer("shift", (-channel_mean / channel_std).float())
        self.features = tuple(features)
        self.taps = [Tap(feature.tap, feature.pooling) for feature in features]
        nodes = backbone_nodes(backbone)
        self.capture = TapCapture(
            self.network, [(tap, nodes[tap.node]) for tap in self.taps], stops_early=False
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        captured = self.capture.run(
            self.network, pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift
        )
        outputs = []
        for tap, feature in zip(self.taps, self.features, strict=True):
            stored_dtype = _ROUND_OFF.get(feature.dtype, torch.float32)
            outputs.append(captured[tap].to(stored_dtype).float())
        return outputs


def _drop_unused_modules(taps: _Taps, backbone: Backbone) -> _Taps:
    """Return the taps without the network's modules that run after the last tap, to keep an export
    small; unchanged if the network cannot run without them, or gives other features.
    """
    # Two random images: of equal ones, a wrong mean over the batch would not be seen.
    pixels = torch.randint(0, 256, (2, *backbone.preprocessing.pixel_shape), dtype=torch.uint8)
    modules_that_ran: set[nn.Module] = set()
    hook_handles = [
        module.register_forward_pre_hook(lambda module, _args: modules_that_ran.add(module))
        for module in taps.network.modules()
    ]
    taps.capture.stops_early = True
    with torch.no_grad():
        expected_features = taps(pixels)
    taps.capture.stops_early = False
    for handle in hook_handles:
        handle.remove()
    # Modules that did not run before every tap had its output are replaced by the identity.
    lean_taps = copy.deepcopy(taps)
    idle_modules = [
        name
        for name, module in taps.network.named_modules()
        if name and modules_that_ran.isdisjoint(module.modules())
    ]
    for module_name in idle_modules:
        parent_name, _, child_name = module_name.rpartition(".")
        if parent_name not in idle_modules:
            lean_taps.network.get_submodule(parent_name)._modules[child_name] = nn.Identity()
    try:
        with torch.no_grad():
            pairs = zip(lean_taps(pixels), expected_features, strict=True)
        return lean_taps if all(torch.equal(a, b) for a, b in pairs) else taps
    except Exception:  # noqa: BLE001 (whatever a network's own code says of shapes that it does not know)
        return taps


class ModelGraph(nn.Module):
    """From pixels, one tensor per input, to probabilities or values (n, C) float32.

    A model that reads side columns has an input for them after the pixels: float32 (n, R) with R
    columns, as from `SideColumns.as_inputs`. A model that predicts the images of a unit (of a
    patient, say) together has a last input for their units: int64 (n,), numbers from 0 to n - 1
    that are equal within a unit. Raises ModelError for a model with random views.
    """

    def __init__(self, model: "Model") -> None:
        super().__init__()
        if not fits_graph(model):
            raise ModelError(
                f"{model.path} averages over random views of an image, which no torch module can "
                "draw: predict_proba does, and headrace export writes a module without them"
            )
        # each network, its features in the evaluation crop, and the symmetries that it reads
        loaded_networks: list[tuple[Backbone, list[FeatureSpec], list[int]]] = [
            (trained_backbone, list(member.features), [0])
            for member in model.members
            if (trained_backbone := member.trained_backbone()) is not None
        ]
        for backbone_spec, view_features in model.features_by_backbone.items():
            backbone = load_backbone(backbone_spec)
            crops = dict.fromkeys(replace(feature, view=_CROP) for feature in view_features)
            for feature in crops:
                check_backbone_identity(backbone, feature)
            symmetries = [parse_view(feature.view)[0] for feature in view_features]
            loaded_networks.append((backbone, list(crops), list(dict.fromkeys(symmetries))))
        self.inputs = graph_inputs(backbone.preprocessing for backbone, _, _ in loaded_networks)
        input_keys = [pixels_of(model_input.preprocessing) for model_input in self.inputs]
        self.sources: list[int] = []  # the index of the input that each network reads
        self.symmetries: list[list[int]] = []  # the symmetries (0 to 7) in which it reads it
        self.feature_keys: list[list[str]] = []  # names of the features that each network gives
        self.networks = nn.ModuleList()
        for backbone, features, symmetries in loaded_networks:
            self.sources.append(input_keys.index(pixels_of(backbone.preprocessing)))
            self.symmetries.append(symmetries)
            feature_keys = [replace(feature, view=_CROP).to_json() for feature in features]
            self.feature_keys.append(feature_keys)
            self.networks.append(_drop_unused_modules(_Taps(backbone, features), backbone))
        self.heads = nn.ModuleList([member.torch_head() for member in model.members])
        self.columns = [_view_columns(member) for member in model.members]
        self.spatial = [member.spatial for member in model.members]
        self.side_columns = model.side_columns
        self.reads_side = [bool(member.side_columns) for member in model.members]
        self.takes_units = [member.takes_units for member in model.members]
        # The temperature is applied to the mean over several views; with one view, the head module
        # applies it itself. The floor is the smallest probability whose logarithm it divides.
        self.weights_and_temperatures = [
            (weight, member.temperature if member.n_views > 1 else 1.0, member.floor)
            for weight, member in zip(model.weights, model.members, strict=True)
        ]
        self.temperature, self.task_kind = model.average_temperature, model.task_kind
        self.eval().requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        images, side_inputs = inputs[: len(self.inputs)], inputs[len(self.inputs) :]
        feature_values: dict[tuple[str, int], Tensor] = {}
        for network, input_index, network_symmetries, feature_keys in zip(
            self.networks, self.sources, self.symmetries, self.feature_keys, strict=True
        ):
            for symmetry in network_symmetries:
                network_features = network(_mirrored_pixels(images[input_index], symmetry))
                for feature_key, feature_value in zip(feature_keys, network_features, strict=True):
                    feature_values[feature_key, symmetry] = feature_value
        member_predictions = []
        for head, columns, spatial, reads_side, takes_units, member_share in zip(
            self.heads,
            self.columns,
            self.spatial,
            self.reads_side,
            self.takes_units,
            self.weights_and_temperatures,
            strict=True,
        ):
            view_predictions = []
            for view_columns in columns:
                view_features = [feature_values[feature_key] for feature_key in view_columns]
                if not spatial:
                    view_features = [feature.flatten(1) for feature in view_features]
                if reads_side:
                    view_features.append(side_inputs[0])
                view_inputs = (
                    view_features[0] if len(view_features) == 1 else torch.cat(view_features, dim=1)
                )
                view_predictions.append(view_inputs if takes_units else head(view_inputs))
            if takes_units:
                # All views of a unit's images are one bag, as in training.
                bags = inputs[-1].repeat(len(view_predictions))
                unit_predictions = head(torch.cat(view_predictions), bags)
                # Tracing keeps a shape as a symbol; len() would become the example's number.
                view_predictions = [unit_predictions[: inputs[-1].shape[0]]]
            weight, member_temperature, floor = member_share
            mean_of_views = (
                view_predictions[0]
                if len(view_predictions) == 1
                else torch.stack(view_predictions).mean(0)
            )
            predicted = tempered(mean_of_views, self.task_kind, member_temperature, floor)
            member_predictions.append(predicted if weight == 1 else predicted * weight)
        weighted_sum = functools.reduce(torch.add, member_predictions)
        return tempered(weighted_sum, self.task_kind, self.temperature)


def _mirrored_pixels(pixels: Tensor, symmetry: int) -> Tensor:
    """Return pixels (n, H, W, C) in one of the 8 symmetries: bit 4 transposes, bits 1 and 2 flip
    columns and rows, as in extract.images.views.
    """
    mirrored_pixels = pixels.transpose(1, 2) if symmetry & 4 else pixels
    flipped_axes = [axis for axis, bit in ((1, 2), (2, 1)) if symmetry & bit]
    return torch.flip(mirrored_pixels, flipped_axes) if flipped_axes else mirrored_pixels


def graph_inputs(preprocessings: Iterable[Preprocessing]) -> list[GraphInput]:
    """Return the inputs of a graph of networks with these preprocessings."""
    # Those that differ only in mean and std, which the graph applies itself, share one.
    distinct: dict[tuple[Any, ...], Preprocessing] = {}
    for preprocessing in preprocessings:
        distinct.setdefault(pixels_of(preprocessing), preprocessing)
    if len(distinct) == 1:
        return [GraphInput("images", *distinct.values())]
    return [
        GraphInput(f"images_{index}", preprocessing)
        for index, preprocessing in enumerate(distinct.values())
    ]


def fits_graph(model: "Model") -> bool:
    """Return whether all views that the model averages over are symmetries of the evaluation
    crop.
    """
    return all(
        is_exact_view(feature.view) for member in model.members for feature in member.features
    )


def _view_columns(member: "HeadModel | NetworkModel") -> list[list[tuple[str, int]]]:
    """Return for each view the features that are put side by side, as (feature key, symmetry)."""
    columns_of_view: dict[int, list[tuple[str, int]]] = {}
    for feature in member.features:
        symmetry = parse_view(feature.view)[0]
        columns_of_view.setdefault(symmetry, []).append(
            (replace(feature, view=_CROP).to_json(), symmetry)
        )
    return list(columns_of_view.values())


def pixels_of(preprocessing: Preprocessing) -> tuple[Any, ...]:
    """Return a key that is equal for two preprocessings that make the same pixels of an image."""
    return (
        preprocessing.resize,
        preprocessing.crop,
        preprocessing.mode,
        preprocessing.interpolation,
        preprocessing.mean if preprocessing.mode == "border" else None,  # the border's colour
        preprocessing.pixel_range,
        preprocessing.bands,
        preprocessing.pixel_dtype,
        preprocessing.decode,
        preprocessing.mean if preprocessing.nodata == "mean" else None,  # of pixels without a value
    )
