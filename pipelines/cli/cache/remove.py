"""`headrace cache gc` and `rm`."""

from pathlib import Path
from typing import Annotated

import typer

from headrace.cache.count_text import count_text
from headrace.cache.errors import CacheError
from headrace.cache.publish import read_spec
from headrace.pipelines.cli.cache.find import (
    DEFAULT_CACHE,
    CacheOption,
    NameArgument,
    find_feature_set,
    networks_of_recipe,
    print_line,
    require_cache,
)
from headrace.pipelines.cli.options import JsonOption, flag, print_json


def gc_command(
    recipes: Annotated[
        list[Path] | None, typer.Argument(help="Feature sets that none of these uses are removed.")
    ] = None,
    cache: CacheOption = DEFAULT_CACHE,
    yes: Annotated[bool, flag("--yes", help="Remove; otherwise only say what would go.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Remove what killed processes left and, given recipes, feature sets that none of them uses.

    Example: headrace cache gc recipe.yaml other.yaml --yes
    """
    from headrace.cache.integrity.garbage import find_garbage
    from headrace.pipelines.cluster.task_leases import remove_dead
    from headrace.pipelines.paths import unit_leases

    # Without a recipe nothing counts as unused, and only what killed processes left goes.
    used_fingerprints = None
    if recipes:
        used_fingerprints = set().union(*map(_used_fingerprints, recipes))
    require_cache(cache)
    garbage = find_garbage(cache, used_fingerprints)
    garbage_paths = [*garbage.feature_sets, *garbage.temporaries, *garbage.trash]
    n_leases = 0
    if yes:
        garbage.remove()
        n_leases = remove_dead(unit_leases(cache))
    if json_output:
        print_json(
            "cache gc",
            paths=garbage_paths,
            bytes=garbage.bytes,
            is_removed=yes,
            leases_removed=n_leases,
        )
        return
    for garbage_path in garbage_paths:
        print_line(str(garbage_path))
    if n_leases:
        print_line(
            f"{count_text(n_leases, 'lease')} and locks of drivers that are no more: removed"
        )
    print_line(
        f"{garbage.bytes / 1e6:,.1f} MB {'removed' if yes else 'would go; --yes removes them'}"
    )


def remove_command(
    name: NameArgument,
    cache: CacheOption = DEFAULT_CACHE,
    yes: Annotated[bool, flag("--yes", help="Do not ask.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Remove one feature set.

    Example: headrace cache rm 3fa9 --yes
    """
    from headrace.cache.integrity.garbage import remove_feature_set, tree_bytes

    # First, because a removal that was killed may be of the one that is named.
    finished_fingerprints = _finish_removals(cache, name)
    directory: Path | None = None
    size_bytes = 0
    try:
        directory = find_feature_set(cache, name, include_unfinished=True)
    except CacheError:
        if not any(finished_fingerprints.values()):
            raise
    if directory is not None:
        size_bytes = tree_bytes(directory)
        if not yes:
            # With --json the question goes to the standard error: the standard output is the
            # object.
            typer.confirm(
                f"Remove {directory} ({size_bytes / 1e6:,.1f} MB)?", abort=True, err=json_output
            )
        remove_feature_set(directory)
    if json_output:
        removals = tuple(finished_fingerprints)
        print_json("cache rm", path=directory, bytes=size_bytes, finished_removals=removals)
        return
    for fingerprint in finished_fingerprints:
        print_line(f"{fingerprint}: its removal, which was interrupted, is finished")
    if directory is not None:
        print_line(f"{directory} removed ({size_bytes / 1e6:,.1f} MB)")


def _finish_removals(cache: Path, name: str) -> dict[str, bool]:
    """Finish interrupted removals of feature sets; return by fingerprint whether each may be the
    one that the user names.
    """
    from headrace.cache.integrity.garbage import interrupted_removals, remove_trash

    finished = {}
    for path, fingerprint in interrupted_removals(cache).items():
        try:
            tap = read_spec(path, check_name=False).name
        except CacheError:
            tap = name  # its spec is removed already, so it may be the named one
        finished[fingerprint] = fingerprint.startswith(name) or tap == name
        remove_trash(path)
    return finished


def _used_fingerprints(recipe_path: Path) -> set[str]:
    """Return the fingerprints of the feature sets that a recipe uses, external ones included."""
    from headrace.cache.exchange.external import external_feature_sets
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    used = {spec.fingerprint for _, specs in networks_of_recipe(recipe) for spec in specs}
    for name in recipe.external_features:
        used |= {found.spec.fingerprint for found in external_feature_sets(recipe.cache, name)}
    return used
