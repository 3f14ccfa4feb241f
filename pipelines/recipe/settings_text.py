"""The settings of a head as a person would say them."""

import json

from headrace.heads.kinds import spec_from_json
from headrace.heads.spec import FineTuneSpec, HeadSpec, spec_to_json


def settings_text(spec: HeadSpec) -> str:
    """Return a spec as a person would say it: what differs from the kind's defaults."""
    if isinstance(spec, FineTuneSpec):
        return _network_text(spec)
    values = json.loads(spec_to_json(spec))
    usual = {
        "class_weight": "none",
        "standardize": True,
        "banded": False,
        "label_smoothing": 0.0,
        "seed": 0,
    }
    hidden = {"kind", "batch_size", "epochs", "patience"}
    shown = {
        key: value for key, value in values.items() if key not in hidden and usual.get(key) != value
    }
    short = {"learning_rate": "lr", "weight_decay": "wd"}
    return " ".join(f"{short.get(key, key)}={_value_text(value)}" for key, value in shown.items())


def _network_text(spec: FineTuneSpec) -> str:
    """Return what of a network trains, from which start, under which head."""
    head = spec_from_json(spec.head)
    under = f"{head.kind} {settings_text(head)}".strip()
    where = spec.train_above if spec.train_above in ("all", "head") else f"above {spec.train_above}"
    if spec.start == "head":
        return f"fine-tuned {where} lr={spec.learning_rate:g} from {under}"
    if spec.start == "random" and spec.train_above == "all":
        return f"from scratch lr={spec.learning_rate:g} under {under}"
    return f"reused {where} {spec.start} lr={spec.learning_rate:g} under new {under}"


def _value_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
