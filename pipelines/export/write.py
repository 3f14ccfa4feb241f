"""`headrace export`: a model as files that need no headrace. Their predictions are compared with
headrace's before the files appear.
"""

import contextlib
import dataclasses
import glob
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from headrace.cache.atomic_io import PARTIAL_SUFFIX
from headrace.cache.errors import HeadraceError
from headrace.extract.backbones.backbone import Backbone, load_backbone
from headrace.extract.images.views import is_exact_view
from headrace.extract.spec import BackboneSpec
from headrace.heads.data.side_columns import SIDE_COLUMNS, columns_to_json
from headrace.pipelines.cluster.task_leases import driver_lives, driver_lock, driver_name
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.export.model_card import ExportResult, model_card
from headrace.pipelines.export.output_check import (
    allowed_difference,
    compare_outputs,
    expected_outputs,
)
from headrace.pipelines.export.preprocessing_file import PREPROCESS_FILE, preprocess_file
from headrace.pipelines.models.ensemble import EnsembleModel
from headrace.pipelines.models.head import HeadModel
from headrace.pipelines.models.model import EXPORT_MARKER, Model, load_model
from headrace.pipelines.models.network import NetworkModel
from headrace.pipelines.models.torch_graph import GraphInput, ModelGraph, fits_graph, graph_inputs

FORMATS = ("torch", "onnx", "safetensors")
_MARKER_TEXT = (
    "This folder was written by `headrace export`, which replaces it as a whole when it is told "
    "--force.\n"
)
UNITS = "units"  # the graphs' input of units


def export_model(
    model: Model, out: Path, formats: Sequence[str], *, force: bool = False
) -> ExportResult:
    """Write the folder `out`: the model in these formats (torch, onnx, safetensors), preprocess.py,
    model.json and MODEL_CARD.md.

    Every format is loaded again, and its predictions compared with headrace's, before the folder
    appears. Raises HeadraceError if they differ or a library is missing, InvalidInput if `out`
    exists or cannot be written, and ModelError for heads that have no such form.
    force: replace the folder of an earlier export; nothing else is ever deleted.
    """
    if unknown_formats := sorted(set(formats) - set(FORMATS)):
        raise InvalidInput(
            f"format {unknown_formats[0]!r}: expected one or several of {', '.join(FORMATS)}"
        )
    _require_replaceable(out, force=force)
    if "onnx" in formats:
        _require_onnx()
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    writer_name = f".{out.name}.{driver_name()}"
    temporary_folder = out.with_name(f"{writer_name}{PARTIAL_SUFFIX}")
    # The lock tells other exports that the temporary folder is in use, and was not left by a killed
    # one.
    with driver_lock(out.parent, writer_name):
        try:
            temporary_folder.mkdir()
            exported = _write_files(model, temporary_folder, list(dict.fromkeys(formats)))
            _replace_folder(temporary_folder, out)
        except OSError as error:
            failed_path = getattr(error, "filename", None) or temporary_folder.parent
            reason = getattr(error, "strerror", None) or error
            raise InvalidInput(
                f"{failed_path}: {reason}. Nothing was written: make room, or give another folder"
            ) from error
        finally:
            shutil.rmtree(temporary_folder, ignore_errors=True)
        _remove_dead(out)
    return exported


def _remove_dead(out: Path) -> None:
    """Remove what killed exports to `out` have left beside it: their locks, and temporary folders
    that hold an export's files or nothing.
    """
    name_pattern = glob.escape(f".{out.name}.")
    for lock in out.parent.glob(f"{name_pattern}*.driver"):
        driver_lives(out.parent, lock.stem)  # removes the lock of a dead one
    living_writers = tuple(lock.stem for lock in out.parent.glob(f"{name_pattern}*.driver"))
    for leftover in out.parent.glob(f"{name_pattern}*{PARTIAL_SUFFIX}"):
        if (
            not leftover.name.startswith(living_writers)
            and leftover.is_dir()
            and (_is_export(leftover) or not any(leftover.iterdir()))
        ):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_files(model: Model, folder: Path, formats: list[str]) -> ExportResult:
    # Written first, so that even the folder of an export that was killed at once is recognized.
    (folder / EXPORT_MARKER).write_text(_MARKER_TEXT, encoding="utf-8")
    differences: dict[str, float] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns of changes in its own future versions
        if set(formats) - {"safetensors"}:
            inputs, differences = _write_graphs(model, folder, formats)
        else:
            inputs = _inputs_of(model)
        if "safetensors" in formats:
            _write_directory(model, folder)
            own_check = expected_outputs(model, inputs)
            copy_check = expected_outputs(load_model(folder, trust_code=model.trust_code), inputs)
            differences["safetensors"] = own_check.difference(copy_check.expected)
            if not differences["safetensors"] <= own_check.tolerance:  # also for NaN
                raise InvalidInput(
                    f"the copy predicts otherwise, by {differences['safetensors']:.2g}; nothing "
                    "was written"
                )
    headrace_version = importlib.metadata.version("headrace")
    rule = model.unit_rule
    unit_rule = None if rule is None else vars(rule) | {"task_kind": model.task_kind}
    preprocess_text = preprocess_file(inputs, headrace_version, model.side_columns, unit_rule)
    (folder / PREPROCESS_FILE).write_text(preprocess_text, encoding="utf-8")
    tolerance = allowed_difference(model)
    exported = ExportResult(model, tuple(inputs), differences, tolerance, fits_graph(model))
    description = {"headrace": headrace_version, "formats": formats} | _description(exported)
    if unit_rule is not None:
        description["unit"] = unit_rule
    (folder / "model.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(model_card(exported), encoding="utf-8")
    return exported


def _write_graphs(
    model: Model, folder: Path, formats: Sequence[str]
) -> tuple[list[GraphInput], dict[str, float]]:
    """Write model.pt2 and model.onnx, where the formats ask for them; return the inputs of the
    graph, and by format how far its outputs are from headrace's.
    """
    # On the evaluation crop and its symmetries: random views cannot be put into a graph.
    evaluation_model = _map_members(model, _without_random_views)
    graph = ModelGraph(evaluation_model)
    inputs, differences = graph.inputs, {}
    check = expected_outputs(evaluation_model, inputs)
    try:
        program = torch.export.export(
            graph,
            tuple(check.pixels),
            dynamic_shapes=((*({0: torch.export.Dim("n", min=1)} for _ in check.pixels),),),
            strict=False,
        )
    except Exception as error:  # torch.export raises many kinds, some of its own
        raise InvalidInput(
            f"torch.export cannot trace this network ({type(error).__name__}: {str(error)[:300]}). "
            "headrace predict works with it, and --format safetensors"
        ) from error
    if "torch" in formats:
        # Through memory, because torch's own writer ends the process if the disk is full.
        packed_program = io.BytesIO()
        torch.export.save(program, packed_program)
        (folder / "model.pt2").write_bytes(packed_program.getbuffer())
        loaded_program = torch.export.load(folder / "model.pt2").module()
        differences["torch"] = compare_outputs(
            check, lambda pixels: np.asarray(loaded_program(*pixels).numpy()), "model.pt2", model
        )
    if "onnx" in formats:
        names = [model_input.name for model_input in inputs]
        names += [SIDE_COLUMNS] if model.side_columns else []
        names += [UNITS] if model.takes_units else []
        _write_onnx(program, names, folder / "model.onnx")
        differences["onnx"] = compare_outputs(
            check, _onnx_runner(folder / "model.onnx", names), "model.onnx", model
        )
    return inputs, differences


def _description(exported: ExportResult) -> dict[str, Any]:
    """Return the fields of model.json that describe the model and its check."""
    model = exported.model
    inputs: list[dict[str, Any]] = [
        {
            "name": model_input.name,
            "dtype": model_input.preprocessing.pixel_dtype,
            "shape": ["n", *model_input.preprocessing.pixel_shape],
            "preprocessing": json.loads(model_input.preprocessing.to_json()),
        }
        for model_input in exported.inputs
    ]
    if model.side_columns:
        column_names = [name for column in model.side_columns for name in column.input_names]
        inputs.append(
            {"name": SIDE_COLUMNS, "dtype": "float32", "shape": ["n", len(column_names)]}
            | {"columns": column_names, "made_of": columns_to_json(model.side_columns)}
        )
    if model.takes_units:
        what = "equal numbers, from 0 to n - 1, for images of one unit, predicted together"
        inputs.append({"name": UNITS, "dtype": "int64", "shape": ["n"], "what": what})
    description = {
        "task_kind": model.task_kind,
        "classes": list(model.classes),
        "inputs": inputs,
        "output": {"name": "probabilities", "dtype": "float32", "shape": ["n", len(model.classes)]},
        "metrics": model.metrics,
        "tolerance": exported.tolerance,
        "differences": exported.differences,
    }
    if model.image_parts is not None:
        description["parts"] = dataclasses.asdict(model.image_parts)
    return description


def _without_random_views(member: HeadModel | NetworkModel) -> HeadModel | NetworkModel:
    if isinstance(member, NetworkModel):
        return member
    head = member.head
    exact = [index for index, feature in enumerate(head.features) if is_exact_view(feature.view)]
    features = tuple(head.features[index] for index in exact)
    backbones = tuple(head.backbones[index] for index in exact)
    return replace(member, head=replace(head, features=features, backbones=backbones))


def _map_members(
    model: Model, change: Callable[[HeadModel | NetworkModel], HeadModel | NetworkModel]
) -> Model:
    if isinstance(model, EnsembleModel):
        return replace(model, members=tuple(map(change, model.members)))
    return change(model)


def _write_onnx(program: Any, input_names: Sequence[str], path: Path) -> None:
    import onnx

    with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its progress
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(input_names),
            output_names=["probabilities"],
            external_data=False,
        )
        assert onnx_program is not None
        onnx_program.save(path, external_data=False)
    onnx.checker.check_model(str(path), full_check=True)


def _onnx_runner(path: Path, input_names: Sequence[str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(
        None, {name: value.numpy() for name, value in zip(input_names, pixels, strict=True)}
    )[0]


def _require_onnx() -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(library) is None:
            raise HeadraceError(
                f"exporting to ONNX needs the library {library}, which is not installed: pip "
                "install 'headrace[onnx]'"
            )


def _write_directory(model: Model, folder: Path) -> None:
    """Write a model directory as a run does, and into it the weights of its networks."""
    weights_files: dict[BackboneSpec, BackboneSpec] = {}
    for backbone in model.features_by_backbone:
        loaded = load_backbone(backbone)
        name = f"backbone_{len(weights_files)}.safetensors"
        tensors = {
            key: value.detach().contiguous().clone()
            for key, value in loaded.module.state_dict().items()
        }
        # Not by safetensors' save_file, which makes files that only their owner may read.
        (folder / name).write_bytes(save(tensors))
        weights_files[backbone] = spec_of_file(loaded, name)
    # From members/NAME the weights files lie two folders up.
    to_root = "../../" if isinstance(model, EnsembleModel) else ""

    def with_own_weights(member: HeadModel | NetworkModel) -> HeadModel | NetworkModel:
        if isinstance(member, NetworkModel):
            return member
        backbones = [weights_files[backbone] for backbone in member.backbones]
        fields = tuple(
            dataclasses.asdict(replace(backbone, weights=f"{to_root}{backbone.weights}"))
            for backbone in backbones
        )
        return replace(member, head=replace(member.head, backbones=fields))

    # A run names members by hashes of its results files, which mean nothing elsewhere.
    if isinstance(model, EnsembleModel):
        names = tuple(f"members/{member_index}" for member_index in range(len(model.members)))
        model = replace(model, names=names)
    _map_members(model, with_own_weights).save(folder)


def spec_of_file(loaded: Backbone, weights_file: str) -> BackboneSpec:
    """Return the spec of a network whose tensors were written to `weights_file`.

    It has the preprocessing in full: without the tag of its weights, a network would get the
    default preprocessing of the library that is installed then.
    """
    preprocessing, spec = loaded.preprocessing, loaded.spec
    if preprocessing.crop[0] == preprocessing.crop[1]:  # others have a single size of input
        spec = replace(
            spec,
            image_size=preprocessing.crop[0],
            crop_fraction=preprocessing.crop[0] / preprocessing.resize[0],
        )
    return replace(
        spec,
        weights=weights_file,
        weights_match="name",
        weights_prefix=None,
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        resize_mode=preprocessing.mode,
        pixel_range=preprocessing.pixel_range,
        bands=preprocessing.bands,
        pixel_dtype=preprocessing.pixel_dtype,
        nodata=preprocessing.nodata,
        decode=preprocessing.decode,
    )


def _inputs_of(model: Model) -> list[GraphInput]:
    preprocessings = [
        member.preprocessing for member in model.members if isinstance(member, NetworkModel)
    ]
    preprocessings += [load_backbone(spec).preprocessing for spec in model.features_by_backbone]
    return graph_inputs(preprocessings)


def _require_replaceable(out: Path, *, force: bool) -> None:
    """Raise InvalidInput if `out` must not be replaced: if it is anything but an empty folder or,
    with force, an earlier export.
    """
    if out.is_symlink():
        raise InvalidInput(f"{out} is a link: give the folder that it leads to, or another name")
    if not out.exists():
        return
    working_directory, resolved_out = Path.cwd().resolve(), out.resolve()
    # The shell that typed this would be left in a folder that is gone.
    if resolved_out == working_directory or resolved_out in working_directory.parents:
        raise InvalidInput(
            f"{out} is the working directory, or holds it: give the name of a new folder, "
            f"{out / 'model'}"
        )
    if os.path.ismount(resolved_out):  # it cannot be renamed
        raise InvalidInput(
            f"{out} is where a disk is mounted: give the name of a new folder in it, "
            f"{out / 'model'}"
        )
    if not out.is_dir():
        raise InvalidInput(f"{out} is a file: give another name, or delete it yourself")
    if not any(out.iterdir()):
        return
    if not _is_export(out):
        raise InvalidInput(
            f"{out} is a folder that headrace export did not write (it has no {EXPORT_MARKER}): it "
            f"is not replaced, not even with --force. Give another name, such as {out / 'model'}, "
            "or delete it yourself"
        )
    if not force:
        raise InvalidInput(f"{out} is there: give another name, or --force to replace it")


def _is_export(folder: Path) -> bool:
    """Return whether an export wrote the folder."""
    try:
        if (folder / EXPORT_MARKER).read_text(encoding="utf-8") == _MARKER_TEXT:
            return True
    except (OSError, ValueError):
        pass
    # Earlier versions wrote no marker, but these two files.
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        card_text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return (
        isinstance(description, dict)
        and {"headrace", "formats"} <= set(description)
        and "Written by `headrace export`." in card_text
    )


def _replace_folder(temporary_folder: Path, out: Path) -> None:
    """Move the finished folder to `out`; an earlier export there is removed after that."""
    if not out.exists():
        temporary_folder.rename(out)
        return
    # What is no export and was put there meanwhile is kept beside it under another name.
    is_replaceable = out.is_dir() and (_is_export(out) or not any(out.iterdir()))
    kept_folder = out.with_name(f"{out.name}.kept-{uuid.uuid4().hex[:8]}")
    old_folder = (
        temporary_folder.with_suffix(f".old{PARTIAL_SUFFIX}") if is_replaceable else kept_folder
    )
    out.rename(old_folder)
    try:
        temporary_folder.rename(out)
    except OSError:
        old_folder.rename(out)
        raise
    if is_replaceable:
        shutil.rmtree(old_folder)  # the only place where an export deletes anything of a user's
