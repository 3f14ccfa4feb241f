"""MODEL_CARD.md: a model's parts, data, scores, use and limits."""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cache.count_text import count_text
from headrace.extract.images.preprocessing import Preprocessing
from headrace.heads.data.side_columns import SideColumn
from headrace.heads.spec import spec_to_json
from headrace.pipelines.export.hub_metadata import hub_metadata
from headrace.pipelines.models.head import HeadModel
from headrace.pipelines.models.model import Model
from headrace.pipelines.models.network import NetworkModel
from headrace.pipelines.models.torch_graph import GraphInput
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.records import read_record
from headrace.pipelines.selection.evaluation_record import read_test_evaluations

_FLOAT16 = (
    "- A feature beyond the range of float16 (65,504) is reported by headrace and becomes infinite "
    "in the graphs."
)
_LIBRARIES = ("headrace", "torch", "torchvision", "timm", "pillow", "numpy", "onnx", "onnxruntime")


@dataclass(frozen=True)
class ExportResult:
    """The outcome of an export."""

    model: Model
    inputs: tuple[GraphInput, ...]
    # by format, the largest difference from headrace's predictions on the pictures of the check
    differences: dict[str, float]
    tolerance: float
    # whether graphs average over all views; if not, they read the evaluation crop alone
    all_views: bool


def model_card(exported: ExportResult) -> str:
    """Return the card, as Markdown."""
    model = exported.model
    run = RunPaths(model.path.parent)
    sections = [
        hub_metadata(model, _test_result(model, run)),
        f"# {_title_line(model)}",
        "Written by `headrace export`.",
        _model_section(model),
        _data_section(run),
        _metrics_section(model, run),
        _classes_section(model),
        _preprocessing_section(exported),
        _use_section(exported),
        _versions_section(),
        _limits_section(exported),
    ]
    return "\n\n".join(sections) + "\n"


def _title_line(model: Model) -> str:
    class_names = ", ".join(model.classes[:4]) + (", …" if len(model.classes) > 4 else "")
    purpose = {
        "single": "Image classifier",
        "multi": "Image labeller",
        "regression": "Image regressor",
    }[model.task_kind]
    return f"{purpose}: {class_names}"


def _model_section(model: Model) -> str:
    lines = ["## What it is", ""]
    if len(model.members) > 1:
        lines += [model.describe(), ""]
    for weight, member in zip(model.weights, model.members, strict=True):
        temperature_text = (
            "" if member.temperature == 1 else f", at temperature {member.temperature:.3g}"
        )
        weight_text = f"{weight:.2f} × " if len(model.members) > 1 else ""
        lines.append(f"- {weight_text}{member.describe()}{temperature_text}")
    return "\n".join(lines)


def _data_section(run: RunPaths) -> str:
    recipe = _read_or_empty(run.recipe)
    images, task = recipe.get("images") or {}, recipe.get("task") or {}
    sources = [images[key] for key in ("folder", "table", "tar", "zip", "array") if images.get(key)]
    if not sources:
        return (
            "## Data\n\nNot recorded: the model was exported away from its run. Write here what it "
            "was trained on."
        )
    n_images = len(_read_or_empty(run.listing).get("images", {}))
    split = task.get("split") or f"a test part of {task.get('test_fraction')}"
    groups = f", groups of `{task['group']}` kept together" if task.get("group") else ""
    return (
        f"## Data\n\n{count_text(n_images, 'image')} of `{Path(str(sources[0])).name}`, target "
        f"`{task.get('target')}`, split by {split}, {task.get('folds')} folds{groups}. Write here "
        "where they come from, and whom they show."
    )


def _metrics_section(model: Model, run: RunPaths) -> str:
    rows = [
        _score_row(name.replace("_", " "), value) for name, value in sorted(model.metrics.items())
    ]
    # What a run records of its selection is about the winner alone.
    selection = _read_or_empty(run.selection) if len(model.members) == 1 else {}
    if selection.get("expected") is not None:
        measure = (
            f"{selection['metric']} to expect on new images (corrected for the choice of the best "
            f"of {selection['tried']:,})"
        )
        rows.append(_score_row(measure, selection["expected"], selection, selection["images"]))
    calibration = selection.get("calibration")
    if calibration and calibration["temperature"] == model.members[0].temperature:
        for key, when in (
            ("error_before", "before the temperature"),
            ("error_after", "with it (cross-fitted)"),
        ):
            measure = f"validation calibration error, {when}"
            rows.append(_score_row(measure, calibration[key], None, calibration["images"]))
    test_result = _test_result(model, run)
    if test_result:
        measure = f"**test {test_result['metric']}**"
        rows.append(_score_row(measure, test_result["value"], test_result, test_result["images"]))
    else:
        rows += [
            "",
            "No test score is recorded for this model: the validation scores chose it, and flatter "
            "it.",
        ]
    head = ["| measure | value | 95 % interval | images |", "|---|---|---|---|"]
    return "\n".join(["## What it is worth", "", *head, *rows])


def _score_row(
    measure: str,
    value: float,
    interval: Mapping[str, Any] | None = None,
    images: int | None = None,
) -> str:
    interval_text = "" if interval is None else f"{interval['low']:.4f} to {interval['high']:.4f}"
    images_text = "" if images is None else f"{images:,}"
    return f"| {measure} | {value:.4f} | {interval_text} | {images_text} |"


def _test_result(model: Model, run: RunPaths) -> dict[str, Any] | None:
    """Return the result of this very model's recorded evaluation on the test split, None without
    one. Raises InvalidInput.
    """
    model_identity = [
        _model_identity(weight, member)
        for weight, member in zip(model.weights, model.members, strict=True)
    ]
    test_result = None
    evaluations = read_test_evaluations(run.test_evaluations)
    try:
        for evaluation in evaluations:
            winner = evaluation["winner"]
            temperature = None if "ensemble" in winner else evaluation.get("temperature", 1.0)
            recorded = [
                _recorded_identity(member, temperature)
                for member in winner.get("ensemble") or [winner]
            ]
            average_temperature = winner.get("temperature", 1.0)
            if recorded == model_identity and average_temperature == model.average_temperature:
                test_result = evaluation["result"]  # of several, the last
    except (ValueError, KeyError, TypeError):  # a record of another version
        return None
    return test_result


def _model_identity(weight: float, member: HeadModel | NetworkModel) -> tuple[Any, ...]:
    """Return fields by which a member is found in the record of test evaluations."""
    # Rounded, since the record and the model's file went through JSON and arithmetic separately.
    weight_and_temperature = round(weight, 9), round(member.temperature, 9)
    if isinstance(member, NetworkModel):
        # By its settings alone, because it has no cached features.
        return *weight_and_temperature, json.loads(spec_to_json(member.spec))
    features = [feature.fingerprint for feature in member.head.features]
    return *weight_and_temperature, json.loads(spec_to_json(member.head.spec)), features


def _recorded_identity(
    recorded_member: dict[str, Any], winner_temperature: float | None
) -> tuple[Any, ...]:
    """Return `_model_identity` of a member that an evaluation's record names.

    winner_temperature: of a winner, whose weight is 1; None for a member of an ensemble.
    """
    spec = json.loads(recorded_member["spec"])
    weight, temperature = (
        (recorded_member["weight"], recorded_member.get("temperature", 1.0))
        if winner_temperature is None
        else (1.0, winner_temperature)
    )
    features = [] if spec["kind"] == "finetune" else [recorded_member["features"]]
    return round(float(weight), 9), round(float(temperature), 9), spec, *features


def _classes_section(model: Model) -> str:
    meaning = {
        "single": "; each row sums to 1",
        "multi": ", one for each label, independent of the others",
        "regression": ", which are the predicted values",
    }[model.task_kind]
    output_text = f"The output is `probabilities` (n, C) float32{meaning}. In this order:"
    class_lines = [f"{index}. {name}" for index, name in enumerate(model.classes)]
    return "\n".join(["## Classes", "", output_text, "", *class_lines])


def _preprocessing_section(exported: ExportResult) -> str:
    lines = [
        "## Preprocessing",
        "",
        "In the graphs: pixels to numbers, normalization, everything after it. Outside, in "
        "`preprocess.py` (Pillow and NumPy alone): decoding, EXIF orientation, transparency over "
        "white, black and white of pixels of more than 8 bits, resizing, cropping. It is "
        "headrace's own code for that, and refuses the images that headrace refuses:",
        "",
        "| input | shape | type | channels | resize | interpolation | crop |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_input in exported.inputs:
        preprocessing = model_input.preprocessing
        (height, width), bands = preprocessing.crop, preprocessing.bands
        channels = "RGB" if bands is None else f"bands {', '.join(map(str, bands))}"
        lines.append(
            f"| `{model_input.name}` | (n, {height}, {width}, {preprocessing.n_channels}) | "
            f"{preprocessing.pixel_dtype} | {channels} | "
            f"{_resize_text(preprocessing)} | {preprocessing.interpolation}, antialiased (Pillow) "
            f"| {height} × {width}, centre |"
        )
    lines += _beside_lines(exported.model)
    preprocessings = [model_input.preprocessing for model_input in exported.inputs]
    pixel_ranges = dict.fromkeys(
        (preprocessing.pixel_range, preprocessing.pixel_dtype)
        for preprocessing in preprocessings
        if preprocessing.pixel_range is not None
    )
    for pixel_range, pixel_dtype in pixel_ranges:
        beyond = "clipped" if pixel_dtype == "uint8" else "kept"
        pairs = pixel_range if isinstance(pixel_range[0], tuple) else (pixel_range,)
        range_text = "; ".join(
            f"{black:g} is black and {white:g} is white" for black, white in pairs
        )
        lines += ["", f"Of images of more than 8 bits, {range_text}; what lies beyond is {beyond}."]
    if not pixel_ranges:
        lines += [
            "",
            "16-bit images are black at 0 and white at 65535, PGM and PPM files at what their "
            "header says. Floats, signed and 32-bit integers are refused: the model was trained "
            "without a `pixel_range`.",
        ]
    return "\n".join(lines)


def _beside_lines(model: Model) -> list[str]:
    """Return the card's lines on inputs other than pixels, and on units."""
    lines = []
    if model.side_columns:
        lines += [
            "",
            "The input `side_columns` is float32 (n, R): tabular columns beside each image, as "
            "`side_columns` of `preprocess.py` makes them.",
            "",
            *(f"- `{column.name}`: {_side_text(column)}" for column in model.side_columns),
        ]
    if model.takes_units:
        lines += [
            "",
            "The last input, `units`, is int64 (n,): equal numbers, from 0 to n - 1, for images of "
            "one unit (a patient, a slide, a sequence). They are predicted together, and each has "
            "its unit's prediction. One unit in a call: zeros.",
        ]
    if (rule := model.unit_rule) is not None:
        lines += [
            "",
            f"Units (`{rule.column}`) are predicted by the {rule.aggregation} of their images: "
            "`predict_unit` of `preprocess.py` takes the outputs for all images of one.",
        ]
    return lines


def _side_text(column: SideColumn) -> str:
    if column.levels is not None:
        levels = ", ".join(repr(level) if level else "(empty)" for level in column.levels[:20])
        more_text = ", …" if len(column.levels) > 20 else ""
        return f"a category, one column for each of {levels}{more_text}"
    missing_text = ", and 1 where it is missing" if column.has_missing else ""
    return f"a number, (value - {column.center:.6g}) / {column.spread:.6g}{missing_text}"


def _resize_text(preprocessing: Preprocessing) -> str:
    edge_text = {
        "shortest": "shorter edge to",
        "squash": "both edges to",
        "border": "longer edge to",
    }[preprocessing.mode]
    height, width = preprocessing.resize
    return f"{edge_text} {height}" + ("" if height == width else f" × {width}")


def _use_section(exported: ExportResult) -> str:
    model, formats = exported.model, exported.differences
    names = [model_input.name for model_input in exported.inputs]
    loaded = [
        f'load("photo.jpg", "{name}")' if len(names) > 1 else 'load("photo.jpg")' for name in names
    ]
    torch_inputs = [f"torch.tensor({text})[None]" for text in loaded]
    onnx_inputs = [f'"{name}": {text}[None]' for name, text in zip(names, loaded, strict=True)]
    own_inputs, imported = ['"photo.jpg"'], "load"
    if model.side_columns:
        cells = ", ".join(f'"{column.name}": …' for column in model.side_columns)
        imported = "load, side_columns"
        torch_inputs.append(f"torch.tensor([side_columns({{{cells}}})])")
        onnx_inputs.append(f'"side_columns": np.array([side_columns({{{cells}}})], np.float32)')
        own_inputs.append(f"side_columns=[{{{cells}}}]")
    if model.takes_units:
        torch_inputs.append("torch.zeros(1, dtype=torch.int64)")
        onnx_inputs.append('"units": np.zeros(1, np.int64)')
        own_inputs.append('units=["one"]')
    lines = ["## Use", ""]
    if "torch" in formats:
        lines += _code_block(
            "torch alone (`model.pt2`):",
            f"import torch; from preprocess import {imported}",
            'model = torch.export.load("model.pt2").module()',
            f"print(model({', '.join(torch_inputs)}))",
        )
    if "onnx" in formats:
        lines += _code_block(
            "onnxruntime alone (`model.onnx`):",
            *(["import numpy as np"] if model.side_columns or model.takes_units else []),
            f"import onnxruntime; from preprocess import {imported}",
            'model = onnxruntime.InferenceSession("model.onnx")',
            f"print(model.run(None, {{{', '.join(onnx_inputs)}}})[0])",
        )
    if "safetensors" in formats:
        lines += _code_block(
            "headrace (the safetensors files; also `headrace predict THIS_FOLDER photos/`):",
            "from headrace import load_model",
            'model = load_model(".")',
            f"print(model.classes, model.predict_proba({', '.join(own_inputs)}))",
        )
    differences = ", ".join(f"{name} {value:.1e}" for name, value in formats.items())
    lines.append(
        "Checked against headrace's own predictions when this was written: the largest "
        f"differences were {differences}; {exported.tolerance:g} is allowed."
    )
    return "\n".join(lines)


def _code_block(title: str, *code_lines: str) -> list[str]:
    return [title, "", "```python", *code_lines, "```", ""]


def _versions_section() -> str:
    versions = []
    for library in _LIBRARIES:
        # The last two are of an extra that may not be installed.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{library} {importlib.metadata.version(library)}")
    return f"## Versions\n\nPython {platform.python_version()}, {', '.join(versions)}."


def _limits_section(exported: ExportResult) -> str:
    rounds_to_float16 = any(
        feature.dtype == "float16"
        for member in exported.model.members
        for feature in member.features
    )
    lines = [
        "## Limits",
        "",
        "- It answers with one of its classes whatever it is shown: an image of something else, or "
        "from another camera, gets an answer too.",
        "- The scores hold for images like those it was trained and tested on. Nothing is said "
        "about other places or times.",
        *([_FLOAT16] if rounds_to_float16 else []),
        "- The networks' weights keep the licence that they came with.",
    ]
    if not exported.all_views:
        lines.append(
            "- It was trained on random views, and headrace averages over them. The graphs see the "
            "evaluation crop alone, so that they differ from `headrace predict`; they were "
            "compared with headrace on that crop."
        )
    return "\n".join(lines)


def _read_or_empty(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except FileNotFoundError:
        return {}
