"""`headrace run`: the command, and what it prints.

Most imports are inside the functions, as in `main`.
"""

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from headrace.cache.count_text import count_text
from headrace.pipelines.cli.completion import complete_runs
from headrace.pipelines.cli.options import (
    ClusterOption,
    DryRunOption,
    JsonOption,
    ProgressOption,
    QuietOption,
    SetOption,
    StrictOption,
    VerboseOption,
    WorkersOption,
    flag,
    print_json,
    progress_console,
    resumable,
)
from headrace.pipelines.console import make_console, valid_text
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.number_format import images_text, is_share, level_text, number_text

if TYPE_CHECKING:
    import pandas as pd

    from headrace.pipelines.cli.json_output import JsonOutput
    from headrace.pipelines.recipe.load import Recipe
    from headrace.pipelines.result import RunResult

# Of the leaderboard: leaderboard.csv has all; of ten thousand settings the object of --json would
# be larger than the table.
_N_TABLE_ROWS, _N_JSON_ROWS = 12, 100
_MIN_WIDTH_FOR_LINES = 100  # characters; narrower, a table of eight columns would be cut
# The files that --json names, of RunPaths.
_FILES = ("leaderboard", "heads", "comparisons", "winner", "predictions", "banks", "failed_images")


def run_command(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="The recipe, a YAML file; `headrace init` writes one.",
            autocompletion=complete_runs,
        ),
    ],
    dry_run: DryRunOption = False,
    workers: WorkersOption = None,
    strict: StrictOption = False,
    retry_failed: Annotated[
        bool,
        flag("--retry-failed", help="Train the heads that failed in an earlier call once more."),
    ] = False,
    cluster: ClusterOption = None,
    settings: SetOption = None,
    progress: ProgressOption = "auto",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    json_output: JsonOption = False,
) -> None:
    """Extract and train what is missing, rank, and score the winner on the test split.

    Interrupted at any moment, the same command goes on where it was. --dry-run shows first what it
    would do.

    Example: headrace run recipe.yaml --dry-run
    """
    from headrace.pipelines.recipe.load import on_cluster, strictly
    from headrace.pipelines.recipe.text import naming_lines

    loaded_recipe = load_runnable(recipe, tuple(settings or ()))
    if cluster:
        loaded_recipe = on_cluster(loaded_recipe, cluster)
    if strict:
        loaded_recipe = strictly(loaded_recipe)
    progress_output = progress_console(quiet=quiet, verbose=verbose, progress_format=progress)
    with resumable(), naming_lines(recipe):
        if dry_run:
            # With the options of this call, without which another plan would be carried out.
            words = ["headrace", "run", str(recipe)]
            words += [f"--cluster={cluster}"] if cluster else []
            words += [f"--set={setting}" for setting in settings or ()]
            words += ["--strict"] if strict else []
            words += ["--retry-failed"] if retry_failed else []
            _print_plan(
                loaded_recipe,
                progress_output,
                shlex.join(words),
                retry_failed=retry_failed,
                json_output=json_output,
            )
        else:
            run_and_show(
                loaded_recipe,
                progress_output,
                workers,
                retry_failed=retry_failed,
                json_output=json_output,
            )
    if not dry_run and not json_output and not quiet:
        make_console().print(
            f"Next: headrace report {shlex.quote(str(recipe))}     # one page to look at: "
            "mistakes, likely label errors, near-duplicates",
            soft_wrap=True,  # a wrapped command could not be copied
        )


def load_runnable(recipe_path: Path, settings: tuple[str, ...] = ()) -> "Recipe":
    """Load a recipe whose run can be written. Raises RecipeError, InvalidInput."""
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path, settings=settings)
    out_folder = str(recipe.paths.root)
    # A run's tables are UTF-8, and contain paths of its other files.
    if valid_text(out_folder) != out_folder:
        raise InvalidInput(
            f"out: {out_folder}: a name in this path is no UTF-8, so that results cannot be kept "
            "there. Rename it, or set `out` in the recipe to another folder; if the name is right "
            "and the locale is not, set LC_ALL=C.UTF-8"
        )
    return recipe


def _print_plan(
    recipe: "Recipe", progress: Console, next_command: str, *, retry_failed: bool, json_output: bool
) -> None:
    from headrace.pipelines.cli.show import plan_fields, show_images, show_plan
    from headrace.pipelines.planning.plan import check_space
    from headrace.pipelines.planning.run_state import read_run_state

    state = read_run_state(recipe, write=False, retry_failed=retry_failed, console=progress)
    if json_output:
        # Before the object: an error is printed as an object, too, and would be a second.
        check_space(state.plan, recipe.cache, recipe.storage.budget_gb)
        fields = plan_fields(recipe, state.plan, state.accounting, state.notes)
        print_json("run --dry-run", **fields)
        return
    console = make_console()
    show_images(console, state.accounting, state.notes)
    show_plan(console, state.plan, recipe.cache, recipe.out)
    console.print(f"Next: {next_command}", soft_wrap=True)
    # After the plan, in which a person sees what needs the space.
    check_space(state.plan, recipe.cache, recipe.storage.budget_gb)


def run_and_show(
    recipe: "Recipe",
    progress: Console,
    workers: int | None,
    *,
    retry_failed: bool = False,
    reference: str | None = None,
    json_output: bool = False,
) -> None:
    """Run a recipe, and print its result. reference: a text to compare the score with."""
    from headrace.pipelines.cluster.survive_hangup import outlive_terminal
    from headrace.pipelines.run import run_recipe

    outlive_terminal(recipe.paths.terminal)
    result = run_recipe(recipe, console=progress, workers=workers, retry_failed=retry_failed)
    if json_output:
        print_json("run", **run_fields(result))
    else:
        console = make_console()
        show_result(console, result, reference=reference)
        show_files(console, result)


def show_result(console: Console, result: "RunResult", *, reference: str | None = None) -> None:
    """Print the leaderboard, the winner, its test score and the time taken.

    reference: a line below the scores to compare them with.
    """
    from headrace.pipelines.cli.show import show_images

    console.print(leaderboard_table(console, result))
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
        f"{result.inputs_text(winner.inputs)}, chosen on {winner.folds} validation "
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


def finetune_table(console: Console, result: "RunResult") -> Table:
    """Return a table of head, partial reuse, fine-tuned network and ensemble, on the same
    validation rows and with 95 % intervals; `finetune_lines` has their settings.
    """
    from headrace.heads.evaluate.metrics import sign

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


def finetune_lines(result: "RunResult") -> list[str]:
    """Return a line for each row of `finetune_table`, with its settings and inputs."""
    assert result.finetuned is not None
    return [
        f"  {row['approach']}: {row['settings']} on {result.inputs_text(row['inputs'])}"
        for _, row in result.finetuned.compared.iterrows()
    ]


def _interval_text(value: float, low: float, high: float, metric: str) -> str:
    """Return "85.01 % (82.00 to 88.00)"."""
    if math.isnan(value):
        return "–"
    ends = [number_text(end, metric).removesuffix(" %") for end in (low, high)]
    return f"{number_text(value, metric)} ({ends[0]} to {ends[1]})"


def selection_sentences(result: "RunResult") -> list[str]:
    """Return the winner's expected score, and how many settings are as good."""
    selection = result.selection
    if selection is None:
        return []
    texts = [
        number_text(value, selection.metric)
        for value in (selection.expected, selection.low, selection.high)
    ]
    choice = "the only setting"
    if selection.tried > 1:
        choice = f"corrected for being the best of {count_text(selection.tried, 'setting')}"
    lines = [
        f"Expected on new images: {selection.metric} {texts[0]} (95 % interval {texts[1]} to "
        f"{texts[2]}), {choice}"
    ]
    if selection.statistically_tied > 1:
        line = (
            f"{selection.statistically_tied:,} of {count_text(selection.tried, 'setting')} cannot "
            f"be told apart on these {selection.images:,} {result.scored}"
        )
        if selection.cheapest > 1:
            cheapest = result.board[result.board["rank"] == selection.cheapest].iloc[0]
            line += (
                f"; the one with the fewest features of them: {cheapest['kind']} "
                f"{cheapest['settings']} on {result.inputs_text(cheapest['inputs'])} (rank "
                f"{selection.cheapest}, {cheapest['features']:,} features)"
            )
        lines.append(line)
    return lines


def ensemble_sentences(result: "RunResult") -> list[str]:
    """Return the ensemble's score and gain, and whether it is the selected model."""
    ensemble = result.ensemble
    if ensemble is None:
        return []
    value, low, high = (
        number_text(end, ensemble.metric) for end in (ensemble.value, ensemble.low, ensemble.high)
    )
    gain, gain_low, gain_high = (
        f"{end * 100:+.2f} points" if is_share(ensemble.metric) else f"{end:+.4f}"
        for end in (ensemble.gain, ensemble.gain_low, ensemble.gain_high)
    )
    if len(ensemble.members) == 1:
        return ["Ensemble: no second head makes the best single one better"]
    level = level_text(ensemble.level)
    verdict = (
        "the interval is above 0, so the ensemble is selected"
        if ensemble.chosen
        else "the interval reaches 0, so the winner stays selected"
    )
    members = count_text(len(ensemble.members), "member")
    return [
        f"Ensemble of {members} on {count_text(len(ensemble.networks), 'network')}: "
        f"{ensemble.metric} {value} (95 % interval {low} to {high}, on images that did not pick "
        f"it); against the best single head, picked the same way, {gain} ({level} interval "
        f"{gain_low} to {gain_high}): {verdict}"
    ]


def _wide_table(console: Console, title: str) -> Table:
    """Return an empty table, without lines between columns if the terminal is narrow."""
    if console.width < _MIN_WIDTH_FOR_LINES:
        return Table(title=title, title_justify="left", box=None, pad_edge=False)
    return Table(title=title, title_justify="left")


def leaderboard_table(console: Console, result: "RunResult") -> Table:
    """Return a table of the best setting for each kind of head on each combination of inputs."""
    from headrace.heads.evaluate.metrics import sign

    board, metric = result.board, result.metric
    by_kind = board.groupby(["inputs", "kind"], sort=False)
    best_rows, n_settings = by_kind.head(1), by_kind.size()
    better = "higher" if sign(metric) > 0 else "lower"
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
    for _, row in best_rows.head(_N_TABLE_ROWS).iterrows():
        table.add_row(
            str(row["rank"]),
            result.inputs_text(row["inputs"]),
            f"{row['kind']} {row['settings']}",
            str(n_settings[row["inputs"], row["kind"]]),
            number_text(row[metric], metric),
            number_text(row["standard_error"], metric),
            f"{row['features']:,}",
        )
    if (n_more := len(best_rows) - _N_TABLE_ROWS) > 0:
        table.caption = f"and {count_text(n_more, 'more group')} in the files below"
    return table


def stages_table(result: "RunResult") -> Table:
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


def show_files(console: Console, result: "RunResult") -> None:
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
    console.print("Files", style="italic")
    for contents, path in rows:
        console.print(f"  {contents:<32} {path}", soft_wrap=True)


def _row_fields(
    output: "type[JsonOutput]", score_name: str, row: "pd.Series[Any]", result: "RunResult"
) -> dict[str, Any]:
    # Columns have the names of the object's fields, except these two.
    own_names = output.model_fields.keys() - {score_name, "inputs"}
    inputs = result.inputs_text(row["inputs"])
    own_fields = {name: row[name] for name in own_names}
    return {score_name: row[result.metric], "inputs": inputs, **own_fields}


def run_fields(result: "RunResult") -> dict[str, Any]:
    """Return the fields of what `run --json` prints."""
    from headrace.pipelines.cli.json_output import FinetunedRow, Setting

    first_rows = result.board.head(_N_JSON_ROWS).iterrows()
    leaderboard = [_row_fields(Setting, "score", row, result) for _, row in first_rows]
    networks = () if result.finetuned is None else result.finetuned.compared.iterrows()
    return {
        "out": result.paths.root,
        "metric": result.metric,
        "counts": result.accounting,
        "notes": result.notes,
        "failed_images": result.failed_images,
        "failed_heads": result.failed_heads,
        "winner": leaderboard[0],
        "expected": result.selection,
        "ensemble": result.ensemble,
        "test": result.test,
        "finetuned": [_row_fields(FinetunedRow, "value", row, result) for _, row in networks],
        "leaderboard": leaderboard,
        "settings": len(result.board),
        "stages": result.stages,
        "files": {name: getattr(result.paths, name) for name in _FILES},
    }
