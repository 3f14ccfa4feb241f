"""Data and reference figures for linear heads."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


def blobs(n, d, classes, seed, spread=1.0):
    """Overlapping classes, features of many scales and offsets, float32."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    X = spread * rng.standard_normal((n, d)) + rng.standard_normal((classes, d))[y]
    X = X * 10 ** rng.uniform(-2, 2, d) + rng.standard_normal(d)
    return X.astype(np.float32), y.astype(np.int64)


def folds(n, k, seed=0):
    return np.random.default_rng(seed).permutation(np.arange(n) % k).astype(np.int16)


def relative_gap(fit, X, y):
    """By which the head's objective lies above the optimum, both in float64 on
    standardized rows.
    """
    scaler = StandardScaler().fit(X.astype(float))
    Z = scaler.transform(X.astype(float))
    best = LogisticRegression(C=fit.spec.C, tol=1e-10, max_iter=20_000, solver="newton-cg").fit(
        Z, y
    )
    W, b = fit.arrays["weight"].astype(float), fit.arrays["bias"].astype(float)
    coefficients, intercepts = best.coef_, best.intercept_
    if len(W) == 2:
        W, b = W[1:] - W[:1], b[1:] - b[:1]

    def objective(W, b):
        decision = Z @ W.T + b
        if len(W) == 1:
            loss = np.logaddexp(0, np.where(y == 1, -1, 1) * decision[:, 0])
        else:
            loss = np.logaddexp.reduce(decision - decision[np.arange(len(y)), y][:, None], axis=1)
        return loss.sum() + (W**2).sum() / (2 * fit.spec.C)

    optimum = objective(coefficients, intercepts)
    return objective(W * scaler.scale_, b + W @ scaler.mean_) / optimum - 1
