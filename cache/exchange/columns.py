"""Columns of a table of other programs: which of them are features, as the user names them."""

import difflib
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from headrace.cache.errors import ExternalFeaturesInvalid

# What pandas calls the column of its index when it reads it back, from CSV ("" in the file) and
# from Parquet.
_UNNAMED = re.compile(r"(Unnamed: \d+(_level_\d+)?|__index_level_\d+__|)\Z")
_SHOWN = 12


@dataclass(frozen=True)
class FeatureColumns:
    """The names of the values of a row, where they have been columns of a table; none for arrays
    and lists.
    """

    chosen: tuple[str, ...] = ()
    table: tuple[str, ...] = ()  # all columns of the table, in its order

    def describe(self, number: int) -> str:
        """A value of each row, for the beginning of a sentence."""
        return (
            f"the column {self.chosen[number]!r}"
            if self.chosen
            else f"value {number} of each row (the first is 0)"
        )

    def leave_out(self, numbers: Collection[int]) -> str:
        """What to do about values that are no features, with the option for those that are left."""
        kept = [column for number, column in enumerate(self.chosen) if number not in numbers]
        return f"Leave it out: {columns_option(self.table, kept)}" if kept else "Leave it out"


def choose_columns(columns: Sequence[str], options: Sequence[str], source: object) -> list[str]:
    """The columns that `--columns` names, each once, in the order of the file.

    An option is a column's name, a shell pattern such as `f*`, a range `f0:f767` in the order of
    the file, or several of these with commas between them; a name is tried first, as names may hold
    any of these characters. Raises ExternalFeaturesInvalid for what fits no column, with the
    nearest one.
    """
    chosen: set[str] = set()
    for option in options:
        if option in columns:
            chosen.add(option)
            continue
        for term in option.split(","):
            chosen.update(_matching(columns, term.strip(), source))
    return [column for column in columns if column in chosen]


def refuse_columns(
    chosen: Sequence[str],
    forbidden: Mapping[str, str],
    columns: Sequence[str],
    option: str,
    source: object,
) -> None:
    """Raises ExternalFeaturesInvalid when columns are among `chosen` that are no features, by their
    names.

    forbidden: {name: what it is}, compared without regard to case; columns without a name are those
    of an index.
    option: `--columns` or `--key`, by which they were chosen; columns: all that could be.
    """
    reasons = {column: reason for column in chosen if (reason := _reason(column, forbidden))}
    if reasons:
        listed = "; ".join(f"{column!r} is {reason}" for column, reason in reasons.items())
        kept = [column for column in chosen if column not in reasons]
        raise ExternalFeaturesInvalid(
            f"{source}: {listed}: not a feature.{suggest_columns(columns, kept, option)}"
        )


def suggest_columns(columns: Sequence[str], kept: Sequence[str], option: str = "--columns") -> str:
    """ " Those that may be: --columns f0:f767", shortest form first; empty where none is left."""
    if not kept or option != "--columns":
        return ""
    return f" What is left: {columns_option(columns, kept)}"


def columns_option(columns: Sequence[str], chosen: Sequence[str]) -> str:
    """The options that name exactly `chosen`, as they are typed in a shell: `--columns
    f0:f5,f9`.
    """
    wanted = set(chosen)
    terms: list[str] = []
    whole: list[str] = []  # names that another column or the syntax would take for something else
    for is_chosen, run in groupby(columns, key=wanted.__contains__):
        names = list(run)
        if not is_chosen:
            continue
        if len(names) > 2 and not any(_is_special(name) for name in (names[0], names[-1])):
            terms.append(f"{names[0]}:{names[-1]}")
        else:
            for name in names:
                (whole if _is_special(name) else terms).append(name)
    options = [",".join(terms)] if terms else []
    return " ".join(f"--columns {shlex.quote(option)}" for option in [*options, *whole])


def forbidden_or_unnamed(columns: Sequence[str], forbidden: Mapping[str, str]) -> set[str]:
    """Those of `columns` that are no features by their names; see `refuse_columns`."""
    return {column for column in columns if _reason(column, forbidden)}


def shown(columns: Sequence[str]) -> str:
    """The names of columns for a message: all of a few, the first and the last of many."""
    names = [repr(column) if _is_special(column) or not column else column for column in columns]
    if len(names) > _SHOWN:
        names = [*names[: _SHOWN // 2], "…", *names[-_SHOWN // 2 :]]
    return ", ".join(names)


def _matching(columns: Sequence[str], term: str, source: object) -> list[str]:
    if term in columns:
        return [term]
    for cut in (match.start() for match in re.finditer(":", term)):
        first, last = term[:cut], term[cut + 1 :]
        if first in columns and last in columns:
            start, stop = columns.index(first), columns.index(last)
            if start > stop:
                raise ExternalFeaturesInvalid(
                    f"{source}: --columns {term}: {first} stands after {last} in the file: "
                    f"{last}:{first}"
                )
            return list(columns[start : stop + 1])
    if any(letter in term for letter in "*?[") and (
        found := [name for name in columns if fnmatchcase(name, term)]
    ):
        return found
    near = difflib.get_close_matches(term, columns, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ExternalFeaturesInvalid(
        f"{source}: --columns {term!r} fits no column.{hint} It has {shown(columns)}"
    )


def _reason(column: str, forbidden: Mapping[str, str]) -> str | None:
    if _UNNAMED.match(column):
        return "the rows' index, as pandas writes it"
    folded = column.strip().casefold()
    return next(
        (reason for name, reason in forbidden.items() if name.strip().casefold() == folded), None
    )


def _is_special(name: str) -> bool:
    return not name or name != name.strip() or any(letter in name for letter in ",:*?[")
