"""Exports of Label Studio: tasks as rows, and the files that its addresses of images stand for."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd

from headrace.extract.errors import SourceError
from headrace.extract.images.byte_ranges import locator_file
from headrace.extract.sources.folder import image_paths

_ADDRESS = re.compile(r"/data/(?:upload/(?:\d+/)?|local-files/\?d=)(.+)")
_UPLOAD_MARK = re.compile(r"^[0-9a-f]{8}-")  # before the name that a file had when it was uploaded


def holds_tasks(values: Any) -> bool:
    """Return whether the value of a JSON file is a list of tasks with their annotations."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(
            isinstance(task, dict)
            and isinstance(task.get("data"), dict)
            and isinstance(task.get("annotations"), list)
            for task in values
        )
    )


def task_rows(
    tasks: Sequence[Mapping[str, Any]], table_path: Path
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """One row per task: its data, and a column for each control (`choice`, say) with the answer of
    its first annotation that was not skipped; lists where some task has several choices.

    Raises SourceError where no task has an answer for the whole image, and for annotations of
    another form.
    """
    rows = []
    n_several = 0
    controls: dict[str, None] = {}
    for place, task in enumerate(tasks, start=1):
        row = {
            key: value
            for key, value in task["data"].items()
            if isinstance(value, str | int | float)
        }
        try:
            annotations = [each for each in task["annotations"] if not each.get("was_cancelled")]
            own_answers = _answers(annotations[0]) if annotations else {}
        except (AttributeError, KeyError, TypeError) as error:
            raise SourceError(
                f"{table_path}: the annotations of task {place:,} are not as Label Studio exports "
                f"them ({type(error).__name__}: {error}). Export the project as JSON once more"
            ) from error
        n_several += len(annotations) > 1
        controls |= dict.fromkeys(own_answers)
        rows.append(row | own_answers)
    if not controls:
        raise SourceError(
            f"{table_path}: tasks of Label Studio without an answer for a whole image (<Choices>). "
            "Boxes: export the project as COCO, and set images.boxes: {}"
        )
    frame = pd.DataFrame(rows, dtype=object)
    for control in controls:
        answers = frame[control]
        if all(len(answer) == 1 for answer in answers if isinstance(answer, list)):
            frame[control] = [
                answer[0] if isinstance(answer, list) else answer for answer in answers
            ]
    notes = [f"{table_path.name}: tasks of Label Studio; their answers: {', '.join(controls)}"]
    if n_several:
        notes.append(
            f"{table_path.name}: {n_several:,} tasks have several annotations: the first counts"
        )
    return frame, tuple(notes)


def _answers(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answers for the whole image by their controls. Raises AttributeError, KeyError and
    TypeError for an annotation of another form.
    """
    answers = {}
    for result in annotation.get("result", []):
        value = result.get("value", {})
        # what has a place in the image is a region's answer
        if result.get("type") in value and not {"x", "points", "rle"} & set(value):
            answers[result["from_name"]] = value[result["type"]]
    return answers


def local_names(addresses: "pd.Series[Any]", image_root: Path) -> "pd.Series[Any]":
    """Return the addresses of images on Label Studio's server as paths below `image_root`: of an
    upload the file with its name, or with the one that it had before it was uploaded; of another
    the file whose path is the address's end, or ends as the whole address.

    Other texts, and addresses of files that are not there or stand for several, stay.
    """
    is_address = addresses.astype(str).str.startswith(("/data/upload/", "/data/local-files/"))
    if not is_address.any():
        return addresses
    paths_by_name: dict[str, list[str]] = defaultdict(list)
    for image_path in image_paths(image_root):
        path = os.path.relpath(locator_file(image_path), image_root)
        paths_by_name[os.path.basename(path)].append(path)

    def local_name(address: str) -> str:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            return address
        *folders, name = unquote(match[1]).replace("\\", "/").split("/")
        if name not in paths_by_name:
            name = _UPLOAD_MARK.sub("", name)
        lengths = {
            path: _common_end(path.split("/"), [*folders, name])
            for path in paths_by_name.get(name, ())
        }
        longest = max(lengths.values(), default=0)
        fitting = [path for path, length in lengths.items() if 0 < length == longest]
        return fitting[0] if len(fitting) == 1 else address

    return addresses.where(~is_address, addresses.map(local_name, na_action="ignore"))


def _common_end(path: Sequence[str], other_path: Sequence[str]) -> int:
    """Return the parts of the shorter path where the longer one ends with it, else 0: test/a.jpg is
    not train/a.jpg.
    """
    length = min(len(path), len(other_path))
    return length if list(path[-length:]) == list(other_path[-length:]) else 0
