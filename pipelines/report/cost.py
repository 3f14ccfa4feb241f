"""The section on a run's cost: time of each stage, an estimate of the energy, bytes on disk."""

import os
from typing import Any

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.integrity.garbage import tree_bytes
from headrace.heads.data.task import REFIT
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.number_format import bytes_text, utc_text
from headrace.pipelines.report.page.blocks import Block, Column, Facts, Note, Section, Table

# What the Green Algorithms calculator takes where the processor is not known (Lannelongue, Grealey
# and Inouye 2021, Advanced Science 8:2100707): watts of a busy core, of a GPU, and of a gigabyte of
# memory.
WATTS_PER_CORE, WATTS_PER_GPU, WATTS_PER_GB = 12.0, 200.0, 0.3725


def cost_section(run: FinishedRun, watts: float | None = None) -> Section:
    """Return the section. watts: what the machine draws while it works, if the user knows it."""
    stages = run.stages
    # Records that cannot be read are missing in the sums below.
    cost_blocks: list[Block] = [Note(damage_text, "warning") for damage_text in run.damaged_records]
    if not stages.empty:
        power_watts, assumption_text = _machine_power(run, watts)
        by_stage = stages.groupby("name", sort=False, as_index=False).agg(
            seconds=("seconds", "sum"), calls=("seconds", "size")
        )
        # Later calls on finished work say "nothing missing"; the longest call says what was done.
        longest_calls = stages.loc[stages.groupby("name")["seconds"].idxmax()]
        by_stage["did"] = by_stage["name"].map(longest_calls.set_index("name")["did"])
        by_stage["energy"] = by_stage["seconds"] * power_watts / 3600
        total_seconds = float(by_stage["seconds"].sum())
        table_columns: tuple[Column, ...] = (
            Column("name", "stage"),
            Column("did", "did"),
            Column("seconds", "seconds", "seconds"),
            Column("energy", "energy, Wh (estimate)", "number"),
            Column("calls", "calls", "count"),
        )
        n_heads = int((run.heads["fold"] != REFIT).sum())
        seconds_each = float(run.heads["seconds"].sum()) / max(len(run.heads), 1)
        watt_hours = total_seconds * power_watts / 3600
        energy_text = (
            f"{watt_hours / 1000:.3g} kWh" if watt_hours >= 1000 else f"{watt_hours:.3g} Wh"
        )
        cost_blocks += [
            Facts(
                {
                    "time, all calls together": seconds_text(total_seconds),
                    "heads trained": f"{n_heads:,}, {seconds_each:.3g} s each on average",
                    "energy (estimate)": energy_text,
                }
            ),
            Table(
                "stages",
                "Stage by stage, all calls of this run together",
                table_columns,
                by_stage,
                sortable=False,
                wide=True,
            ),
            Note(assumption_text),
        ]
        call_frame = stages.assign(ended=stages["ended"].map(utc_text))
        call_columns = (Column("ended", "ended"), *table_columns[:3])
        cost_blocks.append(
            Table("calls", "Every stage of every call", call_columns, call_frame, wide=True)
        )
    cost_blocks.append(_bytes_table(run))
    return Section(
        "cost", "Cost", "What this run has taken, and what it keeps on disk.", tuple(cost_blocks)
    )


def seconds_text(seconds: float) -> str:
    """Return a duration such as "3 min 20 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest_seconds} s"


def _machine_power(run: FinishedRun, watts: float | None) -> tuple[float, str]:
    """Return the power in watts, and a sentence that says what it rests on."""
    # What a person has measured comes before any table of usual figures.
    if watts is not None:
        return (
            watts,
            f"Energy is an estimate: wall time × the {watts:g} W that were given with --watts.",
        )
    machine_records = run.environments
    latest_record = machine_records.iloc[-1].to_dict() if not machine_records.empty else {}
    n_cores = int(latest_record.get("workers") or latest_record.get("cores") or os.cpu_count() or 1)
    memory_gb = float(latest_record.get("memory_bytes") or 0) / 1e9
    # Any of the calls: the latest may have had nothing to extract.
    has_gpu = not machine_records.empty and (machine_records["device"] != "cpu").any()
    power_watts = n_cores * WATTS_PER_CORE + has_gpu * WATTS_PER_GPU + memory_gb * WATTS_PER_GB
    power_parts = [f"{count_text(n_cores, 'busy core')} at {WATTS_PER_CORE:g} W"]
    power_parts += [f"a GPU at {WATTS_PER_GPU:g} W"] if has_gpu else []
    power_parts += [f"{memory_gb:.0f} GB of memory at {WATTS_PER_GB} W each"] if memory_gb else []
    return power_watts, (
        f"Energy is an estimate and was not measured: wall time × {power_watts:.0f} W "
        f"({', '.join(power_parts)}; the figures of Lannelongue, Grealey and Inouye 2021, "
        "doi:10.1002/advs.202100707, for a processor that is not known), without cooling. If you "
        "know what your machine draws: headrace report RUN --watts 95."
    )


def _bytes_table(run: FinishedRun) -> Table:
    size_rows: list[dict[str, Any]] = []
    for feature_name in run.feature_specs:
        try:
            views = run.open_features(feature_name)
        # Features may have been removed since the run: then they take no bytes.
        except (HeadraceError, OSError):
            continue
        shape_text = " × ".join(map(str, views[0].spec.shape))
        detail = f"{count_text(views[0].n_rows, 'row')} of {shape_text} {views[0].spec.dtype}"
        detail += f", {len(views)} views" if len(views) > 1 else ""
        n_bytes = sum(view.stored_bytes for view in views)
        size_rows.append({"what": f"features {feature_name}", "detail": detail, "bytes": n_bytes})
    results_text = "weights, held-out predictions and metrics of every head"
    for what, detail, folder in (
        ("results of heads", results_text, run.paths.banks),
        ("fine-tuned networks", "results and networks of every candidate", run.paths.finetune),
        ("winner", "trained on all training rows, ready to use", run.paths.winner),
        ("ensemble", "its members, ready to use", run.paths.ensemble),
    ):
        if folder.exists():
            size_rows.append({"what": what, "detail": detail, "bytes": tree_bytes(folder)})
    total_bytes = sum(int(row["bytes"]) for row in size_rows)
    table_columns = (
        Column("what", "what"),
        Column("detail", "detail"),
        Column("bytes", "bytes", "bytes"),
    )
    return Table(
        "bytes",
        f"On disk: {bytes_text(total_bytes)} (other runs may use the same features)",
        table_columns,
        pd.DataFrame(size_rows),
        wide=True,
    )
