"""The record of test-set evaluations: every model that was scored on the test split, once."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cache.atomic_io import lease, publish_replace
from headrace.cache.format.sealed import SealBroken, read_sealed_json, sealed_json
from headrace.pipelines.errors import InvalidInput

OLD_RECORD = "test-openings.jsonl"  # the record's name in earlier versions


@dataclass(frozen=True)
class TestResult:
    """The selected model's score on the test split, with its 95 % interval."""

    metric: str
    value: float
    low: float  # of the interval, which counts images of one group once, see `metric_interval`
    high: float
    images: int  # number of test images
    # How many models have been evaluated on this test split, this one included.
    n_evaluations: int
    metrics: dict[str, float]  # {name: value} of every metric of the task
    groups: int | None = None  # groups of the images, or distinct images; None: one per image
    units: int | None = None  # units that were scored, each by its images; None: images were


def read_test_evaluations(record_path: Path) -> list[Mapping[str, Any]]:
    """Return the recorded evaluations, oldest first; from the copy if the record is damaged.

    Raises InvalidInput if one is damaged and the other is damaged or gone.
    """
    return _read_record_or_copy(record_path)[0]


def repair_test_evaluations(record_path: Path) -> list[str]:
    """Write the record and its copy again if either is damaged or gone.

    Return a note if it was the record. Raises InvalidInput if one is damaged and the other is
    damaged or gone.
    """
    # The loss of both would let a second evaluation pass for the first.
    with lease(lock_path(record_path)):
        evaluations, damage = _read_record_or_copy(record_path)
        copied = _read_record(_copy_path(record_path))
        # A process that died between the two writes leaves a copy that says less, or the earlier.
        is_stale = isinstance(copied, str) or (
            copied != evaluations and len(copied) <= len(evaluations)
        )
        if damage or is_stale:
            write_test_evaluations(record_path, evaluations)
    if not damage:
        return []
    return [
        f"{record_path} {damage}: it was written again from its copy, with {len(evaluations):,} "
        "evaluations of the test split. To start the count again, knowing that the test images "
        f"have been seen, remove both: rm {shlex.quote(str(record_path))} "
        f"{shlex.quote(str(_copy_path(record_path)))}"
    ]


def refuse_old_record(record_path: Path) -> None:
    """Raise InvalidInput where the record of an earlier version lies beside `record_path`."""
    # Ignored, it would let the same test images count as never seen.
    for old_record in (record_path.with_name(OLD_RECORD), record_path.with_name(f".{OLD_RECORD}")):
        if old_record.exists():
            raise InvalidInput(
                f"{old_record} is the record of test-set evaluations of an earlier version of "
                "headrace, which this version does not read: run the recipe in another directory "
                "(`out:`), or, knowing that the test images have been seen, remove it: rm "
                f"{shlex.quote(str(old_record))}"
            )


def _read_record_or_copy(record_path: Path) -> tuple[list[Mapping[str, Any]], str]:
    """Return the evaluations, and what is wrong with the record: "" if nothing is."""
    refuse_old_record(record_path)
    record, copied_record = _read_record(record_path), _read_record(_copy_path(record_path))
    if isinstance(copied_record, list) and copied_record:
        if isinstance(record, str):
            return copied_record, record
        # The record is written first, so if the copy has more lines, the record has lost some.
        if copied_record[: len(record)] == record and len(copied_record) > len(record):
            return (
                copied_record,
                f"lacks {len(copied_record) - len(record)} of {len(copied_record)} lines"
                if record
                else "is gone",
            )
        return record, ""
    # With a record that is gone and a damaged copy, the count would silently start again.
    if isinstance(record, str) or (not record and isinstance(copied_record, str)):
        copy_state = (
            f"its copy {copied_record}" if isinstance(copied_record, str) else "it has no copy"
        )
        both_paths = (record_path, _copy_path(record_path))
        existing_files = [str(path) for path in both_paths if path.exists()]
        raise InvalidInput(
            f"{record_path} {record or 'is gone'}, and {copy_state}. It says how often the "
            "test split was evaluated, and how the winner scored: restore it from a backup. "
            "Without one, the count starts again, and the next score is of images that a winner "
            f"may have seen; if you accept that, type: {shlex.join(['rm', *existing_files])}"
        )
    return record, ""


def _read_record(record_path: Path) -> list[Mapping[str, Any]] | str:
    """Return the evaluations in a file, [] if there is no file; or a text that says its damage."""
    try:
        record_lines = record_path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    if not record_lines:
        return "is empty"
    evaluations: list[Mapping[str, Any]] = []
    for line_number, line in enumerate(record_lines, 1):
        try:
            evaluation = read_sealed_json(line)
        except SealBroken as error:
            return f"has changed since it was written (line {line_number}: {error})"
        if not {"winner", "result", "images"} <= set(evaluation):
            return (
                f"has changed since it was written, or is of another version (line {line_number} "
                "is no evaluation)"
            )
        evaluations.append(evaluation)
    return evaluations


def write_test_evaluations(record_path: Path, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Write the evaluations, oldest first, in place of the record and its copy."""
    # In two files whose lines carry checksums, so that damage to one of them neither undoes an
    # evaluation nor lets it be made a second time.
    record_bytes = b"".join(sealed_json(evaluation) + b"\n" for evaluation in evaluations)
    publish_replace(record_path, record_bytes)
    publish_replace(_copy_path(record_path), record_bytes)


def _copy_path(record_path: Path) -> Path:
    return record_path.with_name(f".{record_path.name}")


def lock_path(record_path: Path) -> Path:
    """Return the lock that is held from the reading of a record to its writing."""
    return record_path.with_suffix(".lock")
