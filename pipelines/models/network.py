"""A fine-tuned network as a model: network.safetensors with its parameters and their description;
network.json repeats the description for people.

Reading the description imports no torch, which is imported where tensors are built.
"""

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from headrace.cache.atomic_io import publish_replace, read_regular
from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import (
    SealBroken,
    check_seal,
    seal_safetensors,
    tensor_metadata,
)
from headrace.cache.spec import FeatureSpec
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.spec import (
    BackboneSpec,
    backbone_from_fields,
    check_sizes,
)
from headrace.heads.arrays import Floats
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.temperature import FLOOR
from headrace.heads.link import link
from headrace.heads.persist import (
    WRITE_AGAIN,
    check_outputs,
    check_temperature,
    code_name,
)
from headrace.heads.spec import spec_to_json
from headrace.heads.unit_rule import UnitRule, read_unit_rule, rule_fields
from headrace.pipelines.models.base import SingleModel, settings_sentence
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.image_parts import ImageParts, parts_fields, read_image_parts
from headrace.pipelines.models.trust import require_trusted_backbone
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec, model_spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headrace.extract.backbones.backbone import Backbone
    from headrace.pipelines.models.torch_network import Network

FORMAT = 3  # 2 called train_above "depth"; 1 had no temperature
WEIGHTS, DESCRIPTION = "network.safetensors", "network.json"
NETWORK_FILES = (DESCRIPTION, WEIGHTS)


@dataclass(frozen=True, eq=False)
class NetworkModel(SingleModel):
    """A fine-tuned network with its head. Its parameters are loaded when they are used."""

    path: Path
    spec: FineTuneSpec
    backbone: BackboneSpec  # the network that it was made from
    preprocessing: Preprocessing
    # features of the taps, in the order of the head's input; they are never stored in a cache
    features: tuple[FeatureSpec, ...]
    spatial: bool  # whether its head reads feature maps
    task_kind: TaskKind
    classes: tuple[str, ...]  # the columns, in a multi-label or regression task
    metrics: dict[str, float]
    temperature: float  # divides its log-odds; see heads/evaluate/temperature.py
    file_digest: str  # SHA-256 of its weights file
    trust_code: tuple[str, ...] = ()
    kind: str = "finetune"
    n_views: int = 1  # views of an image that it reads
    floor: float = FLOOR  # see heads.predict.probability_floor
    unit_rule: UnitRule | None = None  # how its predictions of images become those of units
    image_parts: ImageParts | None = None  # boxes or tiles that it was trained on

    @staticmethod
    def is_in(model_directory: Path) -> bool:
        """Return whether a directory holds a network."""
        return (model_directory / DESCRIPTION).is_file()

    @classmethod
    def load(
        cls,
        model_directory: Path,
        *,
        model_root: Path | None = None,
        allowed_code: Collection[str] | None = (),
    ) -> "NetworkModel":
        """Read the description, without the tensors.

        model_root: the directory of the whole model, if this is a member of an ensemble.
        allowed_code: None allows whatever the file names. Raises ModelError for what is not a
        network of this version; CodeNotTrusted.
        """
        model, _, _ = _read_network(model_directory)
        if allowed_code is not None:
            require_trusted_backbone(
                model.backbone, model_directory, model_root or model_directory, allowed_code
            )
        return model

    def save(self, model_directory: Path) -> Path:
        """Write the network with this model's metrics and temperature, and return the path of its
        weights. Raises ModelError if its file has been replaced since it was read.
        """
        from safetensors.torch import load

        _, description, file_bytes = _read_network(self.path, self.file_digest)
        for name in ("unit_rule", "image_parts"):
            description.pop(name, None)  # they are this model's own
        description |= {"metrics": self.metrics, "temperature": self.temperature}
        description |= rule_fields(self.unit_rule) | parts_fields(self.image_parts)
        return _publish_network(model_directory, description, load(file_bytes))

    def describe(self) -> str:
        """Return a phrase for a model card, in Markdown: the network, which part of it was trained,
        from which start, and its head.
        """
        training_settings = json.loads(spec_to_json(self.spec))
        head_settings = json.loads(training_settings.pop("head"))
        train_above = training_settings.pop("train_above")
        started_from = training_settings.pop("start")
        training_settings.pop("kind")
        trained_part = {"head": "its head alone", "all": "all of it"}.get(
            train_above, f"everything above `{train_above}`"
        )
        start_text = {
            "random": ", which started at random",
            "pretrained": ", which started pretrained",
        }.get(started_from, "")
        head_text = f"a {'' if started_from == 'head' else 'new '}{head_settings.pop('kind')} head"
        tap_names = ", ".join(f"`{feature.tap}.{feature.pooling}`" for feature in self.features)
        return (
            f"the network `{self.backbone.name}` with {head_text} "
            f"({settings_sentence(head_settings)}) on {tap_names}, trained further: "
            f"{trained_part}{start_text} ({settings_sentence(training_settings)})"
        )

    def head_function(self) -> Callable[[Floats], Floats]:
        """Return the head as a function from the taps' features, side by side, to predictions at
        its temperature.
        """
        import torch

        head = open_network(self.path, self.file_digest).network.head

        def predict(features: Floats) -> Floats:
            with torch.no_grad():
                logits = head(torch.from_numpy(np.ascontiguousarray(features))).numpy()
            return link(logits, self.task_kind, temperature=self.temperature)

        return predict

    def torch_head(self) -> "nn.Module":
        """Return a copy of the head as a torch module to probabilities, at its temperature."""
        from torch import nn

        from headrace.pipelines.models.torch_head import ProbabilityLink

        head = copy.deepcopy(open_network(self.path, self.file_digest).network.head)
        return nn.Sequential(head, ProbabilityLink(self.task_kind, self.temperature)).eval()

    def trained_backbone(self) -> "Backbone":
        """Return the network below the head as a backbone, which extraction's fast passes run."""
        return _trained_backbone(self.path, self.file_digest)

    def at_temperature(self, temperature: float) -> "NetworkModel":
        """Return the model with its log-odds divided by another temperature."""
        return dataclasses.replace(self, temperature=temperature)

    @property
    def backbones(self) -> tuple[BackboneSpec, ...]:
        """The frozen networks that it stands on: none."""
        return ()

    def update_digest(self, hasher: Any) -> None:
        """Add everything that its predictions depend on to a hash."""
        hasher.update(self.file_digest.encode())


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with its parameters in memory, ready to predict from pixels."""

    model: NetworkModel
    network: "Network"

    def predict_proba(self, pixels: "npt.NDArray[Any] | Tensor") -> npt.NDArray[np.float32]:
        """Return (n, C) float32 probabilities of pixels (n, H, W, channels), of the preprocessing's
        pixel_dtype, in the order of the classes, at the model's temperature; for regression values.
        """
        import torch

        device = next(self.network.parameters()).device
        with torch.no_grad():
            logits = self.network(torch.as_tensor(pixels).to(device)).float().cpu().numpy()
        return link(logits, self.model.task_kind, temperature=self.model.temperature)


def save_network(
    model_directory: Path,
    network: "Network",
    backbone: "Backbone",
    *,
    spec: FineTuneSpec,
    task_kind: TaskKind,
    classes: Sequence[str],
    metrics: Mapping[str, float],
    temperature: float,
) -> Path:
    """Write network.safetensors and network.json into `model_directory`, replacing what is there,
    and return the path of the first.
    """
    head = network.head
    description = {
        "format": FORMAT,
        "kind": "network",
        "backbone": dataclasses.asdict(backbone.spec),
        "preprocess": dataclasses.asdict(backbone.preprocessing),
        "tap": [str(tap) for tap in network.taps],
        "head": {
            "convolutions": [_weight_shape(layer)[:2] for layer in head.convolutions],
            "layers": [_weight_shape(layer) for layer in head.layers],
            "gain": head.gain,
            "features": len(head.centre),
        },
        "spec": json.loads(spec_to_json(spec)),
        "task_kind": task_kind,
        "classes": list(classes),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "temperature": float(temperature),
    }
    # Every parameter of the backbone, so that the model needs neither the run nor other weights.
    tensors = {f"backbone.{name}": tensor for name, tensor in network.backbone.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    return _publish_network(model_directory, description, tensors)


def load_network(
    model_directory: Path | str, *, trust_code: Collection[str] = ()
) -> TrainedNetwork:
    """Read what `save_network` wrote, tensors included.

    trust_code: "module:function" of networks of the user's ("python:module:function") that may be
    imported. Raises CodeNotTrusted, before anything is imported; ModelError, also if a byte has
    changed since it was written; BackboneError if the backbone's library does not know its name.
    """
    allowed_code = {code_name(name) for name in trust_code}
    model = NetworkModel.load(Path(model_directory), allowed_code=allowed_code)
    return open_network(model.path, model.file_digest)


@functools.lru_cache(maxsize=4)
def open_network(model_directory: Path, file_digest: str) -> TrainedNetwork:
    """Return the network in evaluation mode; one object per file within a process.

    file_digest: of the file that `NetworkModel.load` has read. `load` has checked the code that the
    file names, so it is not checked again. Raises ModelError, also for any other file.
    """
    from safetensors.torch import load

    model, description, file_bytes = _read_network(model_directory, file_digest)
    try:
        return TrainedNetwork(model, _rebuild_network(model, description["head"], load(file_bytes)))
    except HeadraceError:  # it has a message of its own
        raise
    except _UNREADABLE as error:
        raise _not_a_network(model_directory, error) from error


@functools.lru_cache(maxsize=4)
def _trained_backbone(model_directory: Path, file_digest: str) -> "Backbone":
    from headrace.extract.backbones.backbone import Backbone

    trained_network = open_network(model_directory, file_digest)
    model = trained_network.model
    return Backbone(
        model.backbone, trained_network.network.source_module, model.preprocessing, file_digest
    )


# Errors of parsing a damaged file, or one of another program. Broken JSON and UTF-8 raise
# ValueError.
_UNREADABLE = (
    SafetensorError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ValueError,
    ArithmeticError,
    RecursionError,
)


def _not_a_network(model_directory: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{model_directory / WEIGHTS} is not a saved network ({type(error).__name__}: "
        f"{str(error)[:300]}). {WRITE_AGAIN}"
    )


def _read_network(
    model_directory: Path, expected_digest: str | None = None
) -> tuple[NetworkModel, dict[str, Any], bytes]:
    """Return the model, its description in network.safetensors, and the bytes of that file.

    expected_digest: SHA-256 that the file must have. Raises ModelError.
    """
    weights_path = model_directory / WEIGHTS
    try:
        file_bytes = read_regular(weights_path)
        file_digest = hashlib.sha256(file_bytes).hexdigest()
        # The code that the first file names was checked, and that of another was not.
        if expected_digest not in (None, file_digest):
            raise ModelError(
                f"{weights_path} has been replaced since it was read. Type the same command again"
            )
        check_seal(file_bytes)
        description: dict[str, Any] = json.loads(tensor_metadata(file_bytes)["headrace"])
        if (file_format := description["format"]) != FORMAT:
            raise ModelError(
                f"{weights_path}: format {file_format}, this version of headrace reads {FORMAT}: "
                + (WRITE_AGAIN if file_format < FORMAT else "update headrace")
            )
        model = _parse_description(model_directory, description, file_digest)
        return model, description, file_bytes
    except FileNotFoundError:
        raise ModelError(
            f"{weights_path} is not there: give the directory of a fine-tuned network, "
            f"RUN/finetune/models/KEY. {WRITE_AGAIN}"
        ) from None
    except SealBroken as error:
        raise ModelError(
            f"{weights_path} has changed since it was written: {error}. {WRITE_AGAIN}"
        ) from error
    except HeadraceError:  # it has a message of its own
        raise
    except (OSError, *_UNREADABLE) as error:
        raise _not_a_network(model_directory, error) from error


def _parse_description(
    model_directory: Path, description: dict[str, Any], file_digest: str
) -> NetworkModel:
    preprocessing_fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description["preprocess"].items()
    }
    preprocessing = Preprocessing(**preprocessing_fields)
    check_sizes(str(model_directory / WEIGHTS), preprocessing.resize, preprocessing.crop)
    np.array([preprocessing.mean, preprocessing.std], np.float32)  # raises for what are no numbers
    spec = model_spec(json.dumps(description["spec"]))
    if not isinstance(spec, FineTuneSpec):
        raise ValueError(f"its settings are those of a {spec.kind} head")
    check_outputs(description["task_kind"], description["classes"])
    return NetworkModel(
        path=model_directory,
        spec=spec,
        backbone=backbone_from_fields(description["backbone"]),
        preprocessing=preprocessing,
        features=tuple(
            _tap_feature(description, str(tap), file_digest) for tap in description["tap"]
        ),
        spatial=bool(description["head"]["convolutions"]),
        task_kind=description["task_kind"],
        classes=tuple(description["classes"]),
        metrics={str(name): float(value) for name, value in description["metrics"].items()},
        temperature=check_temperature(description["temperature"]),
        file_digest=file_digest,
        unit_rule=read_unit_rule(description),
        image_parts=read_image_parts(description.get("image_parts"), model_directory),
    )


def _tap_feature(description: dict[str, Any], tap_name: str, file_digest: str) -> FeatureSpec:
    """Return the spec of a tap's features."""
    node_name, _, pooling = tap_name.rpartition(".")
    return FeatureSpec(
        backbone=description["backbone"]["name"],
        weights=file_digest,  # so that the features of no other network have this spec
        tap=node_name,
        pooling=pooling,
        preprocessing=json.dumps(description["preprocess"], sort_keys=True),
        view=json.dumps({"index": 0}),
        decoder="",
        compute_dtype="float32",
        dtype="float32",
        shape=(),
    )


def _rebuild_network(
    model: NetworkModel, head_shapes: dict[str, Any], tensors: dict[str, "Tensor"]
) -> "Network":
    import torch

    from headrace.extract.backbones.backbone import Backbone, build_at_size
    from headrace.extract.backbones.library import limit_parameters_to_file
    from headrace.extract.backbones.weights import weights_digest
    from headrace.extract.taps.resolve import parse_tap
    from headrace.pipelines.models.torch_head import Head
    from headrace.pipelines.models.torch_network import Network

    backbone_tensors = _without_prefix("backbone.", tensors)
    # A file that was sent may give its network any name, such as that of one too large to build.
    with limit_parameters_to_file(backbone_tensors, model.backbone.name):
        # With the stored preprocessing (below), because the library's may have changed since.
        module = build_at_size(model.backbone)
    module.load_state_dict(backbone_tensors)
    module.eval().requires_grad_(False)
    backbone = Backbone(model.backbone, module, model.preprocessing, weights_digest(module))
    head_tensors = {
        name: tensor.float() for name, tensor in _without_prefix("head.", tensors).items()
    }
    n_layers = len(head_shapes["convolutions"]) + len(head_shapes["layers"])
    if n_layers > len(head_tensors):
        raise ValueError(f"{len(head_tensors)} tensors are fewer than its head has layers")
    # On "meta", shapes take no memory: a file that declares huge layers is refused when its tensors
    # turn out to be smaller, before anything is allocated.
    with torch.device("meta"):
        n_features = head_shapes["features"]
        head = Head(
            torch.empty(n_features),
            torch.empty(n_features),
            [
                torch.nn.Conv2d(n_inputs, width, 3, padding=1)
                for width, n_inputs in head_shapes["convolutions"]
            ],
            [torch.nn.Linear(n_inputs, width) for width, n_inputs in head_shapes["layers"]],
            float(head_shapes["gain"]),
        )
    head.load_state_dict(head_tensors, assign=True)
    taps = [parse_tap(f"{tap_feature.tap}.{tap_feature.pooling}") for tap_feature in model.features]
    network = Network(backbone, taps, head)
    network.eval().requires_grad_(False)
    return network


def _publish_network(
    model_directory: Path, description: dict[str, Any], tensors: dict[str, "Tensor"]
) -> Path:
    from safetensors.torch import save  # no pickle, which could run code when it is read

    description_json = json.dumps(description, indent=2, sort_keys=True)
    # Clones, because safetensors refuses tensors that share memory.
    host_tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
    }
    weights_path = model_directory / WEIGHTS
    model_directory.mkdir(parents=True, exist_ok=True)
    # The tensors first, which hold the description too: a kill in between leaves a whole network.
    publish_replace(
        weights_path,
        seal_safetensors(save(host_tensors, metadata={"headrace": description_json})),
    )
    publish_replace(model_directory / DESCRIPTION, description_json.encode())
    return weights_path


def _weight_shape(layer: "nn.Module") -> list[int]:
    return list(layer.weight.shape)  # type: ignore[arg-type]


def _without_prefix(prefix: str, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
