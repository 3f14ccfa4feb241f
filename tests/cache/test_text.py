"""Text as it is compared: what other programs do to ids and labels on the way, and what must not be
done to them.
"""

import decimal
import os
import time
import unicodedata

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from headrace.cache.count_text import count_text
from headrace.cache.text import as_numbers, as_text, load_json, normalize_text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def texts_of(values, dtype=None):
    return [None if pd.isna(value) else value for value in as_text(pd.Series(values, dtype=dtype))]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (["007", "1e5", "1.0", "0x1F", "1_000"], None, ["007", "1e5", "1.0", "0x1F", "1_000"]),
        (["None", "NA", "nan", "null", ""], None, ["None", "NA", "nan", "null", ""]),
        (["None", "NA", "nan", "null", ""], object, ["None", "NA", "nan", "null", ""]),
        ([" a ", "b\t", "\u00a0c\u3000", "a  b"], None, ["a", "b", "c", "a  b"]),
        (["e\u0301.png", "\u00e9.png"], None, ["\u00e9.png", "\u00e9.png"]),
        ([b"caf\xc3\xa9 ", b"001"], object, ["caf\u00e9", "001"]),
        ([np.bytes_(b"7"), np.str_("8 ")], object, ["7", "8"]),
        ([1, 0, -3, 2**62], None, ["1", "0", "-3", str(2**62)]),
        ([2**64 - 1], "uint64", [str(2**64 - 1)]),
        ([2**70, -(2**70)], object, [str(2**70), str(-(2**70))]),
        ([1.0, float("nan"), -0.0, 0.1, 1e300], None, ["1", None, "0", "0.1", str(int(1e300))]),
        ([0.1, 3.0], "float32", ["0.1", "3"]),
        ([float("inf"), float("-inf"), 1e-7], None, ["inf", "-inf", "1e-07"]),
        ([1, None, 3], "Int64", ["1", None, "3"]),
        ([1.5, None, 3.0], "Float64", ["1.5", None, "3"]),
        ([True, False], None, ["True", "False"]),
        ([True, None], "boolean", ["True", None]),
        (
            [True, 1, 1.0, "1", None, float("nan"), pd.NA, pd.NaT],
            object,
            ["True", *["1"] * 3, *[None] * 4],
        ),
        ([" b", "a", None, "a"], "category", ["b", "a", None, "a"]),
        ([3.0, None, 3.0], "category", ["3", None, "3"]),
        (
            [np.float32(0.1), np.float64(2), np.int8(5), np.bool_(True)],
            object,
            ["0.1", "2", "5", "True"],
        ),
        ([decimal.Decimal("1.50")], object, ["1.50"]),
        ([b"a ", None], pd.ArrowDtype(pa.binary()), ["a", None]),
        (["a ", None], pd.ArrowDtype(pa.string()), ["a", None]),
        (pd.to_datetime(["2024-01-02", None]), None, ["2024-01-02 00:00:00", None]),
        ([], None, []),
        ([], "float64", []),
    ],
)
def test_every_dtype_has_one_written_form(values, dtype, expected):
    assert texts_of(values, dtype) == expected


def test_index_name_and_dtype_stay():
    column = as_text(pd.Series([1, 2], index=[7, 3], name="id"))
    assert column.index.tolist() == [7, 3]
    assert column.name == "id"
    assert column.dtype == "str"
    assert column.loc[3] == "2"


def test_a_file_name_that_is_no_utf8_keeps_its_bytes():
    name = os.fsdecode(b"caf\xe9.png")
    column = as_text(pd.Series([name, "b", None], dtype=object))
    assert os.fsencode(column[0]) == b"caf\xe9.png"
    assert column.isna().tolist() == [False, False, True]
    assert as_text(column).tolist()[:2] == [name, "b"]
    assert as_text(pd.Series([b"caf\xe9.png"], dtype=object))[0] == name


@given(TEXTS)
def test_a_normal_text_is_its_own_normal_text(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert once == once.strip()
    assert unicodedata.is_normalized("NFC", once)


@given(TEXTS)
def test_how_accents_are_composed_and_what_surrounds_a_text_do_not_matter(text):
    expected = normalize_text(text)
    assert normalize_text(f"\t {unicodedata.normalize('NFD', text.strip())}\n") == expected
    assert texts_of([f"{text} ", text.encode()], object) == [expected, expected]


@given(
    st.lists(
        st.one_of(st.none(), TEXTS, st.integers(), st.floats(), st.booleans(), st.binary()),
        max_size=8,
    )
)
def test_text_of_text_is_the_same_text_and_missing_values_stay_missing(values):
    column = pd.Series(values, dtype=object)
    once = as_text(column)
    assert once.isna().tolist() == column.isna().tolist()
    pd.testing.assert_series_equal(as_text(once), once)


@given(st.lists(st.integers(-(2**53), 2**53)))
def test_integers_that_became_floats_are_the_integers(numbers):
    expected = [str(unit_number) for unit_number in numbers]
    assert (
        texts_of(numbers, "int64")
        == texts_of(numbers, "float64")
        == texts_of(numbers, object)
        == expected
    )


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_a_float_is_read_back_from_its_text(numbers):
    assert [float(text) for text in texts_of(numbers, "float64")] == numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda n: [f"folder/{i:07}.png" for i in range(n)], range, lambda n: np.arange(n) / 2]
)
def test_a_million_rows_take_seconds_at_most(make):
    column = pd.Series(make(1_000_000))
    started = time.perf_counter()
    as_text(column)
    assert time.perf_counter() - started < 8  # about one on a quiet machine


def test_half_a_character_in_json_is_no_text():
    """No file can hold it; two halves are a character, and what stands for a byte may be let in."""
    assert load_json(r'{"label": "\ud83d\ude00 \\u00fc"}') == {"label": "\U0001f600 \\u00fc"}
    for text in (r'["\ud800"]', r'{"\uDFFF": 1}', r'"\udcff"'):
        with pytest.raises(ValueError, match="surrogates"):
            load_json(text)
    assert load_json(r'"\udcff"', errors="surrogateescape") == os.fsdecode(b"\xff")
    with pytest.raises(ValueError, match="surrogates"):
        load_json(r'"\ud800"', errors="surrogateescape")


def test_one_is_counted_in_the_singular() -> None:
    """A count agrees with its noun and its verb; thousands are grouped."""
    assert [count_text(count, "image") for count in (0, 1, 2, 1200)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,200 images",
    ]
    assert count_text(1, "class has", "classes have") == "1 class has"
    assert count_text(3, "class has", "classes have") == "3 classes have"


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["3,5", "4", None, "", "-0,25"], [3.5, 4, None, None, -0.25]),
        (["3.5", "\u22121e3", "nan"], [3.5, -1000, None]),
        (["1,500", "2,250"], [None, None]),  # thousands, in English
        (["1,500", "2,25"], [1.5, 2.25]),
        (["3,5", "4.5"], [None, 4.5]),
        (["3,5", "x"], [None, None]),
        (["1,2,3", "4,5"], [None, None]),
        ([1, 2.5, None], [1, 2.5, None]),
    ],
)
def test_decimal_commas_are_read_where_they_can_be_nothing_else(texts, numbers):
    expected = np.array(numbers, np.float64)
    np.testing.assert_array_equal(as_numbers(pd.Series(texts, dtype=object)), expected)
