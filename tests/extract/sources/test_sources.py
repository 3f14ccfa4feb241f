"""Data as people have it: every entry of a folder, table or archive is used, or counted by its
reason, and text stays as written.
"""

import gzip
import io
import json
import os
import pickle
import socket
import subprocess
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from headrace.extract.errors import SourceError
from headrace.extract.images.content_hashes import content_hashes
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.locators import (
    encode_path,
    locator_file,
    printable_name,
    read_bytes,
)
from headrace.extract.sources.archive import read_archives
from headrace.extract.sources.folder import read_folder
from headrace.extract.sources.listing import Listing
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.samples import list_folder
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.table import read_table_file
from headrace.extract.sources.tabular import read_tables


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), value % 256, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def counted(listing: Listing) -> int:
    return len(listing.samples) + listing.annotations + sum(item.count for item in listing.left_out)


def labels(listing: Listing) -> dict[str, str | None]:
    return dict(zip(listing.samples["id"], listing.samples["label"], strict=True))


def pack_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def pack_zip(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


# ---- folders

NAMES = st.lists(
    st.sampled_from(
        ["cat/1.png", "cat/2.JPG", "cat/notes.txt", "cat/.hidden.png", "dog/1.png", "dog/deep/3.webp", "dog/clip.mp4", "top.png",
         "dog/raw.NEF", ".git/config", "table.csv", "cat/photo", "dog/photo.png.1", "set.npy", "more.tar", "cat/a b.jpeg"]
    ),
    unique=True,
)  # fmt: skip


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES)
def test_every_file_of_a_folder_is_used_or_counted(tmp_path_factory, names):
    """found = used + left out, and found is what `find` sees but for what lies in
    hidden folders.
    """
    root = tmp_path_factory.mktemp("tree")
    for name in ("cat/0.png", "dog/0.png", *names):
        write(root / name, png(len(name)))
    listing = read_folder(ImageSource("folder", root))
    assert listing.found == counted(listing)
    hidden = [name for name in names if name.startswith(".git")]
    assert listing.found == 2 + len(names) - len(hidden) + bool(hidden)
    images = {name for name in names if not name.startswith(".") and "/." not in name} - {
        "cat/notes.txt", "dog/clip.mp4", "dog/raw.NEF", "table.csv", "set.npy", "more.tar",
    }  # fmt: skip
    assert (
        set(listing.samples["id"]) == {"cat/0.png", "dog/0.png"} | images
    )  # also those without a suffix of images


def test_what_is_left_out_says_what_it_is_and_how_to_use_it(tmp_path):
    for name in (
        "cat/1.png",
        "dog/1.png",
        "dog/2.nef",
        "dog/3.heif",
        "dog/4.mp4",
        "dog/5.dcm",
        "all.zip",
        "all.npy",
    ):
        write(tmp_path / name, png(1) if name.endswith("png") else b"0123456789")
    said = "\n".join(map(str, read_folder(ImageSource("folder", tmp_path)).left_out))
    for words in (
        "1 .nef file (camera raw: develop",
        ".mp4 file (video",
        ".dcm file (DICOM",
        "name the archive itself",
    ):
        assert words in said
    assert "all.npy" in said


def test_arrays_of_one_image_each_are_images_of_a_folder(tmp_path):
    """Bands last or first; stacks of images, labels, features and damaged files are left out and
    counted.
    """
    arrays = {
        "water/1.npy": np.zeros((64, 48, 6), np.uint16),
        "water/2.npy": np.zeros((13, 64, 64), np.float32),
        "wood/1.npy": np.zeros((64, 64, 3), np.uint8),
        "labels.npy": np.zeros(100),
        "wood/features.npy": np.zeros((100, 768), np.float32),
        "wood/digits.npy": np.zeros((60, 28, 28), np.uint8),
        "wood/batch.npy": np.zeros((8, 32, 32, 3), np.uint8),
    }
    for name, values in arrays.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, values)
    (tmp_path / "wood" / "cut.npy").write_bytes(b"\x93NUMPY")
    listing = read_folder(ImageSource("folder", tmp_path))
    assert list(listing.samples["id"]) == ["water/1.npy", "water/2.npy", "wood/1.npy"]
    assert list(listing.samples["label"]) == ["water", "water", "wood"]
    assert sum(item.count for item in listing.left_out) == 5
    assert not listing.notes


@pytest.mark.parametrize(
    "odd", ["heron/1.nef", "heron/readme.txt", "heron/deep/x.xyz", "heron/.gitkeep", None]
)
def test_a_class_that_would_be_missing_whole_is_refused(tmp_path, odd):
    """As torchvision's ImageFolder does; where nobody wants labels, nothing is refused."""
    for name in ("crane/1.png", "stork/1.png"):
        write(tmp_path / name, png(1))
    if odd is None:
        (tmp_path / "heron").mkdir()
    else:
        write(tmp_path / odd, b"text")
    with pytest.raises(
        SourceError, match=r"no file in the folder heron can be used.*images.exclude: \[heron\]"
    ):
        read_folder(ImageSource("folder", tmp_path))
    assert set(
        read_folder(ImageSource("folder", tmp_path, exclude=["heron"])).samples["label"]
    ) == {"crane", "stork"}
    assert len(read_folder(ImageSource("folder", tmp_path), labelled=False).samples) == 2


def test_a_side_of_a_split_that_would_be_missing_is_refused(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png", "test/a/3.cr2"):
        write(tmp_path / name, png(1) if name.endswith("png") else b"raw")
    with pytest.raises(
        SourceError,
        match=r"the folder test can be used as an image, so that this side of the split",
    ):
        read_folder(ImageSource("folder", tmp_path))


def test_words_for_the_sides_of_a_split(tmp_path):
    """Alone they are classes; beside other folders, and without classes in them, both readings are
    told.
    """
    for name in ("train/1.png", "tram/1.png"):  # vehicles
        write(tmp_path / "vehicles" / name, png(1))
    assert set(read_folder(ImageSource("folder", tmp_path / "vehicles")).samples["label"]) == {
        "train",
        "tram",
    }
    for name in ("train/1.png", "test/2.png"):
        write(tmp_path / "flat" / name, png(1))
    with pytest.raises(
        SourceError,
        match=r"without a class's folder in train. Are these the classes.*images.layout: classes",
    ):
        read_folder(ImageSource("folder", tmp_path / "flat"))
    assert set(
        read_folder(ImageSource("folder", tmp_path / "flat", layout="classes")).samples["label"]
    ) == {
        "train",
        "test",
    }


def test_entries_that_would_block_or_cannot_be_read(tmp_path):
    """A pipe is not opened, a broken link is an image that fails, and a name that reads like a
    locator is a name.
    """
    for name in ("a/1.png", "b/1.png", "a::tar:b/2.png", "b/x::npy:3.png"):
        write(tmp_path / name, png(1))
    os.mkfifo(tmp_path / "a/pipe.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "b/socket.png"))
    server.close()
    (tmp_path / "b/gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = read_folder(ImageSource("folder", tmp_path))
    assert [(item.count, item.reason) for item in listing.left_out] == [
        (2, "entries other than files (pipes, devices)")
    ]
    assert listing.samples["id"].tolist() == [
        "a/1.png",
        "a::tar:b/2.png",
        "b/1.png",
        "b/gone.png",
        "b/x::npy:3.png",
    ]
    found = content_hashes(listing.samples, tmp_path / "index.parquet")
    assert [item.id for item in found.unreadable] == ["b/gone.png"]


def test_names_that_are_no_utf8(tmp_path):
    """They are images as others; ids and paths are text that every file format can hold."""
    for name in (b"a/caf\xe9.png", b"b/na\xefve.png", b"b/plain.png", b"caf\xe9/4.png"):
        place = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        Path(os.fsdecode(place)).write_bytes(png(7))
    samples = list_folder(tmp_path)
    assert samples["id"].tolist() == [
        "a/caf\\xe9.png",
        "b/na\\xefve.png",
        "b/plain.png",
        "caf\\xe9/4.png",
    ]
    assert (
        read_folder(ImageSource("folder", tmp_path), labelled=False).samples["id"].tolist()
        == samples["id"].tolist()
    )
    samples.to_parquet(tmp_path / "samples.parquet")  # surrogates could not be written
    assert all(read_bytes(path) == png(7) for path in samples["path"])
    assert content_hashes(samples, tmp_path / "index.parquet").unreadable == ()


@given(st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name))
def test_any_name_of_a_file_comes_back(name):
    path = os.fsdecode(b"/data/" + name)
    assert locator_file(encode_path(path)) == path
    encode_path(path).encode()
    printable_name(path).encode()


def test_links_in_folders(tmp_path):
    """To a folder that is read already: counted; to itself: an image that fails."""
    for name in ("cat/1.png", "dog/1.png"):
        write(tmp_path / name, png(1))
    (tmp_path / "tiger").symlink_to(tmp_path / "cat")
    (tmp_path / "cat/me").symlink_to(tmp_path / "cat/me")
    (tmp_path / "cat/me.png").symlink_to(tmp_path / "cat/me.png")
    listing = read_folder(ImageSource("folder", tmp_path))
    assert set(listing.samples["id"]) == {"cat/1.png", "dog/1.png", "cat/me.png"}
    assert listing.found == counted(listing) == 5


def test_two_files_whose_names_are_one_to_people(tmp_path):
    """As two systems write an accent: each keeps the name that the disk has."""
    names = [unicodedata.normalize(form, "café/1.png") for form in ("NFC", "NFD")]
    for name in names:
        write(tmp_path / name, png(1))
    listing = read_folder(ImageSource("folder", tmp_path), labelled=False)
    assert set(listing.samples["id"]) == set(names)
    assert all(Path(path).is_file() for path in listing.samples["path"])


def test_folders_that_differ_in_blanks_or_the_form_of_accents(tmp_path):
    """One class, as people read it, and told."""
    for name in (
        "a /1.png",
        "a/2.png",
        unicodedata.normalize("NFD", "café/1.png"),
        unicodedata.normalize("NFC", "café/2.png"),
    ):
        write(tmp_path / name, png(1))
    listing = read_folder(ImageSource("folder", tmp_path))
    assert set(listing.samples["label"]) == {"a", unicodedata.normalize("NFC", "café")}
    assert len([note for note in listing.notes if "are one class" in note]) == 2


def test_heif_images_of_a_phone(tmp_path):
    """With the plug-in they are images as others, also under the name of a JPEG."""
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 30))).save(buffer)
    for name in ("a/1.HEIC", "b/2.jpg", "b/without"):
        write(tmp_path / name, buffer.getvalue())
    samples = list_folder(tmp_path)
    assert samples["label"].tolist() == ["a", "b", "b"]
    for path in samples["path"]:
        image = decode_image(read_bytes(path))
        assert image.size == (64, 48)
        assert abs(int(np.asarray(image)[..., 0].mean()) - 200) < 12


# ---- archives

CLASS_FOLDERS = [
    (f"{label}/{n}.png", png(n + 10 * len(label))) for label in ("cat", "dog") for n in range(3)
]


@pytest.mark.parametrize("name", ["p.tar", "p.tar.gz", "p.tgz", "p.tar.bz2", "p.tar.xz", "p.zip"])
@pytest.mark.parametrize("wrapper", ["", "photos/", "./"])
def test_archives_of_class_folders(tmp_path, name, wrapper):
    """The labels are the folders, also in a folder around them, and a member's bytes are those of
    the file it was.
    """
    members = [
        (wrapper + member, data)
        for member, data in [*CLASS_FOLDERS, ("notes.txt", b"hello"), ("cat/._0.png", b"mac")]
    ]
    if name.endswith("zip"):
        pack_zip(tmp_path / name, members)
    else:
        mode = {"tar": "w", "gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}[
            name.rpartition(".")[2]
        ]
        pack_tar(tmp_path / name, members, mode)
    listing = read_source(detect_source(tmp_path / name))
    prefix = f"{name}/" + wrapper.removeprefix("./")
    assert labels(listing) == {f"{prefix}{member}": member[:3] for member, _ in CLASS_FOLDERS}
    assert [read_bytes(path) for path in listing.samples["path"]] == [
        data for _, data in CLASS_FOLDERS
    ]
    assert listing.found == counted(listing) == 8
    backwards = [read_bytes(path) for path in reversed(listing.samples["path"].tolist())]
    assert backwards == [data for _, data in reversed(CLASS_FOLDERS)]


def test_a_label_that_is_no_text_is_told(tmp_path):
    """Half a character, in a side file and in a table."""
    pack_tar(tmp_path / "s.tar", [("a.png", png(1)), ("a.json", rb'{"label": "\ud800"}')])
    listing = read_archives(ImageSource("archive", tmp_path / "s.tar"))
    assert [str(item) for item in listing.left_out] == [
        "1 side file that is no JSON object: s.tar/a.json"
    ]
    (tmp_path / "t.jsonl").write_text(r'{"path": "a.png", "label": "\ud800"}')
    with pytest.raises(SourceError, match=r"line 1: no JSON .*surrogates not allowed"):
        read_table_file(tmp_path / "t.jsonl")


def test_names_with_dots_and_several_images_of_one_key(tmp_path):
    """Every image is a row; its own side file counts before the one of WebDataset's key."""
    pack_tar(
        tmp_path / "s.tar",
        [("v1.0.png", png(1)), ("v1.1.png", png(2)), ("v1.1.cls", b"own"), ("v1.cls", b"shared"), ("b.left.png", png(3)),
         ("b.right.png", png(4)), ("b.json", b'{"label": "both", "age": 7, "id": 3}'), ("lost.cls", b"x")],
    )  # fmt: skip
    listing = read_archives(ImageSource("archive", tmp_path / "s.tar"))
    assert labels(listing) == {
        "s.tar/v1.0.png": "shared", "s.tar/v1.1.png": "own", "s.tar/b.left.png": "both", "s.tar/b.right.png": "both",
    }  # fmt: skip
    assert listing.found == counted(listing) == 8
    assert [str(item) for item in listing.left_out] == ["1 side file of no image: s.tar/lost.cls"]
    assert any("2 samples" in note and "each image is a row" in note for note in listing.notes)


def test_of_members_of_one_name_the_last_counts(tmp_path):
    """As `tar -x` has it, for images and labels alike, whatever way the name is written."""
    pack_tar(
        tmp_path / "s.tar",
        [
            ("a.png", png(1)),
            ("a.cls", b"old"),
            ("b.png", png(2)),
            ("b.cls", b"kept"),
            ("./a.png", png(9)),
            ("a.cls", b"new"),
        ],
    )
    listing = read_archives(ImageSource("archive", tmp_path / "s.tar"))
    assert labels(listing) == {"s.tar/b.png": "kept", "s.tar/a.png": "new"}
    assert read_bytes(listing.samples["path"].iloc[1]) == png(9)
    assert [(item.count, item.reason) for item in listing.left_out] == [
        (2, "members that a later one of the same name replaces")
    ]
    assert listing.found == counted(listing) == 6


def test_links_in_archives(tmp_path):
    """tar writes a file's second name as a link: it is an image as others; a link to nothing is
    counted.
    """
    write(tmp_path / "t/cat/1.png", png(1))
    write(tmp_path / "t/dog/2.png", png(2))
    os.link(tmp_path / "t/cat/1.png", tmp_path / "t/dog/hard.png")
    (tmp_path / "t/dog/soft.png").symlink_to("../cat/1.png")
    (tmp_path / "t/dog/gone.png").symlink_to("../bird/1.png")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(tmp_path / "t", "t")
    listing = read_archives(ImageSource("archive", tmp_path / "s.tar"))
    assert {name.rpartition("/")[2]: read_bytes(path) for name, path in listing.samples[["id", "path"]].itertuples(index=False)} == {
        "1.png": png(1), "2.png": png(2), "hard.png": png(1), "soft.png": png(1),
    }  # fmt: skip
    assert [str(item) for item in listing.left_out] == [
        "1 link to what is not in the archive: s.tar/t/dog/gone.png"
    ]
    assert listing.found == counted(listing) == 5


def test_shards_of_one_name_in_two_folders(tmp_path):
    """Their ids have the folders, and a shard's name that is a side of a split is one."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        pack_tar(tmp_path / place / "s.tar", [("1.png", png(1)), ("1.cls", b"x")])
    listing = read_archives(ImageSource("archive", [tmp_path / "a/s.tar", tmp_path / "b/s.tar"]))
    assert listing.samples["id"].tolist() == ["a/s.tar/1.png", "b/s.tar/1.png"]
    for side in ("train", "val"):
        pack_tar(tmp_path / f"{side}-000.tar", [("1.png", png(1)), ("1.cls", b"x")])
    assert read_archives(ImageSource("archive", tmp_path)).samples["split"].tolist() == [
        "train",
        "val",
    ]


def test_archives_that_lie(tmp_path):
    """A member whose bytes are not those that its archive says is unreadable, and asks for no
    memory.
    """
    packed = pack_zip(tmp_path / "z.zip", [("a/1.png", bytes(10_000_000)), ("b/2.png", png(2))])
    samples = read_archives(ImageSource("archive", packed)).samples
    details = samples["path"].iloc[0].partition("::zip:")[2].split(":")
    lying = f"{packed}::zip:{details[0]}:{details[1]}:100:{':'.join(details[3:])}"
    with pytest.raises(OSError, match="checksum"):
        read_bytes(lying)
    whole = pack_tar(tmp_path / "t.tar", [("a/1.png", png(1)), ("b/2.png", png(2))])
    offset, _, name = (
        read_archives(ImageSource("archive", whole))
        .samples["path"]
        .iloc[0]
        .partition("::tar:")[2]
        .split(":", 2)
    )
    with pytest.raises(OSError, match="the archive ends"):
        read_bytes(f"{whole}::tar:{offset}:{10**18}:{name}")
    for broken in (
        "x::tar:1",
        f"{whole}::tar:a:b:c",
        f"{packed}::zip:1:2:3:4:5:n",
        f"{packed}::parquet:c:0",
        f"{packed}::arrow:c:0",
    ):
        with pytest.raises(OSError):
            read_bytes(broken)


def test_zip_members_that_cannot_be_read_are_counted(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a/1.png", png(1))
        archive.writestr("b/2.png", png(2), zipfile.ZIP_DEFLATED)
        archive.writestr("b/3.png", png(3), zipfile.ZIP_LZMA)
        archive.writestr("b/clip.mov", b"no image")
    listing = read_archives(ImageSource("archive", tmp_path / "z.zip"))
    assert listing.samples["label"].tolist() == ["a", "b"]
    assert {item.count for item in listing.left_out} == {1}
    assert "compressed in another way" in str(listing.left_out)
    assert listing.found == counted(listing) == 4


# ---- tables


def read_text(tmp_path: Path, text: str, name: str = "t.csv", **options: object) -> Listing:
    write(tmp_path / name, text.encode())
    return read_tables(ImageSource("table", tmp_path / name, **options))  # type: ignore[arg-type]


def test_text_stays_as_written(tmp_path):
    """Class codes, words that other programs take for nothing, leading zeros; blanks at the ends
    are no part of a word.
    """
    rows = ["1.10", "1.1", "01", "1", "None", "NA", "nan", "null", " padded ", "TRUE", "1e3", "1_0"]
    text = (
        "path,label,group\n"
        + "".join(f"{n}.png,{label},00{n}\n" for n, label in enumerate(rows))
        + "x.png,,7\n"
    )
    for name, table in (("t.csv", text), ("t.tsv", text.replace(",", "\t"))):
        samples = read_text(tmp_path, table, name).samples
        assert samples["label"].tolist()[:-1] == [label.strip() for label in rows]
        assert samples["label"].isna().tolist() == [False] * len(rows) + [True]
        assert samples["group"].tolist()[0] == "000"


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (b"path;label\na.png;x, y\nb.png;z\n", "semicolons"),
        (b"path\tlabel\na.png\tx, y\nb.png\tz\n", "tabs"),
        (b"path|label\na.png|x, y\nb.png|z\n", "vertical bars"),
        ("\ufeffpath;label\r\na.png;x, y\r\nb.png;z\r\n".encode(), "semicolons"),
        (b"sep=;\r\npath;label\r\na.png;x, y\r\nb.png;z\r\n", "semicolons"),
        (b"path;label\ra.png;x, y\rb.png;z\r", "semicolons"),
        ("path\tlabel\na.png\tx, y\nb.png\tz\n".encode("utf-16"), "tabs"),
        (b'path, label\n"a.png", "x, y"\n"b.png", "z"\n', None),
    ],
)
def test_other_separators_and_encodings(tmp_path, data, note):
    """Read, and told."""
    write(tmp_path / "t.csv", data)
    listing = read_tables(ImageSource("table", tmp_path / "t.csv"))
    assert listing.samples["label"].tolist() == ["x, y", "z"]
    assert listing.samples["id"].tolist() == ["a.png", "b.png"]
    assert any(f"separated by {note}" in said for said in listing.notes) == (note is not None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.png,cat\nb.png,dog\n", r"the first line looks like an image.*for example: path,label"),
        ("path,label,label\na.png,x,y\n", r"first 'label'. Give each its own"),
        ("path,label\nhttps://example.org/a.png,x\n", r"images are read from disk. Download them"),
        (
            "number,label\n1,x\n2,y\n",
            r"no column names image files.*images.path_pattern: folder/\{number\}.jpg",
        ),
        ("cat/a.png 1\ndog/b.png 0\n", r"by blanks. Save it as CSV.*\(echo path,label; tr -s"),
        ("before,after\na.png,b.png\nc.png,d.png\n", r"before, after could each be the images"),
        ("path,label\n,x\n,y\n", r"no rows that can be used \(2 rows that name no image"),
    ],
)
def test_tables_that_could_be_misread_are_refused(tmp_path, text, said):
    with pytest.raises(SourceError, match=said):
        read_text(tmp_path, text)


@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.csv.gz"])
@pytest.mark.parametrize("header", ["", "path  label\n"])
def test_the_command_for_blanks_leaves_the_table_and_writes_a_csv(tmp_path, name, header):
    """`>` would empty a table of the same name before it is read."""
    data = f"{header}cat/a.png 1\ndog/b.png 0\n".encode()
    table = tmp_path / name
    table.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(SourceError, match="separated by blanks") as error:
        read_tables(ImageSource("table", table))
    kept = table.read_bytes()
    subprocess.run(str(error.value).split("first line: ")[1], shell=True, check=True)
    assert table.read_bytes() == kept
    (written,) = (path for path in tmp_path.iterdir() if path != table)
    assert read_tables(ImageSource("table", written)).samples["label"].tolist() == ["1", "0"]


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    """No path, no id, the same row again, excluded: found is the table's rows."""
    listing = read_text(
        tmp_path,
        "id,path,label\n1,a.png,x\n2,,y\n,c.png,x\n1,a.png,x\n5,e.png,y\n6,sub/f.png,y\n",
        exclude=("6",),
    )
    assert listing.samples["id"].tolist() == ["1", "5"]
    assert listing.found == counted(listing) == 6
    assert sorted(item.reason for item in listing.left_out) == [
        "entries that images.exclude names", "rows that are another row once more", "rows that name no image", "rows without an id",
    ]  # fmt: skip


def test_rows_that_are_predicted_stay_in_their_places(tmp_path):
    """A row that stands twice, or names no image, has its row all the same: people join predictions
    by position, too.
    """
    write(tmp_path / "t.csv", b"path,id\na.png,1\n,2\na.png,1\nb.png,\n")
    listing = read_source(detect_source(tmp_path / "t.csv"), labelled=False)
    assert listing.samples["id"].tolist() == ["1", "2", "1", "b.png"]
    assert [Path(path).name for path in listing.samples["path"]] == [
        "a.png",
        "row 2 names no image",
        "a.png",
        "b.png",
    ]
    assert listing.found == counted(listing) == 4


def test_a_table_of_nothing_but_images(tmp_path):
    pq.write_table(hugging_face_table(3).drop_columns(["label"]), tmp_path / "t.parquet")
    assert len(read_source(detect_source(tmp_path / "t.parquet"), labelled=False).samples) == 3
    pq.write_table(
        pa.table({"image": pa.array([png(1), png(2)], pa.binary())}), tmp_path / "t.parquet"
    )
    samples = read_source(detect_source(tmp_path / "t.parquet"), labelled=False).samples
    assert [read_bytes(path) for path in samples["path"]] == [png(1), png(2)]


def test_paths_of_other_systems(tmp_path):
    """Backslashes, file URLs, and names whose accents the disk has in the other form."""
    name = unicodedata.normalize("NFD", "é.png")
    write(tmp_path / "sub" / name, png(1))
    write(tmp_path / "sub/b.png", png(2))
    composed = unicodedata.normalize("NFC", name)
    listing = read_text(
        tmp_path, f"path,label\nsub/{composed},x\nsub\\b.png,y\nfile://{tmp_path}/sub/b.png,z\n"
    )
    assert all(Path(path).is_file() for path in listing.samples["path"])
    assert listing.samples["id"].iloc[0] == f"sub/{composed}"


def test_ids_without_an_ending(tmp_path):
    """Kaggle's tables: the images are found in the folder beside, with their zeros."""
    for number in range(4):
        write(tmp_path / f"train/000{number}.jpg", png(number))
    listing = read_text(tmp_path, "id,breed\n" + "".join(f"000{n},b{n % 2}\n" for n in range(4)))
    assert listing.samples["id"].tolist() == ["0000", "0001", "0002", "0003"]
    assert all(Path(path).is_file() for path in listing.samples["path"])
    assert any("the images are train/{id}.jpg" in note for note in listing.notes)
    explicit = read_text(tmp_path, "code,breed\n0001,x\n", path_pattern="train/{code}.jpg")
    assert explicit.samples["path"].tolist() == [str(tmp_path / "train/0001.jpg")]
    for number in range(4):
        write(tmp_path / f"masks/000{number}.png", png(number))
    listing = read_text(tmp_path, "id,breed\n0001,x\n0002,y\n")
    assert listing.samples["path"].tolist() == [str(tmp_path / f"train/000{n}.jpg") for n in (1, 2)]
    (tmp_path / "masks").rename(tmp_path / "small")
    with pytest.raises(
        SourceError,
        match=r"could name the images (small/\{id\}.png or train|train/\{id\}.jpg or small)",
    ):
        read_text(tmp_path, "id,breed\n0001,x\n0002,y\n")
    with pytest.raises(SourceError, match=r"has no column 'cod'.*The columns are: code, breed"):
        read_text(tmp_path, "code,breed\n0001,x\n", path_pattern="train/{cod}.jpg")


def test_a_column_of_classes_names_no_images(tmp_path):
    """Labels 0 and 1 beside images 0.png and 1.png: the ids, which do not repeat, name
    the images.
    """
    for number in range(6):
        write(tmp_path / f"{number}.png", png(number))
    listing = read_text(tmp_path, "label,id\n" + "".join(f"{n % 2},{n}\n" for n in range(6)))
    assert [Path(path).name for path in listing.samples["path"]] == [f"{n}.png" for n in range(6)]


def test_a_pattern_finds_each_file_in_the_folder_that_has_it(tmp_path):
    """Of the folders that `*` stands for; a file that two of them have is refused."""
    for name in ("part_1/01.jpg", "part_2/02.jpg", "other/01.jpg"):
        write(tmp_path / name, png(1))
    listing = read_text(tmp_path, "code,l\n1,x\n2,y\n3,z\n", path_pattern="part_*/{code:02}.jpg")
    assert listing.samples["id"].tolist() == ["part_1/01.jpg", "part_2/02.jpg", "part_*/03.jpg"]
    write(tmp_path / "part_2/01.jpg", png(1))
    with pytest.raises(SourceError, match=r"1 file lies in several.* 01.jpg in part_1 and part_2"):
        read_text(tmp_path, "code,l\n1,x\n2,y\n", path_pattern="part_*/{code:02}.jpg")


def test_a_pattern_with_a_star_is_found_in_any_folder(tmp_path):
    """An absolute one, and one whose names have brackets; a table whose rows all lack the value has
    no image.
    """
    for name in ("s[a]1/1.jpg", "s[a]2/2.jpg"):
        write(tmp_path / "images" / name, png(1))
    for start in ("images", f"{tmp_path}/images"):
        listing = read_text(tmp_path, "id,l\n1,x\n2,y\n", path_pattern=f"{start}/s[a]*/{{id}}.jpg")
        found = [Path(path).relative_to(tmp_path) for path in listing.samples["path"]]
        assert found == [Path("images/s[a]1/1.jpg"), Path("images/s[a]2/2.jpg")]
    with pytest.raises(SourceError, match="2 rows that name no image"):
        read_text(tmp_path, "id,l\n,x\n,y\n", path_pattern="images/s*/{id}.jpg")


def test_paths_with_folders_are_not_looked_for_elsewhere(tmp_path, monkeypatch):
    """A walk through all that lies below a table can take minutes."""

    def walk(folder):
        pytest.fail("the folders were walked")

    monkeypatch.setattr(os, "walk", walk)
    listing = read_text(tmp_path, "path,l\ngone/1.jpg,x\ngone/2.jpg,y\n")
    assert listing.samples["id"].tolist() == ["gone/1.jpg", "gone/2.jpg"]


def test_a_column_whose_name_ends_as_a_width_is_a_column(tmp_path):
    listing = read_text(tmp_path, "at:01,l\n1,x\n2,y\n", path_pattern="{at:01}.jpg")
    assert listing.samples["id"].tolist() == ["1.jpg", "2.jpg"]


def test_a_column_called_image_counts_before_one_of_masks(tmp_path):
    """Also where some of its images are of another kind; ids in it are asked about, and not passed
    over.
    """
    listing = read_text(tmp_path, "image,mask,label\ni/a.heic,m/a.png,x\ni/b.png,m/b.png,y\n")
    assert listing.samples["id"].tolist() == ["i/a.heic", "i/b.png"]
    with pytest.raises(
        SourceError,
        match=r"image, mask could each be the images; name one: images.path_column: image",
    ):
        read_text(tmp_path, "image,mask,label\n0,m/a.png,x\n1,m/b.png,y\n")


@pytest.mark.parametrize("pattern", ["i/{code:05d}.png", "{0}", "{code!x}", "i/plain.png"])
def test_patterns_that_name_no_column(tmp_path, pattern):
    with pytest.raises(SourceError, match=r"images.path_pattern .*such as train/\{id\}.jpg"):
        read_text(tmp_path, "code,im.code,label\n1,7,x\n", path_pattern=pattern)


def test_patterns_that_name_columns_twice_or_with_dots(tmp_path):
    listing = read_text(
        tmp_path, "code,im.code,label\n01,7,x\n", path_pattern="i/{code}/{code}-{im.code}.png"
    )
    assert listing.samples["id"].tolist() == ["i/01/01-7.png"]


def test_a_column_id_that_repeats_is_no_id(tmp_path):
    """A patient's number is a column like others: the paths tell the rows apart, and
    that is told.
    """
    listing = read_text(tmp_path, "path,id,label\na.png,7,x\nb.png,7,y\n")
    assert listing.samples["id"].tolist() == ["a.png", "b.png"]
    assert listing.samples["image_id"].tolist() == ["7", "7"]
    assert any("'image_id'" in note for note in listing.notes)


def test_what_is_excluded_by_the_name_that_is_printed(tmp_path):
    """In any Unicode form, with ./ before it, and for rows of several tables whose names have the
    table's.
    """
    for name in (unicodedata.normalize("NFD", "é/1.png"), "b/2.png"):
        write(tmp_path / name, png(1))
    for pattern in (
        unicodedata.normalize("NFC", "é/1.png"),
        unicodedata.normalize("NFD", "é"),
        "./é/",
    ):
        assert read_folder(
            ImageSource("folder", tmp_path, exclude=[pattern]), labelled=False
        ).samples["id"].tolist() == ["b/2.png"]
    for side in ("train", "test"):
        write(tmp_path / f"t/{side}.csv", b"id,path,label\n1,a.png,x\n2,b.png,y\n")
    assert (
        "images.exclude: 'é/2.png' matches nothing"
        in read_folder(
            ImageSource("folder", tmp_path, exclude=["é/2.png", "b"]), labelled=False
        ).notes
    )
    every = read_tables(ImageSource("table", tmp_path / "t/*.csv"))
    assert every.samples["id"].tolist() == [
        "test.csv/1",
        "test.csv/2",
        "train.csv/1",
        "train.csv/2",
    ]
    fewer = read_tables(ImageSource("table", tmp_path / "t/*.csv", exclude=("train.csv/1",)))
    assert fewer.samples["id"].tolist() == ["test.csv/1", "test.csv/2", "train.csv/2"]
    assert fewer.found == counted(fewer) == 4


def test_json_tables(tmp_path):
    """One object a line, a list of objects, paths and labels; numbers keep their digits."""
    rows = [
        {"path": "a.png", "label": "01", "code": 123456789012345678},
        {"path": "b.png", "label": None, "code": None},
    ]
    lines = read_text(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "t.jsonl").samples
    listed = read_text(tmp_path, json.dumps(rows), "t.json").samples
    for samples in (lines, listed):
        assert samples["label"].tolist()[0] == "01"
        assert samples["code"].tolist()[0] == 123456789012345678
    mapped = read_text(tmp_path, json.dumps({"a.png": "cat", "b.png": "dog"}), "m.json").samples
    assert mapped["label"].tolist() == ["cat", "dog"]
    with pytest.raises(SourceError, match=r"t.jsonl, line 2: no JSON"):
        read_text(tmp_path, '{"path": "a.png"}\n{broken\n', "t.jsonl")
    write(tmp_path / "z.csv.gz", gzip.compress(b"path,label\na.png,x\n"))
    assert read_tables(ImageSource("table", tmp_path / "z.csv.gz")).samples["label"].tolist() == [
        "x"
    ]


def test_coco(tmp_path):
    """Categories of an image's annotations are its label, or its labels where some image has
    several.
    """
    coco = {
        "images": [
            {"id": 5, "file_name": "a.png"},
            {"id": 9, "file_name": "b.png"},
            {"id": 11, "file_name": "c.png"},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 44, "name": "dog"}],
        "annotations": [
            {"image_id": 5, "category_id": 44},
            {"image_id": 5, "category_id": 44},
            {"image_id": 9, "category_id": 1},
        ],
    }
    samples = read_text(tmp_path, json.dumps(coco), "c.json").samples
    assert samples["label"].fillna("").tolist() == ["dog", "cat", ""]
    coco["annotations"].append({"image_id": 5, "category_id": 1})
    listing = read_text(tmp_path, json.dumps(coco), "c.json")
    assert listing.samples["label"].tolist()[0] == ["dog", "cat"]
    assert any("task.kind: multi" in note for note in listing.notes)
    coco["annotations"].append({"image_id": 5, "category_id": 3})
    with pytest.raises(SourceError, match=r"not COCO as expected: KeyError 3"):
        read_text(tmp_path, json.dumps(coco), "c.json")


def hugging_face_table(rows: int, first: int = 0) -> pa.Table:
    """As `datasets` writes Parquet: images as structs, classes as numbers whose names are in the
    metadata.
    """
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog", "01"], "_type": "ClassLabel"},
    }
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in range(first, first + rows)]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": [n % 3 for n in range(rows)],
        }
    )
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


@pytest.mark.parametrize("kind", ["struct", "bytes", "arrow"])
def test_images_in_tables(tmp_path, kind):
    """Parquet and Arrow that hold the images: every row in its row group, and the classes by their
    names.
    """
    table = hugging_face_table(7)
    if kind == "bytes":
        table = table.set_column(0, "image", pa.array([png(n) for n in range(7)], pa.binary()))
    file = tmp_path / ("t.arrow" if kind == "arrow" else "t.parquet")
    if kind == "arrow":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        pq.write_table(table, file, row_group_size=3)
    listing = read_source(detect_source(file))
    assert listing.samples["label"].tolist() == ["cat", "dog", "01", "cat", "dog", "01", "cat"]
    assert [read_bytes(path) for path in listing.samples["path"]] == [png(n) for n in range(7)]
    assert listing.samples["id"].tolist()[0] == ("t.parquet/0" if kind == "bytes" else "0.png")


def test_parquet_files_of_a_split(tmp_path):
    """`train-00000-of-00002.parquet`: the sides of the split are the names, and equal ids are told
    apart by their file.
    """
    (tmp_path / "data").mkdir()
    for name, first in (
        ("train-00000-of-00002", 0),
        ("train-00001-of-00002", 4),
        ("test-00000-of-00001", 0),
    ):
        pq.write_table(hugging_face_table(4, first), tmp_path / "data" / f"{name}.parquet")
    for location in (tmp_path, tmp_path / "data", tmp_path / "data/t*.parquet"):
        samples = read_source(detect_source(location)).samples
        assert samples["split"].value_counts().to_dict() == {"train": 8, "test": 4}
        assert samples["id"].is_unique


def test_a_folder_that_datasets_saved(tmp_path):
    """Its own list of files counts, not what else lies there; rows selected by a second file are
    refused.
    """
    table = hugging_face_table(5)
    for name in ("data-00000-of-00001.arrow", "stale.arrow"):
        with (
            pa.OSFile(str(tmp_path / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    write(
        tmp_path / "state.json",
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}).encode(),
    )
    assert detect_source(tmp_path).kind == "table"
    listing = read_source(detect_source(tmp_path))
    assert listing.found == counted(listing) == 5
    write(
        tmp_path / "state.json",
        b'{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}',
    )
    with pytest.raises(SourceError, match="flatten_indices"):
        read_source(detect_source(tmp_path))
    write(tmp_path / "state.json", b"[" * 10_000)
    with pytest.raises(SourceError, match=r"not a whole folder .*RecursionError"):
        detect_source(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_an_imagefolder_with_metadata(tmp_path, name):
    """As Hugging Face has it: the table beside the images counts, in each side of a split, too;
    other tables do not.
    """

    def metadata(folder: Path, names: list[str]) -> None:
        rows = [{"file_name": file, "label": f"l{n % 2}"} for n, file in enumerate(names)]
        frame = pd.DataFrame(rows)
        folder.mkdir(parents=True, exist_ok=True)
        frame.to_csv(folder / name, index=False) if name.endswith("csv") else frame.to_json(
            folder / name, orient="records", lines=True
        )

    for place in (
        "one/a/1.png",
        "one/b/2.png",
        "two/train/1.png",
        "two/train/2.png",
        "two/test/1.png",
    ):
        write(tmp_path / place, png(1))
    metadata(tmp_path / "one", ["a/1.png", "b/2.png"])
    assert read_source(detect_source(tmp_path / "one")).samples["label"].tolist() == ["l0", "l1"]
    write(tmp_path / "one/b/3.png", png(1))
    listing = read_source(detect_source(tmp_path / "one"))
    assert [str(item) for item in listing.left_out] == ["1 image that no row names: b/3.png"]
    assert listing.found == counted(listing) == 3
    metadata(tmp_path / "two/train", ["1.png", "2.png"])
    metadata(tmp_path / "two/test", ["1.png"])
    samples = read_source(detect_source(tmp_path / "two")).samples
    assert sorted(samples["split"]) == ["test", "train", "train"]
    assert all(Path(path).is_file() for path in samples["path"])
    (tmp_path / "two/train" / name).unlink()
    (tmp_path / "two/test" / name).unlink()
    metadata(tmp_path / "two", ["train/1.png", "train/2.png", "test/1.png"])  # above the sides
    samples = read_source(detect_source(tmp_path / "two")).samples
    assert samples["split"].tolist() == ["train", "train", "test"]
    write(tmp_path / "three/a/1.png", png(1))
    write(tmp_path / "three/metadata.csv", b"key,value\nauthor,me\n")
    assert detect_source(tmp_path / "three").kind == "folder"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("t.xlsx", "spreadsheet.*save it as CSV"),
        ("t.mat", "MATLAB file.*scipy.io.loadmat"),
        ("t.tfrecord", "TFRecord.*files or tar shards.*`pip install tfrecord`"),
        ("train-00000-of-00001", "TFRecord"),
        ("t.lmdb", "LMDB.*`pip install lmdb`"),
        ("t.pkl", "Python pickle.*numpy.savez"),
        ("t.rar", "compressed archive.*pack it as .zip or .tar"),
        ("t.dcm", "DICOM.*`pip install pydicom`"),
        ("t.nii.gz", "medical volume.*`pip install nibabel`"),
        ("t.svs", "whole-slide image.*`pip install openslide-python openslide-bin`"),
        ("t.jxl", "JPEG XL.*djxl"),
        ("t.xml", "XML annotation.*COCO"),
        ("t.mp4", "video.*ffmpeg"),
        ("t.what", "neither an image nor anything that holds images"),
    ],
)
def test_a_format_that_is_not_read_is_named(tmp_path, name, said):
    """As what it is, with how to convert it."""
    with pytest.raises(SourceError, match=said):
        read_source(detect_source(write(tmp_path / name, b"0123")))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            pickle.dumps({"data": [1]}, protocol=2),
            "could run any code.*torchvision.datasets.CIFAR10",
        ),
        (bytes(128) + b"DICM", "IM0001 is not read here .DICOM.: write its pixels beside it"),
        (b"\xff\x0a1234", "JPEG XL image"),
    ],
)
def test_a_format_without_a_suffix_is_known_by_its_first_bytes(tmp_path, data, said):
    """As the only files of a folder, and when it is named; nothing is unpickled."""
    image = write(tmp_path / "photos/a/IM0001", data)
    for location in (tmp_path / "photos", image):
        with pytest.raises(SourceError, match=said):
            read_source(detect_source(location))


def test_a_list_of_files_needs_no_names_of_columns(tmp_path):
    """As `find` writes one, with commas in the names of QuPath's tiles."""
    names = ["a/1 [d=1,x=0,y=512].png", "b/2.jpg"]
    listing = read_text(tmp_path, "\n".join(names) + "\n", "list.txt")
    assert listing.samples["id"].tolist() == names
    assert listing.notes == ("list.txt: a path in each line, and no names of columns",)
    for rows in (
        "1.jpg,2.jpg\n3.jpg,4.jpg\n",
        "cat,1.jpg\ndog,2.jpg\n",
        "cat\t1.jpg\n",
        "cat;1.jpg",
    ):
        with pytest.raises(SourceError, match="first line looks like an image"):
            read_text(tmp_path, rows, "rows.txt")


def test_an_address_is_told_to_be_downloaded(tmp_path):
    with pytest.raises(SourceError, match=r"read from disk: download them first\. Give"):
        detect_source("s3://bucket/photos")
