"""MODEL_CARD.md: a model's parts, data, scores, use and limits."""

import importlib.metadata
import json
import platform
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
_LIBRARIES = ("headrace", "torch", "torchvision", "timm", "pillow", "numpy")


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
        _data_section(model, run),
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


def _data_section(model: Model, run: RunPaths) -> str:
    lines = ["## Data", ""]
    recipe = _read_or_empty(run.recipe)
    images = recipe.get("images") or {}
    source_name = next(
        (
            Path(str(images[key])).name
            for key in ("folder", "table", "tar", "array")
            if images.get(key)
        ),
        None,
    )
    if source_name is None:
        lines.append(
            "Not recorded: the model was exported away from its run. Write here what it was "
            "trained on."
        )
    else:
        task_recipe = recipe.get("task") or {}
        n_images = len(_read_or_empty(run.listing).get("images", {}))
        split_text = (
            task_recipe.get("split") or f"a test part of {task_recipe.get('test_fraction')}"
        )
        lines.append(
            (
                f"{count_text(n_images, 'image')} of `{source_name}`, target "
                f"`{task_recipe.get('target')}`, split by {split_text}, {task_recipe.get('folds')} "
                "folds"
            )
            + (
                f", groups of `{task_recipe['group']}` kept together"
                if task_recipe.get("group")
                else ""
            )
            + ". Write here where they come from, and whom they show."
        )
    return "\n".join(lines)


def _metrics_section(model: Model, run: RunPaths) -> str:
    table_rows = [
        (name.replace("_", " "), f"{value:.4f}", "", "")
        for name, value in sorted(model.metrics.items())
    ]
    selection = _read_or_empty(run.selection)
    if len(model.members) == 1 and selection.get("expected") is not None:
        interval = f"{selection['low']:.4f} to {selection['high']:.4f}"
        measure = (
            f"{selection['metric']} to expect on new images (corrected for the choice of the best "
            f"of {selection['tried']:,})"
        )
        table_rows.append(
            (measure, f"{selection['expected']:.4f}", interval, f"{selection['images']:,}")
        )
    calibration = selection.get("calibration")
    if (
        len(model.members) == 1
        and calibration is not None
        and calibration["temperature"] == model.members[0].temperature
    ):
        image_count = f"{calibration['images']:,}"
        table_rows.append(
            (
                "validation calibration error, before the temperature",
                f"{calibration['error_before']:.4f}",
                "",
                image_count,
            )
        )
        table_rows.append(
            (
                "validation calibration error, with it (cross-fitted)",
                f"{calibration['error_after']:.4f}",
                "",
                image_count,
            )
        )
    test_result = _test_result(model, run)
    if test_result:
        interval = f"{test_result['low']:.4f} to {test_result['high']:.4f}"
        table_rows.append(
            (
                f"**test {test_result['metric']}**",
                f"{test_result['value']:.4f}",
                interval,
                f"{test_result['images']:,}",
            )
        )
    lines = [
        "## What it is worth",
        "",
        "| measure | value | 95 % interval | images |",
        "|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(table_row)} |" for table_row in table_rows]
    if not test_result:
        lines += [
            "",
            (
                "No test score is recorded for this model: the validation scores chose it, and "
                "flatter it."
            ),
        ]
    return "\n".join(lines)


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
            recorded_members = winner.get("ensemble") or [winner]
            winner_temperature = (
                None if "ensemble" in winner else evaluation.get("temperature", 1.0)
            )
            is_this_model = [
                _recorded_identity(recorded_member, winner_temperature)
                for recorded_member in recorded_members
            ] == model_identity
            is_this_model = (
                is_this_model and winner.get("temperature", 1.0) == model.average_temperature
            )
            test_result = evaluation["result"] if is_this_model else test_result
    except (ValueError, KeyError, TypeError):
        return None
    return test_result


def _model_identity(weight: float, member: HeadModel | NetworkModel) -> tuple[Any, ...]:
    """Return fields by which a member is found in the record of test evaluations: a network by its
    settings alone, because it has no cached features.
    """
    # Rounded, since the record and the model's file went through JSON and arithmetic separately.
    weight_and_temperature = round(weight, 9), round(member.temperature, 9)
    if isinstance(member, NetworkModel):
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
    weight_and_temperature = round(float(weight), 9), round(float(temperature), 9)
    return (
        (*weight_and_temperature, spec)
        if spec["kind"] == "finetune"
        else (*weight_and_temperature, spec, recorded_member["features"])
    )


def _classes_section(model: Model) -> str:
    output_text = {
        "single": (
            "The output is `probabilities` (n, C) float32; each row sums to 1. In this order:"
        ),
        "multi": (
            "The output is `probabilities` (n, C) float32, one for each label, independent of the "
            "others. In this order:"
        ),
        "regression": (
            "The output is `probabilities` (n, C) float32, which are the predicted values. In this "
            "order:"
        ),
    }[model.task_kind]
    return "\n".join(
        [
            "## Classes",
            "",
            output_text,
            "",
            *(f"{class_index}. {name}" for class_index, name in enumerate(model.classes)),
        ]
    )


def _preprocessing_section(exported: ExportResult) -> str:
    lines = [
        "## Preprocessing",
        "",
        "In the graphs: pixels to numbers, normalisation, everything after it. Outside, in "
        "`preprocess.py` (Pillow and NumPy alone): decoding, EXIF orientation, transparency over "
        "white, black and white of pixels of more than 8 bits, resizing, cropping. It is "
        "headrace's own code for that, and refuses the images that headrace refuses:",
        "",
        "| input | shape | type | channels | resize | interpolation | crop |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_input in exported.inputs:
        preprocessing = model_input.preprocessing
        height, width = preprocessing.crop
        lines.append(
            f"| `{model_input.name}` | (n, {height}, {width}, {preprocessing.n_channels}) | "
            f"{preprocessing.pixel_dtype} | {_channels_text(preprocessing)} | "
            f"{_resize_text(preprocessing)} | {preprocessing.interpolation}, antialiased (Pillow) "
            f"| {height} × {width}, centre |"
        )
    lines += _beside_lines(exported.model)
    pixel_ranges = {
        (preprocessing.pixel_range, preprocessing.pixel_dtype): None
        for preprocessing in (model_input.preprocessing for model_input in exported.inputs)
        if preprocessing.pixel_range is not None
    }
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


def _channels_text(preprocessing: Preprocessing) -> str:
    if preprocessing.bands is None:
        return "RGB"
    return f"bands {', '.join(map(str, preprocessing.bands))}"


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
    return f"{edge_text} {preprocessing.resize[0]}" + (
        ""
        if preprocessing.resize[0] == preprocessing.resize[1]
        else f" × {preprocessing.resize[1]}"
    )


def _use_section(exported: ExportResult) -> str:
    lines = ["## Use", ""]
    input_names = [model_input.name for model_input in exported.inputs]
    has_many_inputs = len(input_names) > 1
    cells = ", ".join(f'"{column.name}": …' for column in exported.model.side_columns)
    side_row = f"{{{cells}}}"
    reads_side = bool(exported.model.side_columns)
    imported = "load, side_columns" if reads_side else "load"
    headrace_inputs = f", side_columns=[{side_row}]" if reads_side else ""
    headrace_inputs += ', units=["one"]' if exported.model.takes_units else ""
    if "torch" in exported.differences:
        torch_inputs = ", ".join(
            f'torch.tensor(load("photo.jpg", "{input_name}"))[None]'
            if has_many_inputs
            else 'torch.tensor(load("photo.jpg"))[None]'
            for input_name in input_names
        )
        if reads_side:
            torch_inputs += f", torch.tensor([side_columns({side_row})])"
        if exported.model.takes_units:
            torch_inputs += ", torch.zeros(1, dtype=torch.int64)"
        lines += [
            "torch alone (`model.pt2`):",
            "",
            "```python",
            f"import torch; from preprocess import {imported}",
            'model = torch.export.load("model.pt2").module()',
            f"print(model({torch_inputs}))",
            "```",
            "",
        ]
    if "onnx" in exported.differences:
        onnx_feed = ", ".join(
            f'"{input_name}": load("photo.jpg", "{input_name}")[None]'
            if has_many_inputs
            else f'"{input_name}": load("photo.jpg")[None]'
            for input_name in input_names
        )
        if reads_side:
            onnx_feed += f', "side_columns": np.array([side_columns({side_row})], np.float32)'
        if exported.model.takes_units:
            onnx_feed += ', "units": np.zeros(1, np.int64)'
        lines += [
            "onnxruntime alone (`model.onnx`):",
            "",
            "```python",
            *(["import numpy as np"] if reads_side or exported.model.takes_units else []),
            f"import onnxruntime; from preprocess import {imported}",
            'model = onnxruntime.InferenceSession("model.onnx")',
            f"print(model.run(None, {{{onnx_feed}}})[0])",
            "```",
            "",
        ]
    if "safetensors" in exported.differences:
        lines += [
            "headrace (the safetensors files; also `headrace predict THIS_FOLDER photos/`):",
            "",
            "```python",
            "from headrace import load_model",
            'model = load_model(".")',
            f'print(model.classes, model.predict_proba("photo.jpg"{headrace_inputs}))',
            "```",
            "",
        ]
    differences = ", ".join(
        f"{input_name} {value:.1e}" for input_name, value in exported.differences.items()
    )
    lines.append(
        "Checked against headrace's own predictions when this was written: the largest "
        f"differences were {differences}; {exported.tolerance:g} is allowed."
    )
    return "\n".join(lines)


def _versions_section() -> str:
    versions = [f"{library} {importlib.metadata.version(library)}" for library in _LIBRARIES]
    for library in ("onnx", "onnxruntime"):
        try:
            versions.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"## Versions\n\nPython {platform.python_version()}, {', '.join(versions)}."


def _limits_section(exported: ExportResult) -> str:
    lines = [
        "## Limits",
        "",
        "- It answers with one of its classes whatever it is shown: an image of something else, or "
        "from another camera, gets an answer too.",
        (
            "- The scores hold for images like those it was trained and tested on. Nothing is said "
            "about other places or times."
        ),
        *(
            [_FLOAT16]
            if any(isinstance(member, HeadModel) for member in exported.model.members)
            else []
        ),
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
