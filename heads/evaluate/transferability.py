"""How well features suit a task, without training a head: LogME, H-score, NCE, and bounds on the
Bayes error.

N rows, D features, C classes (or labels, or regression targets), k = min(N, D). One
eigendecomposition of the smaller of the two Gram matrices serves all classes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_ITERATIONS = 100
_RELATIVE = 1e-10  # eigenvalues below this share of the largest are rounding


def log_me(X: Array, targets: Array) -> float:
    """LogME: the largest log evidence per row of a Bayesian linear model, mean over targets (You et
    al. 2021, Algorithm 3).

    X: (N, D). targets: (N, C) one column per class (0/1), label or regression target. Higher is
    better; comparable between features of the same rows and targets. The evidence counts all D
    weights, the N - k that the rows cannot see included.
    """
    X, y = np.asarray(X, np.float64), np.asarray(targets, np.float64).reshape(len(X), -1)
    values, projected = _spectrum(X, y)
    rows = len(X)
    explained = projected**2  # (k, C) squares of the target's coordinates
    rest = np.maximum((y**2).sum(0) - explained.sum(0), 0)
    ratio = np.ones(y.shape[1])  # alpha / beta, for each target
    alpha = beta = m2 = residual = ratio
    for _ in range(_ITERATIONS):
        shrunk = values[:, None] / (values[:, None] + ratio)
        gamma = shrunk.sum(0)
        m2 = (shrunk**2 * explained / values[:, None]).sum(0)
        residual = ((1 - shrunk) ** 2 * explained).sum(0) + rest
        alpha, beta = gamma / (m2 + 1e-5), (rows - gamma) / (residual + 1e-5)
        before, ratio = ratio, alpha / beta
        if np.all(np.abs(ratio - before) <= 1e-3 * before):
            break
    evidence = 0.5 * (
        len(values) * np.log(alpha)
        - np.log(alpha + beta * values[:, None]).sum(0)
        + rows * np.log(beta)
        - beta * residual
        - alpha * m2
        - rows * np.log(2 * np.pi)
    )
    return float((evidence / rows).mean())


def h_score(X: Array, target: Array, *, shrink: bool = True) -> float:
    """H-score: tr(cov(f)^-1 cov(E[f | class])) (Bao et al.

    2019), with Ledoit and Wolf's shrinkage of the covariance (Ibrahim et al. 2022) unless told
    otherwise.

    X: (N, D); target: (N,) classes. Between 0 and C - 1; higher is better. The plain score is
    meaningless for D near N.
    """
    X = np.asarray(X, np.float64)
    X = X - X.mean(0)
    rows, width = X.shape
    counts = np.bincount(target)
    shares = (
        np.eye(len(counts))[target][:, counts > 0].T / np.sqrt(rows * counts[counts > 0])[:, None]
    )
    values, projected = _spectrum(X, shares.T)
    # Class means, weighted by the root of their share, along the eigenvectors: U S V' a = (U' a) s
    # for the rows a.
    means = projected * np.sqrt(values)[:, None]
    values = values / rows
    alpha, mean = 0.0, values.sum() / width
    if shrink:
        spread = (values**2).sum() / width - mean**2
        error = ((X**2).sum(1) ** 2).sum() / rows - (values**2).sum()
        alpha = float(min(1.0, max(error / (width * rows * spread), 0.0))) if spread > 0 else 1.0
    return float((1 - alpha) * ((means**2).sum(1) / ((1 - alpha) * values + alpha * mean)).sum())


def _spectrum(X: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The nonzero eigenvalues of X'X, and the coordinates (k, C) of y (N, C) along the left
    singular vectors of X.
    """
    if X.shape[1] <= X.shape[0]:
        values, vectors = np.linalg.eigh(X.T @ X)
        keep = values > _RELATIVE * max(values[-1], 1e-300)
        return values[keep], (vectors[:, keep].T @ (X.T @ y)) / np.sqrt(values[keep])[:, None]
    values, vectors = np.linalg.eigh(X @ X.T)
    keep = values > _RELATIVE * max(values[-1], 1e-300)
    return values[keep], vectors[:, keep].T @ y


def negative_conditional_entropy(source: Array, target: Array) -> float:
    """NCE: minus the entropy, in nats, of the target's class given the class that the pretrained
    network sees (Tran et al. 2019). source, target: (N,) integers. 0 is best; minus the target's
    own entropy where the source says nothing.
    """
    _, source = np.unique(source, return_inverse=True)
    _, target = np.unique(target, return_inverse=True)
    joint = np.zeros((source.max() + 1, target.max() + 1))
    np.add.at(joint, (source, target), 1 / len(target))
    given = joint / joint.sum(1, keepdims=True)
    return float((joint * np.log(np.where(joint > 0, given, 1))).sum())


def bayes_bounds(neighbour_error: float, classes: int) -> tuple[float, float]:
    """Bounds on the Bayes error of these features from the error of one nearest neighbour (Cover
    and Hart 1967).

    They hold for infinitely many rows. With few rows in many dimensions the neighbour is far away,
    its error is too large, and so is the lower bound: a head below it shows that.
    """
    most = (classes - 1) / classes
    error = min(max(neighbour_error, 0.0), most)
    return most * (1 - float(np.sqrt(max(1 - error / most, 0.0)))), error
