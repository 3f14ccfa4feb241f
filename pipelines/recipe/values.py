"""Types of the recipe's values: numbers in ranges, and sections that refuse unknown keys."""

from typing import Annotated

import pydantic

Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, pydantic.Field(ge=0)]
NonEmptyFloats = Annotated[tuple[Positive, ...], pydantic.Field(min_length=1)]


def check_views(value: object) -> object:
    """Return a backbone's views. Raises ValueError for other values than a number or known word."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 64
    if is_count or value in ("flips", "dihedral"):
        return value
    raise ValueError(
        "views is a whole number from 1 to 64, or flips (the crop and its mirror images), or "
        "dihedral (quarter turns too)"
    )


def as_texts(value: object) -> object:
    """Return a mapping with its keys and values as text: YAML reads `-1: 0` as numbers. None and
    whatever is no mapping stay.
    """
    if not isinstance(value, dict):
        return value
    return {
        str(key): content if content is None else str(content) for key, content in value.items()
    }


class Section(pydantic.BaseModel):
    """The base class of a recipe's sections: immutable, and unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
