"""The section on fine-tuned networks: the gain of each over its head, its cost, the decision."""

from typing import Any

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import REFIT
from headrace.heads.evaluate.metrics import sign
from headrace.heads.results import read_bank
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.records import RUN_AGAIN
from headrace.pipelines.report.leaders import metric_format, metric_title
from headrace.pipelines.report.page.blocks import Block, Column, Note, Section, Table
from headrace.pipelines.report.selection_and_advice import Record, blocks_of_record

_LEAD = (
    "Fine-tuned and partly reused networks, each compared with its head on the same validation "
    "rows; one that is not better is rolled back."
)


def network_sections(run: FinishedRun) -> tuple[Section, ...]:
    """Return the section; nothing if the recipe asks for no network."""
    path = run.paths.finetune_decisions
    blocks: tuple[Block, ...] = ()
    if path.exists():
        blocks = blocks_of_record(run, path, RUN_AGAIN, _network_blocks)
    elif run.recipe.finetune is not None:
        text = f"No decision is on record, for {path.name} is not there: {RUN_AGAIN}."
        blocks = (Note(text, "warning"),)
    return (Section("networks", "Head against networks", _LEAD, blocks),) if blocks else ()


def _record_row(run: FinishedRun, key: str, record: dict[str, Any]) -> dict[str, object]:
    inputs = record.get("inputs")
    network = _network_score(run, key)
    gain = record.get("gain")
    return {
        "approach": record.get("label", ""),
        "inputs": " + ".join(map(str, inputs)) if isinstance(inputs, list) else "",
        "settings": record.get("settings", ""),
        "network": network,
        # The gain was measured on the same rows, so the head's score follows from it.
        "head": None if gain is None else network - sign(run.metric) * gain,
        **{name: record.get(name) for name in ("gain", "gain_low", "gain_high", "seconds")},
        "decision": record["decision"],
        "reason": record.get("reason", ""),
    }


def _network_score(run: FinishedRun, key: str) -> float:
    """Return the network's mean score over validation folds; nan if its results are not there."""
    try:
        table = read_bank(run.paths.finetune_result(key)).table
    except (HeadraceError, OSError):
        return float("nan")
    return float(table.loc[table["fold"] != REFIT, run.metric].mean())


def _network_blocks(run: FinishedRun, decisions: Record) -> tuple[Block, ...]:
    if not decisions:
        return ()
    frame = pd.DataFrame([_record_row(run, key, record) for key, record in decisions.items()])
    numbers = ("network", "head", "gain", "gain_low", "gain_high", "seconds")
    # A field that a record lacks is None, and would make its column one of objects.
    frame = frame.astype(dict.fromkeys(numbers, float))
    title, score_format = metric_title(run.metric), metric_format(run.metric)
    columns = (
        Column(
            "decision",
            "decision",
            hint="kept: trained on all rows, and on the leaderboard; rolled back: no better",
        ),
        Column("approach", "approach"),
        Column("inputs", "inputs"),
        Column("settings", "settings"),
        Column("network", f"network's {title}", score_format, "mean over the validation folds"),
        Column("head", f"its head's {title}", score_format, "of the head that it has to beat"),
        Column(
            "gain",
            "gain over its head",
            score_format,
            "the difference of the two before it; positive is better",
        ),
        Column("gain_low", "95 % from", score_format, "paired, on the same images"),
        Column("gain_high", "to", score_format),
        Column("seconds", "seconds", "seconds", "of training, all folds together"),
        *((Column("reason", "reason"),) if (frame["reason"] != "").any() else ()),
    )
    table = Table("networks", "Every network that was looked at", columns, frame, wide=True)
    n_kept = int((frame["decision"] == "kept").sum())
    verdict = Note(
        f"{n_kept:,} of {count_text(len(frame), 'network')} kept; the best setting of the run is "
        + ("a network." if run.winner.kind == "finetune" else "a head.")
    )
    return verdict, table
