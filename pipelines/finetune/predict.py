"""A trained network on images of a run."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from headrace.heads.data.task import Task
from headrace.pipelines.finetune.data import ImageSource, image_paths
from headrace.pipelines.finetune.persist import TrainedNetwork, load_network
from headrace.pipelines.paths import RunPaths

ROWS_AT_ONCE = 32


def predict_rows(
    paths: RunPaths,
    key: str,
    task: Task,
    *,
    temperature: float,
    trust_code: Collection[str] | None = None,
) -> npt.NDArray[np.float32]:
    """(N, C) predictions of a task's rows by the network that was trained on all training rows,
    from the images.

    temperature: in place of the network's own. trust_code: as of `load_network`. Raises SourceError
    for an image that is no longer there.
    """
    content = task.content
    network = dataclasses.replace(
        load_network(paths.finetune_model(key), trust_code=trust_code), temperature=temperature
    )
    return predict_paths(network, image_paths(paths.finetune_images, content), content)


def predict_paths(
    trained: TrainedNetwork, images: Sequence[str], content: npt.NDArray[np.bytes_]
) -> npt.NDArray[np.float32]:
    """(N, C) predictions of images by path, whose content is checked against the hashes."""
    source = ImageSource(content, images, trained.preprocessing)
    parts = [
        trained.predict_proba(batch.inputs)
        for batch in source.batches(np.arange(len(content)), ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)
