"""Paths in a run's files, after the run was moved together with its cache and images."""

from pathlib import Path

from headrace.pipelines.paths import RunPaths
from headrace.pipelines.records import RunDamaged, read_record

# Paths with these are patterns such as images/{000..127}.tar: no file has the pattern as its name.
_PATTERN_CHARACTERS = frozenset("{*?[")


def moved_with_run(path: str, inside: Path) -> str:
    """Return a path from a file of a run, as it is now if both were moved.

    inside: the directory of that file, such as RUN/winner. If it is in no run, the path is returned
    unchanged.
    """
    for folder in list(inside.absolute().parents)[:4]:  # RUN/ensemble/members/KEY is the deepest
        try:
            before = read_record(RunPaths(folder).recipe)["out"]
        except (OSError, RunDamaged, KeyError):
            continue
        return str(moved_path(Path(path), Path(before), folder))
    return path


def moved_path(path: Path, before: Path, now: Path) -> Path:
    """Return the path as it is now that the run is not at `before` but at `now`.

    It stays as it is if nothing exists at the new path: then only the run was moved.
    """
    before, now = moved_project(before, now)
    if before == now or not path.is_relative_to(before):
        return path
    new_path = now / path.relative_to(before)
    existing_part = new_path.parent if _PATTERN_CHARACTERS & set(new_path.name) else new_path
    return new_path if existing_part.exists() else path


def moved_project(before: Path, now: Path) -> tuple[Path, Path]:
    """Return the old and the new path of the folder that was moved with the run in it.

    Folders in which both paths end are taken to have moved along, with the cache and the images
    in them: if the run /a/project/runs/x is now /b/project/runs/x, then /a is now /b. For a run
    that was not moved, both are the root.
    """
    while before.name and before.name == now.name:
        before, now = before.parent, now.parent
    return before, now
