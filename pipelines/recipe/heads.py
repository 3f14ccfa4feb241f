"""The recipe's section `heads`: for each kind of head lists of settings, whose product is trained.

A kind's section is derived from the fields of its spec (see `heads/kind.py`), so that defaults,
ranges and comments are written once.
"""

import dataclasses
import itertools
import json
import typing
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from headrace.heads.kind import HeadKind
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.sklearn.kind import SKLEARN, SklearnSpec
from headrace.heads.spec import HeadSpec
from headrace.pipelines.recipe.values import Section, Share

# "each": every feature set alone; "all": all of them side by side; a list: these feature sets side
# by side.
HeadInput = Literal["each", "all"] | tuple[str, ...]


class HalvingSection(Section):
    """Successive halving in a bank: after these epochs the best share of settings goes on."""

    # epochs after which settings are dropped
    after: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)] = (3,)
    keep: Share = 0.25  # share of the settings that goes on


class HeadGrid(Section):
    """The base class of the sections of all kinds."""

    model_config = pydantic.ConfigDict(allow_inf_nan=False)

    head_kind: ClassVar[HeadKind]

    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each",)

    def spec_banks(self) -> Iterator[list[HeadSpec]]:
        """Yield the product of the lists in banks: for a kind with a regularization path one bank
        per path, for other kinds a single bank.
        """
        kind = self.head_kind
        fixed = {name: getattr(self, name) for name in kind.fixed}
        values = {axis: tuple(dict.fromkeys(getattr(self, axis))) for axis in kind.axes}
        # In order: each solution of a regularization path starts from its neighbour's.
        path_values = sorted(values.pop(kind.path_axis)) if kind.path_axis else [None]
        products = [
            dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
        ]
        if kind.path_axis is None:
            yield [kind.spec(**settings, **fixed) for settings in products]
            return
        for settings in products:
            yield [
                kind.spec(**{kind.path_axis: value}, **settings, **fixed) for value in path_values
            ]


class HalvingGrid(HeadGrid):
    """The base class of sections whose banks can stop specs early."""

    # default: every setting is trained to its end
    halving: HalvingSection | None = None


class SklearnGrid(HeadGrid):
    """One scikit-learn estimator by import path, with the product of its parameter lists."""

    head_kind = SKLEARN

    estimator: str  # import path, such as sklearn.svm.SVC
    # lists of values by the estimator's parameter names
    parameters: dict[str, tuple[Any, ...]] = pydantic.Field({})
    # scale features by their means and spreads on the training rows first
    standardize: bool = False
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("all",)

    def spec_banks(self) -> Iterator[list[HeadSpec]]:
        """Yield each combination of the parameters as a bank of its own."""
        for chosen in itertools.product(*self.parameters.values()):
            parameters = json.dumps(dict(zip(self.parameters, chosen, strict=True)), sort_keys=True)
            yield [SklearnSpec(self.estimator, parameters, self.standardize)]


def grid_section(kind: HeadKind) -> type[HeadGrid]:
    """Return the section of a kind: a list for each of its axes, a value for each fixed setting."""
    hints = typing.get_type_hints(kind.spec, include_extras=True)
    defaults = {field.name: field.default for field in dataclasses.fields(kind.spec)}
    fields: dict[str, Any] = {}
    for axis in kind.axes:
        # This is `tuple[hints[axis], ...]`, which type checkers refuse for a computed type.
        values: Any = tuple.__class_getitem__((hints[axis], ...))
        default = kind.grid.get(axis, (defaults[axis],))
        fields[axis] = Annotated[values, pydantic.Field(min_length=1)], default
    for name in kind.fixed:
        fields[name] = hints[name], defaults[name]
    fields["inputs"] = tuple[HeadInput, ...], kind.inputs
    section = pydantic.create_model(
        f"{kind.name.capitalize()}Grid",
        __base__=HalvingGrid if kind.can_halve else HeadGrid,
        __doc__=f"{kind.summary}: the product of these lists.",
        **fields,
    )
    section.head_kind = kind
    return section


HEAD_GRIDS: dict[str, type[HeadGrid]] = {
    name: SklearnGrid if kind is SKLEARN else grid_section(kind)
    for name, kind in HEAD_KINDS.items()
}

_fields: dict[str, Any] = {name: (section | None, None) for name, section in HEAD_GRIDS.items()}
_fields[SKLEARN.name] = tuple[SklearnGrid, ...], ()
_Sections: Any = pydantic.create_model("_Sections", __base__=Section, **_fields)


class Heads(_Sections):  # type: ignore[misc]
    """Which heads to train. A kind that is absent is not trained."""

    def grids(self) -> Iterator[HeadGrid]:
        """Yield the sections that are given; of `sklearn`, one for each estimator."""
        for name in HEAD_KINDS:
            section = getattr(self, name)
            if isinstance(section, tuple):
                yield from section
            elif section is not None:
                yield section

    @pydantic.model_validator(mode="after")
    def _at_least_one_kind(self) -> "Heads":
        if not any(self.grids()):
            raise ValueError(
                f"no heads to train: give at least one of {', '.join(HEAD_KINDS)}, with settings "
                "or with {} for its default ones"
            )
        return self
