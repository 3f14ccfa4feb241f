"""`HeadKind`, the description of a kind of head: its settings, tasks, training and prediction.

Every kind is one value of it in a folder of its own; `heads/kinds.py` lists them. n rows, D
features, C outputs, V views.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.heads.arrays import Array, Arrays, Floats
from headrace.heads.data.task import TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.layers import Layers
from headrace.heads.spec import FitResult, Halving

# Name of an array of heads that predict units: the weight of each held-out row in its unit, (n,).
INSTANCE_WEIGHT = "instance_weight"


@dataclass(frozen=True)
class FitOptions:
    """How a bank is trained, apart from its rows and settings."""

    refit: bool = True  # also train each spec on all rows
    device: str = "cpu"
    n_threads: int | None = 1  # None: torch's current number
    halving: Halving | None = None


# (data, specs, options) -> the heads of every fold, ordered by spec, then fold, REFIT last.
FitBank = Callable[[TrainingData, Sequence[Any], FitOptions], list[FitResult]]
# (spec, arrays, X, task_kind, temperature) -> probabilities, or values of a regression, (n, C)
# float32. X: (n, D), or maps (n, channels, h, w) for a spatial kind.
Predict = Callable[[Any, Arrays, Floats, TaskKind, float], Floats]
# (spec, n_rows, n_features, n_outputs, n_fits) -> estimated core-seconds: of a bank for any number
# of specs, and added by this spec. n_fits: folds, and one more for the heads trained on all rows.
# Small constants in them are core-seconds per multiplication, or per weight of a head.
Cost = Callable[[Any, int, int, int, int], tuple[float, float]]
# (spec, arrays, X, unit, task_kind, temperature) -> the prediction of each row's unit, (n, C)
# float32, and the row's weight in it, (n,). X: (n, D). unit: (n,) labels.
PredictUnits = Callable[[Any, Arrays, Floats, Array, TaskKind, float], tuple[Floats, Floats]]


@dataclass(frozen=True)
class HeadKind:
    """One kind of head.

    Its section of a recipe is derived from the fields of `spec`: a list of values for each of
    `axes`, one value for each of `fixed`. The default is the spec's, unless `grid` has a list.
    """

    name: str  # in recipes, results and on leaderboards; also the spec's `kind`
    summary: str  # title of its section of a recipe, without a full stop
    spec: type[Any]  # a frozen dataclass, see `HeadSpec`
    fit: FitBank
    predict: Predict
    cost: Cost
    axes: tuple[str, ...]  # fields of the spec that a recipe's grid varies, outermost first
    fixed: tuple[str, ...] = ()
    # Numeric settings of which a grid can be extended at either end: a note says where the winner
    # lies at one.
    open_ended: tuple[str, ...] = ()
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # Heads that differ only in this axis share work: a bank has its values in ascending order, and
    # each combination of the other axes has banks of its own.
    path_axis: str | None = None
    # A recipe's default for `inputs`: every tap alone ("each"), all taps side by side ("all").
    inputs: tuple[str, ...] = ("each",)
    tasks: tuple[TaskKind, ...] = ("single", "multi", "regression")
    # The head as layers through which gradients pass; None for other heads.
    layers: Callable[[Any, Arrays], Layers] | None = None
    # The array of a head whose second axis has the features that it reads, or a map's channels.
    input_array: str = "weight"
    copies_of_features: int = 1  # memory that a bank takes, as a multiple of its features
    uses_gpu: bool = False  # trains on the job's device
    spatial: bool = False  # takes maps, not vectors
    streams: bool = True  # takes rows that stay on disk
    # Takes (V, N, D) views as they are; other kinds train on each view as a row of its own.
    takes_views: bool = False
    takes_side_columns: bool = False  # scales and imputes them by each fold's training rows
    # For kinds that predict the rows of a unit together.
    predict_units: PredictUnits | None = None
    can_halve: bool = False  # a recipe may ask for successive halving of its specs
    # Whether the probabilities of this spec's heads are shares of votes, of which 0 says little.
    counts_votes: Callable[[Any], bool] = lambda spec: False
    # The "module:class" that a head of this spec imports and calls; None for headrace's own code.
    external_code: Callable[[Any], str | None] = lambda spec: None

    @property
    def takes_units(self) -> bool:
        """Whether this kind predicts the rows of a unit together."""
        return self.predict_units is not None

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass through heads of this kind."""
        return self.layers is not None
