"""What a kind of head is: its settings, the tasks that it serves, how it is trained and predicts.

Every kind is one value of `HeadKind` in a folder of its own; `heads/kinds.py` lists them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.layers import Arrays, Floats, Layers
from headrace.heads.spec import FitResult, Halving

# Of a fold's head of a kind that takes units: (n_held_out,) what each row weighs in its unit.
INSTANCE_WEIGHT = "instance_weight"

ALL_TASKS: tuple[TaskKind, ...] = ("single", "multi", "regression")


class CannotPredict(HeadraceError, ValueError):
    """The head has no arrays to predict from, or was trained on other features."""


@dataclass(frozen=True)
class FitOptions:
    """How a bank is trained, apart from its rows and settings."""

    refit: bool = True  # also train each spec on all rows
    device: str = "cpu"
    n_threads: int | None = 1  # None: as torch has it
    halving: Halving | None = None


class FitBank(Protocol):
    """Train specs of one kind on every fold; heads come spec by spec, REFIT last."""

    def __call__(
        self, data: TrainingData, specs: Sequence[Any], options: FitOptions
    ) -> list[FitResult]: ...


class Predict(Protocol):
    """(n, C) float32 probabilities, for regression values, at a temperature.

    X: (n, D), or maps (n, channels, h, w) where the kind is spatial.
    """

    def __call__(
        self, spec: Any, arrays: Arrays, X: Floats, task_kind: TaskKind, temperature: float
    ) -> Floats: ...


class Cost(Protocol):
    """Assumed core-seconds that a bank takes whatever its specs, and that each spec adds.

    n_fits: folds, and one more for the heads trained on all rows.
    """

    def __call__(
        self, spec: Any, n_rows: int, n_features: int, n_outputs: int, n_fits: int
    ) -> tuple[float, float]: ...


class PredictUnits(Protocol):
    """(n, C) float32 predictions of rows X (n, D), each with that of its unit, and (n,) what each
    row weighs in it. unit: (n,) labels.
    """

    def __call__(
        self,
        spec: Any,
        arrays: Arrays,
        X: Floats,
        unit: npt.NDArray[Any],
        task_kind: TaskKind,
        temperature: float,
    ) -> tuple[Floats, Floats]: ...


def _never(spec: Any) -> bool:
    return False


def _no_code(spec: Any) -> str | None:
    return None


@dataclass(frozen=True)
class HeadKind:
    """One kind of head.

    Its section of a recipe is derived from the fields of `spec`: a list for each of `axes`, one
    value for each of `fixed`. A default is the spec's own, unless `grid` has a list for the field.
    """

    name: str  # in recipes, results and on leaderboards; also the spec's `kind`
    summary: str  # of a recipe's section, without a full stop
    spec: type[Any]  # a frozen dataclass, see `HeadSpec`
    fit: FitBank
    predict: Predict
    cost: Cost
    axes: tuple[str, ...]  # outermost first
    fixed: tuple[str, ...] = ()
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # Heads that differ in this axis alone share their work: a bank holds all its values, ascending,
    # and each combination of the others has banks of its own.
    path_axis: str | None = None
    # A recipe's default for `inputs`: every tap alone, all taps side by side, or both.
    inputs: tuple[str, ...] = ("each",)
    tasks: tuple[TaskKind, ...] = ALL_TASKS
    # The head as layers that gradients pass through; None where none do.
    layers: Callable[[Any, Arrays], Layers] | None = None
    copies_of_features: int = 1  # memory that a bank takes, as a multiple of its features
    uses_gpu: bool = False  # its products run on the job's device
    spatial: bool = False  # takes maps, not vectors
    streams: bool = True  # takes rows that stay on disk
    # Takes (V, N, D) views as they are; other kinds train on each view as a row of its own.
    takes_views: bool = False
    takes_side_columns: bool = False  # scales and imputes side columns by each fold's training rows
    # Prediction of kinds that take the rows of a unit together.
    predict_units: PredictUnits | None = None
    can_halve: bool = False  # a recipe may ask for successive halving of its specs
    # Whether probabilities of this spec's heads are counts of votes, in which 0 means little.
    counts_votes: Callable[[Any], bool] = _never
    # The "module:class" that a head of this spec imports and calls; None for code of ours alone.
    external_code: Callable[[Any], str | None] = _no_code

    @property
    def takes_units(self) -> bool:
        """Whether it predicts the rows of a unit together."""
        return self.predict_units is not None

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass through its heads."""
        return self.layers is not None
