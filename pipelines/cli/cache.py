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
    from headrace.extract.run.plan import BackboneFeatures
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
    for column_name in ("feature set", "backbone", "tap", "row", "dtype"):
        table.add_column(column_name)
    for column_name in ("rows", "failed", "MB"):
        table.add_column(column_name, justify="right")
    table.add_column("last written")
    table.add_column("by")
    directories = feature_set_directories(cache)
    for directory in directories:
        try:
            feature_set = open_feature_set(directory)
        except CacheError:
            table.add_row(
                directory.name,
                "broken: headrace cache verify says what, headrace cache repair repairs it",
            )
            continue
        feature_spec = feature_set.spec
        table.add_row(
            directory.name,
            feature_spec.backbone,
            feature_spec.name,
            "x".join(map(str, feature_spec.shape)),
            feature_spec.dtype,
            f"{feature_set.n_rows:,}",
            f"{sum(entry.failed for entry in feature_set.entries):,}",
            f"{feature_set.stored_bytes / 1e6:,.1f}",
            _last_written(feature_set),
            ", ".join(sorted({entry.written_by for entry in feature_set.entries})),
        )
    if not directories:
        _print_line(f"{cache} holds no feature sets. `headrace run RECIPE` makes some.")
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

    feature_set = open_feature_set(_find_feature_set(cache, name))
    for field_name, value in dataclasses.asdict(feature_set.spec).items():
        _print_line(f"{field_name:>14}  {value}")
    shard_rows = [entry.rows for entry in feature_set.entries]
    _print_line(
        f"{'rows':>14}  {feature_set.n_rows:,} in {len(shard_rows)} shards of "
        f"{min(shard_rows, default=0)} to {max(shard_rows, default=0)}"
    )
    _print_line(f"{'bytes':>14}  {feature_set.stored_bytes:,} in {feature_set.path}")
    _print_line(f"{'last written':>14}  {_last_written(feature_set)}")
    quantization_error = feature_set.quantization_error
    if quantization_error.squared:
        measured_text = (
            f"largest {quantization_error.largest:.3g}, root mean square "
            f"{quantization_error.relative_rms:.2e} of the values'"
        )
    else:
        measured_text = "none, the features were given in this dtype"
    _print_line(
        f"{'quantization':>14}  {measured_text} (bound of {feature_set.spec.dtype}: "
        f"{_HALF[feature_set.spec.dtype]}, measured when written)"
    )
    failures = feature_set.failures()
    _print_line(f"{'failed':>14}  {len(failures)} samples")
    for failure in failures[:20]:
        _print_line(f"{'':>14}  {failure.id}: {failure.reason}")
    if len(failures) > 20:
        _print_line(f"{'':>14}  and {len(failures) - 20} more")


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
    directories = _chosen_directories(cache, name)
    n_problems = 0
    for directory in directories:
        problems = verify_bytes(directory)
        serious_problems = [problem for problem in problems if not problem.is_harmless]
        for problem in problems:
            _print_line(f"{'note' if problem.is_harmless else problem.kind}: {problem.message}")
        n_problems += len(serious_problems)
        if not serious_problems:
            feature_set = open_feature_set(directory)
            _print_line(
                f"{directory.name} {feature_set.spec.name}: every byte of {feature_set.n_rows:,} "
                "rows is as written"
            )
    if recipe is not None and not n_problems:
        if sources:
            n_problems += _verify_sources(recipe, directories)
        if recompute:
            n_problems += _verify_recompute(recipe, directories, recompute)
    if n_problems:
        _print_line(
            f"{n_problems} problem{'s' * (n_problems > 1)}. Broken shards: `headrace cache "
            "repair`, then run again"
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

    for directory in _chosen_directories(cache, name):
        repair_report = repair(directory)
        if repair_report.is_nothing:
            _print_line(f"{directory.name}: nothing to repair")
            continue
        report_texts = [f"{len(repair_report.intact_units)} shards kept"]
        for action, unit_names in (
            ("removed", repair_report.removed_units),
            ("missing", repair_report.missing_units),
            ("listed again", repair_report.listed_units),
        ):
            report_texts += (
                [
                    (
                        f"{len(unit_names)} {action} "
                        f"({', '.join(unit_names[:5])}{', …' if len(unit_names) > 5 else ''})"
                    )
                ]
                if unit_names
                else []
            )
        report_texts += [
            f"{file_name} written again" for file_name in repair_report.rewritten_files
        ]
        _print_line(f"{directory.name}: {'; '.join(report_texts)}")


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

    used_fingerprints = None
    if recipes:
        used_fingerprints = {
            spec.fingerprint
            for recipe_path in recipes
            for _, specs in _recipe_networks(recipe_path)
            for spec in specs
        }
        used_fingerprints |= {
            fingerprint
            for recipe_path in recipes
            for fingerprint in _external_fingerprints(recipe_path)
        }
    _require_cache(cache)
    garbage = find_garbage(cache, used_fingerprints)
    for garbage_path in (*garbage.feature_sets, *garbage.temporaries, *garbage.trash):
        _print_line(str(garbage_path))
    if yes:
        garbage.remove()
        if n_dead := remove_dead(unit_leases(cache)):
            _print_line(f"{n_dead:,} leases and locks of drivers that are no more: removed")
    _print_line(
        f"{garbage.bytes / 1e6:,.1f} MB {'removed' if yes else 'would go; --yes removes them'}"
    )


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
        directory = _find_feature_set(cache, name, include_unfinished=True)
    except CacheError:
        if is_finished:
            return
        raise
    size_bytes = tree_bytes(directory)
    if not yes:
        typer.confirm(f"Remove {directory} ({size_bytes / 1e6:,.1f} MB)?", abort=True)
    remove_feature_set(directory)
    _print_line(f"{directory} removed ({size_bytes / 1e6:,.1f} MB)")


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

    format_name = kind.value if kind else target.suffix.lstrip(".")
    if format_name not in EXPORTS:
        raise CacheError(
            f"{target}: give --format, one of {', '.join(EXPORTS)}, or a name that ends in one of "
            "these"
        )
    if recipe is not None:
        feature_set, selection = _rows_of_recipe(recipe, name)
    else:
        feature_set, selection = open_feature_set(_find_feature_set(cache, name)), None
    for written_path in EXPORTS[format_name](feature_set, target, selection):
        _print_line(f"wrote {written_path}")
    if selection is not None and selection.missing:
        _print_line(
            f"{len(selection.missing):,} images of the recipe have no row and are left out: "
            f"{_first_ids(selection.missing)}. `headrace run` makes the rows of images that can be "
            "read"
        )
    if selection is None and (ambiguous_ids := find_ambiguous_ids(feature_set)):
        _print_line(
            f"{len(ambiguous_ids):,} ids stand for several images (folders with the same names, "
            f"images before and after they were edited), first {ambiguous_ids[0]!r}: the column "
            "`content` tells them apart, and --recipe exports the images of one recipe"
        )


def _require_cache(cache_root: Path) -> None:
    """Raise CacheError for a mistyped path: it must not read as a cache with nothing
    wrong in it.
    """
    if not cache_root.is_dir():
        reason = "it is a file" if cache_root.exists() else "there is no such folder"
        raise CacheError(
            f"{cache_root} is no cache: {reason}. A recipe says where its cache is; name it with "
            "--cache"
        )


def _chosen_directories(cache_root: Path, name_or_tap: str | None) -> list[Path]:
    """Return the feature set that is named, or all of them.

    Raises CacheError where there is no cache, or none of that name.
    """
    if name_or_tap:
        return [_find_feature_set(cache_root, name_or_tap)]
    _require_cache(cache_root)
    return feature_set_directories(cache_root)


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

    loaded_recipe = None
    if recipe is not None:
        from headrace.pipelines.recipe.load import load_recipe

        loaded_recipe = load_recipe(recipe)
        cache = loaded_recipe.cache
    forbidden_names = _columns_that_are_no_features(loaded_recipe) if loaded_recipe else {}
    external_features = read_external_features(
        source,
        ids_path=ids,
        feature_key=key,
        id_key=id_key,
        column_options=columns or (),
        forbidden_names=forbidden_names,
    )
    content_by_id, target_table = None, None
    if loaded_recipe is not None:
        samples, content_by_row = _samples_with_content(loaded_recipe)
        content_by_id = {
            sample_id: content_hash
            for sample_id, content_hash in zip(samples["id"], content_by_row, strict=True)
            if content_hash is not None
        }
        target_columns = loaded_recipe.task.target
        target_table = samples[
            [target_columns] if isinstance(target_columns, str) else list(target_columns)
        ].set_axis(content_by_row, axis=0)
    import_report = import_features(
        cache, name, external_features, content_by_id, dtype=dtype, target_table=target_table
    )
    report_text = (
        f"{import_report.n_rows:,} rows of shape {import_report.features.spec.shape} kept as "
        f"{name} in {import_report.features.path}"
    )
    if import_report.n_copies:
        report_text += (
            f"; {import_report.n_copies:,} are of exact copies of other images, which share a row"
        )
    if import_report.n_unknown:
        report_text += (
            f"; {import_report.n_unknown:,} have ids that no image has, and were left out"
        )
    _print_line(f"{report_text}. In a recipe: external_features: [{name}]")


def _rows_of_recipe(recipe_path: Path, name_or_tap: str) -> "tuple[FeatureSet, RowSelection]":
    """Return a feature set of the recipe's cache, and its rows of the recipe's images."""
    from headrace.cache.exchange.export import select_rows
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    feature_set = open_feature_set(_find_feature_set(recipe.cache, name_or_tap))
    samples, content_by_row = _samples_with_content(recipe)
    selection = select_rows(
        feature_set, [str(sample_id) for sample_id in samples["id"]], content_by_row
    )
    if not selection.ids:
        raise CacheError(
            f"{feature_set.path} has no row of any of the {len(samples):,} images of "
            f"{recipe_path}, the first is {selection.missing[0]!r}. `headrace run {recipe_path}` "
            "makes them"
        )
    return feature_set, selection


def _first_ids(image_ids: list[str]) -> str:
    return f"{', '.join(image_ids[:3])}{', …' if len(image_ids) > 3 else ''}"


def _columns_that_are_no_features(recipe: "Recipe") -> dict[str, str]:
    """Return {column: role} of the columns that the recipe knows to be no features: a head would
    learn its own answer.
    """
    roles = {"task.target": recipe.task.target}
    roles |= {
        f"task.{section_key}": getattr(recipe.task, section_key)
        for section_key in ("group", "split", "fold")
    }
    roles |= {
        f"images.{section_key}": getattr(recipe.images, section_key)
        for section_key in ("path_column", "id_column")
    }
    columns_by_role = {
        role: (column_names,) if isinstance(column_names, str) else column_names or ()
        for role, column_names in roles.items()
    }
    return {
        column_name: f"the recipe's {role}"
        for role, column_names in columns_by_role.items()
        for column_name in column_names
    }


def _samples_with_content(recipe: "Recipe") -> "tuple[pd.DataFrame, list[str | None]]":
    """Return the recipe's images in its order, and the content hash of each; None where it cannot
    be read.
    """
    from headrace.extract.images.content_hashes import content_hashes
    from headrace.pipelines.paths import content_index
    from headrace.pipelines.planning.dataset import list_samples

    samples = list_samples(recipe)
    return samples, list(content_hashes(samples, content_index(recipe.cache)).hashes)


def _find_feature_set(
    cache_root: Path, name_or_tap: str, *, include_unfinished: bool = False
) -> Path:
    """Return the one feature set whose fingerprint begins with `name_or_tap` or whose tap it is;
    with `include_unfinished`, also what a kill left of one.
    """
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
        _print_line(f"{fingerprint}: its removal, which was interrupted, is finished")
    return is_named


def _tap_name(directory: Path) -> str:
    try:
        return open_feature_set(directory).spec.name
    except CacheError:
        return "broken"


def _last_written(feature_set: FeatureSet) -> str:
    """Return when a shard was last written, from the files: shards hold no times, so that an
    interrupted extraction and an uninterrupted one are equal.
    """
    write_times = []
    for entry in feature_set.entries:
        shard_file = shard_path(feature_set.path, entry.unit)
        if shard_file.exists():
            write_times.append(shard_file.stat().st_mtime)
    return (
        datetime.fromtimestamp(max(write_times)).astimezone().isoformat(" ", "minutes")
        if write_times
        else "never"
    )


def _verify_sources(recipe_path: Path, directories: list[Path]) -> int:
    from headrace.cache.integrity.verify import verify_sources
    from headrace.extract.images.content_hashes import content_hashes
    from headrace.pipelines.planning.dataset import list_samples
    from headrace.pipelines.recipe.load import load_recipe

    samples = list_samples(load_recipe(recipe_path))
    with tempfile.TemporaryDirectory() as scratch_folder:
        # An index of its own: the run's would answer from sizes and times without reading.
        contents = content_hashes(samples, Path(scratch_folder) / "contents.parquet")
    # ids of one recipe are unique
    hash_by_id = dict(zip(samples["id"].astype(str), contents.hashes, strict=True))
    n_problems = 0
    for directory in directories:
        problems = verify_sources(open_feature_set(directory), hash_by_id)
        for problem in problems:
            _print_line(f"source: {problem.message}")
        n_problems += len(problems)
    _print_line(
        f"{len(hash_by_id):,} source images hashed, {n_problems} problem{'s' * (n_problems != 1)}"
    )
    return n_problems


def _verify_recompute(recipe_path: Path, directories: list[Path], n_rows: int) -> int:
    import pandas as pd

    from headrace.cache.integrity.verify import RECOMPUTE_TOLERANCE, verify_recompute
    from headrace.extract.images.content_hashes import content_hashes
    from headrace.extract.run.plan import BackboneFeatures
    from headrace.pipelines.planning.dataset import list_samples
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    samples = list_samples(recipe)
    n_problems = 0
    with tempfile.TemporaryDirectory() as scratch_folder:
        content_by_row = content_hashes(samples, Path(scratch_folder) / "contents.parquet").hashes
        samples = samples.assign(
            content=pd.Series(list(content_by_row), index=samples.index, dtype=object)
        )
        requested_fingerprints = {directory.name for directory in directories}
        for backbone, specs in _recipe_networks(recipe_path):
            for spec in specs:
                if spec.fingerprint not in requested_fingerprints:
                    continue
                feature_set = open_feature_set(feature_set_path(recipe.cache, spec))

                extract_rows = functools.partial(
                    _extract_again,
                    samples,
                    BackboneFeatures(backbone, [spec], [()]),
                    Path(scratch_folder),
                )
                has_image = np.isin(
                    feature_set.content_hashes().astype("U32"),
                    [content_hash for content_hash in content_by_row if content_hash],
                )
                report = verify_recompute(
                    feature_set, extract_rows, n_rows, candidate_rows=np.flatnonzero(has_image)
                )
                verdict = "within" if report.is_equal else "BEYOND"
                _print_line(
                    f"{spec.name}: {report.n_rows} rows extracted again differ by at most "
                    f"{report.largest_difference:.2e} of the root mean square, {verdict} the "
                    f"tolerance of {report.tolerance:.2e} ({RECOMPUTE_TOLERANCE:g} for another "
                    "machine or batch size, the rest quantization error); the furthest is "
                    f"{report.worst_id}"
                )
                n_problems += not report.is_equal
    return n_problems


def _extract_again(
    samples: "pd.DataFrame",
    network: "BackboneFeatures",
    scratch_folder: Path,
    _row_ids: list[str],
    row_contents: list[str],
) -> Rows:
    """Return (n, *shape) features of n images, by the same units of work as in a run, from a cache
    of their own.
    """
    from headrace.extract.run.plan import plan_work_units
    from headrace.extract.run.work_unit import run_work_unit

    for job in plan_work_units(
        samples[samples["content"].isin(row_contents)], [network], cache_root=scratch_folder
    ):
        run_work_unit(job)
    return open_feature_set(feature_set_path(scratch_folder, network.specs[0])).load(row_contents)


def _external_fingerprints(recipe_path: Path) -> list[str]:
    """Return the fingerprints of the external features that a recipe uses."""
    from headrace.cache.exchange.external import external_feature_sets
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    return [
        feature_set.spec.fingerprint
        for external_name in recipe.external_features
        for feature_set in external_feature_sets(recipe.cache, external_name)
    ]


def _recipe_networks(recipe_path: Path) -> "list[tuple[BackboneSpec, tuple[FeatureSpec, ...]]]":
    """Return the backbones of a recipe and the feature sets they make."""
    from headrace.extract.taps.spec_cache import load_feature_specs
    from headrace.pipelines.planning.networks import backbone_spec, storage_options
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    networks = []
    for backbone in recipe.backbones:
        network = backbone_spec(backbone, recipe)
        feature_specs = load_feature_specs(
            network, backbone.taps, cache_root=recipe.cache, **storage_options(backbone, recipe)
        )
        networks.append((network, feature_specs))
    return networks


def _print_line(text: str) -> None:
    make_console().print(text, soft_wrap=True)
