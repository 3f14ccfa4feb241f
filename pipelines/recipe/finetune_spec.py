"""The settings of a fine-tuned network: one combination of those in the recipe's `finetune:`."""

import json
from dataclasses import dataclass
from typing import Literal

from headrace.heads.kinds import spec_from_json
from headrace.heads.spec import ClassWeight, HeadSpec, check_choices


@dataclass(frozen=True)
class FineTuneSpec:
    """A head that is trained together with the part of its backbone that `train_above` names.

    start "head" is fine-tuning: the trained head on the pretrained backbone. "pretrained" and
    "random" are partial reuse: a new head, and above the node the pretrained parameters or random
    ones; "random" with train_above "all" is training from scratch. The learning rate of the head
    and the top block is `learning_rate`, that of each block below `layer_decay` times that of the
    block above; linear warm-up, then a half cosine to zero (AdamW, Loshchilov and Hutter 2019).
    """

    head: str  # canonical JSON of the spec of the head on top
    train_above: str  # "head", "all", or a node of the network: everything above it trains
    start: Literal["head", "pretrained", "random"] = "head"
    learning_rate: float = 3e-4
    layer_decay: float = 0.7
    weight_decay: float = 1e-2
    warmup_fraction: float = 0.1  # share of all steps
    epochs: int = 10
    patience: int = 4  # epochs without a better validation loss
    batch_size: int = 32
    label_smoothing: float = 0.0
    class_weight: ClassWeight = "none"
    dropout: float = 0.0  # before the head
    grad_clip_norm: float = 1.0  # the largest norm of the gradient
    batch_norm: Literal["frozen", "trainable"] = "frozen"  # the running statistics of the backbone
    # left-right; also upside-down; random renderings
    augment: Literal["none", "flip", "flips", "views"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    kind: Literal["finetune"] = "finetune"

    def __post_init__(self) -> None:
        check_choices(self)


def model_spec(text: str) -> HeadSpec:
    """Return the spec of a leaderboard's row, a head or a network, from the JSON of `spec_to_json`.

    Raises KeyError for an unknown kind, TypeError for unknown fields.
    """
    values = json.loads(text)
    return FineTuneSpec(**values) if values["kind"] == "finetune" else spec_from_json(text)
