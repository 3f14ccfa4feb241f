"""The unit of work of a run: from feature sets and a task on disk to one results file, with every
kind of head.
"""

import dataclasses
import fcntl
import hashlib
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from support.runs import headrace

from headrace.cache.feature_set import open_feature_set
from headrace.cache.format.shard import FailedSample
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import FeatureSpec
from headrace.heads import results
from headrace.heads.bags.kind import BagsSpec
from headrace.heads.bank import BankJob, fit_bank, train_bank
from headrace.heads.data.features import load_rows
from headrace.heads.data.folds import make_folds
from headrace.heads.data.side_columns import SideColumn, SideColumns, save_side_columns
from headrace.heads.data.task import REFIT, TRAIN_ONLY, Task, load_task, save_task
from headrace.heads.data.training_data import TrainingData
from headrace.heads.discriminant.kind import LDASpec
from headrace.heads.errors import HeadError
from headrace.heads.evaluate.metrics import score
from headrace.heads.kinds import HEAD_KINDS, spec_from_json
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.networks.kind import ConvSpec, MLPSpec
from headrace.heads.persist import TrainedHead, load_head, save_head
from headrace.heads.predict import predict_head
from headrace.heads.results import BadResults, read_bank, sealed
from headrace.heads.sklearn.kind import SklearnSpec
from headrace.heads.spec import Halving, HeadSpec, spec_to_json
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec

Arrays = np.ndarray[Any, Any]
ROWS = 240

SPECS: dict[str, tuple[HeadSpec, ...]] = {
    "logistic": (LogisticSpec(0.1), LogisticSpec(10.0, "balanced")),
    "lda": (LDASpec(0.1), LDASpec(0.9)),
    "ridge": (RidgeSpec(10.0), RidgeSpec(1.0, "balanced")),
    "mlp": (MLPSpec((24,), 1e-2, batch_size=64, epochs=10), MLPSpec((16,), 1e9)),
    "knn": (KNNSpec(3), KNNSpec(5, "euclidean", "distance"), KNNSpec(10_000)),
    "centroid": (CentroidSpec(), CentroidSpec("euclidean")),
    "sklearn": (
        SklearnSpec("sklearn.ensemble.ExtraTreesClassifier", '{"n_estimators": 20}'),
        SklearnSpec("sklearn.svm.LinearSVC", standardize=True),
        SklearnSpec("sklearn.svm.NoSuchThing"),
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path


def images() -> tuple[Arrays, Arrays, list[str], list[str]]:
    """Features, classes, ids and content hashes of ROWS digits."""
    X, y = load_digits(return_X_y=True)
    ids = [f"digit {number}" for number in range(ROWS)]
    return (
        X[:ROWS].astype(np.float32),
        y[:ROWS],
        ids,
        [hashlib.sha256(name.encode()).hexdigest()[:32] for name in ids],
    )


def store(
    root: Path,
    X: Arrays,
    content: list[str],
    *,
    tap: str = "t",
    view: int = 0,
    broken: tuple[int, ...] = (),
    seed: int = 0,
) -> str:
    """A feature set of two shards, rows in an order of its own; `broken` rows could not
    be decoded.
    """
    spec = FeatureSpec(
        "python:b",
        "0" * 64,
        tap,
        "avg",
        "{}",
        f'{{"index": {view}}}',
        "pillow",
        "float32",
        "float32",
        X.shape[1:],
    )
    directory = create_feature_set(root / "cache", spec)
    order = np.random.default_rng(seed).permutation(len(X))
    for unit, part in zip(("aa", "bb"), np.array_split(order, 2), strict=True):
        good = [int(row) for row in part if row not in broken]
        publish_shard(
            directory,
            unit,
            features=X[good],
            ids=[str(row) for row in good],
            content_hashes=[content[row] for row in good],
            failures=[
                FailedSample(str(row), content[row], "truncated") for row in part if row in broken
            ],
        )
    return str(directory)


def write_task(
    root: Path, target: Arrays, kind: str = "single", classes: int = 10
) -> tuple[str, Task]:
    X, y, ids, content = images()
    fold = make_folds(y, n_folds=3, seed=0)
    fold[:5] = TRAIN_ONLY
    names = tuple(f"c{number}" for number in range(classes))
    task = Task(kind, names, np.array(ids), np.array(content, "S32"), target, fold, np.ones(len(X)))  # type: ignore[arg-type]
    save_task(task, root / "task.npz")
    return str(root / "task.npz"), task


@pytest.mark.parametrize("kind", SPECS)
def test_a_bank_of_every_kind(work: Path, kind: str) -> None:
    """Heads learn, failures are rows with reasons, stored predictions are those of the arrays, and
    the second call does nothing.
    """
    X, y, _, content = images()
    path, task = write_task(work, y)
    job = BankJob(path, (store(work, X, content),), SPECS[kind], str(work / "banks" / "bank.h5"))
    assert len(pickle.dumps(job)) < 2000
    report = train_bank(job)
    bank = read_bank(job.result)
    assert report.heads == len(bank.table) == 4 * len(SPECS[kind])
    assert not report.skipped
    assert report.failed == int(bank.table["error"].notna().sum())
    assert bank.task_digest == task.digest
    assert bank.features[0]["spec"]["tap"] == "t"
    assert list(bank.table["kind"].unique()) == [kind]
    for spec in SPECS[kind]:
        own = bank.table[bank.table["spec"] == spec_to_json(spec)]
        assert own["fold"].tolist() == [0, 1, 2, REFIT]
        predicted = bank.out_of_fold_predictions(spec)
        if own["error"].notna().any():
            assert own["error"].notna().all()
            assert np.isnan(predicted).all()
            continue
        assert np.isnan(predicted[:5]).all()
        for fold in range(3):
            expected = score("single", y[task.fold == fold], predicted[bank.rows(fold)], "accuracy")
            assert own[own["fold"] == fold]["accuracy"].item() == pytest.approx(expected)
        assert own["accuracy"].mean() > 0.8
        full = predict_head(spec, bank.arrays(spec), X)
        assert (full.argmax(1) == y).mean() > 0.85
        if arrays := bank.arrays(spec, 0):
            held = X[bank.rows(0)]
            np.testing.assert_allclose(
                bank.validation(spec, 0), predict_head(spec, arrays, held), atol=2e-5
            )
    assert train_bank(job).skipped
    assert pickle.loads(pickle.dumps(bank)).table.equals(bank.table)


def test_failing_heads_say_why(work: Path) -> None:
    """The reason names what was wrong: divergence, too many neighbours, an import path."""
    X, y, _, content = images()
    path, _ = write_task(work, y)
    features = (store(work, X, content),)
    reasons = {}
    for kind in ("mlp", "knn", "sklearn"):
        job = BankJob(path, features, SPECS[kind][-1:], str(work / f"{kind}.h5"))
        train_bank(job)
        reasons[kind] = read_bank(job.result).table["error"][0]
    assert "not finite" in reasons["mlp"]
    assert "between 1 and" in reasons["knn"]
    assert "NoSuchThing" in reasons["sklearn"]


def test_rows_are_found_by_content_and_sets_are_joined(work: Path) -> None:
    """Two taps stored in different orders are put side by side, row by row; a row broken in any of
    them is left out.
    """
    X, y, ids, content = images()
    first = store(work, X[:, :30], content, tap="a", broken=(7,), seed=1)
    second = store(work, X[:, 30:], content, tap="b", broken=(7, 20), seed=2)
    joined, kept = load_rows([first, second], np.array(content, "S32"))
    np.testing.assert_array_equal(np.flatnonzero(~kept), [7, 20])
    np.testing.assert_array_equal(joined, X[kept])
    path, _ = write_task(work, y)
    job = BankJob(path, (first, second), (CentroidSpec(),), str(work / "bank.h5"))
    train_bank(job)
    bank = read_bank(job.result)
    assert bank.dropped == (ids[7], ids[20])
    assert len(bank.ids) == ROWS - 2
    np.testing.assert_array_equal(bank.target, y[kept])
    alone = fit_bank(X[kept], replace_rows(path, kept), [CentroidSpec()])
    np.testing.assert_array_equal(bank.validation(CentroidSpec(), 1), alone[1].validation)


def replace_rows(path: str, kept: Arrays) -> Task:
    return load_task(Path(path)).take(kept)


@pytest.mark.parametrize("kind", ["logistic", "ridge", "mlp", "knn", "centroid", "sklearn"])
def test_views_are_found_and_averaged(work: Path, kind: str) -> None:
    """Feature sets that differ only in the view are views of the same columns: a prediction is the
    mean over them.
    """
    X, y, _, content = images()
    noisy = X + np.random.default_rng(0).normal(size=X.shape).astype(np.float32)
    views = (store(work, X, content), store(work, noisy, content, view=1, seed=5))
    path, task = write_task(work, y)
    spec = SPECS[kind][0]
    job = BankJob(path, views, (spec,), str(work / "bank.h5"))
    train_bank(job)
    bank = read_bank(job.result)
    assert bank.validation(spec, 0).shape == ((task.fold == 0).sum(), 10)  # type: ignore[union-attr]
    assert bank.table["accuracy"].mean() > 0.8
    if arrays := bank.arrays(spec, 0):
        held = bank.rows(0)
        mean = np.mean([predict_head(spec, arrays, view[held]) for view in (X, noisy)], axis=0)
        np.testing.assert_allclose(bank.validation(spec, 0), mean, atol=2e-5)


def test_a_view_twice_is_the_same_head_as_once(work: Path) -> None:
    """Views share a row's weight: with the same image in both, strengths mean what they mean with
    one view.
    """
    X, y, _, _ = images()
    _, task = write_task(work, y)
    for spec in (LogisticSpec(0.01), RidgeSpec(100.0)):
        once, twice = (fit_bank(rows, task, [spec]) for rows in (X, np.stack([X, X])))
        for a, b in zip(once, twice, strict=True):
            np.testing.assert_allclose(
                a.arrays["weight"], b.arrays["weight"], atol=2e-3 * np.abs(a.arrays["weight"]).max()
            )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_other_tasks(work: Path, kind: str) -> None:
    """Multi-label and regression tasks train with the kinds that can; the others say which to use
    instead.
    """
    X, y, _, content = images()
    if kind == "multi":
        target: Arrays = np.stack([y % 2 == 0, y > 4], axis=1).astype(np.uint8)
        specs: list[HeadSpec] = [
            LogisticSpec(0.1),
            RidgeSpec(10.0),
            KNNSpec(3),
            SklearnSpec("sklearn.tree.DecisionTreeClassifier"),
        ]
    else:
        target = np.stack([y * 100.0, -y * 1e-3], axis=1)
        specs = [
            RidgeSpec(300.0),
            KNNSpec(3),
            SklearnSpec("sklearn.ensemble.ExtraTreesRegressor", '{"n_estimators": 20}'),
        ]
    specs.append(MLPSpec((32,), 1e-2, batch_size=32, epochs=30))
    path, task = write_task(work, target, kind, 2)
    features = (store(work, X, content),)
    for spec in specs:
        job = BankJob(path, features, (spec,), str(work / f"{spec.kind}.h5"))
        train_bank(job)
        bank = read_bank(job.result)
        assert bank.table["error"].isna().all(), bank.table["error"][0]
        assert bank.table["hamming_accuracy" if kind == "multi" else "r2"].mean() > (
            0.75 if kind == "multi" else 0.3
        )
        full = predict_head(spec, bank.arrays(spec), X, task.kind)
        assert full.shape == (ROWS, 2)
        directory = work / spec.kind
        of_features = (open_feature_set(features[0]).spec,)
        save_head(
            directory,
            TrainedHead(spec, task.kind, task.classes, of_features, {}, bank.arrays(spec)),
        )
        np.testing.assert_array_equal(load_head(directory).predict_proba(X), full)
    refused: HeadSpec = CentroidSpec() if kind == "multi" else LogisticSpec(1.0)
    able = "ridge, mlp, conv, bags, knn"
    job = BankJob(path, features, (refused,), str(work / "refused.h5"))
    with pytest.raises(HeadError, match=f"no use for a {kind} task: use .*{able}"):
        train_bank(job)


def test_convolution_heads_read_maps(work: Path) -> None:
    """A `.map` tap trains convolution heads; other kinds flatten it; a flat tap is refused with the
    cure.
    """
    X, y, _, content = images()
    path, _ = write_task(work, y)
    maps = store(work, X.reshape(-1, 1, 8, 8), content, tap="map")
    spec = ConvSpec((16,), learning_rate=2e-2, batch_size=20, epochs=12, patience=12)
    train_bank(BankJob(path, (maps,), (spec,), str(work / "conv.h5")))
    bank = read_bank(work / "conv.h5")
    assert bank.table["error"].isna().all()
    assert bank.table["accuracy"].mean() > 0.25
    assert predict_head(spec, bank.arrays(spec), X.reshape(-1, 1, 8, 8)).shape == (ROWS, 10)
    train_bank(BankJob(path, (maps,), (CentroidSpec(),), str(work / "flat.h5")))
    with pytest.raises(HeadError, match="pooling map"):
        train_bank(BankJob(path, (store(work, X, content),), (spec,), str(work / "no.h5")))


def test_bad_features_are_refused_before_training(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN names the feature set and the row; views of one part only, no features at all, mixed
    kinds.
    """
    X, y, _, content = images()
    path, _ = write_task(work, y)
    good, view = store(work, X, content), store(work, X, content, view=1)
    other = store(work, X, content, tap="other")
    with pytest.raises(HeadError, match="same views"):
        train_bank(BankJob(path, (good, view, other), (CentroidSpec(),), str(work / "a.h5")))
    mirrored = store(work, X, content, tap="other", view=3)
    with pytest.raises(HeadError, match="2 views each, but not the same ones"):
        train_bank(
            BankJob(path, (good, view, other, mirrored), (CentroidSpec(),), str(work / "a.h5"))
        )
    with pytest.raises(HeadError, match="at least one"):
        train_bank(BankJob(path, (), (CentroidSpec(),), str(work / "a.h5")))
    with pytest.raises(HeadError, match="all of one kind"):
        train_bank(BankJob(path, (good,), (CentroidSpec(), KNNSpec(1)), str(work / "a.h5")))
    nothing = store(work, X, content, tap="broken", broken=tuple(range(ROWS)))
    with pytest.raises(HeadError, match="none of the 240") as refusal:
        train_bank(BankJob(path, (nothing,), (CentroidSpec(),), str(work / "a.h5")))
    (command,) = re.findall("`headrace (.*)`", str(refusal.value))
    assert "truncated" in headrace(*shlex.split(command), cwd=work).stdout
    assert not (work / "a.h5").exists()

    class Spoilt:  # the cache refuses to store NaN, so it is put between
        spec, path, failures = open_feature_set(good).spec, Path(good), staticmethod(list)

        def load(self, content: Arrays, dtype: Any) -> Arrays:
            rows = open_feature_set(good).load(content, dtype)
            rows[3, 2] = np.nan
            return rows

    monkeypatch.setattr("headrace.heads.data.features.FeatureSet", Spoilt)
    with pytest.raises(HeadError, match=content[3]):
        load_rows([Spoilt()], np.array(content, "S32"))  # type: ignore[list-item]


def test_a_bank_that_raises_is_trained_spec_by_spec(work: Path) -> None:
    """When one spec makes the whole bank raise, it alone becomes a failed row with the place of its
    error.
    """
    X, y, _, _ = images()
    _, task = write_task(work, y)
    specs = [LogisticSpec(0.1), LogisticSpec(-1.0), LogisticSpec(1.0)]
    fits = fit_bank(X, task, specs)
    assert [fit.spec for fit in fits] == [spec for spec in specs for _ in range(4)]
    for fit in fits:
        assert (fit.error is None) == (fit.spec != specs[1])
    assert ".py:" in (fits[4].error or "")


def test_results_refuse_what_is_not_theirs(work: Path) -> None:
    """A head that is not there, a file of another format, a link out of the file, a torn file: each
    a clear error.
    """
    X, y, _, content = images()
    path, _ = write_task(work, y)
    result = work / "bank.h5"
    train_bank(BankJob(path, (store(work, X, content),), (CentroidSpec(),), str(result)))
    bank = read_bank(result)
    with pytest.raises(BadResults, match="1 specs"):
        bank.arrays(KNNSpec(3))
    with pytest.raises(BadResults, match="no head"):
        bank.validation(CentroidSpec(), 9)
    assert spec_from_json(bank.table["spec"][0]) == CentroidSpec()
    torn = work / "torn.h5"
    torn.write_bytes(result.read_bytes()[:500])
    with pytest.raises(
        BadResults, match=r"type `rm .*`, and the next `headrace run RECIPE` trains that bank again"
    ):
        read_bank(torn)
    with result.open("rb") as held:  # HDF5's lock, which some network disks lack
        fcntl.flock(held, fcntl.LOCK_EX)
        assert len(read_bank(result).table) == len(bank.table)
    sealed_text = work / "text.h5"
    sealed_text.write_bytes(sealed(b"-" * 10_000))
    with pytest.raises(BadResults, match="not an HDF5 file"):
        read_bank(sealed_text)
    hostile = work / "hostile.h5"
    hostile.write_bytes(result.read_bytes())
    with h5py.File(hostile, "r+") as file:
        del file["target"]
        file["target"] = h5py.ExternalLink("/etc/passwd", "/x")
    hostile.write_bytes(sealed(hostile.read_bytes()))
    with pytest.raises(BadResults, match="link out of the file"):
        read_bank(hostile)
    with h5py.File(work / "empty.h5", "w"):
        pass
    with pytest.raises(BadResults, match="format"):
        read_bank(work / "empty.h5")
    with pytest.raises(FileNotFoundError):
        read_bank(work / "absent.h5")


def test_damaged_results_are_never_read(work: Path) -> None:
    """Any flipped bit, any missing end, before or after the file was opened:

    BadResults, which says what to do.
    """
    X, y, _, content = images()
    path, _ = write_task(work, y)
    result = work / "bank.h5"
    train_bank(
        BankJob(path, (store(work, X, content),), (RidgeSpec(10.0), RidgeSpec(1.0)), str(result))
    )
    whole = result.read_bytes()
    bank = read_bank(result)
    expected = bank.arrays(RidgeSpec(10.0))
    rng = np.random.default_rng(0)
    # The user block, the first objects and the whole file, so that small parts are met too.
    bits = np.concatenate([rng.integers(0, 8 * end, 50) for end in (4096, 8192, len(whole))])
    lengths = [0, 1, 4095, 4096, 5000, len(whole) - 1, *rng.integers(0, len(whole), 10)]
    damaged = [bytearray(whole) for _ in bits]
    for image, bit in zip(damaged, bits.tolist(), strict=True):
        image[bit // 8] ^= 1 << bit % 8
    for number, image in enumerate(
        [*damaged, *(whole[:length] for length in lengths), whole + b"\0"]
    ):
        copy = work / f"{number}.h5"
        copy.write_bytes(image)
        with pytest.raises(
            BadResults,
            match=r"type `rm .*`, and the next `headrace run RECIPE` trains that bank again",
        ):
            read_bank(copy)
        copy.rename(result)
        with pytest.raises(
            BadResults,
            match=r"type `rm .*`, and the next `headrace run RECIPE` trains that bank again",
        ):
            bank.arrays(RidgeSpec(10.0))
    result.write_bytes(whole)
    np.testing.assert_array_equal(bank.arrays(RidgeSpec(10.0))["weight"], expected["weight"])


def test_results_that_appear_while_they_are_looked_for_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another driver of the run publishes them after this one found none."""
    result = tmp_path / "bank.h5"

    def published_too_late(path: Path) -> None:
        result.write_bytes(b"published")
        raise FileNotFoundError(path)

    monkeypatch.setattr(results, "_check", published_too_late)
    assert not results.remove_damaged(result)
    assert result.exists()


def test_a_file_is_checked_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes and its links, however often arrays are read from it; once more when it has been
    replaced.
    """
    X, y, _, content = images()
    path, _ = write_task(work, y)
    result = work / "bank.h5"
    job = BankJob(path, (store(work, X, content),), (CentroidSpec(),), str(result))
    seen: list[Path] = []
    digest = results.shard_checksum
    monkeypatch.setattr(
        results, "shard_checksum", lambda path: (seen.append(path), digest(path))[1]
    )
    train_bank(job)
    bank = read_bank(result)
    bank.arrays(CentroidSpec())
    bank.out_of_fold_predictions(CentroidSpec())
    assert seen == [result]
    result.unlink()
    train_bank(job)
    bank.arrays(CentroidSpec())
    assert seen == [result, result]


def test_a_shared_array_is_stored_once(work: Path) -> None:
    """Twenty neighbour heads on the same rows take the room of one."""
    X, y, _, content = images()
    path, _ = write_task(work, y)
    features = (store(work, X, content),)
    sizes = []
    for number in (1, 20):
        job = BankJob(
            path, features, tuple(KNNSpec(k + 1) for k in range(number)), str(work / f"{number}.h5")
        )
        train_bank(job)
        sizes.append(Path(job.result).stat().st_size)
    predictions = 19 * ROWS * 10 * 4
    assert sizes[1] - sizes[0] < predictions + 19 * 4 * 2500  # far from 19 × 61 kB of rows


def test_the_same_bank_gives_the_same_bytes_but_for_its_times(work: Path) -> None:
    """Nothing else depends on when it was trained."""
    X, y, _, content = images()
    path, _ = write_task(work, y)
    features = (store(work, X, content),)
    banks = []
    for name in ("one", "two"):
        train_bank(BankJob(path, features, SPECS["mlp"][:1], str(work / f"{name}.h5")))
        banks.append(read_bank(work / f"{name}.h5"))
    a, b = (bank.table.drop(columns="seconds") for bank in banks)
    assert a.equals(b)
    for name, array in banks[0].arrays(SPECS["mlp"][0]).items():
        np.testing.assert_array_equal(array, banks[1].arrays(SPECS["mlp"][0])[name])


def test_a_saved_head_predicts_as_before(tmp_path: Path) -> None:
    """safetensors and JSON hold all: a loaded head gives equal probabilities and class names; other
    files are refused.
    """
    X, y, _, _ = images()
    task = Task(
        "single",
        tuple("abcdefghij"),
        np.array([]),
        np.array([]),
        y,
        make_folds(y, n_folds=2, seed=0),
        np.ones(ROWS),
    )
    feature = FeatureSpec("b", "w", "t", "avg", "{}", "{}", "p", "float32", "float16", (64,))
    for kind, specs in SPECS.items():
        fit = next(fit for fit in fit_bank(X, task, specs[:1]) if fit.fold == REFIT)
        metrics = {"accuracy": 0.9}
        trained = TrainedHead(fit.spec, "single", task.classes, (feature,), metrics, fit.arrays)
        path = save_head(tmp_path / kind, trained)
        assert path.name == "head.safetensors"
        head = load_head(tmp_path / kind)
        assert (head.spec, head.classes, head.features) == (fit.spec, task.classes, (feature,))
        assert head.metrics == {"accuracy": 0.9}
        np.testing.assert_array_equal(head.predict_proba(X), predict_head(fit.spec, fit.arrays, X))
        assert (head.predict(X) == np.array(task.classes)[y]).mean() > 0.8
        with pytest.raises(HeadError, match="64 features"):
            head.predict_proba(X[:, :10])
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00not json")
    with pytest.raises(HeadError, match="not a saved head"):
        load_head(path.parent)
    with pytest.raises(HeadError, match="not there"):
        load_head(tmp_path / "nowhere")
    with pytest.raises(HeadError, match="no arrays"):
        save_head(tmp_path / "x", TrainedHead(KNNSpec(3), "single", (), (), {}, {}))


def test_a_bank_can_halve(work: Path) -> None:
    """With halving in the job the losers' rows show fewer epochs, and only the survivors have a
    head of all rows.
    """
    X, y, _, content = images()
    path, _ = write_task(work, y)
    specs = tuple(
        MLPSpec((16,), rate, batch_size=64, epochs=6, patience=9)
        for rate in (1e-2, 1e-7, 1e-6, 1e-8)
    )
    job = BankJob(
        path,
        (store(work, X, content),),
        specs,
        str(work / "b.h5"),
        halving=Halving(after=(2,), keep=0.25),
    )
    assert train_bank(job).heads == 13
    table = read_bank(job.result).table
    assert table[table["fold"] != REFIT].groupby("spec", sort=False)[
        "iterations"
    ].max().tolist() == [6, 2, 2, 2]
    assert table[table["fold"] == REFIT]["spec"].tolist() == [spec_to_json(specs[0])]


def test_every_spec_survives_json() -> None:
    """Specs, with their tuples, come back equal."""
    for spec in [
        *(s for specs in SPECS.values() for s in specs),
        ConvSpec((3, 4), (5,)),
        MLPSpec(()),
    ]:
        assert spec_from_json(spec_to_json(spec)) == spec
        assert replace(spec) == spec


@pytest.mark.parametrize("kind", [*(kind.spec for kind in HEAD_KINDS.values()), FineTuneSpec])
def test_a_choice_that_there_is_not_is_refused(kind: type) -> None:
    """A misspelt class weight, metric or start would be taken for another; the message has the
    field and what it may be.
    """
    hints = get_type_hints(kind)
    choices = {
        field.name: field.default
        for field in fields(kind)
        if get_origin(hints[field.name]) is Literal
    }
    required = {
        "C": 1.0,
        "alpha": 1.0,
        "k": 1,
        "shrinkage": 0.1,
        "estimator": "sklearn.svm.SVC",
        "head": "",
        "train_above": "all",
    }
    given = {field.name: required[field.name] for field in fields(kind) if field.name in required}
    kind(**given, **choices)
    for name, usual in choices.items():
        for wrong in (None, "misspelt"):
            with pytest.raises(
                ValueError, match=f"^{name} of a {kind.__name__} is {wrong!r}; write .*{usual}"
            ):
                kind(**given, **{name: wrong})


def test_importing_heads_imports_no_torch() -> None:
    """A worker that trains linear heads never pays for it."""
    code = (
        "import sys, headrace.heads; sys.exit('torch' in sys.modules or 'torchvision' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_device_that_is_not_there_is_refused(work: Path) -> None:
    """Before anything is trained, for every kind of bank, with what to give instead."""
    X, y, _, content = images()
    path, _ = write_task(work, y)
    features = (store(work, X, content),)
    for kind in ("logistic", "mlp", "knn"):
        job = BankJob(path, features, SPECS[kind][:1], str(work / "b.h5"), device="cuda:99")
        with pytest.raises(HeadError, match=r"'cuda:99' cannot be used .* give cpu"):
            train_bank(job)


def test_weights_that_leave_nothing_are_reasons(work: Path) -> None:
    """A fold whose training rows all weigh nothing says so, whatever the kind."""
    X, y, *_ = images()
    _, task = write_task(work, y)
    task = dataclasses.replace(task, weight=(task.fold == 0).astype(np.float64))
    for kind in ("logistic", "ridge", "mlp", "centroid"):
        fits = fit_bank(X, task, SPECS[kind][:1])
        assert all("fold 0 leaves no row" in str(fit.error) for fit in fits)


@pytest.mark.parametrize("kind", ["logistic", "ridge", "mlp", "conv", "knn", "centroid", "sklearn"])
def test_every_bank_refuses_no_heads_and_weights_beyond_its_numbers(kind: str) -> None:
    """An empty list of specs, and weights that no float32 product can hold, are answered with what
    to do instead.
    """
    from headrace.heads.linear import logistic, ridge
    from headrace.heads.neighbors import bank as neighbours
    from headrace.heads.networks import conv, mlp
    from headrace.heads.sklearn import bank as sklearn_bank

    banks: dict[str, Any] = {
        "logistic": logistic.fit_logistic_bank,
        "ridge": ridge.fit_ridge_bank,
        "mlp": mlp.fit_mlp_bank,
        "conv": conv.fit_conv_bank,
        "knn": neighbours.fit_knn_bank,
        "centroid": neighbours.fit_centroid_bank,
        "sklearn": sklearn_bank.fit_sklearn_bank,
    }
    generator = np.random.default_rng(0)
    X = generator.normal(size=(20, 3, 2, 2) if kind == "conv" else (20, 3)).astype(np.float32)
    data = TrainingData(X, np.arange(20) % 2, (np.arange(20) // 2 % 2).astype(np.int16), 2)
    with pytest.raises(ValueError, match=f"(?i)give at least one, such as {kind}Spec"):
        banks[kind](data, [])
    for weight in (1e-300, 1e16):
        weights = np.ones(20)
        weights[7] = weight
        with pytest.raises(ValueError, match=r"1e-30\.\.1e\+15, found 1e.* for row 7: divide them"):
            banks[kind](
                dataclasses.replace(data, sample_weight=weights),
                (SPECS | {"conv": (ConvSpec((4,)),)})[kind][:1],
            )


@pytest.mark.slow
@pytest.mark.parametrize("missing", [False, True])
def test_side_columns_of_streamed_rows_and_views(work: Path, missing: bool) -> None:
    """Read from shards or loaded, of one view or two: the same heads, and stored predictions are
    those of the arrays on features with the columns behind them.
    """
    X, y, _, content = images()
    path, task = write_task(work, y)
    generator = np.random.default_rng(0)
    age = generator.normal(60, 10, ROWS)
    if missing:
        age[generator.random(ROWS) < 0.3] = np.nan
    columns = (SideColumn("age", None, missing, 60.0, 10.0), SideColumn("site", ("a", "b")))
    side = SideColumns(columns, np.stack([age, y % 2], axis=1))
    save_side_columns(side, work / "side.npz")
    views = [store(work, X, content), store(work, X + 0.1, content, view=1)]
    for features in (views[:1], views):
        for spec in (LogisticSpec(0.1), RidgeSpec(10.0), MLPSpec((8,), epochs=2)):
            made = {}
            for memory in (0, None):
                result = str(work / f"{spec.kind}-{len(features)}-{memory}.h5")
                job = BankJob(
                    path,
                    tuple(features),
                    (spec,),
                    result,
                    memory_bytes=memory,
                    side_columns=str(work / "side.npz"),
                )
                train_bank(job)
                made[memory] = read_bank(result)
                assert made[memory].table["error"].isna().all(), made[memory].table["error"][0]
            held = task.fold == 0
            inputs = [
                np.concatenate([rows, side.as_inputs()], axis=1)[held].astype(np.float32)
                for rows in ([X, X + 0.1][: len(features)])
            ]
            arrays = made[None].arrays(spec, 0)
            expected = np.mean([predict_head(spec, arrays, rows) for rows in inputs], axis=0)
            np.testing.assert_allclose(made[None].validation(spec, 0), expected, atol=2e-4)
            tolerance = 5e-3 if spec.kind == "logistic" else 1e-3
            np.testing.assert_allclose(
                made[0].validation(spec, 0), made[None].validation(spec, 0), atol=tolerance
            )


def test_bags_of_streamed_rows_and_damaged_side_columns(work: Path) -> None:
    """Units of shards that are read again and again are those of loaded rows; a damaged file of
    side columns is said to be one.
    """
    X, y, _, content = images()
    path, task = write_task(work, y)
    # Units of rows of one class and fold.
    units = np.array([f"{label}-{fold}" for label, fold in zip(y, task.fold, strict=True)])
    save_task(replace(task, units=units), Path(path))
    features, made = (store(work, X, content),), {}
    spec = BagsSpec(hidden=(8,), epochs=2)
    for memory in (0, None):
        result = str(work / f"bags-{memory}.h5")
        train_bank(BankJob(path, features, (spec,), result, memory_bytes=memory))
        made[memory] = read_bank(result)
    np.testing.assert_allclose(
        made[0].validation(spec, 0), made[None].validation(spec, 0), atol=1e-4
    )
    (work / "side.npz").write_bytes(b"no columns")
    job = BankJob(
        path, features, (RidgeSpec(1.0),), str(work / "r.h5"), side_columns=str(work / "side.npz")
    )
    with pytest.raises(HeadError, match="`headrace run RECIPE` writes it again"):
        train_bank(job)
