"""The paths of a run's files. Other modules take them from here and build none themselves."""

from dataclasses import dataclass
from pathlib import Path


class _InRun:
    """An attribute that is a path in the run's directory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, paths: "RunPaths", _owner: type) -> Path:
        return paths.root / self.name


@dataclass(frozen=True)
class RunPaths:
    """The files of one run directory."""

    root: Path

    recipe = _InRun("recipe.json")
    # Images of the last call, {id: content hash}, with which the next call compares its own.
    listing = _InRun("images.json")
    # Counts of the source's entries: how many are used, and how many not, by reason.
    accounting = _InRun("accounting.json")
    failed_images = _InRun("failed-images.csv")
    leaderboard = _InRun("leaderboard.csv")
    heads = _InRun("heads.parquet")
    banks = _InRun("banks")
    # Banks on samples, by which inputs are halved; may be removed, and is computed again.
    input_halving = _InRun("input-halving")
    # The winner's score corrected for selection, with its interval.
    selection = _InRun("selection.json")
    # Every setting against the winner, on the same validation rows.
    comparisons = _InRun("comparisons.csv")
    winner = _InRun("winner")
    # The ensemble's model directory: ensemble.json, and its members under members/.
    ensemble = _InRun("ensemble")
    # The weight of each image in its unit's prediction.
    instance_weights = _InRun("instance-weights.csv")
    # One line of JSON for each evaluation on the test split.
    test_evaluations = _InRun("test-evaluations.jsonl")
    # The selected model's predictions of every image, labelled or not; and of units, if there are.
    predictions = _InRun("predictions.parquet")
    unit_predictions = _InRun("unit-predictions.parquet")
    # One line of JSON for each stage of each call: what it did and how long it took.
    stages = _InRun("stages.jsonl")
    # One line of JSON for each change of the versions or the machine between calls.
    environments = _InRun("environments.jsonl")
    report = _InRun("report.html")
    # Grey copies of the images, 16 x 16 pixels, by which the report finds near-duplicates, and the
    # images' positions on its map. Both may be removed, and are computed again.
    signatures = _InRun("signatures.npz")
    map_places = _InRun("map.npz")
    # Learning curves, transferability scores and advice.json; may be removed, and `headrace advise`
    # makes them again.
    advice_folder = _InRun("advice")
    advice = _InRun("advice/advice.json")
    # Held by a driver while it writes tables, because several may work on one run.
    conclusion_lock = _InRun("conclude.lock")
    # Task leases, by which each bank is trained by one of several drivers.
    leases = _InRun("leases")
    # The events of every task, one file of JSON lines per driver.
    logs = _InRun("logs")
    # The output of calls after their terminal was closed.
    terminal = _InRun("logs/terminal.txt")
    # The certificate of this run's own cluster, if the recipe names none.
    tls = _InRun("tls")
    # Fine-tuned networks: results files like those of banks, folds, checkpoints, decisions.
    finetune = _InRun("finetune")
    # Paths of the run's images by content hash.
    finetune_images = _InRun("finetune/images.json")
    # The decision about each candidate, with its cost and its predicted and measured gain.
    finetune_decisions = _InRun("finetune/candidates.json")

    def finetune_result(self, candidate_key: str) -> Path:
        return self.finetune / f"{candidate_key}.h5"

    def finetune_parts(self, candidate_key: str) -> Path:
        """The folder of its trained folds, `fold*.h5`, until all of them are done."""
        return self.finetune / "parts" / candidate_key

    def finetune_model(self, candidate_key: str) -> Path:
        """The model directory of the network that was trained on all rows."""
        return self.finetune / "models" / candidate_key

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
