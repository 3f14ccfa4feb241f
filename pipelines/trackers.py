"""Reports of a finished run to MLflow and TensorBoard."""

import hashlib
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headrace.cache.errors import HeadraceError
from headrace.cache.home import expand_home, home_directory
from headrace.pipelines.recipe.sections import LogSection

if TYPE_CHECKING:
    import pandas as pd

    from headrace.pipelines.result import RunResult

_DIGEST = "headrace.digest"


def require_log(section: LogSection) -> None:
    """Raise HeadraceError for a library that is not installed, before hours of work."""
    for tracker_location, library in (
        (section.mlflow, "mlflow"),
        (section.tensorboard, "tensorboard"),
    ):
        if tracker_location is not None and importlib.util.find_spec(library) is None:
            raise HeadraceError(
                f"log: {library} needs the library {library}, which is not installed: pip install "
                f"'headrace[{library}]', or leave it out of the recipe"
            )


def log_run(section: LogSection, result: "RunResult") -> str:
    """Report a finished run to the trackers, and return in words what was done.

    Equal results are reported once, however often the run is called.
    """
    reports = []
    if section.mlflow is not None:
        reports.append(f"MLflow {'told' if _to_mlflow(section, result) else 'knows it'}")
    if section.tensorboard is not None:
        reports.append(f"TensorBoard {'told' if _to_tensorboard(section, result) else 'knows it'}")
    return ", ".join(reports) or "nobody to tell"


def mlflow_uri(location: str) -> str:
    """Return the tracking URI of a location: of a SQLite file in it, if it is a folder."""
    if "://" in location:
        return location
    return f"sqlite:///{expand_home(location).absolute() / 'mlflow.db'}"


def run_digest(result: "RunResult") -> str:
    """Return a digest of leaderboard and test score: equal for runs with equal results."""
    board = result.board.drop(columns=["path", "train_seconds"])
    text = board.to_csv(index=False) + repr(result.test)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _to_mlflow(section: LogSection, result: "RunResult") -> bool:
    # Else MLflow sends statistics of its use.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # or a warning where git is missing
    if home_directory() is None:
        # MLflow's import fails without a home directory, though nothing is written into it.
        os.environ["HOME"] = str(result.paths.root)
    from mlflow import MlflowClient

    assert section.mlflow is not None
    tracking_uri = mlflow_uri(section.mlflow)
    folder = None if "://" in section.mlflow else expand_home(section.mlflow).absolute()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=tracking_uri)
    experiment = client.get_experiment_by_name(section.experiment)
    if experiment is None:
        artifacts = None if folder is None else (folder / "artifacts" / section.experiment).as_uri()
        experiment_id = client.create_experiment(section.experiment, artifact_location=artifacts)
    else:
        experiment_id = experiment.experiment_id
    digest = run_digest(result)
    if client.search_runs([experiment_id], f"tags.`{_DIGEST}` = '{digest}'", max_results=1):
        return False
    run_name = result.paths.root.name
    parent_id = client.create_run(experiment_id, tags={"mlflow.runName": run_name}).info.run_id
    _log_batch(client, parent_id, _parameters(result), _metrics(result))
    for path in (result.paths.leaderboard, result.paths.recipe):
        if path.exists():
            client.log_artifact(parent_id, str(path))
    # section.settings is a number: so many of the best get a run of their own.
    for _, row in result.board.head(section.settings).iterrows():
        tags = {"mlflow.parentRunId": parent_id, "mlflow.runName": f"{run_name} #{row['rank']}"}
        child_id = client.create_run(experiment_id, tags=tags).info.run_id
        row_metrics = {result.metric: float(row[result.metric])}
        _log_batch(client, child_id, _row_parameters(row), row_metrics)
        client.set_terminated(child_id)
    # Last, so that a report that was killed halfway is not taken for a finished one.
    client.set_tag(parent_id, _DIGEST, digest)
    client.set_terminated(parent_id)
    return True


def _log_batch(
    client: Any, run: str, parameters: Mapping[str, str], metrics: Mapping[str, float]
) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    client.log_batch(
        run,
        metrics=[
            Metric(name, value, now, 0) for name, value in metrics.items() if not math.isnan(value)
        ],
        # Older versions of MLflow refuse a whole batch for one longer value.
        params=[Param(name, value[:500]) for name, value in parameters.items()],
    )


def _to_tensorboard(section: LogSection, result: "RunResult") -> bool:
    from torch.utils.tensorboard import SummaryWriter  # imports torch
    from torch.utils.tensorboard.summary import hparams

    assert section.tensorboard is not None
    log_folder = (
        section.tensorboard / section.experiment / f"{result.paths.root.name}-{run_digest(result)}"
    )
    if log_folder.exists():
        return False
    # Renamed at the end, so that a report that was killed halfway is not taken for a finished one.
    temporary = log_folder.with_name(f".{log_folder.name}.{uuid.uuid4().hex}.partial")
    with SummaryWriter(str(temporary)) as writer:
        for name, value in _metrics(result).items():
            writer.add_scalar(name, value)
        columns = ["rank", "inputs", "kind", "settings", result.metric]
        table = result.board.head(section.settings)[columns].astype(str)
        rows = [columns, ["---"] * len(columns), *table.to_numpy().tolist()]
        writer.add_text("leaderboard", "\n".join(f"| {' | '.join(row)} |" for row in rows))
    for _, row in result.board.head(section.settings).iterrows():
        score = float(row[result.metric])
        if math.isnan(score):
            continue
        with SummaryWriter(str(temporary / f"{int(row['rank']):04d}")) as writer:
            for summary in hparams(_row_parameters(row), {result.metric: score}):  # type: ignore[no-untyped-call]
                writer.file_writer.add_summary(summary)
            writer.add_scalar(result.metric, score)
    temporary.rename(log_folder)
    return True


def _metrics(result: "RunResult") -> dict[str, float]:
    metrics = {f"validation_{result.metric}": result.winner.score}
    if result.selection is not None:
        metrics[f"expected_{result.metric}"] = float(result.selection.expected)
    if result.test is not None:
        metrics |= {f"test_{name}": float(value) for name, value in result.test.metrics.items()}
        metrics |= {
            f"test_{result.metric}_low": result.test.low,
            f"test_{result.metric}_high": result.test.high,
        }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _parameters(result: "RunResult") -> dict[str, str]:
    counts = {
        "settings": len(result.board),
        "heads": len(result.heads),
        "failed_images": result.failed_images,
    }
    winner = _row_parameters(result.board.iloc[0])
    return {f"winner_{name}": value for name, value in winner.items()} | {
        name: str(value) for name, value in counts.items()
    }


def _row_parameters(row: "pd.Series") -> dict[str, str]:
    spec = json.loads(row["spec"])
    return {"inputs": " + ".join(row["inputs"]), "kind": str(row["kind"])} | {
        name: str(value) for name, value in spec.items() if name != "kind"
    }
