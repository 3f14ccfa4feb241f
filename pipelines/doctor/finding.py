"""One line of the doctor: what was looked at, and what to do where it is not well."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line."""

    name: str
    state: State  # note: it works, and something is worth knowing
    observation: str
    advice: str = ""
