"""One trained head as a directory: head.safetensors with its arrays, head.json with what they mean.

Neither holds a pickle, which could run code. n rows, D features, C outputs.
"""

import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from headrace.cache.atomic_io import publish_replace, read_regular
from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import (
    SealBroken,
    check_seal,
    seal_safetensors,
    tensor_metadata,
)
from headrace.cache.spec import FeatureSpec
from headrace.heads.arrays import Array, Arrays, Floats
from headrace.heads.data.side_columns import SideColumn, columns_from_json, columns_to_json
from headrace.heads.data.task import TaskKind
from headrace.heads.errors import HeadError
from headrace.heads.kinds import HEAD_KINDS, spec_from_json
from headrace.heads.predict import predict_head
from headrace.heads.spec import HeadSpec, spec_to_json
from headrace.heads.unit_rule import UnitRule, read_unit_rule, rule_fields

FORMAT = 3  # 1 had no temperature, 2 no side columns
WEIGHTS = "head.safetensors"
DESCRIPTION = "head.json"

WRITE_AGAIN = (
    "In a run's directory, `headrace run RECIPE` writes it again, and trains nothing for that; an "
    "exported model is written again by `headrace export RUN FOLDER --format safetensors --force`, "
    "one that was copied by copying it again"
)


class CodeNotTrusted(HeadraceError, ValueError):
    """A file asks for code, or a file, that its reader has not allowed; names the option."""


@dataclass(frozen=True)
class TrainedHead:
    """A head ready to predict: what it is, what it was trained on, and its arrays."""

    spec: HeadSpec
    task_kind: TaskKind
    classes: tuple[str, ...]
    # The feature sets whose rows are concatenated, in order; views of one stand together.
    features: tuple[FeatureSpec, ...]
    metrics: dict[str, float]
    arrays: Arrays
    # The network behind each of `features`, as fields of extract's BackboneSpec; None where it is
    # not known. Without them the head predicts from features only.
    backbones: tuple[Mapping[str, Any] | None, ...] = ()
    temperature: float = 1.0  # its log-odds are divided by it; see heads/evaluate/temperature.py
    # Their inputs (`SideColumns.as_inputs`) stand behind the features.
    side_columns: tuple[SideColumn, ...] = ()
    unit_rule: UnitRule | None = None  # of a model whose images make up units
    # The boxes or tiles that it was trained on, as fields of pipelines' ImageParts.
    image_parts: Mapping[str, Any] | None = None

    def predict_proba(self, X: Array) -> Floats:
        """Return probabilities (n, C) float32 of features X (n, D), at the head's temperature.

        They are in the order of `classes`; for regression they are the values. Side columns stand
        behind the features. Of a head trained on several views, the temperature is meant for the
        mean of predictions at temperature 1.

        Raises HeadError for another number of features, and for heads that predict units.
        """
        return predict_head(self.spec, self.arrays, X, self.task_kind, self.temperature)

    def predict(self, X: Array) -> Array:
        """Return class names (n,); of multi-label heads (n, C) of 0 and 1, of regression values."""
        predicted = self.predict_proba(X)
        if self.task_kind == "single":
            return np.asarray(np.asarray(self.classes)[predicted.argmax(1)])
        return np.asarray(predicted >= 0.5, np.uint8) if self.task_kind == "multi" else predicted


def save_head(directory: Path | str, head: TrainedHead) -> Path:
    """Write head.safetensors and head.json into `directory`, replacing a head that is there.

    Returns the path of head.safetensors. Raises HeadError for a head without arrays.
    """
    if not head.arrays:
        raise HeadError(
            f"this {head.spec.kind} head has no arrays to save: save the head trained on all rows "
            "(fold REFIT)"
        )
    backbones = head.backbones or [None] * len(head.features)
    assert len(backbones) == len(head.features)
    text = json.dumps(
        {
            "format": FORMAT,
            "spec": json.loads(spec_to_json(head.spec)),
            "task_kind": head.task_kind,
            "classes": list(head.classes),
            "features": [json.loads(feature.to_json()) for feature in head.features],
            "backbones": [None if fields is None else dict(fields) for fields in backbones],
            "metrics": {name: float(value) for name, value in head.metrics.items()},
            "temperature": float(head.temperature),
            "side_columns": columns_to_json(head.side_columns),
            **rule_fields(head.unit_rule),
            **({} if head.image_parts is None else {"image_parts": dict(head.image_parts)}),
        },
        indent=2,
        sort_keys=True,
    )
    weights = Path(directory) / WEIGHTS
    weights.parent.mkdir(parents=True, exist_ok=True)
    contiguous_arrays = {name: np.ascontiguousarray(array) for name, array in head.arrays.items()}
    # First, and with the description in it: a kill before the next line leaves a whole head.
    publish_replace(weights, seal_safetensors(save(contiguous_arrays, metadata={"headrace": text})))
    publish_replace(weights.parent / DESCRIPTION, text.encode())
    return weights


def load_head(directory: Path | str, *, trust_code: Collection[str] = ()) -> TrainedHead:
    """Read what `save_head` wrote.

    A scikit-learn head names its estimator by import path, and is fitted again when it predicts.
    Estimators of scikit-learn itself whose parameters are values are loaded unasked; any other only
    if `trust_code` names it ("module:Class"). Raises HeadError, also if a byte is not the one
    that was written; CodeNotTrusted, before anything is imported.
    """
    path = Path(directory) / WEIGHTS
    if not path.exists():
        raise HeadError(
            f"{path} is not there: give the directory that save_head wrote. {WRITE_AGAIN}"
        )
    try:
        return _read_head(path, trust_code)
    except SealBroken as error:
        raise HeadError(
            f"{path} has changed since it was written: {error}. {WRITE_AGAIN}"
        ) from error
    except HeadraceError:
        raise
    # ValueError: also what is no JSON or no UTF-8. LookupError: a field that is missing.
    except (
        *(SafetensorError, LookupError, TypeError, AttributeError, ValueError),
        *(RecursionError, ArithmeticError),
    ) as error:
        raise HeadError(
            f"{path} is not a saved head ({type(error).__name__}: {error}). {WRITE_AGAIN}"
        ) from error


def _read_head(path: Path, trust_code: Collection[str]) -> TrainedHead:
    data = read_regular(path)
    check_seal(data)
    # head.json, which says the same, is for people.
    description = json.loads(tensor_metadata(data)["headrace"])
    arrays = load(data)
    if description["format"] not in (1, 2, FORMAT):
        raise HeadError(
            f"{path}: format {description['format']}, this version of headrace reads 1 to "
            f"{FORMAT}: update headrace"
        )
    spec = spec_from_json(json.dumps(description["spec"]))
    check_outputs(description["task_kind"], description["classes"])
    trusted = {code_name(name) for name in trust_code}
    require_trusted(HEAD_KINDS[spec.kind].external_code(spec), path.parent, trusted)
    features = description["features"]
    # Heads of earlier versions name no networks.
    backbones = tuple(description.get("backbones") or [None] * len(features))
    if len(backbones) != len(features):
        raise ValueError(f"it names {len(backbones)} networks for {len(features)} feature sets")
    return TrainedHead(
        spec=spec,
        task_kind=cast(TaskKind, description["task_kind"]),
        classes=tuple(description["classes"]),
        features=tuple(FeatureSpec.from_json(json.dumps(feature)) for feature in features),
        metrics={name: float(value) for name, value in description["metrics"].items()},
        arrays=arrays,
        backbones=backbones,
        temperature=check_temperature(description.get("temperature", 1.0)),
        side_columns=columns_from_json(description.get("side_columns", [])),
        unit_rule=read_unit_rule(description),
        image_parts=description.get("image_parts"),
    )


def check_temperature(value: object) -> float:
    """Return the temperature that a model's file names.

    Raises ValueError unless float32 log-odds can be divided by it.
    """
    temperature = float(cast(Any, value))
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(
            f"its temperature is {temperature}, expected a number above 0, from 1e-6 to 1e6"
        )
    return temperature


def check_outputs(task_kind: object, classes: object) -> None:
    """Raise ValueError unless a model's file names a kind of task, and a list of classes."""
    if task_kind not in get_args(TaskKind):
        raise ValueError(
            f"its task is {task_kind!r}, expected one of {', '.join(get_args(TaskKind))}"
        )
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"its classes are {str(classes)[:60]}, expected a list of names")


def require_trusted(code: str | None, place: Path, trusted: Collection[str]) -> None:
    """Raise CodeNotTrusted unless `code`, as `code_name` writes it, is trusted or None.

    place: the model that asks for it.
    """
    if code is None or code in trusted:
        return
    raise CodeNotTrusted(
        f"{place} asks for code: {code} would be imported and called in this process, and could do "
        "whatever you can: read, change and send files. Nothing was imported. If you know that "
        f"code and where the model comes from, type: --trust-code {shlex.quote(code)} (in Python: "
        f"trust_code=[{code!r}])"
    )


def code_name(name: str) -> str:
    """Return the "module:Class" of an import path "module.Class".

    Other names are returned as they are: one that has the colon, a path with slashes, a call with
    its arguments.
    """
    if ":" in name or "/" in name or "." not in name:
        return name
    module, _, object_name = name.rpartition(".")
    return f"{module}:{object_name}"
