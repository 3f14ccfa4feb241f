"""Convolution banks against one network at a time, and what they are for."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import REFIT
from headrace.heads.data.training_data import TrainingData
from headrace.heads.errors import HeadError
from headrace.heads.evaluate.metrics import score
from headrace.heads.networks.conv import fit_conv_bank
from headrace.heads.networks.conv_batch import random_start
from headrace.heads.networks.kind import ConvSpec
from headrace.heads.predict import predict_head

Arrays = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def maps(rows: int = 240) -> tuple[Arrays, Arrays, Arrays]:
    """Digits as maps of two channels with an offset and unlike scales."""
    X, y = load_digits(return_X_y=True)
    images = X[:rows].reshape(-1, 1, 8, 8).astype(np.float32)
    return (
        np.concatenate([images, 5 + images**2 / 100], axis=1),
        y[:rows],
        make_folds(y[:rows], n_folds=2, seed=0),
    )


def one_at_a_time(X: Arrays, y: Arrays, fold: Arrays, number: int, spec: ConvSpec) -> list[Arrays]:
    """Predictions (n, C) of the held-out rows after every epoch, by torch's own modules and
    optimizer.
    """
    train, held = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
    mean, scale = X[train].mean((0, 2, 3)), X[train].std((0, 2, 3))
    rows = torch.from_numpy((X - mean[:, None, None]) / scale[:, None, None])
    kernels, layers = random_start(spec, X.shape[1], 10)
    modules: list[torch.nn.Module] = []
    for kernel in kernels:
        conv = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1, bias=False)
        conv.weight.data = torch.from_numpy(kernel)
        modules += [conv, torch.nn.BatchNorm2d(kernel.shape[0]), torch.nn.ReLU()]
    modules += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    for place, (weight, bias) in enumerate(layers):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
        modules += [linear] + [torch.nn.ReLU()] * (place < len(layers) - 1)
    net = torch.nn.Sequential(*modules)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay
    )
    after = []
    for epoch in range(spec.epochs):
        order = np.random.default_rng([epoch, len(X)]).permutation(len(X))
        net.train()
        for index in np.split(
            order[np.isin(order, train)], range(spec.batch_size, len(train), spec.batch_size)
        ):
            loss = torch.nn.functional.cross_entropy(
                net(rows[index]), torch.from_numpy(y[index]), label_smoothing=spec.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            after.append(torch.softmax(net.eval()(rows[held]), 1).numpy())
    return after


def test_a_bank_equals_networks_trained_one_at_a_time() -> None:
    """Heads side by side, by wide and grouped convolutions, have the predictions of torch's modules
    trained alone.
    """
    X, y, fold = maps()
    specs = [
        ConvSpec((6,), (), 1e-2, 1e-2, seed=1, batch_size=40, epochs=3, patience=9),
        ConvSpec(
            (6,), (), 1e-3, 0.0, label_smoothing=0.1, seed=2, batch_size=40, epochs=3, patience=9
        ),
        ConvSpec((4, 5), (7,), 3e-3, 1e-1, seed=3, batch_size=40, epochs=3, patience=9),
        ConvSpec((4, 5), (7,), 1e-2, 0.0, seed=4, batch_size=40, epochs=3, patience=9),
    ]
    fits = fit_conv_bank(TrainingData(X, y, fold, 10), specs, refit=False)
    for fit in fits:
        assert isinstance(fit.spec, ConvSpec)
        after = one_at_a_time(X, y, fold, fit.fold, fit.spec)
        best = int(np.argmin([score("single", y[fold == fit.fold], p, "log_loss") for p in after]))
        np.testing.assert_allclose(fit.validation, after[best], atol=1e-3)


def test_it_learns_and_predicts_from_its_arrays() -> None:
    """A head trained on all rows predicts from arrays alone, and refuses maps of other channels."""
    X, y, fold = maps(400)
    spec = ConvSpec((16, 16), learning_rate=1e-2, batch_size=20, epochs=10, patience=10)
    fits = fit_conv_bank(TrainingData(X, y, fold, 10), [spec])
    held = fits[0]
    assert held.validation is not None
    assert score("single", y[fold == 0], held.validation, "accuracy") > 0.7
    np.testing.assert_array_equal(held.validation, predict_head(spec, held.arrays, X[fold == 0]))
    assert fits[-1].fold == REFIT
    assert (predict_head(spec, fits[-1].arrays, X).argmax(1) == y).mean() > 0.75
    with pytest.raises(HeadError, match="2 channels"):
        predict_head(spec, held.arrays, X[:, :1])


def test_views_and_other_targets() -> None:
    """Views average their predictions; regression heads predict in the target's own scale."""
    X, _, fold = maps()
    target = np.stack([X[:, 0].mean((1, 2)) * 1e4 + 3e5], axis=1).astype(np.float64)
    spec = ConvSpec((8,), (), 3e-2, batch_size=20, epochs=25, patience=25)
    stacked = np.stack([X, X[:, :, :, ::-1]])
    fit = fit_conv_bank(
        TrainingData(stacked, target, fold, 1, task_kind="regression"), [spec], refit=False
    )[0]
    mean = np.mean(
        [predict_head(spec, fit.arrays, view[fold == 0], "regression") for view in stacked], axis=0
    )
    np.testing.assert_allclose(fit.validation, mean, rtol=1e-5)
    assert fit.validation is not None
    assert score("regression", target[fold == 0], fit.validation, "r2") > 0.8


def test_failures_are_rows() -> None:
    """No channels, or a learning rate of 1e30, fail alone; vectors instead of maps are refused with
    the cure.
    """
    X, y, fold = maps()
    specs = [ConvSpec(()), ConvSpec((4,), learning_rate=1e30), ConvSpec((4,), epochs=2)]
    errors = {
        fit.spec: fit.error
        for fit in fit_conv_bank(TrainingData(X, y, fold, 10), specs, refit=False)
    }
    assert "at least one layer" in (errors[specs[0]] or "")
    assert errors[specs[1]] is not None
    assert errors[specs[2]] is None
    with pytest.raises(ValueError, match=r"layer4\.map"):
        fit_conv_bank(TrainingData(X.reshape(len(X), -1), y, fold, 10), specs)
