"""`headrace init` on folders and tables as public data sets have them: what could be taken for
classes, sides of a split or images, and is none.
"""

import base64
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from headrace.extract.errors import SourceError
from headrace.pipelines.cli.detect.source import detect_recipe
from headrace.pipelines.cli.init import write_recipe
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.planning.dataset import list_samples
from headrace.pipelines.recipe.load import load_recipe


def save_images(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(folder / name, "PNG")


def written(source, **options):
    """(recipe, its samples, notes) that init makes of a source."""
    recipe_path = source.parent / "recipe.yaml"
    finding = write_recipe(source, recipe_path, force=True, **options)
    recipe = load_recipe(recipe_path)
    return recipe, list_samples(recipe), finding.notes


def excluded(message):
    """The options --exclude that a message names."""
    words = shlex.split(message[message.index("--exclude") :].partition(")")[0])
    return tuple(words[1::2])


def test_defects_that_only_the_test_images_show(tmp_path):
    """MVTec AD: all images of train are good, and masks lie beside the sides."""
    save_images(
        tmp_path / "bottle",
        *(f"train/good/{n}.png" for n in range(6)),
        *(f"test/{kind}/{n}.png" for kind in ("good", "broken") for n in range(6)),
        *(f"ground_truth/broken/{n}_mask.png" for n in range(6)),
    )
    with pytest.raises(SourceError, match="ground_truth") as refusal:
        written(tmp_path / "bottle")
    assert excluded(str(refusal.value)) == ("ground_truth",)
    recipe, samples, notes = written(tmp_path / "bottle", exclude=("ground_truth",))
    assert recipe.task.split is None
    assert samples["label"].value_counts().to_dict() == {"good": 12, "broken": 6}
    assert any("train are of one class" in note for note in notes)


def test_sets_beside_one_another_are_no_classes_without_a_word(tmp_path):
    names = ("train/good", "train/bad", "test/good", "test/bad")
    save_images(
        tmp_path / "sets", *(f"{s}/{name}/{n}.png" for s in "ab" for name in names for n in "12")
    )
    notes = detect_recipe(tmp_path / "sets", tmp_path).notes
    assert any(note.endswith(f"headrace init {tmp_path / 'sets' / 'a'}") for note in notes)


def test_sides_that_differ_in_a_word_alone(tmp_path):
    """Kaggle's Intel scenes: seg_train/seg_train/forest, and seg_pred without classes."""
    save_images(
        tmp_path / "scenes",
        *(
            f"seg_{s}/seg_{s}/{c}/{n}.png"
            for s in ("train", "test")
            for c in "ab"
            for n in range(6)
        ),
        *(f"seg_pred/seg_pred/{n}.png" for n in range(3)),
    )
    with pytest.raises(SourceError, match="seg_pred") as refusal:
        written(tmp_path / "scenes")
    recipe, samples, _ = written(tmp_path / "scenes", exclude=excluded(str(refusal.value)))
    assert recipe.task.split == "split"
    assert samples.groupby(["split", "label"]).size().to_dict() == {
        (f"seg_{side}", label): 6 for side in ("test", "train") for label in "ab"
    }


def test_a_folder_of_images_in_a_side_is_no_class(tmp_path):
    """Tiny ImageNet: val/images and test/images beside train/CLASS/images."""
    save_images(
        tmp_path / "tiny",
        *(f"train/{c}/images/{c}_{n}.png" for c in "ab" for n in range(6)),
        *(f"{s}/images/{n}.png" for s in ("val", "test") for n in range(4)),
    )
    _, samples, notes = written(tmp_path / "tiny")
    assert samples["label"].value_counts().to_dict() == {"a": 6, "b": 6}
    assert any("val/images is no class of train" in note for note in notes)


def test_a_folder_of_masks_is_no_class(tmp_path):
    """Oxford Pets: annotations/trimaps/1.png beside images/1.jpg."""
    save_images(
        tmp_path / "pets",
        *(f"images/{breed}_{n}.jpg" for breed in ("pug", "beagle") for n in range(4)),
        *(f"annotations/trimaps/{breed}_{n}.png" for breed in ("pug", "beagle") for n in range(4)),
    )
    with pytest.raises(InvalidInput, match="named like masks") as refusal:
        written(tmp_path / "pets")
    command = str(refusal.value).rpartition("headrace init ")[2]
    assert set(written(tmp_path / command)[1]["label"]) == {"pug", "beagle"}
    # Nor are masks the images that a list beside them names.
    rows = [f"{breed}_{n} {k} {k} 1" for k, breed in enumerate(("pug", "beagle")) for n in range(4)]
    (tmp_path / "pets/annotations/list.txt").write_text("\n".join(rows) + "\n")
    with pytest.raises(SourceError, match="separated by blanks") as refusal:
        written(tmp_path / "pets/annotations/list.txt")
    command = re.search(r"\(echo .* > \S+list\.csv", str(refusal.value))[0]
    subprocess.run(command, shell=True, check=True)
    recipe, samples, _ = written(tmp_path / "pets/annotations/list.csv")
    assert recipe.images.path_pattern == "../images/{id}.jpg"
    assert len(samples) == 8
    assert samples["label"].tolist() == list("00001111")


def test_parts_of_names_are_columns_by_the_command_that_is_named(tmp_path):
    """UTKFace: age, gender, race and date."""
    save_images(
        tmp_path / "faces",
        *(f"{20 + n}_{n % 2}_{n % 3}_201701{n:02}.jpg.chip.jpg" for n in range(24)),
    )
    with pytest.raises(InvalidInput, match=r"--name-pattern") as refusal:
        written(tmp_path / "faces")
    (pattern,) = shlex.split(str(refusal.value).rpartition("--name-pattern ")[2])
    recipe, samples, notes = written(tmp_path / "faces", name_pattern=pattern)
    assert recipe.task.target == "part2"
    assert samples["part1"].tolist() == [str(20 + n) for n in range(24)]
    assert any("(others: part3)" in note for note in notes)
    with pytest.raises(InvalidInput, match=r"--name-pattern '.*': expected named groups"):
        written(tmp_path / "faces", name_pattern="[a-z]+")


def test_classes_that_differ_in_a_blank_are_told(tmp_path):
    save_images(tmp_path / "p", *(f"{c}/{n}.png" for c in ("Cat", "cat ", "dog") for n in range(2)))
    notes = detect_recipe(tmp_path / "p", tmp_path).notes
    assert any("task.relabel: {Cat: cat}" in note for note in notes)


@pytest.mark.parametrize(
    ("values", "empty", "relabel"),
    [(("1", "-1"), False, {"-1": "0"}), (("1.0", "0.0", "-1.0", ""), True, {"-1": None, "": "0"})],
)
def test_yes_and_no_in_other_numbers(tmp_path, values, empty, relabel):
    """CelebA's and CheXpert's, though a column of few words stands before them."""
    generator = np.random.default_rng(0)
    names = ["Bald", "Smiling", "Young", "Male"]
    cells = {name: generator.choice(values, 40) for name in names}
    cells["Bald"][:] = "1.0" if empty else cells["Bald"]
    save_images(tmp_path, *(f"{n}.png" for n in range(40)))
    frame = pd.DataFrame({"path": [f"{n}.png" for n in range(40)], "Sex": ["f", "m"] * 20, **cells})
    frame.to_csv(tmp_path / "t.csv", index=False)
    recipe, _, notes = written(tmp_path / "t.csv")
    assert recipe.task.target == tuple(names)
    assert recipe.task.relabel == relabel
    assert sum("task.relabel" in note for note in notes) == len(relabel)


@pytest.mark.parametrize(
    ("columns", "target", "told"),
    [
        ({"Width": [40, 41] * 10, "ClassId": list(range(4)) * 5}, "ClassId", "by its name"),
        (
            {"flag": [0, 1] * 10, "Finding Labels": ["a|b", "a", "b", "c"] * 5},
            "Finding Labels",
            "|",
        ),
    ],
)
def test_a_column_with_a_word_for_a_label_in_its_name(tmp_path, columns, target, told):
    """GTSRB and the NIH's chest X-rays."""
    save_images(tmp_path, *(f"{n}.png" for n in range(20)))
    frame = pd.DataFrame({"path": [f"{n}.png" for n in range(20)], **columns})
    frame.to_csv(tmp_path / "t.csv", index=False)
    recipe, _, notes = written(tmp_path / "t.csv")
    assert recipe.task.target == target
    assert any(told in note for note in notes)


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("Usage", ["Training"] * 12 + ["PublicTest"] * 4 + ["PrivateTest"] * 4),
        ("is_valid", [False] * 16 + [True] * 4),
    ],
)
def test_a_split_under_another_name_is_taken(tmp_path, name, cells):
    save_images(tmp_path, *(f"{n}.png" for n in range(20)))
    frame = pd.DataFrame({"path": [f"{n}.png" for n in range(20)], "label": ["a", "b"] * 10})
    frame.assign(**{name: cells}).to_csv(tmp_path / "t.csv", index=False)
    recipe, _, notes = written(tmp_path / "t.csv")
    assert recipe.task.split == name
    assert f"column {name!r} is taken for the split (task.split)" in notes


def test_the_first_word_of_a_cell_may_be_the_label(tmp_path):
    """ImageNet at Kaggle: classes with boxes, of images five folders below the table."""
    save_images(
        tmp_path, *(f"ILSVRC/Data/CLS-LOC/train/n{n % 2}/n{n % 2}_{n}.JPEG" for n in range(8))
    )
    cells = {"ImageId": [f"n{n % 2}_{n}" for n in range(8)]}
    cells["PredictionString"] = [f"n{n % 2} {n} 1 9 9 " for n in range(8)]
    pd.DataFrame(cells).to_csv(tmp_path / "LOC.csv", index=False)
    with pytest.raises(InvalidInput, match="If the first word") as refusal:
        written(tmp_path / "LOC.csv")
    script = re.search(r'python -c "(.*)"`, then', str(refusal.value))[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    recipe, samples, _ = written(tmp_path / "LOC-labels.csv")
    assert recipe.images.path_pattern == "ILSVRC/Data/CLS-LOC/train/n*/{ImageId}.JPEG"
    assert samples["label"].value_counts().to_dict() == {"n0": 4, "n1": 4}


def test_paths_from_a_root_beside_or_below_the_table(tmp_path):
    """Places365: `/a/airfield/1.jpg` in data_large."""
    names = [f"a/airfield/{n}.jpg" for n in range(4)] + [f"b/bakery/{n}.jpg" for n in range(4)]
    save_images(tmp_path / "data_large", *names)
    frame = pd.DataFrame({"path": [f"/{name}" for name in names], "label": [0] * 4 + [1] * 4})
    frame.to_csv(tmp_path / "train.csv", index=False)
    recipe, samples, _ = written(tmp_path / "train.csv")
    assert recipe.images.root == tmp_path / "data_large"
    assert samples["path"].tolist() == [str(tmp_path / "data_large" / name) for name in names]


@pytest.mark.parametrize("suffix", ["npz", "h5"])
def test_arrays_beside_the_images_are_columns(tmp_path, suffix):
    """Slides of patches, without which neighbours stand on both sides of a split."""
    arrays = {
        "imgs": np.arange(24 * 64, dtype=np.uint64).reshape(24, 8, 8).astype(np.uint8),
        "label": np.arange(24) % 2,
        "slide_id": np.array([f"S{n // 3}" for n in range(24)]).astype("S"),
        "coords": np.zeros((24, 2)),
    }
    if suffix == "npz":
        np.savez(tmp_path / "p.npz", **arrays)
    else:
        with h5py.File(tmp_path / "p.h5", "w") as file:
            for name, values in arrays.items():
                file[name] = values
    recipe, samples, _ = written(tmp_path / f"p.{suffix}")
    assert (recipe.task.target, recipe.task.group) == ("label", "slide_id")
    assert samples["slide_id"].tolist() == [f"S{n // 3}" for n in range(24)]
    assert samples.columns.tolist() == ["id", "path", "label", "slide_id"]


def test_pixels_in_cells_keep_the_other_columns(tmp_path):
    """FER2013's Usage."""
    cells = [" ".join(map(str, (np.arange(64) + n).tolist())) for n in range(20)]
    usage = ["Training"] * 12 + ["PublicTest"] * 4 + ["PrivateTest"] * 4
    frame = pd.DataFrame({"emotion": [0, 1] * 10, "pixels": cells, "Usage": usage})
    frame.to_csv(tmp_path / "fer.csv", index=False)
    with pytest.raises(SourceError, match="cells are the pixels") as refusal:
        written(tmp_path / "fer.csv")
    script = re.search(r'python -c "(.*)", and', str(refusal.value))[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    recipe, samples, _ = written(tmp_path / "fer.npz")
    assert (recipe.task.target, recipe.task.split) == ("label", "Usage")
    assert samples["Usage"].tolist() == usage


def test_of_images_with_more_and_fewer_bands_those_of_all_are_read(tmp_path):
    """Some with near infrared: a fourth band is read as transparency, or ends in an error."""
    for label in "ab":
        (tmp_path / "x" / label).mkdir(parents=True)
        for number in range(6):
            pixels = np.full((8, 8, 3 + number % 2), 90 + number, np.uint8)
            tifffile.imwrite(tmp_path / "x" / label / f"{number}.tif", pixels, photometric="rgb")
    recipe, _, notes = written(tmp_path / "x")
    assert recipe.backbones[0].bands == (1, 2, 3)
    assert any("some images have 3 bands and some 4" in note for note in notes)


def test_a_table_with_a_row_for_each_folder(tmp_path):
    """A pathologist's: labels of slides, whose patches lie in a folder each."""
    save_images(tmp_path / "set", *(f"patches/S{s}/{n}.png" for s in range(8) for n in range(3)))
    frame = pd.DataFrame({"slide_id": [f"S{s}" for s in range(9)], "label": list("abcabcabc")})
    frame.to_csv(tmp_path / "set/labels.csv", index=False)
    recipe, samples, notes = written(tmp_path / "set")
    assert recipe.images.path_pattern == "patches/{slide_id}/*"
    assert (recipe.task.target, recipe.task.group) == ("label", "slide_id")
    assert samples["id"].tolist() == [f"patches/S{s}/{n}.png" for s in range(8) for n in range(3)]
    assert samples["label"].tolist() == [label for label in "abcabcab" for _ in range(3)]
    assert any("left out: 1 row that names no image" in note for note in notes)


def test_patients_in_paths_are_groups(tmp_path):
    """CheXpert's table has no column of patients, but its paths name them."""
    names = [f"train/patient{n // 3:03}/study{n % 3}/view1.jpg" for n in range(24)]
    save_images(tmp_path / "CheXpert", *names)
    frame = pd.DataFrame({"Path": [f"CheXpert/{name}" for name in names], "label": ["a", "b"] * 12})
    frame.to_csv(tmp_path / "CheXpert/train.csv", index=False)
    recipe, samples, notes = written(tmp_path / "CheXpert")
    assert recipe.task.group == "patient"
    assert samples["patient"].tolist() == [f"patient{n // 3:03}" for n in range(24)]
    assert any("the sub-folders are those of its patients" in note for note in notes)
    save_images(tmp_path / "x", *(f"{'ab'[n % 2]}/person{n // 3}_{n}.png" for n in range(24)))
    recipe, samples, _ = written(tmp_path / "x")
    assert recipe.task.group == "person"
    assert samples["person"].nunique() == 8
    # Folders of persons to be told apart are classes, and no groups: none could be divided.
    save_images(tmp_path / "faces", *(f"person{n // 3}/{n}.png" for n in range(24)))
    recipe, _, _ = written(tmp_path / "faces")
    assert (recipe.task.target, recipe.task.group) == ("label", None)


@pytest.mark.parametrize("join", ["sorted", "mode"])
def test_rows_of_one_image_are_joined_by_the_command_that_is_named(tmp_path, join):
    """Several species of a photo (Snapshot Serengeti), or several readers of a scan."""
    save_images(tmp_path, *(f"{n}.png" for n in range(6)))
    frame = pd.DataFrame(
        {"path": [f"{n % 6}.png" for n in range(18)], "species": list("aabbab" + "aabbba" * 2)}
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(SourceError, match="more than once") as refusal:
        written(tmp_path / "t.csv")
    scripts = re.findall(r'`python -c "(.*?)"`', str(refusal.value))
    (script,) = (script for script in scripts if join in script)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    recipe, samples, _ = written(tmp_path / "t-joined.csv")
    expected = {"sorted": ["a", "a", "b", "b", "a;b", "a;b"], "mode": list("aabbba")}[join]
    assert samples["species"].tolist() == expected
    assert recipe.task.kind == ("multi" if join == "sorted" else "single")


def test_names_of_numbered_classes_are_taken_from_the_json_beside_them(tmp_path):
    """Flowers' cat_to_name.json; it names no images."""
    save_images(tmp_path / "f", *(f"{c}/{n}.png" for c in (1, 2, 10) for n in range(2)))
    names = {"1": "pink primrose", "2": "canna: lily", "10": "globe thistle", "3": "rose"}
    (tmp_path / "f/cat_to_name.json").write_text(json.dumps(names))
    recipe, _, _ = written(tmp_path / "f")
    assert recipe.task.relabel == {key: names[key] for key in ("1", "2", "10")}


def test_tables_of_the_sides_of_a_split_are_read_together(tmp_path):
    """GTSRB's Train.csv and Test.csv."""
    for side in ("Train", "Test"):
        names = [f"{side}/{n}.png" for n in range(8)]
        save_images(tmp_path / "signs", *names)
        frame = pd.DataFrame({"Path": names, "ClassId": [0, 1] * 4})
        frame.to_csv(tmp_path / f"signs/{side}.csv", index=False)
    recipe, samples, _ = written(tmp_path / "signs")
    assert recipe.task.split == "split"
    assert samples["split"].value_counts().to_dict() == {"Train": 8, "Test": 8}


def test_folders_that_spell_names_are_no_classes(tmp_path):
    """Landmarks: train/0/a/0a1.jpg."""
    ids = [f"{n % 3:x}{n % 4:x}{n:x}f" for n in range(12)]
    save_images(tmp_path / "l", *(f"train/{i[0]}/{i[1]}/{i}.jpg" for i in ids))
    frame = pd.DataFrame({"id": ids, "landmark_id": [7, 9] * 6})
    frame.to_csv(tmp_path / "l/train.csv", index=False)
    recipe, _, _ = written(tmp_path / "l")
    assert recipe.images.path_pattern == "train/*/*/{id}.jpg"
    assert recipe.task.target == "landmark_id"


def test_folders_and_not_names_of_files_are_classes(tmp_path):
    """PlantVillage: raw/color/Apple_scab/0a_FREC 1.JPG, whose names say less than the folders."""
    save_images(
        tmp_path / "p",
        *(f"raw/{v}/{c}/{i}_FREC {n}.JPG" for v in "ab" for c in "cd" for i in "ef" for n in "12"),
    )
    with pytest.raises(InvalidInput, match=r"try: headrace init .*raw"):
        written(tmp_path / "p")


def test_coco_keeps_what_it_says_of_images(tmp_path):
    """A camera's location and sequence; Herbarium's keys are named for what they identify."""
    save_images(tmp_path / "images", *(f"{n}.jpg" for n in range(16)))
    images = [
        {"image_id": n, "file_name": f"{n}.jpg", "width": 8, "seq_id": f"s{n // 2}"}
        for n in range(16)
    ]
    values = {
        "images": images,
        "annotations": [{"image_id": n, "category_id": n % 2} for n in range(16)],
        "categories": [{"category_id": c, "scientificName": f"Quercus {c}"} for c in (0, 1)],
    }
    (tmp_path / "train.json").write_text(json.dumps(values))
    recipe, samples, _ = written(tmp_path / "train.json")
    assert samples.columns.tolist() == ["id", "path", "label", "seq_id"]
    assert samples["label"].tolist() == ["Quercus 0", "Quercus 1"] * 8
    assert recipe.task.group == "seq_id"
    assert samples["path"].tolist() == [str(tmp_path / f"images/{n}.jpg") for n in range(16)]


def test_addresses_in_a_cloud_are_files_that_are_there(tmp_path):
    """Vertex AI's and Azure's tables, after the images were downloaded."""
    names = [f"photos/{c}/{n}.jpg" for c in "ab" for n in range(4)]
    save_images(tmp_path, *names)
    frame = pd.DataFrame({"path": [f"gs://bucket/x/{n}" for n in names], "label": list("aaaabbbb")})
    frame.to_csv(tmp_path / "t.csv", index=False)
    _, samples, _ = written(tmp_path / "t.csv")
    assert samples["path"].tolist() == [str(tmp_path / name) for name in names]


def test_images_in_base64_are_written_by_the_command_that_is_named(tmp_path):
    save_images(tmp_path, "x.png")
    code = base64.b64encode((tmp_path / "x.png").read_bytes()).decode()
    cells = [code, f"data:image/png;base64,{code}"] * 2
    pd.DataFrame({"image": cells, "label": list("abab")}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(SourceError, match="images in base64") as refusal:
        written(tmp_path / "t.csv")
    script = re.search(r'`python -c "(.*)"`', str(refusal.value))[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    _, samples, _ = written(tmp_path / "t-images.csv")
    originals = {Path(path).read_bytes() for path in samples["path"]}
    assert originals == {(tmp_path / "x.png").read_bytes()}
