"""The compiled pass over a tile is the plain one: same losses, same gradients, for any shape, label
and weight.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.heads.linear.logistic import fit_logistic_bank
from headrace.heads.linear.solver import active_set as flight
from headrace.heads.linear.solver import design as design_module
from headrace.heads.linear.solver import passes
from headrace.heads.linear.solver.compiled_blocks import aligned_rows, compiled
from headrace.heads.linear.solver.design import Design, Tile
from headrace.heads.linear.solver.passes import CompiledPass, PlainPass, Weighting
from headrace.heads.linear.solver.rotation import Rotation
from headrace.heads.spec import LogisticSpec

needs_compiler = pytest.mark.skipif(
    compiled() is None, reason="no C compiler built the pass, or no AVX2 to run it"
)


def made(
    rng: np.random.Generator, n: int, width: int, classes: int, *, weighted: bool
) -> tuple[Design, Tile]:
    """One tile of random rows, sorted by class, some classes perhaps without any; two labels for
    sigmoids.
    """
    values = aligned_rows(n, width, np.float32)
    values[:] = rng.standard_normal((n, width))
    values[:, -1] = 1
    bounds = np.searchsorted(np.sort(rng.integers(0, classes, n)), np.arange(classes + 1))
    labels = rng.integers(0, 2, (2, n)).astype(np.float32)
    weight = rng.uniform(0, 3, n).astype(np.float32) if weighted else None
    tile = Tile((1,), np.arange(n), values, values.T, bounds, labels, weight)
    rotation = Rotation(np.eye(width - 1, dtype=np.float32))
    empty = np.zeros(width - 1)
    return Design([tile], np.dtype(np.float32), rotation, empty, empty + 1, {}, {}, 1.0), tile


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
    near=st.sampled_from([1, 100_000, passes.NEAR_BYTES]),
)
def test_a_compiled_pass_is_the_plain_one(
    seed, n, width, classes, heads, size, weighted, balanced, threads, near
):
    """Losses to 1e-5 and gradients to 1e-5 of their largest element, against the plain pass in
    float64; more where decisions are of the order of hundreds, which float32 rounds to 1e-5.
    """
    rng = np.random.default_rng(seed)
    design, tile = made(rng, n, width, max(classes, 2), weighted=weighted)
    columns = max(classes - 1, 1)
    u = (size * rng.standard_normal((heads, columns, width)) / np.sqrt(width)).astype(np.float32)
    multipliers = np.ones((2, max(classes, 2)), np.float32)
    if balanced:
        multipliers = rng.uniform(0.1, 4, multipliers.shape).astype(np.float32)
    lines = rng.integers(0, 2, heads)
    weighting = Weighting(
        classes, multipliers, np.array([-1, -1] if classes > 1 else [0, 1]), weighted or balanced
    )
    library = compiled()
    assert library is not None
    seen = {tile.folds: np.arange(heads)}
    with ThreadPoolExecutor(threads) as pool, mock.patch.object(passes, "NEAR_BYTES", near):
        quick = CompiledPass(
            design, weighting, lines, u, seen, library, pool if threads > 1 else None, threads
        )
        losses = quick.add(tile) + quick.add(tile)
    plain = PlainPass(design, weighting, lines, u.astype(np.float64), seen, None)
    expected = plain.add(tile) + plain.add(tile)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5 * n * (1 + size))
    gradient = plain.gradient()
    atol = (1e-5 + 4e-6 * size) * np.abs(gradient).max() + 1e-5
    np.testing.assert_allclose(quick.gradient(), gradient, rtol=0, atol=atol)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    n=st.integers(1, 150),
    width=st.sampled_from([1, 2, 16, 65, 513, 1030]),
    columns=st.integers(1, 75),
)
def test_products_are_the_plain_ones(seed, n, width, columns):
    """weights rows' and rows' diag(scale) rows weights, to 1e-6 of the largest sum of absolute
    values (sums themselves cancel); the columns end in panels of every width.
    """
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((columns, width)).astype(np.float32)
    rows = aligned_rows(n, width, np.float32)
    rows[:] = rng.standard_normal((n, width))
    scale = rng.uniform(0, 2, (n, columns)).astype(np.float32)
    library = compiled()
    assert library is not None
    product = rows.astype(np.float64) @ weights.T
    size = np.abs(rows) @ np.abs(weights.T)
    np.testing.assert_allclose(
        library.multiplied(weights, rows), product.T, rtol=0, atol=1e-6 * size.max()
    )
    twice = ((size * scale).T @ np.abs(rows)).max()
    np.testing.assert_allclose(
        library.scaled(rows, weights, scale), (product * scale).T @ rows, rtol=0, atol=1e-6 * twice
    )


@needs_compiler
@pytest.mark.parametrize("left_out", [0, 5])
def test_every_half_is_widened_exactly(left_out):
    """Subnormals and both zeros, too; the last ones are fewer than a vector."""
    library = compiled()
    assert library is not None
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    rows = np.stack([every[np.isfinite(every)]] * 2)[:, : 63488 - left_out].copy()
    centre = np.random.default_rng(0).standard_normal(rows.shape[1]).astype(np.float32)
    for lanes in {library.lanes, min(library.lanes, 8)}:
        out = aligned_rows(2, rows.shape[1] + 1, np.float32)
        dataclasses.replace(library, lanes=lanes).centred(rows, centre, out[:, :-1])
        assert np.array_equal(out[:, :-1], rows.astype(np.float32) - centre)
        assert (out[:, -1] == 0).all()


@needs_compiler
@pytest.mark.parametrize("classes", [1, 2, 3, 6, 10])
@pytest.mark.parametrize("heads", range(1, 8))
def test_shorter_vectors_give_the_same(classes, heads):
    """A processor that has long vectors has the shorter ones, too: their panels and lines divide
    the columns otherwise.
    """
    long = compiled()
    if long is None or long.lanes != 16:
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
    for one in (long, dataclasses.replace(long, lanes=8)):
        losses, gradients = np.zeros(heads), one.room(columns, 531)
        one.run(rows, heads, classes, one.packed(weights), labels, None, None, losses, gradients)
        flat = np.empty((columns, 531), np.float32)
        one.unpack(gradients, flat)
        found.append((losses, flat))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-5 * np.abs(found[0][1]).max())


@needs_compiler
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_overflowed_have_no_finite_loss(bad):
    """A line search that went too far must see it."""
    design, tile = made(np.random.default_rng(0), 60, 20, 5, weighted=False)
    u = np.zeros((1, 4, 20), np.float32)
    u[0, 2, 3] = bad
    weighting = Weighting(5, np.ones((1, 5), np.float32), np.array([-1]), False)
    library = compiled()
    assert library is not None
    one = np.array([0])
    assert not np.isfinite(
        CompiledPass(design, weighting, one, u, {tile.folds: one}, library).add(tile)
    ).any()


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
    options = {"n_classes": 3 if multi else 4, "fold": np.arange(300) % 3, "gap": 1e-6}
    specs = [LogisticSpec(C) for C in (0.01, 0.1, 1.0)] + [
        LogisticSpec(0.1, class_weight="balanced")
    ]
    quick = fit_logistic_bank(X, target, specs=specs, **options)
    for module in (flight, design_module):
        monkeypatch.setattr(module, "compiled", lambda: None)
    plain = fit_logistic_bank(X, target, specs=specs, **options)
    for one, other in zip(quick, plain, strict=True):
        assert one.objective == pytest.approx(other.objective, rel=1e-5)
        if one.validation is not None:
            np.testing.assert_allclose(one.validation, other.validation, atol=5e-3)
