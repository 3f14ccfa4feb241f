"""The advice for a run directory: what is missing is measured once and kept in it."""

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
from headrace.pipelines.advice.run_directory import RunFiles, read_run_files
from headrace.pipelines.cluster.clients import local_client
from headrace.pipelines.console import make_console
from headrace.pipelines.finished import require_writable
from headrace.pipelines.planning.networks import backbone_spec
from headrace.pipelines.records import RunDamaged, read_record, write_record
from headrace.pipelines.selection.small_banks import train_banks


def advise_run(
    run: Path,
    *,
    reference: Path | None = None,
    console: Console | None = None,
    workers: int | None = None,
) -> Advice:
    """The advice for a run, also written to evidence/advice.json in its directory.

    A second call trains nothing.

    run: its directory, or its recipe. reference: another run, given likewise; how far the images of
    the one lie from those of the other is then part of the advice. Raises NotARun; RunReadOnly, as
    the heads that are trained for it are kept in the run; NoReference; HeadraceError where features
    are missing.
    """
    files = read_run_files(run)
    copy = shlex.quote(f"{files.paths.root.name}-copy")
    require_writable(
        files.paths, f"cp -r {shlex.quote(str(files.paths.root))} {copy} && headrace advise {copy}"
    )
    other = None if reference is None else read_run_files(reference)

    def train_all(jobs: Sequence[BankJob]) -> None:
        if jobs:
            with local_client(workers) as client:
                shown = console or make_console(quiet=True)
                train_banks(jobs, client, shown, "learning curve", shared=files.paths.claims)

    advice = advise_on(
        files.board,
        files.task,
        files.directories,
        files.paths.evidence,
        train_all,
        groups=files.groups,
        deeper=lambda names: _early_to_late(names, files),
        reference=None if other is None else (other.directories, other.task.content),
    )
    files.paths.evidence.mkdir(parents=True, exist_ok=True)
    write_record(files.paths.advice, advice_summary(advice))
    return advice


def _early_to_late(names: Sequence[str], files: RunFiles) -> list[str]:
    """Feature sets of one network in running order; as they are where the network cannot be built
    here.
    """
    specs = {name: open_feature_set(files.directories[name][0]).spec for name in names}
    memo = files.paths.evidence / "running-order.json"
    order: dict[str, list[str]] = {}
    with contextlib.suppress(OSError, RunDamaged):  # it only saves time
        order = read_record(memo)
    network = specs[names[0]].backbone if names else ""
    if network not in order:
        for backbone in files.recipe.backbones:
            spec = backbone_spec(backbone, files.recipe)
            with contextlib.suppress(HeadraceError, OSError):
                # A run's directory does not choose what is imported here: its own functions keep
                # the recipe's order.
                if spec.name == network and not spec.name.startswith("python:"):
                    order[network] = [
                        tap.node for tap in describe_backbone(spec, weights=False).taps
                    ]
                    files.paths.evidence.mkdir(parents=True, exist_ok=True)
                    write_record(memo, order)
    place = {node: number for number, node in enumerate(order.get(network, []))}
    return sorted(names, key=lambda name: place.get(specs[name].tap, len(place)))
