"""The same samples and labels as the tools that people use today, or a refusal that says why we
differ.
"""

import io
import json
import re
import tarfile
import unicodedata

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from webdataset.tariterators import group_by_keys, tar_file_expander

from headrace.extract.errors import SourceError
from headrace.extract.images.locators import read_bytes
from headrace.extract.sources.archive import read_archives
from headrace.extract.sources.folder import read_folder
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.samples import list_folder
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.tabular import read_tables

MANY = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
# Letters that file systems and tables treat in their own ways: case, accents, blanks, dots, words
# that mean nothing to some.
WORDS = st.text(st.sampled_from("abAB01.é -_[]"), min_size=1, max_size=6).filter(
    lambda text: text.strip(" .") == text and not text.startswith(".")
)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), value % 256, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


TREES = st.dictionaries(
    st.one_of(WORDS, st.sampled_from(["train", "val", "test"])),
    st.lists(
        st.tuples(
            st.sampled_from(["", "deep/", "a/b/"]),
            WORDS,
            st.sampled_from([".png", ".JPG", ".txt", ".webp", ".gif", ""]),
        )
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@MANY
@given(TREES)
def test_class_folders_as_torchvision_reads_them(tmp_path_factory, tree):
    """The same image has the same class.

    We refuse what ImageFolder refuses, words of a split, and, below these, classes without an
    image.
    """
    root = tmp_path_factory.mktemp("tree")
    for label, files in tree.items():
        (root / label).mkdir()
        for folder, stem, suffix in files:
            place = root / label / folder / f"{stem}{suffix}"
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                assume(not place.exists())
            except (FileExistsError, NotADirectoryError):
                assume(False)  # a file of a folder's name
            place.write_bytes(b"text" if suffix in (".txt", "") else png(1))
    try:
        samples = read_folder(ImageSource("folder", root)).samples
    except SourceError as refusal:
        ours = "words for the sides of a split|this class would be missing"
        if {"train", "val", "test"} & set(tree) and re.search(ours, str(refusal)):
            return
        with pytest.raises(FileNotFoundError):  # a class without an image, or no image at all
            ImageFolder(
                root, is_valid_file=lambda path: path.lower().endswith((*IMG_EXTENSIONS, ".gif"))
            )
        return
    if "split" in samples:
        return  # the sides are classes there
    theirs = ImageFolder(
        root, is_valid_file=lambda path: path.lower().endswith((*IMG_EXTENSIONS, ".gif"))
    )
    ours = dict(zip(samples["path"], samples["label"], strict=True))
    assert ours == {
        path: unicodedata.normalize("NFC", theirs.classes[number])
        for path, number in theirs.samples
    }


@pytest.mark.slow
@MANY
@given(
    st.dictionaries(
        WORDS.filter(lambda text: "." not in text),
        st.tuples(WORDS, st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_tar_shards_as_webdataset_reads_them(tmp_path_factory, samples):
    """Where keys have no dots and are not repeated: the same keys, images and labels."""
    file = tmp_path_factory.mktemp("shards") / "s.tar"
    with tarfile.open(file, "w") as archive:
        for number, (key, (label, in_json)) in enumerate(samples.items()):
            side = (
                ("json", json.dumps({"label": label}).encode())
                if in_json
                else ("cls", label.encode())
            )
            for suffix, data in (("png", png(number)), side):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    theirs = {}
    with file.open("rb") as stream:
        for sample in group_by_keys(tar_file_expander([{"url": str(file), "stream": stream}])):
            label = (
                json.loads(sample["json"])["label"] if "json" in sample else sample["cls"].decode()
            )
            theirs[sample["__key__"]] = (unicodedata.normalize("NFC", label), sample["png"])
    listing = read_archives(ImageSource("archive", file))
    ours = {
        name.removeprefix("s.tar/").removesuffix(".png"): (label, read_bytes(path))
        for name, path, label in listing.samples[["id", "path", "label"]].itertuples(index=False)
    }
    assert ours == {unicodedata.normalize("NFC", key): value for key, value in theirs.items()}


CELLS = st.one_of(
    WORDS,
    st.sampled_from(
        [
            "",
            "None",
            "NA",
            "1.10",
            "01",
            'say "x"',
            "a,b",
            "a;b",
            " x ",
            "\u00e9",
            "e\u0301",
            "=1+1",
            "line\nbreak",
        ]
    ),
)


@pytest.mark.slow
@MANY
@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=10), st.sampled_from([",", ";", "\t"])
)
def test_tables_as_pandas_reads_them_as_text(tmp_path_factory, rows, separator):
    """pandas with everything that it infers switched off, trimmed and in one Unicode form."""
    file = tmp_path_factory.mktemp("tables") / "t.csv"
    frame = pd.DataFrame(
        [(f"{n}.png", *row) for n, row in enumerate(rows)], columns=["path", "label", "site"]
    )
    frame.to_csv(file, index=False, sep=separator)
    theirs = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False)
    theirs = theirs.map(lambda value: unicodedata.normalize("NFC", value.strip()))
    ours = read_tables(ImageSource("table", file)).samples[["id", "label", "site"]].fillna("")
    assert ours.to_numpy().tolist() == theirs.to_numpy().tolist() == [
        [unicodedata.normalize("NFC", value.strip()) for value in row] for row in frame.to_numpy()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two classes, two sides; and the same as Parquet, saved, and with metadata, as `datasets`
    makes them.
    """
    root = tmp_path_factory.mktemp("imagefolder")
    for number, (side, label) in enumerate(
        [("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")] * 3
    ):
        place = root / "photos" / side / label / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(number))
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(root / "photos"), cache_dir=str(root / "cache")
    )
    loaded.save_to_disk(root / "saved")
    for side, part in loaded.items():
        (root / "repository/data").mkdir(parents=True, exist_ok=True)
        table = part.map(lambda row: row)  # through Arrow, as push_to_hub does
        table.to_parquet(root / f"repository/data/{side}-00000-of-00001.parquet")
    return root, loaded


@pytest.mark.parametrize("place", ["photos", "saved", "repository"])
def test_an_imagefolder_as_datasets_reads_it(tree, place):
    """The same images with the same labels on the same sides, from the folder and from what
    `datasets` writes of it.
    """
    root, loaded = tree
    theirs = sorted(
        (side, part.features["label"].int2str(row["label"]), np.asarray(row["image"]).tobytes())
        for side, part in loaded.items()
        for row in part
    )
    samples = read_source(detect_source(root / place)).samples
    ours = sorted(
        (side, label, np.asarray(Image.open(io.BytesIO(read_bytes(path)))).tobytes())
        for side, label, path in samples[["split", "label", "path"]].itertuples(index=False)
    )
    assert ours == theirs


def test_list_folder_is_the_reader(tree):
    """What notebooks call gives the samples of the one reader."""
    root, _ = tree
    assert list_folder(root / "photos").equals(read_source(detect_source(root / "photos")).samples)
