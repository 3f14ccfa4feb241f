"""Reading of a finished run from its directory, for the report, advice and notebooks."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
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
from headrace.heads.data.side_columns import taps_of
from headrace.heads.data.task import BadTaskFile, Task, TaskKind, read_task
from headrace.heads.evaluate.units import scored_rows
from headrace.heads.predict import probability_floor
from headrace.heads.results import BankResult, read_bank
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
from headrace.pipelines.planning.leaderboard import Winner, choose_winner
from headrace.pipelines.recipe.load import Recipe
from headrace.pipelines.records import RUN_AGAIN, RunDamaged, read_record, read_records, read_table
from headrace.pipelines.run_directory import find_run, require_finished, results_file, stored_recipe
from headrace.pipelines.selection.calibration import calibrated
from headrace.pipelines.selection.evaluation_record import read_test_evaluations
from headrace.pipelines.selection.predictions import validation_rows

_TEXT_COLUMNS = {"inputs": str, "kind": str, "settings": str, "spec": str, "path": str}


@dataclass(frozen=True)
class RunImages:
    """The images of a run: their files, and how they are split."""

    image_paths: Mapping[str, str]  # by content hash; of copies, the first
    dataset: Dataset
    samples: pd.DataFrame  # id, path, content (None where unreadable), and the user's columns


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. Everything but its two tables is read when it is first used.

    Images and features may have been removed since the run ended. `images` and
    `calibrated_predictions` are then a text with the reason, for the report to show.
    """

    paths: RunPaths
    recipe: Recipe  # with paths as they are now, if the run was moved
    metric: str
    # leaderboard.csv: a row per setting, best first; `inputs` are tuples of names
    board: pd.DataFrame
    heads: pd.DataFrame  # heads.parquet: a row per head and fold; `inputs` as above
    # the user's code that may be imported to predict the test images again
    trust_code: Collection[str] = ()

    @cached_property
    def winner(self) -> Winner:
        """The board's best setting. Raises NoWinner if every setting failed in some fold."""
        return choose_winner(self.board, self.heads, self.metric)

    @cached_property
    def bank(self) -> BankResult:
        """The results file with the winner in it."""
        return read_bank(self.board["path"].iloc[0])

    @property
    def task_kind(self) -> TaskKind:
        return self.bank.task_kind

    @property
    def classes(self) -> tuple[str, ...]:
        return self.bank.classes

    @cached_property
    def _stored_task(self) -> tuple[Task, dict[str, npt.NDArray[Any]]]:
        return read_task(self.paths.task(self.bank.task_digest))

    @property
    def task(self) -> Task:
        """The rows that heads were trained on; no test row.

        Raises FileNotFoundError, BadTaskFile.
        """
        return self._stored_task[0]

    @property
    def groups(self) -> npt.NDArray[Any] | None:
        """(rows of the task,) the group of each row; None if the recipe names no group column."""
        return self._stored_task[1].get("groups")

    @cached_property
    def out_of_fold_predictions(self) -> npt.NDArray[np.float32]:
        """(N, C) the winner's predictions, each row by the fold's head that did not train on it.

        Rows that every head trained on are nan.
        """
        return self.bank.out_of_fold_predictions(self.winner.spec)

    @cached_property
    def held_out_rows(self) -> npt.NDArray[np.int64]:
        """(n,) positions of the bank's rows that have an out-of-fold prediction."""
        return np.flatnonzero(np.isfinite(self.out_of_fold_predictions).all(1))

    @cached_property
    def scored_predictions(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Targets (n, ...) and predictions (n, C) by which the winner is scored: of
        `held_out_rows`, or of the units (patients, slides) to which they belong.

        Raises RunDamaged if the file with the units is gone.
        """
        rows = self.held_out_rows
        if self.recipe.task.unit is None:
            return self.bank.target[rows], self.out_of_fold_predictions[rows]
        try:
            return scored_rows(self.task, rows, self.out_of_fold_predictions[rows])
        except FileNotFoundError as error:
            raise RunDamaged(f"{error.filename} is not there: {RUN_AGAIN}") from error

    @cached_property
    def calibration(self) -> Mapping[str, Any] | None:
        """The temperature of the winner's probabilities, with the calibration errors before and
        after it; None for regression and for runs of earlier versions.
        """
        try:
            selection = read_record(self.paths.selection)
        except (FileNotFoundError, RunDamaged):  # the report's section on selection reports it
            return None
        return selection.get("calibration")

    @cached_property
    def calibrated_predictions(self) -> npt.NDArray[np.float64] | str:
        """(n, C) the predictions of `scored_predictions`, calibrated; or the reason why not."""
        try:
            validation = validation_rows(self.task, self.groups)
        except FileNotFoundError as error:
            return f"{error.filename} is not there: {RUN_AGAIN}"
        except (OSError, BadTaskFile) as error:
            return str(error)
        if not np.array_equal(self.task.ids[validation.images], self.bank.ids[self.held_out_rows]):
            task_path = self.paths.task(self.bank.task_digest)
            return f"{task_path} is not what the winner was trained on: {RUN_AGAIN}"
        floor = probability_floor(self.winner.spec, self.task.kind, len(self.task.classes))
        predicted = validation.aggregate(self.out_of_fold_predictions[self.held_out_rows])
        # Each fold has the temperature that fits the other folds, so that none is fitted to itself.
        return calibrated(validation, predicted, floor)

    @cached_property
    def feature_specs(self) -> Mapping[str, tuple[FeatureSpec, ...]]:
        """The feature sets' specs by name, one for each view; in the recipe's order."""
        heads = self.heads[self.heads["kind"] != "finetune"]  # a network has images as inputs
        results = heads.drop_duplicates("inputs")[["inputs", "path"]].to_numpy().tolist()
        specs_by_name: dict[str, tuple[FeatureSpec, ...]] = {}
        # Each head's inputs are in the recipe's order, and most runs have a head on all of them.
        for inputs, path in sorted(results, key=lambda result: -len(result[0])):
            specs = [
                FeatureSpec.from_json(json.dumps(feature["spec"]))
                for feature in read_bank(path).features
            ]
            taps = taps_of(inputs)
            n_views = max(1, len(specs) // len(taps))
            for position, name in enumerate(taps):
                views = tuple(specs[position * n_views : (position + 1) * n_views])
                if views:
                    specs_by_name.setdefault(name, views)
        return specs_by_name

    @cached_property
    def feature_paths(self) -> Mapping[str, tuple[Path, ...]]:
        """The feature sets' directories by name, one for each view; they may be gone."""
        return {
            name: tuple(feature_set_path(self.recipe.cache, spec) for spec in views)
            for name, views in self.feature_specs.items()
        }

    def open_features(self, name: str) -> tuple[FeatureSet, ...]:
        """Open a feature set, one for each view. Raises FeatureSetMissing."""
        return tuple(open_feature_set(path) for path in self.feature_paths[name])

    @cached_property
    def images(self) -> RunImages | str:
        """The images and their split, read again; or the reason why they are not as in the run."""
        try:
            samples = list_samples(self.recipe)
            content_by_id = read_listing(self.paths.listing)
            if not content_by_id:
                return f"{self.paths.listing} is not there: {RUN_AGAIN}"
            content = [content_by_id.get(str(sample_id)) for sample_id in samples["id"]]
            dataset = make_dataset(samples, content, self.recipe.task)
            views = (view for name in self.feature_specs for view in self.open_features(name))
            failures = (failure for view in views for failure in view.failures())
            dataset = drop_rows(
                dataset, {failure.content_hash: failure.reason for failure in failures}
            )
        except SealBroken as error:
            return f"{self.paths.listing} has changed since it was written ({error}): {RUN_AGAIN}"
        except (HeadraceError, OSError) as error:
            return f"the images and their features are not as they were: {error}"
        if dataset.train.digest != self.bank.task_digest:
            return (
                "the images, their labels or their split have changed since the run: run it again, "
                "then report"
            )
        samples = samples.assign(content=pd.Series(content, index=samples.index, dtype=object))
        distinct = samples[samples["content"].notna()].drop_duplicates("content")
        image_paths = dict(zip(distinct["content"], distinct["path"].astype(str), strict=True))
        return RunImages(image_paths, dataset, samples)

    @cached_property
    def accounting(self) -> Accounting | None:
        """Counts of the source's entries by what became of them; None if the run recorded none.

        Raises RunDamaged.
        """
        try:
            return accounting_from_json(read_record(self.paths.accounting))
        except FileNotFoundError:
            return None
        except (KeyError, TypeError) as error:
            raise RunDamaged(
                f"{self.paths.accounting} has other fields than this version of headrace writes: "
                f"{error}. {RUN_AGAIN}"
            ) from error

    @cached_property
    def test_evaluations(self) -> Sequence[Mapping[str, Any]]:
        """Records of the models that were scored on the test split, oldest first."""
        return read_test_evaluations(self.paths.test_evaluations)

    @cached_property
    def winner_evaluation(self) -> Mapping[str, Any] | None:
        """The record of the winner on the test split; None if it was not evaluated there."""
        winner_key = (self.bank.task_digest, self.bank.path.name, self.winner.spec)
        return self.current_evaluation(
            lambda model: (model["train"], model.get("bank"), model.get("spec")) == winner_key
        )

    def current_evaluation(
        self, is_meant: Callable[[Mapping[str, Any]], bool]
    ) -> Mapping[str, Any] | None:
        """Return the last record of a model by the run's metric, on the test images as they are
        now if there is one, else on earlier ones; None if there is none.

        is_meant: of the identity of a recorded model.
        """
        # An earlier recipe had another metric perhaps, or the test images other labels.
        evaluations = [
            evaluation
            for evaluation in self.test_evaluations
            if is_meant(evaluation["winner"]) and evaluation["result"]["metric"] == self.metric
        ]
        if len(evaluations) > 1 and not isinstance(self.images, str):
            test_digest = self.images.dataset.test.digest
            of_these_images = [
                evaluation
                for evaluation in evaluations
                if evaluation["winner"]["test"] == test_digest
            ]
            evaluations = of_these_images or evaluations
        return evaluations[-1] if evaluations else None

    @cached_property
    def stages(self) -> pd.DataFrame:
        """A row per stage of each call: name, did, seconds, ended."""
        return pd.DataFrame(read_records(self.paths.stages)[0])

    @cached_property
    def environments(self) -> pd.DataFrame:
        """Versions and machines, a row for each change of them."""
        return pd.DataFrame(read_records(self.paths.environments)[0])

    @property
    def damaged_records(self) -> Sequence[str]:
        """Sentences about damaged or missing lines of `stages` and `environments`."""
        sentences = []
        for path in (self.paths.stages, self.paths.environments):
            if n_damaged := read_records(path)[1]:
                sentences.append(f"Damaged lines of {path.name}, left out here: {n_damaged:,}.")
            elif not path.exists():
                sentences.append(f"{path.name} is not there: what it said is left out.")
        return sentences


def read_finished_run(run: Path | str, *, trust_code: Collection[str] = ()) -> FinishedRun:
    """Read a finished run, given by its directory or its recipe.

    trust_code: code that may be imported; also what the recipe names, if `run` is a recipe. Raises
    InvalidInput for anything but a finished run, RunDamaged for tables that were altered.
    """
    paths = find_run(run)
    require_finished(paths, paths.recipe, paths.leaderboard, paths.heads)
    recipe = stored_recipe(paths)
    board = pd.read_csv(
        read_table(paths.leaderboard), dtype=_TEXT_COLUMNS, keep_default_na=False, na_values=[""]
    )
    board = board.assign(settings=board["settings"].fillna(""))
    return FinishedRun(
        paths,
        recipe,
        check_metric(recipe.task),
        _as_in_memory(board, paths),
        _as_in_memory(pd.read_parquet(read_table(paths.heads)), paths),
        trusted_code(run, trust_code),
    )


def _as_in_memory(table: pd.DataFrame, paths: RunPaths) -> pd.DataFrame:
    """Return the table with inputs as tuples of names, and paths as they are now."""
    located = {
        stored_path: str(results_file(paths, stored_path))
        for stored_path in table["path"].dropna().unique()
    }
    return table.assign(
        inputs=table["inputs"].map(lambda text: tuple(text.split(" + "))),
        path=table["path"].map(located),
    )
