"""Every kind of head. A new kind is a folder with a `HeadKind`, and a line in the list below."""

import json
from typing import Any

from headrace.heads.bags.kind import BAGS
from headrace.heads.discriminant.kind import LDA
from headrace.heads.kind import HeadKind
from headrace.heads.linear.kind import LOGISTIC, RIDGE
from headrace.heads.neighbors.kind import CENTROID, KNN
from headrace.heads.networks.kind import CONV, MLP
from headrace.heads.sklearn.kind import SKLEARN
from headrace.heads.spec import HeadSpec

# In the order of a recipe's documentation.
HEAD_KINDS: dict[str, HeadKind] = {
    kind.name: kind for kind in (LOGISTIC, RIDGE, LDA, MLP, CONV, BAGS, KNN, CENTROID, SKLEARN)
}


def spec_from_json(text: str) -> HeadSpec:
    """Return the spec of `spec_to_json`'s text.

    Raises KeyError for an unknown kind, TypeError for unknown fields, and ValueError for a text
    that is no JSON or a choice that a field does not have.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(text).items()
    }
    spec: HeadSpec = HEAD_KINDS[values["kind"]].spec(**values)
    return spec
