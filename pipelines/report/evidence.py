"""What other commands have found out about the run: the worth of the choice, the ensemble, learning
curves, transfer scores, advice. What has not been measured is a line that says which command does.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.number_format import level_text, number_text
from headrace.pipelines.planning.leaderboard import inputs_text
from headrace.pipelines.records import RUN_AGAIN, RunDamaged, read_record, read_table
from headrace.pipelines.report import figures
from headrace.pipelines.report.blocks import Block, Column, Facts, Figure, Note, Section, Table
from headrace.pipelines.report.leaders import metric_format, metric_title

Found = Mapping[str, Any]


def choice(run: FinishedRun) -> Section:
    """What the winner's score is worth once it is known to be the best of many, and who
    is as good.
    """
    blocks = _blocks(
        run.paths.selection,
        "`headrace run RECIPE` with this version measures it",
        lambda found: _choice(run, found),
    )
    lead = (
        "The best of many looks better than it is. The correction and the comparisons resample the "
        "same validation images for all."
    )
    return Section("choice", "How sure is the choice?", lead, blocks)


def ensemble(run: FinishedRun) -> Section:
    """What averaging heads is worth, and which heads."""
    how = (
        "put `ensemble: {}` into the recipe and `headrace run RECIPE` again; nothing is trained "
        "anew"
    )
    blocks = _blocks(run.paths.ensemble / "ensemble.json", how, lambda found: _ensemble(run, found))
    return Section(
        "ensemble",
        "Ensemble",
        "Heads averaged, scored on images that had no part in picking them.",
        blocks,
    )


def advice(run: FinishedRun) -> Section:
    """What would help most, the learning curve with its extrapolation, transfer scores."""
    blocks = _blocks(
        run.paths.advice,
        "`headrace advise RUN` measures it, in a minute or so",
        lambda found: _advice(run, found),
    )
    return Section(
        "advice",
        "What would help most",
        "More images, training deeper, or neither: what the cached features say.",
        blocks,
    )


def expected_text(run: FinishedRun) -> tuple[str, str] | None:
    """The winner's expected score on new images with its interval, where it has been measured."""
    found = read_json(run.paths.selection)
    try:
        value, low, high = (
            (number_text(float(found[name]), run.metric) for name in ("expected", "low", "high"))
            if found
            else (None,) * 3
        )
    except (KeyError, TypeError, ValueError):
        return None
    return (
        (
            value,
            f"95 % interval {low} to {high}, corrected for being the best of {found['tried']:,}",
        )
        if found and value
        else None
    )


def read_json(path: Path, mended_by: str = RUN_AGAIN) -> Found | None:
    """None where the file is not there. Raises RunDamaged."""
    try:
        return read_record(path, mended_by)
    except FileNotFoundError:
        return None


def _blocks(path: Path, how: str, make: Callable[[Found], list[Block]]) -> tuple[Block, ...]:
    try:
        found = read_json(path, how)
    except RunDamaged as error:
        return (Note(f"Left out: {error}.", "warning"),)
    if found is None:
        return (Note(f"Not measured: {how}."),)
    try:
        return tuple(make(found))
    except RunDamaged as error:
        return (Note(f"Left out: {error}.", "warning"),)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return (
            Note(
                f"{path.name} is of another version of headrace ({type(error).__name__}: {error})."
            ),
        )


def _choice(run: FinishedRun, found: Found) -> list[Block]:
    value, low, high, validation = (
        number_text(found[name], run.metric) for name in ("expected", "low", "high", "validation")
    )
    at_temperature = number_text(found.get("calibrated", found["validation"]), run.metric)
    facts = Facts(
        (
            (
                f"expected {metric_title(run.metric)} on new images",
                f"{value} (95 % interval {low} to {high})",
            ),
            (
                "as chosen",
                (
                    f"{validation}, the best of {found['tried']:,} settings on {found['images']:,} "
                    "validation images"
                )
                + (
                    "" if at_temperature == validation else f"; {at_temperature} at its temperature"
                ),
            ),
            (
                "as good as the winner",
                (
                    f"{found['statistically_tied']:,} of {found['tried']:,} settings cannot "
                    "be told apart from it (95 %)"
                ),
            ),
        )
    )
    path = run.paths.comparisons
    if not path.exists():
        return [facts]
    frame = pd.read_csv(read_table(path), dtype={"inputs": str, "kind": str, "settings": str})
    names = list(run.feature_specs)
    frame = frame.assign(inputs=[inputs_text(text.split(" + "), names) for text in frame["inputs"]])
    frame["statistically_tied"] = frame["statistically_tied"].fillna(False).astype(bool)
    columns = (
        Column("rank", "rank", "count"),
        Column("inputs", "inputs"),
        Column("kind", "kind"),
        Column("settings", "settings"),
        Column(
            "difference",
            "behind the winner",
            "number",
            f"in {metric_title(run.metric)}, on the same images",
        ),
        Column("low", "95 % from", "number"),
        Column("high", "to", "number"),
        Column(
            "p_corrected",
            "p",
            "number",
            "that it is as good as the winner, corrected for the number of comparisons",
        ),
        Column("statistically_tied", "tied", "yes", "whether it may be the truly best one (95 %)"),
    )
    there = tuple(column for column in columns if column.name in frame.columns)
    return [
        facts,
        Table(
            "comparisons",
            "Every setting against the winner",
            there,
            frame,
            filters=("statistically_tied", "kind"),
            search=True,
        ),
    ]


def _ensemble(run: FinishedRun, found: Found) -> list[Block]:
    nested, metric = found["nested"], found["nested"]["metric"]
    value, low, high, single = (
        number_text(nested[name], metric) for name in ("value", "low", "high", "single")
    )
    level = level_text(nested["level"])
    selected = (
        (
            f"It is the selected model: the {level} interval of its gain over a single head "
            "lies above 0."
        )
        if nested["chosen"]
        else (
            f"The {level} interval of its gain over a single head reaches 0: the winner stays the "
            "selected."
        )
    )
    gain = (
        f"{nested['gain']:+.4f} ({level} interval {nested['gain_low']:+.4f} to "
        f"{nested['gain_high']:+.4f})"
    )
    names = list(run.feature_specs)
    frame = pd.DataFrame(
        [
            {
                "weight": member["weight"],
                "rank": member["rank"],
                "inputs": inputs_text(member["inputs"], names),
                "kind": member["kind"],
                "settings": member["settings"],
            }
            for member in found["members"]
        ]
    )
    columns = (
        Column("weight", "weight", "share"),
        Column("rank", "rank", "count"),
        Column("inputs", "inputs"),
        Column("kind", "kind"),
        Column("settings", "settings"),
    )
    return [
        Facts(
            (
                (f"validation {metric_title(metric)}", f"{value} (95 % interval {low} to {high})"),
                ("the best single head, picked on other images too", single),
                ("better by", gain),
                ("temperature", f"{found['temperature']:.3f}"),
            )
        ),
        Note(selected, "good" if nested["chosen"] else "note"),
        Table("ensemble", "Its heads", columns, frame, sortable=False, wide=True),
    ]


def _advice(run: FinishedRun, found: Found) -> list[Block]:
    blocks: list[Block] = [
        Note(str(found["sentence"]), "good"),
        *(Note(str(reason)) for reason in found["reasons"]),
    ]
    evidence = found.get("evidence")
    if not evidence:
        return blocks
    if evidence["curve"].get("images"):
        blocks.append(_curve(evidence))
    if evidence["scores"]:
        frame = pd.DataFrame(evidence["scores"])
        titles = {
            "name": ("feature set", "text", ""),
            "width": ("features", "count", ""),
            "logme": (
                "LogME",
                "number",
                "log evidence per image of a linear model (You et al. 2021); higher is better",
            ),
            "h_score": ("H-score", "number", "Bao et al. 2019, with shrinkage; higher is better"),
            "nce": (
                "NCE",
                "number",
                (
                    "negative conditional entropy (Tran et al. 2019), where logits are kept; "
                    "higher is better"
                ),
            ),
            "neighbours": ("nearest neighbours", "share", "accuracy of the nearest neighbours"),
            "bayes_low": (
                "Bayes error from",
                "share",
                "Cover and Hart 1967: no head on these features errs less",
            ),
            "bayes_high": ("to", "share", ""),
        }
        columns = tuple(
            Column(name, *about)  # type: ignore[arg-type]
            for name, about in titles.items()
            if name in frame.columns
        )
        blocks.append(
            Table(
                "transfer-scores",
                "Transfer scores: how well features suit the task, without a head",
                columns,
                frame,
            )
        )
    return blocks


def _curve(evidence: Found) -> Figure:
    images, errors = (
        list(map(float, evidence["curve"]["images"])),
        list(map(float, evidence["curve"]["error"])),
    )
    last, error = images[-1], errors[-1]
    ahead = [
        (last * int(times), *(float(left[name]) for name in ("value", "low", "high")))
        for times, left in evidence["ahead"].items()
    ]
    points = [(last, error, error, error), *sorted(ahead)]
    more = [point[0] for point in points]
    scale = 100
    lines = {
        "measured": (images, [scale * value for value in errors]),
        "extrapolated": (more, [scale * point[1] for point in points]),
    }
    band = {
        "extrapolated": (
            [scale * point[2] for point in points],
            [scale * point[3] for point in points],
        )
    }
    svg = figures.curves(
        lines, band, dashed=("extrapolated",), xlabel="images trained on", ylabel="error (points)"
    )
    frame = pd.DataFrame(
        {
            "images": images + more[1:],
            "error": errors + [point[1] for point in points[1:]],
            "low": [None] * len(images) + [point[2] for point in points[1:]],
            "high": [None] * len(images) + [point[3] for point in points[1:]],
        }
    )
    columns = (
        Column("images", "images trained on", "count"),
        Column("error", "error", metric_format("accuracy")),
        Column("low", "95 % from", metric_format("accuracy"), "of the extrapolated part"),
        Column("high", "to", metric_format("accuracy")),
    )
    return Figure(
        svg,
        "Learning curve: the error of the best head against the images trained on, from "
        f"{images[0]:,.0f} to {last:,.0f} images measured, and beyond that extrapolated; the "
        "numbers are in the table below.",
        "Learning curve of the best head at each size; dashed: a power law's extrapolation with "
        "its 95 % interval.",
        Table("learning-curve", "Learning curve", columns, frame, sortable=False),
    )
