"""Sample ids of a feature set, which need not be unique."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.text import as_text


def content_hashes_by_id(
    ids: Sequence[str], content: npt.NDArray[np.bytes_]
) -> dict[str, tuple[str, ...]]:
    """{id: the different content hashes that stand under it, in the order of the rows} of N ids and
    hashes (N,) S32.

    An id need not be unique: a cache serves several folders, whose images may have the same names,
    and keeps the rows of an image that has been edited. Ids are compared as text, in the form of
    `as_text`.
    """
    rows = pd.DataFrame(
        {"id": as_text(pd.Series(list(ids), dtype=object)), "content": content.astype("U32")}
    )
    rows = rows.drop_duplicates()
    several = rows["id"].duplicated(keep=False)
    single = rows[~several]
    found = {name: (value,) for name, value in zip(single["id"], single["content"], strict=True)}
    return found | {
        str(name): tuple(values)
        for name, values in rows[several].groupby("id", sort=False)["content"]
    }
