"""MODEL_CARD.md: what a model is, what it was trained on, what it is worth, how to use it, and
where it ends.
"""

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.extract.images.preprocessing import Preprocessing
from headrace.heads.spec import spec_to_json
from headrace.pipelines.models.head import HeadModel
from headrace.pipelines.models.model import Model
from headrace.pipelines.models.network import NetworkModel
from headrace.pipelines.models.torch_graph import Input
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.records import read_record
from headrace.pipelines.selection.evaluation_record import read_test_evaluations

_FLOAT16 = (
    "- A feature beyond the range of float16 (65,504) is reported by headrace and becomes infinite "
    "in the graphs."
)
_LIBRARIES = ("headrace", "torch", "torchvision", "timm", "pillow", "numpy")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    model: Model
    inputs: tuple[Input, ...]
    # by format: the largest difference from headrace's predictions on the test pictures
    differences: dict[str, float]
    tolerance: float
    # otherwise the graphs see the evaluation crop, and headrace averages random views too
    all_views: bool


def model_card(exported: Exported) -> str:
    """The card, as Markdown."""
    model = exported.model
    run = RunPaths(model.path.parent)
    sections = [
        f"# {_title(model)}",
        "Written by `headrace export`.",
        _what(model),
        _data(model, run),
        _metrics(model, run),
        _classes(model),
        _preprocessing(exported),
        _use(exported),
        _versions(),
        _limits(exported),
    ]
    return "\n\n".join(sections) + "\n"


def _title(model: Model) -> str:
    names = ", ".join(model.classes[:4]) + (", …" if len(model.classes) > 4 else "")
    verb = {
        "single": "Image classifier",
        "multi": "Image labeller",
        "regression": "Image regressor",
    }[model.task_kind]
    return f"{verb}: {names}"


def _what(model: Model) -> str:
    lines = ["## What it is", ""]
    if len(model.members) > 1:
        lines += [model.describe(), ""]
    for weight, member in zip(model.weights, model.members, strict=True):
        own = "" if member.temperature == 1 else f", at temperature {member.temperature:.3g}"
        share = f"{weight:.2f} × " if len(model.members) > 1 else ""
        lines.append(f"- {share}{member.describe()}{own}")
    return "\n".join(lines)


def _data(model: Model, run: RunPaths) -> str:
    lines = ["## Data", ""]
    recipe = _read(run.recipe)
    images = recipe.get("images") or {}
    source = next(
        (
            Path(str(images[key])).name
            for key in ("folder", "table", "tar", "array")
            if images.get(key)
        ),
        None,
    )
    if source is None:
        lines.append(
            "Not recorded: the model was exported away from its run. Write here what it was "
            "trained on."
        )
    else:
        task = recipe.get("task") or {}
        count = len(_read(run.listing).get("images", {}))
        split = task.get("split") or f"a test part of {task.get('test_fraction')}"
        lines.append(
            (
                f"{count:,} images of `{source}`, target `{task.get('target')}`, split by {split}, "
                f"{task.get('folds')} folds"
            )
            + (f", groups of `{task['group']}` kept together" if task.get("group") else "")
            + ". Write here where they come from, and whom they show."
        )
    return "\n".join(lines)


def _metrics(model: Model, run: RunPaths) -> str:
    rows = [
        (name.replace("_", " "), f"{value:.4f}", "", "")
        for name, value in sorted(model.metrics.items())
    ]
    selection = _read(run.selection)
    if len(model.members) == 1 and selection.get("expected") is not None:
        interval = f"{selection['low']:.4f} to {selection['high']:.4f}"
        what = (
            f"{selection['metric']} to expect on new images (corrected for the choice of the best "
            f"of {selection['tried']:,})"
        )
        rows.append((what, f"{selection['expected']:.4f}", interval, f"{selection['images']:,}"))
    found = selection.get("calibration")
    if (
        len(model.members) == 1
        and found is not None
        and found["temperature"] == model.members[0].temperature
    ):
        images = f"{found['images']:,}"
        rows.append(
            (
                "validation calibration error, before the temperature",
                f"{found['error_before']:.4f}",
                "",
                images,
            )
        )
        rows.append(
            (
                "validation calibration error, with it (cross-fitted)",
                f"{found['error_after']:.4f}",
                "",
                images,
            )
        )
    test = _test(model, run)
    if test:
        interval = f"{test['low']:.4f} to {test['high']:.4f}"
        rows.append(
            (f"**test {test['metric']}**", f"{test['value']:.4f}", interval, f"{test['images']:,}")
        )
    lines = [
        "## What it is worth",
        "",
        "| measure | value | 95 % interval | images |",
        "|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if not test:
        lines += [
            "",
            (
                "No test score is recorded for this model: the validation scores chose it, and "
                "flatter it."
            ),
        ]
    return "\n".join(lines)


def _test(model: Model, run: RunPaths) -> dict[str, Any] | None:
    """The recorded evaluation of the test split for this very model. Raises EvaluationsDamaged."""
    ours = [
        _identity(weight, member)
        for weight, member in zip(model.weights, model.members, strict=True)
    ]
    found = None
    evaluations = read_test_evaluations(run.test_evaluations)
    try:
        for evaluation in evaluations:
            winner = evaluation["winner"]
            shown = winner.get("ensemble") or [winner]
            lone = None if "ensemble" in winner else evaluation.get("temperature", 1.0)
            same = [_recorded(each, lone) for each in shown] == ours
            same = same and winner.get("temperature", 1.0) == model.average_temperature
            found = evaluation["result"] if same else found
    except (ValueError, KeyError, TypeError):
        return None
    return found


def _identity(weight: float, member: HeadModel | NetworkModel) -> tuple[Any, ...]:
    """As winner.py records it; of a network its settings alone, for its features are not the
    cache's.
    """
    shares = round(weight, 9), round(member.temperature, 9)
    if isinstance(member, NetworkModel):
        return *shares, json.loads(spec_to_json(member.spec))
    features = [feature.fingerprint for feature in member.head.features]
    return *shares, json.loads(spec_to_json(member.head.spec)), features


def _recorded(shown: dict[str, Any], lone: float | None) -> tuple[Any, ...]:
    """What `_identity` says of a head or network of an evaluation's record. lone: the temperature
    of a winner, whose weight is 1.
    """
    spec = json.loads(shown["spec"])
    weight, temperature = (
        (shown["weight"], shown.get("temperature", 1.0)) if lone is None else (1.0, lone)
    )
    shares = round(float(weight), 9), round(float(temperature), 9)
    return (*shares, spec) if spec["kind"] == "finetune" else (*shares, spec, shown["features"])


def _classes(model: Model) -> str:
    what = {
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
            what,
            "",
            *(f"{place}. {name}" for place, name in enumerate(model.classes)),
        ]
    )


def _preprocessing(exported: Exported) -> str:
    lines = [
        "## Preprocessing",
        "",
        "In the graphs: pixels to numbers, normalisation, everything after it. Outside, in "
        "`preprocess.py` (Pillow and NumPy alone): decoding, EXIF orientation, transparency over "
        "white, black and white of pixels of more than 8 bits, resizing, cropping. It is "
        "headrace's own code for that, and refuses the images that headrace refuses. Each input is "
        "uint8 RGB:",
        "",
        "| input | shape | resize | interpolation | crop |",
        "|---|---|---|---|---|",
    ]
    for each in exported.inputs:
        how = each.preprocessing
        height, width = how.crop
        lines.append(
            f"| `{each.name}` | (n, {height}, {width}, 3) | {_resize(how)} | {how.interpolation}, "
            f"antialiased (Pillow) | {height} × {width}, centre |"
        )
    ranges = sorted(
        {
            each.preprocessing.pixel_range
            for each in exported.inputs
            if each.preprocessing.pixel_range
        }
    )
    for black, white in ranges:
        lines += [
            "",
            (
                f"Of images of more than 8 bits, {black:g} is black and {white:g} is white; what "
                "lies beyond is clipped."
            ),
        ]
    if not ranges:
        lines += [
            "",
            "16-bit images are black at 0 and white at 65535, PGM and PPM files at what their "
            "header says. Floats, signed and 32-bit integers are refused: the model was trained "
            "without a `pixel_range`.",
        ]
    return "\n".join(lines)


def _resize(how: Preprocessing) -> str:
    edge = {"shortest": "shorter edge to", "squash": "both edges to", "border": "longer edge to"}[
        how.mode
    ]
    return f"{edge} {how.resize[0]}" + (
        "" if how.resize[0] == how.resize[1] else f" × {how.resize[1]}"
    )


def _use(exported: Exported) -> str:
    lines = ["## Use", ""]
    names = [each.name for each in exported.inputs]
    many = len(names) > 1
    if "torch" in exported.differences:
        tensors = ", ".join(
            f'torch.tensor(load("photo.jpg", "{name}"))[None]'
            if many
            else 'torch.tensor(load("photo.jpg"))[None]'
            for name in names
        )
        lines += [
            "torch alone (`model.pt2`):",
            "",
            "```python",
            "import torch; from preprocess import load",
            'model = torch.export.load("model.pt2").module()',
            f"print(model({tensors}))",
            "```",
            "",
        ]
    if "onnx" in exported.differences:
        feed = ", ".join(
            f'"{name}": load("photo.jpg", "{name}")[None]'
            if many
            else f'"{name}": load("photo.jpg")[None]'
            for name in names
        )
        lines += [
            "onnxruntime alone (`model.onnx`):",
            "",
            "```python",
            "import onnxruntime; from preprocess import load",
            'model = onnxruntime.InferenceSession("model.onnx")',
            f"print(model.run(None, {{{feed}}})[0])",
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
            'print(model.classes, model.predict_proba("photo.jpg"))',
            "```",
            "",
        ]
    worst = ", ".join(f"{name} {value:.1e}" for name, value in exported.differences.items())
    lines.append(
        "Checked against headrace's own predictions when this was written: the largest "
        f"differences were {worst}; {exported.tolerance:g} is allowed."
    )
    return "\n".join(lines)


def _versions() -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
    for name in ("onnx", "onnxruntime"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"## Versions\n\nPython {platform.python_version()}, {', '.join(found)}."


def _limits(exported: Exported) -> str:
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


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except FileNotFoundError:
        return {}
