"""Paths that a run's files name, after the run was moved with what lies around it."""

from pathlib import Path

from headrace.pipelines.paths import RunPaths
from headrace.pipelines.records import RunDamaged, read_record

_PATTERN = "{*?["  # in the name of a recipe's tar shards


def moved_with_run(path: str, inside: Path) -> str:
    """Return a path that a file of a run names, as it is now if both were moved.

    inside: the directory of that file, such as RUN/winner. Where that is in no run, the path stays
    as it is.
    """
    for folder in list(inside.absolute().parents)[:4]:  # RUN/ensemble/MEMBER is the deepest
        try:
            before = read_record(RunPaths(folder).recipe)["out"]
        except (OSError, RunDamaged, KeyError):
            continue
        return str(moved_path(Path(path), Path(before), folder))
    return path


def moved_path(path: Path, before: Path, now: Path) -> Path:
    """Return the path, or its place since the run went from `before` to `now`, if it exists."""
    before, now = moved_project(before, now)
    if before == now or not path.is_relative_to(before):
        return path
    new_path = now / path.relative_to(before)
    existing_part = new_path.parent if set(_PATTERN) & set(new_path.name) else new_path
    return new_path if existing_part.exists() else path


def moved_project(before: Path, now: Path) -> tuple[Path, Path]:
    """Return where the folder was that was moved or copied as a whole, and where it is; the root of
    all paths for a run that is where it was.

    What the two ends share has kept its order: of a project that was moved as a whole, cache,
    images and weights files stand beside the run as they did.
    """
    while before.name and before.name == now.name:
        before, now = before.parent, now.parent
    return before, now
