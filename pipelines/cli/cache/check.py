"""`headrace cache verify` and `repair`."""

import functools
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from headrace.cache.count_text import count_text
from headrace.cache.errors import CacheError
from headrace.cache.feature_set import open_feature_set
from headrace.cache.publish import feature_set_path
from headrace.heads.arrays import Floats
from headrace.pipelines.cli.cache.find import (
    DEFAULT_CACHE,
    CacheOption,
    OptionalNameArgument,
    chosen_directories,
    networks_of_recipe,
    print_line,
    samples_with_content,
)
from headrace.pipelines.cli.options import JsonOption, flag, print_json

if TYPE_CHECKING:
    import pandas as pd

    from headrace.extract.run.plan import BackboneFeatures
    from headrace.pipelines.cli.json_output import (
        ProblemOutput,
        RecomputedOutput,
        VerifiedFeatureSet,
    )
    from headrace.pipelines.recipe.load import Recipe

Say = Callable[[str], None]


def verify_command(
    name: OptionalNameArgument = None,
    cache: CacheOption = DEFAULT_CACHE,
    recipe: Annotated[
        Path | None, typer.Option(help="The recipe, for --sources and --recompute.")
    ] = None,
    sources: Annotated[bool, flag("--sources", help="Hash every source image again.")] = False,
    recompute: Annotated[
        int, typer.Option(help="Extract so many random rows again and compare.", min=0)
    ] = 0,
    json_output: JsonOption = False,
) -> None:
    """Read every byte, whatever was verified before. Exit code 1 when something is wrong.

    Example: headrace cache verify --recipe recipe.yaml --sources --recompute 20
    """
    if (sources or recompute) and recipe is None:
        raise CacheError(
            "--sources and --recompute need the images: give the recipe, as in --recipe recipe.yaml"
        )
    loaded_recipe = None
    if recipe is not None:
        from headrace.pipelines.recipe.load import load_recipe

        loaded_recipe = load_recipe(recipe)
        cache = loaded_recipe.cache
    say: Say = (lambda text: None) if json_output else print_line
    directories = chosen_directories(cache, name)
    verified = [_verify_bytes(directory, say) for directory in directories]
    n_problems = sum(
        not problem.is_harmless for feature_set in verified for problem in feature_set.problems
    )
    changed_sources: list[ProblemOutput] = []
    recomputed: list[RecomputedOutput] = []
    # Rows that cannot be read can neither be compared with images nor with new features.
    if loaded_recipe is not None and not n_problems:
        if sources:
            changed_sources = _verify_sources(loaded_recipe, directories, say)
        if recompute:
            recomputed = _verify_recompute(loaded_recipe, directories, recompute, say)
        n_problems = sum(not problem.is_harmless for problem in changed_sources)
        n_problems += sum(not result.is_equal for result in recomputed)
    if json_output:
        print_json(
            "cache verify",
            cache=cache,
            feature_sets=verified,
            sources=changed_sources,
            recomputed=recomputed,
            problems=n_problems,
        )
    if n_problems:
        say(
            f"{count_text(n_problems, 'problem')}. Broken shards: `headrace cache repair --cache "
            f"{shlex.quote(str(cache))}`, then run again"
        )
        raise typer.Exit(1)


def _verify_bytes(directory: Path, say: Say) -> "VerifiedFeatureSet":
    from headrace.cache.integrity.verify import verify_bytes
    from headrace.pipelines.cli.json_output import ProblemOutput, VerifiedFeatureSet

    problems = verify_bytes(directory)
    for problem in problems:
        say(f"{'note' if problem.is_harmless else problem.kind}: {problem.message}")
    tap, n_rows = None, None
    if all(problem.is_harmless for problem in problems):
        feature_set = open_feature_set(directory)
        tap, n_rows = feature_set.spec.name, feature_set.n_rows
        say(f"{directory.name} {tap}: every byte of {count_text(n_rows, 'row')} is as written")
    return VerifiedFeatureSet(
        fingerprint=directory.name,
        tap=tap,
        rows=n_rows,
        problems=tuple(map(ProblemOutput.model_validate, problems)),
    )


def _verify_sources(recipe: "Recipe", directories: list[Path], say: Say) -> "list[ProblemOutput]":
    from headrace.cache.integrity.verify import verify_sources
    from headrace.pipelines.cli.json_output import ProblemOutput

    with tempfile.TemporaryDirectory() as scratch_folder:
        # With an empty index: the run's would answer from sizes and times, without reading files.
        samples, hashes = samples_with_content(recipe, Path(scratch_folder) / "contents.parquet")
    hash_by_id = dict(zip(samples["id"].astype(str), hashes, strict=True))
    problems = [
        ProblemOutput(kind="source", message=problem.message, is_harmless=problem.is_harmless)
        for directory in directories
        for problem in verify_sources(open_feature_set(directory), hash_by_id)
    ]
    absent_messages = [problem.message for problem in problems if problem.is_harmless]
    if absent_messages:
        say(
            f"note: {count_text(len(absent_messages), 'row is', 'rows are')} of images that the "
            "recipe does not have (new ones that were predicted, other data sets', or removed): "
            f"{absent_messages[0]}"
        )
    for problem in problems:
        if not problem.is_harmless:
            say(f"source: {problem.message}")
    n_changed = len(problems) - len(absent_messages)
    say(
        f"{count_text(len(hash_by_id), 'source image')} hashed, {n_changed} "
        f"problem{'s' * (n_changed != 1)}"
    )
    return problems


def _verify_recompute(
    recipe: "Recipe", directories: list[Path], n_rows: int, say: Say
) -> "list[RecomputedOutput]":
    import pandas as pd

    from headrace.cache.integrity.verify import RECOMPUTE_TOLERANCE, verify_recompute
    from headrace.extract.run.plan import BackboneFeatures
    from headrace.pipelines.cli.json_output import RecomputedOutput

    recomputed = []
    with tempfile.TemporaryDirectory() as folder:
        scratch_folder = Path(folder)
        samples, hashes = samples_with_content(recipe, scratch_folder / "contents.parquet")
        samples = samples.assign(content=pd.Series(hashes, index=samples.index, dtype=object))
        requested_fingerprints = {directory.name for directory in directories}
        for backbone, specs in networks_of_recipe(recipe):
            for spec in specs:
                if spec.fingerprint not in requested_fingerprints:
                    continue
                feature_set = open_feature_set(feature_set_path(recipe.cache, spec))
                network = BackboneFeatures(backbone, [spec], cached=[()])
                extract_rows = functools.partial(_extract_again, samples, network, scratch_folder)
                # Rows of other recipes' images cannot be extracted again here.
                has_image = np.isin(
                    feature_set.content_hashes().astype("U32"),
                    [content_hash for content_hash in hashes if content_hash],
                )
                if not has_image.any():
                    say(f"{spec.name}: no row is of an image of the recipe; none extracted again")
                    continue
                result = verify_recompute(
                    feature_set, extract_rows, n_rows, candidate_rows=np.flatnonzero(has_image)
                )
                verdict = "within" if result.is_equal else "BEYOND"
                say(
                    f"{spec.name}: {count_text(result.n_rows, 'row')} extracted again differ by at "
                    f"most {result.largest_difference:.2e} of the root mean square, {verdict} the "
                    f"tolerance of {result.tolerance:.2e} ({RECOMPUTE_TOLERANCE:g} for another "
                    "machine or batch size, the rest quantization error); the furthest is "
                    f"{result.worst_id}"
                )
                recomputed.append(
                    RecomputedOutput(
                        tap=spec.name,
                        rows=result.n_rows,
                        largest_difference=result.largest_difference,
                        tolerance=result.tolerance,
                        is_equal=result.is_equal,
                    )
                )
    return recomputed


def _extract_again(
    samples: "pd.DataFrame",
    network: "BackboneFeatures",
    scratch_folder: Path,
    _row_ids: list[str],
    row_contents: list[str],
) -> Floats:
    """Return features (n, *shape) of n images, extracted as in a run into a scratch cache.

    _row_ids: `verify_recompute` passes them; images are found by content instead.
    """
    from headrace.extract.run.plan import plan_work_units
    from headrace.extract.run.work_unit import run_work_unit

    # Into a cache of its own: the one that is verified would answer from its own rows.
    for job in plan_work_units(
        samples[samples["content"].isin(row_contents)], [network], cache_root=scratch_folder
    ):
        run_work_unit(job)
    return open_feature_set(feature_set_path(scratch_folder, network.specs[0])).load(row_contents)


def repair_command(
    name: OptionalNameArgument = None,
    cache: CacheOption = DEFAULT_CACHE,
    json_output: JsonOption = False,
) -> None:
    """Remove broken shards and list whole ones; the next run extracts just what is missing.

    Example: headrace cache repair
    """
    from headrace.cache.integrity.repair import repair

    say: Say = (lambda text: None) if json_output else print_line
    repaired = []
    for directory in chosen_directories(cache, name):
        result = repair(directory)
        repaired.append(
            {
                "fingerprint": directory.name,
                "kept": len(result.intact_units),
                "removed": result.removed_units,
                "missing": result.missing_units,
                "listed_again": result.listed_units,
                "rewritten_files": result.rewritten_files,
            }
        )
        if result.was_consistent:
            say(f"{directory.name}: nothing to repair")
            continue
        changes = [f"{count_text(len(result.intact_units), 'shard')} kept"]
        for action, unit_names in (
            ("removed", result.removed_units),
            ("missing", result.missing_units),
            ("listed again", result.listed_units),
        ):
            if unit_names:
                names_text = ", ".join(unit_names[:5]) + (", …" if len(unit_names) > 5 else "")
                changes.append(f"{len(unit_names)} {action} ({names_text})")
        changes += [f"{file_name} written again" for file_name in result.rewritten_files]
        say(f"{directory.name}: {'; '.join(changes)}")
    if json_output:
        print_json("cache repair", cache=cache, feature_sets=repaired)
