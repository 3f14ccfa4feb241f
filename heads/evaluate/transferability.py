"""How well features suit a task, without training: LogME, H-score, NCE, Bayes error.

N rows, D features, C classes (or labels, or regression targets), k = min(N, D). One
eigendecomposition of the smaller of X'X and XX' serves all classes.
"""

import numpy as np

from headrace.heads.arrays import Array, Doubles

_MAX_ITERATIONS = 100  # of LogME's fixed point
_MIN_EIGENVALUE = 1e-10  # relative to the largest one; smaller ones are rounding errors


def log_me(X: Array, targets: Array) -> float:
    """Return LogME (You et al. 2021, Algorithm 3), the mean over targets.

    It is the maximum log evidence per row of a Bayesian linear model.

    X: (N, D). targets: (N, C), one column per class (0/1), label or regression target. Higher is
    better; values are comparable between features of the same rows and targets.
    """
    X, y = np.asarray(X, np.float64), np.asarray(targets, np.float64).reshape(len(X), -1)
    eigenvalues, projected_targets = _spectrum(X, y)
    n_rows = len(X)
    explained = projected_targets**2  # (k, C) squared coordinates of the targets
    unexplained = np.maximum((y**2).sum(0) - explained.sum(0), 0)
    alpha_by_beta = np.ones(y.shape[1])  # alpha / beta, for each target
    alpha = beta = weight_squares = residual = alpha_by_beta
    for _ in range(_MAX_ITERATIONS):
        shrinkage = eigenvalues[:, None] / (eigenvalues[:, None] + alpha_by_beta)
        gamma = shrinkage.sum(0)
        weight_squares = (shrinkage**2 * explained / eigenvalues[:, None]).sum(0)
        residual = ((1 - shrinkage) ** 2 * explained).sum(0) + unexplained
        # 1e-5 as in the authors' code: a target that is fitted exactly would divide by zero.
        alpha, beta = gamma / (weight_squares + 1e-5), (n_rows - gamma) / (residual + 1e-5)
        previous_ratio, alpha_by_beta = alpha_by_beta, alpha / beta
        if np.all(np.abs(alpha_by_beta - previous_ratio) <= 1e-3 * previous_ratio):
            break
    evidence = 0.5 * (
        len(eigenvalues) * np.log(alpha)
        - np.log(alpha + beta * eigenvalues[:, None]).sum(0)
        + n_rows * np.log(beta)
        - beta * residual
        - alpha * weight_squares
        - n_rows * np.log(2 * np.pi)
    )
    return float((evidence / n_rows).mean())


def h_score(X: Array, target: Array, *, shrink: bool = True) -> float:
    """Return the H-score (Bao et al. 2019), tr(cov(f)^-1 cov(E[f | class])), between 0 and C - 1.

    X: (N, D); target: (N,) classes. shrink: shrink the covariance by Ledoit and Wolf's method, as
    Ibrahim et al. 2022 do; without it the score is meaningless for D near N. Higher is better.
    """
    X = np.asarray(X, np.float64)
    X = X - X.mean(0)
    n_rows, n_features = X.shape
    class_counts = np.bincount(target)
    class_indicators = (
        np.eye(len(class_counts))[target][:, class_counts > 0].T
        / np.sqrt(n_rows * class_counts[class_counts > 0])[:, None]
    )
    eigenvalues, projected_indicators = _spectrum(X, class_indicators.T)
    # Class means along the eigenvectors, weighted by the root of the class's share. With X = U S
    # V', X' a along V is (U' a) s for each column a of indicators.
    class_means = projected_indicators * np.sqrt(eigenvalues)[:, None]
    eigenvalues = eigenvalues / n_rows
    shrinkage, mean_eigenvalue = 0.0, eigenvalues.sum() / n_features
    if shrink:
        eigenvalue_spread = (eigenvalues**2).sum() / n_features - mean_eigenvalue**2
        sampling_error = ((X**2).sum(1) ** 2).sum() / n_rows - (eigenvalues**2).sum()
        shrinkage = 1.0
        if eigenvalue_spread > 0:
            share = sampling_error / (n_features * n_rows * eigenvalue_spread)
            shrinkage = float(min(1.0, max(share, 0.0)))
    shrunk = (1 - shrinkage) * eigenvalues + shrinkage * mean_eigenvalue
    return float((1 - shrinkage) * ((class_means**2).sum(1) / shrunk).sum())


def _spectrum(X: Doubles, y: Doubles) -> tuple[Doubles, Doubles]:
    """Return the nonzero eigenvalues of X'X, (k,), and the coordinates (k, C) of y (N, C) in the
    left singular vectors of X.
    """
    is_tall = X.shape[1] <= X.shape[0]
    eigenvalues, eigenvectors = np.linalg.eigh(X.T @ X if is_tall else X @ X.T)
    is_nonzero = eigenvalues > _MIN_EIGENVALUE * max(eigenvalues[-1], 1e-300)
    eigenvalues, eigenvectors = eigenvalues[is_nonzero], eigenvectors[:, is_nonzero]
    if is_tall:  # U = X V / s
        return eigenvalues, (eigenvectors.T @ (X.T @ y)) / np.sqrt(eigenvalues)[:, None]
    return eigenvalues, eigenvectors.T @ y


def negative_conditional_entropy(source: Array, target: Array) -> float:
    """Return NCE: minus the entropy, in nats, of the target's class given the class that the
    pretrained network predicts (Tran et al. 2019).

    source, target: (N,) integers, the predicted and the true classes. At best 0; minus the entropy
    of the target if the source says nothing about it.
    """
    _, source = np.unique(source, return_inverse=True)
    _, target = np.unique(target, return_inverse=True)
    joint_probability = np.zeros((source.max() + 1, target.max() + 1))
    np.add.at(joint_probability, (source, target), 1 / len(target))
    conditional_probability = joint_probability / joint_probability.sum(1, keepdims=True)
    log_conditional = np.log(np.where(joint_probability > 0, conditional_probability, 1))
    return float((joint_probability * log_conditional).sum())


def bayes_bounds(neighbor_error: float, n_classes: int) -> tuple[float, float]:
    """Return (lower, upper) bounds on the Bayes error from the error of the nearest neighbour
    (Cover and Hart 1967).

    They hold for infinitely many rows. With few rows in many dimensions the nearest neighbour is
    far away and its error too large, so the lower bound is too high: a head may be better.
    """
    guess_error = (n_classes - 1) / n_classes
    bounded_error = min(max(neighbor_error, 0.0), guess_error)
    root = float(np.sqrt(max(1 - bounded_error / guess_error, 0.0)))
    return guess_error * (1 - root), bounded_error
