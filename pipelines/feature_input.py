"""One input that heads can be given: a feature set in all its views, and the backbone behind it."""

from dataclasses import dataclass
from pathlib import Path

from headrace.extract.spec import BackboneSpec


@dataclass(frozen=True)
class FeatureInput:
    """One input that heads can be given."""

    name: str  # as the leaderboard has it, such as "layer4.avg"
    views: tuple[Path, ...]  # directories of its feature sets in the cache, one per view
    backbone: BackboneSpec | None  # None where it is not known, as for external features
