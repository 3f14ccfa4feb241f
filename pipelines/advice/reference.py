"""How far the images of a run lie from those of another run, in the features of the one network
that both have.

The other run stands for what the network knows: some images of what it was trained on, or an
earlier task that went well. N images of the run, M of the reference, D features, standardised by
the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import open_feature_set
from headrace.heads.data.features import load_rows
from headrace.pipelines.selection.estimate import Estimate

Floats = npt.NDArray[np.float64]
Content = npt.NDArray[np.bytes_]

ROWS = 1000  # images of either run that are compared, drawn at random
LEAST = 20  # fewer, and the nearest of them says little
RESAMPLES = 400


class NoReference(HeadraceError, ValueError):
    """The two runs have nothing that could be compared."""


@dataclass(frozen=True)
class ReferenceEvidence:
    """One feature set that both runs have."""

    name: str
    images: int  # of the reference that were compared with
    # How far an image of the run is from the nearest reference image, as a multiple of how far
    # reference images are from each other, both as medians; 1: the run's images lie among the
    # reference's. The interval is of this draw of images.
    ratio: Estimate


def reference_evidence(
    directories: Mapping[str, Sequence[Path]],
    content: Content,
    reference: Mapping[str, Sequence[Path]],
    reference_content: Content,
    *,
    seed: int = 0,
) -> tuple[ReferenceEvidence, ...]:
    """One per feature set of both, maps left out, in the order of `directories`.

    directories, reference: feature sets by name, of the run and of the reference; those with one
    fingerprint are the same. Images that both runs have are left out of the reference. Raises
    NoReference, saying what is missing.
    """
    theirs = {open_feature_set(views[0]).spec.fingerprint: views[0] for views in reference.values()}
    shared = {}
    for name, views in directories.items():
        spec = open_feature_set(views[0]).spec
        if spec.reduction != "map" and spec.fingerprint in theirs:
            shared[name] = views[0], theirs[spec.fingerprint]
    if not shared:
        raise NoReference(
            f"the runs have no feature set in common: here are {', '.join(directories)}; there are "
            f"{', '.join(reference)}. Run the reference's images through the same backbones "
            "(weights, image_size, mean, std) and taps"
        )
    others = np.setdiff1d(reference_content, content)
    draw = np.random.default_rng(seed)
    own, other = (np.sort(draw.permutation(np.unique(each))[:ROWS]) for each in (content, others))
    if min(len(own), len(other)) < LEAST:
        raise NoReference(
            f"{len(own):,} images are to be compared with {len(other):,} that only the reference "
            f"has; at least {LEAST} of each are needed: give a run on other images"
        )
    found = []
    for name, (here, there) in shared.items():
        ratio = distance_ratio(_rows(here, own), _rows(there, other), seed=seed)
        found.append(ReferenceEvidence(name, len(other), ratio))
    return tuple(found)


def distance_ratio(
    own: npt.NDArray[Any], reference: npt.NDArray[Any], *, seed: int = 0
) -> Estimate:
    """Median distance of rows (N, D) to their nearest reference row (M, D), over that of reference
    rows to each other.
    """
    mean, deviation = reference.mean(0), reference.std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    own, reference = (((each - mean) / deviation).astype(np.float64) for each in (own, reference))
    away, among = _nearest(own, reference, same=False), _nearest(reference, reference, same=True)
    draw = np.random.default_rng(seed)
    draws = [
        _ratio(
            draw.choice(away, len(away)), draw.choice(among, len(among))
        )  # the neighbours stay what they are
        for _ in range(RESAMPLES)
    ]
    return Estimate(_ratio(away, among), np.array(draws))


def reference_text(evidence: Sequence[ReferenceEvidence]) -> str:
    """What the latest feature set of both says, in words."""
    last = evidence[-1]
    low, value, high = last.ratio.low, last.ratio.value, last.ratio.high
    verdict = "they lie among them" if low <= 1 else "they lie further out than those lie apart"
    return (
        f"On {last.name} an image is {value:.2f} times (95 % interval {low:.2f} to {high:.2f}) as "
        f"far from the nearest of {last.images:,} reference images as those are from each other: "
        f"{verdict}."
    )


def _ratio(away: Floats, among: Floats) -> float:
    return float(np.median(away) / max(float(np.median(among)), 1e-12))


def _nearest(rows: Floats, reference: Floats, *, same: bool) -> Floats:
    """(N,) the distance of each row to the nearest reference row; same: to the nearest
    other one.
    """
    squares = (rows**2).sum(1)[:, None] + (reference**2).sum(1)[None] - 2 * rows @ reference.T
    if same:
        np.fill_diagonal(squares, np.inf)
    return np.asarray(np.sqrt(np.maximum(squares.min(1), 0)))


def _rows(directory: Path, content: Content) -> npt.NDArray[np.float32]:
    return load_rows([directory], content)[0]
