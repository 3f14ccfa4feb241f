"""The user's home directory, if any: a container's user may have no account, a service no HOME."""

import os
from pathlib import Path

from headrace.cache.errors import HeadraceError


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Replace `~` and `~user` at the start of a path by the home directory.

    Raises HeadraceError where there is none.
    """
    path = Path(path)
    try:
        return path.expanduser()
    # What pathlib raises for a user without a home directory.
    except RuntimeError:
        raise HeadraceError(unknown_home_message(path.parts[0], f"{path}: ")) from None


def unknown_home_message(home_name: str = "~", message_prefix: str = "") -> str:
    """Return the sentence for a `~` or `~user` without a home directory.

    message_prefix: text before it, such as a path and a colon.
    """
    if len(home_name) > 1:
        return (
            f"{message_prefix}{home_name} stands for the home of the user {home_name[1:]}, and "
            "there is no such user here. Write the whole path"
        )
    return (
        f"{message_prefix}~ stands for your home directory, and none is known: HOME is not set, "
        f"and the user id {os.getuid()} has no account on this machine. Write the whole path, or "
        "set HOME"
    )


def state_directory() -> Path | None:
    """Return the directory of this machine's own records, $XDG_CACHE_HOME/headrace or
    ~/.cache/headrace.

    What is stored there only saves time. The directory need not exist, and perhaps cannot be made.
    None for a user without a home directory.
    """
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / "headrace"
    home_path = home_directory()
    return None if home_path is None else home_path / ".cache" / "headrace"


def home_directory() -> Path | None:
    """Return the user's home directory, None for a user without one."""
    try:
        return Path.home()
    except RuntimeError:
        return None
