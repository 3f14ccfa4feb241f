"""Feature columns of tables that other programs made: which columns the user's options name."""

import difflib
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from headrace.cache.errors import ExternalFeaturesInvalid

# Names of the column in which pandas has written an index: as it reads them from CSV, as Parquet
# has them, and as CSV has them (an empty name).
_UNNAMED_INDEX = re.compile(r"(Unnamed: \d+(_level_\d+)?|__index_level_\d+__|)\Z")
_MAX_SHOWN = 12  # names of columns in one message


@dataclass(frozen=True)
class FeatureColumns:
    """Names of a row's values that come from columns of a table; empty for arrays and lists."""

    chosen: tuple[str, ...] = ()
    table: tuple[str, ...] = ()  # all columns of the table, in its order

    def describe(self, column_index: int) -> str:
        """Return the words that name the value at `column_index` in a message."""
        return (
            f"the column {self.chosen[column_index]!r}"
            if self.chosen
            else f"value {column_index} of each row (the first is 0)"
        )

    def leave_out(self, column_indices: Collection[int]) -> str:
        """Return the advice to leave out these values, with the option that keeps the others."""
        kept_columns = [
            column for index, column in enumerate(self.chosen) if index not in column_indices
        ]
        if not kept_columns:
            return "Leave it out"
        return f"Leave it out: {columns_option(self.table, kept_columns)}"


def choose_columns(
    column_names: Sequence[str], column_options: Sequence[str], source_name: object
) -> list[str]:
    """Return the columns that `--columns` names, without repetition, in the order of the file.

    An option is a column's name, a shell pattern such as `f*`, a range `f0:f767` in the order of
    the file, or several of these with commas between them. A literal name is tried first, because a
    name may contain any of these characters. Raises ExternalFeaturesInvalid for a range in the
    reverse order, and for an option that matches no column; the message names the closest one.
    """
    chosen_columns: set[str] = set()
    for column_option in column_options:
        if column_option in column_names:
            chosen_columns.add(column_option)
            continue
        for term in column_option.split(","):
            chosen_columns.update(_match_columns(column_names, term.strip(), source_name))
    return [column for column in column_names if column in chosen_columns]


def refuse_columns(
    chosen_columns: Sequence[str],
    forbidden_names: Mapping[str, str],
    column_names: Sequence[str],
    option_name: str,
    source_name: object,
) -> None:
    """Raise ExternalFeaturesInvalid if a chosen column cannot be a feature, judged by its name.

    forbidden_names: {column name: reason}, compared without regard to case and spaces around.
    Columns without a name are those of an index and refused too.
    option_name: `--columns` or `--key`, by which they were chosen.
    column_names: all columns that could have been chosen.
    """
    reason_of_column = {
        column: reason
        for column in chosen_columns
        if (reason := forbidden_reason(column, forbidden_names))
    }
    if reason_of_column:
        listed = "; ".join(f"{column!r} is {reason}" for column, reason in reason_of_column.items())
        kept_columns = [column for column in chosen_columns if column not in reason_of_column]
        advice = ""
        if kept_columns and option_name == "--columns":
            advice = f" What is left: {columns_option(column_names, kept_columns)}"
        raise ExternalFeaturesInvalid(f"{source_name}: {listed}: not a feature.{advice}")


def columns_option(column_names: Sequence[str], chosen_columns: Sequence[str]) -> str:
    """Return the shell options that select just `chosen_columns`, such as `--columns f0:f5,f9`."""
    chosen_set = set(chosen_columns)
    option_terms: list[str] = []
    # Names with a comma, colon or pattern letter: each gets an option of its own, which
    # `choose_columns` compares literally first.
    verbatim_names: list[str] = []
    for is_chosen, run in groupby(column_names, key=chosen_set.__contains__):
        names = list(run)
        if not is_chosen:
            continue
        if len(names) > 2 and not (_is_special(names[0]) or _is_special(names[-1])):
            option_terms.append(f"{names[0]}:{names[-1]}")
        else:
            for name in names:
                (verbatim_names if _is_special(name) else option_terms).append(name)
    values = [",".join(option_terms)] if option_terms else []
    return " ".join(f"--columns {shlex.quote(value)}" for value in [*values, *verbatim_names])


def abbreviate_columns(column_names: Sequence[str]) -> str:
    """List column names for a message: all of a few, the two ends of a long list."""
    shown_names = [repr(column) if _is_special(column) else column for column in column_names]
    if len(shown_names) > _MAX_SHOWN:
        shown_names = [*shown_names[: _MAX_SHOWN // 2], "…", *shown_names[-_MAX_SHOWN // 2 :]]
    return ", ".join(shown_names)


def _match_columns(column_names: Sequence[str], term: str, source_name: object) -> list[str]:
    if term in column_names:
        return [term]
    # Each colon is tried as that of a range, because the columns' names may have colons too.
    for colon_position in (match.start() for match in re.finditer(":", term)):
        first_column, last_column = term[:colon_position], term[colon_position + 1 :]
        if first_column in column_names and last_column in column_names:
            start_index = column_names.index(first_column)
            stop_index = column_names.index(last_column)
            if start_index > stop_index:
                raise ExternalFeaturesInvalid(
                    f"{source_name}: --columns {term}: {first_column} stands after {last_column} "
                    f"in the file. Give --columns {last_column}:{first_column}"
                )
            return list(column_names[start_index : stop_index + 1])
    if any(letter in term for letter in "*?[") and (
        matching_names := [name for name in column_names if fnmatchcase(name, term)]
    ):
        return matching_names
    close_matches = difflib.get_close_matches(term, column_names, n=1, cutoff=0.4)
    match_hint = f" Did you mean {close_matches[0]!r}?" if close_matches else ""
    raise ExternalFeaturesInvalid(
        f"{source_name}: --columns {term!r} fits no column.{match_hint} It has "
        f"{abbreviate_columns(column_names)}"
    )


def forbidden_reason(column_name: str, forbidden_names: Mapping[str, str]) -> str | None:
    """Return the reason for which `refuse_columns` refuses a column, None if it does not."""
    if _UNNAMED_INDEX.match(column_name):
        return "the rows' index, as pandas writes it"
    folded_name = column_name.strip().casefold()
    for name, reason in forbidden_names.items():
        if name.strip().casefold() == folded_name:
            return reason
    return None


def _is_special(column_name: str) -> bool:
    return (
        not column_name
        or column_name != column_name.strip()
        or any(letter in column_name for letter in ",:*?[")
    )
