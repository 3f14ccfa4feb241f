"""MLP banks: every batched path against one network at a time, written with torch's own modules."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.datasets import load_digits

from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import REFIT, TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.evaluate.metrics import score
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.networks.mlp import fit_mlp_bank
from headrace.heads.networks.mlp_batch import (
    DropoutBits,
    NetworkBatch,
    adamw_broadcast,
    initial_layers,
    padded_width,
)
from headrace.heads.networks.mlp_data import mean_and_scale
from headrace.heads.predict import predict_head
from headrace.heads.spec import FitResult, Halving

Arrays = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small are ten times slower with two threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits(rows: int = 600) -> tuple[Arrays, Arrays, Arrays]:
    X, y = load_digits(return_X_y=True)
    return X[:rows].astype(np.float32), y[:rows], make_folds(y[:rows], n_folds=3, seed=0)


def one_at_a_time(
    X: Arrays,
    target: Arrays,
    fold: Arrays,
    number: int,
    spec: MLPSpec,
    outputs: int,
    task: str,
    epochs: int,
) -> tuple[list[Arrays], list[Arrays]]:
    """The same network by torch.nn, autograd and torch.optim.AdamW, with the bank's random streams.

    Returns the predictions (n, C) of the held-out rows after every epoch and of all rows at the
    end.
    """
    train, held = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
    mean, scale = X[train].mean(0), X[train].std(0)
    scale[scale == 0] = 1
    rows = torch.from_numpy((X - mean) / scale)
    shift, spread = 0.0, 1.0
    if task == "regression":
        shift, spread = target[train].mean(0), target[train].std(0)
        goal = torch.from_numpy((target - shift) / spread).float()
    else:
        goal = torch.from_numpy(target).float() if task == "multi" else torch.from_numpy(target)
    layers: list[torch.nn.Linear] = []
    for weight, bias in initial_layers(spec, X.shape[1], outputs):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
        layers.append(layer)
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    bits = DropoutBits([spec.seed], number, torch.device("cpu"))
    below = round(256 * spec.dropout)

    def forward(x: torch.Tensor, train_mode: bool) -> torch.Tensor:
        for place, layer in enumerate(layers):
            x = layer(x)
            if place < len(layers) - 1:
                x = torch.relu(x)
                if train_mode and below:
                    width = x.shape[1]
                    kept = bits.draw(padded_width(width), len(x))[0, :width].t() >= below
                    x = x * kept * (256 / (256 - below))
        return x

    def finish(x: torch.Tensor) -> Arrays:
        if task == "single":
            return torch.softmax(x, 1).numpy()
        return torch.sigmoid(x).numpy() if task == "multi" else x.numpy() * spread + shift

    weights = torch.ones(len(X))
    if spec.class_weight == "balanced":
        count = np.bincount(target[train], minlength=outputs)
        weights = torch.from_numpy(len(train) / (np.count_nonzero(count) * np.maximum(count, 1)))[
            goal
        ].float()
    after = []
    for epoch in range(epochs):
        order = np.random.default_rng([epoch, len(X)]).permutation(len(X))
        order = order[np.isin(order, train)]
        for start in range(0, len(order), spec.batch_size):
            index = order[start : start + spec.batch_size]
            decision = forward(rows[index], True)
            if task == "single":
                each = torch.nn.functional.cross_entropy(
                    decision, goal[index], label_smoothing=spec.label_smoothing, reduction="none"
                )
                loss = (each * weights[index]).mean()
            elif task == "multi":
                soft = goal[index] * (1 - spec.label_smoothing) + spec.label_smoothing / 2
                loss = torch.nn.functional.binary_cross_entropy_with_logits(decision, soft)
            else:
                loss = 0.5 * torch.nn.functional.mse_loss(decision, goal[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            after.append(finish(forward(rows[held], False)))
    with torch.no_grad():
        return after, [finish(forward(rows, False))]


MIXED = [
    MLPSpec((20,), 3e-3, 1e-2, dropout=0.3, seed=1, batch_size=64, epochs=4, patience=9),
    MLPSpec((24,), 1e-3, 0.0, label_smoothing=0.1, seed=2, batch_size=64, epochs=4, patience=9),
    MLPSpec(
        (24,), 1e-2, 1e-1, class_weight="balanced", seed=1, batch_size=64, epochs=4, patience=9
    ),
    MLPSpec((33, 12), 3e-3, 1e-3, dropout=0.5, seed=3, batch_size=50, epochs=4, patience=9),
    MLPSpec((), 3e-3, 1e-3, seed=4, batch_size=64, epochs=4, patience=9),
]


def test_a_bank_equals_networks_trained_one_at_a_time() -> None:
    """Every head of a mixed bank (widths, depths, dropout, smoothing, class weights, batch sizes)
    has the predictions of the same network trained alone by torch: after the epoch that was best
    for its fold.
    """
    X, y, fold = digits()
    fits = fit_mlp_bank(TrainingData(X, y, fold, 10), MIXED, refit=False, precision="float32")
    assert [(fit.spec, fit.fold) for fit in fits] == [
        (spec, number) for spec in MIXED for number in range(3)
    ]
    for fit in fits:
        after, _ = one_at_a_time(X, y, fold, fit.fold, fit.spec, 10, "single", 4)  # type: ignore[arg-type]
        losses = [score("single", y[fold == fit.fold], p, "log_loss") for p in after]
        assert fit.validation is not None
        np.testing.assert_allclose(fit.validation, after[int(np.argmin(losses))], atol=2e-4)


@pytest.mark.parametrize("task", ["multi", "regression"])
def test_other_targets_equal_one_at_a_time(task: str) -> None:
    """Multi-label and regression heads too equal torch's loop, with targets of very different
    scales.
    """
    X, y, fold = digits()
    if task == "multi":
        target: Arrays = np.stack([y % 2 == 0, y > 4, y == 3], axis=1).astype(np.uint8)
    else:
        target = np.stack([y * 1e4 + 7, np.sin(y) * 1e-3], axis=1)
    specs = [
        MLPSpec((16,), 1e-2, dropout=0.2, epochs=3, patience=9),
        MLPSpec((12, 8), 3e-3, seed=5, epochs=3, patience=9),
    ]
    outputs = target.shape[1]
    fits = fit_mlp_bank(TrainingData(X, target, fold, outputs, task_kind=task), specs, refit=False)  # type: ignore[arg-type]
    for fit in fits:
        after, _ = one_at_a_time(X, target, fold, fit.fold, fit.spec, outputs, task, 3)  # type: ignore[arg-type]
        assert fit.validation is not None
        closest = min(float(np.abs((fit.validation - p) / np.std(target, 0)).max()) for p in after)
        assert closest < 1e-3


def test_reduced_precision_is_the_same_network_up_to_rounding() -> None:
    """Multiplying the first layer in bfloat16 changes predictions by its rounding and accuracy
    hardly.
    """
    X, y, fold = digits()
    specs = [replace(spec, epochs=8) for spec in MIXED[:3]]
    exact, rounded = (
        fit_mlp_bank(TrainingData(X, y, fold, 10), specs, refit=False, precision=p)
        for p in ("float32", "bfloat16")  # type: ignore[arg-type]
    )
    for a, b in zip(exact, rounded, strict=True):
        assert a.validation is not None
        assert b.validation is not None
        assert 0 < np.abs(a.validation - b.validation).mean() < 0.03
        own = y[fold == a.fold]
        assert (
            abs(
                score("single", own, a.validation, "accuracy")
                - score("single", own, b.validation, "accuracy")
            )
            < 0.04
        )


def test_a_head_does_not_depend_on_its_company() -> None:
    """Alone or among others (of other widths, seeds, dropout, failing ones), a head is the same up
    to rounding.
    """
    X, y, fold = digits()
    together = fit_mlp_bank(
        TrainingData(X, y, fold, 10),
        [*MIXED, MLPSpec((24,), 1e9, batch_size=64)],
        precision="float32",
    )
    alone = fit_mlp_bank(TrainingData(X, y, fold, 10), MIXED[:1], precision="float32")
    for a, b in zip(together, alone, strict=False):
        np.testing.assert_allclose(a.arrays["weight1"], b.arrays["weight1"], atol=1e-4)


def test_padding_stays_zero() -> None:
    """Padded units start at zero and stay exactly there through dropout, weight decay and many
    steps.
    """
    X, y, fold = digits()
    specs = [
        MLPSpec((20,), 1e-2, 1e-1, dropout=0.3, batch_size=64),
        MLPSpec((24,), 1e-2, batch_size=64),
    ]
    assert padded_width(20) == padded_width(24) == 24
    bank = _batch(X, y, fold, specs)
    order = np.flatnonzero(fold != 0)
    for _ in range(3):
        bank.train_epoch(order, np.zeros(len(order), np.int64), 64)
    assert (bank.weights[0][0, 20:] == 0).all()
    assert (bank.weights[1][0, :, 20:] == 0).all()
    assert (bank.weights[0][1, 20:] != 0).any()


def test_the_broadcast_optimizer_is_adamw() -> None:
    """The broadcast AdamW gives what torch's optimizer gives, head by head."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = (
        torch.randn(3, 4, 5, generator=generator),
        torch.randn(6, 3, 4, 5, generator=generator),
    )
    specs = [
        MLPSpec(learning_rate=rate, weight_decay=decay)
        for rate, decay in ((1e-1, 0.0), (1e-2, 1.0), (1e-3, 1e-2))
    ]
    ours, first, second = start.clone(), torch.zeros(3, 4, 5), torch.zeros(3, 4, 5)
    theirs = [torch.nn.Parameter(start[head].clone()) for head in range(3)]
    groups = [
        {"params": [p], "lr": s.learning_rate, "weight_decay": s.weight_decay}
        for p, s in zip(theirs, specs, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    rates, decays = (
        torch.tensor([1e-1, 1e-2, 1e-3]).view(3, 1, 1),
        torch.tensor([0.0, 1.0, 1e-2]).view(3, 1, 1),
    )
    for step, gradient in enumerate(gradients, start=1):
        adamw_broadcast(ours, gradient, first, second, rates, 1 - rates * decays, step)
        for head in range(3):
            theirs[head].grad = gradient[head]
        optimizer.step()
    torch.testing.assert_close(ours, torch.stack([p.data for p in theirs]))


def test_features_on_disk_train_as_in_memory(tmp_path: Path) -> None:
    """A read-only float16 memory map is used where it lies, and gives the head of the array."""
    X, y, fold = digits()
    np.save(tmp_path / "X.npy", X.astype(np.float16))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    specs = [MLPSpec((16,), 1e-2, epochs=3)]
    on_disk = fit_mlp_bank(TrainingData(mapped, y, fold, 10), specs)
    in_memory = fit_mlp_bank(TrainingData(X.astype(np.float16), y, fold, 10), specs)
    for a, b in zip(on_disk, in_memory, strict=True):
        np.testing.assert_array_equal(a.arrays["weight0"], b.arrays["weight0"])


def test_full_heads_train_for_the_mean_best_epoch() -> None:
    """The head trained on all rows equals a torch loop over all rows for the mean best epoch of the
    folds.
    """
    X, y, fold = digits()
    # Not seed 0: there a unit's input comes within rounding of zero, and its ReLU takes the other
    # side.
    spec = MLPSpec((24,), 1e-2, batch_size=64, epochs=6, patience=2, seed=1)
    fits = fit_mlp_bank(TrainingData(X, y, fold, 10), [spec], precision="float32")
    full = fits[-1]
    assert full.fold == REFIT
    assert full.validation is None
    best = []
    for number in range(3):
        after, _ = one_at_a_time(X, y, fold, number, spec, 10, "single", 6)
        best.append(
            1 + int(np.argmin([score("single", y[fold == number], p, "log_loss") for p in after]))
        )
    assert full.iterations == round(np.mean(best))
    _, (everything,) = one_at_a_time(X, y, fold, REFIT, spec, 10, "single", full.iterations)
    np.testing.assert_allclose(predict_head(spec, full.arrays, X), everything, atol=2e-4)


def test_validation_predictions_are_those_of_the_arrays() -> None:
    """A fold's stored predictions are what `predict_head` makes of its stored arrays."""
    X, y, fold = digits()
    for fit in fit_mlp_bank(TrainingData(X * 1e3 + 500, y, fold, 10), MIXED[:2]):
        if fit.fold != REFIT:
            np.testing.assert_array_equal(
                fit.validation, predict_head(fit.spec, fit.arrays, X[fold == fit.fold] * 1e3 + 500)
            )


def test_held_out_rows_have_no_influence() -> None:
    """Changing the features of held-out rows changes neither standardization nor weights of that
    fold's head.
    """
    X, y, fold = digits()
    spec = MLPSpec((16,), 1e-2, epochs=2, patience=9)
    before = fit_mlp_bank(TrainingData(X, y, fold, 10), [spec], refit=False)[0]
    moved = X.copy()
    moved[fold == 0] += (
        np.random.default_rng(0).normal(size=moved[fold == 0].shape).astype(np.float32) * 100
    )
    wrong = y.copy()
    wrong[fold == 0] = 0
    after = fit_mlp_bank(
        TrainingData(moved, wrong, fold, 10), [replace(spec, epochs=1)], refit=False
    )[0]
    one_epoch = fit_mlp_bank(TrainingData(X, y, fold, 10), [replace(spec, epochs=1)], refit=False)[
        0
    ]
    np.testing.assert_array_equal(after.arrays["weight0"], one_epoch.arrays["weight0"])
    assert before.validation is not None


def test_hopeless_heads_fail_alone() -> None:
    """A learning rate of 1e9, an impossible spec and a NaN are rows with a reason; the others are
    whole.
    """
    X, y, fold = digits()
    specs = [
        MLPSpec((24,), 1e9),
        MLPSpec((0,)),
        MLPSpec(dropout=2.0),
        MLPSpec((24,), 1e-2, epochs=10),
    ]
    fits = fit_mlp_bank(TrainingData(X, y, fold, 10), specs)
    by_spec = {spec: [fit for fit in fits if fit.spec == spec] for spec in specs}
    assert all("not finite" in (fit.error or "") for fit in by_spec[specs[0]] if fit.fold != REFIT)
    assert all("widths" in (fit.error or "") for fit in by_spec[specs[1]])
    assert all("dropout" in (fit.error or "") for fit in by_spec[specs[2]])
    assert all(fit.error is None for fit in by_spec[specs[3]])
    assert _accuracy(by_spec[specs[3]][0], y, fold) > 0.85
    bad = X.copy()
    bad[7, 3] = np.nan
    with pytest.raises(ValueError, match="row 7"):
        fit_mlp_bank(TrainingData(bad, y, fold, 10), specs)


def test_early_stopping_leaves_the_batch() -> None:
    """A head that overfits at once stops after its patience, while its neighbour in the batch
    trains on.
    """
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(200, 30)).astype(np.float32), generator.integers(0, 2, 200)
    fold = np.where(np.arange(200) % 2 == 0, 0, TRAIN_ONLY).astype(np.int16)
    fast = MLPSpec((32,), 3e-2, batch_size=32, epochs=40, patience=3)
    slow = MLPSpec((32,), 1e-5, batch_size=32, epochs=40, patience=3)
    hasty, patient = fit_mlp_bank(TrainingData(X, y, fold, 2), [fast, slow], refit=False)
    assert hasty.iterations < 15
    assert patient.iterations == 40


def test_halving_stops_the_losers_and_keeps_the_winner() -> None:
    """After each rung the best share goes on: epochs run, survivors and REFIT heads are what the
    schedule says.
    """
    X, y, fold = digits()
    rates = [1e-2, 1e-6, 3e-3, 1e-5, 1e-7, 3e-6, 1e-8, 2e-2]
    specs = [MLPSpec((24,), rate, batch_size=64, epochs=8, patience=8) for rate in rates]
    fits = fit_mlp_bank(
        TrainingData(X, y, fold, 10), specs, halving=Halving(after=(2, 4), keep=0.5)
    )
    epochs = [
        max(fit.iterations for fit in fits if fit.spec == spec and fit.fold != REFIT)
        for spec in specs
    ]
    assert sorted(epochs) == [2, 2, 2, 2, 4, 4, 8, 8]
    survivors = {fit.spec for fit in fits if fit.fold == REFIT}
    assert survivors == {spec for spec, last in zip(specs, epochs, strict=True) if last == 8}
    assert {spec.learning_rate for spec in survivors} < {1e-2, 3e-3, 2e-2}
    whole = fit_mlp_bank(TrainingData(X, y, fold, 10), specs, refit=False)
    for fit in fits:
        if fit.spec in survivors and fit.fold != REFIT:
            other = next(o for o in whole if (o.spec, o.fold) == (fit.spec, fit.fold))
            np.testing.assert_allclose(fit.validation, other.validation, atol=1e-5)
    with pytest.raises(ValueError, match="rising epochs"):
        Halving(after=(4, 2))


def test_views_augment_training_and_average_predictions() -> None:
    """With V views the training set is all of them, one per row and epoch, and a prediction is the
    mean over views.
    """
    X, y, fold = digits()
    noise = np.random.default_rng(0).normal(size=(3, *X.shape)).astype(np.float32)
    stacked = X + 4 * noise
    spec = MLPSpec((32,), 1e-2, batch_size=64, epochs=8)
    fit = fit_mlp_bank(TrainingData(stacked, y, fold, 10), [spec], refit=False)[0]
    mean = np.mean([predict_head(spec, fit.arrays, view[fold == 0]) for view in stacked], axis=0)
    np.testing.assert_allclose(fit.validation, mean, atol=1e-6)
    single = fit_mlp_bank(TrainingData(stacked[0], y, fold, 10), [spec], refit=False)[0]
    assert _accuracy(fit, y, fold) > _accuracy(single, y, fold)
    # One view twice is the same as one view: the choice among equals changes nothing.
    twice = fit_mlp_bank(TrainingData(np.stack([X, X]), y, fold, 10), [spec], refit=False)[0]
    once = fit_mlp_bank(TrainingData(X, y, fold, 10), [spec], refit=False)[0]
    np.testing.assert_allclose(twice.validation, once.validation, atol=1e-5)


def test_rows_without_weight_are_as_absent() -> None:
    """A weight of zero takes a row out of standardization and training alike."""
    X, y, _ = digits(300)
    spoilt = np.concatenate([X, X[:50] + 1000])
    labels = np.concatenate([y, (y[:50] + 1) % 10])
    weight = np.concatenate([np.ones(300), np.zeros(50)])
    spec = MLPSpec((16,), 1e-2, epochs=3)
    fold = np.full(350, TRAIN_ONLY, np.int16)
    (fit,) = fit_mlp_bank(TrainingData(spoilt, labels, fold, 10, sample_weight=weight), [spec])
    assert (predict_head(spec, fit.arrays, X).argmax(1) == y).mean() > 0.5
    mean, scale = mean_and_scale(X[None], np.arange(300))
    np.testing.assert_allclose(mean, X.mean(0, dtype=np.float64))
    np.testing.assert_allclose(scale[X.std(0) > 0], X.std(0, dtype=np.float64)[X.std(0) > 0])


def test_two_runs_are_bitwise_equal() -> None:
    """Everything random is seeded."""
    X, y, fold = digits(300)
    first, second = (fit_mlp_bank(TrainingData(X, y, fold, 10), MIXED) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(6, 40),
    width=st.integers(1, 12),
    classes=st.integers(2, 5),
    hidden=st.lists(st.integers(1, 20), max_size=2),
    batch=st.integers(1, 40),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    seed=st.integers(0, 99),
)
def test_any_shape_trains(
    rows: int, width: int, classes: int, hidden: list[int], batch: int, scale: float, seed: int
) -> None:
    """Odd shapes, scales, constant features, classes missing from a fold: heads come back finite,
    rows sum to one.
    """
    generator = np.random.default_rng(seed)
    X = (generator.normal(size=(rows, width)) * scale).astype(np.float32)
    X[:, 0] = 3
    y = generator.integers(0, classes, rows)
    fold = make_folds(y, n_folds=3, seed=seed)
    specs = [
        MLPSpec(tuple(hidden), 1e-2, batch_size=batch, epochs=2, dropout=d) for d in (0.0, 0.5)
    ]
    fits = fit_mlp_bank(TrainingData(X, y, fold, classes), specs)
    assert len(fits) == 8
    for fit in fits:
        assert fit.error is None
        predicted = predict_head(fit.spec, fit.arrays, X)
        assert predicted.shape == (rows, classes)
        np.testing.assert_allclose(predicted.sum(1), 1, atol=1e-5)


def _accuracy(fit: FitResult, y: Arrays, fold: Arrays) -> float:
    assert fit.validation is not None
    return score("single", y[fold == fit.fold], fit.validation, "accuracy")


def _batch(X: Arrays, y: Arrays, fold: Arrays, specs: list[MLPSpec]) -> NetworkBatch:
    from headrace.heads.networks.mlp_data import prepare

    data = prepare(
        X[None],
        torch.from_numpy(X),
        TrainingData(X, y, fold, 10),
        np.ones(len(X)),
        0,
        standardize=True,
    )
    return NetworkBatch(
        specs,
        data.rows,
        fold=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
