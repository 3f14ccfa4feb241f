"""The recipe's section `heads`: for each kind of head the lists whose product is trained."""

from typing import Annotated, Any, Literal

import pydantic

from headrace.pipelines.recipe.values import (
    Fraction,
    NonEmptyFloats,
    NonNegative,
    Section,
    Seed,
    Share,
)

# "each": every feature set alone; "all": all of them side by side; a list: these feature sets side
# by side.
HeadInput = Literal["each", "all"] | tuple[str, ...]


class LogisticGrid(Section):
    """Logistic regression: the product of these lists."""

    # inverse strength of the L2 penalty, as in scikit-learn
    C: NonEmptyFloats = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e3)
    # balanced: every class counts the same
    class_weight: Annotated[
        tuple[Literal["none", "balanced"], ...], pydantic.Field(min_length=1)
    ] = ("none",)
    # true: each of several taps side by side has a strength of its own, in proportions found on the
    # training rows
    banded: Annotated[tuple[bool, ...], pydantic.Field(min_length=1)] = (False,)
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each", "all")


class RidgeGrid(Section):
    """Ridge classification or regression: the product of these lists."""

    # strength of the L2 penalty, as in scikit-learn
    alpha: NonEmptyFloats = (0.1, 1.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5)
    # balanced: every class counts the same
    class_weight: Annotated[
        tuple[Literal["none", "balanced"], ...], pydantic.Field(min_length=1)
    ] = ("none",)
    # true: each of several taps side by side has a strength of its own, in proportions found on the
    # training rows
    banded: Annotated[tuple[bool, ...], pydantic.Field(min_length=1)] = (False,)
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each", "all")


class HalvingSection(Section):
    """Successive halving inside a bank: after these epochs only the best share of the settings goes
    on.
    """

    # epochs after which settings are dropped
    after: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)] = (3,)
    keep: Share = 0.25  # share of the settings that goes on


class MLPGrid(Section):
    """Multi-layer perceptrons: the product of these lists."""

    # widths of the hidden layers
    hidden: Annotated[
        tuple[Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)], ...],
        pydantic.Field(min_length=1),
    ] = ((64,), (256,))
    learning_rate: NonEmptyFloats = (1e-3,)  # of AdamW
    weight_decay: Annotated[tuple[NonNegative, ...], pydantic.Field(min_length=1)] = (1e-2,)
    # share of units that is left out in training
    dropout: Annotated[tuple[Fraction, ...], pydantic.Field(min_length=1)] = (0.0, 0.5)
    label_smoothing: Annotated[tuple[Fraction, ...], pydantic.Field(min_length=1)] = (0.0,)
    # balanced: every class counts the same
    class_weight: Annotated[
        tuple[Literal["none", "balanced"], ...], pydantic.Field(min_length=1)
    ] = ("none",)
    # of the first weights and of dropout
    seed: Annotated[tuple[Seed, ...], pydantic.Field(min_length=1)] = (0,)
    batch_size: pydantic.PositiveInt = 256
    epochs: pydantic.PositiveInt = 50  # at most
    patience: pydantic.PositiveInt = 8  # epochs without improvement after which a network stops
    halving: HalvingSection | None = None  # default: every setting is trained to its end
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("all",)


class ConvGrid(Section):
    """New convolution layers and an MLP on a spatial tap (`layer3.map`): the product of these
    lists.
    """

    # of the 3 x 3 convolutions
    channels: Annotated[
        tuple[Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)], ...],
        pydantic.Field(min_length=1),
    ] = ((64,),)
    # widths of the hidden layers after the convolutions
    hidden: Annotated[
        tuple[tuple[pydantic.PositiveInt, ...], ...], pydantic.Field(min_length=1)
    ] = ((),)
    learning_rate: NonEmptyFloats = (1e-3,)  # of AdamW
    weight_decay: Annotated[tuple[NonNegative, ...], pydantic.Field(min_length=1)] = (1e-2,)
    # share of units that is left out in training
    dropout: Annotated[tuple[Fraction, ...], pydantic.Field(min_length=1)] = (0.0,)
    label_smoothing: Annotated[tuple[Fraction, ...], pydantic.Field(min_length=1)] = (0.0,)
    # balanced: every class counts the same
    class_weight: Annotated[
        tuple[Literal["none", "balanced"], ...], pydantic.Field(min_length=1)
    ] = ("none",)
    # of the first weights and of dropout
    seed: Annotated[tuple[Seed, ...], pydantic.Field(min_length=1)] = (0,)
    batch_size: pydantic.PositiveInt = 128
    epochs: pydantic.PositiveInt = 30  # at most
    patience: pydantic.PositiveInt = 6  # epochs without improvement after which a network stops
    halving: HalvingSection | None = None  # default: every setting is trained to its end
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each",)


class KNNGrid(Section):
    """k nearest neighbours: the product of these lists."""

    k: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)] = (
        1,
        5,
        20,
    )  # neighbours
    metric: Annotated[tuple[Literal["cosine", "euclidean"], ...], pydantic.Field(min_length=1)] = (
        "cosine",
    )
    # distance: nearer neighbours count more
    weighting: Annotated[
        tuple[Literal["uniform", "distance"], ...], pydantic.Field(min_length=1)
    ] = ("uniform",)
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each",)


class CentroidGrid(Section):
    """Nearest class mean."""

    metric: Annotated[tuple[Literal["cosine", "euclidean"], ...], pydantic.Field(min_length=1)] = (
        "cosine",
    )
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each",)


class SklearnGrid(Section):
    """One scikit-learn estimator by import path, with the product of its parameter lists."""

    estimator: str  # import path, such as sklearn.svm.SVC
    parameters: dict[str, tuple[Any, ...]] = pydantic.Field(
        {}
    )  # lists of values by the estimator's parameter names
    # scale features by their means and spreads on the training rows first
    standardize: bool = False
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("all",)


class Heads(Section):
    """Which heads to train. A kind that is absent is not trained."""

    logistic: LogisticGrid | None = None
    ridge: RidgeGrid | None = None
    mlp: MLPGrid | None = None
    conv: ConvGrid | None = None
    knn: KNNGrid | None = None
    centroid: CentroidGrid | None = None
    sklearn: tuple[SklearnGrid, ...] = ()

    @pydantic.model_validator(mode="after")
    def _some(self) -> "Heads":
        kinds = list(type(self).model_fields)
        if not any(getattr(self, kind) for kind in kinds):
            raise ValueError(f"no heads to train: give at least one of {', '.join(kinds)}")
        return self
