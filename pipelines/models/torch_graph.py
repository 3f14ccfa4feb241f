"""A model as one torch module, from pixels to probabilities: normalisation, networks, taps,
round-off, heads, average.

What is not in it is what makes pixels of a file: decoding, resizing and cropping
(`Input.preprocessing`).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headrace.cache.spec import FeatureSpec
from headrace.extract.backbones.backbone import Backbone, load_backbone
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.images.views import Symmetries, is_exact_view, parse_view, view_json
from headrace.extract.run.work_unit import check_backbone_identity
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.capture import TapCapture
from headrace.extract.taps.resolve import Tap, backbone_nodes
from headrace.pipelines.models.torch_head import tempered

if TYPE_CHECKING:
    from headrace.pipelines.models.head import HeadModel
    from headrace.pipelines.models.model import Model
    from headrace.pipelines.models.network import NetworkModel

_CROP = view_json(0, Symmetries())  # the view that is the evaluation crop
_ROUND_OFF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Input:
    """One input of the graph: uint8 RGB pixels (n, *preprocessing.crop, 3)."""

    name: str
    preprocessing: Preprocessing


class _Taps(nn.Module):
    """uint8 pixels (n, H, W, 3) to the features of some taps of one network, with the round-off of
    storing them.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, features: Sequence[FeatureSpec]) -> None:
        super().__init__()
        self.network = copy.deepcopy(backbone.module)
        how = backbone.preprocessing
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
            for values in (how.mean, how.std)
        )
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())
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
            output = captured[tap]
            if feature.dtype in _ROUND_OFF:
                output = output.to(_ROUND_OFF[feature.dtype])
            outputs.append(output.float())
        return outputs


def _lean(taps: _Taps, backbone: Backbone) -> _Taps:
    """Without what lies behind the deepest tap, whose parameters a program file would carry along.

    Modules that do not run before every tap has its output are replaced by the identity. Where the
    rest of the network cannot run on that, the taps stay as they are: the values are the same.
    """
    pixels = torch.randint(0, 256, (2, *backbone.preprocessing.crop, 3), dtype=torch.uint8)
    ran: set[nn.Module] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, _args: ran.add(module))
        for module in taps.network.modules()
    ]
    taps.capture.stops_early = True
    with torch.no_grad():
        expected = taps(pixels)
    taps.capture.stops_early = False
    for handle in handles:
        handle.remove()
    lean = copy.deepcopy(taps)
    idle = [
        name
        for (name, module), kept in zip(
            lean.network.named_modules(), taps.network.modules(), strict=True
        )
        if not any(child in ran for child in kept.modules()) and name
    ]
    for name in idle:
        parent, _, last = name.rpartition(".")
        if parent not in idle:
            lean.network.get_submodule(parent)._modules[last] = nn.Identity()
    try:
        with torch.no_grad():
            found = lean(pixels)
        return (
            lean if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) else taps
        )
    except Exception:  # noqa: BLE001 (whatever a network's own code says of shapes that it does not know)
        return taps


class ModelGraph(nn.Module):
    """Pixels, one tensor per input, to probabilities (n, C) float32, for regression values.

    The model has no random views.
    """

    def __init__(self, model: "Model") -> None:
        super().__init__()
        wanted: dict[BackboneSpec, dict[FeatureSpec, None]] = {}
        turns: dict[BackboneSpec, dict[int, None]] = {}
        loaded: list[tuple[Backbone, list[FeatureSpec], list[int]]] = []
        for member in model.members:
            trained_backbone = member.trained_backbone()
            if trained_backbone is not None:
                loaded.append((trained_backbone, list(member.features), [0]))
                continue
            for made_by, feature in zip(member.backbones, member.features, strict=True):
                wanted.setdefault(made_by, {})[replace(feature, view=_CROP)] = None
                turns.setdefault(made_by, {})[parse_view(feature.view)[0]] = None
        self.inputs: list[Input] = []
        self.sources: list[int] = []  # which input each network reads
        self.turns: list[list[int]] = []  # and which symmetries of it
        self.keys: list[list[str]] = []  # the features that each network gives
        networks = []
        for made_by, features in wanted.items():
            loaded.append((load_backbone(made_by), list(features), list(turns[made_by])))
            for feature in features:
                check_backbone_identity(loaded[-1][0], feature)
        for backbone, given, turned in loaded:
            self.sources.append(self._input(backbone.preprocessing))
            self.turns.append(turned)
            self.keys.append([replace(feature, view=_CROP).to_json() for feature in given])
            networks.append(_lean(_Taps(backbone, given), backbone))
        self.networks = nn.ModuleList(networks)
        self.heads = nn.ModuleList([member.torch_head() for member in model.members])
        self.columns = [_columns(member) for member in model.members]
        self.spatial = [member.spatial for member in model.members]
        # Of several views the mean is tempered, else the log-odds within the head.
        self.shares = [
            (weight, member.temperature if member.n_views > 1 else 1.0, member.floor)
            for weight, member in zip(model.weights, model.members, strict=True)
        ]
        self.temperature, self.task_kind = model.average_temperature, model.task_kind
        if len(self.inputs) > 1:
            self.inputs = [
                replace(each, name=f"images_{place}") for place, each in enumerate(self.inputs)
            ]
        self.eval().requires_grad_(False)

    def forward(self, *images: Tensor) -> Tensor:
        features: dict[tuple[str, int], Tensor] = {}
        for network, source, turns, keys in zip(
            self.networks, self.sources, self.turns, self.keys, strict=True
        ):
            for turn in turns:
                given = network(_turned(images[source], turn))
                features |= {(key, turn): value for key, value in zip(keys, given, strict=True)}
        total: Tensor | None = None
        for head, columns, spatial, share in zip(
            self.heads, self.columns, self.spatial, self.shares, strict=True
        ):
            seen = []
            for view in columns:
                parts = [features[key] if spatial else features[key].flatten(1) for key in view]
                seen.append(head(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)))
            weight, own, floor = share
            part = tempered(
                seen[0] if len(seen) == 1 else torch.stack(seen).mean(0), self.task_kind, own, floor
            )
            part = part if weight == 1 else part * weight
            total = part if total is None else total + part
        assert total is not None
        return tempered(total, self.task_kind, self.temperature)

    def _input(self, preprocessing: Preprocessing) -> int:
        """Networks that differ in mean and std alone read the same pixels."""
        key = pixels_of(preprocessing)
        for place, known in enumerate(self.inputs):
            if pixels_of(known.preprocessing) == key:
                return place
        self.inputs.append(Input("images", preprocessing))
        return len(self.inputs) - 1


def _turned(pixels: Tensor, index: int) -> Tensor:
    """As extract.views.mirrored, of pixels (n, H, W, 3)."""
    turned = pixels.transpose(1, 2) if index & 4 else pixels
    axes = [axis for axis, bit in ((1, 2), (2, 1)) if index & bit]
    return torch.flip(turned, axes) if axes else turned


def fits_graph(model: "Model") -> bool:
    """Whether all views that the model averages over are made of the evaluation crop; others have
    no place in a graph.
    """
    return all(
        is_exact_view(feature.view) for member in model.members for feature in member.features
    )


def _columns(member: "HeadModel | NetworkModel") -> list[list[tuple[str, int]]]:
    """For each view the features that make its columns."""
    views: dict[int, list[tuple[str, int]]] = {}
    for feature in member.features:
        turn = parse_view(feature.view)[0]
        views.setdefault(turn, []).append((replace(feature, view=_CROP).to_json(), turn))
    return list(views.values())


def pixels_of(how: Preprocessing) -> tuple[Any, ...]:
    """What two preprocessings share when they make the same pixels of an image."""
    mean = how.mean if how.mode == "border" else None  # the colour of the border
    return how.resize, how.crop, how.mode, how.interpolation, mean, how.pixel_range
