"""One form of ids and labels from tables, arrays and other programs, so that they compare."""

import json
import re
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

# pandas' default holds text as UTF-8, which cannot hold file names that are not UTF-8 (Python
# writes their bytes as lone surrogates).
_ANY_TEXT = pd.StringDtype(storage="python", na_value=np.nan)


def normalize_text(text: str) -> str:
    """Strip white space and convert to the Unicode normal form NFC.

    Two programs that write one name differ in just these: macOS decomposes accents (NFD), and
    tables pad cells.
    """
    text = text.strip()
    # ASCII text is its own normal form, and the question costs a tenth of normalizing.
    return text if text.isascii() else unicodedata.normalize("NFC", text)


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # a JSON escape; a pair of them is a character


def load_json(text: str, *, errors: str = "strict", **options: Any) -> Any:
    r"""Parse JSON as `json.loads` does, and refuse text that UTF-8 cannot hold: a lone `\ud800`.

    errors: "strict", or "surrogateescape" to allow the surrogates that stand for a byte of a file's
    name.

    Raises ValueError.
    """
    value = json.loads(text, **options)
    # Encoding takes as long as parsing, so only texts with such an escape are encoded.
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode(errors=errors)
    return value


# Type inference would merge the labels `1.10` and `1.1` and lose `None`, so ids, labels and groups
# are compared as text; they become numbers only where the task is a regression.
def as_text(column: pd.Series) -> pd.Series:
    """Convert a column of any dtype to text, keeping its index, name and missing values.

    Text is normalized by `normalize_text`; `007`, `None`, `NA` and an empty cell are texts like
    others. Bytes are decoded as UTF-8. Integers are written with all their digits, floats that are
    integers as integers (a column of integers with a gap is read as floats), other floats in the
    fewest digits that give them back, booleans as `True` and `False`; everything else by `str`.
    Text that is not UTF-8 keeps its bytes as `os.fsdecode` does.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        category_texts = as_text(pd.Series(column.cat.categories)).astype(object).to_numpy()
        category_codes = column.cat.codes.to_numpy()
        texts = np.empty(len(column), object)
        # Code -1: missing.
        texts[category_codes >= 0] = category_texts[category_codes[category_codes >= 0]]
    elif isinstance(column.dtype, np.dtype) and column.dtype.kind in "iu":
        texts = column.to_numpy().astype(str).astype(object)
    elif isinstance(column.dtype, np.dtype) and column.dtype.kind == "f":
        texts = _float_texts(column.to_numpy())
    else:
        texts = np.empty(len(column), object)
        values = column.astype(object)
        is_present = values.notna().to_numpy()
        # Most values are strings; the branch saves a call for each of a million rows.
        texts[is_present] = [
            normalize_text(value) if type(value) is str else _value_text(value)
            for value in values.to_numpy()[is_present].tolist()
        ]
    return _text_series(texts, column)


# `1,234` may be a thousand and more in English, so that a column of such numbers alone is not read.
_COMMA_NUMBER, _THOUSANDS = r"[+-]?\d+(,\d+)?|(?i:nan)", r"[+-]?[1-9]\d{0,2},\d{3}"


def as_numbers(column: pd.Series) -> pd.Series:
    """Convert a column to float64, keeping its index and name; nan for what is no number.

    Decimals are written with a point, or all with a comma. U+2212, the minus sign of typesetters,
    is read too.
    """
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
        return column.astype(np.float64)
    texts = as_text(column).str.replace("\u2212", "-", regex=False)
    with_comma = texts[texts.str.contains(",", regex=False, na=False)]
    if (
        len(with_comma)
        and texts.dropna().str.fullmatch(f"{_COMMA_NUMBER}|").all()
        and not with_comma.str.fullmatch(_THOUSANDS).all()
    ):
        texts = texts.str.replace(",", ".", regex=False)
    return pd.to_numeric(texts, errors="coerce").astype(np.float64)


def _value_text(value: object) -> str:
    if isinstance(value, str):
        return normalize_text(str(value))
    if isinstance(value, bytes):
        return normalize_text(value.decode("utf-8", "surrogateescape"))
    # `str` writes np.float64 (a float), float and np.float32 in the fewest digits of each.
    if isinstance(value, float | np.floating):
        return str(int(value)) if value.is_integer() else str(value)
    return normalize_text(str(value))


def _float_texts(values: npt.NDArray[np.floating]) -> npt.NDArray[np.object_]:
    """Return the texts of floats (N,), (N,); None for NaN."""
    texts = np.empty(len(values), object)
    is_integer = np.isfinite(values) & (values == np.trunc(values))
    fits_int64 = is_integer & (np.abs(values) < 2.0**63)
    texts[fits_int64] = values[fits_int64].astype(np.int64).astype(str)
    texts[is_integer & ~fits_int64] = [
        str(int(value)) for value in values[is_integer & ~fits_int64]
    ]
    is_fraction = ~is_integer & ~np.isnan(values)
    # In the array's own precision: a float32 0.1 is written 0.1.
    texts[is_fraction] = values[is_fraction].astype(str)
    return texts


def _text_series(texts: npt.NDArray[np.object_], column: pd.Series) -> pd.Series:
    try:
        return pd.Series(texts, index=column.index, name=column.name, dtype="str")
    # Names of files that are not UTF-8 hold surrogates, which Arrow's text cannot.
    except UnicodeEncodeError:
        return pd.Series(texts, index=column.index, name=column.name, dtype=_ANY_TEXT)
