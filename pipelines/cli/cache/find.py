"""Finding of the feature sets that a command of `headrace cache` names."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cache.errors import CacheError
from headrace.cache.feature_set import (
    feature_set_directories,
    open_feature_set,
    unfinished_directories,
)
from headrace.pipelines.cli.completion import complete_feature_sets
from headrace.pipelines.console import make_console

if TYPE_CHECKING:
    import pandas as pd

    from headrace.cache.spec import FeatureSpec
    from headrace.extract.spec import BackboneSpec
    from headrace.pipelines.recipe.load import Recipe

CacheOption = Annotated[
    Path, typer.Option("--cache", help="The cache directory, as in the recipe.")
]
DEFAULT_CACHE = Path("headrace-cache")
NameArgument = Annotated[
    str,
    typer.Argument(
        help="A fingerprint (or its beginning), or a tap.", autocompletion=complete_feature_sets
    ),
]
OptionalNameArgument = Annotated[
    str | None,
    typer.Argument(
        help="One feature set (fingerprint or tap); default: all.",
        autocompletion=complete_feature_sets,
    ),
]


def require_cache(cache_root: Path) -> None:
    """Raise CacheError if there is no such folder: a mistyped path must not look like a cache
    without faults.
    """
    if not cache_root.is_dir():
        reason = "it is a file" if cache_root.exists() else "there is no such folder"
        raise CacheError(
            f"{cache_root} is no cache: {reason}. A recipe says where its cache is; name it with "
            "--cache"
        )


def chosen_directories(cache_root: Path, name_or_tap: str | None) -> list[Path]:
    """Return the named feature set, or all if none is named.

    Raises CacheError if there is no cache, or no feature set of that name.
    """
    if name_or_tap:
        return [find_feature_set(cache_root, name_or_tap)]
    require_cache(cache_root)
    return feature_set_directories(cache_root)


def find_feature_set(
    cache_root: Path, name_or_tap: str, *, include_unfinished: bool = False
) -> Path:
    """Return the only feature set whose fingerprint begins with `name_or_tap`, or that is of this
    tap. include_unfinished: also search what killed processes have left.

    Raises CacheError if there is none, or several.
    """
    # What has no spec yet can be removed, but not read.
    directories = feature_set_directories(cache_root) + (
        unfinished_directories(cache_root) if include_unfinished else []
    )
    fingerprint_matches = [path for path in directories if path.name.startswith(name_or_tap)]
    matches = fingerprint_matches or [
        path for path in directories if _tap_name(path) == name_or_tap
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise CacheError(
            f"{name_or_tap!r} fits {len(matches)} feature sets; give a fingerprint: "
            f"{', '.join(match.name for match in matches)}"
        )
    available = ", ".join(f"{path.name} ({_tap_name(path)})" for path in directories) or "none"
    raise CacheError(
        f"{cache_root} has no feature set {name_or_tap!r}. There are: {available}. The cache is "
        "chosen by --cache"
    )


def _tap_name(directory: Path) -> str:
    try:
        return open_feature_set(directory).spec.name
    # A broken feature set is named too: it is one that a person may want to remove or repair.
    except CacheError:
        return "broken"


def networks_of_recipe(recipe: "Recipe") -> "list[tuple[BackboneSpec, tuple[FeatureSpec, ...]]]":
    """Return the backbones of a recipe, each with the specs of its feature sets."""
    from headrace.extract.taps.spec_cache import load_feature_specs
    from headrace.pipelines.planning.networks import backbone_spec, storage_options

    networks = []
    for backbone in recipe.backbones:
        network = backbone_spec(backbone, recipe)
        features = load_feature_specs(
            network, backbone.taps, cache_root=recipe.cache, **storage_options(backbone, recipe)
        )
        networks.append((network, features.specs))
    return networks


def samples_with_content(
    recipe: "Recipe", index_path: Path | None = None
) -> "tuple[pd.DataFrame, list[str | None]]":
    """Return the recipe's images, and the content hash of each; None for an unreadable one.

    index_path: of earlier hashes, by default the cache's, which answers for files of the same size
    and time.
    """
    from headrace.extract.images.content_hashes import content_hashes
    from headrace.pipelines.paths import content_index
    from headrace.pipelines.planning.dataset import list_samples

    samples = list_samples(recipe)
    return samples, list(content_hashes(samples, index_path or content_index(recipe.cache)).hashes)


def print_line(text: str) -> None:
    """Print a line that is not wrapped."""
    make_console().print(text, soft_wrap=True)
