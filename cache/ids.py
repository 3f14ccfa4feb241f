"""Sample ids of a feature set, which need not be unique."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.text import as_text


def content_hashes_by_id(
    sample_ids: Sequence[str], content_hashes: npt.NDArray[np.bytes_]
) -> dict[str, tuple[str, ...]]:
    """Return {id: its content hashes, in the order of the rows} for N ids and (N,) S32 hashes.

    An id need not be unique: a cache serves several folders, whose images may have the same names,
    and keeps the rows of an image that has been edited. Ids are compared as text of one Unicode
    form, see `as_text`.
    """
    ids = as_text(pd.Series(list(sample_ids), dtype=object))
    id_table = pd.DataFrame({"id": ids, "content": content_hashes.astype("U32")}).drop_duplicates()
    # A groupby of all ids would build a million lists of one; only ambiguous ids are grouped.
    has_several = id_table["id"].duplicated(keep=False)
    single = id_table[~has_several]
    hashes_of_id = {
        sample_id: (content_hash,)
        for sample_id, content_hash in zip(single["id"], single["content"], strict=True)
    }
    return hashes_of_id | {
        str(sample_id): tuple(values)
        for sample_id, values in id_table[has_several].groupby("id", sort=False)["content"]
    }
