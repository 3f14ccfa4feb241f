"""What is published is what is read: by position, by content, in batches, in every dtype, through
every door.
"""

import multiprocessing
import pickle
import threading

import dask.array
import numpy as np
import pytest
from hypothesis import HealthCheck, given as property_of, settings, strategies as st
from support.caches import given, hashes, make_feature_set, make_spec, unit_arguments, unit_name

from headrace.cache.errors import CacheError, FeatureSetMissing, SpecMismatch
from headrace.cache.feature_set import list_feature_sets, open_feature_set
from headrace.cache.format.encoding import decode_rows, encode_rows
from headrace.cache.format.float16 import float16_to_float32
from headrace.cache.mapping import MappedRows
from headrace.cache.publish import create_feature_set, feature_set_path, publish_shard
from headrace.cache.row_index import RowIndex, as_content_hashes
from headrace.cache.spec import STORAGE_DTYPES

COMPRESSIONS = [None, "bitshuffle-lz4"]
# Half a unit in the last place at 4.5, which no value exceeds; uint8: half a step of a range of 9.
TOLERANCE = {"float16": 2**-9, "bfloat16": 2**-6, "float32": 0.0, "uint8": 9 / 255 / 2}


@pytest.fixture(params=COMPRESSIONS, ids=["plain", "compressed"])
def compression(request):
    return request.param


@pytest.fixture(params=STORAGE_DTYPES)
def dtype(request):
    return request.param


@pytest.mark.parametrize("shape", [(12,), (5, 3, 2)])
def test_rows_come_back(tmp_path, dtype, compression, shape):
    """Every row, id and content hash comes back, within the round-off that the feature set itself
    reports.
    """
    spec = make_spec(dtype, shape)
    features = open_feature_set(make_feature_set(tmp_path, 3, spec, compression=compression))
    values, ids, content = given(spec, range(3))
    assert features.spec == spec
    assert features.shape == values.shape
    assert features.ids() == ids
    assert features.content_hashes().astype(str).tolist() == content
    loaded = features.load(content)
    assert loaded.dtype == np.float32
    error = np.abs(loaded - values)
    assert error.max() <= TOLERANCE[dtype]
    assert features.quantization_error.largest == pytest.approx(error.max(), rel=1e-3, abs=1e-6)
    relative = np.sqrt(np.square(error, dtype=float).sum() / np.square(values, dtype=float).sum())
    assert features.quantization_error.relative_rms == pytest.approx(relative, rel=1e-3)


def test_every_way_of_reading_agrees(tmp_path, dtype, compression):
    """Slices, positions, masks, negative positions, content, batches, dask and torch give the same
    numbers.
    """
    spec = make_spec(dtype, (4, 2, 2))
    features = open_feature_set(make_feature_set(tmp_path, 4, spec, compression=compression))
    everything = features[:]
    assert everything.dtype == features.dtype
    n = features.n_rows
    order = np.random.default_rng(0).permutation(n)
    assert np.array_equal(features.read(order, None), everything[order])
    assert np.array_equal(features[5:27], everything[5:27])
    assert np.array_equal(features[27:5:-3], everything[27:5:-3])
    assert np.array_equal(features[[3, 3, -1]], everything[[3, 3, -1]])
    assert np.array_equal(features[order % 2 == 0], everything[order % 2 == 0])
    assert np.array_equal(features[7, 1:3, 0], everything[7, 1:3, 0])
    assert np.array_equal(features[2:9, 1], everything[2:9, 1])
    assert np.array_equal(np.asarray(features), everything)
    content = features.content_hashes()
    assert np.array_equal(features.load(content[order], None), everything[order])
    assert np.array_equal(
        features.load(content[order].astype(str).tolist(), None), everything[order]
    )
    for batch in features.iter_batches(5, seed=3, block_rows=4, buffer_rows=12, dtype=None):
        assert np.array_equal(batch.features, everything[batch.rows])
    as_dask = features.to_dask_array()
    assert as_dask.chunks[0] == (8, 8, 8, 8)
    assert np.array_equal(as_dask.compute(scheduler="synchronous"), everything)
    data_set = features.to_torch_dataset()
    tensor, row = data_set[-1]
    assert row == n - 1
    assert np.array_equal(tensor.numpy(), features.read([n - 1])[0])
    batch = data_set.__getitems__([4, 1])
    assert [item[1] for item in batch] == [4, 1]
    assert np.array_equal(batch[1][0].numpy(), features.read([1])[0])


@pytest.mark.parametrize("shape", [(5,), (600,), (700, 3), (4096,)])
def test_the_fast_gather_equals_the_general_one(tmp_path, monkeypatch, shape):
    """One table over all shards and windows at any item give the same rows as the units that were
    written.

    Rows of a page or more start on a page, and a table is used; smaller shards, or data anywhere
    else, use windows.
    """
    spec = make_spec(shape=shape)
    directory = make_feature_set(tmp_path, 5, spec)
    expected = given(spec, range(5))[0].astype(np.float16)
    order = np.random.default_rng(0).integers(0, 40, 300)
    tables = []
    for largest in (1 << 45, 0):  # 0: no room for the holes of a table
        monkeypatch.setattr("headrace.cache.mapping._MAX_RESERVED_BYTES", largest)
        features = open_feature_set(directory)
        assert np.array_equal(features.read(order, None), expected[order])
        assert np.array_equal(features.read(order), expected[order].astype(np.float32))
        assert np.array_equal(features[3:29], expected[3:29])
        tables.append(features._reader._mapped_rows()._is_table)
    row_bytes = 2 * int(np.prod(shape))
    on_a_page = 8 * row_bytes >= 4096
    assert tables == [on_a_page, on_a_page and 2**21 % row_bytes == 0]


def test_rows_that_start_anywhere(tmp_path):
    """A file whose data start in the middle of a page, as another writer might lay them out, reads
    right.
    """
    values = np.arange(3 * 2000 * 5, dtype=np.float32).reshape(3, 2000, 5)
    mapped = MappedRows([2000] * 3, 5, np.dtype(np.float32))
    for index, offset in enumerate((4096, 4196, 0)):
        path = tmp_path / str(index)
        path.write_bytes(bytes(offset) + values[index].tobytes())
        mapped.map(index, path, offset, 2000)
        assert np.array_equal(mapped.rows(index, 7, 1900), values[index, 7:1900])
    items = np.concatenate([first + 5 * np.arange(2000) for first in mapped.first_item])
    assert np.array_equal(mapped.gather(items[::-7]), values.reshape(-1, 5)[::-7])


def test_reading_into_an_array(tmp_path, dtype, compression):
    """`out` takes slices and positions, in any dtype and memory order, and nothing of another
    shape.
    """
    features = open_feature_set(
        make_feature_set(tmp_path, 3, make_spec(dtype, (3, 2)), compression=compression)
    )
    expected = features.read(slice(None))
    for rows in (slice(2, 20), [5, 1, 23], slice(None, None, 4)):
        for wanted in (np.float16, np.float32, np.float64):
            for order in "CF":
                out = np.empty(expected[rows].shape, wanted, order)
                assert features.read(rows, out=out) is out
                assert np.array_equal(out, expected[rows].astype(wanted))
    with pytest.raises(
        ValueError, match=r"`out` has shape \(2, 3, 2\), and the rows have \(3, 3, 2\)"
    ):
        features.read([0, 1, 2], out=np.empty((2, 3, 2)))


def test_copies_belong_to_the_caller(tmp_path, compression):
    """What is returned can be written to, and changing it changes nothing that is read later."""
    features = open_feature_set(make_feature_set(tmp_path, 2, compression=compression))
    for first in (
        features[:],
        features.read([0, 9], None),
        next(features.iter_batches(4, seed=1)).features,
    ):
        before = features[:].copy()
        first[...] = 7
        assert np.array_equal(features[:], before)


def test_dask_tasks_carry_no_array(tmp_path):
    """A task is paths and numbers; the rows are read by the worker."""
    features = open_feature_set(make_feature_set(tmp_path, 2, make_spec(shape=(20_000,))))
    assert len(pickle.dumps(dict(features.to_dask_array().dask))) < 10_000 < features.stored_bytes


def test_no_rows(tmp_path):
    """A feature set without shards, and one whose every sample failed, can be read like
    any other.
    """
    spec = make_spec("uint8", (4, 2))
    directory = create_feature_set(tmp_path, spec)
    for failed in (0, 3):
        if failed:
            publish_shard(directory, **unit_arguments(spec, 1, rows=0, failed=failed))
        features = open_feature_set(directory)
        assert features.shape == (0, 4, 2)
        assert features[:].shape == (0, 4, 2)
        assert features.load([]).shape == (0, 4, 2)
        assert features.ids() == []
        assert features.cached_hashes() == {failure.content_hash for failure in features.failures()}
        assert len(features.failures()) == failed
        assert list(features.iter_batches(3, seed=0)) == []
        assert features.to_dask_array().compute(scheduler="synchronous").shape == (0, 4, 2)
        assert features.locate(hashes(0, 2)).tolist() == [-1, -1]


def test_failures_keep_id_and_reason(tmp_path):
    """A sample that could not be decoded is known, has no row, and says why."""
    features = open_feature_set(make_feature_set(tmp_path, 2))
    failure = features.failures()[1]
    assert failure.id == "bad 1/0"
    assert failure.reason == "truncated: 12 bytes are missing"
    assert failure.content_hash in features.cached_hashes()
    with pytest.raises(CacheError, match=r"no row for bad 1/0 \(truncated: 12 bytes are missing\)"):
        features.load([failure.content_hash])


def test_missing_rows_are_named(tmp_path):
    """The message holds the first content hashes that are not there, how many more, and what to
    type.
    """
    features = open_feature_set(make_feature_set(tmp_path, 1))
    wanted = hashes(0, 2) + hashes(5000, 9)
    assert features.locate(wanted).tolist() == [0, 1] + [-1] * 9
    with pytest.raises(
        CacheError, match=f"no row for {hashes(5000, 1)[0]}.* and 6 more.*headrace run RECIPE"
    ):
        features.load(wanted)


@pytest.mark.parametrize("rows", [[8], [-9], [0.5], [[0]]])
def test_positions_outside_are_refused(tmp_path, rows):
    """A position that is not there never reads neighbouring memory."""
    features = open_feature_set(make_feature_set(tmp_path, 1))
    with pytest.raises(IndexError):
        features.read(rows)
    with pytest.raises(IndexError):
        next(features.iter_batches(1, rows=np.asarray(rows)))


def test_order_of_publication_does_not_matter(tmp_path):
    """Two caches with the same units, published in another order, read alike, and their shards are
    equal bytes.
    """
    spec = make_spec()
    one = make_feature_set(tmp_path / "a", 4, spec)
    other = create_feature_set(tmp_path / "b", spec)
    for unit_number in (2, 0, 3, 1):
        publish_shard(other, **unit_arguments(spec, unit_number))
    first, second = open_feature_set(one), open_feature_set(other)
    assert first.entries == second.entries
    assert np.array_equal(first[:], second[:])
    assert [path.read_bytes() for path in sorted((one / "shards").iterdir())] == [
        path.read_bytes() for path in sorted((other / "shards").iterdir())
    ]


@settings(max_examples=60, deadline=None)
@property_of(
    n=st.integers(0, 200),
    batch_size=st.integers(1, 70),
    block_rows=st.integers(1, 40),
    extra=st.integers(0, 100),
    seed=st.none() | st.integers(0, 2**32) | st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_batches_hold_every_row_once(open_set, n, batch_size, block_rows, extra, seed):
    """Whatever the sizes: each row once, all batches full but the last, the features those of the
    rows.
    """
    everything = open_set[:]
    rows = np.random.default_rng(n).permutation(open_set.n_rows)[:n]
    batches = list(
        open_set.iter_batches(
            batch_size,
            seed=seed,
            rows=rows,
            dtype=None,
            block_rows=block_rows,
            buffer_rows=block_rows + extra,
        )
    )
    seen = np.concatenate([batch.rows for batch in batches] or [np.empty(0, int)])
    assert np.array_equal(
        seen if seed is None else np.sort(seen), rows if seed is None else np.sort(rows)
    )
    assert all(len(batch.rows) == batch_size for batch in batches[:-1])
    assert all(np.array_equal(batch.features, everything[batch.rows]) for batch in batches)


@pytest.fixture(scope="module")
def open_set(tmp_path_factory):
    """200 rows in 25 shards."""
    return open_feature_set(make_feature_set(tmp_path_factory.mktemp("cache"), 25))


def test_batches_are_seeded(open_set):
    """The same seed gives the same order, another seed another one, and an epoch is part of the
    seed.
    """

    def order(seed):
        batches = open_set.iter_batches(16, seed=seed, block_rows=8, buffer_rows=64)
        return np.concatenate([batch.rows for batch in batches]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order((1, 0)) != order((1, 1))


def test_a_batch_mixes_blocks(open_set):
    """A batch holds rows of most of the blocks of its buffer, so neighbours in the data set do not
    stay together.
    """
    batch = next(open_set.iter_batches(64, seed=0, block_rows=8, buffer_rows=128))
    assert len(np.unique(batch.rows // 8)) > 10


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@property_of(
    st.lists(st.integers(0, 300), max_size=200), st.lists(st.integers(0, 400), max_size=100)
)
def test_index_finds_the_first_of_each(held, wanted):
    """`locate` is a dictionary look-up, also with duplicates, of which it gives the first."""
    names = hashes(0, 401)
    first = {}
    for row, unit_number in enumerate(held):
        first.setdefault(unit_number, row)
    index = RowIndex(as_content_hashes([names[unit_number] for unit_number in held]))
    assert index.locate(
        as_content_hashes([names[unit_number] for unit_number in wanted])
    ).tolist() == [first.get(n, -1) for n in wanted]


@settings(max_examples=60, deadline=None)
@property_of(
    st.sampled_from(STORAGE_DTYPES),
    st.sampled_from(["f2", "f4", "f8", "i4"]),
    st.integers(0, 9),
    st.sampled_from([(3,), (4, 2, 2)]),
    st.floats(1e-6, 1e4),
)
def test_round_off_is_bounded(dtype, given_dtype, n, shape, scale):
    """No stored value is further off than half a unit in its last place (uint8: half a step of its
    channel).
    """
    values = (
        (np.random.default_rng(n).normal(size=(n, *shape)) * scale)
        .clip(-6e4, 6e4)
        .astype(given_dtype)
    )
    encoded = encode_rows(values, [str(row) for row in range(n)], dtype)
    off = np.abs(
        decode_rows(encoded.stored, dtype, encoded.scale, encoded.offset).astype(float)
        - values.astype(float)
    )
    size = np.abs(values.astype(float))
    if dtype == "uint8":
        steps = encoded.scale.reshape(-1, *(1 for _ in shape[1:])).astype(float)
        bound = steps * 0.5001 + size.max(initial=0) * 2.0**-22
    else:
        bits, smallest = {"float16": (11, 2.0**-25), "bfloat16": (8, 0), "float32": (24, 0)}[dtype]
        bound = np.maximum(size * 2.0**-bits, smallest) * 1.0001
    assert (off <= bound).all()
    assert encoded.quantization_error.largest == pytest.approx(
        off.max(initial=0), rel=1e-3, abs=1e-7 * max(scale, 1)
    )


def test_widening_is_exact():
    """All 63,488 finite float16 values become the float32 that numpy's cast makes of them, bit for
    bit.
    """
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    half = np.tile(half[np.isfinite(half)], 3).reshape(3, -1)  # more than one block
    out = np.empty(half.shape, np.float32)
    float16_to_float32(half, out)
    assert np.array_equal(out.view(np.uint32), half.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("given_dtype", ["f2", "f4", "f8"])
def test_nan_and_infinity_are_refused(tmp_path, dtype, bad, given_dtype):
    """A feature that is no number is refused at write, by the name of its sample, and nothing is
    published.
    """
    spec = make_spec(dtype, (3, 2))
    directory = create_feature_set(tmp_path, spec)
    arguments = unit_arguments(spec, 0)
    arguments["features"] = arguments["features"].astype(given_dtype)
    arguments["features"][5, 1, 0] = bad
    with pytest.raises(CacheError, match=r"'Zelle 5 è.png': its feature \[1, 0\] is -?(nan|inf)"):
        publish_shard(directory, **arguments)
    assert open_feature_set(directory).n_rows == 0


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float16", 65520.0), ("bfloat16", 3.4e38), ("float32", 1e39), ("uint8", 1e39)],
)
def test_overflow_is_refused(tmp_path, dtype, value):
    """A value that the storage dtype would turn into infinity is refused, by the name of its
    sample.
    """
    spec = make_spec(dtype)
    arguments = unit_arguments(spec, 0)
    arguments["features"] = arguments["features"].astype(np.float64)
    arguments["features"][7, 11] = value
    with pytest.raises(CacheError, match=rf"'Zelle 7 è\.png'.* and {dtype} ends at"):
        publish_shard(create_feature_set(tmp_path, spec), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "../escape"}, "work unit '../escape': its name is not"),
        ({"unit": ".hidden"}, "is not 1 to 64"),
        ({"unit": "u" * 65}, "is not 1 to 64"),
        ({"ids": ["a"]}, "for 1 ids"),
        ({"content_hashes": hashes(0, 7)}, "7 content hashes"),
        ({"content_hashes": ["X" * 32, *hashes(0, 7)]}, "not 32 lower-case hex digits"),
        ({"ids": ["a\0", *"bcdefgh"]}, "NUL"),
        ({"ids": ["", *"bcdefgh"]}, "is empty"),
        ({"compression": "gzip"}, "compression 'gzip'"),
        ({"features": np.zeros((8, 12), complex)}, "not real numbers"),
        ({"features": np.zeros((8, 13))}, r"shape \(8, 13\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, change, message):
    """A wrong call says what is wrong, and publishes nothing."""
    directory = create_feature_set(tmp_path, make_spec())
    with pytest.raises(ValueError, match=message):
        publish_shard(directory, **{**unit_arguments(make_spec(), 0), **change})
    assert list((directory / "shards").iterdir()) == []


def test_another_spec_is_refused(tmp_path):
    """A directory that holds another spec is refused, naming the field and both values."""
    spec, other = make_spec(), make_spec(tap="blocks.5")
    directory = create_feature_set(tmp_path, spec)
    directory.rename(feature_set_path(tmp_path, other))
    with pytest.raises(SpecMismatch, match=r"tap: found 'blocks.4', expected 'blocks.5'"):
        create_feature_set(tmp_path, other)


def test_no_feature_set(tmp_path):
    """Opening what is not there names the directory and the command that lists what is."""
    with pytest.raises(FeatureSetMissing, match="headrace cache ls"):
        open_feature_set(tmp_path / "nothing")
    assert list_feature_sets(tmp_path / "nothing") == []


def test_reading_while_another_extracts(tmp_path):
    """A reader sees exactly the units that were published when it opened, whatever is published
    while it reads.
    """
    spec = make_spec()
    directory = create_feature_set(tmp_path, spec)
    process = multiprocessing.get_context("fork").Process(
        target=_publish_units, args=(directory, spec, 40)
    )
    process.start()
    seen = [0]
    while process.is_alive() or seen[-1] < 40:
        features = open_feature_set(directory)
        units = [int(entry.unit[1:]) for entry in features.entries]
        assert units == list(range(len(units)))
        if units:
            values, _, content = given(spec, units)
            assert np.abs(features.load(content) - values).max() < 2**-9
        seen.append(len(units))
    process.join()
    assert process.exitcode == 0
    assert seen == sorted(seen)


def _publish_units(directory, spec, units):
    for number in range(units):
        publish_shard(directory, **unit_arguments(spec, number))


def test_threads_share_a_feature_set(tmp_path):
    """Eight threads that read at random from a fresh feature set all get the right rows."""
    spec = make_spec()
    features = open_feature_set(make_feature_set(tmp_path, 12, spec))
    expected = given(spec, range(12))[0].astype(np.float16)
    wrong = []

    def read(seed):
        generator = np.random.default_rng(seed)
        for _ in range(50):
            rows = generator.integers(0, features.n_rows, 20)
            if not np.array_equal(features.read(rows, None), expected[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_feature_set_travels(tmp_path):
    """Pickled to another process it opens the same shards, though more have been
    published since.
    """
    directory = make_feature_set(tmp_path, 2)
    features = open_feature_set(directory)
    publish_shard(directory, **unit_arguments(make_spec(), 5))
    travelled = pickle.loads(pickle.dumps(features))
    assert np.array_equal(travelled[:], features[:])
    assert open_feature_set(directory).n_rows == features.n_rows + 8


def test_arrays_outlive_their_feature_set(tmp_path):
    """Dropping a feature set unmaps its shards only when nothing refers to them."""
    features = open_feature_set(make_feature_set(tmp_path, 2))
    expected = features[:]
    reader = features._reader
    view = reader._mapped_rows().rows(1, 0, 8)
    del features, reader
    assert np.array_equal(view, expected[8:].reshape(8, -1))


def test_first_writer_wins(tmp_path):
    """A unit that is published stays as it is: the second writer is told the first one's entry."""
    spec = make_spec()
    directory = make_feature_set(tmp_path, 1, spec)
    before = open_feature_set(directory)
    second = unit_arguments(spec, 0)
    second["features"] = second["features"] + 1
    assert publish_shard(directory, **second) == before.entries[0]
    assert np.array_equal(open_feature_set(directory)[:], before[:])
    assert unit_name(0) == before.entries[0].unit


def test_dask_array_computes_with_workers(tmp_path):
    """A mean over a dask array of the rows is the mean of the rows."""
    features = open_feature_set(make_feature_set(tmp_path, 5))
    array = features.to_dask_array(np.float32)
    assert isinstance(array, dask.array.Array)
    assert np.allclose(
        array.mean(axis=0).compute(scheduler="threads"), features.read(slice(None)).mean(axis=0)
    )


def test_threads_see_a_shard_as_touched_only_when_all_of_it_is_known(tmp_path):
    """One that saw it before its compression was known would read addresses without memory."""
    features = open_feature_set(make_feature_set(tmp_path, 1, make_spec("float16", (3,))))
    reader, seen_early = features._reader, []

    class Table(np.ndarray):
        def __setitem__(self, index, value):
            seen_early.append(index in reader._layouts)
            super().__setitem__(index, value)

    reader._is_compressed = reader._is_compressed.view(Table)
    reader.touch(0)
    assert seen_early == [False]
