"""Exports of Label Studio: tasks as rows, and its addresses of images as paths of local files."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.extract.errors import SourceError
from headrace.extract.images.locators import locator_file
from headrace.extract.sources.folder import image_paths

_ADDRESS = re.compile(
    r"(?:/data/(?:upload/(?:\d+/)?|local-files/\?d=)|(?!file:)[a-z][a-z0-9+.-]*://[^/]+/)(.+)"
)
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
    """Return a row per task, and notes on what was assumed.

    Columns: the task's data, and one for each control of the labelling form (`choice`, say) with
    the answer of the first annotation that was not skipped; lists if some task has several choices.

    Raises SourceError when no task has an answer for the whole image, and for annotations of
    another form.
    """
    rows = []
    n_several = 0
    controls: dict[str, None] = {}
    for task_number, task in enumerate(tasks, start=1):
        data = task["data"].items()
        row = {key: value for key, value in data if isinstance(value, str | int | float)}
        try:
            annotations = [item for item in task["annotations"] if not item.get("was_cancelled")]
            task_answers = _answers(annotations[0]) if annotations else {}
        except (AttributeError, KeyError, TypeError) as error:
            raise SourceError(
                f"{table_path}: the annotations of task {task_number:,} are not as Label Studio "
                f"exports them ({type(error).__name__}: {error}). Export the project as JSON once "
                "more"
            ) from error
        n_several += len(annotations) > 1
        controls |= dict.fromkeys(task_answers)
        rows.append(row | task_answers)
    if not controls:
        raise SourceError(
            f"{table_path}: tasks of Label Studio without an answer for a whole image (<Choices>). "
            "Boxes: export the project as COCO, and set images.boxes: {}"
        )
    frame = pd.DataFrame(rows, dtype=object)
    for control in controls:
        is_list = frame[control].map(lambda answer: isinstance(answer, list)).astype(bool)
        choices = frame.loc[is_list, control]
        # Lists, of which each has one choice at most, are no target of several labels.
        if (choices.map(len) <= 1).all():
            frame.loc[is_list, control] = choices.map(lambda choice: next(iter(choice), None))
    notes = [f"{table_path.name}: tasks of Label Studio; their answers: {', '.join(controls)}"]
    if n_several:
        notes.append(
            f"{table_path.name}: {count_text(n_several, 'task has', 'tasks have')} several "
            "annotations: the first counts"
        )
    return frame, tuple(notes)


def _answers(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """Return {control: answer for the whole image}.

    Raises AttributeError, KeyError or TypeError for an annotation of another form.
    """
    answers = {}
    for result in annotation.get("result", []):
        value = result.get("value", {})
        # An answer with a position in the image is that of a region.
        if result.get("type") in value and not {"x", "points", "rle"} & set(value):
            answers[result["from_name"]] = value[result["type"]]
    return answers


def local_names(addresses: "pd.Series[Any]", image_root: Path) -> "pd.Series[Any]":
    """Return the addresses of images on Label Studio's server, or in a cloud's storage
    (`gs://bucket/cats/1.jpg`), as paths below `image_root`.

    An upload is the file of its name, or of its name before it was uploaded. A local file is the
    one whose path is the end of the address, or ends with the whole address. Other texts stay, as
    do addresses that fit no file, or several.
    """
    is_address = addresses.astype(str).str.fullmatch(_ADDRESS.pattern)
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
        paths = paths_by_name.get(name, ())
        lengths = {path: _common_end(path.split("/"), [*folders, name]) for path in paths}
        longest = max(lengths.values(), default=0)
        fitting = [path for path, length in lengths.items() if 0 < length == longest]
        # Of several, nobody knows which one the label is of: the row becomes a recorded failure.
        return fitting[0] if len(fitting) == 1 else address

    return addresses.where(~is_address, addresses.map(local_name, na_action="ignore"))


def _common_end(path: Sequence[str], other_path: Sequence[str]) -> int:
    """Return the number of parts of the shorter path if the longer one ends with it, else 0."""
    # All parts of the shorter one must agree: test/a.jpg is not train/a.jpg.
    length = min(len(path), len(other_path))
    return length if list(path[-length:]) == list(other_path[-length:]) else 0
