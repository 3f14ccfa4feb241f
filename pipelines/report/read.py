"""A finished run as its directory tells it.

What is not there any more (images, features) is a reason, not an error.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.cache.format.sealed import SealBroken
from headrace.cache.publish import feature_set_path
from headrace.cache.spec import FeatureSpec
from headrace.extract.images.changes import read_listing
from headrace.heads.data.task import BadTaskFile, read_task
from headrace.heads.evaluate.temperature import floor_of
from headrace.heads.results import BankResult, read_bank
from headrace.pipelines.finished import NotARun as NotARun
from headrace.pipelines.finished import find_run, require_finished, results_file, stored_recipe
from headrace.pipelines.models.model import trusted_code
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.planning.accounting import Accounting, accounting_from_json
from headrace.pipelines.planning.dataset import (
    Dataset,
    check_metric,
    drop_rows,
    list_samples,
    make_dataset,
)
from headrace.pipelines.recipe.load import Recipe
from headrace.pipelines.records import RUN_AGAIN, RunDamaged, read_record, read_records, read_table
from headrace.pipelines.selection.calibration import calibrated
from headrace.pipelines.selection.predictions import held_out
from headrace.pipelines.selection.winner import choose_winner, read_test_evaluations

_TEXTS = {"inputs": str, "kind": str, "settings": str, "spec": str, "path": str}


@dataclass(frozen=True)
class Rows:
    """The images behind a run's rows: where each lies, and which side of the split it is on."""

    paths: Mapping[str, str]  # by content hash; of copies, the first
    dataset: Dataset
    samples: pd.DataFrame  # id, path, content (None where unreadable), and the user's columns


@dataclass(frozen=True)
class FinishedRun:
    """What a run left on disk."""

    paths: RunPaths
    recipe: Recipe
    metric: str
    board: pd.DataFrame  # leaderboard.csv: best first; `inputs` is text
    heads: pd.DataFrame  # heads.parquet: one row per head and fold
    winner: pd.Series
    bank: BankResult  # the results file that the winner is in
    # what may be imported to predict the test images again; nothing else is
    trust_code: Collection[str] = ()

    @property
    def task_kind(self) -> str:
        return self.bank.task_kind

    @property
    def classes(self) -> tuple[str, ...]:
        return self.bank.classes

    @cached_property
    def predicted(self) -> npt.NDArray[np.float32]:
        """(N, C) of the winner, each row by the head that did not train on it; nan for rows that
        are never held out.
        """
        return self.bank.out_of_fold(str(self.winner["spec"]))

    @cached_property
    def held_out(self) -> npt.NDArray[np.int64]:
        """Positions of the bank's rows that have an out-of-fold prediction."""
        return np.flatnonzero(np.isfinite(self.predicted).all(1))

    @cached_property
    def calibration(self) -> Mapping[str, Any] | None:
        """What the run found when it gave its winner a temperature; None for regression and runs of
        earlier versions.
        """
        try:
            found: Mapping[str, Any] | None = read_record(self.paths.selection).get("calibration")
        except (
            FileNotFoundError,
            RunDamaged,
        ):  # what else it says is asked for, and its damage told, elsewhere
            return None
        return found

    @cached_property
    def calibrated(self) -> npt.NDArray[np.float64] | str:
        """(n, C) `predicted` of the rows `held_out`, each fold at the temperature that the others
        give; or the reason why that cannot be said.
        """
        try:
            task, beside = read_task(self.paths.task(self.bank.task))
        except FileNotFoundError as error:
            return f"{error.filename} is not there: {RUN_AGAIN}"
        except (OSError, BadTaskFile) as error:
            return str(error)
        held = held_out(task, beside.get("groups"))
        if not np.array_equal(task.ids[held.rows], self.bank.ids[self.held_out]):
            return (
                f"{self.paths.task(self.bank.task)} is not what the winner was trained on: "
                f"{RUN_AGAIN}"
            )
        floor = floor_of(str(self.winner["spec"]), task.kind, len(task.classes))
        return calibrated(held, self.predicted[self.held_out], floor)

    @cached_property
    def feature_sets(self) -> Mapping[str, tuple[FeatureSpec, ...]]:
        """The feature sets of the run, view by view, by the names that the leaderboard
        gives them.
        """
        found: dict[str, tuple[FeatureSpec, ...]] = {}
        heads = self.heads[self.heads["kind"] != "finetune"]  # networks read images
        for inputs, path in heads.drop_duplicates("inputs")[["inputs", "path"]].itertuples(
            index=False
        ):
            specs = [
                FeatureSpec.from_json(json.dumps(feature["spec"]))
                for feature in self.open_bank(path).features
            ]
            names = inputs.split(" + ")
            views = max(1, len(specs) // len(names))
            for number, name in enumerate(names):
                found.setdefault(name, tuple(specs[number * views : (number + 1) * views]))
        return found

    def features(self, name: str) -> tuple[FeatureSet, ...]:
        """The views of a feature set. Raises FeatureSetMissing when the cache no longer has it."""
        return tuple(
            open_feature_set(feature_set_path(self.recipe.cache, spec))
            for spec in self.feature_sets[name]
        )

    def open_bank(self, path: str) -> BankResult:
        """A results file by the path that it had when the run ended; the run's directory may have
        moved since.
        """
        return read_bank(results_file(self.paths, path))

    @cached_property
    def rows(self) -> Rows | str:
        """Where the images are and how they were split, or the reason why that cannot be said any
        more.
        """
        try:
            samples = list_samples(self.recipe)
            listed = read_listing(self.paths.listing)
            content = [listed.get(str(name)) for name in samples["id"]]
            dataset = make_dataset(samples, content, self.recipe.task)
            dataset = drop_rows(dataset, self._failed_content())
        except SealBroken as error:
            return f"{self.paths.listing} has changed since it was written ({error}): {RUN_AGAIN}"
        except (HeadraceError, OSError) as error:
            return f"the images are not where they were: {error}"
        if dataset.train.digest != self.bank.task:
            return (
                "the images, their labels or their split have changed since the run: run it again, "
                "then report"
            )
        samples = samples.assign(content=pd.Series(content, index=samples.index, dtype=object))
        there = samples[samples["content"].notna()].drop_duplicates("content")
        return Rows(
            dict(zip(there["content"], there["path"].astype(str), strict=True)), dataset, samples
        )

    def _failed_content(self) -> frozenset[str]:
        found: set[str] = set()
        for name in self.feature_sets:
            found |= {
                failure.content_hash for view in self.features(name) for failure in view.failures()
            }
        return frozenset(found)

    @cached_property
    def accounting(self) -> Accounting | None:
        """Where every entry of the source went; None where the run did not say. Raises
        RunDamaged.
        """
        try:
            return accounting_from_json(read_record(self.paths.accounting))
        except FileNotFoundError:
            return None

    @cached_property
    def test_evaluations(self) -> Sequence[Mapping[str, Any]]:
        """The record of the test split's evaluations, oldest first."""
        return read_test_evaluations(self.paths.test_evaluations)

    @cached_property
    def test_evaluation(self) -> Mapping[str, Any] | None:
        """The record of the winner's own evaluation; None when it has not been shown the
        test split.
        """
        for evaluation in self.test_evaluations:
            winner = evaluation["winner"]
            shown = (
                winner["train"],
                winner.get("bank"),
                winner.get("spec"),
            )  # an ensemble has neither
            if shown == (self.bank.task, self.bank.path.name, self.winner["spec"]):
                return evaluation
        return None

    @cached_property
    def stages(self) -> pd.DataFrame:
        """Each stage of each call: name, did, seconds, ended."""
        return pd.DataFrame(read_records(self.paths.stages)[0])

    @cached_property
    def environments(self) -> pd.DataFrame:
        """Versions and machines, a row for each change of them."""
        return pd.DataFrame(read_records(self.paths.environments)[0])

    @property
    def damaged_records(self) -> Sequence[str]:
        """What is left out of the two, as sentences."""
        paths = (self.paths.stages, self.paths.environments)
        counts = ((path.name, read_records(path)[1]) for path in paths)
        damaged = [
            f"Damaged lines of {name}, left out here: {count:,}." for name, count in counts if count
        ]
        return [
            *damaged,
            *(
                f"{path.name} is not there: what it said is left out."
                for path in paths
                if not path.exists()
            ),
        ]


def read_run(run: Path, *, trust_code: Collection[str] = ()) -> FinishedRun:
    """Read a finished run, given by its directory or its recipe, which names what may be imported
    beside `trust_code`.

    Raises NotARun for anything else, RunDamaged for tables that are not as the run wrote them,
    NoWinner for a run in which no head is whole.
    """
    paths = find_run(run)
    require_finished(paths, paths.recipe, paths.leaderboard, paths.heads)
    recipe = stored_recipe(paths)
    board = pd.read_csv(
        read_table(paths.leaderboard), dtype=_TEXTS, keep_default_na=False, na_values=[""]
    )
    board = board.assign(settings=board["settings"].fillna(""))
    heads = pd.read_parquet(read_table(paths.heads))
    winner = choose_winner(board, heads)
    bank = read_bank(results_file(paths, winner["path"]))
    return FinishedRun(
        paths,
        recipe,
        check_metric(recipe.task),
        board,
        heads,
        winner,
        bank,
        trusted_code(run, trust_code),
    )
