"""What the run has cost: time of each stage, an estimate of the energy, bytes on disk."""

import os
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import REFIT
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.number_format import bytes_text
from headrace.pipelines.report.blocks import Block, Column, Facts, Note, Section, Table

# What the Green Algorithms calculator takes where the processor is not known (Lannelongue, Grealey
# and Inouye 2021, Advanced Science 8:2100707): watts of a busy core, of a GPU, and of a gigabyte of
# memory.
WATTS_PER_CORE, WATTS_PER_GPU, WATTS_PER_GB = 12.0, 200.0, 0.3725


def cost(run: FinishedRun, watts: float | None = None) -> Section:
    """The section. watts: what the machine draws while it works, where the user knows it."""
    stages = run.stages
    blocks: list[Block] = [Note(text, "warning") for text in run.damaged_records]
    if not stages.empty:
        power, assumption = _power(run, watts)
        by_stage = (
            stages.groupby("name", sort=False)
            .agg(seconds=("seconds", "sum"), calls=("seconds", "size"))
            .reset_index()
        )
        # What the stage did when it had something to do: the later calls on finished work say
        # "nothing missing".
        longest = stages.loc[stages.groupby("name")["seconds"].idxmax()].set_index("name")["did"]
        by_stage["did"] = by_stage["name"].map(longest)
        by_stage["energy"] = by_stage["seconds"] * power / 3600
        total = float(by_stage["seconds"].sum())
        columns: tuple[Column, ...] = (
            Column("name", "stage"),
            Column("did", "did"),
            Column("seconds", "seconds", "seconds"),
            Column("energy", "energy, Wh (estimate)", "number"),
            Column("calls", "calls", "count"),
        )
        heads = int((run.heads["fold"] != REFIT).sum())
        blocks += [
            Facts(
                (
                    ("time, all calls together", seconds_text(total)),
                    (
                        "heads trained",
                        (
                            f"{heads:,}, "
                            f"{float(run.heads['seconds'].sum()) / max(len(run.heads), 1):.3g} s "
                            "each on average"
                        ),
                    ),
                    ("energy (estimate)", energy_text(total * power / 3600)),
                )
            ),
            Table(
                "stages",
                "Stage by stage, all calls of this run together",
                columns,
                by_stage,
                sortable=False,
            ),
            Note(assumption),
        ]
        every = stages[["ended", "name", "did", "seconds"]]
        columns = (
            Column("ended", "ended"),
            Column("name", "stage"),
            Column("did", "did"),
            Column("seconds", "seconds", "seconds"),
        )
        blocks.append(Table("calls", "Every stage of every call", columns, every))
    blocks.append(_bytes(run))
    return Section(
        "cost", "Cost", "What this run has taken, and what it keeps on disk.", tuple(blocks)
    )


def seconds_text(seconds: float) -> str:
    """ "3 min 20 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def energy_text(watt_hours: float) -> str:
    """ "12.3 Wh"."""
    return f"{watt_hours / 1000:.3g} kWh" if watt_hours >= 1000 else f"{watt_hours:.3g} Wh"


def _power(run: FinishedRun, watts: float | None) -> tuple[float, str]:
    if watts is not None:
        return (
            watts,
            f"Energy is an estimate: wall time × the {watts:g} W that were given with --watts.",
        )
    records = run.environments
    latest = records.iloc[-1].to_dict() if not records.empty else {}
    cores = int(latest.get("workers") or latest.get("cores") or os.cpu_count() or 1)
    memory = float(latest.get("memory_bytes") or 0) / 1e9
    gpu = (
        not records.empty and (records["device"] != "cpu").any()
    )  # a later call may have had nothing to extract
    power = cores * WATTS_PER_CORE + gpu * WATTS_PER_GPU + memory * WATTS_PER_GB
    parts = [f"{cores} busy core{'s' * (cores > 1)} at {WATTS_PER_CORE:g} W"]
    parts += [f"a GPU at {WATTS_PER_GPU:g} W"] if gpu else []
    parts += [f"{memory:.0f} GB of memory at {WATTS_PER_GB} W each"] if memory else []
    return power, (
        f"Energy is an estimate and was not measured: wall time × {power:.0f} W "
        f"({', '.join(parts)}; the figures of Lannelongue, Grealey and Inouye 2021, "
        "doi:10.1002/advs.202100707, for a processor that is not known), without cooling. If you "
        "know what your machine draws: headrace report RUN --watts 95."
    )


def _bytes(run: FinishedRun) -> Table:
    rows: list[dict[str, Any]] = []
    for name in run.feature_specs:
        try:
            views = run.open_features(name)
        except (HeadraceError, OSError):
            continue
        shape = " × ".join(map(str, views[0].spec.shape))
        rows.append(
            {
                "what": f"features {name}",
                "detail": f"{views[0].n_rows:,} rows of {shape} {views[0].spec.dtype}"
                + (f", {len(views)} views" if len(views) > 1 else ""),
                "bytes": sum(view.stored_bytes for view in views),
            }
        )
    for what, detail, path in (
        (
            "results of heads",
            "weights, held-out predictions and metrics of every head",
            run.paths.banks,
        ),
        ("winner", "one head, ready to use", run.paths.winner),
    ):
        rows.append({"what": what, "detail": detail, "bytes": _size(path)})
    total = sum(int(row["bytes"]) for row in rows)
    columns = (
        Column("what", "what"),
        Column("detail", "detail"),
        Column("bytes", "bytes", "bytes"),
    )
    return Table(
        "bytes",
        f"On disk: {bytes_text(total)} (other runs use the same features)",
        columns,
        pd.DataFrame(rows),
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
