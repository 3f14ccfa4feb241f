"""The check of an export: its graphs must predict what headrace predicts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.cache.errors import HeadraceError
from headrace.extract.images.views import Symmetries, mirror_pixels
from headrace.extract.run.decode_ahead import PixelBatch
from headrace.heads.data.side_columns import SideColumn, SideColumns
from headrace.pipelines.models.from_features import RowColumns
from headrace.pipelines.models.images import open_engine, predict_batches
from headrace.pipelines.models.model import Model
from headrace.pipelines.models.torch_graph import GraphInput, pixels_of

# Absolute for probabilities, relative to the largest for regression values. Sums in another order
# change a feature by some 1e-7 of its size, and now and then it rounds to the neighbouring float16,
# 5e-4 away.
TOLERANCE = 2e-3
# For features that were computed in half precision: an exported graph computes in float32.
HALF_TOLERANCE = 3e-2
_UNIT_SIZES = (3, 2, 1, 2)  # images of each unit, for a model that predicts units
_CHECKED = sum(_UNIT_SIZES)  # images of the comparison


@dataclass(frozen=True)
class _OutputCheck:
    """The graph's inputs, and what headrace predicts from them."""

    pixels: list[Tensor]  # of every pixel input; then side columns and units, if the model has them
    expected: npt.NDArray[np.float32]
    tolerance: float

    def difference(self, outputs: npt.NDArray[Any]) -> float:
        """Return the largest difference from the expected outputs, divided by the largest of these
        if that is above 1.
        """
        value_scale = max(1.0, float(np.abs(self.expected).max()))
        return float(np.abs(np.asarray(outputs, np.float64) - self.expected).max()) / value_scale


def check_side_columns(columns: Sequence[SideColumn]) -> SideColumns:
    """Return made-up side columns: all levels and an unknown one in turn, numbers around their
    mean, some of them missing.
    """
    generator, rows, values = np.random.default_rng(0), np.arange(_CHECKED), []
    for column in columns:
        if column.levels is None:
            numbers = generator.normal(column.center, column.spread, _CHECKED)
            values.append(np.where(rows % 3 == 0, np.nan, numbers))
        else:
            level = rows % (len(column.levels) + 1.0)
            values.append(np.where(level == len(column.levels), np.nan, level))
    return SideColumns(tuple(columns), np.stack(values, axis=1))


def check_pixels(inputs: Sequence[GraphInput]) -> list[Tensor]:
    """Return pixels (n, H, W, C) for each input, in its dtype: smooth random pictures with noise,
    the same at every size.
    """
    pixel_batches = []
    for preprocessing in (graph_input.preprocessing for graph_input in inputs):
        # Anew for each input, so that all show the same pictures.
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(_CHECKED, preprocessing.n_channels, 5, 5, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, preprocessing.crop, mode="bilinear")
        noise = 0.1 * torch.rand(smooth.shape, generator=generator)
        pixels = (255 * (0.9 * smooth + noise)).to(getattr(torch, preprocessing.pixel_dtype))
        pixel_batches.append(pixels.permute(0, 2, 3, 1).contiguous())
    return pixel_batches


def expected_outputs(model: Model, inputs: Sequence[GraphInput]) -> _OutputCheck:
    """Return the inputs of the check and what `headrace predict` makes of them. All random views
    get the same pixels here. Raises HeadraceError if the model cannot predict them.
    """
    pixel_batches = check_pixels(inputs)
    engine = open_engine(model)
    by_pixels = {
        pixels_of(graph_input.preprocessing): input_pixels
        for graph_input, input_pixels in zip(inputs, pixel_batches, strict=True)
    }
    pass_pixels = []
    for rendering in engine.renderings:
        input_pixels = by_pixels[pixels_of(rendering.preprocessing)]
        if isinstance(rendering.view_method, Symmetries):
            input_pixels = torch.from_numpy(
                np.stack(
                    [mirror_pixels(image, rendering.view_index) for image in input_pixels.numpy()]
                )
            )
        pass_pixels.append(input_pixels)
    batch = PixelBatch(list(range(_CHECKED)), pass_pixels)
    side_inputs = None
    if model.side_columns:
        side_inputs = check_side_columns(model.side_columns).as_inputs()
        pixel_batches = [*pixel_batches, torch.from_numpy(side_inputs)]
    units = None
    if model.takes_units:
        units = np.repeat(np.arange(len(_UNIT_SIZES)), _UNIT_SIZES)
        pixel_batches = [*pixel_batches, torch.from_numpy(units)]
    (predicted,) = predict_batches(engine, [batch], RowColumns(side_inputs, units))
    if predicted.failed:
        raise HeadraceError(
            f"the model cannot be compared on test pictures: {predicted.failed[0][1]}"
        )
    return _OutputCheck(pixel_batches, predicted.probabilities, allowed_difference(model))


def compare_outputs(check: _OutputCheck, run_graph: Any, file_name: str, model: Model) -> float:
    """Return the largest difference of a graph's outputs, for a batch and for single images.

    run_graph: from a list of inputs to outputs (n, C). Raises HeadraceError if the difference is
    more than allowed.
    """
    batch_difference = check.difference(run_graph(check.pixels))
    # The first two images one by one, or the first two units: these would reveal a batch size that
    # the export has fixed.
    bounds = np.cumsum((0, *_UNIT_SIZES))[:3].tolist() if model.takes_units else [0, 1, 2]
    single_outputs = [
        run_graph([input_pixels[start:stop] for input_pixels in check.pixels])
        for start, stop in itertools.pairwise(bounds)
    ]
    single_difference = replace(check, expected=check.expected[: bounds[-1]]).difference(
        np.concatenate(single_outputs)
    )
    largest_difference = max(batch_difference, single_difference)
    if not largest_difference <= check.tolerance:  # also NaN
        raise HeadraceError(
            f"{file_name} predicts otherwise than headrace, by {largest_difference:.2g} at most "
            f"where {check.tolerance:g} is allowed; nothing was written. The heads: "
            f"{', '.join(sorted({member.kind for member in model.members}))}. headrace predict and "
            "--format safetensors are exact"
        )
    return largest_difference


def allowed_difference(model: Model) -> float:
    """Return the largest difference that a graph's outputs may have, see `_OutputCheck`."""
    half_precision = any(
        feature.compute_dtype != "float32"
        for member in model.members
        for feature in member.features
    )
    return HALF_TOLERANCE if half_precision else TOLERANCE
