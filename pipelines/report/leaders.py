"""The leaderboard, and the best scores by tap, backbone and kind of head."""

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.heads.data.task import REFIT
from headrace.heads.evaluate.metrics import METRICS
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.number_format import is_share
from headrace.pipelines.planning.leaderboard import inputs_text
from headrace.pipelines.report.page import figures
from headrace.pipelines.report.page.blocks import (
    Block,
    Column,
    Figure,
    Format,
    Note,
    Section,
    Table,
)

_FIGURE_INPUTS = 40  # lines of the dot plot, as many as a page can show


def metric_format(metric: str) -> Format:
    """Return how a metric is written: shares in per cent, everything else with four digits."""
    return "share" if is_share(metric) else "number"


def metric_title(metric: str) -> str:
    """Return a metric's name in words, such as "balanced accuracy" or "AUC"."""
    titles = {"auc": "AUC", "macro_f1": "macro F1", "r2": "R²", "rmse": "RMSE", "mae": "MAE"}
    return titles.get(metric, metric.replace("_", " "))


def leaderboard_section(run: FinishedRun) -> Section:
    """Every setting, with all its metrics; sorted, filtered and searched on the page."""
    frame, other_metrics = _shown_board(run)
    metric = run.metric
    better = "higher" if METRICS[metric].higher_is_better else "lower"
    columns = (
        Column("rank", "rank", "count"),
        Column(
            metric,
            metric_title(metric),
            metric_format(metric),
            f"mean over validation folds; {better} is better",
        ),
        Column(
            "standard_error",
            "± s.e.",
            metric_format(metric),
            "standard error of that mean over the folds",
        ),
        Column("kind", "kind"),
        Column("inputs", "inputs"),
        Column("settings", "settings"),
        *(
            Column(name, metric_title(name), metric_format(name), "mean over validation folds")
            for name in other_metrics
        ),
        Column("features", "features", "count", "numbers that the head reads per image"),
        Column("train_seconds", "seconds", "seconds", "training, all folds together"),
        *((Column("failed", "failed folds", "count"),) if frame["failed"].any() else ()),
    )
    table = Table(
        "leaderboard",
        f"Every setting, by mean validation {metric_title(metric)}",
        columns,
        frame,
        filters=("kind", "inputs"),
        switch=("best", "only the best of each inputs and kind"),
        search=True,
        page=25,
        # The winner, wherever sorting takes its row.
        marked=frozenset({0}),
    )
    refit_text = (
        "and once on all training rows"
        if frame["final"].all()
        else "and, where it was kept, once on all training rows"
    )
    lead = (
        f"{count_text(len(frame), 'setting')}, each trained once per fold {refit_text}. Heads were "
        "chosen on validation folds alone; the test split plays no part in this table."
    )
    return Section("leaderboard", "Leaderboard", lead, (table, *_failed_note(run)))


def taps_section(run: FinishedRun) -> Section:
    """The best head of each kind on each input."""
    metric = run.metric
    board, _ = _shown_board(run)
    best = board[board["best"]]
    # The recipe's order, from the first layers to the last: the figure follows the network.
    scored_inputs = set(best["inputs"])
    order = [
        name
        for name in dict.fromkeys(_shown_inputs(run, run.heads["inputs"]))
        if name in scored_inputs
    ]
    shown = order[:_FIGURE_INPUTS]
    scale = 100 if is_share(metric) else 1
    values, errors = (
        best.pivot(index="inputs", columns="kind", values=name).loc[shown] * scale
        for name in (metric, "standard_error")
    )
    kinds = best["kind"].unique().tolist()
    svg = figures.dot_chart(
        shown,
        {kind: values[kind].tolist() for kind in kinds},
        {kind: errors[kind].tolist() for kind in kinds},
        xlabel=f"validation {metric_title(metric)}" + (" (%)" if scale == 100 else ""),
    )
    columns = (
        Column("inputs", "inputs"),
        Column("kind", "kind"),
        Column("settings", "best setting"),
        Column(metric, metric_title(metric), metric_format(metric)),
        Column("standard_error", "± s.e.", metric_format(metric)),
        Column("tried", "of settings", "count"),
        Column("features", "features", "count"),
    )
    tried = board.groupby(["inputs", "kind"])["rank"].transform("size")
    leader = best.iloc[0]
    figure = Figure(
        svg,
        f"Dot plot of the best validation {metric_title(metric)} of each kind of head on each "
        f"input. The best is {leader['kind']} on {leader['inputs']}; the numbers are in the table "
        "below.",
        "Best head of each kind on each input; bars are ± one standard error over folds.",
        Table("taps", "Best head of each inputs and kind", columns, best.assign(tried=tried)),
    )
    backbones = _by_backbone(run, best)
    lead = (
        "Which layer of which network holds what the task needs. The best of many settings is "
        "flattered a little by having been chosen."
    )
    return Section("taps", "Taps and backbones", lead, (figure, *backbones))


def _by_backbone(run: FinishedRun, best: pd.DataFrame) -> tuple[Block, ...]:
    backbones = run.recipe.backbones
    if len(backbones) < 2:
        return ()
    names = [backbone.alias or backbone.name for backbone in backbones]

    def backbone_of(inputs: str) -> str:
        taps = inputs.split(" + ")
        used = [name for name in names if any(tap.startswith(f"{name}:") for tap in taps)]
        return used[0] if len(used) == 1 else "several"

    best_of_each = best.assign(
        backbone=[backbone_of(inputs) for inputs in best["inputs"]]
    ).drop_duplicates("backbone")
    columns = (
        Column("backbone", "backbone"),
        Column("inputs", "best inputs"),
        Column("kind", "kind"),
        Column(run.metric, metric_title(run.metric), metric_format(run.metric)),
        Column("standard_error", "± s.e.", metric_format(run.metric)),
    )
    return (Table("backbones", "The best head of each backbone", columns, best_of_each),)


def _shown_board(run: FinishedRun) -> tuple[pd.DataFrame, list[str]]:
    """Return the leaderboard with the means of the other metrics, and these metrics' names. Column
    `best` marks the first row of each inputs and kind.
    """
    names = [name for name in METRICS if name in run.heads.columns and name != run.metric]
    # A head that was trained on all rows has no validation score.
    folds = run.heads[run.heads["fold"] != REFIT]
    means = folds.groupby(["inputs", "spec"], sort=False)[names].mean().reset_index()
    board = run.board.merge(means, on=["inputs", "spec"], how="left", suffixes=("", "_mean"))
    board["best"] = ~board.duplicated(["inputs", "kind"])
    return board.assign(inputs=_shown_inputs(run, board["inputs"])), names


def _shown_inputs(run: FinishedRun, inputs: pd.Series) -> list[str]:
    names = list(run.feature_specs)
    texts = {value: inputs_text(value, names) for value in inputs.unique()}
    return [texts[value] for value in inputs]


def _failed_note(run: FinishedRun) -> tuple[Block, ...]:
    errors = run.heads["error"].fillna("")
    failed = errors[errors != ""]
    if failed.empty:
        return ()
    frame = failed.value_counts().rename_axis("reason").reset_index(name="heads")
    return (
        Note(
            f"{count_text(len(failed), 'head')} failed; `headrace run RECIPE --retry-failed` tries "
            "them again.",
            "warning",
        ),
        Table(
            "failed-heads",
            "Why heads failed",
            (Column("reason", "reason"), Column("heads", "heads", "count")),
            frame,
        ),
    )
