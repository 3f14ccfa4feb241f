"""Heads that were trained on as networks: what each gained over its head, what it took, and what
was decided.
"""

import pandas as pd

from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.records import RUN_AGAIN
from headrace.pipelines.report.blocks import Block, Column, Note, Section, Table
from headrace.pipelines.report.leaders import metric_title
from headrace.pipelines.report.selection_and_advice import read_json

_LEAD = (
    "Fine-tuned and partly reused networks, each compared with its head on the same validation "
    "rows; one that is not better is rolled back."
)


def network_sections(run: FinishedRun) -> tuple[Section, ...]:
    """The section; none where no network was asked for."""
    found = read_json(run.paths.finetune_decisions)
    if found is None and run.recipe.finetune is not None:
        text = (
            f"No decision is on record, for {run.paths.finetune_decisions.name} is not there: "
            f"{RUN_AGAIN}."
        )
        return (Section("networks", "Head against networks", _LEAD, (Note(text, "warning"),)),)
    if not found:
        return ()
    try:
        blocks = _network_blocks(
            run, pd.DataFrame([_record_row(record) for record in found.values()])
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = (
            f"{run.paths.finetune_decisions.name} is of another version of headrace "
            f"({type(error).__name__}: {error})."
        )
        blocks = (Note(text),)
    return (Section("networks", "Head against networks", _LEAD, blocks),)


def _record_row(record: dict[str, object]) -> dict[str, object]:
    inputs = record.get("inputs")
    return {
        "approach": record.get("label", ""),
        "inputs": " + ".join(map(str, inputs)) if isinstance(inputs, list) else "",
        "settings": record.get("settings", ""),
        **{name: record.get(name) for name in ("gain", "gain_low", "gain_high", "seconds")},
        "decision": record["decision"],
        "reason": record.get("reason", ""),
    }


def _network_blocks(run: FinishedRun, frame: pd.DataFrame) -> tuple[Block, ...]:
    numbers = ("gain", "gain_low", "gain_high", "seconds")
    frame = frame.astype(dict.fromkeys(numbers, float))
    columns = (
        Column(
            "decision",
            "decision",
            hint="kept: trained on all rows, and on the leaderboard; rolled back: no better",
        ),
        Column("approach", "approach"),
        Column("inputs", "inputs"),
        Column("settings", "settings"),
        Column(
            "gain",
            "gain over its head",
            "number",
            f"in {metric_title(run.metric)}, mean over folds; positive is better",
        ),
        Column("gain_low", "95 % from", "number"),
        Column("gain_high", "to", "number"),
        Column("seconds", "seconds", "seconds", "of training, all folds together"),
        *((Column("reason", "reason"),) if (frame["reason"] != "").any() else ()),
    )
    table = Table("networks", "Every network that was looked at", columns, frame, wide=True)
    kept = int((frame["decision"] == "kept").sum())
    verdict = Note(
        f"{kept:,} of {len(frame):,} networks kept; the best setting of the run is "
        + ("a network." if run.winner["kind"] == "finetune" else "a head.")
    )
    return verdict, table
