"""What a model may ask for: code to import and files to read, each only if its user allows it."""

import shlex
from collections.abc import Collection
from pathlib import Path

from headrace.cache.home import expand_home
from headrace.heads.persist import CodeNotTrusted
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.records import RunDamaged, read_record


def require_allowed_file(
    recorded_name: str, file: Path, directory: Path, root: Path, trusted: Collection[str]
) -> None:
    """Raise CodeNotTrusted for a network's file or folder that is neither in the model's directory
    nor named by its run's recipe.
    """
    file = expand_home(file).absolute()
    if file.resolve().is_relative_to(root.resolve()):
        return
    if not {recorded_name, str(file)}.isdisjoint(trusted):
        return
    # RUN/winner, RUN/ensemble/members/KEY: the run is at most three folders up.
    for folder in list(directory.absolute().parents)[:4]:
        try:
            recipe = read_record(RunPaths(folder).recipe)
            recipe_names = [
                backbone.get(key) for backbone in recipe["backbones"] for key in ("weights", "name")
            ]
            if recorded_name in recipe_names:
                return
        except (OSError, RunDamaged, KeyError, TypeError, AttributeError):
            continue
    raise CodeNotTrusted(
        f"{directory} asks for the weights in {file}, which lies outside of the model's directory. "
        f"If you know the file, type: --trust-code {shlex.quote(str(file))} (in Python: "
        f"trust_code=[{str(file)!r}]). `headrace export`, with that option and --format "
        "safetensors, writes a model that holds its weights and asks for nothing"
    )
