"""Completion of names by the Tab key, after `headrace --install-completion`."""

from pathlib import Path

import typer


def complete_backbones(incomplete: str) -> list[str]:
    """Return the networks whose names begin with `incomplete`, with the library or without it."""
    from headrace.extract.backbones.library import backbone_names

    return [
        name
        for name in backbone_names()
        if name.startswith(incomplete) or name.partition(":")[2].startswith(incomplete)
    ]


def complete_feature_sets(context: typer.Context, incomplete: str) -> list[str]:
    """Return the fingerprints and names of the feature sets in the cache that the line names."""
    from headrace.cache.errors import CacheError
    from headrace.cache.feature_set import feature_set_directories
    from headrace.cache.publish import read_spec

    names: set[str] = set()
    for directory in feature_set_directories(Path(context.params.get("cache") or "headrace-cache")):
        names.add(directory.name)
        try:
            names.add(read_spec(directory).name)
        except CacheError:
            continue  # a broken one has no name to read, and is completed by its fingerprint
    return sorted(name for name in names if name.startswith(incomplete))


def complete_runs(incomplete: str) -> list[str]:
    """Return the recipes, folders and runs whose names begin with `incomplete`."""
    paths = [
        path
        for path in Path().glob(f"{incomplete}*")
        if path.is_dir() or path.suffix in (".yaml", ".yml")
    ]
    runs = Path("headrace-runs").glob(f"{incomplete}*") if "/" not in incomplete else ()
    return sorted(str(path) for path in (*paths, *runs))
