"""Augmented manifests of SageMaker: the names of classes in place of their numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

_METADATA = "-metadata"  # ends the key of what is known about a label: `animal`, `animal-metadata`


def with_class_names(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of JSON lines, with the names of classes where metadata beside a label has
    them, and without that metadata; other records stay as they are.

    The metadata names one class (`class-name`), or has a name for each number (`class-map`).
    """
    return [_named(record) for record in records]


def _named(record: Mapping[str, Any]) -> dict[str, Any]:
    if "source-ref" not in record:
        return dict(record)
    named = dict(record)
    for key, metadata in record.items():
        label = key.removesuffix(_METADATA)
        if label == key or label not in record or not isinstance(metadata, dict):
            continue
        del named[key]
        class_map = metadata.get("class-map")
        numbers = record[label]
        if "class-name" in metadata:
            named[label] = metadata["class-name"]
        elif isinstance(class_map, dict) and isinstance(numbers, list):  # several labels
            named[label] = [class_map.get(str(number), number) for number in numbers]
    return named
