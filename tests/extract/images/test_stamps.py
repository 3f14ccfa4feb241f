"""Files replaced behind a cache's back: whatever the file system can tell of a replacement is
noticed.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from headrace.cache import file_stamps as stamps
from headrace.cache.file_stamps import (
    FileStamp,
    file_stamp,
    file_stamps,
    wait_until_settled,
)
from headrace.extract.images.content_hashes import content_hashes, hash_bytes
from headrace.extract.images.locators import open_array
from headrace.pipelines.models.from_features import RowColumns
from headrace.pipelines.predict.parts import file_keys

LONG_AGO = 1_600_000_000  # the time in an archive


@pytest.fixture(autouse=True)
def short_tick(monkeypatch):
    """Clocks tick every 0.2 s, so that a test need not wait two seconds for a file to settle."""
    monkeypatch.setattr(stamps, "_CLOCK_TICK_NS", 200_000_000)


def write(path, data, at=LONG_AGO):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (at, at))
    return path


def settle():
    time.sleep(0.3)


def copy_preserving(new, old):  # cp -p
    shutil.copy2(new, old)


def move_over(new, old):  # rsync -t, tar -x, git and most editors: a new file takes the name
    os.replace(new, old)


def link_elsewhere(new, old):
    old.unlink()
    old.symlink_to(new)


def hard_link(new, old):
    old.unlink()
    os.link(new, old)


def write_in_place(new, old):  # and set the time back, as a tool that strips metadata does
    status = old.stat()
    with open(old, "r+b") as file:
        file.write(new.read_bytes())
    os.utime(old, ns=(status.st_atime_ns, status.st_mtime_ns))


def extract_tar(new, old):
    with tarfile.open(new.with_suffix(".tar"), "w") as archive:
        archive.add(new, old.name)
    with tarfile.open(new.with_suffix(".tar")) as archive:
        archive.extractall(old.parent, filter="data")


def extract_zip(new, old):  # unzip restores times too; Python's zipfile needs the help of os.utime
    with zipfile.ZipFile(new.with_suffix(".zip"), "w") as archive:
        archive.write(new, old.name)
    with zipfile.ZipFile(new.with_suffix(".zip")) as archive:
        archive.extractall(old.parent)
    os.utime(old, (LONG_AGO, LONG_AGO))


def swap_names(new, old):
    aside = old.with_suffix(".aside")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


REPLACEMENTS = [
    copy_preserving,
    move_over,
    link_elsewhere,
    hard_link,
    write_in_place,
    extract_tar,
    extract_zip,
    swap_names,
]


@pytest.mark.slow
@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_a_replacement_of_the_same_size_and_time_is_noticed(tmp_path, replace):
    """By the index of content hashes, and by what bulk prediction keeps."""
    path = write(tmp_path / "photos" / "1.bmp", b"first ")
    new = write(tmp_path / "other" / "1.bmp", b"second")
    settle()
    samples = pd.DataFrame({"id": ["1"], "path": [str(path)]})
    first = content_hashes(samples, tmp_path / "index.parquet")
    assert content_hashes(samples, tmp_path / "index.parquet").read == 0
    keys = file_keys([str(path)], RowColumns())
    replace(new, path)
    assert (path.stat().st_size, path.stat().st_mtime) == (6, LONG_AGO)
    found = content_hashes(samples, tmp_path / "index.parquet")
    assert found.hashes == (hash_bytes(b"second"),) != first.hashes
    assert file_keys([str(path)], RowColumns()) != keys


def test_a_link_to_a_folder_is_switched(tmp_path):
    """Data sets with versions are often `current -> v2`: the paths, sizes and times stay."""
    for version in ("v1", "v2"):
        write(tmp_path / version / "1.bmp", version.encode())
    (tmp_path / "current").symlink_to("v1")
    settle()
    samples = pd.DataFrame({"id": ["1"], "path": [str(tmp_path / "current" / "1.bmp")]})
    first = content_hashes(samples, tmp_path / "index.parquet")
    (tmp_path / "next").symlink_to("v2")
    os.replace(tmp_path / "next", tmp_path / "current")
    assert (
        content_hashes(samples, tmp_path / "index.parquet").hashes
        == (hash_bytes(b"v2"),)
        != first.hashes
    )


def test_an_archive_is_replaced(tmp_path):
    """The stamp is that of the file in a locator, for each of its members."""

    def shard(path, data):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("a.png", "b.png"):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        return write(path, buffer.getvalue())

    path = shard(tmp_path / "s.tar", b"first ")
    paths = [f"{path}::tar:512:6:a.png", f"{path}::tar:1536:6:b.png"]
    samples = pd.DataFrame({"id": ["a", "b"], "path": paths})
    settle()
    assert (
        content_hashes(samples, tmp_path / "index.parquet").hashes == (hash_bytes(b"first "),) * 2
    )
    keys = file_keys(paths, RowColumns())
    shutil.copy2(shard(tmp_path / "new" / "s.tar", b"second"), path)
    assert (
        content_hashes(samples, tmp_path / "index.parquet").hashes == (hash_bytes(b"second"),) * 2
    )
    assert not set(file_keys(paths, RowColumns())) & set(keys)


def test_an_array_that_is_open_already_is_opened_again(tmp_path):
    import numpy as np

    np.save(tmp_path / "x.npy", np.zeros((2, 3, 3), np.uint8))
    os.utime(tmp_path / "x.npy", (LONG_AGO, LONG_AGO))
    assert open_array(str(tmp_path / "x.npy"), "npy", "")[1].max() == 0
    np.save(tmp_path / "y.npy", np.ones((2, 3, 3), np.uint8))
    os.utime(tmp_path / "y.npy", (LONG_AGO, LONG_AGO))
    os.replace(tmp_path / "y.npy", tmp_path / "x.npy")
    assert open_array(str(tmp_path / "x.npy"), "npy", "")[1].min() == 1


def test_the_index_has_one_entry_per_path_however_often_it_is_replaced(tmp_path):
    index = tmp_path / "index.parquet"
    paths = [write(tmp_path / f"{n}.png", b"0") for n in range(3)]
    samples = pd.DataFrame({"id": list("abc"), "path": [str(path) for path in paths]})
    sizes = set()
    for round_ in range(4):
        write(paths[0], str(round_).encode())
        settle()
        content_hashes(samples, index)
        sizes.add(pq.read_metadata(index).num_rows)
    assert sizes == {3}
    assert content_hashes(samples, index).read == 0


@pytest.mark.parametrize("young", ["mtime", "ctime"])
def test_a_file_is_trusted_when_both_its_times_are_past(tmp_path, young):
    """A copy of an old file is as young as its inode's change; another of the same tick could
    follow unseen.
    """
    path = write(
        tmp_path / "1.png", b"first", at=LONG_AGO if young == "ctime" else time.time() + 3600
    )
    samples = pd.DataFrame({"id": ["1"], "path": [str(path)]})
    if young == "mtime":
        settle()
    assert content_hashes(samples, tmp_path / "index.parquet").read == 1
    assert content_hashes(samples, tmp_path / "index.parquet").read == 1


def test_a_stamp_is_settled_after_the_later_of_its_times():
    stamp = FileStamp(1, mtime_ns=0, ctime_ns=10**12, inode=1)
    assert not stamp.is_settled(10**12)
    assert not stamp.is_settled(10**12 + 200_000_000)
    assert stamp.is_settled(10**12 + 200_000_001)
    assert FileStamp(1, mtime_ns=10**12, ctime_ns=0, inode=1).is_settled(10**12 + 200_000_001)
    assert not FileStamp(1, mtime_ns=10**12, ctime_ns=0, inode=1).is_settled(10**12)


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """Its hash would stand under a stamp that it never had."""
    path = write(tmp_path / "1.png", b"first")
    settle()
    samples = pd.DataFrame({"id": ["1"], "path": [str(path)]})

    def read_and_replace(name):
        data = Path(name).read_bytes()
        write(Path(name), b"later")
        return data

    with monkeypatch.context() as patch:
        patch.setattr("headrace.extract.images.content_hashes.read_bytes", read_and_replace)
        assert content_hashes(samples, tmp_path / "index.parquet").hashes == (hash_bytes(b"first"),)
    settle()
    assert content_hashes(samples, tmp_path / "index.parquet").hashes == (hash_bytes(b"later"),)


def damaged(data):
    """Every single changed byte in turn would take minutes: some spread over the file, and other
    kinds of damage.
    """
    for at in range(0, len(data), 7):
        yield data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]
    yield from (b"", b"PAR1", data[:-9], data[: len(data) // 2], data + b"\0")


@pytest.mark.slow
def test_a_damaged_index_is_made_again(tmp_path):
    """It only saves time: one changed digit of a hash must not be believed, and no damage may stop
    a run.
    """
    index = tmp_path / "index.parquet"
    samples = pd.DataFrame(
        {"id": ["1", "2"], "path": [str(write(tmp_path / f"{n}.png", b"%d" % n)) for n in (1, 2)]}
    )
    settle()
    expected = content_hashes(samples, index).hashes
    good = index.read_bytes()
    assert expected[0].encode() in good
    for data in damaged(good):
        index.write_bytes(data)
        assert content_hashes(samples, index).hashes == expected


def test_an_index_of_an_earlier_version_is_made_again(tmp_path):
    path = write(tmp_path / "1.png", b"first")
    settle()
    index = tmp_path / "index.parquet"
    old = {"path": [str(path)], "size": [5], "mtime_ns": [LONG_AGO * 10**9], "content": ["0" * 32]}
    pd.DataFrame(old).to_parquet(index)
    samples = pd.DataFrame({"id": ["1"], "path": [str(path)]})
    assert content_hashes(samples, index).hashes == (hash_bytes(b"first"),)
    assert content_hashes(samples, index).read == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_utf8_are_known(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    write(Path(path), b"first")
    settle()
    samples = pd.DataFrame({"id": ["1"], "path": pd.Series([path], dtype=object)})
    assert content_hashes(samples, tmp_path / "index.parquet").hashes == (hash_bytes(b"first"),)
    assert content_hashes(samples, tmp_path / "index.parquet").read == 0
    assert file_keys([path], RowColumns())[0][0] == path


def test_times_of_every_century_fit(tmp_path):
    """Clocks that were wrong: 1901, and 2400, which is beyond 64 bits of nanoseconds."""
    for at in (-2_000_000_000, 13_569_465_600):
        path = tmp_path / "1.png"
        path.write_bytes(b"first")
        try:
            os.utime(path, (at, at))
        except OSError:
            pytest.skip("this file system has no such times")
        samples = pd.DataFrame({"id": ["1"], "path": [str(path)]})
        assert content_hashes(samples, tmp_path / "index.parquet").hashes == (hash_bytes(b"first"),)
        file_keys([str(path)], RowColumns())


def test_each_file_is_asked_once(tmp_path, monkeypatch):
    """The cost of a call on files that are known is one stat each, and one for an archive of many
    members.
    """
    paths = [str(write(tmp_path / f"{n}.png", b"x")) for n in range(5)]
    members = [f"{write(tmp_path / 's.npy', b'x')}::npy:{n}" for n in range(5)]
    asked = []
    monkeypatch.setattr(stamps, "file_stamp", lambda file: asked.append(file) or file_stamp(file))
    file_keys([*paths, *members], RowColumns())
    assert asked == [*paths, str(tmp_path / "s.npy")]


def test_files_that_are_not_there_have_a_reason(tmp_path):
    found = file_stamps([str(tmp_path / "absent"), "nul\0"])
    assert [type(error) for error in found] == [FileNotFoundError, ValueError]
    assert [stamp for _, stamp in file_keys([str(tmp_path / "absent"), "nul\0"], RowColumns())] == [
        "",
        "",
    ]


def test_what_has_just_been_written_is_waited_for_once(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    now = time.time_ns()
    wait_until_settled([])
    wait_until_settled(
        [FileStamp(1, 0, now - 10**12, 1), FileStamp(1, now + 10**12, 0, 1)]
    )  # past, future
    assert slept == []
    wait_until_settled([FileStamp(1, 0, now, 1), FileStamp(1, now - 50_000_000, 0, 1)])
    assert len(slept) == 1
    assert 0 < slept[0] <= 0.2


@pytest.mark.skipif(shutil.which("cp") is None, reason="no cp")
def test_cp_p_of_the_shell(tmp_path):
    """The command itself, on many files at once, as in a corrected delivery of a data set."""
    paths = [write(tmp_path / "photos" / f"{n}.bmp", b"%03d" % n) for n in range(20)]
    for n in range(5):
        write(tmp_path / "fixed" / f"{n}.bmp", b"%03d" % (n + 500))
    settle()
    samples = pd.DataFrame({"id": range(20), "path": [str(path) for path in paths]})
    first = content_hashes(samples, tmp_path / "index.parquet")
    subprocess.run(
        ["cp", "-p", *map(str, (tmp_path / "fixed").iterdir()), str(tmp_path / "photos")],
        check=True,
    )
    again = content_hashes(samples, tmp_path / "index.parquet")
    assert again.read == 5
    assert sum(a != b for a, b in zip(first.hashes, again.hashes, strict=True)) == 5
