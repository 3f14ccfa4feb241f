"""Perceptron and convolution heads: their settings, and what banks ask of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Ge, Gt, Lt, MinLen

from headrace.heads.arrays import Arrays, Floats
from headrace.heads.data.task import TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.kind import FitOptions, HeadKind
from headrace.heads.layers import Layers, dense_layers, predict_by_layers
from headrace.heads.spec import ClassWeight, FitResult, HeadSpec, check_choices

# Of all networks, heads on bags included: AdamW's own default. Measured with MLPs on held-out rows
# of digits, wine, breast_cancer and two made sets, 10 draws of each, hidden 64 and 256, dropout 0
# and 0.5: from 0 to 1e-2 accuracies differ by 0.01 points; 1e-1 and 1 lose up to 0.1 points and
# 0.03 nats.
WEIGHT_DECAY = 1e-2
# Seconds of one core for each weight, row and epoch of training.
_SECONDS_PER_WEIGHT = 3.6e-11

# The axes of a recipe's section that every kind of network has.
NETWORK_AXES = (
    "hidden",
    "learning_rate",
    "weight_decay",
    "dropout",
    "label_smoothing",
    "class_weight",
    "seed",
)


# Those that are numbers without an upper end.
OPEN_ENDED = ("learning_rate", "weight_decay")


class NetworkSpec(HeadSpec, Protocol):
    """The settings that every kind of network has; `MLPSpec` explains them."""

    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def class_weight(self) -> ClassWeight: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class MLPSpec:
    """Multi-layer perceptron, by AdamW on standardized features, stopped by validation."""

    # widths of the hidden layers
    hidden: tuple[Annotated[int, Gt(0)], ...] = (256,)
    # of AdamW
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = WEIGHT_DECAY
    # share of units that is left out in training
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    # balanced: every class counts the same
    class_weight: ClassWeight = "none"
    batch_size: Annotated[int, Gt(0)] = 256
    # at most
    epochs: Annotated[int, Gt(0)] = 50
    # epochs without improvement after which a network stops
    patience: Annotated[int, Gt(0)] = 8
    # of the first weights and of dropout
    seed: Annotated[int, Ge(0)] = 0
    standardize: bool = True
    kind: Literal["mlp"] = "mlp"

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class ConvSpec:
    """New convolution layers and an MLP, from random weights, on a spatial tap (D, h, w).

    Each convolution is 3 × 3, stride 1, with batch normalization and ReLU; then the mean over
    positions, then the MLP. Trained and stopped as MLPSpec says.
    """

    # of the 3 x 3 convolutions
    channels: Annotated[tuple[Annotated[int, Gt(0)], ...], MinLen(1)] = (64,)
    # widths of the hidden layers after the convolutions
    hidden: tuple[Annotated[int, Gt(0)], ...] = ()
    # of AdamW
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = WEIGHT_DECAY
    # share of units that is left out in training
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    # balanced: every class counts the same
    class_weight: ClassWeight = "none"
    batch_size: Annotated[int, Gt(0)] = 128
    # at most
    epochs: Annotated[int, Gt(0)] = 30
    # epochs without improvement after which a network stops
    patience: Annotated[int, Gt(0)] = 6
    # of the first weights and of dropout
    seed: Annotated[int, Ge(0)] = 0
    kind: Literal["conv"] = "conv"

    def __post_init__(self) -> None:
        check_choices(self)


def fit_mlp(data: TrainingData, specs: Sequence[Any], options: FitOptions) -> list[FitResult]:
    """Train a bank of perceptrons. Torch is imported here, when a bank is trained."""
    import torch

    from headrace.heads.networks.mlp import fit_mlp_bank

    if options.n_threads is not None:
        torch.set_num_threads(options.n_threads)
    return fit_mlp_bank(
        data, specs, refit=options.refit, device=options.device, halving=options.halving
    )


def fit_conv(data: TrainingData, specs: Sequence[Any], options: FitOptions) -> list[FitResult]:
    """Train a bank of convolution heads."""
    import torch

    from headrace.heads.networks.conv import fit_conv_bank

    if options.n_threads is not None:
        torch.set_num_threads(options.n_threads)
    return fit_conv_bank(
        data, specs, refit=options.refit, device=options.device, halving=options.halving
    )


def mlp_layers(spec: MLPSpec, arrays: Arrays) -> Layers:
    """Return the layers of a perceptron."""
    return Layers(dense_layers(arrays, len(spec.hidden)), dropout=spec.dropout)


def conv_layers(spec: ConvSpec, arrays: Arrays) -> Layers:
    """Return the layers of a convolution head."""
    return Layers(
        dense_layers(arrays, len(spec.hidden)),
        tuple((arrays[f"kernel{i}"], arrays[f"shift{i}"]) for i in range(len(spec.channels))),
        arrays["mean"],
        arrays["inverse_scale"],
        dropout=spec.dropout,
    )


def predict_conv(
    spec: ConvSpec, arrays: Arrays, X: Floats, task_kind: TaskKind, temperature: float
) -> Floats:
    """Return (n, C) predictions of maps X (n, channels, h, w)."""
    from headrace.heads.networks.conv import predict_maps

    return predict_maps(conv_layers(spec, arrays), X, task_kind, temperature)


def network_cost(
    spec: Any, n_rows: int, n_features: int, n_outputs: int, n_fits: int
) -> tuple[float, float]:
    """Estimate the seconds of shared work of a bank (none) and of the products of a network."""
    width = sum(spec.hidden) + n_outputs
    if isinstance(spec, ConvSpec):
        # A 3 × 3 convolution multiplies each feature nine times for each of its channels.
        width += 9 * spec.channels[0]
    return 0.0, n_fits * _SECONDS_PER_WEIGHT * n_rows * n_features * spec.epochs * width


MLP = HeadKind(
    name="mlp",
    summary="Multi-layer perceptrons",
    spec=MLPSpec,
    fit=fit_mlp,
    predict=predict_by_layers(mlp_layers),
    cost=network_cost,
    axes=NETWORK_AXES,
    fixed=("batch_size", "epochs", "patience"),
    open_ended=OPEN_ENDED,
    grid={"hidden": ((64,), (256,)), "dropout": (0.0, 0.5)},
    inputs=("all",),
    layers=mlp_layers,
    input_array="weight0",
    uses_gpu=True,
    takes_views=True,
    takes_side_columns=True,
    can_halve=True,
)

CONV = HeadKind(
    name="conv",
    summary="New convolution layers and an MLP on a spatial tap (`layer3.map`)",
    spec=ConvSpec,
    fit=fit_conv,
    predict=predict_conv,
    cost=network_cost,
    axes=("channels", *NETWORK_AXES),
    fixed=("batch_size", "epochs", "patience"),
    open_ended=OPEN_ENDED,
    layers=conv_layers,
    input_array="kernel0",
    uses_gpu=True,
    spatial=True,
    takes_views=True,
    can_halve=True,
)
