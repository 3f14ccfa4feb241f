"""A fine-tuned network as a member of a model: its taps are its own features, and its own head
reads them.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import check_seal, tensor_metadata
from headrace.cache.spec import FeatureSpec
from headrace.heads.evaluate.temperature import FLOOR
from headrace.heads.persist import WRITE_AGAIN, check_outputs, check_temperature

if TYPE_CHECKING:
    from headrace.extract.backbones.backbone import Backbone
    from headrace.extract.run.work_unit import Pass
    from headrace.pipelines.finetune.persist import TrainedNetwork

FORMAT = 3  # as finetune/persist.py, which imports torch
NETWORK, WEIGHTS = "network.json", "network.safetensors"
Floats = npt.NDArray[np.float32]


class BadNetwork(HeadraceError, ValueError):
    """The directory does not hold a network of this version."""


@dataclass(frozen=True)
class NetworkMember:
    """A network of its own, as `headrace.pipelines.finetune` stores it, and its share of an
    average.
    """

    directory: Path
    # what its taps give, in the order of its head's input; never stored anywhere
    features: tuple[FeatureSpec, ...]
    spatial: bool  # whether its head takes maps
    digest: str  # of the weights file
    weight: float = 1.0
    temperature: float = 1.0  # its own log-odds are divided by it before they are averaged
    kind: str = "finetune"
    views: int = 1  # of an image that it looks at
    floor: float = FLOOR  # as of a head


def read_network(directory: Path) -> tuple[NetworkMember, dict[str, Any]]:
    """The member, and what the file says of it; no torch is imported and no tensor read.

    Raises BadNetwork.
    """
    path = directory / WEIGHTS
    try:
        data = path.read_bytes()
        check_seal(data)
        about: dict[str, Any] = json.loads(tensor_metadata(data)["headrace"])
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, this version reads {FORMAT}")
        digest = hashlib.sha256(data).hexdigest()
        features = tuple(_feature(about, tap, digest) for tap in about["tap"])
        spatial = bool(about["head"]["convolutions"])
        own = check_temperature(about.get("temperature", 1.0))
        member = NetworkMember(
            directory, features, spatial, digest, temperature=own, kind=str(about["spec"]["kind"])
        )
        check_outputs(about["task_kind"], about["classes"])
        about["metrics"] = {str(name): float(value) for name, value in about["metrics"].items()}
    except (
        OSError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise BadNetwork(
            f"{path} is not a network of this version ({type(error).__name__}: "
            f"{str(error)[:200]}). {WRITE_AGAIN}"
        ) from error
    return member, about


def _feature(about: dict[str, Any], tap: str, digest: str) -> FeatureSpec:
    """The file's digest stands for the weights, so that no other network's features are taken for
    these.
    """
    node, _, reduction = tap.rpartition(".")
    view = json.dumps({"index": 0})
    how = json.dumps(about["preprocess"], sort_keys=True)
    name = about["backbone"]["name"]
    return FeatureSpec(name, digest, node, reduction, how, view, "", "float32", "float32", ())


@functools.lru_cache(maxsize=4)
def open_network(directory: Path, digest: str) -> "TrainedNetwork":
    """The network, in evaluation mode; one object per file within a process. digest: of the file
    that `read_network` has read.

    What that file asks to be imported was allowed when it was read, or the model would not be
    there. Raises BadNetworkFile, also for any other file.
    """
    from headrace.pipelines.finetune.persist import load_network

    return load_network(directory, trust_code=None, digest=digest)


@functools.lru_cache(maxsize=4)
def network_backbone(directory: Path, digest: str) -> "Backbone":
    """What lies below its head, as any backbone: so it runs on extract's fast passes."""
    from headrace.extract.backbones.backbone import Backbone

    trained = open_network(directory, digest)
    return Backbone(trained.backbone, trained.network.untouched, trained.preprocessing, digest)


def network_pass(member: NetworkMember, device: str) -> "Pass":
    """The pass from pixels to what the head is given."""
    from headrace.extract.images.views import Augmentation
    from headrace.extract.run.decode_ahead import Rendering
    from headrace.extract.run.work_unit import Pass
    from headrace.extract.taps.forward import make_forward
    from headrace.extract.taps.resolve import Tap

    backbone = network_backbone(member.directory, member.digest)
    forward = make_forward(
        backbone, [Tap(each.tap, each.reduction) for each in member.features], device=device
    )
    return Pass(Rendering(backbone.preprocessing, 0, Augmentation()), forward, member.features)


def network_head(member: NetworkMember) -> Callable[[Floats], Floats]:
    """From what the taps give, side by side, to probabilities (n, C) at its temperature, for
    regression values.
    """
    import torch

    from headrace.heads.predict import link

    trained = open_network(member.directory, member.digest)

    def predict(features: Floats) -> Floats:
        with torch.no_grad():
            decision = trained.network.head(
                torch.from_numpy(np.ascontiguousarray(features))
            ).numpy()
        return link(decision, trained.task_kind, temperature=member.temperature)

    return predict
