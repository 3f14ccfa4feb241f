"""The images that predict is given: each row of the predictions is one image's, also where two
sources use one name.
"""

import json
from pathlib import Path

import pytest

from headrace.extract.errors import SourceError
from headrace.extract.images.crops import Crop
from headrace.extract.sources.regions import Boxes, Tiles
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.image_parts import ImageParts, parts_fields, read_image_parts
from headrace.pipelines.predict.listing import list_images, whole_images_note


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_two_tables_that_count_their_rows(tmp_path):
    """Names that stand for two images have the table's path before them; others stay as
    they are.
    """
    first = write(tmp_path / "a.csv", "id,path\n1,x.png\n2,y.png\n")
    second = write(tmp_path / "b.csv", "id,path\n1,z.png\n3,w.png\n")
    listing = list_images([first, second])
    assert listing.samples["file"].tolist() == [f"{first}/1", "2", f"{second}/1", "3"]
    assert [Path(path).name for path in listing.samples["path"]] == [
        "x.png",
        "y.png",
        "z.png",
        "w.png",
    ]
    assert listing.found == 4


def test_the_same_image_twice_has_one_name(tmp_path):
    """And both its rows."""
    table = write(tmp_path / "t.csv", "path\nx.png\ny.png\nx.png\n")
    assert list_images([table]).samples["file"].tolist() == ["x.png", "y.png", "x.png"]


def test_what_is_no_source_is_named(tmp_path):
    with pytest.raises(
        SourceError, match=r"nothing: no such file or folder. Give a folder of images, a table"
    ):
        list_images([tmp_path / "nothing"])


def test_whole_images_for_a_model_of_parts_are_told():
    """Their predictions are of what no head was trained on; tiles are cut by themselves."""
    part = Crop(0, 0, 8, 8).locator("a.png")
    for boxes, columns in (
        ("auto", "x, y, width, height"),
        (Boxes(("l", "t", "r", "b"), "xyxy"), "l, t, r, b"),
    ):
        (note,) = whole_images_note(ImageParts(boxes=boxes), ["a.png", part, "b.png"])
        assert note.startswith("2 images are predicted as a whole")
        assert note.endswith(columns)
        assert whole_images_note(ImageParts(boxes=boxes), [part]) == []
    assert whole_images_note(ImageParts(tiles=Tiles(8)), ["a.png"]) == []
    assert whole_images_note(None, ["a.png"]) == []


@pytest.mark.parametrize(
    "parts",
    [
        ImageParts(tiles=Tiles(16, 4, "white", 0.5)),
        ImageParts(boxes=Boxes(("l", "t", "r", "b"), "xyxy", "pixels")),
        ImageParts(boxes="auto"),
        ImageParts(min_confidence=0.2),
    ],
)
def test_a_description_holds_the_parts_of_images(parts):
    """As JSON; what a stranger's file has there instead is refused."""
    fields = json.loads(json.dumps(parts_fields(parts)))["image_parts"]
    assert read_image_parts(fields, Path("model")) == parts
    for wrong in (
        {"tiles": {"size": 8.5}},
        {"tiles": {"size": 1}},  # a row for each pixel
        {"tiles": {"size": 512, "overlap": 511}},
        {"boxes": {"columns": "x"}},
        {"min_confidence": 2},
    ):
        with pytest.raises(ModelError, match=r"model: the boxes or tiles .* are none of this"):
            read_image_parts(fields | wrong, Path("model"))
    assert read_image_parts(None, Path("model")) is None
    assert parts_fields(None) == {}
