"""Parts of a prediction are used only as they were written."""

import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from headrace.pipelines.predict.parts import PartJob, _part_bytes, known_parts, read_part
from headrace.pipelines.predict.units import is_unit_table, write_unit_table


def test_a_damaged_part_is_predicted_again(tmp_path):
    """Whatever bit of it has changed: its images are not known, or its numbers are those that were
    written.
    """
    keys = tuple((f"photos/{number}.png", f"stamp {number}") for number in range(20))
    part = tmp_path / "part.parquet"
    job = PartJob("model", "digest", (), keys, str(part))
    numbers = np.random.default_rng(0).random((20, 2), np.float32)
    good = _part_bytes(job, numbers, numbers[:, 0], [None] * 20, np.zeros(20, np.bool_))
    model, draw, damaged = SimpleNamespace(digest="digest"), random.Random(0), 0
    part.write_bytes(good)
    assert known_parts(tmp_path, model, is_final=False) == {
        key: (part, row) for row, key in enumerate(keys)
    }
    for bit in [draw.randrange(8 * len(good)) for _ in range(200)]:
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        part.write_bytes(data)
        if known := known_parts(tmp_path, model, is_final=False):
            assert set(known) == set(keys)
            opened = read_part(part, 2)
            assert (opened.probabilities == numbers).all()
            assert (opened.weights == numbers[:, 0]).all()
        else:
            damaged += 1
    assert damaged > 190
    for data in (b"", good[:-1], good[: len(good) // 2]):
        part.write_bytes(data)
        assert known_parts(tmp_path, model, is_final=False) == {}


@pytest.mark.parametrize("table_format", ["csv", "parquet", "jsonl"])
def test_only_a_table_of_units_is_taken_for_one(tmp_path, table_format):
    """A table of somebody else's is not replaced, in whatever format."""
    path = tmp_path / f"p.units.{table_format}"
    for columns, is_ours in (("unit images class", True), ("patient age unit", False)):
        write_unit_table(pd.DataFrame({name: [1] for name in columns.split()}), path, table_format)
        assert is_unit_table(path) is is_ours
    path.write_bytes(b"PAR1 torn")
    assert not is_unit_table(path)
