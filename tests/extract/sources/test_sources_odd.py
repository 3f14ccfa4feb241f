"""Sources that are odd and yet people's own: links, half-labelled shards, stray quotes, text stored
as bytes.
"""

import gzip
import io
import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from headrace.extract.errors import SourceError
from headrace.extract.images.locators import read_bytes
from headrace.extract.sources.archive import read_archives
from headrace.extract.sources.array import read_array
from headrace.extract.sources.listing import Listing
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.table import read_table_file
from headrace.extract.sources.tabular import read_tables


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), value % 256, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def counted(listing: Listing) -> int:
    return len(listing.samples) + listing.annotations + sum(item.count for item in listing.left_out)


def column(listing: Listing, name: str) -> dict[str, object]:
    return dict(zip(listing.samples["id"], listing.samples[name], strict=True))


def pack_tar(path: Path, members: list[tuple[str, bytes | tuple[bytes, str]]]) -> Path:
    """A tar archive of files (name, bytes) and links (name, (type of link, target)), in
    this order.
    """
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                entry.type, entry.linkname = data
                archive.addfile(entry)
            else:
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return path


def soft(target: str) -> tuple[bytes, str]:
    return tarfile.SYMTYPE, target


def hard(target: str) -> tuple[bytes, str]:
    return tarfile.LNKTYPE, target


# ---- archives


@pytest.mark.skipif(shutil.which("tar") is None, reason="tar itself is the reference")
@pytest.mark.parametrize(
    "members",
    [
        [
            ("cat/b.png", png(1)),
            ("cat/a.png", soft("b.png")),
            ("cat/a.png", png(2)),
            ("dog/1.png", png(3)),
        ],
        [
            ("cat/a.png", png(2)),
            ("dog/1.png", png(3)),
            ("cat/b.png", png(1)),
            ("cat/a.png", soft("b.png")),
        ],
        [
            ("cat/c.png", soft("b.png")),
            ("cat/b.png", soft("a.png")),
            ("cat/a.png", png(1)),
            ("dog/1.png", png(3)),
        ],
        [
            ("cat/a.png", png(1)),
            ("cat/b.png", hard("cat/a.png")),
            ("cat/a.png", png(2)),
            ("dog/1.png", png(3)),
        ],
        [("cat/a.png", png(1)), ("cat/a.png", hard("cat/a.png")), ("dog/1.png", png(3))],
        [
            ("cat/a.png", soft("b.png")),
            ("cat/b.png", png(1)),
            ("cat/b.png", png(2)),
            ("dog/1.png", png(3)),
        ],
        [("cat/a.png", soft("../dog/1.png")), ("dog/1.png", png(3))],
    ],
)
def test_links_and_later_members_of_one_name_count_as_tar_unpacks_them(tmp_path, members):
    file = pack_tar(tmp_path / "t.tar", members)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", str(file), "-C", str(tmp_path / "out")], check=True)
    listing = read_archives(ImageSource("archive", file))
    assert listing.found == counted(listing) == len(members)
    read = {
        name.removeprefix("t.tar/"): read_bytes(path)
        for name, path in column(listing, "path").items()
    }
    assert read == {name: (tmp_path / "out" / name).read_bytes() for name in dict(members)}


def test_links_that_lead_nowhere_or_back_to_themselves_are_left_out(tmp_path):
    file = pack_tar(
        tmp_path / "t.tar",
        [
            ("cat/a.png", soft("b.png")),
            ("cat/b.png", soft("c.png")),
            ("cat/c.png", soft("a.png")),
            ("cat/self.png", soft("self.png")),
            ("cat/gone.png", soft("nowhere.png")),
            ("cat/1.png", png(1)),
            ("cat/1.png", soft("nowhere.png")),
            ("cat/2.png", png(2)),
        ],
    )
    listing = read_archives(ImageSource("archive", file))
    assert list(listing.samples["id"]) == ["t.tar/cat/2.png"]
    assert {item.reason: item.count for item in listing.left_out} == {
        "links to what is not in the archive": 6,
        "members that a later one of the same name replaces": 1,
    }
    assert listing.found == counted(listing) == 8


def test_a_long_chain_of_links_is_followed(tmp_path):
    links = [(f"{n}.png", soft(f"{n + 1}.png")) for n in range(1500)]
    listing = read_archives(
        ImageSource("archive", pack_tar(tmp_path / "t.tar", [*links, ("1500.png", png(1))]))
    )
    assert len(listing.samples) == 1501
    assert {read_bytes(path) for path in listing.samples["path"].iloc[[0, 700, 1500]]} == {png(1)}


def test_an_archive_keeps_its_order_with_links_in_it(tmp_path):
    file = pack_tar(
        tmp_path / "t.tar", [("b.png", png(1)), ("a.png", soft("c.png")), ("c.png", png(2))]
    )
    assert [
        name.removeprefix("t.tar/")
        for name in read_archives(ImageSource("archive", file)).samples["id"]
    ] == [
        "b.png",
        "a.png",
        "c.png",
    ]


def test_lists_of_scalars_in_json_side_files_are_cells(tmp_path):
    data = {
        "label": ["cat", "indoor"],
        "box": [1, 2.5],
        "deep": [[1]],
        "object": {"a": 1},
        "key": 3,
    }
    file = pack_tar(tmp_path / "t.tar", [("1.png", png(1)), ("1.json", json.dumps(data).encode())])
    listing = read_archives(ImageSource("archive", file))
    row = listing.samples.iloc[0].to_dict()
    assert (row["label"], row["box"], row["key"]) == (["cat", "indoor"], [1, 2.5], 3)
    assert {"deep", "object"}.isdisjoint(row)


@pytest.mark.parametrize("damaged", [b'{"label": ', b"[1, 2]", b"", b'"cat"', b"[" * 100_000])
def test_a_side_file_that_is_no_json_object_is_no_annotation(tmp_path, damaged):
    file = pack_tar(
        tmp_path / "t.tar", [("cat/1.png", png(1)), ("cat/1.json", damaged), ("dog/2.png", png(2))]
    )
    listing = read_archives(ImageSource("archive", file))
    assert [str(item) for item in listing.left_out] == [
        "1 side file that is no JSON object: t.tar/cat/1.json"
    ]
    assert listing.annotations == 0
    assert listing.found == counted(listing) == 3


def test_images_without_the_side_label_that_others_have_are_told(tmp_path):
    members = [
        ("cat/1.png", png(1)),
        ("cat/1.txt", b"tom"),
        ("cat/2.png", png(2)),
        ("dog/3.png", png(3)),
    ]
    listing = read_archives(ImageSource("archive", pack_tar(tmp_path / "t.tar", members)))
    assert any(
        note.startswith("2 of 3 images have no label: the side files") for note in listing.notes
    )
    assert listing.found == counted(listing) == 4
    flat = [(name.rpartition("/")[2], data) for name, data in members]
    assert not read_archives(ImageSource("archive", pack_tar(tmp_path / "flat.tar", flat))).notes
    assert not read_archives(ImageSource("archive", tmp_path / "t.tar"), labelled=False).notes


def test_folders_that_tools_leave_are_no_classes(tmp_path):
    for name in ("cat/1.png", "dog/2.png", "__MACOSX/cat/._1.png", "@eaDir/1.png", "__pycache__/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    listing = read_source(detect_source(tmp_path))
    assert set(listing.samples["label"]) == {"cat", "dog"}
    assert listing.found == counted(listing) == 5


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_copies_that_tools_keep_beside_an_image_are_no_images(tmp_path, kind):
    """GDAL's overviews and ExifTool's backups are images by their content, and each would be the
    same image once more, on any side of a split; what a second download adds to a name is not.
    """
    names = ["cat/1.tif", "cat/1.tif.ovr", "cat/2.jpg", "cat/2.jpg_original", "dog/3.PNG~"]
    names += ["dog/3.PNG", "dog/3.PNG.bak", "dog/4.jpg.1", "dog/5_original"]
    if kind == "tar":
        pack_tar(tmp_path / "t.tar", [(name, png(k)) for k, name in enumerate(names)])
        listing = read_archives(ImageSource("archive", tmp_path / "t.tar"))
    else:
        for k, name in enumerate(names):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(png(k))
        listing = read_source(detect_source(tmp_path))
    used = {name.removeprefix("t.tar/") for name in listing.samples["id"]}
    assert used == {"cat/1.tif", "cat/2.jpg", "dog/3.PNG", "dog/4.jpg.1", "dog/5_original"}
    (left_out,) = map(str, listing.left_out)
    assert left_out.startswith("4 copies that tools keep beside an image (overviews, backups): ")
    assert listing.found == counted(listing) == 9


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_class_of_hidden_members_alone_is_refused(tmp_path, kind):
    members = [
        ("set/cat/1.png", png(1)),
        ("set/dog/1.png", png(2)),
        ("set/owl/.keep", b""),
        ("set/.git/x", b""),
    ]
    members += [("__MACOSX/set/cat/._1.png", b""), ("set/.DS_Store", b"")]
    file = tmp_path / f"t.{kind}"
    if kind == "tar":
        pack_tar(file, members)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)
    with pytest.raises(
        SourceError, match=r"no file in the folder owl can be used.*images.exclude: \[owl\]"
    ):
        read_archives(ImageSource("archive", file))
    listing = read_archives(ImageSource("archive", file, exclude=["set/owl"]))
    assert set(listing.samples["label"]) == {"cat", "dog"}
    assert listing.found == counted(listing) == 6


def test_an_archive_named_with_brackets_is_itself(tmp_path):
    for name, value in (("a1.zip", 1), ("a[1].zip", 2)):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("1.png", png(value))
    assert list(read_archives(ImageSource("archive", tmp_path / "a[1].zip")).samples["id"]) == [
        "a[1].zip/1.png"
    ]
    (tmp_path / "a[1].zip").unlink()
    assert list(read_archives(ImageSource("archive", tmp_path / "a[1].zip")).samples["id"]) == [
        "a1.zip/1.png"
    ]


# ---- arrays


@pytest.mark.parametrize(
    "values", [np.zeros(0), np.array(3), np.zeros((0, 1)), np.zeros((2, 2, 2)), np.zeros(3)]
)
def test_labels_of_another_shape_are_refused_in_words(tmp_path, values):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4), np.uint8))
    np.save(tmp_path / "y.npy", values)
    with pytest.raises(
        SourceError,
        match=r"the labels have shape \(.*\) for 2 images; expected one for each: \(2,\)",
    ):
        read_array(
            ImageSource("array", tmp_path / "x.npy", labels=tmp_path / "y.npy"), labelled=False
        )


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2)])
def test_labels_in_a_column_are_labels(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4), np.uint8))
    np.save(tmp_path / "y.npy", np.array([7, 8]).reshape(shape))
    if shape == (1, 2):
        with pytest.raises(SourceError, match="the labels have shape"):
            read_array(
                ImageSource("array", tmp_path / "x.npy", labels=tmp_path / "y.npy"), labelled=False
            )
    else:
        assert list(
            read_array(
                ImageSource("array", tmp_path / "x.npy", labels=tmp_path / "y.npy"), labelled=False
            ).samples["label"]
        ) == [
            "7",
            "8",
        ]


def test_a_data_set_without_a_shape_is_no_traceback(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = np.zeros((2, 4, 4), np.uint8)
        file["nothing"] = h5py.Empty("f4")
    assert len(read_array(ImageSource("array", tmp_path / "x.h5"), labelled=False).samples) == 2
    with pytest.raises(SourceError):
        read_array(ImageSource("array", tmp_path / "x.h5", array_key="nothing"), labelled=False)
    with pytest.raises(SourceError):
        read_array(ImageSource("array", tmp_path / "x.h5", labels_key="nothing"), labelled=False)


def idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(
        size.to_bytes(4, "big") for size in values.shape
    )
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("names", "sides"),
    [
        (("emnist-letters-train", "emnist-letters-test"), ["test", "train"]),
        (("train", "t10k"), ["test", "train"]),
        (("kmnist_val", "kmnist_train1"), ["train", "validation"]),
        (("train", "digits"), None),
        (("contest", "digits"), None),
    ],
)
def test_the_side_of_a_split_stands_anywhere_in_the_name_of_an_idx_file(tmp_path, names, sides):
    for name in names:
        idx(tmp_path / f"{name}-images-idx3-ubyte", np.zeros((1, 4, 4)))
        idx(tmp_path / f"{name}-labels-idx1-ubyte", np.zeros(1))
    listing = read_array(ImageSource("array", tmp_path), labelled=False)
    if sides is not None:
        assert list(listing.samples["split"]) == sides
        assert not listing.notes
    else:
        assert "split" not in listing.samples
        assert bool(listing.notes) == (names[0] == "train")


def test_several_arrays_are_told_with_the_setting_that_chooses(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((2, 4, 4), np.uint8), b=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(
        SourceError, match=r"In the recipe: images.array_key: a \(in Python: key=\)"
    ):
        read_array(ImageSource("array", tmp_path / "x.npz"), labelled=False)


# ---- tables


def test_cells_with_line_breaks_are_told(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text(
        'path,label\na.jpg,cat\nb.jpg,"cat\nc.jpg,dog\nd.jpg,"dog\ne.jpg,dog\n', encoding="utf-8"
    )
    read = read_table_file(file)
    assert list(read.frame["path"]) == ["a.jpg", "b.jpg", "e.jpg"]
    assert read.notes == (
        't.csv: 1 cell holds line breaks, first in row 2: an unpaired quote (") joins lines',
    )
    assert read.notes[0] in read_tables(ImageSource("table", file)).notes


@pytest.mark.parametrize(
    "text",
    [
        'path,label\na.jpg,cat\n"b.jpg,cat\nc.jpg",dog\nd.jpg,dog\n',
        'name,path,n\nx,a.jpg,1\ny,"b.jpg,2\nz,c.jpg",3\n',
        'name\tpath\r\n"x\ta.jpg\r\ny"\tb.jpg\r\n',
    ],
)
def test_line_breaks_in_what_names_the_rows_are_refused(tmp_path, text):
    file = tmp_path / ("t.tsv" if "\t" in text else "t.csv")
    file.write_bytes(text.encode())
    with pytest.raises(
        SourceError, match=r"1 cell holds line breaks, first in row [12]: an unpaired quote"
    ):
        read_table_file(file)


@pytest.mark.parametrize(
    "text", ['path,label\n"a, b.jpg",cat\n', 'path,label\na.jpg,"cat\n"\n', 'path,label\n"a.jpg"\n']
)
def test_quotes_in_pairs_are_no_note(tmp_path, text):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    assert read_table_file(tmp_path / "t.csv").notes == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", '{"a.png": "cat", "b.png": "dog", "a.png": "dog"}'),
        ("t.json", '[{"path": "a.png"}, {"a.png": 1, "a.png": 2}]'),
        ("t.jsonl", '{"path": "b.png"}\n{"a.png": "x", "path": "b.png", "a.png": "y"}\n'),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=r"the key 'a.png' 2 times; expected once") as raised:
        read_table_file(tmp_path / name)
    assert ("line 2" in str(raised.value)) == (name == "t.jsonl")


def test_lines_of_json_end_at_line_feeds_alone(tmp_path):
    rows = [{"path": "a.png", "label": "one\u2028two\x85three"}, {"path": "b.png", "label": "cat"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n"
    (tmp_path / "t.jsonl").write_bytes(text.encode())
    assert list(read_table_file(tmp_path / "t.jsonl").frame["label"]) == [
        "one\u2028two\x85three",
        "cat",
    ]


def save(table: pa.Table, file: Path) -> Path:
    if file.suffix == ".arrow":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        pq.write_table(table, file, row_group_size=2)
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_are_images_where_the_first_value_is_one_and_else_text(tmp_path, suffix, kind):
    texts = [None, b"", None, " caf\u00e9 ".encode(), b"dog"]
    table = pa.table(
        {
            "image": pa.array([None, None, None, png(1), png(2)], kind),
            "label": pa.array(texts, kind),
            "none": pa.array([None] * 5, kind),
            "damaged": pa.array([b"\0\1", None, None, None, b"x"], kind),
        }
    )
    read = read_table_file(save(table, tmp_path / f"t{suffix}"))
    assert read.image_columns == ("image", "none", "damaged")
    label = read.frame["label"].astype(object)
    assert list(label.where(label.notna(), None)) == [None, None, None, "caf\u00e9", "dog"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_paths_and_labels_stored_as_bytes_are_used(tmp_path, suffix):
    table = pa.table({"path": pa.array([b"a.jpg", b"b.jpg"]), "label": pa.array([b"cat", b"dog"])})
    listing = read_tables(ImageSource("table", save(table, tmp_path / f"t{suffix}")))
    assert [Path(path).name for path in listing.samples["path"]] == ["a.jpg", "b.jpg"]
    assert list(listing.samples["label"]) == ["cat", "dog"]
    frame = pd.DataFrame({"label": [b"cat", b"dog"], "image": [png(1), png(2)]}).set_index("label")
    frame.to_parquet(tmp_path / "indexed.parquet")
    assert set(
        read_tables(ImageSource("table", tmp_path / "indexed.parquet")).samples["label"]
    ) == {"cat", "dog"}


def test_an_image_with_idx_in_its_name_is_an_image(tmp_path):
    for name in ("pat_idx3.png", "a.idx.jpg"):
        (tmp_path / name).write_bytes(png(1))
        assert detect_source(tmp_path / name).kind == "image"
    idx(tmp_path / "t-images.idx3-ubyte", np.zeros((1, 4, 4)))
    assert detect_source(tmp_path / "t-images.idx3-ubyte").kind == "array"


@pytest.mark.parametrize("name", ["x.gz", ".gz", "x.GZ"])
def test_a_compressed_file_of_no_known_kind_is_named(tmp_path, name):
    """Nothing stands before .gz that says what is in it."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"path,label\n"))
    with pytest.raises(SourceError, match=re.escape(f"{path}: neither an image nor")):
        read_source(detect_source(path))
    with pytest.raises(SourceError, match=rf"{re.escape(str(path))}: a table ends in \.csv"):
        read_table_file(path)
