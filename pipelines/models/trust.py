"""Which files a model may read: those in its directory, and those that its user allows."""

import shlex
from collections.abc import Collection
from pathlib import Path

from headrace.cache.home import expand_home
from headrace.extract.spec import BackboneSpec, backbone_path, called_code
from headrace.heads.persist import CodeNotTrusted, require_trusted
from headrace.pipelines.moved_paths import moved_project
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.records import RunDamaged, read_record


def require_trusted_backbone(
    backbone: BackboneSpec, model_directory: Path, model_root: Path, allowed_code: Collection[str]
) -> None:
    """Raise CodeNotTrusted if a network's name leads to code or a file that may not be loaded.

    model_root: the directory of the whole model, of which `model_directory` may be a member.
    """
    require_trusted(called_code(backbone), model_directory, allowed_code)
    if (network_path := backbone_path(backbone.name)) is not None:
        require_allowed_file(backbone.name, network_path, model_directory, model_root, allowed_code)


def require_allowed_file(
    recorded_name: str,
    asked_path: Path,
    model_directory: Path,
    model_root: Path,
    allowed_code: Collection[str],
) -> None:
    """Raise CodeNotTrusted for a network's file or folder that the model may not read.

    It may read files in its directory (`model_root`), files in `allowed_code`, and files that the
    recipe of its run names, if the run was made here.
    """
    asked_path = expand_home(asked_path).absolute()
    resolved_path = asked_path.resolve()
    if resolved_path.is_relative_to(model_root.resolve()):
        return
    if not {recorded_name, str(asked_path)}.isdisjoint(allowed_code):
        return
    # RUN/winner, RUN/ensemble/members/KEY: the run is one of the nearest folders above.
    for parent_folder in list(model_directory.absolute().parents)[:4]:
        try:
            run_recipe = read_record(RunPaths(parent_folder).recipe)
            recipe_names = [
                backbone.get(recipe_key)
                for backbone in run_recipe["backbones"]
                for recipe_key in ("weights", "name")
            ]
            made_in = Path(run_recipe["out"])
            _, project = moved_project(made_in, parent_folder)
            # A recipe that came with a run from elsewhere could name any file. So the file must lie
            # in the project that was moved with the run, or the same recipe must still be where the
            # run says it was made.
            if recorded_name in recipe_names and (
                resolved_path.is_relative_to(project.resolve())
                or read_record(RunPaths(made_in).recipe) == run_recipe
            ):
                return
        except (OSError, RunDamaged, KeyError, TypeError, AttributeError):
            continue  # no run, or a damaged one, which vouches for nothing
    raise CodeNotTrusted(
        f"{model_directory} asks for the weights in {asked_path}, which lies outside of the "
        "model's directory. If you know the file, type: --trust-code "
        f"{shlex.quote(str(asked_path))} (in Python: trust_code=[{str(asked_path)!r}]). `headrace "
        "export`, with that option and --format safetensors, writes a model that holds its "
        "weights and asks for nothing"
    )
