"""Content hashes of images that are to be predicted, by the index of a cache."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.extract.images.content_hashes import content_hashes, indexed_hashes
from headrace.pipelines.paths import content_index


def known_contents(files: Sequence[tuple[str, str]], cache_root: Path) -> npt.NDArray[np.bytes_]:
    """Return the content hash (n,) S32 of each image, empty where its file cannot be read.

    files: path and text of the stamp of each. A file that the index knows by both is not opened.
    The others are read and hashed, and remembered where the cache can be written to.
    """
    index = content_index(cache_root)
    hashes = indexed_hashes(files, index)
    unknown_rows = [row for row, content_hash in enumerate(hashes) if content_hash is None]
    if unknown_rows:
        paths = [files[row][0] for row in unknown_rows]
        samples = pd.DataFrame({"id": paths, "path": paths})
        found = content_hashes(samples, index, keep=os.access(cache_root, os.W_OK)).hashes
        for row, content_hash in zip(unknown_rows, found, strict=True):
            hashes[row] = content_hash
    return np.array([content_hash or "" for content_hash in hashes], "S32")
