"""Where everything of a run lies. No other module joins strings into a path."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The files of one run directory."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.json"

    @property
    def listing(self) -> Path:
        """Images of the last call, {id: content hash}: new, changed, renamed, removed."""
        return self.root / "images.json"

    @property
    def instance_weights(self) -> Path:
        """What each image weighs in its unit's prediction."""
        return self.root / "instance-weights.csv"

    @property
    def leaderboard(self) -> Path:
        return self.root / "leaderboard.csv"

    @property
    def heads(self) -> Path:
        return self.root / "heads.parquet"

    @property
    def predictions(self) -> Path:
        """Every image of the run, labelled or not, as the selected model predicts it."""
        return self.root / "predictions.parquet"

    @property
    def unit_predictions(self) -> Path:
        """The same of units, where the task has them."""
        return self.root / "unit-predictions.parquet"

    @property
    def failed_images(self) -> Path:
        return self.root / "failed-images.csv"

    @property
    def accounting(self) -> Path:
        """Counts of the source's entries: how many are used, and how many not, by reason."""
        return self.root / "accounting.json"

    @property
    def selection(self) -> Path:
        """The winner's score corrected for selection, with its interval."""
        return self.root / "selection.json"

    @property
    def comparisons(self) -> Path:
        """Every setting against the winner, on the same validation rows."""
        return self.root / "comparisons.csv"

    @property
    def test_evaluations(self) -> Path:
        """One line of JSON for each evaluation on the test split."""
        return self.root / "test-evaluations.jsonl"

    @property
    def stages(self) -> Path:
        """One line of JSON for each stage of each call: what it did and how long it took."""
        return self.root / "stages.jsonl"

    @property
    def environments(self) -> Path:
        """One line of JSON for each change of versions or machine: what ran the calls."""
        return self.root / "environments.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def signatures(self) -> Path:
        """Grey copies of the images, 16 x 16 pixels, which the report compares; a cache."""
        return self.root / "signatures.npz"

    @property
    def map_places(self) -> Path:
        """Places of the images on the report's map by UMAP: they only save time."""
        return self.root / "map.npz"

    @property
    def banks(self) -> Path:
        return self.root / "banks"

    @property
    def winner(self) -> Path:
        return self.root / "winner"

    @property
    def ensemble(self) -> Path:
        """The ensemble's model directory: ensemble.json, and the heads in it under members/."""
        return self.root / "ensemble"

    @property
    def conclusion_lock(self) -> Path:
        """The lock under which one of several drivers at a time writes tables."""
        return self.root / "conclude.lock"

    @property
    def leases(self) -> Path:
        """Task leases: which driver does which bank, while drivers are at work."""
        return self.root / "leases"

    @property
    def terminal(self) -> Path:
        """The output of calls whose terminal was gone."""
        return self.logs / "terminal.txt"

    @property
    def logs(self) -> Path:
        """The events of every task, one file of JSON lines per driver."""
        return self.root / "logs"

    @property
    def tls(self) -> Path:
        """The certificate of this run's own cluster, where the recipe names none."""
        return self.root / "tls"

    @property
    def finetune(self) -> Path:
        """Networks trained by gradients: results files as banks have, and beside them folds,
        checkpoints and decisions.
        """
        return self.root / "finetune"

    @property
    def finetune_images(self) -> Path:
        """Paths of the run's images by content hash, for what trains from images."""
        return self.finetune / "images.json"

    @property
    def finetune_decisions(self) -> Path:
        """Each candidate: parity, measured cost, predicted and measured gain, decision."""
        return self.finetune / "candidates.json"

    def finetune_result(self, candidate_key: str) -> Path:
        return self.finetune / f"{candidate_key}.h5"

    def finetune_parts(self, candidate_key: str) -> Path:
        return self.finetune / "parts" / candidate_key

    def finetune_model(self, candidate_key: str) -> Path:
        """The directory of the network that was trained on all rows."""
        return self.finetune / "models" / candidate_key

    @property
    def advice_folder(self) -> Path:
        """Learning curves, transferability scores and advice.json.

        May be removed; `headrace advise` measures it again.
        """
        return self.root / "advice"

    @property
    def input_halving(self) -> Path:
        """Small banks of the successive halving of inputs; they only save time."""
        return self.root / "input-halving"

    @property
    def advice(self) -> Path:
        return self.advice_folder / "advice.json"

    def task(self, task_digest: str) -> Path:
        """Rows that heads are trained on; beside them `groups`, each row's group number."""
        return self.root / "tasks" / f"{task_digest}.npz"

    def side_columns(self, fingerprint: str) -> Path:
        """The side columns of the rows that heads are trained on."""
        return self.root / "tasks" / f"side-{fingerprint}.npz"

    def bank(self, bank_group: str, specs_key: str) -> Path:
        """A bank's results file: its group (task, features, kind) and a hash of the specs in it."""
        return self.banks / f"{bank_group}-{specs_key}.h5"


def unit_leases(cache_root: Path) -> Path:
    """Return the folder of task leases on units, for all runs on one cache."""
    return cache_root / "leases"


def content_index(cache_root: Path) -> Path:
    """Index of content hashes by path, size and time, shared by all runs on a cache."""
    return cache_root / "contents.parquet"
