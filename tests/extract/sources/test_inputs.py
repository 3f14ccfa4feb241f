"""Listing samples: folders, tables, tar shards, arrays; their content hashes; and what changed
between two listings.
"""

import gzip
import io
import json
import os
import tarfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from headrace.cache.spec import FeatureSpec
from headrace.extract.errors import SourceError
from headrace.extract.images.changes import compare_listings, read_listing, write_listing
from headrace.extract.images.content_hashes import content_hashes
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.locators import read_bytes
from headrace.extract.sources.archive import read_archives
from headrace.extract.sources.array import detect_array_labels, measure_pixel_range
from headrace.extract.sources.folder import UNMATCHED_NAMES, read_folder
from headrace.extract.sources.listing import LeftOut
from headrace.extract.sources.read import (
    SourceWarning,
    detect_source,
    read_source,
)
from headrace.extract.sources.samples import list_archives, list_array, list_folder, read_table
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.table import read_table_file
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps import spec_cache


def picture(value: int, size: int = 12) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(value)).save(buffer, "PNG")
    return buffer.getvalue()


def old(path: Path) -> None:
    """As if its content had been written an hour ago."""
    stamp = time.time() - 3600
    os.utime(path, (stamp, stamp))


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    old(path)
    return path


def test_folder(tmp_path: Path) -> None:
    """The label is the first directory, the id the relative path, in the order of ids; other files
    are left out.
    """
    for name in (
        "b/2.png",
        "a/deep/1.JPG",
        "a/3.png",
        "loose.png",
        "a/notes.txt",
        ".hidden/4.png",
        "a/.5.png",
    ):
        write(tmp_path / name, png(1))
    listing = read_folder(ImageSource("folder", tmp_path))
    samples = listing.samples
    assert samples["id"].tolist() == ["a/3.png", "a/deep/1.JPG", "b/2.png", "loose.png"]
    assert listing.found == len(samples) + sum(item.count for item in listing.left_out) == 7
    assert samples["label"].tolist()[:3] == ["a", "a", "b"]
    assert pd.isna(samples["label"].iloc[3])
    assert all(Path(path).is_file() for path in samples["path"])


def test_folder_of_a_split(tmp_path: Path) -> None:
    """Outer folders train, val, test are a split, unless a class of that name would be
    lost by it.
    """
    for name in ("train/a/1.png", "train/b/2.png", "valid/a/3.png", "test/4.png"):
        write(tmp_path / name, png(1))
    samples = list_folder(tmp_path)
    assert samples["split"].tolist() == ["test", "train", "train", "valid"]
    assert samples["label"].fillna("").tolist() == ["", "a", "b", "a"]
    write(
        tmp_path / "train/5.png", png(2)
    )  # neither a training image without a class nor a stray one changes that
    write(tmp_path / "cover.png", png(2))
    assert list_folder(tmp_path)["label"].value_counts().to_dict() == {"a": 2, "b": 1}
    write(tmp_path / "other/6.png", png(2))
    with pytest.raises(
        SourceError,
        match=r"test, train, valid, which are words for the sides of a split, and other",
    ):
        list_folder(tmp_path)
    assert set(list_folder(tmp_path, layout="classes")["label"].dropna()) == {
        "train",
        "valid",
        "test",
        "other",
    }
    assert list_folder(tmp_path, exclude=["other"])["split"].nunique() == 3


def test_folder_with_a_link_to_itself(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png", png(1))
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert list_folder(tmp_path)["id"].tolist() == ["a/1.png"]


def test_a_link_takes_no_class_from_its_folder(tmp_path: Path) -> None:
    """The real path keeps its name, wherever the link stands; what only a link reaches has the
    link's name.
    """
    write(tmp_path / "photos/2020/1.png", png(1))
    write(tmp_path / "photos/2021/deep/2.png", png(2))
    write(tmp_path / "elsewhere/3.png", png(3))
    (tmp_path / "photos/link").symlink_to(tmp_path / "photos/2020")
    (tmp_path / "photos/1999").symlink_to(tmp_path / "photos/2021/deep")
    (tmp_path / "photos/far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/2020/gone.png").symlink_to(tmp_path / "nowhere.png")
    samples = list_folder(tmp_path / "photos")
    assert samples["id"].tolist() == ["2020/1.png", "2020/gone.png", "2021/deep/2.png", "far/3.png"]
    assert samples["label"].tolist() == ["2020", "2020", "2021", "far"]
    found = content_hashes(samples, tmp_path / "index.parquet")
    assert [item.id for item in found.unreadable] == [
        "2020/gone.png"
    ]  # a broken link is told, not lost


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(SourceError, match=r"no such file or folder. Did you mean .*images"):
        list_folder(tmp_path / "imagse")
    with pytest.raises(SourceError, match=r"no images found .found: no files"):
        list_folder(tmp_path / "images")
    write(tmp_path / "images/a.txt", b"x")
    with pytest.raises(SourceError, match=r"found: 1 \.txt file"):
        list_folder(tmp_path / "images")
    with pytest.raises(SourceError, match=r"is a file"):
        list_folder(tmp_path / "images/a.txt")


def test_tables(tmp_path: Path) -> None:
    """CSV and Parquet alike: paths become absolute, every column stays, the order is
    the table's.
    """
    frame = pd.DataFrame(
        {
            "path": ["x/1.png", "/abs/2.png"],
            "label": ["b", "a"],
            "fold": [1, 0],
            "name": ["one", "two"],
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    for table in ("t.csv", "t.parquet"):
        samples = read_table(tmp_path / table)
        assert samples["path"].tolist() == [str(tmp_path / "x/1.png"), "/abs/2.png"]
        assert samples["id"].tolist() == ["x/1.png", "/abs/2.png"]
        assert samples[["label", "name"]].to_dict("list") == frame[["label", "name"]].to_dict(
            "list"
        )
        assert samples["fold"].astype(str).tolist() == ["1", "0"]  # Parquet has types, CSV has text
    assert read_table(tmp_path / "t.csv", id_column="name")["id"].tolist() == ["one", "two"]
    assert read_table(tmp_path / "t.csv", root="/data")["path"].tolist() == [
        "/data/x/1.png",
        "/abs/2.png",
    ]


def test_tables_that_cannot_be(tmp_path: Path) -> None:
    pd.DataFrame({"file": ["a", "a"], "label": [1, 2]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(SourceError, match=r"no column 'path'.*The columns are: file, label"):
        read_table(tmp_path / "t.csv", path_column="path")
    with pytest.raises(SourceError, match=r"no column 'flie'.*Nearest: file"):
        read_table(tmp_path / "t.csv", path_column="flie")
    with pytest.raises(SourceError, match=r"1 id occurs more than once, for example 'a'"):
        read_table(tmp_path / "t.csv", path_column="file")
    pd.DataFrame({"path": ["a", None]}).to_csv(tmp_path / "e.csv", index=False)
    with pytest.warns(SourceWarning, match=r"1 row that names no image: e.csv, row 2"):
        assert read_table(tmp_path / "e.csv")["id"].tolist() == ["a"]
    write(tmp_path / "bad.parquet", b"not parquet")
    with pytest.raises(SourceError, match=r"cannot be read as parquet"):
        read_table(tmp_path / "bad.parquet")
    write(tmp_path / "t.xlsx", b"")
    with pytest.raises(SourceError, match=r"t.xlsx is not read here .spreadsheet.: save it as CSV"):
        read_table(tmp_path / "t.xlsx")
    write(tmp_path / "none.csv", b"path\n")
    with pytest.raises(SourceError, match=r"no rows"):
        read_table(tmp_path / "none.csv")


def test_columns_that_would_be_replaced(tmp_path: Path) -> None:
    """`task.group: id` with the file's path in place of the table's own ids would let patients
    leak.
    """
    table = tmp_path / "t.csv"

    def columns(*names: str) -> None:
        pd.DataFrame({name: [f"{name}1.png", f"{name}2.png"] for name in names}).to_csv(
            table, index=False
        )

    columns("path", "id", "label")
    assert read_table(table)["id"].tolist() == ["id1.png", "id2.png"]
    assert read_table(table, id_column="id")["id"].tolist() == ["id1.png", "id2.png"]
    with pytest.raises(SourceError, match=r"column 'id'"):
        read_table(table, id_column="label")
    columns("id", "label")
    assert read_table(table, path_column="id")["id"].tolist() == ["id1.png", "id2.png"]
    columns("file", "path")
    with pytest.raises(SourceError, match=r"column 'path'.*images\.path_column: path"):
        read_table(table, path_column="file")
    for name in ("content", "_content"):
        columns("path", name)
        with pytest.raises(SourceError, match=rf"column '{name}'.*Rename"):
            read_table(table)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("latin.csv", "path,label\na.png,Käfer\n".encode("latin-1"), r"UTF-8"),
        ("empty.csv", b"", r"No columns"),
        ("ragged.csv", b"path,label\na.png,x\nb.png,x,y,z\n", r"line 3"),
        ("long.csv", b"path,label\na.png,x,\nb.png,y,\n", r"more values than the header"),
        ("binary.csv", bytes(range(256)) * 8, r"cannot be read as csv"),
        ("garbage.parquet", b"PAR1garbagePAR1", r"cannot be read as parquet"),
        ("empty.tsv", b"", r"cannot be read as tsv"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    """One error that names the file."""
    with pytest.raises(SourceError, match=said) as refusal:
        read_table_file(write(tmp_path / name, data))
    assert str(tmp_path / name) in str(refusal.value)


def test_what_a_damaged_memo_says_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage of any kind means that the network is built, and that the memo is written anew."""
    spec_of_tap = FeatureSpec("b", "w", "t", "avg", "p", "v", "pillow", "float32", "float16", (3,))
    features = spec_cache.TapFeatures((spec_of_tap,), weights_note="")
    path = tmp_path / "cache/backbones/memo.json"
    monkeypatch.setattr(spec_cache, "_spec_cache_path", lambda *args: path)
    spec = BackboneSpec("torchvision:resnet18", weights="random:0")
    for damage in (
        b"{}",
        b"[]",
        b"[3]",
        b'["3"]',
        b"\xff\xfe",
        b"nothing",
        b"null",
        b"[" * 100_000,
    ):
        assert spec_cache._read_tap_features(write(path, damage)) is None, damage[:20]
        spec_cache.save_feature_specs(spec, "auto", features, cache_root=tmp_path)
        assert spec_cache.load_feature_specs(spec, "auto", cache_root=tmp_path) == features
    path.unlink()
    path.mkdir()
    assert spec_cache._read_tap_features(path) is None
    spec_cache.save_feature_specs(
        spec, "auto", features, cache_root=tmp_path
    )  # cannot be written, and stops nobody
    path.rmdir()
    path.parent.rmdir()
    path.parent.write_bytes(b"a file")
    assert spec_cache._read_tap_features(path) is None
    spec_cache.save_feature_specs(spec, "auto", features, cache_root=tmp_path)


def test_hashes_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call reads nothing, a changed file is read again, a missing one is reported and
    stops nobody.
    """
    monkeypatch.setattr(
        "headrace.cache.file_stamps._CLOCK_TICK_NS", 0
    )  # what has just been written is settled
    for value in range(3):
        write(tmp_path / f"{value}.png", png(value))
    samples = pd.DataFrame(
        {"id": ["0", "1", "2", "gone"], "path": [str(tmp_path / f"{n}.png") for n in (0, 1, 2, 9)]}
    )
    index = tmp_path / "cache/contents.parquet"
    seen: list[tuple[int, int]] = []
    first = content_hashes(samples, index, lambda done, total: seen.append((done, total)))
    assert first.read == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert first.hashes[3] is None
    assert [(item.id, item.reason) for item in first.unreadable] == [
        ("gone", "No such file or directory")
    ]
    assert len({*first.hashes}) == 4
    again = content_hashes(samples, index)
    assert (again.read, again.hashes) == (0, first.hashes)
    write(tmp_path / "1.png", png(77))
    changed = content_hashes(samples, index)
    assert changed.read == 1
    assert changed.hashes[0] == first.hashes[0]
    assert changed.hashes[1] != first.hashes[1]
    index.write_bytes(b"damaged")
    assert content_hashes(samples, index).hashes == changed.hashes


def test_a_fresh_file_is_not_trusted(tmp_path: Path) -> None:
    """It could be written again within the same clock tick, with the same size and time."""
    path = tmp_path / "new.png"
    path.write_bytes(b"first ")
    samples = pd.DataFrame({"id": ["new"], "path": [str(path)]})
    status = path.stat()
    first = content_hashes(samples, tmp_path / "index.parquet")
    path.write_bytes(b"second")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert content_hashes(samples, tmp_path / "index.parquet").hashes != first.hashes


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    old(path)
    return path


def test_tar_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members group by name; labels and scalars come from the side files; a member hashes like the
    file it was.
    """
    monkeypatch.setattr(
        "headrace.cache.file_stamps._CLOCK_TICK_NS", 0
    )  # what has just been written is settled
    meta = json.dumps({"width": 12, "tags": ["x"], "id": 5}).encode()
    shard(
        tmp_path / "s-000.tar",
        {"a.png": png(1), "a.cls": b"3\n", "a.json": meta, "dir/b.png": png(2)},
    )
    shard(tmp_path / "s-001.tar", {"c.cls": b"4", "c.seg.png": png(3), "readme.md": b"hello"})
    with pytest.warns(SourceWarning, match=r"left out 1 .md file .no image.: s-001.tar/readme.md"):
        samples = list_archives(f"{tmp_path}/s-{{000..001}}.tar")
    assert samples["id"].tolist() == [
        "s-000.tar/a.png",
        "s-000.tar/dir/b.png",
        "s-001.tar/c.seg.png",
    ]
    assert samples["label"].tolist()[::2] == ["3", "4"]
    assert samples["width"].iloc[0] == 12
    assert samples["tags"].iloc[0] == ["x"]
    for same in (tmp_path, tmp_path / "s-*.tar"):
        assert read_archives(ImageSource("archive", same)).samples.equals(samples)
    assert [read_bytes(path) for path in samples["path"]] == [png(1), png(2), png(3)]
    loose = pd.DataFrame({"id": ["x"], "path": [str(write(tmp_path / "x.png", png(2)))]})
    index = tmp_path / "index.parquet"
    assert content_hashes(loose, index).hashes[0] == content_hashes(samples, index).hashes[1]
    assert content_hashes(samples, index).read == 0


def test_tar_shards_that_cannot_be(tmp_path: Path) -> None:
    whole = shard(tmp_path / "s.tar", {"a.png": png(1), "b.png": png(2)})
    (tmp_path / "misnamed.tar").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(
        SourceError, match=r"compressed archive.*Rename it, for example to FILE.tar.gz"
    ):
        list_archives(tmp_path / "misnamed.tar")
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(SourceError, match=r"not a whole tar archive"):
        list_archives(tmp_path / "bad.tar")
    with pytest.raises(SourceError, match=r"no such archive"):
        list_archives(tmp_path / "absent-{000..003}.tar")
    with pytest.raises(SourceError, match=r"no images .found: 1 side file of no image"):
        list_archives(shard(tmp_path / "empty.tar", {"a.txt": b""}))
    with pytest.raises(SourceError, match=r"2 locations of a folder: give one of them"):
        read_folder(ImageSource("folder", [tmp_path, tmp_path]))
    samples = list_archives(whole)
    whole.write_bytes(whole.read_bytes()[:1100])  # cut after it was listed
    with pytest.raises(OSError, match=r"the archive ends"):
        read_bytes(samples["path"].iloc[1])


def test_a_data_set_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name in (b"images", b"images\xe4"):
            file[name] = np.stack([picture(10), picture(20)])
    with pytest.raises(SourceError, match=r"x\.h5: cannot be read as h5: the name .* is no UTF-8"):
        list_array(tmp_path / "x.h5")


def test_arrays(tmp_path: Path) -> None:
    """The same pictures in five containers: the same pixels, the same content hashes, labels beside
    or inside.
    """
    images = np.stack([picture(value) for value in (10, 20, 30)])
    labels = np.array([2, 0, 1])
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", labels)
    np.savez_compressed(tmp_path / "xy.npz", train_images=images, train_labels=labels[:, None])
    with h5py.File(tmp_path / "xy.h5", "w") as file:
        file["group/images"] = images
        file["labels"] = np.array([b"two", b"nil", b"one"])
    header = b"\0\0\x08\x04" + b"".join(size.to_bytes(4, "big") for size in images.shape)
    (tmp_path / "train-images-idx4-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(
        b"\0\0\x08\x01" + (3).to_bytes(4, "big") + bytes([2, 0, 1])
    )
    listings = [
        list_array(tmp_path / "x.npy", labels=tmp_path / "y.npy"),
        list_array(tmp_path / "xy.npz", labels_key="train_labels"),
        list_array(tmp_path / "xy.h5", labels_key="labels"),
        list_array(
            tmp_path / "train-images-idx4-ubyte.gz", labels=tmp_path / "train-labels-idx1-ubyte"
        ),
        list_array(tmp_path / "xy.h5", key="group/images"),
    ]
    assert [listing["label"].tolist() for listing in listings[:2]] == [["2", "0", "1"]] * 2
    assert listings[2]["label"].tolist() == ["two", "nil", "one"]
    assert listings[3]["label"].tolist() == ["2", "0", "1"]
    assert listings[4]["label"].isna().all()
    hashes = {content_hashes(listing, tmp_path / "index.parquet").hashes for listing in listings}
    assert len(hashes) == 1
    for listing in listings:
        pixels = [np.asarray(decode_image(read_bytes(path)))[0, 0, 0] for path in listing["path"]]
        assert pixels == [10, 20, 30]


def test_arrays_that_cannot_be(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros((5, 784)))
    with pytest.raises(SourceError, match=r"shape \(5, 784\); expected \(N, H, W\)"):
        list_array(tmp_path / "flat.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 4, 4)), b=np.zeros((2, 4, 4)))
    with pytest.raises(
        SourceError, match=r"2 arrays could be images; name one with key. It has: a \(2, 4, 4\)"
    ):
        list_array(tmp_path / "two.npz")
    with pytest.raises(SourceError, match=r"no array 'c'; it has a, b"):
        list_array(tmp_path / "two.npz", key="c")
    # A table whose columns' names are not Latin has version 3.0 of the format.
    table = np.zeros(4, [("λ", "f4")])
    with pytest.warns(UserWarning, match="format 3.0"):
        np.savez(tmp_path / "table.npz", a=np.zeros((2, 4, 4), np.uint8), table=table)
    assert len(list_array(tmp_path / "table.npz")) == 2
    with pytest.raises(SourceError, match=r"name the array of labels"):
        list_array(tmp_path / "two.npz", key="a", labels=tmp_path / "two.npz")
    (tmp_path / "bad-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x09" * 3)
    with pytest.raises(SourceError, match=r"its header says"):
        list_array(tmp_path / "bad-idx3-ubyte")
    (tmp_path / "cut-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x09\0\0")
    with pytest.raises(SourceError, match=r"ends within its header"):
        list_array(tmp_path / "cut-idx3-ubyte")
    np.save(tmp_path / "objects.npy", np.array([None, "x"], object), allow_pickle=True)
    with pytest.raises(SourceError, match=r"cannot be read as npy"):
        list_array(tmp_path / "objects.npy")
    with pytest.raises(SourceError, match=r"no such file"):
        list_array(tmp_path / "absent.npy")
    np.save(tmp_path / "float.npy", np.zeros((2, 4, 4)))
    with pytest.raises(
        SourceError, match=r"float64 have no range of their own.*images.pixel_range"
    ):
        read_source(detect_source(tmp_path / "float.npy"))
    with pytest.raises(SourceError, match=r"found .bin"):
        list_array(write(tmp_path / "x.bin", b""))


def test_changes_are_told_apart(tmp_path: Path) -> None:
    """New, changed, renamed and removed, in one comparison; a copy of an image that
    stays is new.
    """
    before = {"same": "1", "edited": "2", "old-name": "3", "gone": "4", "kept": "5"}
    after = {
        "same": "1",
        "edited": "9",
        "new-name": "3",
        "fresh": "7",
        "kept": "5",
        "copy-of-kept": "5",
    }
    changes = compare_listings(before, after)
    assert changes.new == ("fresh", "copy-of-kept")
    assert changes.changed == ("edited",)
    assert changes.renamed == (("old-name", "new-name"),)
    assert changes.removed == ("gone",)
    write_listing(tmp_path / "listing.json", before)
    assert read_listing(tmp_path / "listing.json") == before
    assert read_listing(tmp_path / "absent.json") == {}


@pytest.mark.parametrize(
    ("images", "labels"),
    [("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("data/{}/img", "data/{}/target")],
)
def test_arrays_of_the_sides_of_a_split_are_one_source(tmp_path, images, labels):
    """MedMNIST's names, Keras's, and groups of HDF5; every image with its own label."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    numbers = np.arange(9)
    sides = {"train": slice(0, 5), "val": slice(5, 7), "test": slice(7, 9)}
    arrays = {images.format(side): pixels[rows] for side, rows in sides.items()}
    arrays |= {labels.format(side): numbers[rows, None] for side, rows in sides.items()}
    if "/" in images:
        path = tmp_path / "all.h5"
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    else:
        path = tmp_path / "all.npz"
        np.savez(path, **arrays)
    samples = list_array(path)
    assert detect_array_labels(path) == (None, None, None)
    assert measure_pixel_range(path) is None
    assert samples["id"].is_unique
    assert samples.groupby("split").size().to_dict() == {"train": 5, "validation": 2, "test": 2}
    for _, row in samples.iterrows():
        image = np.asarray(decode_image(read_bytes(row["path"])))
        assert (image == pixels[int(row["label"])]).all()
    one = list_array(path, key=images.format("val"), labels_key=labels.format("val"))
    assert one["label"].tolist() == ["5", "6"]


def test_names_that_say_no_side_of_a_split_are_not_guessed(tmp_path):
    """A word of a side twice, or arrays that differ in more than that."""
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    for number, names in enumerate(
        [("train_a", "test_b"), ("train", "other"), ("train1", "train2")]
    ):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **dict.fromkeys(names, pixels))
        with pytest.raises(SourceError, match="2 arrays could be images"):
            list_array(path)


def test_labels_beside_an_array_are_found_by_their_name(tmp_path):
    np.save(tmp_path / "X_train.npy", np.zeros((2, 4, 4, 3), np.uint8))
    np.save(tmp_path / "y_train.npy", np.arange(2))
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    assert detect_array_labels(tmp_path / "X_train.npy")[1] == tmp_path / "y_train.npy"
    assert detect_array_labels(tmp_path / "images.npy") == (None, None, None)


def test_a_row_of_labels_for_each_image_is_columns(tmp_path):
    """As ChestMNIST has them; rows of features are no labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (4, 3))
    np.savez(
        tmp_path / "chest.npz",
        images=np.zeros((4, 8, 8), np.uint8),
        labels=labels,
        features=rng.random((4, 2000)),
    )
    images_key, _, labels_key = detect_array_labels(tmp_path / "chest.npz")
    samples = list_array(tmp_path / "chest.npz", key=images_key, labels_key=labels_key)
    named = samples[["label_0", "label_1", "label_2"]]
    assert (named.astype(int).to_numpy() == labels).all()
    with h5py.File(tmp_path / "split_train_x.h5", "w") as file:
        file["x"] = np.zeros((4, 8, 8), np.uint8)
    with h5py.File(tmp_path / "split_train_y.h5", "w") as file:
        file["y"] = np.arange(4).reshape(4, 1, 1, 1)  # PatchCamelyon's shape
    beside = detect_array_labels(tmp_path / "split_train_x.h5")
    assert beside == ("x", tmp_path / "split_train_y.h5", "y")
    pcam = list_array(tmp_path / "split_train_x.h5", labels=beside[1], labels_key="y")
    assert pcam["label"].tolist() == ["0", "1", "2", "3"]


def test_named_groups_of_file_names_are_columns(tmp_path):
    """Label, patient and side of a split in names; what does not match is counted."""
    for name in ("P1_cat_1.png", "P2_dog_1.png", "sub/P2_cat_7.png", "IMG_9.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture(1)).save(path)
    pattern = r"(?P<patient>P\d+)_(?P<label>[a-z]+)_(?P<split>7)?"
    listing = read_source(ImageSource("folder", tmp_path, name_pattern=pattern))
    columns = listing.samples.set_index("id")[["patient", "label", "split"]]
    assert columns.fillna("").to_dict("index") == {
        "P1_cat_1.png": {"patient": "P1", "label": "cat", "split": ""},
        "P2_dog_1.png": {"patient": "P2", "label": "dog", "split": ""},
        "sub/P2_cat_7.png": {"patient": "P2", "label": "cat", "split": "7"},
    }
    (left_out,) = listing.left_out
    assert (left_out.reason, left_out.count) == (UNMATCHED_NAMES, 1)
    with pytest.raises(SourceError, match="name_pattern does not match"):
        read_source(ImageSource("folder", tmp_path, name_pattern="(?P<label>zebra)"))


@pytest.mark.parametrize(
    ("reason", "of_one"),
    [
        (".txt files (no image)", "1 .txt file (no image): a"),
        ("files without a suffix (no image)", "1 file without a suffix (no image): a"),
        ("entries that images.exclude names", "1 entry that images.exclude names: a"),
        ("rows that name no image", "1 row that names no image: a"),
        ("rows that are another row once more", "1 row that is another row once more: a"),
        (
            "links to folders that are read under their own names",
            "1 link to folders that are read under their own names: a",
        ),
    ],
)
def test_what_is_left_out_once_is_said_in_the_singular(reason: str, of_one: str) -> None:
    """The reason is written for many; of one entry its noun and verb are singular."""
    assert str(LeftOut(reason, 1, ("a",))) == of_one
    assert str(LeftOut(reason, 2, ("a", "b"))) == f"2 {reason}: a, b"
