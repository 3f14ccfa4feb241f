"""MegaDetector's results as boxes of the images that they are of."""

import json

import pytest

from headrace.extract.errors import SourceError
from headrace.extract.images.crops import Crop
from headrace.extract.sources.read import detect_source, read_source


def results(path, images, **other):
    """A file of results; images: {file: [(category, confidence, box)]}, None where one failed."""
    entries = [
        {
            "file": file,
            "detections": found
            and [
                {"category": category, "conf": confidence, "bbox": box}
                for category, confidence, box in found
            ],
        }
        for file, found in images.items()
    ]
    names = {"1": "animal", "2": "person", "3": "vehicle"}
    path.write_text(json.dumps({"images": entries, "detection_categories": names} | other))
    return path


@pytest.fixture
def photos(tmp_path):
    """Photos that were sorted into classes after detection, of cameras that reuse names."""
    for name in ("fox/1.jpg", "fox/2.jpg", "lynx/cam1/3.jpg", "lynx/cam2/3.jpg", "lynx/9.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"\xff\xd8\xff")
    return tmp_path / "photos"


def listed(photos, path, **options):
    return read_source(detect_source(photos, detections=path, layout="classes", **options))


def test_animals_are_rows_and_everything_is_counted(photos, tmp_path):
    """Wherever the images were when they were detected, also under Windows."""
    path = results(
        tmp_path / "md.json",
        {
            "C:\\trap\\1.jpg": [("1", 0.5, [0.1, 0.2, 0.3, 0.4]), ("1", 0.9, [0.5, 0, 0.5, 0.5])],
            "C:\\trap\\2.jpg": [("1", 0.1, [0, 0, 1, 1]), ("2", 0.9, [0, 0, 1, 1])],
            "old/cam1/3.jpg": [("1", 0.8, [0, 0, 0.1, 0.1])],
            "old/cam2/3.jpg": None,
        },
    )
    listing = listed(photos, path)
    assert listing.samples["id"].tolist() == [
        "fox/1.jpg#0.5,0,0.5,0.5;fraction",
        "fox/1.jpg#0.1,0.2,0.3,0.4;fraction",
        "lynx/cam1/3.jpg#0,0,0.1,0.1;fraction",
    ]
    assert listing.samples["label"].tolist() == ["fox", "fox", "lynx"]
    assert listing.samples["detection_confidence"].tolist() == [0.9, 0.5, 0.8]
    crop = Crop(0.5, 0, 0.5, 0.5, "fraction")
    assert listing.samples["path"][0] == crop.locator(str(photos / "fox/1.jpg"))
    reasons = {reason.reason: reason.count for reason in listing.left_out}
    assert reasons == {
        "images without a detection of 0.2 and more": 2,
        "images that md.json does not name": 1,
    }
    assert listing.found == len(listing.samples) + sum(reasons.values())
    assert len(listed(photos, path, min_confidence=0.05).samples) == 4


def test_what_is_no_such_file_is_said(photos, tmp_path):
    other = results(tmp_path / "other.json", {"x/77.jpg": [("1", 0.9, [0, 0, 1, 1])]})
    with pytest.raises(SourceError, match=r"no image has a box .*The file names x/77.jpg"):
        listed(photos, other)
    pixels = results(tmp_path / "pixels.json", {"1.jpg": [("1", 0.9, [10, 20, 300, 400])]})
    with pytest.raises(SourceError, match="boxes in pixels; expected MegaDetector's results"):
        listed(photos, pixels)
    (tmp_path / "list.json").write_text('["1.jpg"]')
    with pytest.raises(SourceError, match=r"list.json: AttributeError.*expected MegaDetector"):
        listed(photos, tmp_path / "list.json")
    (tmp_path / "deep.json").write_text("[" * 10_000)
    with pytest.raises(SourceError, match="RecursionError"):
        listed(photos, tmp_path / "deep.json")
    with pytest.raises(SourceError, match="No such file"):
        listed(photos, tmp_path / "gone.json")


def test_cameras_reuse_names(photos, tmp_path):
    """Photos of a camera that the results do not have are given no boxes of another's."""
    box = [("1", 0.9, [0, 0, 0.5, 0.5])]
    one_camera = results(tmp_path / "md.json", {"cam1/3.jpg": box, "9.jpg": box})
    listing = listed(photos, one_camera)
    assert listing.samples["image"].tolist() == ["lynx/9.jpg", "lynx/cam1/3.jpg"]
    elsewhere = listed(photos, results(tmp_path / "md.json", {"cam7/3.jpg": box, "9.jpg": box}))
    assert elsewhere.samples["image"].tolist() == ["lynx/9.jpg"]
    assert "2 images that md.json names ambiguously" in "; ".join(map(str, elsewhere.left_out))


def test_numbers_that_no_detector_writes(photos, tmp_path):
    nan = results(tmp_path / "nan.json", {"1.jpg": [("1", 0.9, [float("nan"), 0, 1, 1])]})
    with pytest.raises(SourceError, match=r"nan.json: ValueError: the bbox \[nan, 0, 1, 1\]"):
        listed(photos, nan)
    numbered = results(tmp_path / "numbered.json", {"1.jpg": [(1, 0.9, [0, 0, 1, 1])]})
    assert listed(photos, numbered).samples["image"].tolist() == ["fox/1.jpg"]


def test_results_of_speciesnet(photos, tmp_path):
    """It names files `filepath`, and each detection's category beside its number."""
    found = [
        {"category": "1", "label": "animal", "conf": 0.9, "bbox": [0, 0, 0.5, 0.5]},
        {"category": "2", "label": "human", "conf": 0.9, "bbox": [0.5, 0, 0.5, 0.5]},
    ]
    predictions = [{"filepath": "cam/1.jpg", "detections": found, "prediction": "x;y"}]
    predictions.append({"filepath": "cam/9.jpg", "failures": ["DETECTOR"]})
    (tmp_path / "s.json").write_text(json.dumps({"predictions": predictions}))
    samples = listed(photos, tmp_path / "s.json").samples
    assert samples["id"].tolist() == ["fox/1.jpg#0,0,0.5,0.5;fraction"]


def test_results_of_microsofts_command(photos, tmp_path):
    """A list, with names of categories, and corners in pixels."""
    found = [
        {"category": "animal", "confidence": 0.9, "bbox": [10, 20, 110, 70]},
        {"category": "person", "confidence": 0.9, "bbox": [0, 0, 9, 9]},
    ]
    (tmp_path / "m.json").write_text(json.dumps([{"file": "x/1.jpg", "detections": found}]))
    samples = listed(photos, tmp_path / "m.json").samples
    assert samples["id"].tolist() == ["fox/1.jpg#10,20,100,50"]
    assert samples["path"].tolist() == [Crop(10, 20, 100, 50).locator(str(photos / "fox/1.jpg"))]
