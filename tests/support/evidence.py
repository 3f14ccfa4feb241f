"""Made heads and made feature sets, stored as a run stores them, for the tests of what the numbers
mean.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import FeatureSpec
from headrace.heads.bank import BankJob, train_bank
from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import REFIT, Task, save_task
from headrace.heads.evaluate.metrics import all_metrics
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.results import read_bank, results_bytes
from headrace.heads.spec import FitResult, spec_to_json
from headrace.pipelines.feature_input import FeatureInput
from headrace.pipelines.stages.select import rank_heads


def stored(folder, kind, metric, outputs=None, target=None, rows=80, folds=4):
    """A leaderboard of made heads (predictions K × (N, C)), by default some better than others,
    with their results file.
    """
    rng = np.random.default_rng(0)
    if outputs is None:
        target = {"single": rng.integers(0, 2, rows), "multi": rng.integers(0, 2, (rows, 2))}.get(
            kind, rng.normal(size=(rows, 2))
        )
        spread = [0.4 + 0.1 * k for k in range(6)]
        sides = np.eye(2)[target] if kind == "single" else target
        outputs = [sides + rng.normal(0, each, (rows, 2)) for each in spread]
        outputs = (
            outputs if kind == "regression" else [np.clip(each, 0.01, 0.99) for each in outputs]
        )
    rows = len(target)
    names = [f"{i:032x}" for i in range(rows)]
    fold = (np.arange(rows) % folds).astype(np.int16)
    fold[:8] = -2  # only trains
    task = Task(
        kind, ("a", "b"), np.array(names), np.array(names, "S32"), target, fold, np.ones(rows)
    )
    fits, metrics, board = [], [], []
    for k, output in enumerate(outputs):
        spec = RidgeSpec(alpha=float(k + 1))
        own = []
        for number in [*range(folds), REFIT]:
            held = output[fold == number].astype(np.float32) if number >= 0 else None
            fits.append(FitResult(spec, number, {}, 0.0, 0.0, 1, 0.0, held))
            metrics.append({} if held is None else all_metrics(kind, target[fold == number], held))
            own += [metrics[-1][metric]] if held is not None else []
        row = {
            metric: np.mean(own),
            "features": 2 + k % 5,
            "spec": spec_to_json(spec),
            "path": str(folder / "b.h5"),
        }
        board.append(
            row | {"inputs": (f"tap{k % 3}",), "kind": "ridge", "settings": f"alpha={k + 1}"}
        )
    feature = {
        "fingerprint": "f",
        "spec": {"backbone": "b", "weights": "0" * 64, "preprocessing": "{}"},
    }
    (folder / "b.h5").write_bytes(
        results_bytes(task, task.digest, fits, metrics, features=[feature], dropped=[])
    )
    board = pd.DataFrame(board).sort_values(
        metric, ascending=metric in ("log_loss", "rmse"), ignore_index=True
    )
    return board.assign(rank=np.arange(1, len(board) + 1)), task


def content_of(rows):
    """Content hashes of made images."""
    return [hashlib.sha256(f"image {i}".encode()).hexdigest()[:32] for i in range(rows)]


def feature_inputs_of(feature_paths, backbone=None):
    """{name: FeatureInput} of feature sets {name: views}, all of one backbone."""
    return {
        name: FeatureInput(name, tuple(views), backbone) for name, views in feature_paths.items()
    }


def store_taps(root, taps, backbone="python:b"):
    """Feature sets {name: (N, D)} in a cache, as {name: (directory,)}."""
    directories = {}
    for name, X in taps.items():
        tap, _, pooling = name.rpartition(".")
        spec = FeatureSpec(
            backbone,
            "0" * 64,
            tap,
            pooling,
            "{}",
            '{"index": 0}',
            "pillow",
            "float32",
            "float32",
            X.shape[1:],
        )
        directory = create_feature_set(root, spec)
        names = [f"image {i}" for i in range(len(X))]
        publish_shard(
            directory,
            "aa",
            features=X.astype(np.float32),
            ids=names,
            content_hashes=content_of(len(X)),
            failures=[],
        )
        directories[name] = (directory,)
    return directories


def task_of(target, classes=None, folds=5, seed=0):
    """A single-label task over made images, without test rows."""
    count = int(target.max()) + 1
    names = np.array([f"image {i}" for i in range(len(target))])
    fold = make_folds(target, n_folds=folds, seed=seed)
    labels = tuple(classes or (f"class {c}" for c in range(count)))
    content = np.array(content_of(len(target)), "S32")
    return Task("single", labels, names, content, target, fold, np.ones(len(target)))


@dataclass(frozen=True)
class World:
    """A made world in which it is known what would help.

    The truth of a class is a direction; a tap shows it with a strength (in units of its noise), in
    some dimensions of many.
    """

    images: int
    classes: int
    strengths: tuple[float, ...]  # of each tap, early to late
    width: int = 24
    flipped: float = 0.0  # share of labels that are another class's
    starved: int = 0  # images of the last class; 0: as many as of the others
    # noise that the images themselves have in all taps, which no more images remove
    blurred: float = 0.0


def live_in(world, root, seed=0, folds=3):
    """A finished run of linear heads on each tap of a world:

    (board, task, directories), made without worker processes.
    """
    rng = np.random.default_rng(seed)
    target = rng.integers(0, world.classes, world.images)
    if world.starved:
        target = rng.integers(0, world.classes - 1, world.images)
        target[: world.starved] = world.classes - 1
    means = rng.normal(size=(world.classes, world.width))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    seen = means[target] + rng.normal(0, world.blurred, (world.images, world.width))
    taps = {
        f"block{place}.avg": strength * seen + rng.normal(size=(world.images, world.width))
        for place, strength in enumerate(world.strengths)
    }
    flips = rng.random(world.images) < world.flipped
    target[flips] = (
        target[flips] + rng.integers(1, world.classes, int(flips.sum()))
    ) % world.classes
    directories = store_taps(root / "cache", taps)
    task = task_of(target, folds=folds)
    save_task(task, root / "task.npz")
    specs = tuple(LogisticSpec(strength) for strength in (0.01, 0.1, 1.0))
    heads = []
    for name, (directory,) in directories.items():
        path = str(root / f"{name}.h5")
        train_bank(BankJob(str(root / "task.npz"), (str(directory),), specs, path))
        table = read_bank(path).table
        heads.append(table.assign(path=path, inputs=pd.Series([(name,)] * len(table))))
    board = rank_heads(
        pd.concat(heads, ignore_index=True), "accuracy", dict.fromkeys(taps, world.width), folds
    )
    return board, task, directories


# (name, world, what to advise). What would help is known from how each world is made: late taps show the classes (near) or lose
# them (far); few images leave a linear head of many features far from its best, many do not;
# flipped labels cannot be learned by anything.
WORLDS = [
    ("few images, near", World(160, 3, (0.5, 1.5, 6.0)), "head"),
    ("few images, near", World(240, 4, (1.0, 3.0, 5.0), width=32), "head"),
    ("few images, far", World(220, 3, (2.2, 1.2, 0.5), width=96), "collect"),
    ("few images, far", World(300, 5, (3.0, 2.0, 0.8), width=96), "collect"),
    ("many images, near", World(2400, 3, (0.7, 1.4, 2.2)), "fine-tune"),
    ("many images, near", World(3000, 5, (1.0, 2.0, 2.8), width=16), "fine-tune"),
    ("many images, far", World(2400, 3, (2.2, 1.3, 0.6)), "scratch"),
    ("many images, far", World(2800, 4, (2.6, 1.6, 0.8), width=16), "scratch"),
    (
        "label noise at the Bayes error",
        World(1200, 3, (1.0, 3.0, 8.0), width=12, flipped=0.2),
        "head",
    ),
    (
        "label noise at the Bayes error",
        World(1000, 2, (1.0, 4.0, 8.0), width=12, flipped=0.3),
        "head",
    ),
    ("a starved class", World(800, 3, (1.0, 2.0, 4.0), width=48, starved=14), "collect one"),
    ("a starved class", World(1200, 5, (1.0, 2.0, 3.0), width=64, starved=12), "collect one"),
]


def advice_word(advice):
    """The action, and whether it is about one class."""
    return "collect one" if advice.class_name else advice.action
