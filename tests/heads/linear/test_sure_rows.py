"""Rows that a head is all but sure of: what is left of their loss is small, and has its digits all
the same.
"""

import numpy as np
import pytest
from support.linear import relative_gap

from headrace.heads.data.task import TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.linear.logistic import fit_logistic_bank
from headrace.heads.linear.solver.compiled_blocks import (
    CompiledPass,
    aligned_rows,
    load_compiled_kernels,
)
from headrace.heads.linear.solver.design import DesignMatrix, RowBlock
from headrace.heads.linear.solver.passes import NumpyPass, RowWeighting
from headrace.heads.linear.solver.rotation import Rotation
from headrace.heads.linear.solver.torch_blocks import DeviceBlocks, DevicePass

WAYS = [
    "plain",
    "torch",
    pytest.param(
        "compiled",
        marks=pytest.mark.skipif(
            load_compiled_kernels() is None, reason="no C compiler built the pass"
        ),
    ),
]


def passed(way, block, classes, u):
    """Loss and gradient of one head's decisions u (c,) on the block's row, which is a one."""
    one = np.ones(1)
    design = DesignMatrix([block], np.dtype(np.float32), Rotation(np.eye(1)), one, one, {}, 1.0)
    weighting = RowWeighting(
        classes,
        np.ones((1, max(classes, 2)), np.float32),
        np.array([-1 if classes > 1 else 0]),
        False,
    )
    heads, path_index = np.asarray(u, np.float32).reshape(1, -1, 1), np.array([0])
    if way == "compiled":
        library = load_compiled_kernels()
        assert library is not None
        run = CompiledPass(design, weighting, path_index, heads, {block.folds: path_index}, library)
    elif way == "torch":
        blocks = DeviceBlocks(design, classes, "cpu")
        run = DevicePass(blocks, weighting, path_index, heads, {block.folds: path_index})
    else:
        run = NumpyPass(design, weighting, path_index, heads, {block.folds: path_index})
    run.add(block)
    return float(run.losses()[0]), run.gradient()[0, :, 0]


def row(label, classes):
    values = aligned_rows(1, 1, np.float32)
    values[:] = 1
    class_offsets = np.searchsorted([label], np.arange(max(classes, 2) + 1))
    return RowBlock(
        (0,),
        np.arange(1),
        values,
        class_offsets,
        np.full((1, 1), label, np.float32),
        None,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("z", [-30.0, -8.0, -1.0, 0.0, 1.0, 8.0, 14.0, 30.0])
def test_a_sigmoids_loss_and_residual_have_all_their_digits(way, label, z):
    loss, gradient = passed(way, row(label, 1), 1, [z])
    towards = -z if label else z  # the wrong label
    assert loss == pytest.approx(np.logaddexp(0, towards), rel=1e-6)
    assert gradient[0] == pytest.approx((-1 if label else 1) / (1 + np.exp(-towards)), rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("z", [(0.0, 0.0), (9.0, -4.0), (-7.0, 20.0), (-12.0, -13.0), (25.0, -1.0)])
def test_a_softmaxs_loss_and_residual_have_all_their_digits(way, label, z):
    loss, gradient = passed(way, row(label, 3), 3, z)
    every = np.array([*z, -sum(z)])
    p = np.exp(every - every.max())
    p /= p.sum()
    others = p[np.arange(3) != label].sum()
    assert loss == pytest.approx(np.log1p(others / p[label]), rel=2e-6)
    expected = np.where(np.arange(3) == label, -others, p)[:2]
    np.testing.assert_allclose(gradient, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("n", "d", "classes", "C", "gap", "seed"),
    [
        (42, 90, 3, 300.0, 1e-7, 1),
        (42, 90, 3, 3000.0, 1e-7, 0),
        (60, 300, 4, 1e3, 1e-6, 0),
        (40, 300, 2, 100.0, 1e-8, 0),
    ],
)
def test_separable_rows_reach_the_gap_asked_for(n, d, classes, C, gap, seed):
    """And soon: with losses of rounding alone these heads took hundreds of iterations and ended
    twelve times too far away.
    """
    rng = np.random.default_rng(seed)
    X, y = rng.standard_normal((n, d)), rng.integers(0, classes, n)
    X[:, :3] += rng.standard_normal((classes, 3))[y]
    X = X.astype(np.float32)
    fold = np.full(n, TRAIN_ONLY)
    (fit,) = fit_logistic_bank(TrainingData(X, y, fold, classes), [LogisticSpec(C)], gap=gap)
    assert relative_gap(fit, X, y) < 3 * gap
    assert fit.iterations < 60
