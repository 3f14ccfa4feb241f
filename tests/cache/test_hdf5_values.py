"""Values of HDF5 files of others: text of any length is read by a process of its own."""

import h5py
import numpy as np
import pytest

from headrace.cache.format import hdf5_values
from headrace.cache.format.hdf5_values import read_values

NAMES = ["a", "Ünïcode", "", "x" * 5000, "tab\tline\n"]


@pytest.fixture
def names_file(tmp_path):
    with h5py.File(tmp_path / "names.h5", "w") as file:
        file["group/names"] = np.array(NAMES, dtype=h5py.string_dtype())
        file["numbers"] = [[1.5, 2], [3, 4]]
        file.create_dataset("lists", 3, h5py.vlen_dtype(int))
    return tmp_path / "names.h5"


def test_text_of_any_length_is_what_the_library_reads(names_file):
    """So are numbers, which this process reads itself."""
    with h5py.File(names_file, "r") as file:
        values = read_values(names_file, file["group/names"])
        assert values.shape == (5,)
        assert values.tolist() == file["group/names"][()].tolist()
        assert values.tolist() == [name.encode() for name in NAMES]
        assert read_values(names_file, file["numbers"]).tolist() == [[1.5, 2], [3, 4]]


def test_a_crash_of_the_library_is_an_error(names_file, monkeypatch):
    """A damaged file had it happen; this process goes on."""
    monkeypatch.setattr(hdf5_values, "_PROGRAM", "import os; os.abort()")
    with (
        h5py.File(names_file, "r") as file,
        pytest.raises(ValueError, match="crashed at the text of '/group/names'"),
    ):
        read_values(names_file, file["group/names"])


def test_lists_of_any_length_are_not_read(names_file):
    """What a damaged file refers to may be anywhere."""
    with h5py.File(names_file, "r") as file, pytest.raises(ValueError, match="that are no text"):
        read_values(names_file, file["lists"])
