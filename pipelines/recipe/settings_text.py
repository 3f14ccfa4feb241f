"""The settings of a head in a short text, for leaderboards."""

import json

from headrace.heads.kinds import spec_from_json
from headrace.heads.spec import HeadSpec, spec_to_json
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec

# The values that most heads have; the text leaves them out.
_USUAL_VALUES = {
    "class_weight": "none",
    "standardize": True,
    "banded": False,
    "label_smoothing": 0.0,
    "seed": 0,
}
_SHORT_NAMES = {"learning_rate": "lr", "weight_decay": "wd"}


def settings_text(spec: HeadSpec) -> str:
    """Return a spec's settings as "name=value" texts, without the usual values (_USUAL_VALUES)."""
    if isinstance(spec, FineTuneSpec):
        return _network_text(spec)
    # The kind has a column of its own on leaderboards; of the others all heads of a kind have the
    # one value that the recipe gives.
    hidden_keys = {"kind", "batch_size", "epochs", "patience"}
    settings = {
        key: value
        for key, value in json.loads(spec_to_json(spec)).items()
        if key not in hidden_keys and _USUAL_VALUES.get(key) != value
    }
    return " ".join(
        f"{_SHORT_NAMES.get(key, key)}={_value_text(value)}" for key, value in settings.items()
    )


def _network_text(spec: FineTuneSpec) -> str:
    """Return which part of a network is trained, from which start, under which head."""
    head = spec_from_json(spec.head)
    head_text = f"{head.kind} {settings_text(head)}".strip()
    trained = spec.train_above
    trained_text = trained if trained in ("all", "head") else f"above {trained}"
    rate_text = f"lr={spec.learning_rate:g}"
    if spec.start == "head":
        return f"fine-tuned {trained_text} {rate_text} from {head_text}"
    if spec.start == "random" and trained == "all":
        return f"from scratch {rate_text} under {head_text}"
    return f"reused {trained_text} {spec.start} {rate_text} under new {head_text}"


def _value_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
