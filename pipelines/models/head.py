"""A head on frozen networks as a model: head.safetensors and head.json (heads/persist.py)."""

import dataclasses
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.cache.spec import FeatureSpec
from headrace.extract.spec import (
    PACKAGE_PREFIX,
    BackboneSpec,
    backbone_from_fields,
    is_weights_file,
)
from headrace.heads.arrays import Floats
from headrace.heads.data.side_columns import SideColumn, columns_to_json
from headrace.heads.data.task import TaskKind
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.link import tempered
from headrace.heads.persist import TrainedHead, load_head, save_head
from headrace.heads.predict import flat_rows, predict_head, probability_floor
from headrace.heads.sklearn.kind import SklearnSpec
from headrace.heads.spec import spec_to_json
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.models.base import SingleModel, settings_sentence
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.image_parts import ImageParts, read_image_parts
from headrace.pipelines.models.trust import require_allowed_file, require_trusted_backbone
from headrace.pipelines.moved_paths import moved_with_run

if TYPE_CHECKING:
    from torch import nn

    from headrace.extract.backbones.backbone import Backbone

HEAD_DESCRIPTION = "head.json"
HEAD_FILES = (HEAD_DESCRIPTION, "head.safetensors")


@dataclass(frozen=True, eq=False)
class HeadModel(SingleModel):
    """A trained head, and the networks that make its features, which are loaded when it is used."""

    path: Path
    head: TrainedHead
    trust_code: tuple[str, ...] = ()  # code that may be imported, "module:function"; no other

    @staticmethod
    def is_in(model_directory: Path) -> bool:
        """Return whether a directory holds a head."""
        return (model_directory / HEAD_DESCRIPTION).is_file()

    @classmethod
    def load(
        cls,
        model_directory: Path,
        *,
        model_root: Path | None = None,
        allowed_code: Collection[str] = (),
    ) -> "HeadModel":
        """Read what `save` wrote.

        model_root: the directory of the whole model, if this is a member of an ensemble. Raises
        CodeNotTrusted before anything is built, ModelError if the networks are not recorded,
        HeadError.
        """
        head = load_head(model_directory, trust_code=allowed_code)
        backbones = _resolve_backbones(
            head, model_directory, model_root or model_directory, allowed_code
        )
        backbone_fields = tuple(dataclasses.asdict(backbone) for backbone in backbones)
        return cls(model_directory, dataclasses.replace(head, backbones=backbone_fields))

    def save(self, model_directory: Path) -> Path:
        """Write the model's files, replacing a head that is there; return the arrays' path."""
        return save_head(model_directory, self.head)

    def describe(self) -> str:
        """Return a phrase for a model card: the head, its taps and its networks, in Markdown."""
        head = self.head
        head_settings = json.loads(spec_to_json(head.spec))
        head_settings.pop("kind")
        tap_names = ", ".join(dict.fromkeys(f"`{feature.name}`" for feature in head.features))
        network_texts = dict.fromkeys(
            f"`{backbone.name}` (weights "
            f"{Path(backbone.weights).name if backbone.weights else 'of the library'}, digest "
            f"{feature.weights[:12]})"
            for backbone, feature in zip(self.backbones, head.features, strict=True)
        )
        column_names = ", ".join(f"`{column.name}`" for column in head.side_columns)
        side_text = f", and on the columns {column_names}" if column_names else ""
        return (
            f"a {head.spec.kind} head ({settings_sentence(head_settings)}) on {tap_names} of the "
            f"frozen network {' and '.join(network_texts)}{side_text}"
        )

    def head_function(self) -> Callable[[Floats], Floats]:
        """Return the head as a function from features (n, D) to predictions (n, C), at its
        temperature if it reads one view.
        """
        head = self.head
        # With several views the temperature was fitted to the mean over them, and is applied to it.
        temperature = head.temperature if self.n_views == 1 else 1.0
        if isinstance(head.spec, SklearnSpec):
            from headrace.heads.sklearn.bank import fitted_sklearn  # imports scikit-learn

            # Stored as its training rows, because a pickled estimator could run code.
            fitted_estimator = fitted_sklearn(head.spec, head.arrays, head.task_kind)
            return lambda X: tempered(fitted_estimator(X), head.task_kind, temperature, self.floor)
        return lambda X: predict_head(head.spec, head.arrays, X, head.task_kind, temperature)

    def torch_head(self) -> "nn.Module":
        """Return the head as a torch module, at its temperature as in `head_function`."""
        from headrace.pipelines.models.torch_head import probability_module

        return probability_module(self.head, self.head.temperature if self.n_views == 1 else 1.0)

    def trained_backbone(self) -> "Backbone | None":
        """Return None: its networks are frozen, and shared with other heads."""
        return None

    def at_temperature(self, temperature: float) -> "HeadModel":
        """Return the model with its log-odds divided by another temperature."""
        head = dataclasses.replace(self.head, temperature=temperature)
        return dataclasses.replace(self, head=head)

    @property
    def unit_rule(self) -> UnitRule | None:
        """How its predictions of images become those of units; None for images alone."""
        return self.head.unit_rule

    @property
    def image_parts(self) -> ImageParts | None:
        """The boxes or tiles that it was trained on; None for whole images. Raises ModelError."""
        return read_image_parts(self.head.image_parts, self.path)

    @property
    def kind(self) -> str:
        """The kind of the head."""
        return self.head.spec.kind

    @property
    def task_kind(self) -> TaskKind:
        """The kind of task that it was trained for."""
        return self.head.task_kind

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs; of a multi-label or regression task, the columns."""
        return self.head.classes

    @property
    def metrics(self) -> dict[str, float]:
        """Scores by name, as measured in the run."""
        return self.head.metrics

    @property
    def temperature(self) -> float:
        """The divisor of its log-odds."""
        return self.head.temperature

    @property
    def features(self) -> tuple[FeatureSpec, ...]:
        """The feature sets that it reads, in order; the views of a tap follow each other."""
        return self.head.features

    @property
    def takes_units(self) -> bool:
        """Whether it predicts the images of a unit together."""
        return HEAD_KINDS[self.head.spec.kind].takes_units

    def predict_bags(self, X: Floats, unit: npt.NDArray[Any]) -> tuple[Floats, Floats]:
        """Return (n, C) predictions of rows X (n, D), each with that of its unit (n,), and the
        weights (n,) of rows in them.
        """
        head = self.head
        predict_units = HEAD_KINDS[head.spec.kind].predict_units
        assert predict_units is not None
        rows = flat_rows(head.spec, head.arrays, X)
        return predict_units(head.spec, head.arrays, rows, unit, head.task_kind, head.temperature)

    @property
    def side_columns(self) -> tuple[SideColumn, ...]:
        """The tabular columns that it reads beside each image."""
        return self.head.side_columns

    @property
    def backbones(self) -> tuple[BackboneSpec, ...]:
        """The network behind each of `features`."""
        return tuple(backbone_from_fields(fields or {}) for fields in self.head.backbones)

    @property
    def spatial(self) -> bool:
        """Whether it reads feature maps."""
        return HEAD_KINDS[self.head.spec.kind].spatial

    @property
    def n_views(self) -> int:
        """The number of views of an image whose predictions it averages before the temperature."""
        return len({feature.view for feature in self.head.features})

    @property
    def floor(self) -> float:
        """The smallest meaningful probability of its predictions, as in `probability_floor`."""
        return probability_floor(self.head.spec, self.head.task_kind, len(self.head.classes))

    def update_digest(self, hasher: Any) -> None:
        """Add everything that its predictions depend on to a hash."""
        head = self.head
        hasher.update(json.dumps([head.task_kind, head.classes, spec_to_json(head.spec)]).encode())
        # A feature's spec has the digest of its network's weights.
        for feature in head.features:
            hasher.update(feature.to_json().encode())
        if head.side_columns:
            hasher.update(json.dumps(columns_to_json(head.side_columns)).encode())
        for array_name, array in sorted(head.arrays.items()):
            hasher.update(f"{array_name}|{array.dtype}|{array.shape}|".encode())
            hasher.update(np.ascontiguousarray(array).data)


def _resolve_backbones(
    head: TrainedHead, model_directory: Path, model_root: Path, allowed_code: Collection[str]
) -> list[BackboneSpec]:
    """Return the networks behind the head's feature sets, with the present paths of weights
    files.
    """
    backbones = []
    for feature, backbone_fields in zip(head.features, head.backbones, strict=True):
        if backbone_fields is None:
            raise ModelError(
                f"{model_directory}: it is not recorded which network made the features "
                f"{feature.name} ({feature.backbone}). Heads of an earlier version: call `headrace "
                "run` again. Features that were imported: predict from features, "
                "headrace.load_head(DIRECTORY).predict_proba(X)"
            )
        backbone = backbone_from_fields(backbone_fields)
        weights = backbone.weights
        if weights and is_weights_file(weights) and not weights.startswith(PACKAGE_PREFIX):
            # An export keeps weights in the model's directory, and names them relative to it.
            packed_weights = model_directory / weights
            weights_path = (
                str(packed_weights.absolute())
                if packed_weights.is_file()
                else moved_with_run(weights, model_directory)
            )
            require_allowed_file(
                weights, Path(weights_path), model_directory, model_root, allowed_code
            )
            backbone = dataclasses.replace(backbone, weights=weights_path)
        require_trusted_backbone(backbone, model_directory, model_root, allowed_code)
        backbones.append(backbone)
    return backbones
