"""What every kind of head shares: the form of its settings, and the result of training.

The settings of a kind are in its own folder: `LogisticSpec` in heads/linear/kind.py. D features, C
outputs.
"""

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from headrace.heads.arrays import Arrays, Floats

ClassWeight = Literal["none", "balanced"]


def check_choices(spec: Any) -> None:
    """Raise ValueError, naming the field, if a field of a spec has none of its Literal's values.

    A misspelt class weight would be no class weight otherwise.
    """
    for name, choices in _choices(type(spec)).items():  # type: ignore[arg-type]  # classes are hashable
        found = getattr(spec, name)
        if found not in choices:
            wanted = " or ".join(map(repr, choices))
            raise ValueError(f"{name} of a {type(spec).__name__} is {found!r}; write {wanted}")


@functools.cache
def _choices(kind: type) -> dict[str, tuple[object, ...]]:
    """Return the values that each Literal field of a spec may have."""
    hints = typing.get_type_hints(kind)
    return {
        name: typing.get_args(hint)
        for name, hint in hints.items()
        if typing.get_origin(hint) is Literal
    }


class HeadSpec(Protocol):
    """Settings of one head: a frozen dataclass of values that JSON can hold."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def kind(self) -> str:
        """The name of the head's `HeadKind`."""


@dataclass(frozen=True)
class Halving:
    """Successive halving: after each epoch of `after` only the best share `keep` of specs goes on.

    Specs are ranked by the mean over folds of their best validation accuracy so far; in multi-label
    tasks and regression by their loss.
    """

    after: tuple[int, ...] = (3,)
    keep: float = 0.25

    def __post_init__(self) -> None:
        if (
            not 0 < self.keep <= 1
            or any(epoch < 1 for epoch in self.after)
            or list(self.after) != sorted(set(self.after))
        ):
            raise ValueError(
                f"halving needs rising epochs from 1 on and a share in (0, 1], found {self.after} "
                f"and {self.keep}"
            )


def spec_to_json(spec: HeadSpec) -> str:
    """Return canonical JSON: sorted keys, no white space. Equal specs give equal text."""
    return json.dumps(dataclasses.asdict(spec), sort_keys=True, separators=(",", ":"))


def specs_by(specs: Sequence[HeadSpec], *fields: str) -> dict[tuple[Any, ...], list[int]]:
    """Return the positions of specs, by their values of these fields."""
    positions: dict[tuple[Any, ...], list[int]] = {}
    for i, spec in enumerate(specs):
        positions.setdefault(tuple(getattr(spec, field) for field in fields), []).append(i)
    return positions


def relative_gap(objective: float, gap_bound: float) -> float:
    """Return a bound on (objective - optimum) / optimum from one on objective - optimum."""
    # Relative to a lower bound of the optimum, so that the bound stays one.
    if objective > gap_bound:
        return gap_bound / (objective - gap_bound)
    return 0.0 if gap_bound == 0 else math.inf


@dataclass(frozen=True)
class FitResult:
    """One trained head.

    `arrays` is all that prediction needs besides the spec; a failed head has an `error`.
    """

    spec: HeadSpec
    fold: int  # the fold held out of its training; REFIT: none
    # of linear heads weight (C, D) and bias (C,), float32, for raw features
    arrays: Arrays = field(default_factory=dict)
    objective: float = math.nan  # of the training rows, in the spec's own terms, float64
    gap: float = math.nan  # a bound on (objective - optimum) / optimum, if one is known
    iterations: int = 0  # solver iterations, or epochs
    seconds: float = 0.0  # this head's share of the bank's wall time
    # (n_held_out, C) probabilities (regression: values), rows in task order
    validation: Floats | None = None
    error: str | None = None
