"""`headrace cache …`: what is in a cache, is it whole, repair it, clean it, export from it."""

import functools
import tempfile
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.table import Table

from headrace.cache.errors import CacheError
from headrace.cache.feature_set import (
    FeatureSet,
    feature_set_directories,
    open_feature_set,
    unfinished_directories,
)
from headrace.cache.publish import feature_set_path, read_spec, shard_path
from headrace.cache.spec import FeatureSpec
from headrace.pipelines.console import make_console

if TYPE_CHECKING:
    import pandas as pd

    from headrace.cache.exchange.export import RowSelection
    from headrace.extract.run.plan import Network
    from headrace.extract.spec import BackboneSpec
    from headrace.pipelines.recipe.load import Recipe

Rows = npt.NDArray[np.float32]

app = typer.Typer(
    no_args_is_help=True, help="What is in a feature cache; verify, repair, clean, export."
)

CacheOption = Annotated[
    Path, typer.Option("--cache", help="The cache directory, as in the recipe.")
]
DEFAULT_CACHE = Path("headrace-cache")
_HALF = {
    "float16": "2^-11",
    "bfloat16": "2^-8",
    "float32": "2^-24",
    "uint8": "half a step of 1/255 of a channel's range",
}


class ExportKind(StrEnum):
    """File formats of `headrace cache export`."""

    npy = "npy"
    parquet = "parquet"
    zarr = "zarr"


@app.command("ls")
def list_command(cache: CacheOption = DEFAULT_CACHE) -> None:
    """List the feature sets: samples, tap, bytes, backbone, when, by what version.

    Example: headrace cache ls
    """
    table = Table(box=None, pad_edge=False)
    for column in ("feature set", "backbone", "tap", "row", "dtype"):
        table.add_column(column)
    for column in ("rows", "failed", "MB"):
        table.add_column(column, justify="right")
    table.add_column("last written")
    table.add_column("by")
    directories = feature_set_directories(cache)
    for directory in directories:
        try:
            features = open_feature_set(directory)
        except CacheError:
            table.add_row(
                directory.name,
                "broken: headrace cache verify says what, headrace cache repair repairs it",
            )
            continue
        spec = features.spec
        table.add_row(
            directory.name,
            spec.backbone,
            spec.name,
            "x".join(map(str, spec.shape)),
            spec.dtype,
            f"{features.n_rows:,}",
            f"{sum(entry.failed for entry in features.entries):,}",
            f"{features.stored_bytes / 1e6:,.1f}",
            _last_written(features),
            ", ".join(sorted({entry.written_by for entry in features.entries})),
        )
    if not directories:
        _say(f"{cache} holds no feature sets. `headrace run RECIPE` makes some.")
        return
    make_console(pipe_columns=200).print(table)


@app.command("show")
def show_command(
    name: Annotated[
        str, typer.Argument(help="A fingerprint (or its beginning), or a tap such as blocks.4.avg.")
    ],
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """Everything about one feature set: spec, shards, measured quantization error, failures.

    Example: headrace cache show 3fa9
    """
    import dataclasses

    features = open_feature_set(_find(cache, name))
    for field, value in dataclasses.asdict(features.spec).items():
        _say(f"{field:>14}  {value}")
    rows = [entry.rows for entry in features.entries]
    _say(
        f"{'rows':>14}  {features.n_rows:,} in {len(rows)} shards of {min(rows, default=0)} to "
        f"{max(rows, default=0)}"
    )
    _say(f"{'bytes':>14}  {features.stored_bytes:,} in {features.path}")
    _say(f"{'last written':>14}  {_last_written(features)}")
    quantization_error = features.quantization_error
    if quantization_error.squared:
        measured = (
            f"largest {quantization_error.largest:.3g}, root mean square "
            f"{quantization_error.relative_rms:.2e} of "
            "the values'"
        )
    else:
        measured = "none, the features were given in this dtype"
    _say(
        f"{'quantization':>14}  {measured} (bound of {features.spec.dtype}: "
        f"{_HALF[features.spec.dtype]}, measured when written)"
    )
    failures = features.failures()
    _say(f"{'failed':>14}  {len(failures)} samples")
    for failure in failures[:20]:
        _say(f"{'':>14}  {failure.id}: {failure.reason}")
    if len(failures) > 20:
        _say(f"{'':>14}  and {len(failures) - 20} more")


@app.command("verify")
def verify_command(
    name: Annotated[
        str | None, typer.Argument(help="One feature set (fingerprint or tap); default: all.")
    ] = None,
    cache: CacheOption = DEFAULT_CACHE,
    recipe: Annotated[
        Path | None, typer.Option(help="The recipe, for --sources and --recompute.")
    ] = None,
    sources: Annotated[
        bool, typer.Option("--sources", help="Hash every source image again.")
    ] = False,
    recompute: Annotated[
        int, typer.Option(help="Extract so many random rows again and compare.", min=0)
    ] = 0,
) -> None:
    """Read every byte, whatever was verified before. Exit code 1 when something is wrong.

    Example: headrace cache verify --recipe recipe.yaml --sources --recompute 20
    """
    from headrace.cache.integrity.verify import verify_bytes

    if (sources or recompute) and recipe is None:
        raise CacheError(
            "--sources and --recompute need the images: give the recipe, as in --recipe recipe.yaml"
        )
    if recipe is not None:
        from headrace.pipelines.recipe.load import load_recipe

        cache = load_recipe(recipe).cache
    directories = _directories(cache, name)
    wrong = 0
    for directory in directories:
        problems = verify_bytes(directory)
        serious = [problem for problem in problems if not problem.is_harmless]
        for problem in problems:
            _say(f"{'note' if problem.is_harmless else problem.kind}: {problem.message}")
        wrong += len(serious)
        if not serious:
            features = open_feature_set(directory)
            _say(
                f"{directory.name} {features.spec.name}: every byte of {features.n_rows:,} rows is "
                "as written"
            )
    if recipe is not None and not wrong:
        if sources:
            wrong += _verify_sources(recipe, directories)
        if recompute:
            wrong += _verify_recompute(recipe, directories, recompute)
    if wrong:
        _say(
            f"{wrong} problem{'s' * (wrong > 1)}. Broken shards: `headrace cache repair`, then run "
            "again"
        )
        raise typer.Exit(1)


@app.command("repair")
def repair_command(
    name: Annotated[
        str | None, typer.Argument(help="One feature set (fingerprint or tap); default: all.")
    ] = None,
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """Remove broken shards and list whole ones; the next run extracts just what is missing.

    Example: headrace cache repair
    """
    from headrace.cache.integrity.repair import repair

    for directory in _directories(cache, name):
        done = repair(directory)
        if done.is_nothing:
            _say(f"{directory.name}: nothing to repair")
            continue
        parts = [f"{len(done.intact_units)} shards kept"]
        for what, units in (
            ("removed", done.removed_units),
            ("missing", done.missing_units),
            ("listed again", done.listed_units),
        ):
            parts += (
                [f"{len(units)} {what} ({', '.join(units[:5])}{', …' if len(units) > 5 else ''})"]
                if units
                else []
            )
        parts += [f"{file} written again" for file in done.rewritten_files]
        _say(f"{directory.name}: {'; '.join(parts)}")


@app.command("gc")
def gc_command(
    recipes: Annotated[
        list[Path] | None, typer.Argument(help="Feature sets that none of these uses are removed.")
    ] = None,
    cache: CacheOption = DEFAULT_CACHE,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove; otherwise only say what would go.")
    ] = False,
) -> None:
    """Remove what killed processes left behind and, given recipes, the feature sets that none of
    them uses.

    Example: headrace cache gc recipe.yaml other.yaml --yes
    """
    from headrace.cache.integrity.garbage import find_garbage
    from headrace.pipelines.cluster.task_leases import remove_dead
    from headrace.pipelines.paths import unit_leases

    used = None
    if recipes:
        used = {
            spec.fingerprint
            for recipe in recipes
            for _, specs in _networks(recipe)
            for spec in specs
        }
        used |= {fingerprint for recipe in recipes for fingerprint in _imported(recipe)}
    _require_cache(cache)
    garbage = find_garbage(cache, used)
    for path in (*garbage.feature_sets, *garbage.temporaries, *garbage.trash):
        _say(str(path))
    if yes:
        garbage.remove()
        if dead := remove_dead(unit_leases(cache)):
            _say(f"{dead:,} leases and locks of drivers that are no more: removed")
    _say(f"{garbage.bytes / 1e6:,.1f} MB {'removed' if yes else 'would go; --yes removes them'}")


@app.command("rm")
def remove_command(
    name: Annotated[str, typer.Argument(help="A fingerprint (or its beginning), or a tap.")],
    cache: CacheOption = DEFAULT_CACHE,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove one feature set.

    Example: headrace cache rm 3fa9 --yes
    """
    from headrace.cache.integrity.garbage import remove_feature_set, tree_bytes

    is_finished = _finish_removal(cache, name)
    try:
        directory = _find(cache, name, begun=True)
    except CacheError:
        if is_finished:
            return
        raise
    size = tree_bytes(directory)
    if not yes:
        typer.confirm(f"Remove {directory} ({size / 1e6:,.1f} MB)?", abort=True)
    remove_feature_set(directory)
    _say(f"{directory} removed ({size / 1e6:,.1f} MB)")


@app.command("export")
def export_command(
    name: Annotated[str, typer.Argument(help="A fingerprint (or its beginning), or a tap.")],
    target: Annotated[
        Path,
        typer.Argument(help="The file to write; its suffix says the format unless --format does."),
    ],
    cache: CacheOption = DEFAULT_CACHE,
    kind: Annotated[
        ExportKind | None, typer.Option("--format", help="npy, parquet or zarr.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Export the rows of this recipe's images, in its order, under its ids; "
            "default: all in the cache."
        ),
    ] = None,
) -> None:
    """Write one feature set as .npy (with a table of rows beside it), Parquet or Zarr.

    Example: headrace cache export blocks.4.avg features.parquet --recipe recipe.yaml
    """
    from headrace.cache.exchange.export import EXPORTS, find_ambiguous_ids

    chosen = kind.value if kind else target.suffix.lstrip(".")
    if chosen not in EXPORTS:
        raise CacheError(
            f"{target}: give --format, one of {', '.join(EXPORTS)}, or a name that ends in one of "
            "these"
        )
    if recipe is not None:
        features, selection = _rows_of_recipe(recipe, name)
    else:
        features, selection = open_feature_set(_find(cache, name)), None
    for path in EXPORTS[chosen](features, target, selection):
        _say(f"wrote {path}")
    if selection is not None and selection.missing:
        _say(
            f"{len(selection.missing):,} images of the recipe have no row and are left out: "
            f"{_some(selection.missing)}. `headrace run` makes the rows of images that can be read"
        )
    if selection is None and (several := find_ambiguous_ids(features)):
        _say(
            f"{len(several):,} ids stand for several images (folders with the same names, images "
            f"before and after they were edited), first {several[0]!r}: the column `content` tells "
            "them apart, and --recipe exports the images of one recipe"
        )


def _require_cache(cache: Path) -> None:
    """A mistyped path must not read as a cache with nothing wrong in it."""
    if not cache.is_dir():
        found = "it is a file" if cache.exists() else "there is no such folder"
        raise CacheError(
            f"{cache} is no cache: {found}. A recipe says where its cache is; name it with --cache"
        )


def _directories(cache: Path, name: str | None) -> list[Path]:
    """The feature set that is named, or all of them.

    Raises CacheError where there is no cache, or none of that name.
    """
    if name:
        return [_find(cache, name)]
    _require_cache(cache)
    return feature_set_directories(cache)


@app.command("import")
def import_command(
    source: Annotated[
        Path, typer.Argument(help="Features of other programs: .npy, .npz, .parquet, .csv, .h5.")
    ],
    name: Annotated[
        str,
        typer.Option(help="What to call them; a recipe uses them as `external_features: [NAME]`."),
    ],
    cache: CacheOption = DEFAULT_CACHE,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Whose images the ids belong to, and whose cache is used; not needed for our "
            "exports."
        ),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            help="The ids, one per row: .csv, .parquet, .txt or .npy; default: in the file."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The array, column of lists or data set of the features.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            help="The columns of a table that are features: names, a pattern such as 'f*', a "
            "range such as f0:f767."
        ),
    ] = None,
    id_key: Annotated[str | None, typer.Option(help="The column or data set of the ids.")] = None,
    dtype: Annotated[
        str, typer.Option(help="How they are stored: float32, float16 or bfloat16.")
    ] = "float32",
) -> None:
    """Keep features that other programs made, by the ids of their images, as inputs of a recipe.

    Example: headrace cache import dino.npy --ids names.csv --name dino --recipe recipe.yaml
    """
    from headrace.cache.exchange.external import import_features, read_external_features

    loaded = None
    if recipe is not None:
        from headrace.pipelines.recipe.load import load_recipe

        loaded = load_recipe(recipe)
        cache = loaded.cache
    forbidden = _no_features(loaded) if loaded else {}
    foreign = read_external_features(
        source,
        ids_path=ids,
        feature_key=key,
        id_key=id_key,
        column_options=columns or (),
        forbidden_names=forbidden,
    )
    known, targets = None, None
    if loaded is not None:
        samples, content = _samples_with_content(loaded)
        known = {
            sample: value
            for sample, value in zip(samples["id"], content, strict=True)
            if value is not None
        }
        target = loaded.task.target
        targets = samples[[target] if isinstance(target, str) else list(target)].set_axis(
            content, axis=0
        )
    done = import_features(cache, name, foreign, known, dtype=dtype, target_table=targets)
    said = (
        f"{done.n_rows:,} rows of shape {done.features.spec.shape} kept as {name} in "
        f"{done.features.path}"
    )
    if done.n_copies:
        said += f"; {done.n_copies:,} are of exact copies of other images, which share a row"
    if done.n_unknown:
        said += f"; {done.n_unknown:,} have ids that no image has, and were left out"
    _say(f"{said}. In a recipe: external_features: [{name}]")


def _rows_of_recipe(recipe_path: Path, name: str) -> "tuple[FeatureSet, RowSelection]":
    """A feature set of the recipe's cache, and its rows of the recipe's images."""
    from headrace.cache.exchange.export import select_rows
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    features = open_feature_set(_find(recipe.cache, name))
    samples, content = _samples_with_content(recipe)
    selection = select_rows(features, [str(sample) for sample in samples["id"]], content)
    if not selection.ids:
        raise CacheError(
            f"{features.path} has no row of any of the {len(samples):,} images of {recipe_path}, "
            f"the first is {selection.missing[0]!r}. `headrace run {recipe_path}` makes them"
        )
    return features, selection


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"


def _no_features(recipe: "Recipe") -> dict[str, str]:
    """{column: what it is} of the columns that the recipe knows to be no features: a head would
    learn its own answer.
    """
    roles = {"task.target": recipe.task.target}
    roles |= {f"task.{key}": getattr(recipe.task, key) for key in ("group", "split", "fold")}
    roles |= {f"images.{key}": getattr(recipe.images, key) for key in ("path_column", "id_column")}
    named = {
        role: (columns,) if isinstance(columns, str) else columns or ()
        for role, columns in roles.items()
    }
    return {column: f"the recipe's {role}" for role, columns in named.items() for column in columns}


def _samples_with_content(recipe: "Recipe") -> "tuple[pd.DataFrame, list[str | None]]":
    """The recipe's images in its order, and the content hash of each; None where it
    cannot be read.
    """
    from headrace.extract.images.content_hashes import content_hashes
    from headrace.pipelines.paths import content_index
    from headrace.pipelines.planning.dataset import list_samples

    samples = list_samples(recipe)
    return samples, list(content_hashes(samples, content_index(recipe.cache)).hashes)


def _find(cache: Path, name: str, *, begun: bool = False) -> Path:
    """The one feature set whose fingerprint begins with `name` or whose tap it is; with `begun`,
    also what a kill left of one.
    """
    directories = feature_set_directories(cache) + (unfinished_directories(cache) if begun else [])
    by_fingerprint = [path for path in directories if path.name.startswith(name)]
    found = by_fingerprint or [path for path in directories if _tap(path) == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise CacheError(
            f"{name!r} fits {len(found)} feature sets; give a fingerprint: "
            f"{', '.join(p.name for p in found)}"
        )
    there = ", ".join(f"{path.name} ({_tap(path)})" for path in directories) or "none"
    raise CacheError(
        f"{cache} has no feature set {name!r}. There are: {there}. The cache is chosen by --cache"
    )


def _finish_removal(cache: Path, name: str) -> bool:
    """Finish removals that were interrupted, and return whether one may be of the feature set that
    is named.
    """
    from headrace.cache.integrity.garbage import interrupted_removals, remove_trash

    is_named = False
    for path, fingerprint in interrupted_removals(cache).items():
        try:
            tap = read_spec(path, check_name=False).name
        except CacheError:
            tap = name  # its spec is gone already, and it may be this one
        is_named |= fingerprint.startswith(name) or tap == name
        remove_trash(path)
        _say(f"{fingerprint}: its removal, which was interrupted, is finished")
    return is_named


def _tap(directory: Path) -> str:
    try:
        return open_feature_set(directory).spec.name
    except CacheError:
        return "broken"


def _last_written(features: FeatureSet) -> str:
    """From the files: shards hold no times, so that an interrupted extraction and an uninterrupted
    one are equal.
    """
    times = []
    for entry in features.entries:
        path = shard_path(features.path, entry.unit)
        if path.exists():
            times.append(path.stat().st_mtime)
    return (
        datetime.fromtimestamp(max(times)).astimezone().isoformat(" ", "minutes")
        if times
        else "never"
    )


def _verify_sources(recipe_path: Path, directories: list[Path]) -> int:
    from headrace.cache.integrity.verify import verify_sources
    from headrace.extract.images.content_hashes import content_hashes
    from headrace.pipelines.planning.dataset import list_samples
    from headrace.pipelines.recipe.load import load_recipe

    samples = list_samples(load_recipe(recipe_path))
    with tempfile.TemporaryDirectory() as scratch:
        # An index of its own: the run's would answer from sizes and times without reading.
        contents = content_hashes(samples, Path(scratch) / "contents.parquet")
    current = dict(
        zip(samples["id"].astype(str), contents.hashes, strict=True)
    )  # ids of one recipe are unique
    wrong = 0
    for directory in directories:
        problems = verify_sources(open_feature_set(directory), current)
        for problem in problems:
            _say(f"source: {problem.message}")
        wrong += len(problems)
    _say(f"{len(current):,} source images hashed, {wrong} problem{'s' * (wrong != 1)}")
    return wrong


def _verify_recompute(recipe_path: Path, directories: list[Path], count: int) -> int:
    import pandas as pd

    from headrace.cache.integrity.verify import RECOMPUTE_TOLERANCE, verify_recompute
    from headrace.extract.images.content_hashes import content_hashes
    from headrace.extract.run.plan import Network
    from headrace.pipelines.planning.dataset import list_samples
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    samples = list_samples(recipe)
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        hashes = content_hashes(samples, Path(scratch) / "contents.parquet").hashes
        samples = samples.assign(content=pd.Series(list(hashes), index=samples.index, dtype=object))
        wanted = {path.name for path in directories}
        for backbone, specs in _networks(recipe_path):
            for spec in specs:
                if spec.fingerprint not in wanted:
                    continue
                features = open_feature_set(feature_set_path(recipe.cache, spec))

                again = functools.partial(
                    _extract_again, samples, Network(backbone, [spec], [()]), Path(scratch)
                )
                present = np.isin(
                    features.content_hashes().astype("U32"), [value for value in hashes if value]
                )
                report = verify_recompute(
                    features, again, count, candidate_rows=np.flatnonzero(present)
                )
                verdict = "within" if report.is_equal else "BEYOND"
                _say(
                    f"{spec.name}: {report.n_rows} rows extracted again differ by at most "
                    f"{report.largest_difference:.2e} of the root mean square, {verdict} the "
                    "tolerance of "
                    f"{report.tolerance:.2e} ({RECOMPUTE_TOLERANCE:g} for another machine or batch "
                    f"size, the rest quantization error); the furthest is {report.worst_id}"
                )
                wrong += not report.is_equal
    return wrong


def _extract_again(
    samples: "pd.DataFrame", network: "Network", scratch: Path, _ids: list[str], content: list[str]
) -> Rows:
    """(n, *shape) features of n images, by the same units of work as in a run, into a cache of its
    own.
    """
    from headrace.extract.run.plan import plan_networks
    from headrace.extract.run.work_unit import run_unit

    for job in plan_networks(
        samples[samples["content"].isin(content)], [network], cache_root=scratch
    ):
        run_unit(job)
    return open_feature_set(feature_set_path(scratch, network.specs[0])).load(content)


def _imported(recipe_path: Path) -> list[str]:
    """Fingerprints of the features of other programs that a recipe uses."""
    from headrace.cache.exchange.external import external_feature_sets
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    return [
        each.spec.fingerprint
        for name in recipe.external_features
        for each in external_feature_sets(recipe.cache, name)
    ]


def _networks(recipe_path: Path) -> "list[tuple[BackboneSpec, tuple[FeatureSpec, ...]]]":
    """The backbones of a recipe and the feature sets they make."""
    from headrace.extract.taps.spec_cache import backbone_features
    from headrace.pipelines.planning.networks import backbone_spec, storing
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    found = []
    for backbone in recipe.backbones:
        spec = backbone_spec(backbone, recipe)
        features = backbone_features(
            spec, backbone.taps, cache_root=recipe.cache, **storing(backbone, recipe)
        )
        found.append((spec, features))
    return found


def _say(text: str) -> None:
    make_console().print(text, soft_wrap=True)
