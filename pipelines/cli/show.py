"""Plans and results as tables and sentences on the terminal."""

import math
from collections import Counter
from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table

from headrace.cache.count_text import count_text
from headrace.heads.evaluate.metrics import METRICS, sign
from headrace.pipelines.number_format import (
    bytes_text,
    images_text,
    is_share,
    level_text,
    number_text,
    work_text,
)
from headrace.pipelines.planning.accounting import Accounting
from headrace.pipelines.planning.cost_model import Estimate
from headrace.pipelines.planning.leaderboard import grouped_board, inputs_text
from headrace.pipelines.planning.plan import Plan
from headrace.pipelines.result import RunResult
from headrace.pipelines.run import ExtractionResult

_N_LEADERBOARD_ROWS = 12
_MIN_WIDTH_FOR_LINES = 100  # characters; narrower, a table of eight columns would be cut


def show_features(console: Console, plan: Plan, cache: object) -> None:
    """Print what would be extracted and what is cached; also the time, if no heads are planned."""
    table = Table(title="Features", title_justify="left")
    table.add_column("tap")
    for column in ("shape", "images to extract", "there", "new bytes"):
        table.add_column(column, justify="right")
    for feature in plan.features:
        table.add_row(
            feature.name,
            " x ".join(map(str, feature.shape)),
            f"{feature.rows_total - feature.rows_cached:,}",
            f"{feature.rows_cached:,}",
            bytes_text(feature.bytes_new),
        )
    console.print(table)
    console.print(
        f"{plan.images_new:,} of {count_text(plan.images, 'image')} go through a network, in "
        f"{count_text(len(plan.units), 'work unit')}; "
        f"{bytes_text(sum(feature.bytes_new for feature in plan.features))} to write in {cache}",
        soft_wrap=True,
    )
    if not plan.requested:
        console.print(
            f"Tasks: {count_text(len(plan.units), 'work unit')}; about {_work(plan.estimate)}. "
            f"Done already: {count_text(plan.images - plan.images_new, 'image')}",
            soft_wrap=True,
        )


def show_extraction(console: Console, result: ExtractionResult) -> None:
    """Print what `headrace extract` has done, and the paths of the feature sets."""
    extraction = result.extraction
    notes = list(extraction.notes)
    if result.failed:
        notes.append(
            f"{count_text(result.failed, 'image could', 'images could')} not be used; each "
            f"is listed with its reason in {extraction.recipe.paths.failed_images}"
        )
    show_notes(console, notes)
    n_found = extraction.listing.found
    parts = (
        (len(extraction.samples) - result.failed, "with features"),
        (result.failed, "that cannot be used"),
        (n_found - len(extraction.samples), "left out"),
    )
    counts = " + ".join(f"{count:,} {use}" for count, use in parts if count)
    console.print(f"Images: {n_found:,} found = {counts}", soft_wrap=True)
    console.print(
        f"{result.new:,} of {count_text(extraction.plan.images, 'image')} went through a network, "
        f"in {result.seconds:,.1f} s",
        soft_wrap=True,
    )
    console.print("Features", style="italic")
    for name, view_paths in extraction.feature_paths.items():
        for view_path in view_paths:
            console.print(f"  {name:<32} {view_path}", soft_wrap=True)


def _work(estimate: Estimate) -> str:
    basis = (
        "measured in earlier calls of this run"
        if estimate.measured
        else "assumed until a first call has measured it"
    )
    gpu = f" and {work_text(estimate.gpu_s, 'GPU')}" if estimate.gpu_s else ""
    return f"{work_text(estimate.core_s, 'core')}{gpu} ({basis})"


def show_plan(console: Console, plan: Plan, cache: object, out: object) -> None:
    """Print what would be extracted and trained, and what is already there."""
    show_features(console, plan, cache)
    all_names = [feature.name for feature in plan.features]
    table = Table(title="Heads", title_justify="left")
    table.add_column("inputs")
    table.add_column("kind")
    for column in ("settings", "heads", "heads to train"):
        table.add_column(column, justify="right")
    # Banks are what is left to train; what is planned is in `requested`.
    missing = {(bank.inputs, spec) for bank in plan.banks for spec in bank.specs}
    settings: Counter[tuple[tuple[str, ...], str]] = Counter()
    to_train: Counter[tuple[tuple[str, ...], str]] = Counter()
    # Added up: one kind may be planned as several banks, such as with and without class weights.
    for inputs, specs, _ in plan.requested:
        settings[inputs, specs[0].kind] += len(specs)
        to_train[inputs, specs[0].kind] += sum((inputs, spec) in missing for spec in specs)
    for (inputs, kind), count in settings.items():
        table.add_row(
            inputs_text(inputs, all_names),
            kind,
            f"{count:,}",
            f"{count * plan.n_folds:,}",
            f"{to_train[inputs, kind] * plan.n_folds:,}",
        )
    console.print(table)
    console.print(
        f"{plan.heads_new:,} of {count_text(plan.heads_total, 'head')} to train "
        f"({count_text(plan.n_folds, 'fold')} each), in {count_text(len(plan.banks), 'bank')}; "
        f"results in {out}",
        soft_wrap=True,
    )
    console.print(
        f"Tasks: {count_text(len(plan.units), 'work unit')} and "
        f"{count_text(len(plan.banks), 'bank')}; about {_work(plan.estimate)}. Done already: "
        f"{count_text(plan.images - plan.images_new, 'image')}, "
        f"{count_text(plan.heads_total - plan.heads_new, 'head')}",
        soft_wrap=True,
    )


def show_images(console: Console, accounting: Accounting | None, notes: Sequence[str]) -> None:
    """Print the counts of images, of which every entry of the source is one, and the notes."""
    if accounting is not None:
        console.print(accounting.sentence(), soft_wrap=True)
    show_notes(console, notes)


def show_notes(console: Console, notes: Sequence[str]) -> None:
    """Print notes: cautions about the data or the settings."""
    for note in notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)


def show_result(console: Console, result: RunResult, *, reference: str | None = None) -> None:
    """Print the leaderboard, the winner, its test score and the time taken."""
    console.print(leaderboard_table(console, result.board, result.metric, result.names))
    notes = list(result.notes)
    if result.failed_images:
        notes.append(
            f"{count_text(result.failed_images, 'image could', 'images could')} not be read; "
            f"each is listed with its reason in {result.paths.failed_images}"
        )
    if result.failed_heads:
        notes.append(
            f"{count_text(result.failed_heads, 'head')} failed; each has its reason in the "
            f"column `error` of {result.paths.heads}; --retry-failed tries them again"
        )
    show_images(console, result.accounting, notes)
    # A lone row is the head that no network was compared with.
    if result.finetuned is not None and len(result.finetuned.compared) > 1:
        console.print(finetune_table(console, result))
        for approach_text in finetune_lines(result):
            console.print(approach_text, soft_wrap=True)
    winner = result.winner
    console.print()
    console.print(
        f"Winner: {winner.kind} {winner.settings} on "
        f"{inputs_text(winner.inputs, result.names)}, chosen on {winner.folds} validation "
        f"folds alone: {result.metric} {number_text(winner.score, result.metric)}",
        style="bold",
    )
    for sentence in (*selection_sentences(result), *ensemble_sentences(result)):
        console.print(sentence)
    if result.test is None:
        console.print("No test split: set task.test_fraction, or a split column with test rows")
    else:
        test = result.test
        console.print(
            f"Test {test.metric} {number_text(test.value, test.metric)} (95 % interval "
            f"{number_text(test.low, test.metric)} to {number_text(test.high, test.metric)}), on "
            f"{images_text(test.images, test.groups, test.units, group_column=result.group_column)}"
            " never seen before",
            style="bold green",
        )
        if test.n_evaluations > 1:
            console.print(
                f"note: {test.n_evaluations} different winners have now been shown this test "
                "split; each time, its score says a little less about new images",
                style="yellow",
            )
    if reference:
        console.print(reference)
    if result.stages:
        console.print()
        console.print(stages_table(result))


def finetune_table(console: Console, result: RunResult) -> Table:
    """Return a table of head, partial reuse, fine-tuned network and ensemble, on the same
    validation rows and with 95 % intervals; `finetune_lines` has their settings.
    """
    metric = result.metric
    table = _wide_table(
        console, f"Head against networks: validation {metric}, same rows, 95 % intervals"
    )
    table.add_column("approach", overflow="fold")
    for column in (metric, "its head", "gain over its head", "minutes", "decision"):
        table.add_column(column, justify="right", overflow="fold")
    assert result.finetuned is not None
    for _, row in result.finetuned.compared.iterrows():
        table.add_row(
            row["approach"],
            _interval_text(row[metric], row["low"], row["high"], metric),
            # The gain was measured on the same rows, so that this is exactly the head's score.
            number_text(row[metric] - sign(metric) * row["gain"], metric),
            _interval_text(row["gain"], row["gain_low"], row["gain_high"], metric),
            "–" if math.isnan(row["minutes"]) else f"{row['minutes']:.1f}",
            row["decision"],
        )
    if result.ensemble is not None:
        ensemble = result.ensemble
        table.add_row(
            "ensemble",
            _interval_text(ensemble.value, ensemble.low, ensemble.high, metric),
            "–",
            _interval_text(ensemble.gain, ensemble.gain_low, ensemble.gain_high, metric),
            "–",
            "selected" if ensemble.chosen else f"not better at {level_text(ensemble.level)}",
        )
    return table


def finetune_lines(result: RunResult) -> list[str]:
    """Return a line for each row of `finetune_table`, with its settings and inputs."""
    assert result.finetuned is not None
    return [
        f"  {row['approach']}: {row['settings']} on {inputs_text(row['inputs'], result.names)}"
        for _, row in result.finetuned.compared.iterrows()
    ]


def _interval_text(value: float, low: float, high: float, metric: str) -> str:
    """Return "85.01 % (82.00 to 88.00)"."""
    if math.isnan(value):
        return "–"
    ends = [number_text(end, metric).removesuffix(" %") for end in (low, high)]
    return f"{number_text(value, metric)} ({ends[0]} to {ends[1]})"


def selection_sentences(result: RunResult) -> list[str]:
    """Return the winner's expected score, and how many settings are as good."""
    found = result.selection
    if found is None:
        return []
    texts = [number_text(value, found.metric) for value in (found.expected, found.low, found.high)]
    choice = "the only setting"
    if found.tried > 1:
        choice = f"corrected for being the best of {count_text(found.tried, 'setting')}"
    lines = [
        f"Expected on new images: {found.metric} {texts[0]} (95 % interval {texts[1]} to "
        f"{texts[2]}), {choice}"
    ]
    if found.statistically_tied > 1:
        line = (
            f"{found.statistically_tied:,} of {count_text(found.tried, 'setting')} cannot be told "
            f"apart on these {found.images:,} {result.scored}"
        )
        if found.cheapest > 1:
            cheapest = result.board[result.board["rank"] == found.cheapest].iloc[0]
            line += (
                f"; the one with the fewest features of them: {cheapest['kind']} "
                f"{cheapest['settings']} on {inputs_text(cheapest['inputs'], result.names)} (rank "
                f"{found.cheapest}, {cheapest['features']:,} features)"
            )
        lines.append(line)
    return lines


def ensemble_sentences(result: RunResult) -> list[str]:
    """Return the ensemble's score and gain, and whether it is the selected model."""
    found = result.ensemble
    if found is None:
        return []
    value, low, high = (
        number_text(end, found.metric) for end in (found.value, found.low, found.high)
    )
    gain, gain_low, gain_high = (
        f"{end * 100:+.2f} points" if is_share(found.metric) else f"{end:+.4f}"
        for end in (found.gain, found.gain_low, found.gain_high)
    )
    if len(found.members) == 1:
        return ["Ensemble: no second head makes the best single one better"]
    level = level_text(found.level)
    verdict = (
        "the interval is above 0, so the ensemble is selected"
        if found.chosen
        else "the interval reaches 0, so the winner stays selected"
    )
    members = count_text(len(found.members), "member")
    return [
        f"Ensemble of {members} on {count_text(len(found.networks), 'network')}: "
        f"{found.metric} {value} (95 % interval {low} to {high}, on images that did not pick it); "
        f"against the best single head, picked the same way, {gain} ({level} interval {gain_low} "
        f"to {gain_high}): {verdict}"
    ]


def _wide_table(console: Console, title: str) -> Table:
    """Return an empty table, without lines between columns if the terminal is narrow."""
    if console.width < _MIN_WIDTH_FOR_LINES:
        return Table(title=title, title_justify="left", box=None, pad_edge=False)
    return Table(title=title, title_justify="left")


def leaderboard_table(
    console: Console, board: pd.DataFrame, metric: str, names: Sequence[str]
) -> Table:
    """Return a table of the best setting for each kind of head on each combination of inputs."""
    grouped = grouped_board(board, metric)
    better = "higher" if METRICS[metric].higher_is_better else "lower"
    table = _wide_table(
        console,
        f"Leaderboard: best of each tap and kind by mean validation {metric} ({better} is better), "
        f"of {count_text(len(board), 'setting')}",
    )
    table.add_column("rank", justify="right")
    table.add_column("inputs", overflow="fold")
    table.add_column("best setting", overflow="fold")  # folded at its blanks first
    for column in ("of", metric, "± s.e.", "features"):
        table.add_column(column, justify="right")
    for _, row in grouped.head(_N_LEADERBOARD_ROWS).iterrows():
        table.add_row(
            str(row["rank"]),
            inputs_text(row["inputs"], names),
            f"{row['kind']} {row['settings']}",
            str(row["tried"]),
            number_text(row[metric], metric),
            number_text(row["standard_error"], metric),
            f"{row['features']:,}",
        )
    if len(grouped) > _N_LEADERBOARD_ROWS:
        table.caption = (
            f"and {count_text(len(grouped) - _N_LEADERBOARD_ROWS, 'more group')} in the files below"
        )
    return table


def stages_table(result: RunResult) -> Table:
    """Return a table of what each stage did and how long it took."""
    table = Table(title="Time", title_justify="left")
    table.add_column("stage")
    table.add_column("did")
    table.add_column("seconds", justify="right")
    for record in result.stages:
        table.add_row(record.name, record.did, f"{record.seconds:,.1f}")
    table.add_row(
        "total", "", f"{sum(record.seconds for record in result.stages):,.1f}", style="bold"
    )
    return table


def show_files(console: Console, result: RunResult) -> None:
    """Print the paths of the results, one a line and unwrapped, to be copied."""
    rows = (
        ("leaderboard", result.paths.leaderboard),
        ("every head, every fold", result.paths.heads),
        ("every setting against the winner", result.paths.comparisons),
        ("winner (safetensors + JSON)", result.paths.winner),
        ("every image, predicted", result.paths.predictions),
        ("results of the banks (HDF5)", result.paths.banks),
        ("features (HDF5 shards)", next(iter(result.feature_paths.values()))[0].parent),
    )
    # One a line and unwrapped, to be copied.
    console.print("Files", style="italic")
    for contents, path in rows:
        console.print(f"  {contents:<32} {path}", soft_wrap=True)
