"""The fault matrix: processes that die, disks that fill up, writers that race.

Nothing acknowledged is ever lost.
"""

import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from support.cache_kills import SPEC, assert_readable, extract, kill_loop
from support.caches import (
    given,
    leftovers,
    make_feature_set,
    shard_bytes,
    unit_arguments,
    unit_name,
)
from support.file_system_faults import dying_at, failing_at, in_child, start_child, wait_for

from headrace.cache.atomic_io import lease, publish_bytes, publish_replace
from headrace.cache.errors import PublishFailed
from headrace.cache.feature_set import open_feature_set
from headrace.cache.integrity.verify import verify_bytes
from headrace.cache.manifest import read_manifest
from headrace.cache.publish import create_feature_set, feature_set_path, publish_shard, shard_path

# A forked child of a process with threads (torch, once a test has imported it) is a deprecation in
# later Pythons.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    """A death between creating a lock and writing its owner into it leaves a lock that only time
    can break.
    """
    monkeypatch.setattr("headrace.cache.atomic_io.LEASE_S", 0.15)


def assert_whole(directory, units):
    """Exactly these units are listed, every byte is right, and no reader can see anything else."""
    assert verify_bytes(directory) == []
    features = open_feature_set(directory)
    assert [entry.unit for entry in features.entries] == [unit_name(number) for number in units]
    values, ids, content = given(SPEC, units)
    assert features.ids() == ids
    assert np.array_equal(features.load(content, None), values.astype(np.float16))


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "least"), [("middle", 10), ("after", 40)])
def test_death_at_every_system_call(tmp_path, moment, least):
    """An extraction is killed after each system call in turn, and in the middle of each write: what
    it acknowledged stays, resuming gives equal bytes.

    The loop ends when the target lies behind the last call, so no step is left out. A death before
    a call leaves on disk what a death after the one before it leaves.
    """
    whole = shard_bytes(extract(tmp_path / "whole", 2))
    target, killed = 0, 0
    while True:
        target += 1
        root = tmp_path / str(target)

        def work(root=root, target=target):
            with dying_at(target, moment):
                extract(root, 2)

        status = in_child(work)
        directory = feature_set_path(root, SPEC)
        listed = assert_readable(directory)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        # A death leaves at most the one temporary it was writing, and a lock.
        assert len([name for name in leftovers(root) if name.endswith(".partial")]) <= 1
        before = {name: data for name, data in shard_bytes(directory).items() if directory.exists()}
        extract(root, 2)
        after = shard_bytes(directory)
        assert after == whole
        assert all(after[name] == data for name, data in before.items())
        features = open_feature_set(directory)
        assert len(features.entries) == 2 >= listed
        assert [problem.kind for problem in verify_bytes(directory)] in ([], ["temporary"])
    assert killed > least


def extract_failing(root, target, code, call):
    with failing_at(target, code, (call,)):
        extract(root, 2)


def failure_of(work):
    """The PublishFailed that `work` raises, or None."""
    try:
        work()
    except PublishFailed as error:
        return error
    return None


@pytest.mark.parametrize(
    ("call", "code"),
    [
        *((call, errno.ENOSPC) for call in ("open", "write", "fsync", "link")),
        ("write", errno.EDQUOT),
        ("fsync", errno.EIO),
    ],
    ids=lambda value: errno.errorcode.get(value, value),
)
def test_error_at_every_system_call(tmp_path, call, code):
    """Each open, write, fsync and link fails in turn: the errno is named, no temporary stays, a
    rerun completes.
    """
    whole = shard_bytes(extract(tmp_path / "whole", 2))
    target, failed = 0, 0
    while True:
        target += 1
        root = tmp_path / str(target)
        directory = feature_set_path(root, SPEC)
        error = failure_of(
            lambda root=root, target=target: extract_failing(root, target, code, call)
        )
        if error is None:
            break
        failed += 1
        assert errno.errorcode[code] in str(error)
        assert error.errno == code
        assert [name for name in leftovers(root) if name.endswith(".partial")] == []
        assert_readable(directory)
        extract(root, 2)
        assert shard_bytes(directory) == whole
        assert_whole(directory, range(2))
    assert failed >= 3


def test_file_size_limit(tmp_path):
    """A disk that is full (a file that may not grow): the errno is named, nothing is published,
    nothing is left.
    """

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 100, resource.RLIM_INFINITY))
        with pytest.raises(PublishFailed, match="EFBIG"):
            extract(tmp_path, 1)

    assert in_child(work) == 0
    directory = feature_set_path(tmp_path, SPEC)
    assert leftovers(tmp_path) == []
    assert shard_bytes(directory) == {}
    assert_whole(extract(tmp_path, 1), range(1))


def test_full_disk(tmp_path):
    """On a real full file system: units are published until it is full, the next fails whole, room
    lets it go on.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(PublishFailed, match="ENOSPC"):
            extract(disk, 100)
        directory = feature_set_path(disk, SPEC)
        published = assert_readable(directory)
        assert 3 < published < 100
        assert [name for name in leftovers(disk) if name.endswith(".partial")] == []
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert_whole(extract(disk, published + 2), range(published + 2))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_no_hard_links(tmp_path, monkeypatch):
    """Where the file system knows no links, a rename under a lock publishes, and the first one
    still wins.
    """

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    directory = extract(tmp_path, 2)
    assert_whole(directory, range(2))
    assert leftovers(tmp_path) == []
    assert publish_bytes(tmp_path / "file", b"first")
    assert not publish_bytes(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"


@pytest.mark.slow
def test_no_hard_links_and_many_writers(tmp_path, monkeypatch):
    """The rename under a lock keeps one winner too."""
    monkeypatch.setattr(
        os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no links"))
    )
    for attempt in range(5):
        target = tmp_path / str(attempt)
        pipes = os.pipe()

        def work(number, target=target, pipes=pipes):
            if publish_bytes(target, b"%d" % number * 10000):
                os.write(pipes[1], b"%d" % number)

        children = [start_child(lambda number=number: work(number)) for number in range(6)]
        assert [wait_for(pid) for pid in children] == [0] * 6
        os.close(pipes[1])
        winner = os.read(pipes[0], 100)
        os.close(pipes[0])
        assert len(winner) == 1
        assert target.read_bytes() == winner * 10000


@pytest.mark.slow
@pytest.mark.parametrize("writers", [2, 4, 8])
def test_writers_at_once(tmp_path, writers):
    """The same extraction started several times: one shard per unit, no row lost, none twice, all
    are told the same.
    """
    directory = create_feature_set(tmp_path, SPEC)
    whole = shard_bytes(extract(tmp_path / "whole", 12))
    told = [tmp_path / f"told{writer}.json" for writer in range(writers)]

    def work(writer):
        order = list(range(12))
        random.Random(writer).shuffle(order)
        entries = [publish_shard(directory, **unit_arguments(SPEC, number)) for number in order]
        told[writer].write_text(json.dumps(sorted([entry.unit, entry.xxh3] for entry in entries)))

    children = [start_child(lambda writer=writer: work(writer)) for writer in range(writers)]
    assert [wait_for(pid) for pid in children] == [0] * writers
    assert_whole(directory, range(12))
    assert shard_bytes(directory) == whole
    assert len({path.read_text() for path in told}) == 1
    assert [name for name in leftovers(tmp_path) if name.endswith(".partial")] == []


def test_writers_that_disagree(tmp_path):
    """Two machines whose last bits differ race for every unit: each shard is wholly one's or the
    other's.
    """
    directory = create_feature_set(tmp_path, SPEC)

    def work(writer):
        for number in range(20):
            arguments = unit_arguments(SPEC, number)
            arguments["features"] = arguments["features"] + writer
            publish_shard(directory, **arguments)

    children = [start_child(lambda writer=writer: work(writer)) for writer in range(4)]
    assert [wait_for(pid) for pid in children] == [0] * 4
    assert verify_bytes(directory) == []
    features = open_feature_set(directory)
    values, _, content = given(SPEC, range(20))
    difference = np.round(features.load(content) - values).reshape(20, -1)
    assert (difference == difference[:, :1]).all()
    assert set(difference[:, 0]) <= {0.0, 1.0, 2.0, 3.0}


@pytest.mark.slow
def test_kills_at_random(tmp_path):
    """25 kills: no acknowledged row is lost, bytes end up equal, and a kill costs at most the unit
    it interrupted.
    """
    died, started, units = kill_loop(tmp_path, 30, 25, 0, 0.06)
    assert started <= units + died


def test_torn_line_is_cut_off(tmp_path):
    """Every prefix of a line that a death can leave is passed over by readers and cut off by the
    next writer.
    """
    directory = extract(tmp_path, 2)
    manifest = directory / "manifest.jsonl"
    data = manifest.read_bytes()
    first = data.index(b"\n") + 1
    for end in range(first, len(data)):
        manifest.write_bytes(data[:end])
        # The whole line without its newline counts already.
        assert len(read_manifest(directory)) == 1 + (end == len(data) - 1), end
        if end % 40 == 0:
            extract(tmp_path, 2)
            assert manifest.read_bytes() == data
    extract(tmp_path, 3)
    assert manifest.read_bytes().startswith(data)
    assert_whole(directory, range(3))


def test_unlisted_shard_is_adopted(tmp_path):
    """A shard whose writer died before listing it is checked and listed by the next writer, not
    written again.
    """
    directory = extract(tmp_path, 2)
    manifest = directory / "manifest.jsonl"
    data = manifest.read_bytes()
    manifest.write_bytes(data[: data.index(b"\n") + 1])
    inode = shard_path(directory, unit_name(1)).stat().st_ino
    assert [problem.kind for problem in verify_bytes(directory)] == ["unlisted"]
    extract(tmp_path, 2)
    assert manifest.read_bytes() == data
    assert shard_path(directory, unit_name(1)).stat().st_ino == inode


def test_broken_unlisted_shard_is_replaced(tmp_path):
    """An unlisted shard whose bytes did not reach the disk (a power cut) is written again."""
    directory = extract(tmp_path, 2)
    manifest = directory / "manifest.jsonl"
    data = manifest.read_bytes()
    manifest.write_bytes(data[: data.index(b"\n") + 1])
    path = shard_path(directory, unit_name(1))
    whole = path.read_bytes()
    for broken in (b"", whole[:5000], bytes(len(whole))):
        path.write_bytes(broken)
        manifest.write_bytes(data[: data.index(b"\n") + 1])
        extract(tmp_path, 2)
        assert path.read_bytes() == whole
        assert manifest.read_bytes() == data


def test_stale_lock_of_this_machine(tmp_path):
    """A lock whose holder was killed is taken over at once, without waiting for its lease to run
    out.
    """
    directory = create_feature_set(tmp_path, SPEC)
    pid = start_child(lambda: hold_for_ever(directory / ".manifest.lock"))
    wait_until((directory / ".manifest.lock").exists)
    os.kill(pid, signal.SIGKILL)
    wait_for(pid)
    assert (directory / ".manifest.lock").exists()
    assert_whole(extract(tmp_path, 1), range(1))
    assert leftovers(tmp_path) == []


def test_stale_lock_of_another_machine(tmp_path, monkeypatch):
    """A lock that names another machine, whose holder is dead, is taken over when its lease has run
    out.
    """
    directory = create_feature_set(tmp_path, SPEC)

    def work():
        monkeypatch.setattr(socket, "gethostname", lambda: "another-machine")
        hold_for_ever(directory / ".manifest.lock")

    pid = start_child(work)
    lock = directory / ".manifest.lock"
    wait_until(
        lambda: lock.exists() and "another-machine" in lock.read_text()
    )  # made first, signed a moment later
    os.kill(pid, signal.SIGKILL)
    wait_for(pid)
    assert "another-machine" in (directory / ".manifest.lock").read_text()
    assert_whole(extract(tmp_path, 1), range(1))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("text", ["", "filelock/2\npid=12", "filelock/2\npid=12\nhost=node"])
def test_a_lock_that_names_no_owner_is_broken(tmp_path, text):
    """Its holder has died before all of its name was written; it would be waited for for ever."""
    path = tmp_path / "lock"
    path.write_text(text)
    with lease(path):
        assert path.read_text() != text
    assert leftovers(tmp_path) == []
    assert not path.exists()


def hold_for_ever(path):
    with lease(path):
        time.sleep(1000)


def wait_until(condition):
    while not condition():
        time.sleep(0.005)


@pytest.mark.slow
def test_a_file_that_may_be_replaced(tmp_path):
    """Killed or failing at each system call of a replacement: the old bytes or the new ones, never
    a mixture.
    """
    path = tmp_path / "status.json"
    for moment, least in (("middle", 1), ("after", 4)):
        status, target = -signal.SIGKILL, 0
        while status:
            target += 1
            publish_replace(path, b"old" * 1000)

            def work(target=target, moment=moment):
                with dying_at(target, moment):
                    publish_replace(path, b"new" * 1000)

            status = in_child(work)
            assert path.read_bytes() in (b"old" * 1000, b"new" * 1000)
        assert target > least
        assert path.read_bytes() == b"new" * 1000
    for call in ("open", "write", "fsync", "replace"):
        publish_replace(path, b"old")
        before = leftovers(tmp_path)
        with pytest.raises(PublishFailed, match="EIO"), failing_at(1, errno.EIO, (call,)):
            publish_replace(path, b"new")
        assert path.read_bytes() in (b"old", b"new")
        assert leftovers(tmp_path) == before


def test_feature_set_of_an_interrupted_process_is_usable(tmp_path):
    """`create_feature_set` may be interrupted too: the next one finishes it."""
    directory = feature_set_path(tmp_path, SPEC)
    directory.mkdir(parents=True)
    assert make_feature_set(tmp_path, 1, SPEC) == directory
    assert_whole(directory, range(1))
