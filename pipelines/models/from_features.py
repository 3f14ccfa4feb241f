"""Predictions of a model from features, cached or just computed; no network is run here.

Imports no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from headrace.cache.spec import FeatureSpec
from headrace.heads.evaluate.ensemble import average
from headrace.heads.link import tempered
from headrace.pipelines.models.errors import ModelError

if TYPE_CHECKING:
    from headrace.pipelines.models.head import HeadModel
    from headrace.pipelines.models.model import Model
    from headrace.pipelines.models.network import NetworkModel

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowColumns:
    """What predictions of N images read of their table: side columns and units."""

    # (N, R) from `SideColumns.as_inputs`, where the model reads side columns
    side_inputs: Floats | None = None
    # (N,) unit of each image, for a model that predicts the images of a unit together; every unit
    # is then whole
    units: npt.NDArray[Any] | None = None

    def take(self, rows: slice | Sequence[int] | npt.NDArray[np.intp]) -> "RowColumns":
        """Return the same for some of the images."""
        return RowColumns(
            None if self.side_inputs is None else self.side_inputs[rows],
            None if self.units is None else self.units[rows],
        )


def average_weights(
    model_weights: Sequence[float],
    member_weights: Sequence[Floats | None],
    units: npt.NDArray[Any] | None,
) -> Floats | None:
    """Return the weight (n,) of each image in the prediction of its unit: the mean of its weights
    in the members' predictions, in which a member counts by its own weight. None without units.

    model_weights: of the members, with the sum 1. member_weights: (n,) by member; None for a member
    that predicts images one by one, so that all images of a unit weigh the same.
    """
    if units is None:
        return None
    _, unit_of_row, sizes = np.unique(units, return_inverse=True, return_counts=True)
    equal_weights = 1 / sizes[unit_of_row]
    by_member = [equal_weights if weights is None else weights for weights in member_weights]
    return np.asarray(np.tensordot(model_weights, np.stack(by_member), 1), np.float32)


def predict_from_features(
    model: "Model",
    head_functions: Sequence[Callable[[Floats], Floats]],
    features: dict[FeatureSpec, Floats],
    row_columns: RowColumns,
) -> tuple[Floats, Floats | None]:
    """Return (n, C) predictions of a model, and (n,) what each image weighs in the prediction of
    its unit, None without units.

    head_functions: `head_function()` of each member. features: (n, ...) by spec. row_columns: of
    these n images. Raises ModelError for a head with another number of outputs than classes.
    """
    predicted, weights = zip(
        *(
            predict_views(
                member,
                head_function,
                _view_inputs(member, features, row_columns.side_inputs),
                row_columns.units,
            )
            for member, head_function in zip(model.members, head_functions, strict=True)
        ),
        strict=True,
    )
    n_classes = len(model.classes)
    if wrong_widths := [block.shape[1] for block in predicted if block.shape[1] != n_classes]:
        raise ModelError(
            f"{model.path}: its head has {wrong_widths[0]} outputs for {n_classes} classes: fetch "
            "the model again"
        )
    # A model alone keeps its bits: there is no sum in float64 and back.
    if len(predicted) == 1 and model.average_temperature == 1:
        average_prediction = predicted[0]
    else:
        average_prediction = tempered(
            average(np.array(model.weights), np.stack(predicted)),
            model.task_kind,
            model.average_temperature,
        )
    return average_prediction, average_weights(model.weights, weights, row_columns.units)


def predict_views(
    member: "HeadModel | NetworkModel",
    head_function: Callable[[Floats], Floats],
    view_inputs: Sequence[Floats],
    units: npt.NDArray[Any] | None,
) -> tuple[Floats, Floats | None]:
    """Return (n, C) predictions of one member at its temperature, the mean over the views that it
    was trained on, and (n,) the weight of each image, summed over its views, in its unit's
    prediction, None for a member that predicts images one by one.

    head_function: from `member.head_function()`. view_inputs: (n, ...) what the head reads of each
    view. units: (n,) of the images.
    """
    if member.takes_units:
        assert units is not None
        head = cast("HeadModel", member)  # networks predict images alone
        # All views of a unit's images are one bag, as in training.
        bags = np.tile(units, len(view_inputs))
        predicted, weights = head.predict_bags(np.concatenate(view_inputs), bags)
        # Rows repeat their unit's prediction, so that those of the first view have all of them.
        return predicted[: len(units)], weights.reshape(-1, len(units)).sum(0)
    if len(view_inputs) == 1:
        return head_function(view_inputs[0]), None
    mean_of_views = np.mean([head_function(view_input) for view_input in view_inputs], axis=0)
    return tempered(mean_of_views, member.task_kind, member.temperature, member.floor), None


def _view_inputs(
    member: "HeadModel | NetworkModel",
    features: dict[FeatureSpec, Floats],
    side_inputs: Floats | None,
) -> list[Floats]:
    """Return for each view what the member reads: features (n, D) or maps (n, channels, h, w), side
    by side as in `load_rows`.
    """
    views_of_feature: dict[str, list[Floats]] = {}
    for spec in member.features:
        # Views of one feature set are equal but for `view`.
        views_of_feature.setdefault(replace(spec, view="").to_json(), []).append(features[spec])
    side_rows = [] if side_inputs is None or not member.side_columns else [side_inputs]
    if not member.spatial:
        views_of_feature = {
            name: [block.reshape(len(block), -1) for block in views]
            for name, views in views_of_feature.items()
        }
    return [
        np.concatenate([*features_of_view, *side_rows], axis=1)
        for features_of_view in zip(*views_of_feature.values(), strict=True)
    ]
