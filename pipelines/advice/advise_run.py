"""Advice on a run: measurements are made once, and are kept in the run's directory."""

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import open_feature_set
from headrace.extract.taps.describe import describe_backbone
from headrace.heads.bank import BankJob
from headrace.pipelines.advice.decide import Advice, advice_summary
from headrace.pipelines.advice.measure import advise_on
from headrace.pipelines.cluster.clients import local_client
from headrace.pipelines.console import make_console
from headrace.pipelines.finished import FinishedRun, read_finished_run
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.planning.networks import backbone_spec
from headrace.pipelines.records import RunDamaged, read_record, write_record
from headrace.pipelines.run_directory import require_writable
from headrace.pipelines.selection.small_banks import train_banks


def advise_run(
    run: Path | str,
    *,
    reference: Path | str | None = None,
    console: Console | None = None,
    workers: int | None = None,
) -> Advice:
    """Return the advice on a run, and write it to advice/advice.json in the run's directory.

    A second call trains nothing.

    run: its directory, or its recipe.
    reference: another run, given likewise; the advice then says how far the images of `run` are
    from its images.
    workers: worker processes, by default one per core.

    Raises InvalidInput; HeadraceError if features are missing, or if nothing can be written into
    the run, which keeps the heads that are trained for the advice.
    """
    finished = read_finished_run(run)
    # Absolute, because workers have a working directory of their own.
    paths = RunPaths(finished.paths.root.absolute())
    copy = shlex.quote(f"{paths.root.name}-copy")
    require_writable(
        paths, f"cp -r {shlex.quote(str(paths.root))} {copy} && headrace advise {copy}"
    )
    reference_run = None if reference is None else read_finished_run(reference)

    def train_all(jobs: Sequence[BankJob]) -> None:
        if jobs:
            with local_client(workers) as client:
                progress = console or make_console(quiet=True)
                train_banks(jobs, client, progress, "learning curve", paths.leases)

    advice = advise_on(
        finished.board,
        finished.task,
        finished.feature_paths,
        paths.advice_folder,
        train_all,
        groups=finished.groups,
        sort_by_depth=lambda names: _early_to_late(names, finished),
        reference=(
            None
            if reference_run is None
            else (reference_run.feature_paths, reference_run.task.content)
        ),
    )
    paths.advice_folder.mkdir(parents=True, exist_ok=True)
    write_record(paths.advice, advice_summary(advice))
    return advice


def _early_to_late(names: Sequence[str], run: FinishedRun) -> list[str]:
    """Return feature sets of one backbone in the order in which it computes them; unchanged if the
    backbone cannot be built here.
    """
    specs = {name: open_feature_set(run.feature_paths[name][0]).spec for name in names}
    order_path = run.paths.advice_folder / "running-order.json"
    node_order: dict[str, list[str]] = {}
    with contextlib.suppress(OSError, RunDamaged):  # the file only saves time
        node_order = read_record(order_path)
    backbone_name = specs[names[0]].backbone if names else ""
    if backbone_name not in node_order:
        for backbone in run.recipe.backbones:
            spec = backbone_spec(backbone, run.recipe)
            # A network that cannot be built here is no error: the order of the recipe will do.
            with contextlib.suppress(HeadraceError, OSError):
                # A run's directory must not choose what is imported here: backbones that are a
                # Python function keep the recipe's order.
                if spec.name == backbone_name and not spec.name.startswith("python:"):
                    taps = describe_backbone(spec).taps
                    node_order[backbone_name] = [tap.node for tap in taps]
                    run.paths.advice_folder.mkdir(parents=True, exist_ok=True)
                    write_record(order_path, node_order)
    position = {node: index for index, node in enumerate(node_order.get(backbone_name, []))}
    return sorted(names, key=lambda name: position.get(specs[name].tap, len(position)))
