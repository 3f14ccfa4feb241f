"""The files of a run that its readers believe."""

import json

import pytest

from headrace.pipelines.records import (
    RunDamaged,
    append_records,
    publish_table,
    read_record,
    read_records,
    read_table,
    write_record,
)


def test_records_come_back_or_are_refused(tmp_path):
    """An object as it was written; a digit that changed, half a file and no JSON each name the file
    and what mends it.
    """
    path = tmp_path / "selection.json"
    write_record(path, {"expected": 0.9, "metric": "accuracy"})
    assert read_record(path) == {"expected": 0.9, "metric": "accuracy"}
    good = path.read_bytes()
    for bad in (good.replace(b"0.9", b"0.8"), good[:20], b"", b"[1]"):
        path.write_bytes(bad)
        with pytest.raises(
            RunDamaged, match=r"selection\.json .*`headrace run RECIPE` writes it again"
        ):
            read_record(path)
    path.write_text(json.dumps({"expected": 0.9}))
    assert read_record(path) == {"expected": 0.9}, "one of an earlier version has no digest"


def test_tables_are_believed_as_they_were_written(tmp_path):
    """Each has its own digest in tables.json, written after it, so that a call that died in between
    is told.
    """
    leaderboard, heads = tmp_path / "leaderboard.csv", tmp_path / "heads.parquet"
    publish_table(leaderboard, b"rank\n1\n")
    publish_table(heads, b"heads")
    publish_table(leaderboard, b"rank\n2\n")
    assert read_table(leaderboard).read() == b"rank\n2\n"
    assert read_table(heads).read() == b"heads"
    leaderboard.write_bytes(b"rank\n3\n")  # as a call that was killed before it wrote the digest
    with pytest.raises(
        RunDamaged, match=r"leaderboard\.csv is not as the run wrote it.*`headrace run RECIPE`"
    ):
        read_table(leaderboard)
    assert read_table(heads).read() == b"heads"
    (tmp_path / "tables.json").write_bytes(b'{"leaderboard.csv": "0"')
    with pytest.raises(RunDamaged, match=r"tables\.json has changed"):
        read_table(heads)
    publish_table(leaderboard, b"rank\n4\n")
    assert read_table(leaderboard).read() == b"rank\n4\n"
    (tmp_path / "tables.json").unlink()
    assert read_table(heads).read() == b"heads", "a run of an earlier version has no digests"


def test_a_damaged_line_is_counted_and_stays(tmp_path):
    """The others are read; what is appended later does not hide it."""
    path = tmp_path / "stages.jsonl"
    assert read_records(path) == ([], 0)
    append_records(path, [{"name": "survey", "seconds": 1.5}, {"name": "extract", "seconds": 20}])
    path.write_bytes(path.read_bytes().replace(b"1.5", b"9.5").removesuffix(b"\n"))
    append_records(path, [{"name": "train", "seconds": 3}])
    assert read_records(path) == (
        [{"name": "extract", "seconds": 20}, {"name": "train", "seconds": 3}],
        1,
    )
    path.write_bytes(b"")
    assert read_records(path) == ([], 1), "no call leaves an empty file"
