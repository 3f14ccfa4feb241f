"""The result of one check of the doctor, and the advice."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    state: State  # note: it works, but something should be known
    observation: str
    advice: str = ""
