"""Distance of a run's images to those of a reference run, in features of a backbone that both have.

The reference represents images that the backbone suits: those that it was trained on, or an earlier
task that went well. N images of the run, M of the reference, D features, standardized by the
reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.cache.count_text import count_text
from headrace.cache.feature_set import open_feature_set
from headrace.heads.arrays import Array, Doubles
from headrace.heads.data.features import load_rows
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.selection.estimate import Estimate

Content = npt.NDArray[np.bytes_]

MAX_IMAGES = 1000  # of each run, drawn at random
MIN_IMAGES = 20  # among fewer, the distance to the nearest image says little
RESAMPLES = 400  # of the distances


@dataclass(frozen=True)
class ReferenceEvidence:
    """Distance between two runs on one feature set."""

    name: str
    images: int  # of the reference
    # Median distance of the run's images to the nearest reference image, divided by the median
    # distance of reference images to the nearest other one; 1: the run's images lie among the
    # reference's. The interval is over this draw of images.
    ratio: Estimate


def reference_evidence(
    feature_paths: Mapping[str, Sequence[Path]],
    content: Content,
    reference_paths: Mapping[str, Sequence[Path]],
    reference_content: Content,
) -> tuple[ReferenceEvidence, ...]:
    """Return the distance on each feature set that both runs have, in the order of `feature_paths`.
    Maps are left out.

    feature_paths: directories of the run's feature sets, by name.
    content: content hashes of the run's images.
    reference_paths, reference_content: those of the reference. Feature sets with the same
    fingerprint are the same.

    Raises InvalidInput, which says what is missing.
    """
    path_by_fingerprint = {
        open_feature_set(views[0]).spec.fingerprint: views[0] for views in reference_paths.values()
    }
    shared_paths = {}
    for name, views in feature_paths.items():
        spec = open_feature_set(views[0]).spec
        if spec.pooling != "map" and spec.fingerprint in path_by_fingerprint:
            shared_paths[name] = views[0], path_by_fingerprint[spec.fingerprint]
    if not shared_paths:
        raise InvalidInput(
            f"the runs have no feature set in common: here are {', '.join(feature_paths)}; there "
            f"are {', '.join(reference_paths)}. Run the reference's images through the same "
            "backbones (weights, image_size, mean, std) and taps"
        )
    # An image that both runs have would be its own nearest one, at distance 0.
    only_reference = np.setdiff1d(reference_content, content)
    generator = np.random.default_rng(0)
    run_sample, reference_sample = (
        np.sort(generator.permutation(np.unique(contents))[:MAX_IMAGES])
        for contents in (content, only_reference)
    )
    if min(len(run_sample), len(reference_sample)) < MIN_IMAGES:
        raise InvalidInput(
            f"{count_text(len(run_sample), 'image is', 'images are')} to be compared with "
            f"{len(reference_sample):,} that only the reference has; at least {MIN_IMAGES} of each "
            "are needed: give a run on other images"
        )
    evidence = []
    for name, (run_path, reference_path) in shared_paths.items():
        ratio = distance_ratio(
            load_rows([run_path], run_sample)[0], load_rows([reference_path], reference_sample)[0]
        )
        evidence.append(ReferenceEvidence(name, len(reference_sample), ratio))
    return tuple(evidence)


def distance_ratio(features: Array, reference: Array) -> Estimate:
    """Return the median distance of rows (N, D) to the nearest reference row (M, D), divided by
    that of reference rows to the nearest other one.
    """
    from sklearn.metrics.pairwise import euclidean_distances

    mean, deviation = reference.mean(0), reference.std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    features, reference = (
        ((rows - mean) / deviation).astype(np.float64) for rows in (features, reference)
    )
    to_reference = euclidean_distances(features, reference).min(1)
    distances = euclidean_distances(reference)
    np.fill_diagonal(distances, np.inf)  # a row is not its own neighbour
    among_reference = distances.min(1)
    generator = np.random.default_rng(0)
    # The distances are resampled, not the images, whose nearest neighbours would change.
    draws = [
        _median_ratio(
            generator.choice(to_reference, len(to_reference)),
            generator.choice(among_reference, len(among_reference)),
        )
        for _ in range(RESAMPLES)
    ]
    return Estimate(_median_ratio(to_reference, among_reference), np.array(draws))


def reference_text(evidence: Sequence[ReferenceEvidence]) -> str:
    """Return a sentence on the last feature set that both runs have, mostly the deepest."""
    last = evidence[-1]
    low, value, high = last.ratio.low, last.ratio.value, last.ratio.high
    verdict = "they lie among them" if low <= 1 else "they lie further out than those lie apart"
    return (
        f"On {last.name} an image is {value:.2f} times (95 % interval {low:.2f} to {high:.2f}) "
        f"as far from the nearest of {count_text(last.images, 'reference image')} as those are "
        f"from each other: {verdict}."
    )


def _median_ratio(to_reference: Doubles, among_reference: Doubles) -> float:
    # The floor is for reference images that are all copies of each other.
    return float(np.median(to_reference) / max(float(np.median(among_reference)), 1e-12))
