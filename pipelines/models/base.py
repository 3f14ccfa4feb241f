"""Methods that every kind of model shares: prediction from images, `to_torch`, the digest."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import numpy.typing as npt

from headrace.cache.spec import FeatureSpec
from headrace.extract.spec import BackboneSpec
from headrace.heads.data.side_columns import SideColumn
from headrace.heads.data.task import TaskKind

if TYPE_CHECKING:
    from torch import nn

    from headrace.pipelines.models.image_input import ImageLike
    from headrace.pipelines.models.images import SideTable


class ImagePredictor:
    """Prediction from images, the same for a head, a fine-tuned network and an ensemble."""

    def predict_proba(
        self,
        images: "ImageLike | Iterable[ImageLike]",
        *,
        side_columns: "SideTable | None" = None,
        units: Sequence[Any] | None = None,
        device: str = "cpu",
    ) -> npt.NDArray[np.float32]:
        """Return (n, C) float32 probabilities of n images in the order of `classes`, or values.

        images: a path, a Pillow image, a NumPy array or a torch tensor, or several of these. An
        array or tensor (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4 is one image; (n, H, W,
        C), (n, C, H, W) and for NumPy (n, H, W) are n images. uint8, uint16 and bool are as in a
        file; floats are from 0 (black) to 1, unless the model has a pixel_range. Every image is
        decoded, resized, normalized and rounded exactly as in the run. Raises InvalidInput for one
        that cannot be decoded or can be read in two ways; `headrace predict` lists these and goes
        on.
        side_columns: a data frame, lists by name, or a mapping for each image, with the columns
        that the model reads beside an image. Raises DataError if they do not fit; a value that no
        training image had gives a warning, and counts as missing.
        units: the unit of each image, for a model that predicts the images of a unit together (a
        head of kind bags); each image gets its unit's prediction. Raises InvalidInput if such a
        model is given none.
        """
        from headrace.pipelines.models.images import predict_images

        return predict_images(
            cast(Any, self), images, side_table=side_columns, units=units, device=device
        )

    def predict(
        self,
        images: "ImageLike | Iterable[ImageLike]",
        *,
        side_columns: "SideTable | None" = None,
        units: Sequence[Any] | None = None,
        device: str = "cpu",
    ) -> npt.NDArray[Any]:
        """Return single: (n,) class names; multi: (n, C) 0/1; regression: (n, C) values."""
        # Cast, because some models have these as fields and others as properties: no declaration
        # here would fit both.
        model = cast(Any, self)
        probabilities = self.predict_proba(
            images, side_columns=side_columns, units=units, device=device
        )
        return decide(probabilities, model.task_kind, model.classes)

    def to_torch(self) -> "nn.Module":
        """Return a torch module from the pixels of its `inputs` to probabilities or values (n, C).

        Raises ModelError for a scikit-learn estimator and for random views, which have no such
        form.
        """
        from headrace.pipelines.models.torch_graph import ModelGraph

        return ModelGraph(cast(Any, self))

    @property
    def features_by_backbone(self) -> dict[BackboneSpec, list[FeatureSpec]]:
        """The features that its heads read of each frozen network, each once."""
        features: dict[BackboneSpec, dict[FeatureSpec, None]] = {}
        for member in cast(Any, self).members:
            # A fine-tuned network has features and stands on no frozen network.
            for backbone, feature in zip(member.backbones, member.features, strict=False):
                features.setdefault(backbone, {})[feature] = None
        return {backbone: list(specs) for backbone, specs in features.items()}

    @property
    def digest(self) -> str:
        """24 hex digits of a hash of everything that a prediction depends on."""
        model = cast(Any, self)
        shares = [
            (weight, member.temperature)
            for weight, member in zip(model.weights, model.members, strict=True)
        ]
        hasher = hashlib.sha256(json.dumps([model.average_temperature, *shares]).encode())
        for member in model.members:
            member.update_digest(hasher)
        return hasher.hexdigest()[:24]


def decide(
    probabilities: npt.NDArray[np.float32], task_kind: TaskKind, classes: tuple[str, ...]
) -> npt.NDArray[Any]:
    """Return decisions from probabilities (n, C). single: (n,) class names; multi: (n, C) 0/1;
    regression: the values themselves.
    """
    if task_kind == "single":
        return np.asarray(np.asarray(classes)[probabilities.argmax(1)])
    return np.asarray(probabilities >= 0.5, np.uint8) if task_kind == "multi" else probabilities


class SingleModel(ImagePredictor):
    """A head or a network, read as an ensemble of one member."""

    @property
    def members(self) -> tuple[Self, ...]:
        """Itself."""
        return (self,)

    @property
    def side_columns(self) -> tuple[SideColumn, ...]:
        """The tabular columns that it reads beside each image: none, unless it is a head."""
        return ()

    @property
    def takes_units(self) -> bool:
        """Whether it predicts the images of a unit together: not, unless it is a head on bags."""
        return False

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of its members: one."""
        return (1.0,)

    @property
    def average_temperature(self) -> float:
        """The temperature of the members' average; a model alone has its own and no other."""
        return 1.0


def settings_sentence(settings: dict[str, Any]) -> str:
    """Return settings as a model card lists them."""
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "no settings"
