"""The compiled pass over a row block is the plain one: same losses, same gradients, for any shape, label
and weight.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.linear.logistic import fit_logistic_bank
from headrace.heads.linear.solver import (
    bank_problem,
    design as design_module,
)
from headrace.heads.linear.solver.compiled_blocks import (
    CompiledPass,
    aligned_rows,
    load_compiled_kernels,
)
from headrace.heads.linear.solver.design import DesignMatrix, RowBlock
from headrace.heads.linear.solver.passes import NumpyPass, RowWeighting
from headrace.heads.linear.solver.rotation import Rotation

needs_compiler = pytest.mark.skipif(
    load_compiled_kernels() is None, reason="no C compiler built the pass, or no AVX2 to run it"
)


def random_block(
    rng: np.random.Generator, n: int, width: int, classes: int, *, weighted: bool
) -> tuple[DesignMatrix, RowBlock]:
    """One block of random rows, sorted by class, some classes perhaps without any; two labels for
    sigmoids.
    """
    values = aligned_rows(n, width, np.float32)
    values[:] = rng.standard_normal((n, width))
    values[:, -1] = 1
    class_offsets = np.searchsorted(np.sort(rng.integers(0, classes, n)), np.arange(classes + 1))
    labels = rng.integers(0, 2, (2, n)).astype(np.float32)
    weight = rng.uniform(0, 3, n).astype(np.float32) if weighted else None
    block = RowBlock((1,), np.arange(n), values, class_offsets, labels, weight)
    rotation = Rotation(np.eye(width - 1, dtype=np.float32))
    empty = np.zeros(width - 1)
    design = DesignMatrix([block], np.dtype(np.float32), rotation, empty, empty + 1, {}, 1.0)
    return design, block


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    n=st.integers(1, 150),
    width=st.sampled_from([2, 3, 7, 16, 65, 513, 1030]),
    classes=st.sampled_from([1, 3, 4, 10, 17, 40]),
    heads=st.integers(1, 7),
    size=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    weighted=st.booleans(),
    balanced=st.booleans(),
    threads=st.sampled_from([1, 3]),
)
def test_a_compiled_pass_is_the_plain_one(
    seed, n, width, classes, heads, size, weighted, balanced, threads
):
    """Losses to 1e-5 and gradients to 1e-5 of their largest element, against the plain pass in
    float64; more where decisions are of the order of hundreds, which float32 rounds to 1e-5.
    """
    rng = np.random.default_rng(seed)
    design, block = random_block(rng, n, width, max(classes, 2), weighted=weighted)
    columns = max(classes - 1, 1)
    u = (size * rng.standard_normal((heads, columns, width)) / np.sqrt(width)).astype(np.float32)
    class_factors = np.ones((2, max(classes, 2)), np.float32)
    if balanced:
        class_factors = rng.uniform(0.1, 4, class_factors.shape).astype(np.float32)
    path_index = rng.integers(0, 2, heads)
    weighting = RowWeighting(
        classes, class_factors, np.array([-1, -1] if classes > 1 else [0, 1]), weighted or balanced
    )
    library = load_compiled_kernels()
    assert library is not None
    heads_by_folds = {block.folds: np.arange(heads)}
    with ThreadPoolExecutor(threads) as pool:
        quick = CompiledPass(
            design,
            weighting,
            path_index,
            u,
            heads_by_folds,
            library,
            pool if threads > 1 else None,
            threads,
        )
        plain = NumpyPass(design, weighting, path_index, u.astype(np.float64), heads_by_folds)
        for run in (quick, quick, plain, plain):
            run.add(block)
    np.testing.assert_allclose(
        quick.losses(), plain.losses(), rtol=1e-5, atol=1e-5 * n * (1 + size)
    )
    gradient = plain.gradient()
    atol = (1e-5 + 4e-6 * size) * np.abs(gradient).max() + 1e-5
    np.testing.assert_allclose(quick.gradient(), gradient, rtol=0, atol=atol)


@needs_compiler
@pytest.mark.parametrize("left_out", [0, 5])
def test_every_half_is_widened_exactly(left_out):
    """Subnormals and both zeros, too; the last ones are fewer than a vector."""
    library = load_compiled_kernels()
    assert library is not None
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    rows = np.stack([every[np.isfinite(every)]] * 2)[:, : 63488 - left_out].copy()
    centre = np.random.default_rng(0).standard_normal(rows.shape[1]).astype(np.float32)
    for vector_length in {library.vector_length, min(library.vector_length, 8)}:
        out = aligned_rows(2, rows.shape[1] + 1, np.float32)
        dataclasses.replace(library, vector_length=vector_length).subtract_mean_from_float16(
            rows, centre, out[:, :-1]
        )
        assert np.array_equal(out[:, :-1], rows.astype(np.float32) - centre)
        assert (out[:, -1] == 0).all()


@needs_compiler
@pytest.mark.parametrize("classes", [1, 2, 3, 6, 10])
@pytest.mark.parametrize("heads", range(1, 8))
def test_shorter_vectors_give_the_same(classes, heads):
    """A processor that has long vectors has the shorter ones, too: their panels and path_index divide
    the columns otherwise.
    """
    long = load_compiled_kernels()
    if long is None or long.vector_length != 16:
        pytest.skip("this processor has one length of vectors")
    rng = np.random.default_rng(heads)
    columns = heads * max(classes - 1, 1)
    rows = aligned_rows(101, 531, np.float32)
    rows[:] = rng.standard_normal((101, 531)) / 20
    weights = rng.standard_normal((columns, 531)).astype(np.float32)
    labels = rng.integers(0, max(classes, 2), (heads, 101) if classes == 1 else 101).astype(
        np.int32
    )
    found = []
    for one in (long, dataclasses.replace(long, vector_length=8)):
        losses, gradients = np.zeros(heads), one.allocate_packed(columns, 531)
        one.add_losses_and_gradients(
            rows, heads, classes, one.pack(weights), labels, None, None, losses, gradients
        )
        flat = np.empty((columns, 531), np.float32)
        one.unpack(gradients, flat)
        found.append((losses, flat))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-5 * np.abs(found[0][1]).max())


@needs_compiler
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_overflowed_have_no_finite_loss(bad):
    """A line search that went too far must see it."""
    design, block = random_block(np.random.default_rng(0), 60, 20, 5, weighted=False)
    u = np.zeros((1, 4, 20), np.float32)
    u[0, 2, 3] = bad
    weighting = RowWeighting(5, np.ones((1, 5), np.float32), np.array([-1]), False)
    library = load_compiled_kernels()
    assert library is not None
    one = np.array([0])
    run = CompiledPass(design, weighting, one, u, {block.folds: one}, library)
    run.add(block)
    assert not np.isfinite(run.losses()).any()


@needs_compiler
@pytest.mark.parametrize("multi", [False, True])
def test_a_bank_is_the_same_without_a_compiler(monkeypatch, multi):
    """Objectives agree to the gap that was asked for, and so do the predictions to what that leaves
    open.
    """
    rng = np.random.default_rng(5)
    X = rng.standard_normal((300, 40)).astype(np.float32) @ rng.standard_normal((40, 40)).astype(
        np.float32
    )
    target = (
        (X[:, :3] > 0).astype(np.int64) if multi else np.digitize(X[:, 0] + X[:, 1], [-5, 0, 5])
    )
    n_outputs, task_kind = (3, "multi") if multi else (4, "single")
    data = TrainingData(X, target, np.arange(300) % 3, n_outputs, task_kind)
    specs = [LogisticSpec(C) for C in (0.01, 0.1, 1.0)] + [
        LogisticSpec(0.1, class_weight="balanced")
    ]
    quick = fit_logistic_bank(data, specs, gap=1e-6)
    for module in (bank_problem, design_module):
        monkeypatch.setattr(module, "load_compiled_kernels", lambda: None)
    plain = fit_logistic_bank(data, specs, gap=1e-6)
    for one, other in zip(quick, plain, strict=True):
        assert one.objective == pytest.approx(other.objective, rel=1e-5)
        if one.validation is not None:
            np.testing.assert_allclose(one.validation, other.validation, atol=5e-3)
