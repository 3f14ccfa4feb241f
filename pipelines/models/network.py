"""A fine-tuned network as a model: network.safetensors with its parameters and what they mean;
network.json says the same to people. No pickle.

Reading what a file says needs no torch: it is imported where tensors are built.
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

from headrace.cache.atomic_io import publish_replace
from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import (
    SEAL,
    UNSEALED,
    SealBroken,
    check_seal,
    seal,
    tensor_metadata,
)
from headrace.cache.spec import FeatureSpec
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.spec import (
    BackboneSpec,
    backbone_from_fields,
    backbone_path,
    check_sizes,
    imported_function_path,
)
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.temperature import FLOOR
from headrace.heads.kinds import spec_from_json
from headrace.heads.layers import Floats
from headrace.heads.link import link
from headrace.heads.persist import (
    WRITE_AGAIN,
    check_outputs,
    check_temperature,
    code_name,
    require_trusted,
)
from headrace.heads.spec import FineTuneSpec, spec_to_json
from headrace.pipelines.models.base import ImagePredictor, model_digest, settings_sentence
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.trust import require_allowed_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headrace.extract.backbones.backbone import Backbone
    from headrace.pipelines.models.torch_network import Network

FORMAT = 3  # 2 called train_above depth, 1 had no temperature
WEIGHTS, DESCRIPTION = "network.safetensors", "network.json"
NETWORK_FILES = (DESCRIPTION, WEIGHTS)


@dataclass(frozen=True, eq=False)
class NetworkModel(ImagePredictor):
    """A network with parameters of its own, its head included.

    Nothing large is loaded before it is used.
    """

    path: Path
    spec: FineTuneSpec
    backbone: BackboneSpec  # that it was made from
    preprocessing: Preprocessing
    features: tuple[FeatureSpec, ...]  # what its taps give its head, in order; never stored
    spatial: bool  # whether its head takes maps
    task_kind: TaskKind
    classes: tuple[str, ...]  # of a multi-label or regression task, the columns
    metrics: dict[str, float]
    temperature: float  # its log-odds are divided by it; see heads/evaluate/temperature.py
    file_digest: str  # SHA-256 of its weights file
    trust_code: tuple[str, ...] = ()
    kind: str = "finetune"
    n_views: int = 1  # of an image that it looks at
    floor: float = FLOOR  # the smallest probability that its temperature looks at

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Tell whether a directory holds a network."""
        return (directory / DESCRIPTION).is_file()

    @classmethod
    def load(
        cls, directory: Path, *, root: Path | None = None, trusted: Collection[str] | None = ()
    ) -> "NetworkModel":
        """Read what the file says, no tensor.

        root: the model directory that the caller gave, in which this one is. trusted: None allows
        whatever the file names.
        Raises ModelError for what is no network of this version; CodeNotTrusted.
        """
        data, stored = _read_file(directory)
        try:
            model = _parse(directory, stored, hashlib.sha256(data).hexdigest())
        except _UNREADABLE as error:
            raise _unreadable(directory, error) from error
        if trusted is not None:
            name = model.backbone.name
            require_trusted(imported_function_path(name), directory, trusted)
            if (network_path := backbone_path(name)) is not None:
                require_allowed_file(name, network_path, directory, root or directory, trusted)
        return model

    def save(self, directory: Path) -> Path:
        """Write the network with the metrics and the temperature that it has here; returns the path
        of its weights. Raises ModelError where its file has been replaced meanwhile.
        """
        from safetensors.torch import load

        data, stored = _read_file(self.path, self.file_digest)
        stored |= {"metrics": self.metrics, "temperature": self.temperature}
        return _publish(directory, stored, load(data))

    def describe(self) -> str:
        """Return a phrase for a model card: which part of which network was trained, from where it
        started, and the head on it, in Markdown.
        """
        settings = json.loads(spec_to_json(self.spec))
        head = json.loads(settings.pop("head"))
        train_above, start = settings.pop("train_above"), settings.pop("start")
        settings.pop("kind")
        trained_part = {
            "head": "its head alone",
            "all": "all of it",
            "scratch": "all of it, from a random start",
        }.get(train_above, f"everything above `{train_above}`")
        started = {
            "random": ", which started at random",
            "pretrained": ", which started pretrained",
        }.get(start, "")
        kind = f"a {'' if start == 'head' else 'new '}{head.pop('kind')} head"
        taps = ", ".join(f"`{feature.tap}.{feature.pooling}`" for feature in self.features)
        return (
            f"the network `{self.backbone.name}` with {kind} ({settings_sentence(head)}) on "
            f"{taps}, trained further: {trained_part}{started} ({settings_sentence(settings)})"
        )

    def head_function(self) -> Callable[[Floats], Floats]:
        """Return the head as a function of what the taps give, side by side, at its temperature."""
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
        """Return what lies below the head, as any backbone: so it runs on extract's fast passes."""
        return _trained_backbone(self.path, self.file_digest)

    def at_temperature(self, temperature: float) -> "NetworkModel":
        """Return the model with its log-odds divided by another temperature."""
        return dataclasses.replace(self, temperature=temperature)

    @property
    def backbones(self) -> tuple[BackboneSpec, ...]:
        """The frozen networks that it stands on: none."""
        return ()

    @property
    def members(self) -> tuple["NetworkModel", ...]:
        """Itself: a model alone is an ensemble of one."""
        return (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def average_temperature(self) -> float:
        """The temperature of the members' average; a model alone has its own and no other."""
        return 1.0

    @property
    def digest(self) -> str:
        """Of everything that a prediction depends on."""
        return model_digest(1.0, (1.0,), (self,))

    def update_digest(self, hasher: Any) -> None:
        hasher.update(self.file_digest.encode())


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with its parameters in memory, ready to predict from pixels."""

    model: NetworkModel
    network: "Network"

    def predict_proba(self, pixels: "npt.NDArray[np.uint8] | Tensor") -> npt.NDArray[np.float32]:
        """Return (n, C) float32 probabilities of uint8 pixels (n, H, W, 3) in the order of the
        classes, at the model's temperature; for regression the values.
        """
        import torch

        device = next(self.network.parameters()).device
        with torch.no_grad():
            logits = self.network(torch.as_tensor(pixels).to(device)).float().cpu().numpy()
        return link(logits, self.model.task_kind, temperature=self.model.temperature)


def save_network(
    directory: Path,
    network: "Network",
    backbone: "Backbone",
    *,
    spec: FineTuneSpec,
    task_kind: TaskKind,
    classes: Sequence[str],
    metrics: Mapping[str, float],
    temperature: float = 1.0,
) -> Path:
    """Write network.safetensors and network.json into `directory`, replacing what is there; returns
    the first's path.

    Every parameter of the backbone is in it, so that it needs neither the run nor the weights that
    it started from.
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
    tensors = {f"backbone.{name}": tensor for name, tensor in network.backbone.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    return _publish(directory, description, tensors)


def load_network(
    directory: Path | str, *, trust_code: Collection[str] | None = (), digest: str | None = None
) -> TrainedNetwork:
    """Read what `save_network` wrote, tensors included.

    The description inside the safetensors file counts, the .json is for people.

    trust_code: the "module:function" of a network of its own ("python:module:function") that may be
    imported; None: whatever the file asks for. digest: the SHA-256 of the file that is meant.
    Raises CodeNotTrusted, before anything is imported; ModelError, also where one byte is not the
    one that was written, or the file is another one; BackboneError where the backbone's library
    does not know its name.
    """
    from safetensors.torch import load

    directory = Path(directory)
    data, stored = _read_file(directory, digest)
    try:
        model = _parse(directory, stored, hashlib.sha256(data).hexdigest())
        if trust_code is not None:
            trusted = {code_name(name) for name in trust_code}
            require_trusted(imported_function_path(model.backbone.name), directory, trusted)
        return TrainedNetwork(model, _rebuild(model, stored["head"], load(data)))
    except _UNREADABLE as error:
        raise _unreadable(directory, error) from error


@functools.lru_cache(maxsize=4)
def open_network(directory: Path, digest: str) -> TrainedNetwork:
    """Return the network, in evaluation mode; one object per file within a process. digest: of the
    file that `NetworkModel.load` has read.

    What that file asks to be imported was allowed when it was read, or the model would not be
    there. Raises ModelError, also for any other file.
    """
    return load_network(directory, trust_code=None, digest=digest)


@functools.lru_cache(maxsize=4)
def _trained_backbone(directory: Path, digest: str) -> "Backbone":
    from headrace.extract.backbones.backbone import Backbone

    trained = open_network(directory, digest)
    model = trained.model
    return Backbone(model.backbone, trained.network.untouched, model.preprocessing, digest)


# What parsing a file of another writer, or with a changed byte, raises; ValueError also for no JSON
# and no UTF-8.
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


def _unreadable(directory: Path, error: Exception) -> Exception:
    if isinstance(error, HeadraceError):  # says by itself what is wrong
        return error
    return ModelError(
        f"{directory / WEIGHTS} is not a saved network ({type(error).__name__}: "
        f"{str(error)[:300]}). {WRITE_AGAIN}"
    )


def _read_file(directory: Path, digest: str | None = None) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of network.safetensors, and the description in it. Raises ModelError."""
    weights_path = directory / WEIGHTS
    try:
        data = weights_path.read_bytes()
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise ModelError(
                f"{weights_path} has been replaced since it was read. Type the same command again"
            )
        check_seal(data)
        stored: dict[str, Any] = json.loads(tensor_metadata(data)["headrace"])
        file_format = stored["format"]
        if file_format != FORMAT:
            raise ModelError(
                f"{weights_path}: format {file_format}, this version of headrace reads {FORMAT}: "
                + (WRITE_AGAIN if file_format < FORMAT else "update headrace")
            )
        return data, stored
    except FileNotFoundError:
        raise ModelError(
            f"{weights_path} is not there: give the directory of a fine-tuned network, "
            "RUN/finetune/models/KEY"
        ) from None
    except SealBroken as error:
        raise ModelError(
            f"{weights_path} has changed since it was written: {error}. {WRITE_AGAIN}"
        ) from error
    except (OSError, *_UNREADABLE) as error:
        raise _unreadable(directory, error) from error


def _parse(directory: Path, stored: dict[str, Any], file_digest: str) -> NetworkModel:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in stored["preprocess"].items()
    }
    preprocessing = Preprocessing(**fields)
    check_sizes(str(directory / WEIGHTS), preprocessing.resize, preprocessing.crop)
    if len(np.array([preprocessing.mean, preprocessing.std], np.float32).T) != 3:
        raise ValueError("its mean and std are not of three channels")
    spec = spec_from_json(json.dumps(stored["spec"]))
    if not isinstance(spec, FineTuneSpec):
        raise ValueError(f"its settings are those of a {spec.kind} head")
    check_outputs(stored["task_kind"], stored["classes"])
    return NetworkModel(
        path=directory,
        spec=spec,
        backbone=backbone_from_fields(stored["backbone"]),
        preprocessing=preprocessing,
        features=tuple(_tap_feature(stored, str(tap), file_digest) for tap in stored["tap"]),
        spatial=bool(stored["head"]["convolutions"]),
        task_kind=stored["task_kind"],
        classes=tuple(stored["classes"]),
        metrics={str(name): float(value) for name, value in stored["metrics"].items()},
        temperature=check_temperature(stored["temperature"]),
        file_digest=file_digest,
    )


def _tap_feature(stored: dict[str, Any], tap: str, file_digest: str) -> FeatureSpec:
    """Return the spec of what a tap gives.

    The file's digest stands for the weights, so that no other network's features are taken for
    these.
    """
    node, _, pooling = tap.rpartition(".")
    view = json.dumps({"index": 0})
    preprocessing = json.dumps(stored["preprocess"], sort_keys=True)
    name = stored["backbone"]["name"]
    return FeatureSpec(
        name, file_digest, node, pooling, preprocessing, view, "", "float32", "float32", ()
    )


def _rebuild(
    model: NetworkModel, head_shapes: dict[str, Any], tensors: dict[str, "Tensor"]
) -> "Network":
    import torch

    from headrace.extract.backbones.backbone import Backbone
    from headrace.extract.backbones.library import build_network, limit_parameters_to_file
    from headrace.extract.backbones.weights import weights_digest
    from headrace.extract.taps.resolve import parse_tap
    from headrace.pipelines.models.torch_head import Head
    from headrace.pipelines.models.torch_network import Network

    backbone_tensors = _without_prefix("backbone.", tensors)
    with limit_parameters_to_file(backbone_tensors, model.backbone.name):
        # Its library's own preprocessing may have changed: the stored one counts.
        module, _ = build_network(model.backbone.name, None)
    module.load_state_dict(backbone_tensors)
    module.eval().requires_grad_(False)
    backbone = Backbone(model.backbone, module, model.preprocessing, weights_digest(module))
    head_tensors = {
        name: tensor.float() for name, tensor in _without_prefix("head.", tensors).items()
    }
    n_layers = len(head_shapes["convolutions"]) + len(head_shapes["layers"])
    if n_layers > len(head_tensors):
        raise ValueError(f"{len(head_tensors)} tensors are fewer than its head has layers")
    # Shapes alone: what a file declares takes no memory before its tensors are found to be so.
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
    taps = [parse_tap(f"{feature.tap}.{feature.pooling}") for feature in model.features]
    network = Network(backbone, taps, head)
    network.eval().requires_grad_(False)
    return network


def _publish(directory: Path, description: dict[str, Any], tensors: dict[str, "Tensor"]) -> Path:
    from safetensors.torch import save

    text = json.dumps(description, indent=2, sort_keys=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    weights_path = directory / WEIGHTS
    directory.mkdir(parents=True, exist_ok=True)
    publish_replace(weights_path, seal(save(plain, metadata={"headrace": text, SEAL: UNSEALED})))
    publish_replace(directory / DESCRIPTION, text.encode())
    return weights_path


def _weight_shape(layer: "nn.Module") -> list[int]:
    return list(layer.weight.shape)  # type: ignore[arg-type]


def _without_prefix(prefix: str, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
