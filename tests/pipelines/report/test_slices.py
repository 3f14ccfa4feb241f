"""Slices: counts and intervals by hand, and what is no slice."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from headrace.heads.evaluate.intervals import proportion_interval
from headrace.pipelines.report.images import slices
from headrace.pipelines.report.images.slices import slices_section
from headrace.pipelines.report.judged import JudgedSide

N = 400


@pytest.fixture
def made(monkeypatch):
    """A section of 400 images, of which those of one camera are mostly wrong."""
    rng = np.random.default_rng(0)
    camera = np.array(["old", "new", "new", "new"] * (N // 4))
    wrong = rng.random(N) < np.where(camera == "old", 0.5, 0.05)
    target = rng.integers(0, 2, N)
    predicted = np.eye(2)[np.where(wrong, 1 - target, target)]
    ids = np.array([f"i{n}" for n in range(N)])
    columns = pd.DataFrame(
        {
            "camera": camera,
            "light": rng.normal(size=N),
            "name": ids,
            "rare": np.where(np.arange(N) < 3, "x", "y"),
        },
        index=ids,
    )
    monkeypatch.setattr(slices, "user_columns", lambda run: columns)
    side = JudgedSide("validation", ids, ids, target, predicted, np.arange(N))
    task = SimpleNamespace(unit=None)
    run = SimpleNamespace(images=object(), task_kind="single", recipe=SimpleNamespace(task=task))
    section = slices_section(run, (side,), pd.DataFrame(index=ids))
    return section, camera, ~wrong


def test_a_slice_has_its_own_accuracy_and_interval(made):
    """The interval is the exact one of heads/evaluate."""
    section, camera, right = made
    frame = section.blocks[-1].frame.set_index(["column", "value"])
    for word in ("old", "new"):
        row, hits = frame.loc[("camera", word)], right[camera == word]
        assert (row["images"], row["value_mean"]) == (len(hits), hits.mean())
        assert (row["low"], row["high"]) == proportion_interval(hits)
        assert row["overall"] == right.mean()


def test_the_bad_slice_is_named_first(made):
    """And it alone: quartiles of noise are not worse."""
    section, _, _ = made
    frame = section.blocks[-1].frame
    assert frame.loc[frame["verdict"] != "", "value"].tolist() == ["old"]
    assert (frame["column"][0], frame["value"][0]) == ("camera", "old")
    assert section.blocks[0].text.startswith("camera = old is worse than the others: accuracy")
    assert section.blocks[0].kind == "warning"


def test_numbers_are_cut_at_quartiles_and_names_are_no_slices(made):
    """Four parts of a hundred; a word of three images stands for nothing."""
    section, _, _ = made
    frame = section.blocks[-1].frame
    assert frame.loc[frame["column"] == "light", "images"].tolist() == [100] * 4
    assert set(frame["column"]) == {"camera", "light", "rare"}
    assert frame.loc[frame["column"] == "rare", "value"].tolist() == ["y"]
