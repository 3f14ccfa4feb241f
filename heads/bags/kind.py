"""Heads on bags of images: their settings, and what banks ask of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from headrace.heads.arrays import Array, Arrays, Floats
from headrace.heads.data.task import TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.errors import HeadError
from headrace.heads.kind import FitOptions, HeadKind
from headrace.heads.networks.kind import NETWORK_AXES, OPEN_ENDED, WEIGHT_DECAY
from headrace.heads.spec import ClassWeight, FitResult, check_choices


@dataclass(frozen=True)
class BagsSpec:
    """One prediction for all images of a unit: each image goes through hidden layers, what comes
    out is pooled over the unit, and a linear layer decides.

    attention: gated attention pooling (ABMIL; Ilse, Tomczak and Welling 2018, equation 9): the mean
    of the images' hidden values h, weighted by the softmax, over the unit, of
    w' (tanh(V h) * sigmoid(U h)). mean, max: of each hidden value over the unit.
    Trained by AdamW, by default on standardized features, and stopped early by the loss of the
    units of its validation fold.
    """

    pooling: Literal["attention", "mean", "max"] = "attention"
    # widths of the hidden layers that each image goes through before pooling; none: its features
    hidden: tuple[Annotated[int, Gt(0)], ...] = (64,)
    # rows of V and of U; of no use to mean and max
    attention_width: Annotated[int, Gt(0)] = 32
    # of AdamW
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = WEIGHT_DECAY
    # share of hidden values that is left out in training
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    # balanced: every class counts the same
    class_weight: ClassWeight = "none"
    # units of a step
    batch_size: Annotated[int, Gt(0)] = 16
    # at most
    epochs: Annotated[int, Gt(0)] = 50
    # epochs without improvement after which a network stops
    patience: Annotated[int, Gt(0)] = 8
    # of the first weights and of dropout
    seed: Annotated[int, Ge(0)] = 0
    standardize: bool = True
    kind: Literal["bags"] = "bags"

    def __post_init__(self) -> None:
        check_choices(self)


def fit_bags(data: TrainingData, specs: Sequence[Any], options: FitOptions) -> list[FitResult]:
    """Train a bank. Torch is imported here, when a bank is trained."""
    import torch

    from headrace.heads.bags.bank import fit_bags_bank

    if options.n_threads is not None:
        torch.set_num_threads(options.n_threads)
    return fit_bags_bank(
        data, specs, refit=options.refit, device=options.device, halving=options.halving
    )


def predict_rows(
    spec: BagsSpec, arrays: Arrays, X: Floats, task_kind: TaskKind, temperature: float
) -> Floats:
    """Raise HeadError: a row says nothing without the others of its unit."""
    raise HeadError(
        "a head of kind bags predicts units of several images: give the unit of each row "
        "(unit=[...])"
    )


def predict_bags(
    spec: Any, arrays: Arrays, X: Floats, unit: Array, task_kind: TaskKind, temperature: float
) -> tuple[Floats, Floats]:
    """Return predictions (n, C) of the units of rows X (n, D), and the weights (n,) of rows."""
    from headrace.heads.bags.pooling import predict_units

    return predict_units(spec, arrays, X, unit, task_kind, temperature)


def bags_cost(
    spec: BagsSpec, n_rows: int, n_features: int, n_outputs: int, n_fits: int
) -> tuple[float, float]:
    """Estimate the seconds of shared work of a bank (none) and of the products of a network."""
    width = sum(spec.hidden) + 2 * spec.attention_width * (spec.pooling == "attention") + n_outputs
    return 0.0, n_fits * 5e-11 * n_rows * n_features * spec.epochs * width


BAGS = HeadKind(
    name="bags",
    summary="One prediction for all images of a unit, by pooling (needs `task.unit`)",
    spec=BagsSpec,
    fit=fit_bags,
    predict=predict_rows,
    cost=bags_cost,
    axes=("pooling", "attention_width", *NETWORK_AXES),
    fixed=("batch_size", "epochs", "patience"),
    open_ended=OPEN_ENDED,
    grid={"pooling": ("attention", "mean"), "dropout": (0.0, 0.5)},
    inputs=("all",),
    input_array="weight0",
    uses_gpu=True,
    can_halve=True,
    predict_units=predict_bags,
)
