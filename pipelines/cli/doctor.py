"""`headrace doctor`: tries everything that a run needs of this machine.

Each check is a function whose arguments default to this machine, so that a test can make it fail.
"""

import importlib.metadata
import platform
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from headrace.cache.errors import HeadraceError
from headrace.cache.home import expand_home
from headrace.pipelines.cli.options import JsonOption, print_json
from headrace.pipelines.console import make_console
from headrace.pipelines.doctor.disk import check_disk, check_hdf5, check_locking
from headrace.pipelines.doctor.finding import Finding
from headrace.pipelines.doctor.machine import check_heads, check_memory, check_threads
from headrace.pipelines.doctor.network import check_ports, check_weights
from headrace.pipelines.doctor.software import (
    check_cuda,
    check_libraries,
    check_python,
    check_torch,
)


def check_recipe(recipe_path: Path) -> Finding:
    """Check that the recipe is valid and the files with its backbones' weights exist."""
    from headrace.extract.spec import check_spec
    from headrace.pipelines.planning.networks import backbone_spec
    from headrace.pipelines.recipe.load import load_recipe

    try:
        recipe = load_recipe(recipe_path)
        for backbone in recipe.backbones:
            check_spec(backbone_spec(backbone, recipe))
    # Shown as a finding, so that the checks after it are made.
    except HeadraceError as error:
        return Finding(
            "recipe",
            "fail",
            str(error),
            f"mend {recipe_path}, then: headrace run {shlex.quote(str(recipe_path))} --dry-run",
        )
    backbone_names = ", ".join(backbone.name for backbone in recipe.backbones)
    return Finding("recipe", "ok", f"{recipe_path}: {backbone_names}")


def examine(folder: Path, recipe: Path | None) -> Iterator[Finding]:
    """Yield the finding of every check, in order; slow checks run in threads beside the others."""
    # Torch's import and the disk's speed take seconds.
    with ThreadPoolExecutor(2) as thread_pool:
        torch_check = thread_pool.submit(check_torch)  # slow: it imports torch
        disk_check = thread_pool.submit(check_disk, folder)
        yield check_python()
        yield check_libraries()
        yield torch_check.result()
        weights_check = thread_pool.submit(check_weights)
        yield check_cuda()
        yield check_threads()
        yield check_heads()
        yield check_memory()
        yield disk_check.result()
        yield check_locking(folder)
        yield check_ports()
        yield check_hdf5(folder)
        yield weights_check.result()
        if recipe is not None:
            yield check_recipe(recipe)


def doctor_command(
    recipe: Annotated[
        Path | None, typer.Argument(help="Also look at this recipe, its folders and its weights.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where features are to be kept; default: the recipe's cache, or here."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Try what a run needs of this machine; every line passes or says what to do.

    Exit code 1 when something fails.

    Example: headrace doctor recipe.yaml
    """
    findings = examine(_folder(folder, recipe), recipe)
    version = importlib.metadata.version("headrace")
    if json_output:
        all_findings = tuple(findings)
        print_json("doctor", version=version, platform=platform.platform(), findings=all_findings)
        raise typer.Exit(any(finding.state == "fail" for finding in all_findings))
    console = make_console()
    marks = {"ok": ("ok", "green"), "note": ("note", "yellow"), "fail": ("FAIL", "bold red")}
    # Findings are printed as they come: the slowest takes seconds.
    console.print(f"headrace {version} on {platform.platform()}", soft_wrap=True)
    n_failed = 0
    for finding in findings:
        n_failed += finding.state == "fail"
        mark, style = marks[finding.state]
        console.print(f"{mark:<4}", style=style, end="")
        console.print(f"  {finding.name:<10}{finding.observation}", soft_wrap=True)
        if finding.advice and finding.state != "ok":
            console.print(f"{'':<16}→ {finding.advice}", soft_wrap=True)
    if n_failed:
        console.print(
            f"{n_failed} {'thing' if n_failed == 1 else 'things'} to mend; the arrows say how",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    console.print("Everything that a run needs is here")


def _folder(folder: Path | None, recipe: Path | None) -> Path:
    """Return the cache's folder, or before a first run has made it, its nearest parent."""
    cache_folder = folder or Path()
    if folder is None and recipe is not None:
        from headrace.pipelines.recipe.load import load_recipe

        try:
            cache_folder = load_recipe(recipe).cache
        except HeadraceError:
            cache_folder = recipe.parent  # check_recipe reports the error
    cache_folder = expand_home(cache_folder).absolute()
    return next(ancestor for ancestor in (cache_folder, *cache_folder.parents) if ancestor.is_dir())
