"""The user's home directory, which not every user has: a container's user id may have no account, a
service no HOME.
"""

import os
from pathlib import Path

from headrace.cache.errors import HeadraceError


def expand_home(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~user` replaced by the home directory.

    Raises HeadraceError where there is none.
    """
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        raise HeadraceError(unknown_home(path.parts[0], f"{path}: ")) from None


def unknown_home(tilde: str = "~", where: str = "") -> str:
    """The sentence for a `~` or `~user` without a home. where: what it is put after, such as a path
    and a colon.
    """
    if len(tilde) > 1:
        return (
            f"{where}{tilde} stands for the home of the user {tilde[1:]}, and there is no such "
            "user here. Write the whole path"
        )
    return (
        f"{where}~ stands for your home directory, and none is known: HOME is not set, and the "
        f"user id {os.getuid()} has no account on this machine. Write the whole path, or set HOME"
    )


def state_directory() -> Path | None:
    """Where is kept what only saves time on this machine: $XDG_CACHE_HOME/headrace, by default
    ~/.cache/headrace.

    It need not exist, and perhaps cannot be made. None for a user without a home.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "headrace"
    home = home_directory()
    return None if home is None else home / ".cache" / "headrace"


def home_directory() -> Path | None:
    """The user's home directory, None for a user without one."""
    try:
        return Path.home()
    except RuntimeError:
        return None
