"""`headrace init` and the demo's files: what is written for what is found, and what is said when
nothing can be.
"""

import functools
import gzip
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from headrace.cache.errors import HeadraceError
from headrace.extract.errors import SourceError
from headrace.extract.sources.listing import notes_on_masks
from headrace.pipelines.cli.demo import solar_cells, write_demo
from headrace.pipelines.cli.detect.source import detect_recipe
from headrace.pipelines.cli.init import write_recipe
from headrace.pipelines.cli.schema import schema
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.planning.dataset import list_samples
from headrace.pipelines.recipe.grid import requested_heads
from headrace.pipelines.recipe.heads import HEAD_GRIDS
from headrace.pipelines.recipe.load import load_recipe


@pytest.fixture(scope="module", autouse=True)
def schema_made_once():
    """The file beside each recipe is the same; test_json.py compares what `init` writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.pipelines.cli.init.schema", functools.cache(schema))
        yield


@pytest.fixture
def photos(tmp_path):
    """Two classes of three images."""
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def rows(**columns):
    """A table of six images."""
    return pd.DataFrame({"path": [f"{n}.png" for n in range(6)], "label": ["x", "y"] * 3} | columns)


def test_a_folder_and_a_table(tmp_path, photos):
    """The recipe that is written loads, and lists the same images."""
    out = tmp_path / "r.yaml"
    write_recipe(photos, out)
    assert len(list_samples(load_recipe(out))) == 6
    rows().to_csv(tmp_path / "t.tsv", sep="\t", index=False)
    write_recipe(tmp_path / "t.tsv", out, force=True)
    recipe = load_recipe(out)
    assert (recipe.images.table, recipe.images.id_column) == (tmp_path / "t.tsv", None)
    assert len(list_samples(recipe)) == 6


def test_a_table_with_ids(tmp_path):
    """`id` tells the rows apart, even where it looks like a file; it is never what is predicted."""
    frame = rows(kind=["p", "q"] * 3).drop(columns="label")
    frame.insert(0, "id", [f"cell{n}.png" for n in range(6)])
    frame.to_csv(tmp_path / "t.csv", index=False)
    write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.images.path_column, recipe.images.id_column, recipe.task.target) == (
        "path",
        "id",
        "kind",
    )
    assert list_samples(recipe)["id"].tolist() == [f"cell{n}.png" for n in range(6)]


def test_folders_of_a_split(tmp_path, photos):
    """train/cat, val/cat: the classes are the inner folders, and the outer ones are the split."""
    for side in ("Train", "val", "test"):
        shutil.copytree(photos, tmp_path / "sides" / side)
    finding = write_recipe(tmp_path / "sides", tmp_path / "r.yaml")
    assert "18 images in 2 classes" in finding.sentence
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.task.target, recipe.task.split) == ("label", "split")
    assert sorted(set(list_samples(recipe)["split"])) == ["Train", "test", "val"]


def test_archives_and_arrays(tmp_path):
    """Shards, arrays with their labels and MNIST's four files get a recipe that lists every image
    with its label.
    """
    images, labels = np.zeros((6, 8, 8), np.uint8), np.arange(6, dtype=np.uint8) % 2
    np.savez(tmp_path / "d.npz", pictures=images, answer=labels)
    idx = tmp_path / "idx"
    idx.mkdir()
    for name in ("train", "t10k"):
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            header = bytes([0, 0, 8, array.ndim]) + sizes
            (idx / f"{name}-{what}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "s-000.tar", "w") as archive:
        for number in range(6):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
            for name, data in (
                (f"{number}.png", buffer.getvalue()),
                (f"{number}.cls", b"%d" % (number % 2)),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    for source, count in (
        (tmp_path / "d.npz", 6),
        (tmp_path, 6),  # no image and one array in it
        (idx, 12),
        (idx / "t10k-images-idx3-ubyte.gz", 6),
        (shards, 6),
        (shards / "s-000.tar", 6),
    ):
        write_recipe(source, tmp_path / "r.yaml", force=True)
        recipe = load_recipe(tmp_path / "r.yaml")
        samples = list_samples(recipe)
        assert sorted(samples["label"]) == ["0"] * (count // 2) + ["1"] * (count // 2)
        assert recipe.task.split == ("split" if source == idx else None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("latin.csv", "path,label\na.png,K\u00e4fer\n".encode("latin-1")),
        ("empty.csv", b""),
        ("ragged.csv", b"path,label\na.png,x\nb.png,x,y,z\n"),
        ("binary.csv", bytes(range(256)) * 8),
        ("garbage.parquet", b"PAR1garbagePAR1"),
        ("empty.tsv", b""),
        ("photos.zip", b"PK"),
    ],
)
def test_a_table_that_cannot_be_read(tmp_path, photos, name, data):
    """One error that names it; beside folders of classes it is passed over; alone in a folder it is
    told.
    """
    out = tmp_path / "r.yaml"
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=name):
        write_recipe(tmp_path / name, out)
    (photos / name).write_bytes(data)
    assert "2 classes" in write_recipe(photos, out).sentence
    if name != "photos.zip":
        (tmp_path / "alone").mkdir()
        (tmp_path / "alone" / name).write_bytes(data)
        with pytest.raises(HeadraceError, match=name):
            write_recipe(tmp_path / "alone", tmp_path / "other.yaml")


def test_columns_of_lists(tmp_path):
    """Parquet can hold them; they are several labels of an image, and no label where one is
    expected.
    """
    frame = rows(tags=[["a"], ["b"]] * 3)
    frame[["tags", "path", "label"]].rename(columns={"label": "kind"}).to_parquet(
        tmp_path / "t.parquet"
    )
    write_recipe(tmp_path / "t.parquet", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").task.target == "kind"
    frame[["path", "tags"]].rename(columns={"tags": "label"}).to_parquet(tmp_path / "t.parquet")
    write_recipe(tmp_path / "t.parquet", tmp_path / "s.yaml")
    assert load_recipe(tmp_path / "s.yaml").task.kind == "multi"


def test_where_no_recipe_can_be_written(tmp_path, photos):
    """An absent folder, a folder in the recipe's place, a file in the folder's, a recipe that is
    there.
    """
    with pytest.raises(InvalidInput, match=r"the folder .*nodir does not exist.*--out r\.yaml"):
        write_recipe(photos, tmp_path / "nodir" / "r.yaml")
    for force in (False, True):
        with pytest.raises(InvalidInput, match=r"is a folder.*--out .*recipe\.yaml"):
            write_recipe(photos, photos, force=force)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidInput, match=r"is a file, not a folder"):
        write_recipe(photos, tmp_path / "file" / "r.yaml")
    with pytest.raises(InvalidInput, match="--force"):
        write_recipe(photos, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_data_sets_whose_labels_lie_beside_the_images_are_told_how(tmp_path, photos):
    """A list without names and with blanks: the line that makes a table of it, which works;
    annotations: the export that is read; one folder of images among others: its command.
    """
    photos.rename(tmp_path / "images")
    (tmp_path / "train.txt").write_text("".join(f"images/a/{n}.png {n % 2}\n" for n in range(3)))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/split.txt").write_text("1 1\n")
    recipe = tmp_path / "out.yaml"
    with pytest.raises(HeadraceError, match=r"name it: headrace init .*/images") as refusal:
        write_recipe(tmp_path, recipe)
    command = re.search(r"\(echo path.*$", str(refusal.value), re.MULTILINE)[0]
    subprocess.run(command, shell=True, check=True)
    assert write_recipe(tmp_path / "train.csv", recipe).sentence.startswith("3 images in train.csv")
    shutil.rmtree(tmp_path / "images/b")
    for name in ("lists", "train.txt", "train.csv"):
        shutil.move(tmp_path / name, tmp_path.parent / f"{tmp_path.name}-{name}")
    (tmp_path / "annotations.xml").write_text("<annotations/>")
    with pytest.raises(
        InvalidInput, match=r"one class only.*Left out: 1 .xml file.*export it as COCO"
    ):
        write_recipe(tmp_path, recipe, force=True)


def test_the_demo_in_a_files_place(tmp_path, monkeypatch):
    """A file where the demo's folder should be is named, and left alone."""
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name
    )  # the demo's packages, as if installed
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(HeadraceError, match=r"file is a file; expected a folder"):
            write_demo(folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="needs headrace[demo]")
def test_the_demos_recipe_lists_its_table(tmp_path):
    """Its table has ids of its own."""
    solar_cells().to_csv(tmp_path / "solar-cells.csv", index=False)
    recipe = load_recipe(write_demo(tmp_path))
    samples = list_samples(recipe)
    assert len(samples) == 2624
    assert samples["id"].tolist() == solar_cells()["id"].tolist()


def test_every_stage_that_the_recipe_mentions_can_be_asked_for(tmp_path, photos):
    """input_halving and finetune are written as comments; with the marks taken away they are valid, alone
    and together.
    """
    out = tmp_path / "r.yaml"
    write_recipe(photos, out)
    text = out.read_text()
    for wanted in (("input_halving",), ("finetune",), ("input_halving", "finetune")):
        lines, within = [], False
        for line in text.splitlines():
            bare = line.removeprefix("# ")
            if bare != line and bare.split(":")[0] in wanted:
                within = True
            elif not line.startswith("#   "):
                within = False
            lines.append(bare if within else line)
        out.write_text("\n".join(lines))
        recipe = load_recipe(out)
        assert {
            name for name in ("input_halving", "finetune") if getattr(recipe, name) is not None
        } == set(wanted)
        assert recipe.ensemble is not None  # is on: nothing is trained for it


def test_the_strengths_that_are_written_are_those_of_a_recipe_that_names_none(tmp_path, photos):
    write_recipe(photos, tmp_path / "r.yaml")
    heads = load_recipe(tmp_path / "r.yaml").heads
    assert heads.logistic is not None
    assert heads.ridge is not None
    assert heads.logistic.C == HEAD_GRIDS["logistic"]().C
    assert heads.ridge.alpha == HEAD_GRIDS["ridge"]().alpha


def test_a_table_says_what_a_run_will_leave_out(tmp_path, photos):
    """Rows without a label are counted; paths that lead nowhere are named, with where they start
    from.
    """
    frame = rows()
    frame.loc[1, "label"] = None
    frame.to_csv(tmp_path / "t.csv", index=False)
    said = write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").sentence
    assert "1 row has no label" in said
    assert "6 of the first 6 files are not there, such as" in said
    assert "images.root" in said
    frame = pd.DataFrame({"path": sorted(map(str, photos.rglob("*.png"))), "label": ["x", "y"] * 3})
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml", force=True).sentence.endswith(
        "'label'"
    )


def test_a_table_without_a_single_file_says_what_to_write(tmp_path, photos):
    """Relative paths need the folder that they start from; the recipe has its line for it."""
    frame = rows(path=[str(path.relative_to(photos)) for path in sorted(photos.rglob("*.png"))])
    (tmp_path / "tables").mkdir()
    frame.to_csv(tmp_path / "tables" / "t.csv", index=False)
    photos.rename(tmp_path / "elsewhere")
    recipe_path = tmp_path / "tables" / "r.yaml"
    said = write_recipe(tmp_path / "tables" / "t.csv", recipe_path).sentence
    told = re.search(
        r"folder that a/0\.png starts from .* '(root: )FOLDER' .* '(# root: .*)'", said
    )
    text = recipe_path.read_text()
    assert text.count(told[2]) == 1
    recipe_path.write_text(text.replace(told[2], f"{told[1]}../elsewhere  #"))
    paths = list_samples(load_recipe(recipe_path))["path"]
    assert [Path(path).is_file() for path in paths] == [True] * 6
    rows(path=[f"/scans/{n}.png" for n in range(6)]).to_csv(tmp_path / "t.csv", index=False)
    said = write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").sentence
    assert "put the images there, or paths into the table that lead to them" in said


def test_an_id_that_repeats_is_a_column_and_not_the_rows_ids(tmp_path, photos):
    """A patient's id: the recipe names no id_column, so that the paths tell the rows apart."""
    rows(id=[1, 1, 2, 2, 3, 3]).to_csv(tmp_path / "t.csv", index=False)
    write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.images.id_column is None
    assert list_samples(recipe)["image_id"].tolist() == ["1", "1", "2", "2", "3", "3"]


@pytest.mark.parametrize("prefix", ["/home/alice/", "C:\\Users\\Bob\\"])
def test_paths_of_another_machine_are_mended_by_the_command_that_is_named(tmp_path, photos, prefix):
    """Where files below the table's folder have the ends of the paths, `sed` takes the rest off."""
    separator = "\\" if "\\" in prefix else "/"
    names = [str(path.relative_to(tmp_path)) for path in sorted(photos.rglob("*.png"))]
    frame = rows(path=[prefix + name.replace("/", separator) for name in names])
    frame.to_csv(tmp_path / "t.csv", index=False)
    said = write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").sentence
    assert f"Without {prefix} they are below" in said
    command = re.search(r"sed .*here\.csv(?=,)", said)[0]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert "not there" not in write_recipe(tmp_path / "here.csv", tmp_path / "h.yaml").sentence


def test_boxes_of_other_programs_become_a_table_by_the_command_that_is_named(tmp_path):
    """Pascal VOC and YOLO have a file of boxes for each image; the table has a row for each box."""
    for image in ("voc/JPEGImages/a.jpg", "yolo/images/train/a.png"):
        (tmp_path / image).parent.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / image)
    for name, text in (
        (
            "voc/Annotations/a.xml",
            "<annotation><filename>a.jpg</filename><object><name>fox</name><bndbox><xmin>1</xmin>"
            "<ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>",
        ),
        ("yolo/labels/train/a.txt", "1 0.5 0.5 0.2 0.4\n0 0.5 0.5 0.2 0.2 0.1 0.9\n"),  # a polygon
        ("yolo/data.yaml", "names: {0: owl, 1: fox}\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for folder, first in (
        ("voc", "JPEGImages/a.jpg,fox,1,2,3,4"),
        ("yolo", "images/train/a.png,fox,0.5,0.5,0.2,0.4"),
    ):
        with pytest.raises(InvalidInput, match="holds boxes of") as refusal:
            write_recipe(tmp_path / folder, tmp_path / "r.yaml")
        command = re.search(r"`python (.*?)`", str(refusal.value))[1]
        subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd=tmp_path / folder)
        assert (tmp_path / folder / "objects.csv").read_text().splitlines()[1:] == [first]


def test_what_is_left_out_is_written_as_it_was_asked_for(tmp_path, photos):
    """A name with a comma stays one name, and a number a name."""
    for name in ("a, old", "2020"):
        shutil.copytree(photos / "a", photos / name)
    write_recipe(photos, tmp_path / "r.yaml", exclude=("a, old", "2020"))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.images.exclude == ("a, old", "2020")
    assert set(list_samples(recipe)["label"]) == {"a", "b"}


def test_columns_that_no_run_could_use_are_left_out(tmp_path):
    """A `set` of other words is no split, a `site` with gaps no group; both are told, and the
    recipe makes a dataset.
    """
    frame = rows(set=["S1", "S2"] * 3, site=["p", None, "q", "p", "q", "q"])
    frame.to_csv(tmp_path / "t.csv", index=False)
    notes = " ".join(write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").notes)
    task = load_recipe(tmp_path / "r.yaml").task
    assert (task.split, task.group) == (None, None)
    assert "column 'set' holds other values than train, validation and test" in notes
    assert "column 'site' is empty for some images" in notes
    frame.loc[1, "label"] = None  # the only gap is in a row that a run leaves out
    frame.assign(subset=["Train", "VAL", "test"] * 2).to_csv(tmp_path / "t.csv", index=False)
    notes = " ".join(write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml", force=True).notes)
    task = load_recipe(tmp_path / "r.yaml").task
    assert (task.split, task.group) == ("subset", "site")
    assert "column 'set' holds other values" in notes
    assert "'site'" not in notes


def test_a_pattern_of_paths_is_told(tmp_path):
    """What was assumed of where the images are."""
    (tmp_path / "train").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"train/k{number}.png")
    rows(id=[f"k{n}" for n in range(6)]).drop(columns="path").to_csv(
        tmp_path / "t.csv", index=False
    )
    notes = " ".join(write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").notes)
    assert "found by the pattern 'train/{id}.png' (images.path_pattern)" in notes


def test_commands_in_messages_name_what_can_be_read(tmp_path, photos):
    """Quoted for a shell; neither our own predictions nor a table of something else is named."""
    mine = tmp_path / "my photos"
    photos.rename(mine)
    paths = sorted(str(path) for path in mine.rglob("*.png"))
    pd.DataFrame({"file": paths, "class": "a", "error": None}).to_csv(
        mine / "a-predictions.csv", index=False
    )
    pd.DataFrame({"weather": ["rain", "sun"]}).to_csv(mine / "b-other.csv", index=False)
    pd.DataFrame({"path": paths, "label": ["x", "y"] * 3}).to_csv(mine / "labels.csv", index=False)
    command = f"headrace init '{mine / 'labels.csv'}'"
    (told,) = (
        note for note in write_recipe(mine, tmp_path / "r.yaml").notes if "sub-folders" in note
    )
    assert told.endswith(command)
    assert "classes. labels.csv could name" in told
    shutil.rmtree(mine / "b")
    pd.DataFrame({"path": paths, "label": ["x", "y"] * 3}).to_csv(mine / "more.csv", index=False)
    with pytest.raises(InvalidInput) as refusal:
        write_recipe(mine, tmp_path / "s.yaml")
    assert "(labels.csv, more.csv)" in str(refusal.value)
    assert str(refusal.value).endswith(command)


def test_a_second_backbone_of_the_comments_is_trained_on_as_the_comment_says(tmp_path, photos):
    """With two of them a tap's name begins with its backbone's; the comment beside the second one
    gives such a name.
    """
    out = tmp_path / "r.yaml"
    write_recipe(photos, out)
    text = out.read_text()
    marked = text[text.index("  # - name: ") : text.index("\nheads:")]
    (said,) = re.findall(r"\[resnet:.*?\]", marked)
    taken = re.sub("^  # ", "  ", marked, flags=re.MULTILINE)
    out.write_text(
        text.replace(marked, taken).replace("[[pre_logits.vector], all]", f"[{said}, all]")
    )
    recipe = load_recipe(out)
    assert [backbone.alias for backbone in recipe.backbones] == [None, "resnet"]
    names = [
        "timm:tf_efficientnet_lite0:pre_logits.vector",
        "resnet:layer4.avg",
        "resnet:pre_logits.vector",
    ]
    assert {each.inputs for each in requested_heads(recipe.heads, names)} == {
        ("resnet:pre_logits.vector",),
        tuple(names),
    }


@pytest.mark.parametrize(
    ("shape", "dtype", "highest", "bands", "pixel_range"),
    [
        ((8, 9, 5), np.uint16, 9000, (1, 2, 3, 4, 5), (0, 16383)),
        ((8, 9, 3), np.uint16, 4000, None, (0, 4095)),
        ((8, 9, 4), np.uint8, 200, (1, 2, 3, 4), None),
        ((8, 9, 3), np.uint8, 200, None, None),
    ],
)
def test_bands_and_depth_are_proposed(tmp_path, shape, dtype, highest, bands, pixel_range):
    """Of 8-bit colours nothing; what is proposed is a recipe that is read."""
    for number in range(4):
        path = tmp_path / "scenes" / "ab"[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.full(shape, highest, dtype)
        photometric = "rgb" if shape[2] == 3 else "minisblack"
        tifffile.imwrite(path, values, photometric=photometric, planarconfig="contig")
    notes = write_recipe(tmp_path / "scenes", tmp_path / "r.yaml").notes
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.backbones[0].bands == bands
    assert recipe.images.pixel_range == pixel_range
    assert recipe.images.pixel_dtype == ("float32" if pixel_range else "uint8")
    assert any("bands" in note for note in notes) == (bands is not None)


def chips(folder, marker, **options):
    """Four images of four bands from 100 to 900, whose first row has no value."""
    for number in range(4):
        values = np.linspace(100, 900, 8 * 9 * 4).reshape(8, 9, 4).astype(np.float32)
        values[0] = marker
        path = folder / "ab"[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig", **options)
    return folder


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("marker", [-9999, 65535])
def test_pixels_without_a_value_are_no_black_or_white(tmp_path, marker, declared):
    """Where the file declares them a run gets on with them; else the user is told to."""
    text = str(marker)
    tags = {"extratags": [(42113, "s", len(text) + 1, text, True)]} if declared else {}
    notes = " ".join(write_recipe(chips(tmp_path / "c", marker, **tags), tmp_path / "r.yaml").notes)
    images = load_recipe(tmp_path / "r.yaml").images
    assert images.pixel_range == pytest.approx((200.3, 900), abs=0.1)
    assert images.nodata == ("mean" if declared else "refuse")
    assert ("4 of 4 images that were looked at have pixels without a value" in notes) == declared
    assert (f"some pixels are {marker}, far from all others" in notes) != declared


def test_a_hot_pixel_is_no_mark(tmp_path):
    """Of a mark of pixels without a value there are several."""
    path = chips(tmp_path / "c", 100) / "a/0.tif"
    values = tifffile.imread(path)
    values[3, 3, 3] = 65535
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
    write_recipe(tmp_path / "c", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").images.pixel_range == (100, 65535)


def test_channels_that_are_pages_are_read_all(tmp_path):
    """As microscopes write them: Pillow reads the first page of three alone."""
    for number in range(4):
        path = tmp_path / "cells" / "ab"[number % 2] / f"{number}.ome.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        pages = np.full((3, 8, 9), 4000, np.uint16)
        tifffile.imwrite(path, pages, photometric="minisblack", metadata={"axes": "CYX"})
    write_recipe(tmp_path / "cells", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").backbones[0].bands == (1, 2, 3)


@pytest.mark.parametrize(
    ("name", "cells", "kind"),
    [
        ("target", [f"{n / 7:.3f}" for n in range(30)], "regression"),
        ("weight", [f"{n / 7:.3f}".replace(".", ",") for n in range(30)], "regression"),
        ("age", [str(20 + n % 25) for n in range(30)], "regression"),
        ("label", [str(n % 15) for n in range(30)], "single"),
        ("label", [f"{n % 5 / 2}" for n in range(30)], "single"),
    ],
)
def test_numbers_are_predicted_as_numbers(tmp_path, name, cells, kind):
    """Also with decimal commas, as spreadsheets of half of Europe write them."""
    save_images(tmp_path, *(f"{n}.png" for n in range(30)))
    frame = pd.DataFrame({"path": [f"{n}.png" for n in range(30)], name: cells})
    frame.to_csv(tmp_path / "t.csv", index=False, sep=";")
    finding = write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.task.target, recipe.task.kind) == (name, kind)
    assert (recipe.heads.logistic is None) == (kind == "regression")
    assert (f"numbers in column {name!r}" in finding.sentence) == (kind == "regression")
    requested_heads(recipe.heads, ["blocks.4.avg", "pre_logits.vector"])


def test_whole_numbers_of_each_row_are_no_target(tmp_path):
    save_images(tmp_path, *(f"{n}.png" for n in range(30)))
    frame = pd.DataFrame({"path": [f"{n}.png" for n in range(30)], "number": range(30)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InvalidInput, match="no column looks like a label"):
        write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml")


def test_masks_beside_the_images_are_told(tmp_path):
    """As in BUSI and in WebDataset's samples; the option that is named leaves them out."""
    save_images(
        tmp_path / "scans",
        *("a/1.png", "a/1_mask.png", "a/2.png", "b/1.png", "b/1_mask_1.png", "with_mask.png"),
        "b/2.png",
    )
    (note,) = (note for note in detect_recipe(tmp_path / "scans", tmp_path).notes if "mask" in note)
    assert note.startswith("2 images are named like masks of those beside them, such as a/1_mask")
    patterns = re.findall(r"--exclude '(.*?)'", note)
    assert patterns == ["*_mask.png", "*_mask_1.png"]


def test_folders_of_masks_are_told(tmp_path):
    """They would be a class; `mask` beside `no_mask` is one."""
    save_images(tmp_path / "x", "images/1.png", "images/2.png", "masks/1.png", "masks/2.png")
    with pytest.raises(
        InvalidInput,
        match=r"2 images are named like masks .*, such as masks/1.png.*--exclude masks\)",
    ):
        detect_recipe(tmp_path / "x", tmp_path)
    (note,) = notes_on_masks(["a/images/1.png", "a/masks/1.png", "b/images/1.png", "b/gt/1.png"])
    assert "images.exclude: ['*/gt', '*/masks']" in note
    assert not notes_on_masks(["mask/1.png", "no_mask/1.png"])
    assert not notes_on_masks(["images/1.png", "masks/2.png"])


def test_classes_below_folders_of_one_folder_are_named(tmp_path):
    """As in BreakHis: histology_slides/breast/benign."""
    save_images(tmp_path / "set", "slides/breast/benign/1.png", "slides/breast/malignant/1.png")
    with pytest.raises(InvalidInput, match=r"try: headrace init .*slides/breast$"):
        write_recipe(tmp_path / "set", tmp_path / "r.yaml")


def test_images_in_an_archive_beside_the_table_are_told(tmp_path, photos):
    """As Kaggle hands out its contests; the archive itself has one folder, which is no class."""
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number in range(3):
            archive.add(photos / f"a/{number}.png", f"train/{number}.png")
    shutil.rmtree(photos)
    frame = pd.DataFrame({"id": [0, 1, 2], "label": ["x", "y", "x"]})
    frame.to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(InvalidInput, match=r"no labels.*or beside it has the labels, unpack"):
        write_recipe(tmp_path / "train.tar", tmp_path / "r.yaml")
    with pytest.raises(SourceError, match=r"tar -xf train\.tar") as refusal:
        write_recipe(tmp_path / "labels.csv", tmp_path / "r.yaml")
    command = re.search(r"cd .* && tar -xf train.tar", str(refusal.value))
    subprocess.run(command[0], shell=True, check=True)
    write_recipe(tmp_path / "labels.csv", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").images.path_pattern == "train/{id}.png"


def test_of_several_arrays_the_one_named_like_labels_has_them(tmp_path):
    images = np.zeros((6, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=[0, 1] * 3, ids=np.arange(6))
    write_recipe(tmp_path / "d.npz", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").images.labels_key == "labels"


@pytest.mark.parametrize(
    ("column", "cells", "told"),
    [
        ("Usage", ["Training"] * 4 + ["Public"] * 2, "task.split: Usage"),
        ("training", [1, 1, 1, 1, 0, 0], "task.split: training"),
        ("kfold", [0, 1, 2, 0, 1, 2], "task.fold: kfold"),
        ("strain", ["a", "b"] * 3, None),
        ("vehicle", ["bus", "car"] * 3, None),
    ],
)
def test_a_split_under_other_names_is_told(tmp_path, column, cells, told):
    """A random split is drawn, and nobody would know."""
    frame = rows(label=["train", "bus"] * 3, **{column: cells})
    frame.to_csv(tmp_path / "t.csv", index=False)
    notes = write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").notes
    assert [note for note in notes if "of your own, and is not used" in note] == [
        note for note in notes if told and told in note
    ]
    assert (told is not None) == any("of your own" in note for note in notes)


@pytest.mark.parametrize("in_one_cell", [False, True])
def test_pixels_in_cells_become_an_array_by_the_command_that_is_named(tmp_path, in_one_cell):
    """MNIST as Kaggle has it, and FER2013."""
    images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 64)
    frame = pd.DataFrame(images).add_prefix("pixel")
    if in_one_cell:
        frame = pd.DataFrame({"pixels": [" ".join(map(str, image)) for image in images]})
    frame.insert(0, "label" if not in_one_cell else "emotion", [0, 1, 0])
    frame.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(SourceError, match="cells are the pixels") as refusal:
        write_recipe(tmp_path / "train.csv", tmp_path / "r.yaml")
    script = re.search(r'python -c "(.*)", and', str(refusal.value))[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    write_recipe(tmp_path / "train.npz", tmp_path / "r.yaml")
    with np.load(tmp_path / "train.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"].reshape(3, 64), images)


def test_a_species_of_several_genera_is_told(tmp_path):
    """Lynx canadensis and Castor canadensis are both `canadensis` in the column of species."""
    frame = rows(
        genus=["Lynx", "Castor", "Ursus"] * 2, species=["canadensis", "canadensis", "arctos"] * 2
    ).drop(columns="label")
    frame.to_csv(tmp_path / "t.csv", index=False)
    notes = " ".join(write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").notes)
    assert "'canadensis' in 'species' is of several genera (Castor, Lynx)" in notes


@pytest.mark.parametrize(("suffix", "n_pages"), [("tif", 3), ("gif", 3), ("tif", 1)])
def test_pages_that_are_not_read_are_told(tmp_path, suffix, n_pages):
    """Of a stack or an animation the first page is read, and nobody would know."""
    for k in range(8):
        pages = [Image.fromarray(np.full((8, 8), 9 * k + n, np.uint8)) for n in range(n_pages)]
        path = tmp_path / f"cells/{'ab'[k % 2]}/{k}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pages[0].save(path, save_all=n_pages > 1, append_images=pages[1:])
    notes = detect_recipe(tmp_path / "cells", tmp_path).notes
    told = [note for note in notes if "pages" in note]
    assert len(told) == (n_pages > 1)
    if told:
        assert told[0].startswith(
            "8 of 8 images that were looked at have several pages, of which the first alone is "
            f"read, such as 0.{suffix}"
        )


def save_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


# Tables as other programs write them, with the files that they name and where these lie.
TABLES_AND_FILES = {
    "NIH chest X-rays": (
        {"Image Index": [f"{n}.png" for n in range(8)]},
        [f"images_00{1 + n % 2}/images/{n}.png" for n in range(8)],
        "images_*/images/{Image Index}",
    ),
    "HAM10000": (
        {"image_id": [f"I{n}" for n in range(8)]},
        [f"part_{1 + n // 4}/I{n}.jpg" for n in range(8)],
        "part_*/{image_id}.jpg",
    ),
    "Timelapse": (
        {"File": ["1.jpg", "2.jpg"] * 4, "RelativePath": [f"cam {n // 2}\\DCIM" for n in range(8)]},
        [f"cam {n // 2}/DCIM/{1 + n % 2}.jpg" for n in range(8)],
        "{RelativePath}/{File}",
    ),
    "a spreadsheet": (
        {"code": range(8)},
        [f"scans/{n:05}.png" for n in range(8)],
        "scans/{code:05}.png",
    ),
}


@pytest.mark.parametrize("program", TABLES_AND_FILES)
def test_images_are_found_in_the_folders_that_a_table_does_not_name(tmp_path, program):
    columns, files, pattern = TABLES_AND_FILES[program]
    save_images(tmp_path, *files)
    frame = pd.DataFrame(columns).assign(label=["x", "y"] * 4)
    frame.to_csv(tmp_path / "t.csv", index=False)
    write_recipe(tmp_path, tmp_path / "r.yaml")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.images.path_pattern == pattern
    samples = list_samples(recipe)
    assert samples["path"].tolist() == [str(tmp_path / file) for file in files]
    assert samples["label"].tolist() == ["x", "y"] * 4


def test_of_two_columns_of_paths_the_one_whose_files_are_there_is_taken(tmp_path):
    """Camtrap DP has fileName and filePath."""
    files = [f"media/cam/{n}.jpg" for n in range(6)]
    save_images(tmp_path, *files)
    rows(fileName=[f"{n}.jpg" for n in range(6)], filePath=files).drop(columns="path").to_csv(
        tmp_path / "t.csv", index=False
    )
    write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").images.path_column == "filePath"


def test_paths_that_begin_with_the_tables_own_folder_start_above_it(tmp_path):
    """As CheXpert's do."""
    files = [f"set/train/{n}.jpg" for n in range(6)]
    save_images(tmp_path, *files)
    rows(path=files).to_csv(tmp_path / "set/train.csv", index=False)
    write_recipe(tmp_path / "set/train.csv", tmp_path / "r.yaml")
    samples = list_samples(load_recipe(tmp_path / "r.yaml"))
    assert samples["path"].tolist() == [str(tmp_path / file) for file in files]


def test_a_rank_of_animals_is_no_class_to_train_on(tmp_path):
    """Wildlife Insights and GBIF have `class`, `order` and `family` beside `species`."""
    frame = rows(order=["a", "b"] * 3, family=["c", "d"] * 3, species=["lynx", "fox", "owl"] * 2)
    frame = frame.rename(columns={"label": "class"})
    frame.to_csv(tmp_path / "t.csv", index=False)
    write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").task.target == "species"


@pytest.mark.parametrize(("n_patients", "group"), [(3, None), (6, "Patient ID")])
def test_groups_that_are_too_few_for_a_split_are_told(tmp_path, n_patients, group):
    frame = pd.concat([rows()] * 2, ignore_index=True).assign(path=[f"{n}.png" for n in range(12)])
    frame["Patient ID"] = frame.index % n_patients
    frame.to_csv(tmp_path / "t.csv", index=False)
    notes = write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").notes
    assert load_recipe(tmp_path / "r.yaml").task.group == group
    told = [note for note in notes if "'Patient ID' has 3 values, too few for a test split" in note]
    assert len(told) == (group is None)


def test_a_target_by_its_values_alone_is_told_with_the_others(tmp_path):
    frame = rows(sex=["m", "f"] * 3, age=["old", "young"] * 3).drop(columns="label")
    frame.to_csv(tmp_path / "t.csv", index=False)
    notes = write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").notes
    assert (
        "no column is named like a label; 'sex' is taken, the first with few values (others: age). "
        "For another: task.target"
    ) in notes


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("img/0.JPG", "There is 0.jpg: write the table's paths as the files are"),
        ("img/0.jpg;img/1.jpg", "The cells name several images each: write a row for each image"),
    ],
)
def test_paths_without_a_file_say_why(tmp_path, name, told):
    save_images(tmp_path, "img/0.jpg", "img/1.jpg")
    rows(path=[f"{name.replace('0', str(n))}" for n in (0, 2, 3, 4, 5, 6)]).to_csv(
        tmp_path / "t.csv", index=False
    )
    assert told in write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").sentence


def test_tables_of_camtrap_dp_are_joined_by_the_command_that_is_named(tmp_path):
    save_images(tmp_path, *(f"media/{n}.jpg" for n in range(6)))
    numbers = pd.DataFrame({"mediaID": [f"m{n}" for n in range(6)], "deploymentID": "d"})
    media = numbers.assign(filePath=[f"media/{n}.jpg" for n in range(6)], fileName="x.jpg")
    seen = numbers.assign(scientificName=["fox", "owl", None] * 2)
    media.to_csv(tmp_path / "media.csv", index=False)
    seen.to_csv(tmp_path / "observations.csv", index=False)
    with pytest.raises(InvalidInput, match="a package of Camtrap DP") as refusal:
        write_recipe(tmp_path, tmp_path / "r.yaml")
    (script,) = re.findall(r'`python -c "(.*)"`', str(refusal.value))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    write_recipe(tmp_path / "species.csv", tmp_path / "r.yaml")
    assert list_samples(load_recipe(tmp_path / "r.yaml"))["species"].tolist() == ["fox", "owl"] * 2


@pytest.mark.parametrize(
    ("folders", "label", "group"),
    [
        (["p1/0", "p1/1", "p2/0", "p2/1"], ["0", "1"] * 2, ["p1", "p1", "p2", "p2"]),
        (["lung/n", "lung/aca", "colon/x", "colon/y"] * 2, ["n", "aca", "x", "y"] * 2, None),
        (["a/SOB/adenosis", "b/SOB/ductal"] * 2, ["adenosis", "ductal"] * 2, None),
        (["train/p1/0", "test/p2/0", "train/p3/1", "test/p4/1"], ["0", "0", "1", "1"], True),
        (["a", "b"] * 2, None, None),
    ],
)
def test_folders_below_the_classes_may_be_the_classes(tmp_path, folders, label, group):
    """The recipe's line that the note names makes them so."""
    save_images(tmp_path, *(f"set/{folder}/{n}.png" for n, folder in enumerate(folders)))
    notes = write_recipe(tmp_path / "set", tmp_path / "r.yaml").notes
    told = [note for note in notes if "may be the classes, too" in note]
    assert len(told) == (label is not None)
    lines = re.findall(r"name_pattern: '[^']*'", told[0]) if told else []
    assert len(lines) == 0 if label is None else 1 if group else 2
    written = (tmp_path / "r.yaml").read_text()
    tables = []
    for line in lines:
        (tmp_path / "r.yaml").write_text(written.replace("images:\n", f"images:\n  {line}\n", 1))
        samples = list_samples(load_recipe(tmp_path / "r.yaml"))
        by_number = samples["id"].str.extract(r"(\d+)\.png$")[0].astype(int)
        tables.append(samples.iloc[np.argsort(by_number)])
    if tables:
        assert tables[0]["label"].tolist() == label
        if folders[0].startswith("train"):
            assert tables[0]["split"].tolist() == ["train", "test"] * 2
    if isinstance(group, list):
        assert tables[0]["group"].tolist() == group
    if len(tables) == 2:  # the folders in the classes are patients instead
        assert tables[1]["label"].tolist() == [folder.split("/")[0] for folder in folders]
        assert tables[1]["group"].tolist() == label


def test_a_folder_for_each_image_is_no_class(tmp_path):
    save_images(tmp_path, *(f"set/{'ab'[n % 2]}/case{n}/photo.png" for n in range(8)))
    notes = write_recipe(tmp_path / "set", tmp_path / "r.yaml").notes
    assert not any("may be the classes" in note for note in notes)


@pytest.mark.parametrize(("stem", "is_part"), [("grade", False), ("stage_", False), ("part", True)])
def test_numbered_folders_beside_a_table_are_classes_unless_named_parts(tmp_path, stem, is_part):
    """The table of ages and sexes beside grades is not taken for the labels."""
    names = [f"{stem}{1 + n % 2}/{n}.png" for n in range(8)]
    save_images(tmp_path, *(f"set/{name}" for name in names))
    table = pd.DataFrame({"file": [f"{n}.png" for n in range(8)], "sex": ["f", "m", "m", "f"] * 2})
    table.to_csv(tmp_path / "set" / "about.csv", index=False)
    notes = " ".join(write_recipe(tmp_path / "set", tmp_path / "r.yaml").notes)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.task.target == ("sex" if is_part else "label")
    assert ("the sub-folders are its parts" in notes) is is_part
    assert ("the sub-folders are taken for the classes" in notes) is not is_part


def test_a_table_whose_files_are_in_several_folders_names_none_of_them(tmp_path):
    """Else a recipe would be written of which no image is there."""
    save_images(tmp_path, *(f"set/class{1 + n % 2}/{n // 2}.png" for n in range(8)))
    table = pd.DataFrame({"file": [f"{n}.png" for n in range(4)], "label": ["x", "y"] * 2})
    table.to_csv(tmp_path / "set" / "labels.csv", index=False)
    notes = " ".join(write_recipe(tmp_path / "set", tmp_path / "r.yaml").notes)
    assert "the sub-folders are taken for the classes. labels.csv could name" in notes
    assert set(list_samples(load_recipe(tmp_path / "r.yaml"))["label"]) == {"class1", "class2"}


def test_pointers_in_the_place_of_images_are_told(tmp_path, photos):
    """Git LFS and DVC keep data sets elsewhere, and say so in a small file."""
    for path in photos.rglob("0.png"):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    notes = write_recipe(photos, tmp_path / "r.yaml").notes
    assert (
        "2 of 6 images that were looked at cannot be read, such as a/0.png: a pointer of Git LFS, "
        "and not yet the image: git lfs pull"
    ) in notes
    (tmp_path / "more.dvc").touch()
    with pytest.raises(
        SourceError, match=r"no such file or folder\. .*: dvc pull .*more\.dvc\. Give"
    ):
        write_recipe(tmp_path / "more", tmp_path / "s.yaml")


def test_shapes_of_labelme_become_a_table_by_the_command_that_is_named(tmp_path):
    save_images(tmp_path, *(f"{n}.png" for n in range(6)))
    for n in range(6):
        shape = {"label": "ab"[n % 2], "points": [[4, 5], [1, 7]], "shape_type": "rectangle"}
        (tmp_path / f"{n}.json").write_text(
            json.dumps({"shapes": [shape], "imagePath": f"{n}.png", "imageData": None})
        )
    with pytest.raises(InvalidInput, match="holds shapes of LabelMe") as refusal:
        write_recipe(tmp_path, tmp_path / "r.yaml")
    (script,) = re.findall(r'`python -c "(.*)"`', str(refusal.value))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    write_recipe(tmp_path / "objects.csv", tmp_path / "r.yaml")
    samples = list_samples(load_recipe(tmp_path / "r.yaml"))
    assert samples["id"].tolist() == [f"{n}.png#1,5,3,2" for n in range(6)]
    assert samples["label"].tolist() == ["a", "b"] * 3


def test_a_folder_that_is_called_as_a_json_file_is_no_annotation(tmp_path):
    (tmp_path / "x.json").mkdir()
    (tmp_path / "x.json" / "notes.docx").write_text("x")
    with pytest.raises(SourceError, match="no images found"):
        write_recipe(tmp_path, tmp_path / "r.yaml")


def test_a_table_in_an_archive_is_told(tmp_path, photos):
    """As AutoTrain wants it uploaded."""
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(photos / "a/0.png", "0.png")
        (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,x\n")
        archive.add(tmp_path / "metadata.csv", "metadata.csv")
    with pytest.raises(InvalidInput, match=r"no labels.*metadata\.csv.*unpack the archive"):
        write_recipe(tmp_path / "t.tar", tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("TRAIN,gs://bucket/1.jpg,cat", "split,path,label"),
        ("1.jpg,cat,3", "path,label,label2"),
    ],
)
def test_names_for_a_table_without_them_are_in_its_order(tmp_path, line, names):
    (tmp_path / "t.csv").write_text(f"{line}\n" * 2)
    with pytest.raises(SourceError, match=f"for example: {names}$"):
        write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml")


def test_a_patient_column_with_gaps_is_told_also_where_sites_are_taken(tmp_path):
    """Else sites would be taken for the groups that the user believes patients to be."""
    frame = rows(site=list("uvwxyz"), patient=["p", None, "q", "p", "q", "q"])
    frame.to_csv(tmp_path / "t.csv", index=False)
    notes = " ".join(write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml").notes)
    assert load_recipe(tmp_path / "r.yaml").task.group == "site"
    assert "column 'patient' is empty for some images" in notes


def test_images_of_one_patient_may_be_alike_however_the_column_is_spelled(tmp_path):
    """No column of groups is asked for where there is one, named `Patient ID`."""
    rng = np.random.default_rng(0)
    for patient in range(12):
        scene = rng.integers(40, 200, (16, 16))
        for view in range(2):
            Image.fromarray((scene + view).astype(np.uint8)).save(tmp_path / f"{patient}{view}.png")
    names = [f"{patient}{view}" for patient in range(12) for view in range(2)]
    frame = pd.DataFrame({"path": [f"{name}.png" for name in names], "label": ["x", "y"] * 12})
    for column, is_told in (("frame", True), ("Patient ID", False)):
        table = frame.assign(**{column: [name[:-1] for name in names]})
        table.to_csv(tmp_path / "t.csv", index=False)
        finding = write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml", force=True)
        assert ("task.group" in " ".join(finding.notes)) is is_told
        assert (load_recipe(tmp_path / "r.yaml").task.group is None) is is_told


def save_bands(folder, names, dtype=np.uint16):
    """Save images of 16 x 16 pixels, those of band 8A of half the size, with their number in `names`
    as value.
    """
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        size = 8 if "B8A" in name else 16
        Image.fromarray(np.full((size, size), value, dtype)).save(folder / name)


def type_command(text, folder):
    (script,) = re.findall(r'`python -c "(.*)"`', text)
    command = f'{sys.executable} -c "{script}"'
    subprocess.run(command, shell=True, cwd=folder, check=True)


@pytest.mark.parametrize(
    ("name", "bands"),
    [
        ("S2A_{n}/S2A_{n}_{band}.tif", ["B02", "B03", "B04", "B8A"]),  # BigEarthNet
        ("r01c{n:02}f01p01-{band}.tiff", [f"ch{n}sk1fk1fl1" for n in range(1, 6)]),
        ("0{n}-bbac_{band}.png", ["blue", "green", "red", "yellow"]),  # Human Protein Atlas
    ],
)
def test_bands_in_files_of_their_own_are_no_images(tmp_path, name, bands):
    """The command that is told makes one file of each image, with all of its bands."""
    folder = tmp_path / "set"
    save_bands(folder, [name.format(n=n, band=band) for n in range(6) for band in bands])
    with pytest.raises(InvalidInput, match=f"seems to be {len(bands)} files") as refusal:
        write_recipe(folder, tmp_path / "r.yaml")
    type_command(str(refusal.value), folder)
    stacked = sorted((tmp_path / "set-stacked").glob("*.npy"))
    values = [np.load(path)[-1, -1].tolist() for path in stacked]
    assert values == np.arange(6 * len(bands)).reshape(6, -1).tolist()
    rows(path=[f"set-stacked/{path.name}" for path in stacked]).to_csv(
        tmp_path / "t.csv", index=False
    )
    write_recipe(tmp_path / "t.csv", tmp_path / "r.yaml")
    assert f"bands: {list(range(1, len(bands) + 1))}" in (tmp_path / "r.yaml").read_text()


def test_bands_in_files_of_their_own_keep_the_folders_of_classes(tmp_path):
    """Where the classes have several images each, the recipe is written, and the command told."""
    folder = tmp_path / "it's land"
    names = [f"{c}/{n}_{b}.tif" for c in ("sea", "wood") for n in range(3) for b in ("B4", "B5")]
    save_bands(folder, names)
    (note,) = [
        note
        for note in write_recipe(folder, tmp_path / "r.yaml").notes
        if "one per band or channel" in note
    ]
    type_command(note, folder)
    assert note.endswith(f"then headrace init {tmp_path / 'stacked'}")
    write_recipe(tmp_path / "stacked", tmp_path / "r.yaml", force=True)
    labels = list_samples(load_recipe(tmp_path / "r.yaml"))["label"]
    assert labels.tolist() == ["sea"] * 3 + ["wood"] * 3


@pytest.mark.parametrize("names", [["x_{n}"], ["x{n}_c1", "x{n}_c2"], ["{n}_red", "{n}_2"]])
def test_names_of_whole_images_are_no_bands(tmp_path, names):
    folder = tmp_path / "set"
    save_bands(
        folder, [f"{c}/{name.format(n=n)}.png" for c in "ab" for n in "012" for name in names]
    )
    assert not any("per band" in note for note in write_recipe(folder, tmp_path / "r.yaml").notes)
