"""What labelling tools export, and known data sets as they come, are read as they are."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.pixels import png

from headrace.extract.errors import SourceError
from headrace.extract.images.locators import locator_file
from headrace.extract.sources.read import detect_source, read_source


def put(path: Path, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.write_bytes(png(np.zeros((4, 4), np.uint8), 8, 0))
    else:
        path.write_text(text)


def task(image, *annotations, **data):
    """A task of Label Studio; an annotation is a dict of controls and values, None if skipped."""
    return {
        "id": 1,
        "data": {"image": image, **data},
        "annotations": [
            {
                "was_cancelled": values is None,
                "result": [
                    {"from_name": name, "type": kind, "value": {kind: value}}
                    for name, (kind, value) in (values or {}).items()
                ],
            }
            for values in annotations
        ],
    }


def files(samples, folder):
    return [str(Path(locator_file(path)).relative_to(folder)) for path in samples["path"]]


def test_tasks_of_label_studio(tmp_path):
    """The answers are columns; addresses of uploads and of local files are the images below the
    table, under the names that they had or have; a skipped annotation is none.
    """
    for name in ("images/a.jpg", "images/b c.jpg", "one/d.jpg", "two/d.jpg"):
        put(tmp_path / name)
    choice = {"choice": ("choices", ["cat"]), "stars": ("rating", 4)}
    tasks = [
        task("/data/upload/3/0a1b2c3d-a.jpg", choice, camera="k1"),
        task("/data/local-files/?d=images/b%20c.jpg", None, choice),
        task("/data/local-files/?d=media/two/d.jpg", choice, choice),
        task("/data/upload/3/00000000-e.jpg", None),
    ]
    put(tmp_path / "export.json", json.dumps(tasks))
    listing = read_source(detect_source(tmp_path / "export.json"))
    samples = listing.samples
    assert files(samples[:3], tmp_path) == ["images/a.jpg", "images/b c.jpg", "two/d.jpg"]
    assert samples["id"][3] == "/data/upload/3/00000000-e.jpg"  # which is not there
    assert samples["choice"].tolist()[:3] == ["cat"] * 3
    assert samples["stars"].tolist()[:3] == [4] * 3
    assert samples["camera"][0] == "k1"
    assert samples[["choice", "stars"]].isna().all(axis=1).tolist() == [False] * 3 + [True]
    assert any("1 task has several annotations" in note for note in listing.notes)


def test_an_address_is_never_another_file_of_its_name(tmp_path):
    """Of two sides of a split, of folders whose names end alike, of a file further down."""
    for name in ("train/a.jpg", "t/b.jpg", "c.jpg", "x/c.jpg", "x/y/d.jpg"):
        put(tmp_path / name)
    ends = ["train/a.jpg", "test/a.jpg", "cat/b.jpg", "m/x/c.jpg", "y\\d.jpg"]
    tasks = [
        task(f"/data/local-files/?d={end}", {"c": ("choices", ["z"])}, age=0.5) for end in ends
    ]
    put(tmp_path / "t.json", json.dumps(tasks))
    samples = read_source(detect_source(tmp_path / "t.json")).samples
    assert samples["id"].tolist() == [
        "train/a.jpg",
        "/data/local-files/?d=test/a.jpg",
        "/data/local-files/?d=cat/b.jpg",
        "x/c.jpg",
        "x/y/d.jpg",
    ]
    assert samples["age"].tolist() == [0.5] * 5


def test_a_task_of_label_studio_without_a_choice_is_a_row_without_a_label(tmp_path):
    """Where no task has two choices, they are labels and no lists, and an empty answer is none."""
    tasks = [task(f"{n}.jpg", {"c": ("choices", ["a"][:n])}) for n in range(2)]
    put(tmp_path / "t.json", json.dumps(tasks))
    labels = read_source(detect_source(tmp_path / "t.json")).samples["c"]
    assert labels.isna().tolist() == [True, False]
    assert labels[1] == "a"


def test_several_choices_of_label_studio_are_lists(tmp_path):
    """For task.kind: multi; boxes alone are refused, with the export that has them."""
    tasks = [task(f"{n}.jpg", {"c": ("choices", ["a", "b"][: n + 1])}) for n in range(2)]
    put(tmp_path / "t.json", json.dumps(tasks))
    samples = read_source(detect_source(tmp_path / "t.json")).samples
    assert samples["c"].tolist() == [["a"], ["a", "b"]]
    tasks[0]["annotations"][0]["result"][0]["value"] = {"x": 1, "choices": ["a"]}
    put(tmp_path / "t.json", json.dumps(tasks[:1]))
    with pytest.raises(SourceError, match="export the project as COCO"):
        read_source(detect_source(tmp_path / "t.json"))


@pytest.mark.parametrize(
    "annotation",
    [
        5,
        {"result": [5]},
        {"result": None},
        {"result": [{"type": [], "value": {}}]},
        {"result": [{"type": "choices", "value": {"choices": ["a"]}}]},
    ],
)
def test_damaged_annotations_of_label_studio_are_named(tmp_path, annotation):
    tasks = [
        task("a.jpg", {"c": ("choices", ["x"])}),
        task("b.jpg") | {"annotations": [annotation]},
    ]
    put(tmp_path / "t.json", json.dumps(tasks))
    with pytest.raises(SourceError, match="annotations of task 2 are not as Label Studio exports"):
        read_source(detect_source(tmp_path / "t.json"))


def test_the_short_exports_of_label_studio(tmp_path):
    """CSV and JSON-MIN have the same addresses; paths of others stay."""
    put(tmp_path / "images/a.jpg")
    put(tmp_path / "t.csv", "image,choice\n/data/upload/1/01234567-a.jpg,x\nimages/b.jpg,y\n")
    samples = read_source(detect_source(tmp_path / "t.csv")).samples
    assert files(samples, tmp_path) == ["images/a.jpg", "images/b.jpg"]


def test_the_lists_of_cub(tmp_path):
    """Labels are the names of classes, the split is that of the lists; folders of other lists are
    no classes. A list with a number twice is refused.
    """
    put(tmp_path / "images.txt", "\ufeff1 001.Auk/a 1.jpg\n3 002.Rail/b.jpg\n2 001.Auk/c.jpg\n")
    put(tmp_path / "image_class_labels.txt", "1 1\n2 1\n3 2\n")
    put(tmp_path / "classes.txt", "1 001.Auk\n2 002.Rail\n")
    put(tmp_path / "train_test_split.txt", "1 1\n2 0\n3 1\n")
    put(tmp_path / "parts/parts.txt", "1 back\n")
    for name in ("001.Auk/a 1.jpg", "002.Rail/b.jpg", "001.Auk/c.jpg"):
        put(tmp_path / "images" / name)
    samples = read_source(detect_source(tmp_path)).samples
    assert samples["id"].tolist() == ["1", "3", "2"]
    assert samples["label"].tolist() == ["001.Auk", "002.Rail", "001.Auk"]
    assert samples["split"].tolist() == ["train", "train", "test"]
    assert all(Path(locator_file(path)).is_file() for path in samples["path"])
    put(tmp_path / "image_class_labels.txt", "1 1\n1 2\n")
    with pytest.raises(SourceError, match="expected lines of a number, each once"):
        read_source(detect_source(tmp_path))


@pytest.mark.parametrize("name", ["_annotations.coco.json", "_classes.csv"])
def test_what_roboflow_exports(tmp_path, name):
    """Each side's own table, COCO or columns of 0 and 1."""
    for side in ("train", "valid", "test"):
        put(tmp_path / side / "1.jpg")
        coco = {
            "images": [{"id": 0, "file_name": "1.jpg"}],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": 0, "image_id": 0, "category_id": 1}],
        }
        text = json.dumps(coco) if name.endswith("json") else "filename, cat, dog\n1.jpg, 1, 0\n"
        put(tmp_path / side / name, text)
    samples = read_source(detect_source(tmp_path)).samples
    assert samples["split"].tolist() == ["test", "train", "valid"]
    assert samples["label" if name.endswith("json") else "cat"].tolist() in (["cat"] * 3, ["1"] * 3)
    assert all(Path(locator_file(path)).is_file() for path in samples["path"])


@pytest.mark.parametrize("name", ["train.manifest", "train.jsonl"])
def test_augmented_manifests_of_sagemaker(tmp_path, name):
    """Their numbers are the classes that the metadata names, several of them a list; images that
    are not on disk are to be downloaded.
    """
    kind = {"type": "groundtruth/image-classification"}
    lines = [
        {
            "source-ref": f"images/{n}.jpg",
            "animal": n,
            "animal-metadata": {"class-name": ["cat", "dog"][n], "confidence": 0.9, **kind},
            "signs": [0, 4][: n + 1],
            "signs-metadata": {"class-map": {"0": "stop", "4": "go"}},
            "weight": 0.5,
        }
        for n in range(2)
    ]
    table = tmp_path / name
    put(table, "\n".join(map(json.dumps, lines)) + "\n")
    samples = read_source(detect_source(table)).samples
    assert files(samples, tmp_path) == ["images/0.jpg", "images/1.jpg"]
    assert samples["animal"].tolist() == ["cat", "dog"]
    assert samples["signs"].tolist() == [["stop"], ["stop", "go"]]
    assert samples["weight"].tolist() == [0.5, 0.5]
    assert not [column for column in samples if column.endswith("-metadata")]
    put(table, table.read_text().replace("images/", "s3://bucket/"))
    with pytest.raises(SourceError, match=r"s3://bucket/0\.jpg: .* Download them"):
        read_source(detect_source(table))


IMAGE_TEXT = r"{'bytes': b'\x89PNG, \' {\n}', 'path': %r}"


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("t.csv", [IMAGE_TEXT % "a.jpg", IMAGE_TEXT % "it's.jpg"]),
        ("t.jsonl", [{"bytes": None, "path": name} for name in ("a.jpg", "it's.jpg")]),
        ("t.json", [{"bytes": None, "path": name} for name in ("a.jpg", "it's.jpg")]),
    ],
)
def test_images_that_datasets_wrote_as_text_are_the_paths_in_them(tmp_path, name, cells):
    """The paths are read, with a note; without them, a message says what keeps the images."""
    save = {
        "t.csv": lambda frame: frame.to_csv(index=False),
        "t.jsonl": lambda frame: frame.to_json(orient="records", lines=True),
        "t.json": lambda frame: frame.to_json(orient="records"),
    }[name]
    put(tmp_path / name, save(pd.DataFrame({"photo": [None, *cells], "label": ["x", "y", "x"]})))
    listing = read_source(detect_source(tmp_path / name))
    assert files(listing.samples, tmp_path) == ["a.jpg", "it's.jpg"]
    assert any("dataset.to_parquet('t.parquet')" in note for note in listing.notes)
    cells = [{"bytes": None, "path": None} if name != "t.csv" else IMAGE_TEXT % None] * 2
    put(tmp_path / name, save(pd.DataFrame({"photo": cells, "label": ["x", "y"]})))
    with pytest.raises(SourceError, match=r"'photo' are images as `datasets` .*to_parquet"):
        read_source(detect_source(tmp_path / name))


LABELS = {"a/1.jpg": "cat", "a/2.jpg": "dog", "b/3.jpg": "cat"}


@pytest.mark.parametrize(
    "values",
    [
        LABELS,
        {path: {"label": label, "site": 3} for path, label in LABELS.items()},
        {f"{path}99": {"filename": path, "label": label} for path, label in LABELS.items()},
        {"cat": ["a/1.jpg", "b/3.jpg"], "dog": ["a/2.jpg"]},
        [[path, label, 7] for path, label in LABELS.items()],
        {"version": 1, "data": [{"path": path, "label": LABELS[path]} for path in LABELS]},
        {"train": [["a/1.jpg", "cat"], ["a/2.jpg", "dog"]], "test": [["b/3.jpg", "cat"]]},
    ],
    ids=["labels", "records", "keyed", "classes", "rows", "below a key", "sides"],
)
def test_json_of_paths_and_labels_in_other_forms(tmp_path, values):
    put(tmp_path / "labels.json", json.dumps(values))
    listing = read_source(detect_source(tmp_path / "labels.json"))
    samples = listing.samples.set_index("id")
    assert samples["label"].to_dict() == LABELS
    assert "labels.json: " in listing.notes[0]
    if "train" in values:
        assert samples["split"].to_dict() == dict(
            zip(LABELS, ["train", "train", "test"], strict=True)
        )


def test_json_of_paths_and_lists_of_labels(tmp_path):
    put(tmp_path / "labels.json", json.dumps({"1.jpg": ["cat", "dog"], "2.jpg": []}))
    samples = read_source(detect_source(tmp_path / "labels.json")).samples
    assert samples["label"].map(list).tolist() == [["cat", "dog"], []]


def test_objects_in_cells_are_columns(tmp_path):
    """As Vertex AI and Hugging Face's metadata have the label."""
    rows = [{"file_name": f"{n}.jpg", "annotation": {"name": "x"}} for n in range(2)]
    put(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, [*rows, {"file_name": "2.jpg"}])))
    samples = read_source(detect_source(tmp_path / "rows.jsonl")).samples
    assert samples["annotation.name"].fillna("").tolist() == ["x", "x", ""]


@pytest.mark.parametrize("values", [{"info": {}, "rows": [1]}, [1, 2], {"a": [[1], [2]]}, {}])
def test_json_without_rows_is_refused(tmp_path, values):
    put(tmp_path / "t.json", json.dumps(values))
    with pytest.raises(SourceError):
        read_source(detect_source(tmp_path / "t.json"))
