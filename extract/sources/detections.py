"""Boxes that a detector of animals has found: MegaDetector's results, whose boxes take the place of
the images that they lie in.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from headrace.extract.errors import SourceError
from headrace.extract.images.byte_ranges import locator_file
from headrace.extract.images.crops import Crop
from headrace.extract.sources.listing import Listing, Tally
from headrace.extract.sources.regions import part_rows

MIN_CONFIDENCE = 0.2  # what MegaDetector 5 recommends
_ANIMAL = "animal"
_EXPECTED = (
    'expected MegaDetector\'s results: {"images": [{"file": "a/1.jpg", "detections": [{"category": '
    '"1", "conf": 0.9, "bbox": [x, y, width, height]}]}], "detection_categories": {"1": "animal"}},'
    " with boxes in shares of the image"
)


def cut_detections(listing: Listing, detections_path: Path, min_confidence: float) -> Listing:
    """Return the detected boxes instead of the images: rows with the columns of their image, the id
    `ID#x,y,width,height`, a locator, and `detection_confidence`.

    Where the file knows animals, detections of people and vehicles are no rows. An image is found
    in the file by its path from the end on, so that images may have been moved into folders since;
    of images of one name only the one whose path fits best has its boxes. Raises SourceError for
    another file, and where it names none of the images.
    """
    boxes_of_file = _read_detections(detections_path, min_confidence)
    rows: list[int] = []
    names: list[str] = []
    paths: list[str] = []
    confidences: list[float] = []
    tally = Tally()
    id_column, path_column = listing.samples["id"].tolist(), listing.samples["path"].tolist()
    detected_files = _match(map(locator_file, path_column), boxes_of_file)
    images = zip(id_column, path_column, detected_files, strict=True)
    for row, (name, path, detected_file) in enumerate(images):
        if not detected_file:
            how = "does not name" if detected_file is None else "names ambiguously"
            tally.leave_out(f"images that {detections_path.name} {how}", name)
            continue
        if not boxes_of_file[detected_file]:
            tally.leave_out(f"images without a detection of {min_confidence:g} and more", name)
        for crop, confidence in boxes_of_file[detected_file]:
            rows.append(row)
            names.append(f"{name}#{crop}")
            paths.append(crop.locator(path))
            confidences.append(confidence)
    if not rows:
        example = next(iter(boxes_of_file), "nothing")
        counts = "; ".join(map(str, tally.left_out()))
        raise SourceError(
            f"{detections_path}: no image has a box ({counts}). The file names {example}"
        )
    samples = part_rows(listing.samples, rows, names, paths)
    samples["detection_confidence"] = confidences
    left_out = tally.left_out()
    n_images, n_left_out = len(listing.samples), sum(reason.count for reason in left_out)
    note = (
        f"{n_images:,} images have {len(samples):,} detections of {min_confidence:g} and more "
        f"({detections_path.name}), which are the rows; those of an image have its label, and stay "
        "on one side of every split"
    )
    return replace(
        listing,
        samples=samples,
        found=listing.found + len(samples) - n_images + n_left_out,
        left_out=(*listing.left_out, *left_out),
        notes=(*listing.notes, note),
    )


def _match(image_files: Iterable[str], detected_files: Iterable[str]) -> list[str | None]:
    """Return for each image the detected file that shares most of its path, from the end on; None
    where there is none, or another image shares more with it, "" where two share the same.
    """
    files_of_name: dict[str, list[str]] = {}
    for file in detected_files:
        files_of_name.setdefault(PurePosixPath(file).name, []).append(file)
    nearest = [
        _nearest(image_file, files_of_name.get(PurePosixPath(image_file).name, []))
        for image_file in image_files
    ]
    claims = Counter((file, n_shared) for n_shared, files in nearest for file in files)
    most_shared: dict[str, int] = {}
    for file, n_shared in claims:
        most_shared[file] = max(n_shared, most_shared.get(file, 0))
    matched: list[str | None] = []
    for n_shared, files in nearest:
        best = [file for file in files if most_shared[file] == n_shared]
        is_certain = len(best) == 1 and claims[best[0], n_shared] == 1
        matched.append(best[0] if is_certain else "" if best else None)
    return matched


def _nearest(image_file: str, candidates: Sequence[str]) -> tuple[int, list[str]]:
    """Return how many parts of its path, from the end on, an image shares with those of some files
    that share most, and these.
    """
    parts = PurePosixPath(image_file).parts[::-1]

    def shared(file: str) -> int:
        pairs = zip(parts, PurePosixPath(file).parts[::-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    n_shared = [shared(file) for file in candidates]
    most = max(n_shared, default=0)
    return most, [file for file, n in zip(candidates, n_shared, strict=True) if n == most]


def _crop(bbox: Any) -> Crop:
    left, top, width, height = map(float, bbox)
    if not all(map(math.isfinite, (left, top, width, height))):
        raise ValueError(f"the bbox {bbox}")
    return Crop(left, top, width, height, "fraction")


def _read_detections(path: Path, min_confidence: float) -> dict[str, list[tuple[Crop, float]]]:
    """Return boxes and confidences by file, the surest first."""
    try:
        results: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        categories = results.get("detection_categories") or {}
        animals = {key for key, name in categories.items() if str(name).lower() == _ANIMAL}
        boxes_of_file: dict[str, list[tuple[Crop, float]]] = {}
        for image in results["images"]:
            # null where the detector could not read the image
            found = [
                (_crop(detection["bbox"]), float(detection["conf"]))
                for detection in image.get("detections") or []
                if detection["conf"] >= min_confidence
                and (not animals or str(detection["category"]) in animals)
            ]
            file = str(image["file"]).replace("\\", "/")
            boxes_of_file[file] = sorted(found, key=lambda box: -box[1])
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror} (images.detections)") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{path}: {type(error).__name__}: {error}; {_EXPECTED}"
        raise SourceError(text) from error
    crops = [crop for boxes in boxes_of_file.values() for crop, _ in boxes]
    # a share may round to a little more than the image
    if any(max(crop.left, crop.top, crop.width, crop.height) > 1.01 for crop in crops):
        raise SourceError(f"{path}: boxes in pixels; {_EXPECTED}")
    return boxes_of_file
