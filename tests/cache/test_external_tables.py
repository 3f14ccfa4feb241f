"""Tables of features of other programs: what is a feature is said, what is the target never gets
in, ids are text.
"""

import io
import unicodedata
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from support.runs import RECIPE, headrace, make_photos

from headrace.cache.errors import ExternalFeaturesInvalid
from headrace.cache.exchange.columns import choose_columns, columns_option
from headrace.cache.exchange.external import import_features
from headrace.cache.exchange.external_files import ExternalFeatures, read_external_features
from headrace.cache.exchange.leaks import find_row_counters, find_target_columns

N = 24


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of four features, with the id and the label of each image, that can be written as CSV
    or Parquet.
    """
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(N, 4)), columns=["f0", "f1", "f2", "f3"])
    frame.insert(0, "id", [f"{n:03}.png" for n in range(N)])
    frame["label"] = [n % 2 for n in range(N)]
    return frame


def write(frame, suffix, **options):
    file = f"t.{suffix}"
    match suffix:
        case "csv":
            frame.to_csv(file, **{"index": False, **options})
        case "tsv":
            frame.to_csv(file, sep="\t", **{"index": False, **options})
        case "parquet":
            frame.to_parquet(file, **options)
    return file


def read(file, *columns, **options):
    return read_external_features(Path(file), column_options=columns, **options)


def known(ids):
    return {str(name): f"{place:032x}" for place, name in enumerate(ids)}


def imported(tmp_path, foreign, target):
    """Import with the targets of all images, which are those of the table in their order."""
    content = known(foreign.sample_ids)
    targets = pd.DataFrame({"label": list(target)}, index=list(content.values()))
    return import_features(tmp_path / "cache", "theirs", foreign, content, target_table=targets)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_columns_are_named_or_nothing_is_read(table, suffix):
    """The message lists the numeric columns and can be typed: an option that leaves the
    target out.
    """
    file = write(table, suffix)
    with pytest.raises(
        ExternalFeaturesInvalid,
        match=r"5 columns hold numbers, f0, f1, f2, f3, label.*--columns f0:f3$",
    ):
        read(file, forbidden_names={"label": "the recipe's task.target"})
    named = read(file, "f0:f3")
    np.testing.assert_allclose(
        named.features, table[["f0", "f1", "f2", "f3"]].to_numpy(), rtol=1e-6
    )
    assert named.feature_columns.chosen == ("f0", "f1", "f2", "f3")
    assert named.sample_ids == table["id"].tolist()


def test_a_single_column_of_numbers_needs_no_name(table):
    assert read(write(table[["id", "f0"]], "csv")).feature_columns.chosen == ("f0",)
    with pytest.raises(
        ExternalFeaturesInvalid, match=r"'label' is the recipe's task\.target: not a feature"
    ):
        read(
            write(table[["id", "label"]], "csv"),
            forbidden_names={"label": "the recipe's task.target"},
        )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["f*"], "f0 f1 f2 f10"),
        (["f0:f2"], "f0 f1 f2"),
        (["f10,f0"], "f0 f10"),
        (["f10", "f0:f1", "f?"], "f0 f1 f2 f10"),
        (["a,b"], "a,b"),
        (["a:b"], "a:b"),
        (["a:b:f0"], "f0 f1 f2 f10 a,b a:b"),
        (["f0:a,b"], None),  # a range that ends in a name with a comma is two terms
        (["x[1]"], "x[1]"),
        ([" f0 , f1 "], "f0 f1"),
    ],
)
def test_what_the_option_may_say(options, expected):
    """Names first, then ranges in the order of the file and shell patterns; whole options first,
    then commas.
    """
    columns = ["f0", "f1", "f2", "f10", "a,b", "a:b", "x[1]"]
    if options == ["a:b:f0"]:
        with pytest.raises(
            ExternalFeaturesInvalid, match=r"a:b stands after f0 in the file. Give --columns f0:a:b"
        ):
            choose_columns(columns, options, "t")
    elif expected is None:
        with pytest.raises(ExternalFeaturesInvalid, match="fits no column"):
            choose_columns(columns, options, "t")
    else:
        assert " ".join(choose_columns(columns, options, "t")) == expected


def test_what_fits_no_column_is_answered_with_the_nearest():
    with pytest.raises(
        ExternalFeaturesInvalid, match=r"'embeding_1' fits no column\. Did you mean 'embedding_1'"
    ):
        choose_columns(["embedding_1", "x"], ["embeding_1"], "t")
    with pytest.raises(ExternalFeaturesInvalid, match=r"'g\*' fits no column"):
        choose_columns(["f0", "f1"], ["g*"], "t")


@pytest.mark.slow
@given(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=12, unique=True), st.data())
def test_the_option_of_a_message_names_just_those_columns(columns, data):
    """Whatever the names: it is typed as it stands."""
    import shlex

    chosen = [column for column in columns if data.draw(st.booleans())]
    words = shlex.split(columns_option(columns, chosen))
    assert words[::2] == ["--columns"] * (len(words) // 2)
    assert choose_columns(columns, words[1::2], "t") == chosen


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("spelling", ["label", "Label", "label "])
def test_the_columns_of_the_task_are_refused_even_when_named(table, suffix, spelling):
    table = table.rename(columns={"label": spelling}).assign(patient=3, fold=1)
    forbidden = {
        "label": "the recipe's task.target",
        "patient": "the recipe's task.group",
        "fold": "the recipe's task.fold",
    }
    with pytest.raises(
        ExternalFeaturesInvalid,
        match=rf"{spelling!r} is the recipe's task.target.*'patient' .*--columns f0:f3$",
    ):
        read(write(table, suffix), "*", forbidden_names={**forbidden, "id": "the column of ids"})
    assert read(
        write(table, suffix), "f*[0-9]", forbidden_names=forbidden
    ).feature_columns.chosen == (
        "f0",
        "f1",
        "f2",
        "f3",
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_index_without_a_name_is_refused(table, suffix):
    """As pandas writes it, also of a shuffled table, where it is no running number any more."""
    table = table.sample(frac=1, random_state=0)
    if suffix == "csv":
        file = write(table, "csv", index=True)
    else:
        file = write(table, "parquet", index=True)
    with pytest.raises(
        ExternalFeaturesInvalid,
        match=r"is the rows' index, as pandas writes it.*--columns f0:label$",
    ):
        read(file, "[!i]*")
    table.reset_index().rename(columns={"index": ""}).to_csv(file, index=False)
    if suffix == "csv":
        with pytest.raises(ExternalFeaturesInvalid, match="'Unnamed: 0' is the rows' index"):
            read(file, "*:*", "Unnamed: 0,f0")


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_that_counts_the_rows_is_refused(table, suffix, start):
    """Whatever it is called: tables are sorted by class more often than not."""
    table.insert(3, "nr", range(start, start + N))
    with pytest.raises(
        ExternalFeaturesInvalid,
        match=rf"the column 'nr' counts the rows \({start}, .*Leave it out: --columns "
        r"f0:f1,f2:f3|f0,f1",
    ):
        read(write(table, suffix), "f0:f3")
    assert read(write(table, suffix), "f*").feature_columns.chosen == ("f0", "f1", "f2", "f3")


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64"])
def test_a_mean_of_row_numbers_counts_the_rows(dtype):
    """tsfresh#162: statistics of a column that was the index of the rows; 100 % accuracy of
    whatever series.
    """
    rows = np.arange(3000.0)
    counted = [rows + 0.705882, -rows, 1_700_000_000 + 40 * rows, rows * 1e-3, 1e6 - rows / 4]
    noise = np.random.default_rng(0).normal(size=3000)
    features = np.stack([noise, *counted, np.sqrt(rows), np.cumsum(np.abs(noise))], axis=1).astype(
        dtype
    )
    expected = [1, 2, 3, 4, 5] if dtype != "int64" else [1, 2, 3]
    assert find_row_counters(features) == expected


def test_an_array_that_begins_with_the_rows_numbers_is_refused(table, tmp_path):
    """`np.save(f, frame.reset_index().to_numpy())` keeps the index."""
    (tmp_path / "ids.txt").write_text("\n".join(table["id"]))
    np.save("a.npy", table[["f0", "f1"]].reset_index().to_numpy())
    with pytest.raises(
        ExternalFeaturesInvalid,
        match=r"value 0 of each row \(the first is 0\) counts the rows \(0, 1, 2, …\)",
    ):
        read("a.npy", ids_path=tmp_path / "ids.txt")


@pytest.mark.parametrize("target", ["class", "text", "number"])
@pytest.mark.parametrize("kind", ["csv", "npy", "npz", "h5", "list"])
def test_the_target_under_another_name_is_refused(table, tmp_path, kind, target):
    """In columns of a table, in a column of lists, in arrays: a value that stands for the target is
    the target.
    """
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 3, N) if target != "number" else rng.normal(size=N)
    labels = {
        "class": codes,
        "text": np.array(["a", "b", "c"])[codes.astype(int) % 3],
        "number": codes,
    }[target]
    secret = np.exp(codes / 7) * -2  # no longer the numbers themselves
    values = table[["f0", "f1", "f2", "f3"]].to_numpy().copy()
    values[:, 2] = secret
    (tmp_path / "ids.txt").write_text("\n".join(table["id"]))
    ids = tmp_path / "ids.txt"
    match kind:
        case "csv":
            foreign = read(write(table.assign(f2=secret), "csv"), "f0:f3")
        case "npy":
            np.save("a.npy", values)
            foreign = read("a.npy", ids_path=ids)
        case "npz":
            np.savez("a.npz", x=values, y=labels)
            foreign = read("a.npz", ids_path=ids)
        case "h5":
            with h5py.File("a.h5", "w") as file:
                file["x"] = values
            foreign = read("a.h5", ids_path=ids)
        case "list":
            foreign = read(write(pd.DataFrame({"id": table["id"], "v": list(values)}), "parquet"))
    named = (
        r"the column 'f2' .*--columns f0,f1,f3$"
        if kind == "csv"
        else r"value 2 of each row .* is the target 'label'"
    )
    with pytest.raises(ExternalFeaturesInvalid, match=named):
        imported(tmp_path, foreign, labels)
    assert imported(tmp_path, foreign, rng.permutation(labels)).n_rows == N


def test_what_is_no_target_is_kept():
    """Nearly the target, a feature of one class's rows, chance among few rows, unknown targets."""
    rng = np.random.default_rng(0)
    labels = pd.Series(np.repeat(["a", "b", "c", None], 20))
    codes = np.repeat([0.0, 1, 2, 3], 20)
    nearly = codes.copy()
    nearly[7] = 1
    features = np.stack(
        [nearly, rng.normal(size=80), np.zeros(80), codes + rng.normal(0, 1e-6, 80)], axis=1
    )
    assert find_target_columns(features, labels) == []
    assert find_target_columns(features, pd.Series([None] * 80, dtype=object)) == []
    assert find_target_columns(features, pd.Series(["a"] * 80)) == []
    few = pd.Series([1.5, 2.5, 3.5, 4.5, 5.5])
    assert (
        find_target_columns(np.arange(5.0)[:, None], few) == []
    )  # rising with the target, by chance
    rare = pd.Series(["a"] * 40 + ["b"] * 39 + ["c"])
    sparse = np.zeros((80, 1))
    sparse[79] = 1  # a sparse feature of one image, which is alone in its class
    assert find_target_columns(sparse, rare) == []


def test_indicators_and_means_of_classes_are_the_target():
    """One-hot labels, target encodings: constant within each class, which no feature of an image
    is.
    """
    labels = pd.Series(np.tile(["a", "b", "c"], 20))
    one_hot = pd.get_dummies(labels).to_numpy(float)
    mean = labels.map({"a": 0.3, "b": 0.3, "c": 0.7}).to_numpy()[:, None]
    noise = np.random.default_rng(0).normal(size=(60, 1))
    assert find_target_columns(np.hstack([noise, one_hot, mean]), labels) == [1, 2, 3, 4]


def test_row_numbers_in_large_arrays(tmp_path):
    """Blocks after the first count too; a number that repeats or jumps late is no row number."""
    features = np.random.default_rng(0).normal(size=(70_000, 3)).astype(np.float32)
    features[:, 1] = np.arange(70_000)
    assert find_row_counters(features) == [1]
    features[69_999, 1] = 0
    assert find_row_counters(features) == []
    assert find_row_counters(np.array([[0.0], [1.0]])) == []
    assert find_row_counters(np.array([[5.0], [6.0], [7.0]])) == []  # by chance
    assert find_row_counters(np.ones((20, 2))) == []
    assert find_row_counters(np.zeros((0, 3))) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("n/a", r"column 'f1' holds 'n/a' in row 6; expected a number"),
        ("", r"column 'f1' holds '' in row 6; expected a number"),
        ("1,5", r"column 'f1' holds '1,5' in row 6"),
        ("nan", r"column 'f1' holds 'nan' in row 6|is nan in row 6"),
        ("inf", r"'f1' is inf in row 6 \(id '005.png'\); expected finite"),
        ("1e300", r"'f1' is inf in row 6|is 1e\+300 in row 6"),
    ],
)
def test_values_that_are_no_finite_numbers_are_refused_with_their_row(table, value, message):
    table = table.astype({"f1": object})
    table.loc[5, "f1"] = value
    with pytest.raises(ExternalFeaturesInvalid, match=message):
        read(write(table, "csv"), "f0:f3")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
@pytest.mark.parametrize("kind", ["parquet", "npy", "list", "map"])
def test_nan_and_infinity_are_refused_in_every_format(table, tmp_path, kind, value):
    (tmp_path / "ids.txt").write_text("\n".join(table["id"]))
    value = np.nan if value is None and kind != "parquet" else value
    table.loc[5, "f1"] = value
    match kind:
        case "parquet":
            file, options = write(table, "parquet"), {"columns": ["f0:f3"]}
        case "list":
            lists = list(table[["f0", "f1"]].to_numpy())
            file, options = write(pd.DataFrame({"id": table["id"], "v": lists}), "parquet"), {}
        case "npy" | "map":
            values = table[["f0", "f1", "f2", "f3"]].to_numpy()
            np.save("a.npy", values if kind == "npy" else values.reshape(N, 1, 2, 2))
            file, options = "a.npy", {"ids_path": tmp_path / "ids.txt"}
    with pytest.raises(
        ExternalFeaturesInvalid, match=r"in row 6 \(id '005.png'\); expected finite numbers"
    ):
        read(file, *options.pop("columns", ()), **options)


def test_a_column_of_text_is_no_feature_even_when_named(table):
    with pytest.raises(ExternalFeaturesInvalid, match=r"column 'name' holds 'x0' in row 1"):
        read(write(table.assign(name=[f"x{n}" for n in range(N)]), "csv"), "f*,name")
    with pytest.raises(ExternalFeaturesInvalid, match=r"column 'when' holds .*2024"):
        read(write(table.assign(when=pd.Timestamp("2024-01-01")), "parquet"), "f*,when")


def test_lists_that_are_none(table):
    """Text from a CSV, one number, a gap, another length: which row, and what to do."""
    lists = pd.DataFrame({"id": table["id"], "v": [[0.5, float(n)] for n in range(N)]})
    with pytest.raises(
        ExternalFeaturesInvalid, match=r"holds text in row 1, '\[0.5, 0.0\]'.*Parquet"
    ):
        read(write(lists, "csv"), feature_key="v")
    with pytest.raises(
        ExternalFeaturesInvalid,
        match=r"holds .* in row 1; expected a list of numbers; .*--columns f0$",
    ):
        read(write(table, "csv"), feature_key="f0")
    with pytest.raises(ExternalFeaturesInvalid, match=r"holds None in row 4"):
        read(write(lists.assign(v=[*lists["v"][:3], None, *lists["v"][4:]]), "parquet"))
    with pytest.raises(
        ExternalFeaturesInvalid, match=r"lists of 2 values and, in row 24, one of 3"
    ):
        read(write(lists.assign(v=[*lists["v"][:-1], [1, 2, 3.0]]), "parquet"))
    with pytest.raises(ExternalFeaturesInvalid, match="give one of them"):
        read(write(lists, "parquet"), "v", feature_key="v")
    with pytest.raises(ExternalFeaturesInvalid, match=r"'v' is the recipe's task\.target"):
        read(write(lists, "parquet"), forbidden_names={"v": "the recipe's task.target"})
    with pytest.raises(ExternalFeaturesInvalid, match="--columns names columns of a table"):
        read(str(np.save("a.npy", np.ones((3, 2))) or "a.npy"), "f0")


def test_an_array_that_is_called_as_the_target_is_refused(tmp_path, table):
    (tmp_path / "ids.txt").write_text("\n".join(table["id"]))
    values = np.random.default_rng(0).normal(size=(N, 2))
    np.savez(tmp_path / "a.npz", label=values)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/label"] = values
    for name in ("a.npz", "a.h5"):
        with pytest.raises(
            ExternalFeaturesInvalid, match=r"'label' is the recipe's task\.target: not a feature"
        ):
            read(
                name,
                ids_path=tmp_path / "ids.txt",
                forbidden_names={"label": "the recipe's task.target"},
            )


def test_ids_that_are_python_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "f.npy", np.ones((2, 2)))
    np.save(tmp_path / "ids.npy", np.array(["a", "b"], dtype=object), allow_pickle=True)
    with pytest.raises(ExternalFeaturesInvalid, match=r"dtype=str"):
        read_external_features(tmp_path / "f.npy", ids_path=tmp_path / "ids.npy")


def test_a_header_with_a_name_twice_is_refused(table):
    """pandas would call the second one `label.1`, which no list of forbidden names holds."""
    text = io.StringIO()
    table.to_csv(text, index=False)
    with open("t.csv", "w") as file:
        file.write(text.getvalue().replace("f3", "label"))
    with pytest.raises(ExternalFeaturesInvalid, match="several columns 'label'"):
        read("t.csv", "f*")


def test_rows_longer_than_the_header_are_refused(table):
    with open("t.csv", "w") as file:
        file.write("id,f0\na,1,2\nb,3,4\n")
    with pytest.raises(ExternalFeaturesInvalid, match="more values than the first line has names"):
        read("t.csv", "f0")


ODD_IDS = [
    "007",
    "None",
    "NA",
    "nan",
    "null",
    "1e5",
    "0x1F",
    "1.0",
    "True",
    "-0",
    "caf\u00e9",
    "a b",
    "x,y",
    'q"t',
    "#1",
]


def ids_files(tmp_path, ids, values):
    """The same features and ids in every form."""
    np.save(tmp_path / "f.npy", values)
    frame = pd.DataFrame({"id": ids, "f0": values[:, 0], "f1": values[:, 1]})
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        frame.to_csv(tmp_path / f"t.{suffix}", index=False, sep=separator)
        frame[["id"]].to_csv(tmp_path / f"ids.{suffix}", index=False, sep=separator)
    frame.to_parquet(tmp_path / "t.parquet")
    frame[["id"]].to_parquet(tmp_path / "ids.parquet")
    frame.set_index("id").to_parquet(tmp_path / "index.parquet")
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    np.save(tmp_path / "ids.npy", np.array(ids))
    np.save(tmp_path / "bytes.npy", np.array([name.encode() for name in ids]))
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["x"] = values.astype(np.float32)
        file["id"] = np.array(ids, dtype=h5py.string_dtype())
    with h5py.File(tmp_path / "fixed.h5", "w") as file:
        file["x"] = values.astype(np.float32)
        file["id"] = np.array([name.encode() for name in ids])
    named = {
        name: ("f.npy", {"ids_path": tmp_path / name})
        for name in ("ids.csv", "ids.tsv", "ids.parquet", "ids.txt", "ids.npy", "bytes.npy")
    }
    tables = {
        name: (name, {"column_options": ["f0,f1"]})
        for name in ("t.csv", "t.tsv", "t.parquet", "index.parquet")
    }
    return {**named, **tables, "f.h5": ("f.h5", {}), "fixed.h5": ("fixed.h5", {})}


def test_ids_are_text_as_written_in_every_format(tmp_path):
    """Leading zeros stay, nothing becomes missing or a number, and `None` is a name."""
    values = np.random.default_rng(0).normal(size=(len(ODD_IDS), 2))
    for form, (file, options) in ids_files(tmp_path, ODD_IDS, values).items():
        external_features = read_external_features(tmp_path / file, **options)
        assert external_features.sample_ids == ODD_IDS, form
        np.testing.assert_allclose(external_features.features, values, rtol=1e-6)


def test_ids_are_compared_without_blanks_and_in_one_form_of_accents(tmp_path):
    """A table from a Mac has decomposed accents, one from a spreadsheet has blanks."""
    theirs = [" a.png", "b.png ", unicodedata.normalize("NFD", "\u00e9.png"), "\tc.png"]
    values = np.random.default_rng(0).normal(size=(4, 2))
    forms = ids_files(tmp_path, theirs, values)
    for form, (file, options) in forms.items():
        external_features = read_external_features(tmp_path / file, **options)
        assert external_features.sample_ids == ["a.png", "b.png", "\u00e9.png", "c.png"], form
    ours = {
        "a.png": "0" * 32,
        "b.png": "1" * 32,
        unicodedata.normalize("NFD", "\u00e9.png"): "2" * 32,
        "c.png ": "3" * 32,
    }
    assert import_features(tmp_path / "cache", "x", external_features, ours).n_rows == 4


@pytest.mark.parametrize("ids", [[7, 8, 2**62 + 1], [True, False, True], [b"7", b"8", b"9"]])
def test_ids_that_are_numbers_in_parquet_keep_their_digits(tmp_path, ids):
    frame = pd.DataFrame(
        {
            "id": pd.Series(ids, dtype=object if isinstance(ids[0], bytes) else None),
            "f": [0.5, 1.5, 3.5],
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    expected = [value.decode() if isinstance(value, bytes) else str(value) for value in ids]
    if len(set(expected)) < 3:
        with pytest.raises(ExternalFeaturesInvalid, match="'True'"):
            read_external_features(tmp_path / "t.parquet")
        return
    assert read_external_features(tmp_path / "t.parquet").sample_ids == expected
    np.save(tmp_path / "f.npy", np.ones((3, 2)))
    np.save(tmp_path / "ids.npy", np.array(ids)[:, None])
    assert (
        read_external_features(tmp_path / "f.npy", ids_path=tmp_path / "ids.npy").sample_ids
        == expected
    )


@pytest.mark.parametrize("missing", ["", "  ", None])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_row_without_an_id_is_refused(table, suffix, missing):
    """Not called `nan`: another table's missing id would be the same."""
    table.loc[5, "id"] = missing
    with pytest.raises(ExternalFeaturesInvalid, match="1 row has no id, first row 6"):
        read(write(table, suffix), "f*")


def test_a_line_without_an_id_is_refused(tmp_path):
    np.save(tmp_path / "f.npy", np.ones((3, 2)))
    (tmp_path / "ids.txt").write_text("a\n\nc")
    with pytest.raises(ExternalFeaturesInvalid, match="1 row has no id, first row 2"):
        read_external_features(tmp_path / "f.npy", ids_path=tmp_path / "ids.txt")


def test_what_clip_retrieval_writes_is_read_by_its_paths(tmp_path):
    """Half-precision embeddings and, beside them, a Parquet table whose index counts on where
    another shard ended.
    """
    values = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float16)
    np.save(tmp_path / "img_emb_0.npy", values)
    # Keyed by the last part of their paths, two of these were one (clip-retrieval#321).
    paths = ["b/1.png", "a/1.png", "a/01.png", "a/2.png"]
    pd.DataFrame({"image_path": paths}, index=range(90, 94)).to_parquet(
        tmp_path / "metadata_0.parquet"
    )
    external_features = read_external_features(
        tmp_path / "img_emb_0.npy", ids_path=tmp_path / "metadata_0.parquet", id_key="image_path"
    )
    assert external_features.sample_ids == paths
    np.testing.assert_array_equal(external_features.features, values)


def test_ids_that_have_lost_digits_are_refused(tmp_path):
    """pandas#8596: an outer merge makes floats of integers; beyond 2^53 two ids are one then."""
    frame = pd.DataFrame({"id": [2.0**53 + 2, 7.0], "f": [0.5, 1.5]})
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ExternalFeaturesInvalid, match="beyond 2"):
        read_external_features(tmp_path / "t.parquet")
    frame.assign(id=[7.0, 8.0]).to_parquet(tmp_path / "t.parquet")
    assert read_external_features(tmp_path / "t.parquet").sample_ids == ["7", "8"]


def test_an_integer_id_with_a_gap_keeps_its_digits(tmp_path):
    """As floats, integers beyond 2^53 would be other integers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"id": pa.array([2**53 + 1, None], pa.int64()), "f": [0.5, 1.5]}),
        tmp_path / "t.parquet",
    )
    with pytest.raises(ExternalFeaturesInvalid, match="1 row has no id, first row 2"):
        read_external_features(tmp_path / "t.parquet")
    pq.write_table(
        pa.table({"id": pa.array([2**53 + 1, 2], pa.int64()), "f": [0.5, 1.5]}),
        tmp_path / "t.parquet",
    )
    assert read_external_features(tmp_path / "t.parquet").sample_ids == [str(2**53 + 1), "2"]


def test_two_images_that_differ_in_accents_alone_are_told(tmp_path):
    """The id belongs to neither more than to the other."""
    foreign = ExternalFeatures(
        ["\u00e9.png", "b.png"], np.random.default_rng(0).normal(size=(2, 2)), None
    )
    ours = {"\u00e9.png": "0" * 32, "e\u0301.png": "1" * 32, "b.png": "2" * 32}
    with pytest.raises(ExternalFeaturesInvalid, match="stands for several images of the recipe"):
        import_features(tmp_path, "x", foreign, ours)
    same = {**ours, "e\u0301.png": "0" * 32}  # a copy
    assert import_features(tmp_path, "x", foreign, same).n_rows == 2


def test_rows_of_an_export_go_back_to_their_features(tmp_path):
    """The table beside an exported array counts its rows: sorting it in a spreadsheet moves no
    feature to another image.
    """
    values = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    np.save(tmp_path / "f.npy", values)
    rows = pd.DataFrame(
        {"row": range(4), "id": list("dbca"), "content": [f"{n:032x}" for n in range(4)]}
    )
    rows.sort_values("id").to_csv(tmp_path / "f.rows.csv", index=False)
    external_features = read_external_features(tmp_path / "f.npy")
    assert external_features.sample_ids == list("dbca")
    assert external_features.content_hashes == rows["content"].tolist()
    rows.assign(row=[1, 2, 3, 4]).to_csv(tmp_path / "f.rows.csv", index=False)
    with pytest.raises(
        ExternalFeaturesInvalid, match="`row` does not count the rows of the features from 0 to 3"
    ):
        read_external_features(tmp_path / "f.npy")


def test_content_hashes_that_belong_to_no_image_are_not_believed(tmp_path):
    """A column of MD5 sums looks like one of ours."""
    foreign = ExternalFeatures(
        ["a", "b"], np.random.default_rng(0).normal(size=(2, 2)), ["f" * 32, "e" * 32]
    )
    with pytest.raises(
        ExternalFeaturesInvalid, match="none of its content hashes is that of an image"
    ):
        import_features(tmp_path, "x", foreign, {"a": "0" * 32})
    assert import_features(tmp_path, "x", foreign).n_rows == 2


def test_ids_need_not_be_unique_where_content_is(tmp_path):
    """One cache may hold two folders whose images have the same names; its export comes
    back whole.
    """
    foreign_table = pd.DataFrame(
        {"id": ["a", "a"], "content": ["0" * 32, "1" * 32], "f": [0.5, 1.5]}
    )
    foreign_table.to_parquet(tmp_path / "t.parquet")
    external_features = read_external_features(tmp_path / "t.parquet")
    assert import_features(tmp_path / "cache", "x", external_features).n_rows == 2
    foreign_table.drop(columns="content").to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ExternalFeaturesInvalid, match="more than once, first 'a'"):
        read_external_features(tmp_path / "t.parquet")


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_any_names_are_the_same_from_any_table(tmp_path_factory, names):
    tmp_path = tmp_path_factory.mktemp("names")
    expected = [unicodedata.normalize("NFC", name.strip()) for name in names]
    if (
        len(set(expected)) < len(names)
        or "" in expected
        or any("\x85" in n or "\u2028" in n for n in names)
    ):
        return
    values = np.random.default_rng(0).normal(size=(len(names), 2))
    for form, (file, options) in ids_files(tmp_path, names, values).items():
        assert read_external_features(tmp_path / file, **options).sample_ids == expected, form


@pytest.mark.slow
def test_the_command_refuses_the_target_and_says_what_to_type(tmp_path):
    """As people write such tables: with pandas' index, the id and the label; typing what the
    message says works.
    """
    make_photos(tmp_path / "photos", n=30)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ids = [f"{('coarse', 'fine')[n % 2]}/{n:03}.png" for n in range(30)]
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(30, 6)), columns=[f"f{n}" for n in range(6)])
    frame.insert(0, "id", ids)
    frame["label"] = [name.split("/")[0] for name in ids]
    frame["split"] = rng.integers(0, 2, 30)
    frame["y"] = [n % 2 for n in range(30)]
    frame.to_csv(tmp_path / "theirs.csv")

    def command(*options):
        return headrace(
            "cache",
            "import",
            "theirs.csv",
            "--name",
            "x",
            "--recipe",
            "recipe.yaml",
            *options,
            cwd=tmp_path,
        )

    done = command()
    assert done.returncode == 2
    assert "9 columns hold numbers, 'Unnamed: 0', f0, f1, f2, f3, f4, f5, split, y" in done.stderr
    assert done.stderr.endswith("--columns f0:f5,split,y\n")
    done = command("--columns", "f0:y")
    assert done.returncode == 2
    assert "'label' is the recipe's task.target" in done.stderr
    done = command("--columns", "f0:f5,split,y")
    assert done.returncode == 2
    assert "the column 'y' is the target 'label' under another name" in done.stderr
    assert "--columns f0:f5,split" in done.stderr
    done = command("--columns", "f0:f5")
    assert done.returncode == 0, done.stderr
    assert "30 rows of shape (6,) kept as x" in done.stdout
