"""Two runs beside each other: paired differences on the images that both have judged, which images
changed, class by class, leaderboards and recipes.
"""

import difflib
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.heads.arrays import Array, Index, Mask, Strings
from headrace.heads.data.task import REFIT
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.finished import FinishedRun, read_finished_run
from headrace.pipelines.number_format import number_text
from headrace.pipelines.planning.leaderboard import inputs_text
from headrace.pipelines.report.build import run_thumbnails
from headrace.pipelines.report.cost import seconds_text
from headrace.pipelines.report.judged import JudgedSide, class_texts, judged_sides, one_by_one
from headrace.pipelines.report.leaders import metric_format, metric_title
from headrace.pipelines.report.page.blocks import (
    Block,
    Code,
    Column,
    Gallery,
    Headline,
    Note,
    Section,
    Table,
    make_table,
)
from headrace.pipelines.report.page.thumbnails import Thumbnails
from headrace.pipelines.report.paired import paired_metrics
from headrace.pipelines.report.provenance import recipe_text
from headrace.pipelines.report.selected_model import find_selected, test_predictions
from headrace.pipelines.report.write import Report, require_ours, write_page, written_text
from headrace.pipelines.run_directory import require_writable

SHOWN = 12  # pictures of images that became right, and of images that became wrong
FIRST, SECOND = "A", "B"  # the runs' names on the page


@dataclass(frozen=True)
class PairedSide:
    """The n images of one side (validation or test) that both runs have predicted, by models that
    did not train on them; the first of several copies of an image.
    """

    name: str  # "validation" or "test"
    ids: Strings  # (n,) of the first run
    content: Strings  # (n,) content hashes
    target: Array  # (n,) class positions of the first run, or (n, C)
    predictions: Array  # (2, n, C), classes in the first run's order
    groups: Index  # (n,) of the first run
    alone: tuple[int, int]  # images that only the first, and only the second, has predicted
    relabelled: int  # images that are left out because the two runs label them differently


def write_comparison(
    first: Path,
    second: Path,
    out: Path | None = None,
    *,
    tables: bool = False,
    trust_code: Collection[str] = (),
) -> Report:
    """Write the page that compares two finished runs to `out`, by default compare-NAME.html in the
    first one's directory, NAME being the second.

    first, second, tables, trust_code: as of `write_report`. Raises InvalidInput for runs of
    different tasks, or that share no judged image; NoWinner, HeadraceError, OutputExists, OSError.
    """
    runs = tuple(read_finished_run(run, trust_code=trust_code) for run in (first, second))
    page_path = out or runs[0].paths.root / f"compare-{runs[1].paths.root.name}.html"
    if out is None:
        command = f"headrace report {shlex.quote(str(first))} {shlex.quote(str(second))}"
        require_writable(runs[0].paths, f"{command} --out comparison.html")
    require_ours(page_path)
    require_same_task(*runs)
    sides, remarks = paired_sides(*runs)
    # Images that both have judged are among the first run's.
    thumbnails = run_thumbnails(runs[0])
    metrics = {
        side.name: paired_metrics(runs[0].task_kind, side.target, side.predictions, side.groups)
        for side in sides
    }
    sections = (
        _score_section(runs, sides, metrics, remarks),
        # The test images first: the winners were chosen on the others.
        *(_change_section(runs, side, thumbnails) for side in reversed(sides)),
        *(_class_section(runs, sides) if runs[0].task_kind == "single" else ()),
        _leaders_section(runs),
        _recipe_section(runs),
    )
    byline = f"A is {runs[0].paths.root}, B is {runs[1].paths.root}; {written_text()}"
    return write_page(
        page_path,
        f"{runs[0].paths.root.name} and {runs[1].paths.root.name}",
        byline,
        _headline(runs, sides, metrics),
        sections,
        tables=tables,
        missing_images=thumbnails.missing,
    )


def require_same_task(first: FinishedRun, second: FinishedRun) -> None:
    """Raise InvalidInput unless both predict the same classes, labels or targets."""
    other_way = "Each has a page of its own: headrace report RUN"
    if first.task_kind != second.task_kind:
        raise InvalidInput(
            f"{first.paths.root} is a {first.task_kind} task and {second.paths.root} a "
            f"{second.task_kind} one: their predictions cannot be compared. {other_way}"
        )
    # Their order may differ: `paired_sides` renumbers those of the second run.
    if differing := sorted(set(first.classes) ^ set(second.classes)):
        named = ", ".join(repr(name) for name in differing[:5])
        raise InvalidInput(
            f"{first.paths.root} predicts {len(first.classes)} classes and {second.paths.root} "
            f"{len(second.classes)}; not in both: {named}"
            f"{', …' if len(differing) > 5 else ''}. {other_way}"
        )


def paired_sides(
    first: FinishedRun, second: FinishedRun
) -> tuple[tuple[PairedSide, ...], list[Note]]:
    """Return the sides (validation, test) that the runs share images of, and notes on them.

    Raises InvalidInput if there are none.
    """
    by_run, remarks = [], []
    for letter, run in ((FIRST, first), (SECOND, second)):
        tested = test_predictions(run, find_selected(run))
        if isinstance(tested, str):
            remarks.append(Note(f"No test images of {letter}: {tested}.", "warning"))
        by_run.append({side.name: side for side in judged_sides(run, tested)})
    # `require_same_task` has seen to it that both have the same classes.
    order = [second.classes.index(name) for name in first.classes]
    sides = []
    for name in by_run[0]:
        if name in by_run[1]:
            side = _pair(first.task_kind, by_run[0][name], by_run[1][name], order)
            remarks += _side_remarks(side)
            if len(side.ids):
                sides.append(side)
    if not sides:
        raise InvalidInput(
            f"{first.paths.root} and {second.paths.root} have judged no image in common: their "
            "scores are of different images, and say nothing of each other. Run both on the same "
            "images and split (task.split, or the same seed), then compare"
        )
    return tuple(sides), remarks


def _pair(task_kind: str, first: JudgedSide, second: JudgedSide, order: list[int]) -> PairedSide:
    """Return the images that both sides have. order: positions of the first run's classes in the
    second run.
    """
    # Images are matched by content, because two runs may name one file differently.
    (content_1, rows_1), (content_2, rows_2) = (
        np.unique(side.content, return_index=True) for side in (first, second)
    )
    common, at_1, at_2 = np.intersect1d(
        content_1, content_2, assume_unique=True, return_indices=True
    )
    rows_1, rows_2 = rows_1[at_1], rows_2[at_2]
    target_1, target_2 = first.target[rows_1], second.target[rows_2]
    # Classes are numbered as in the first run.
    target_2 = np.argsort(order)[target_2] if task_kind == "single" else target_2[:, order]
    same_target = target_1 == target_2
    # Of several labels, all must be the same.
    same_target = same_target.all(1) if same_target.ndim > 1 else same_target
    rows_1, rows_2 = rows_1[same_target], rows_2[same_target]
    return PairedSide(
        first.name,
        first.ids[rows_1],
        common[same_target],
        target_1[same_target],
        np.stack([first.predicted[rows_1], second.predicted[rows_2][:, order]]),
        first.groups[rows_1],
        alone=(len(content_1) - len(common), len(content_2) - len(common)),
        relabelled=int((~same_target).sum()),
    )


def _side_remarks(side: PairedSide) -> list[Note]:
    remarks = []
    if any(side.alone):
        remarks.append(
            f"The two {side.name} splits are not the same images: {len(side.ids):,} are in both "
            f"and compared here, {side.alone[0]:,} are in A's alone and {side.alone[1]:,} in B's "
            "alone."
        )
    if side.relabelled:
        remarks.append(
            f"{count_text(side.relabelled, f'{side.name} image')} left out: another label in B "
            "than in A."
        )
    return [Note(text, "warning") for text in remarks]


def _headline(
    runs: tuple[FinishedRun, ...], sides: tuple[PairedSide, ...], metrics: dict[str, pd.DataFrame]
) -> Headline:
    side = sides[-1]  # the test images, where there are any
    frame, metric = metrics[side.name], runs[0].metric
    row = frame[frame["metric"] == metric].to_dict("records")[0]
    where = f"on {count_text(len(side.ids), f'{side.name} image')} that both have judged"
    verdict = "no difference beyond chance" if row["low"] <= 0 <= row["high"] else "beyond chance"
    values = [
        (
            f"{letter}: {run.paths.root.name}",
            number_text(row[column], metric),
            f"{metric_title(metric)} {where}",
        )
        for letter, run, column in zip((FIRST, SECOND), runs, ("first", "second"), strict=True)
    ]
    values.append(
        (
            "B less A",
            _signed(row["difference"], metric),
            f"95 % interval {_signed(row['low'], metric)} to {_signed(row['high'], metric)}: "
            f"{verdict}",
        )
    )
    if runs[0].task_kind != "regression":
        hits = _hits(runs[0].task_kind, side)
        values.append(
            (
                "changed",
                count_text(int((hits[0] != hits[1]).sum()), "image"),
                f"{int((~hits[0] & hits[1]).sum()):,} became right, "
                f"{int((hits[0] & ~hits[1]).sum()):,} became wrong",
            )
        )
    return Headline(tuple(values))


def _signed(value: float, metric: str) -> str:
    # The difference of two percentages is in percentage points.
    text = number_text(abs(value), metric).replace(" %", " points")
    return f"{'−' if value < 0 else '+'}{text}"


def _score_section(
    runs: tuple[FinishedRun, ...],
    sides: tuple[PairedSide, ...],
    metrics: dict[str, pd.DataFrame],
    remarks: list[Note],
) -> Section:
    frame = pd.concat(
        [metrics[side.name].assign(side=side.name, images=len(side.ids)) for side in sides[::-1]],
        ignore_index=True,
    )
    frame["metric"] = [metric_title(name) for name in frame["metric"]]
    table = Table(
        "paired",
        "Every metric of both on the same images",
        (
            Column("side", "side"),
            Column("images", "images", "count"),
            Column("metric", "metric"),
            Column("first", FIRST, "number"),
            Column("second", SECOND, "number"),
            Column("difference", "B less A", "number"),
            Column(
                "low",
                "95 % from",
                "number",
                "of the difference, paired: Newcombe 1998 for the accuracy, else a bootstrap over "
                "groups of images",
            ),
            Column("high", "to", "number"),
        ),
        frame,
        filters=("side",),
        page=25,
    )
    first, second = (find_selected(run).heads for run in runs)
    answers = f"{first} of A and {second} of B"
    lead = (
        "Validation images are predicted by each run's winner, without the fold that an image is "
        "in; both winners were chosen on them, so the test images have the last word. Test images "
        f"are predicted by what each run answers with: {answers}."
        f"{one_by_one(runs[0])}"
    )
    return Section("scores", "The same images, twice", lead, (*remarks, table))


def _hits(task_kind: str, side: PairedSide) -> Mask:
    """Return (2, n) whether each run is right: for several labels, about every one of them."""
    if task_kind == "single":
        return np.asarray(side.predictions.argmax(2) == side.target)
    return np.asarray(((side.predictions >= 0.5) == (side.target > 0)).all(2))


def _change_section(
    runs: tuple[FinishedRun, ...], side: PairedSide, thumbnails: Thumbnails
) -> Section:
    """Show which images became right and which wrong; for a regression, whose errors changed."""
    title = f"What changed, {side.name} images"
    if runs[0].task_kind == "regression":
        blocks = _error_blocks(runs[0], side)
        lead = "The errors of A and B on every image, the largest change first."
    else:
        blocks = _right_or_wrong_blocks(runs[0], side, thumbnails)
        lead = "The images on which A and B differ, the surest first."
    return Section(f"changed-{side.name}", title, lead, tuple(blocks))


def _right_or_wrong_blocks(
    run: FinishedRun, side: PairedSide, thumbnails: Thumbnails
) -> list[Block]:
    hits = _hits(run.task_kind, side)
    changed = np.flatnonzero(hits[0] != hits[1])
    # The surest first: by the largest change of a probability.
    change_size = np.abs(side.predictions[1, changed] - side.predictions[0, changed]).max(1)
    changed = changed[np.argsort(-change_size, kind="stable")]
    table = make_table(
        f"changed-{side.name}",
        f"Every image that changed, {side.name} images",
        {
            Column("id", "image"): side.ids[changed],
            Column("change", "change"): np.where(hits[1, changed], "became right", "became wrong"),
            Column("label", "label"): class_texts(run, side.target[changed]),
            Column("first", "A says"): class_texts(run, side.predictions[0, changed]),
            Column("second", "B says"): class_texts(run, side.predictions[1, changed]),
        },
        filters=("change", "label"),
        search=True,
    )
    blocks: list[Block] = [_agreement_table(side, hits)]
    if table.frame.empty:
        return [*blocks, Note("Both are right and wrong on the same images.")]
    shown = table.frame.assign(content=side.content[changed].astype(str))
    for change, rows in shown.groupby("change"):
        pictures = tuple(
            thumbnails.picture(
                [row["content"]],
                [f"{change}: label {row['label']}"],
                str(row["id"]),
                (("label", row["label"]), (FIRST, row["first"]), (SECOND, row["second"])),
            )
            for row in rows.head(SHOWN).to_dict("records")
        )
        caption = f"{count_text(len(rows), 'image')} {change} in B, the surest first"
        blocks.append(Gallery(caption, pictures))
    return [*blocks, table]


def _agreement_table(side: PairedSide, hits: Mask) -> Table:
    first, second = hits
    columns = {
        Column("first", "A ↓ B →"): ["right", "wrong"],
        Column("right", "right", "count"): [(first & second).sum(), (~first & second).sum()],
        Column("wrong", "wrong", "count"): [(first & ~second).sum(), (~first & ~second).sum()],
    }
    caption = f"Both on {count_text(len(side.ids), f'{side.name} image')}"
    return make_table(f"agreement-{side.name}", caption, columns, sortable=False)


def _error_blocks(run: FinishedRun, side: PairedSide) -> list[Block]:
    # A number is neither right nor wrong: all images are listed, by how much their errors changed.
    errors = np.abs(side.predictions - side.target).mean(2)
    order = np.argsort(-np.abs(errors[1] - errors[0]), kind="stable")
    hint = "absolute, mean over the targets"
    columns = {
        Column("id", "image"): side.ids[order],
        Column("first", "A's error", "number", hint): errors[0, order],
        Column("second", "B's error", "number"): errors[1, order],
        Column("difference", "B less A", "number"): (errors[1] - errors[0])[order],
    }
    caption = f"Errors of both, {side.name} images, the largest change first"
    return [make_table(f"changed-{side.name}", caption, columns, search=True)]


def _class_section(
    runs: tuple[FinishedRun, ...], sides: tuple[PairedSide, ...]
) -> tuple[Section, ...]:
    frames = []
    for side in reversed(sides):
        hits = side.predictions.argmax(2) == side.target
        counts = np.bincount(side.target, minlength=len(runs[0].classes))
        frame = pd.DataFrame({"side": side.name, "class": runs[0].classes, "images": counts})
        for name, is_right in zip(("first", "second"), hits, strict=True):
            n_right = np.bincount(side.target[is_right], minlength=len(counts))
            frame[name] = n_right / np.maximum(counts, 1)
        # A class without images on this side has no recall.
        frames.append(frame[frame["images"] > 0])
    frame = pd.concat(frames, ignore_index=True)
    frame["difference"] = frame["second"] - frame["first"]
    table = Table(
        "recalls",
        "Recall class by class, the largest loss first",
        (
            Column("side", "side"),
            Column("class", "class"),
            Column("images", "images", "count"),
            Column("first", FIRST, "share"),
            Column("second", SECOND, "share"),
            Column("difference", "B less A", "share"),
        ),
        frame.sort_values("difference", kind="stable", ignore_index=True),
        filters=("side",),
        search=True,
        page=15,
    )
    return (Section("classes", "Class by class", "", (table,)),)


def _leaders_section(runs: tuple[FinishedRun, ...]) -> Section:
    boards = []
    for letter, run in zip((FIRST, SECOND), runs, strict=True):
        names = list(run.feature_specs)
        columns = ["rank", run.metric, "standard_error", "kind", "inputs", "settings"]
        board = run.board[columns].rename(columns={run.metric: "score"})
        inputs = [inputs_text(inputs, names) for inputs in board["inputs"]]
        boards.append(board.assign(run=letter, inputs=inputs, metric=metric_title(run.metric)))
    frame = pd.concat(boards, ignore_index=True)
    keys = ["kind", "inputs", "settings"]
    shared = boards[0].merge(boards[1], on=keys, suffixes=("_first", "_second"))
    shared["difference"] = shared["score_second"] - shared["score_first"]
    # Scores of two metrics stand in one column, with what each is beside it.
    has_one_metric = runs[0].metric == runs[1].metric
    score_format = metric_format(runs[0].metric) if has_one_metric else "number"
    blocks: list[Block] = [
        Table(
            "leaderboards",
            "Both leaderboards, by rank",
            (
                Column("run", "run"),
                Column("rank", "rank", "count"),
                Column("score", "validation score", score_format),
                Column("metric", "metric"),
                Column("standard_error", "± s.e.", score_format),
                *(Column(name, name) for name in keys),
            ),
            # The settings of one rank stand below each other.
            frame.sort_values(["rank", "run"], ignore_index=True),
            filters=("run", "kind"),
            search=True,
            page=20,
        )
    ]
    if len(shared) and has_one_metric:
        blocks.append(
            Table(
                "shared-settings",
                f"{count_text(len(shared), 'setting')} that both have tried",
                (
                    *(Column(name, name) for name in keys),
                    Column("score_first", FIRST, score_format),
                    Column("score_second", SECOND, score_format),
                    Column("difference", "B less A", score_format),
                ),
                shared.sort_values("rank_first", ignore_index=True),
                search=True,
            )
        )
    blocks.append(_cost_table(runs))
    blocks += [
        Note(f"{letter}: {damage}", "warning")
        for letter, run in zip((FIRST, SECOND), runs, strict=True)
        for damage in run.damaged_records
    ]
    lead = (
        "Validation scores, each on its run's own folds: they are paired in the first section, and "
        "only there."
    )
    return Section("leaderboards", "Leaderboards", lead, tuple(blocks))


def _cost_table(runs: tuple[FinishedRun, ...]) -> Table:
    columns = {
        Column("run", "run"): [FIRST, SECOND],
        Column("settings", "settings", "count"): [len(run.board) for run in runs],
        Column("heads", "heads", "count"): [
            int((run.heads["fold"] != REFIT).sum()) for run in runs
        ],
        Column("time", "time, all calls together"): [
            "–" if run.stages.empty else seconds_text(float(run.stages["seconds"].sum()))
            for run in runs
        ],
    }
    return make_table("costs", "What both have taken", columns, sortable=False)


def _recipe_section(runs: tuple[FinishedRun, ...]) -> Section:
    first, second = (recipe_text(run).splitlines() for run in runs)
    difference = "\n".join(difflib.unified_diff(first, second, FIRST, SECOND, lineterm="", n=2))
    block = Code("The recipes' differences", difference) if difference else Note("None.")
    return Section("recipes", "What differs in the recipes", "", (block,))
