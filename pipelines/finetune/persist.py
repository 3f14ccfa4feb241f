"""A trained network as a directory: network.safetensors with its parameters, network.json with what
they mean. No pickle.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

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
from headrace.extract.backbones.backbone import Backbone
from headrace.extract.backbones.library import build, fitting
from headrace.extract.backbones.weights import weights_digest
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.spec import BackboneSpec, backbone_code, backbone_from_fields, check_sizes
from headrace.extract.taps.resolve import parse_tap
from headrace.heads.data.task import TaskKind
from headrace.heads.kinds import spec_from_json
from headrace.heads.link import link
from headrace.heads.persist import WRITE_AGAIN, check_temperature, code_name, require_trusted
from headrace.heads.spec import FineTuneSpec, spec_to_json
from headrace.pipelines.finetune.head import Head
from headrace.pipelines.finetune.network import Network

FORMAT = 3  # 2 called train_above depth, 1 had no temperature
WEIGHTS = "network.safetensors"
DESCRIPTION = "network.json"


class BadNetworkFile(HeadraceError, ValueError):
    """The directory holds no network that this version can load."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A network ready to predict from pixels."""

    network: Network
    backbone: BackboneSpec
    preprocessing: Preprocessing  # of the pixels: `render` makes them
    spec: FineTuneSpec
    task_kind: TaskKind
    classes: tuple[str, ...]
    metrics: dict[str, float]
    temperature: float = 1.0  # its log-odds are divided by it; see heads/evaluate/temperature.py

    def predict_proba(self, pixels: npt.NDArray[np.uint8] | Tensor) -> npt.NDArray[np.float32]:
        """(n, C) float32 probabilities of uint8 pixels (n, H, W, 3) in the order of `classes`, at
        its temperature; for regression the values.
        """
        device = next(self.network.parameters()).device
        with torch.no_grad():
            logits = self.network(torch.as_tensor(pixels).to(device)).float().cpu().numpy()
        return link(logits, self.task_kind, temperature=self.temperature)


def save_network(
    directory: Path,
    network: Network,
    backbone: Backbone,
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
    about = {
        "format": FORMAT,
        "kind": "network",
        "backbone": dataclasses.asdict(backbone.spec),
        "preprocess": dataclasses.asdict(backbone.preprocessing),
        "tap": [str(tap) for tap in network.taps],
        "head": {
            "convolutions": [_shape(layer)[:2] for layer in head.convolutions],
            "layers": [_shape(layer) for layer in head.layers],
            "gain": head.gain,
            "features": len(head.centre),
        },
        "spec": json.loads(spec_to_json(spec)),
        "task_kind": task_kind,
        "classes": list(classes),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "temperature": float(temperature),
    }
    text = json.dumps(about, indent=2, sort_keys=True)
    tensors = {f"backbone.{name}": tensor for name, tensor in network.backbone.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    weights = directory / WEIGHTS
    directory.mkdir(parents=True, exist_ok=True)
    publish_replace(weights, seal(save(plain, metadata={"headrace": text, SEAL: UNSEALED})))
    publish_replace(directory / DESCRIPTION, text.encode())
    return weights


def load_network(
    directory: Path | str, *, trust_code: Collection[str] | None = (), digest: str | None = None
) -> TrainedNetwork:
    """Read what `save_network` wrote.

    The description inside the safetensors file counts, the .json is for people.

    trust_code: the "module:function" of a network of its own ("python:module:function") that may be
    imported; None: whatever the file asks for. digest: the SHA-256 of the file that is meant.
    Raises CodeNotTrusted, before anything is imported; BadNetworkFile, also where one byte is not
    the one that was written, or the file is another one; BackboneError where the backbone's library
    does not know its name.
    """
    path = Path(directory) / WEIGHTS
    if not path.exists():
        raise BadNetworkFile(
            f"{path} is not there: give the directory of a fine-tuned network, "
            "RUN/finetune/models/KEY"
        )
    try:
        data = path.read_bytes()
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise BadNetworkFile(
                f"{path} has been replaced since it was read. Type the same command again"
            )
        check_seal(data)
        about: dict[str, Any] = json.loads(tensor_metadata(data)["headrace"])
        if about["format"] != FORMAT:
            raise BadNetworkFile(
                f"{path}: format {about['format']}, this version of headrace reads {FORMAT}: "
                + (WRITE_AGAIN if about["format"] < FORMAT else "update headrace")
            )
        tensors = load(data)
        spec = backbone_from_fields(about["backbone"])
        if trust_code is not None:
            require_trusted(
                backbone_code(spec.name), path.parent, {code_name(name) for name in trust_code}
            )
        preprocessing = Preprocessing(
            **{name: _tuple(value) for name, value in about["preprocess"].items()}
        )
        check_sizes(str(path), preprocessing.resize, preprocessing.crop)
        if len(np.array([preprocessing.mean, preprocessing.std], np.float32).T) != 3:
            raise ValueError("its mean and std are not of three channels")
        return _rebuild(about, spec, preprocessing, tensors)
    except SealBroken as error:
        raise BadNetworkFile(
            f"{path} has changed since it was written: {error}. {WRITE_AGAIN}"
        ) from error
    # ValueError: also no JSON and no UTF-8
    except (
        SafetensorError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ValueError,
        ArithmeticError,
    ) as error:
        if isinstance(error, HeadraceError):
            raise
        raise BadNetworkFile(
            f"{path} is not a saved network ({type(error).__name__}: {str(error)[:300]}). "
            f"{WRITE_AGAIN}"
        ) from error


def copy_network(
    source: Path, directory: Path, metrics: Mapping[str, float], temperature: float
) -> Path:
    """Copy the directory of a network that the run has trained, its metrics and temperature
    replaced. Raises BadNetworkFile, as `load_network`.
    """
    found = load_network(source, trust_code=None)
    backbone = Backbone(found.backbone, found.network.backbone, found.preprocessing, "")
    return save_network(
        directory,
        found.network,
        backbone,
        spec=found.spec,
        task_kind=found.task_kind,
        classes=found.classes,
        metrics=metrics,
        temperature=temperature,
    )


def _rebuild(
    about: dict[str, Any],
    spec: BackboneSpec,
    preprocessing: Preprocessing,
    tensors: dict[str, Tensor],
) -> TrainedNetwork:
    with fitting(_under("backbone.", tensors), spec.name):
        # Its library's own preprocessing may have changed: the stored one counts.
        module, _ = build(spec.name, None)
    module.load_state_dict(_under("backbone.", tensors))
    module.eval().requires_grad_(False)
    backbone = Backbone(spec, module, preprocessing, weights_digest(module))
    shape, own = (
        about["head"],
        {name: tensor.float() for name, tensor in _under("head.", tensors).items()},
    )
    if len(shape["convolutions"]) + len(shape["layers"]) > len(own):
        raise ValueError(f"{len(own)} tensors are fewer than its head has layers")
    with torch.device(
        "meta"
    ):  # shapes alone: what a file declares takes no memory before its tensors are found to be so
        head = Head(
            torch.empty(shape["features"]),
            torch.empty(shape["features"]),
            [
                torch.nn.Conv2d(inputs, width, 3, padding=1)
                for width, inputs in shape["convolutions"]
            ],
            [torch.nn.Linear(inputs, width) for width, inputs in shape["layers"]],
            float(shape["gain"]),
        )
    head.load_state_dict(own, assign=True)
    network = Network(backbone, [parse_tap(text) for text in about["tap"]], head)
    network.eval().requires_grad_(False)
    return TrainedNetwork(
        network=network,
        backbone=spec,
        preprocessing=preprocessing,
        spec=cast(FineTuneSpec, spec_from_json(json.dumps(about["spec"]))),
        task_kind=about["task_kind"],
        classes=tuple(about["classes"]),
        metrics=about["metrics"],
        temperature=check_temperature(about.get("temperature", 1.0)),
    )


def _shape(layer: torch.nn.Module) -> list[int]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return list(weight.shape)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
