"""What a user can get wrong about images and networks."""

import difflib
from collections.abc import Iterable

from headrace.cache.errors import HeadraceError


class SourceError(HeadraceError, ValueError):
    """The images, the table or the archive that samples are listed from cannot be used as asked."""


class BackboneError(HeadraceError, ValueError):
    """A network, its weights, its preprocessing or a tap on it cannot be used as asked."""


class ImageError(Exception):
    """One image cannot be decoded; the text is the reason that is recorded beside its id. It never stops a run."""


def nearest(word: str, options: Iterable[str], count: int = 4) -> str:
    """ "a, b, c": the options most like `word`, for the end of an error message; "(none)" when there are no options."""
    choices = list(dict.fromkeys(options))
    close = difflib.get_close_matches(word, choices, n=count, cutoff=0.5)
    return ", ".join(close or choices[:count]) or "(none)"
