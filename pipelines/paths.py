"""The paths of a run's files. Other modules take them from here and build none themselves."""

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
        """The weight of each image in its unit's prediction."""
        return self.root / "instance-weights.csv"

    @property
    def leaderboard(self) -> Path:
        return self.root / "leaderboard.csv"

    @property
    def heads(self) -> Path:
        return self.root / "heads.parquet"

    @property
    def predictions(self) -> Path:
        """The selected model's predictions of every image, labelled or not."""
        return self.root / "predictions.parquet"

    @property
    def unit_predictions(self) -> Path:
        """The selected model's predictions of units, if the task has them."""
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
        """One line of JSON for each change of the versions or the machine between calls."""
        return self.root / "environments.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def signatures(self) -> Path:
        """Grey copies of the images, 16 x 16 pixels, by which the report finds near-duplicates; may
        be removed, and is computed again.
        """
        return self.root / "signatures.npz"

    @property
    def map_places(self) -> Path:
        """Positions of the images on the report's map; may be removed, and is computed again."""
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
        """The lock that a driver holds while it writes tables: several may work on one run."""
        return self.root / "conclude.lock"

    @property
    def leases(self) -> Path:
        """Task leases, by which each bank is trained by one of several drivers."""
        return self.root / "leases"

    @property
    def terminal(self) -> Path:
        """The output of calls after their terminal was closed."""
        return self.logs / "terminal.txt"

    @property
    def logs(self) -> Path:
        """The events of every task, one file of JSON lines per driver."""
        return self.root / "logs"

    @property
    def tls(self) -> Path:
        """The certificate of this run's own cluster, if the recipe names none."""
        return self.root / "tls"

    @property
    def finetune(self) -> Path:
        """Fine-tuned networks: results files like those of banks, folds, checkpoints, decisions."""
        return self.root / "finetune"

    @property
    def finetune_images(self) -> Path:
        """Paths of the run's images by content hash, for fine-tuning."""
        return self.finetune / "images.json"

    @property
    def finetune_decisions(self) -> Path:
        """The decision about each candidate, with its cost and its predicted and measured gain."""
        return self.finetune / "candidates.json"

    def finetune_result(self, candidate_key: str) -> Path:
        return self.finetune / f"{candidate_key}.h5"

    def finetune_parts(self, candidate_key: str) -> Path:
        return self.finetune / "parts" / candidate_key

    def finetune_model(self, candidate_key: str) -> Path:
        """The model directory of the network that was trained on all rows."""
        return self.finetune / "models" / candidate_key

    @property
    def advice_folder(self) -> Path:
        """Learning curves, transferability scores and advice.json.

        May be removed; `headrace advise` measures it again.
        """
        return self.root / "advice"

    @property
    def input_halving(self) -> Path:
        """Banks on samples, by which inputs are halved; may be removed, and is computed again."""
        return self.root / "input-halving"

    @property
    def advice(self) -> Path:
        return self.advice_folder / "advice.json"

    def task(self, task_digest: str) -> Path:
        """The rows that heads are trained on, with the array `groups`: each row's group number."""
        return self.root / "tasks" / f"{task_digest}.npz"

    def side_columns(self, fingerprint: str) -> Path:
        """The side columns of the rows that heads are trained on."""
        return self.root / "tasks" / f"side-{fingerprint}.npz"

    def bank(self, bank_group: str, specs_key: str) -> Path:
        """A bank's results file, by its group (task, features, kind) and a hash of its specs."""
        return self.banks / f"{bank_group}-{specs_key}.h5"


def unit_leases(cache_root: Path) -> Path:
    """Return the folder of task leases by which runs that share a cache share its work."""
    return cache_root / "leases"


def content_index(cache_root: Path) -> Path:
    """Return the index of content hashes by path, size and time, for all runs on a cache."""
    return cache_root / "contents.parquet"
