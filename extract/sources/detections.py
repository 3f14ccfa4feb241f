"""Boxes that a detector of animals has found (MegaDetector, SpeciesNet), in the place of images."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from headrace.cache.count_text import count_text
from headrace.extract.errors import SourceError
from headrace.extract.images.crops import Crop
from headrace.extract.images.locators import locator_file
from headrace.extract.sources.listing import Listing, Tally
from headrace.extract.sources.regions import part_rows

MIN_CONFIDENCE = 0.2  # what MegaDetector 5 recommends
_ANIMAL = "animal"
_EXPECTED = (
    'expected MegaDetector\'s results: {"images": [{"file": "a/1.jpg", "detections": [{"category": '
    '"1", "conf": 0.9, "bbox": [x, y, width, height]}]}], "detection_categories": {"1": "animal"}},'
    " with boxes in shares of the image, or what SpeciesNet or Microsoft's megadetector writes"
)


def cut_detections(listing: Listing, detections_path: Path, min_confidence: float) -> Listing:
    """Return a listing of the detected boxes instead of their images.

    A row has the columns of its image, the id `ID#x,y,width,height`, a locator, and
    `detection_confidence`. If the file has the category animal, other detections (people, vehicles)
    are left out. An image is found in the file by the last parts of its path, so images may have
    been moved into folders since; of several images that fit a file only the one that fits best
    gets its boxes.

    min_confidence: 0 to 1; detections of less are left out.

    Raises SourceError for a file that is not MegaDetector's, or names none of the images.
    """
    boxes_of_file = _read_detections(detections_path, min_confidence)
    rows: list[int] = []
    names: list[str] = []
    paths: list[str] = []
    confidences: list[float] = []
    tally = Tally()
    id_column, path_column = listing.samples["id"].tolist(), listing.samples["path"].tolist()
    detected_files = _match(map(locator_file, path_column), boxes_of_file)
    for row, (name, path, detected_file) in enumerate(
        zip(id_column, path_column, detected_files, strict=True)
    ):
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
        f"{count_text(n_images, 'image has', 'images have')} "
        f"{count_text(len(samples), 'detection')} of {min_confidence:g} and more "
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
    """Return for each image the file of the results whose last path parts agree most with its own.

    None if no file has its name, or if another image agrees more with that file; "" if several
    files, or several images, agree equally.
    """
    files_of_name: dict[str, list[str]] = {}
    for file in detected_files:
        files_of_name.setdefault(PurePosixPath(file).name, []).append(file)
    nearest = [
        _nearest(image_file, files_of_name.get(PurePosixPath(image_file).name, []))
        for image_file in image_files
    ]
    # Two images may claim one file, a copy in another folder say: the boxes are of one of them.
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
    """Return the largest number of last path parts that an image shares with a candidate, and the
    candidates that share as many.
    """
    parts = PurePosixPath(image_file).parts[::-1]

    def shared(file: str) -> int:
        pairs = zip(parts, PurePosixPath(file).parts[::-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    n_shared = [shared(file) for file in candidates]
    best = max(n_shared, default=0)
    return best, [file for file, n in zip(candidates, n_shared, strict=True) if n == best]


def _crop(bbox: Any, has_corners: bool) -> Crop:
    """Return a box in shares of the image, or by its corners in pixels."""
    left, top, width, height = map(float, bbox)
    if not all(map(math.isfinite, (left, top, width, height))):
        raise ValueError(f"the bbox {bbox}")
    if has_corners:
        return Crop(left, top, width - left, height - top, "pixels")
    return Crop(left, top, width, height, "fraction")


def _read_detections(path: Path, min_confidence: float) -> dict[str, list[tuple[Crop, float]]]:
    """Return boxes and confidences by file, the surest first."""
    try:
        results: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        # MegaDetector's own results are an object, and Microsoft's command of that name writes a
        # list, with names of categories, and corners in pixels; SpeciesNet writes `predictions`.
        is_list = isinstance(results, list)
        images = results if is_list else results.get("predictions") or results["images"]
        categories = {} if is_list else results.get("detection_categories") or {}
        found_of_file: dict[str, list[tuple[str, Crop, float]]] = {}
        for image in images:
            # `detections` is null for an image that the detector could not read.
            found = [
                (
                    str(detection.get("label") or categories.get(category, category)).lower(),
                    _crop(detection["bbox"], is_list),
                    float(detection["confidence" if is_list else "conf"]),
                )
                for detection in image.get("detections") or []
                for category in [str(detection["category"])]
            ]
            file = str(image["filepath"] if "filepath" in image else image["file"])
            found_of_file[file.replace("\\", "/")] = sorted(found, key=lambda box: -box[2])
        names = {name for found in found_of_file.values() for name, _, _ in found}
        has_animals = _ANIMAL in {*names, *(str(name).lower() for name in categories.values())}
        boxes_of_file = {
            file: [
                (crop, confidence)
                for name, crop, confidence in found
                if confidence >= min_confidence and (name == _ANIMAL or not has_animals)
            ]
            for file, found in found_of_file.items()
        }
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror} (images.detections)") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"{path}: {type(error).__name__}: {error}; {_EXPECTED}"
        raise SourceError(text) from error
    crops = [crop for boxes in boxes_of_file.values() for crop, _ in boxes]
    # Shares of an image are 1 at most, but for rounding; larger numbers are pixels.
    shares = [crop for crop in crops if crop.unit == "fraction"]
    if any(max(crop.left, crop.top, crop.width, crop.height) > 1.01 for crop in shares):
        raise SourceError(f"{path}: boxes in pixels; {_EXPECTED}")
    return boxes_of_file
