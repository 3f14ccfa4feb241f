"""Heads on bags: the bank against a plain torch loop, units of any size, and what attention is for."""

import numpy as np
import pytest
import torch

from headrace.heads.bags.bank import fit_bags_bank, units_of
from headrace.heads.bags.batch import initial_parameters
from headrace.heads.bags.kind import BagsSpec
from headrace.heads.bags.pooling import predict_units
from headrace.heads.bank import fit_bank
from headrace.heads.data.task import REFIT, TEST, TRAIN_ONLY, Task
from headrace.heads.data.training_data import TrainingData
from headrace.heads.errors import HeadError
from headrace.heads.predict import predict_head
from headrace.heads.spec import Halving

POOLINGS = ("attention", "mean", "max")
TASKS = ("single", "multi", "regression")


def made(task="single", n_units=40, n_features=7, seed=0, sizes=None):
    """Units of 1 to 9 rows, mixed up among one another; two folds, and units that always train."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 10, n_units) if sizes is None else np.asarray(sizes)
    names = np.array([f"p{unit:03}" for unit in generator.permutation(len(sizes))])
    order = generator.permutation(sizes.sum())
    unit_of_row = np.repeat(np.arange(len(sizes)), sizes)[order]
    X = generator.normal(2, 3, (len(unit_of_row), n_features)).astype(np.float32)
    signal = np.array([X[unit_of_row == unit].mean() for unit in range(len(sizes))]) - 2
    if task == "single":
        target, n_outputs = np.digitize(signal, [-0.3, 0.3]), 3
    elif task == "multi":
        target, n_outputs = np.stack([signal > 0, signal > 0.5], 1).astype(np.uint8), 2
    else:
        target, n_outputs = np.stack([signal, -3 * signal + 5], 1), 2
    fold = np.array([0, 1, TRAIN_ONLY])[np.arange(len(sizes)) % 3]
    return TrainingData(
        X,
        target[unit_of_row],
        fold[unit_of_row],
        n_outputs,
        task,
        unit=names[unit_of_row],
    )


class Plain(torch.nn.Module):
    """The same network as a textbook has it."""

    def __init__(self, spec, start):
        super().__init__()
        self.spec = spec
        for name, value in start.items():
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(value)))

    def bag(self, rows):
        h = rows
        for layer in range(len(self.spec.hidden)):
            h = torch.relu(h @ getattr(self, f"weight{layer}").T + getattr(self, f"bias{layer}"))
        if self.spec.pooling == "mean":
            z = h.mean(0)
        elif self.spec.pooling == "max":
            z = h.max(0).values
        else:
            gate = torch.tanh(h @ self.tanh_weight.T + self.tanh_bias)
            gate = gate * torch.sigmoid(h @ self.sigmoid_weight.T + self.sigmoid_bias)
            z = torch.softmax(gate @ self.attention[0], 0) @ h
        last = len(self.spec.hidden)
        return getattr(self, f"weight{last}") @ z + getattr(self, f"bias{last}")


def train_plain(spec, data, fold, n_epochs):
    """AdamW over minibatches of units, in the bank's order; returns what it predicts for all units
    after each of the epochs.
    """
    units = units_of(data)
    rows_of = [units.order[a:b] for a, b in zip(units.offsets[:-1], units.offsets[1:], strict=True)]
    train = np.flatnonzero(units.data.fold != fold)
    all_rows = np.concatenate([rows_of[unit] for unit in train])
    X = data.X.astype(np.float64)
    Z = torch.from_numpy(((X - X[all_rows].mean(0)) / X[all_rows].std(0)).astype(np.float32))
    target = torch.from_numpy(np.asarray(units.data.target))
    if data.task_kind == "regression":
        mean, spread = target[train].mean(0), target[train].std(0, correction=0)
        target = ((target - mean) / spread).float()
    network = Plain(spec, initial_parameters(spec, X.shape[1], data.n_outputs))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay
    )
    after_epochs = []
    for epoch in range(n_epochs):
        order = np.random.default_rng([epoch, len(rows_of)]).permutation(len(rows_of))
        order = order[np.isin(order, train)]
        for start in range(0, len(order), spec.batch_size):
            batch = order[start : start + spec.batch_size]
            decision = torch.stack([network.bag(Z[rows_of[unit]]) for unit in batch])
            if data.task_kind == "single":
                loss = torch.nn.functional.cross_entropy(decision, target[batch])
            elif data.task_kind == "multi":
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    decision, target[batch].float()
                )
            else:
                loss = 0.5 * (decision - target[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            decision = torch.stack([network.bag(Z[rows]) for rows in rows_of])
        if data.task_kind == "single":
            decision = decision.softmax(1)
        elif data.task_kind == "multi":
            decision = decision.sigmoid()
        else:
            decision = decision * spread + mean
        after_epochs.append(decision.numpy())
    return after_epochs


@pytest.mark.parametrize(
    ("task", "hidden"),
    [*((task, (6,)) for task in TASKS), ("single", ()), ("regression", ()), ("single", (6, 4))],
)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_bank_is_a_plain_torch_loop(task, pooling, hidden):
    data = made(task)
    specs = [
        BagsSpec(
            pooling, hidden, 5, learning_rate=rate, batch_size=7, epochs=3, patience=3, seed=seed
        )
        for rate, seed in ((3e-3, 0), (1e-2, 3))
    ]
    fits = fit_bags_bank(data, specs)
    units = units_of(data)
    codes = np.unique(data.unit, return_inverse=True)[1]
    for fit in fits:
        assert fit.error is None
        n_epochs = fit.iterations
        if fit.fold != REFIT and n_epochs:
            # The best epoch is kept.
            rows = codes[data.fold == fit.fold]
            assert any(
                np.allclose(fit.validation, expected[rows], atol=2e-4, rtol=2e-4)
                for expected in train_plain(fit.spec, data, fit.fold, n_epochs)
            ), f"{fit.spec} of fold {fit.fold} is no epoch of the loop"
        elif fit.fold == REFIT:
            expected = train_plain(fit.spec, data, fit.fold, n_epochs)[-1]
            found, _ = predict_units(fit.spec, fit.arrays, data.X, data.unit, task)
            np.testing.assert_allclose(found, expected[codes], atol=3e-4, rtol=3e-4)
    assert len(units.offsets) == 41


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_that_overflow_are_predicted_without_a_warning(pooling):
    """As by dense heads; warnings are errors here. The other units' predictions are as before."""
    data = made("single")
    (fit, *_) = fit_bags_bank(data, [BagsSpec(pooling, (6,), 5, batch_size=7, epochs=1)])
    fit.arrays["weight0"] *= 100
    expected, _ = predict_units(fit.spec, fit.arrays, data.X, data.unit, "single")
    X = data.X.copy()
    is_large = data.unit == data.unit[0]
    X[is_large] = np.where(np.arange(X.shape[1]) % 2, -3e38, 3e38)
    found, _ = predict_units(fit.spec, fit.arrays, X, data.unit, "single")
    np.testing.assert_allclose(found[~is_large], expected[~is_large], rtol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_hidden_values_in_bfloat16_are_those_in_float32_up_to_their_rounding(pooling):
    """Eight bits of a number are kept: after two epochs predictions and weights have two digits."""
    data = made(n_features=40)
    specs = [
        BagsSpec(pooling, (16, 8), 8, dropout=dropout, batch_size=7, epochs=2, patience=2)
        for dropout in (0.0, 0.25)
    ]
    exact, rounded = (
        fit_bags_bank(data, specs, precision=precision) for precision in ("float32", "bfloat16")
    )
    for one, other in zip(exact, rounded, strict=True):
        if one.fold != REFIT:
            np.testing.assert_allclose(one.validation, other.validation, atol=0.01)
            weights = one.arrays["instance_weight"]
            np.testing.assert_allclose(weights, other.arrays["instance_weight"], atol=0.02)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_rows_of_a_unit_have_one_prediction_and_weights_that_sum_to_one(pooling):
    data = made()
    (first, second, refit) = fit_bags_bank(data, [BagsSpec(pooling, (6,), epochs=2)])
    for fit in (first, second):
        held = data.unit[data.fold == fit.fold]
        weights = fit.arrays["instance_weight"]
        for name in np.unique(held):
            assert len(np.unique(fit.validation[held == name], axis=0)) == 1
            assert weights[held == name].sum() == pytest.approx(1, abs=1e-5)
            if pooling == "mean":
                assert np.ptp(weights[held == name]) == 0
    assert "instance_weight" not in refit.arrays


def test_an_order_of_rows_or_another_head_in_the_bank_changes_nothing():
    data = made()
    specs = [BagsSpec(dropout=0.5, hidden=(6,), epochs=3, seed=seed) for seed in (0, 1)]
    both = fit_bags_bank(data, specs)
    alone = fit_bags_bank(data, specs[1:])
    for together, single in zip(both[3:], alone, strict=True):
        for name, array in single.arrays.items():
            np.testing.assert_allclose(together.arrays[name], array, atol=1e-5)
    specs = [BagsSpec(hidden=(6,), epochs=3)]  # dropout falls on rows in their order
    alone = fit_bags_bank(data, specs)
    order = np.random.default_rng(5).permutation(len(data.X))
    mixed = TrainingData(
        data.X[order], data.target[order], data.fold[order], 3, unit=data.unit[order]
    )
    for plain, other in zip(alone, fit_bags_bank(mixed, specs), strict=True):
        if plain.fold != REFIT:
            back = np.argsort(order[data.fold[order] == plain.fold])
            np.testing.assert_allclose(plain.validation, other.validation[back], atol=1e-3)


def test_early_stopping_looks_at_the_held_out_units_alone_and_halving_drops_losers():
    data = made(n_units=60)
    specs = [
        BagsSpec(learning_rate=rate, hidden=(6,), epochs=6) for rate in (1e-2, 1e-5, 1e-6, 1e-7)
    ]
    fits = fit_bags_bank(data, specs, halving=Halving((2,), 0.25))
    assert [fit.fold for fit in fits].count(REFIT) == 1
    assert {fit.spec.learning_rate for fit in fits if fit.fold == REFIT} == {1e-2}


def test_a_spec_that_cannot_be_trained_fails_alone():
    fits = fit_bags_bank(made(), [BagsSpec(learning_rate=1e9), BagsSpec(epochs=1)])
    assert all("diverged" in fit.error or "never finite" in fit.error for fit in fits[:2])
    assert all(fit.error is None for fit in fits[3:])


def test_units_of_one_row_and_of_twenty_thousand():
    """Predicted as one by one, in float32, and trained beside one another."""
    sizes = [1, 20_000, 2, 1, 50, 1, 3, 40, 1]
    data = made(sizes=sizes, n_features=3)
    data = TrainingData(data.X, (data.target > 0).astype(np.int64), data.fold, 2, unit=data.unit)
    for pooling in POOLINGS:
        (*_, refit) = fit_bags_bank(data, [BagsSpec(pooling, (4,), epochs=1)])
        found, weights = predict_units(refit.spec, refit.arrays, data.X, data.unit, "single")
        assert np.isfinite(found).all()
        for name in np.unique(data.unit):
            rows = data.unit == name
            alone, _ = predict_units(
                refit.spec, refit.arrays, data.X[rows], data.unit[rows], "single"
            )
            np.testing.assert_allclose(found[rows], alone, atol=1e-6)
            assert weights[rows].sum() == pytest.approx(1, abs=1e-3)


def test_attention_survives_logits_that_overflow():
    spec = BagsSpec(hidden=())
    arrays = {
        "tanh_weight": np.full((1, 1), 1, np.float32),
        "tanh_bias": np.zeros(1, np.float32),
        "sigmoid_weight": np.full((1, 1), 1, np.float32),
        "sigmoid_bias": np.zeros(1, np.float32),
        "attention": np.array([1e4], np.float32),
        "weight0": np.array([[1.0], [-1.0]], np.float32),
        "bias0": np.zeros(2, np.float32),
    }
    X = np.array([[5.0], [-5.0], [4.0]], np.float32)
    predicted, weights = predict_units(spec, arrays, X, np.array([0, 0, 1]), "single")
    assert weights.tolist() == [1, 0, 1]
    np.testing.assert_allclose(predicted[:, 0], 1 / (1 + np.exp([-10.0, -10, -8])), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": None}, "the task has none: name their column, task.unit: patient"),
        ({"fold": "mixed"}, "have images of several folds: keep a unit's images on one side"),
        ({"target": "mixed"}, "have images of several targets: give all images of a unit one"),
    ],
)
def test_rows_that_are_no_bags_are_refused(change, said):
    data = made()
    values = {"X": data.X, "target": data.target, "fold": data.fold, "unit": data.unit}
    for name, value in change.items():
        values[name] = value if value is None else np.roll(values[name], 1)
    with pytest.raises(HeadError, match=said):
        units_of(TrainingData(n_outputs=3, **values))


def test_prediction_asks_for_units():
    data = made()
    (*_, refit) = fit_bags_bank(data, [BagsSpec(epochs=1)])
    with pytest.raises(HeadError, match="give the unit of each row"):
        predict_head(refit.spec, refit.arrays, data.X)
    found = predict_head(refit.spec, refit.arrays, data.X, unit=data.unit)
    np.testing.assert_array_equal(
        found, predict_units(refit.spec, refit.arrays, data.X, data.unit, "single")[0]
    )
    assert predict_units(refit.spec, refit.arrays, data.X[:0], data.unit[:0], "single")[
        0
    ].shape == (0, 3)


def test_all_views_of_an_image_are_in_its_unit():
    """Trained on two views, a unit's prediction is that of all its rows, and so are the weights."""
    data = made()
    ids = np.arange(len(data.X)).astype(str)
    task = Task(
        "single",
        ("a", "b", "c"),
        ids,
        ids.astype("S32"),
        data.target,
        data.fold,
        np.ones(len(ids)),
        data.unit,
    )
    views = np.stack([data.X, data.X + 0.5])
    fits = fit_bank(views, task, [BagsSpec(epochs=2, hidden=(6,))])
    held = data.fold == 0
    bags = np.tile(data.unit[held], 2)
    rows = views[:, held].reshape(len(bags), -1)
    expected, weights = predict_units(fits[0].spec, fits[0].arrays, rows, bags, "single")
    np.testing.assert_allclose(fits[0].validation, expected[: held.sum()], atol=1e-5)
    np.testing.assert_allclose(
        fits[0].arrays["instance_weight"], weights.reshape(2, -1).sum(0), atol=1e-5
    )


def test_test_rows_are_not_trained_on():
    data = made()
    units = np.unique(data.unit)[:5]
    is_test = np.isin(data.unit, units)
    fold = np.where(is_test, TEST, data.fold)
    spoilt = np.where(is_test[:, None], 1e6, data.X).astype(np.float32)
    plain, other = (
        fit_bags_bank(TrainingData(X, data.target, fold, 3, unit=data.unit), [BagsSpec(epochs=2)])
        for X in (data.X, spoilt)
    )
    for name, array in plain[-1].arrays.items():
        np.testing.assert_array_equal(array, other[-1].arrays[name])


def test_attention_finds_the_one_instance_in_ten_that_carries_the_label():
    """Units of ten rows, of which one is moved along a direction by 4 deviations, up or down by
    the label, and marked in another direction. The mean moves by 0.4, its noise is 1 / sqrt(10):
    no rule on means does better than Phi(0.4 sqrt(10)) = 0.897. Who looks at the marked row alone
    is right up to Phi(4) = 0.99997 of the time.
    """
    generator = np.random.default_rng(0)
    n_units, size, n_features = 600, 10, 16
    X = generator.normal(size=(n_units, size, n_features)).astype(np.float32)
    label = generator.integers(0, 2, n_units)
    carrier = generator.integers(0, size, n_units)
    X[np.arange(n_units), carrier, 0] += np.where(label == 1, 4, -4)
    X[np.arange(n_units), carrier, 1] += 6
    unit = np.repeat(np.arange(n_units), size)
    data = TrainingData(
        X.reshape(-1, n_features),
        np.repeat(label, size),
        np.repeat(np.where(np.arange(n_units) < 300, 0, TRAIN_ONLY), size),
        2,
        unit=unit,
    )
    accuracy = {}
    for pooling in ("attention", "mean"):
        hidden = (32,) if pooling == "attention" else ()
        spec = BagsSpec(pooling, hidden, learning_rate=3e-3, epochs=40, patience=10)
        (fit,) = fit_bags_bank(data, [spec], refit=False)
        predicted = fit.validation.argmax(1)
        accuracy[pooling] = (predicted == data.target[data.fold == 0]).mean()
        if pooling == "attention":
            weights = fit.arrays["instance_weight"].reshape(-1, size)
            found = (weights.argmax(1) == carrier[:300]).mean()
    assert accuracy["mean"] < 0.897 + 0.04
    assert accuracy["attention"] > 0.97
    assert found > 0.95
