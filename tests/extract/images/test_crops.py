"""Boxes and tiles: rows that are parts of images, against crops that NumPy cuts."""

import io
import json
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import given, strategies as st
from PIL import Image

from headrace.extract.errors import ImageError, SourceError
from headrace.extract.images.bands import decode_deep
from headrace.extract.images.content_hashes import content_hashes, hash_bytes
from headrace.extract.images.crops import Crop, crop_content, pixel_box, split_crop
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.images.tiff_windows import TiffWindows
from headrace.extract.images.views import Augmentation
from headrace.extract.run import rendering as rendering_module
from headrace.extract.run.decode_ahead import decoded_batches
from headrace.extract.run.rendering import Rendering
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.regions import Boxes, Tiles
from headrace.extract.sources.source import ImageSource
from headrace.extract.spec import Sample

RNG = np.random.default_rng(0)
HOW = Preprocessing((8, 8), (8, 8), "squash", "bilinear", (0.5,) * 3, (0.5,) * 3)


def photo(path, width=40, height=30, **options):
    values = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)
    return values


def rendered(paths, how=HOW, batch_size=4, threads=2):
    samples = [Sample(path, path, "") for path in paths]
    pixels = np.zeros((len(paths), *how.pixel_shape), how.pixel_dtype)
    reasons, clipped = {}, []
    with ThreadPoolExecutor(threads) as pool:
        rendering = Rendering(how, 0, Augmentation())
        for batch in decoded_batches(pool, samples, [rendering], batch_size=batch_size):
            pixels[batch.rows] = batch.pixels[0].numpy()
            reasons |= dict(batch.undecodable) | dict(batch.unread)
            clipped += batch.clipped
    return pixels, reasons, clipped


def resized(values, how=HOW):
    image = Image.fromarray(np.ascontiguousarray(values))
    return np.asarray(image.resize(how.crop[::-1], Image.Resampling.BILINEAR))


NUMBERS = st.floats(-1e4, 1e4, allow_nan=False).map(lambda value: float(f"{value:.10g}"))


@given(st.text(min_size=1), NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.booleans())
def test_a_crop_and_its_locator_are_one(path, left, top, width, height, is_fraction):
    crop = Crop(left, top, width, height, "fraction" if is_fraction else "pixels")
    assert split_crop(crop.locator(path)) == (path, crop)
    tile = Crop(0, 0, 512, 512, background="white", max_background=0.85)
    assert split_crop(tile.locator(path)) == (path, tile)


def test_a_table_of_boxes(tmp_path):
    """Rows of one image are rows of their own, with an id of image and box, and the crop's own
    pixels, cut before the resize.
    """
    values = {name: photo(tmp_path / name) for name in ("a.png", "b.png")}
    (tmp_path / "boxes.csv").write_text(
        "path,x,y,width,height,label\n"
        "a.png,0,0,10,20,cat\na.png,5,6,30,12,dog\nb.png,3.4,2.6,10.2,10,cat\n"
    )
    listing = read_source(detect_source(tmp_path / "boxes.csv"))
    assert list(listing.samples["id"]) == [
        "a.png#0,0,10,20",
        "a.png#5,6,30,12",
        "b.png#3.4,2.6,10.2,10",
    ]
    assert list(listing.samples["label"]) == ["cat", "dog", "cat"]
    assert any("each row is the box x, y, width, height" in note for note in listing.notes)
    pixels, reasons, clipped = rendered(list(listing.samples["path"]))
    assert not reasons
    assert not clipped
    np.testing.assert_array_equal(pixels[0], resized(values["a.png"][:20, :10]))
    np.testing.assert_array_equal(pixels[1], resized(values["a.png"][6:18, 5:35]))
    np.testing.assert_array_equal(pixels[2], resized(values["b.png"][3:13, 3:14]))


@pytest.mark.parametrize(
    ("header", "row", "boxes"),
    [
        ("x,y,width,height", "10,6,20,12", "auto"),
        ("x,y,w,h", "10,6,20,12", "auto"),
        ("xmin,ymin,xmax,ymax", "10,6,30,18", "auto"),
        ("x1,y1,x2,y2", "10,6,30,18", "auto"),
        ("x,y,width,height", "0.25,0.2,0.5,0.4", "auto"),
        ("cx,cy,width,height", "0.5,0.4,0.5,0.4", "auto"),
        ("Left,Top,Width,Height", "10,6,20,12", "auto"),
        ("x_center,y_center,width,height", "0.5,0.4,0.5,0.4", "auto"),
        ("a,b,c,d", "20,12,20,12", Boxes(("a", "b", "c", "d"), "cxcywh")),
        ("a,b,c,d", "10,6,30,18", Boxes(("a", "b", "c", "d"), "xyxy", "pixels")),
    ],
)
def test_boxes_in_every_format_are_one_box(tmp_path, header, row, boxes):
    """Left and top or centre, sizes or corners, pixels or shares of the image."""
    values = photo(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(f"path,{header},label\na.png,{row},cat\n")
    listing = read_source(detect_source(tmp_path / "t.csv", boxes=boxes))
    pixels, _, _ = rendered(list(listing.samples["path"]))
    np.testing.assert_array_equal(pixels[0], resized(values[6:18, 10:30]))


def test_a_table_whose_box_columns_are_something_else(tmp_path):
    photo(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("path,x,y,width,height,label\na.png,1,2,40,30,cat\n")
    listing = read_source(detect_source(tmp_path / "t.csv", boxes="none"))
    assert list(listing.samples["path"]) == [str(tmp_path / "a.png")]


def test_boxes_that_cannot_be_are_told(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("path,x,y,width,height\na.png,1,2,x,4\n")
    with pytest.raises(SourceError, match="row 1: width is 'x'; expected the number of a box"):
        read_source(detect_source(table))
    table.write_text("path,x1,y1,x2,y2\na.png,30,10,20,40\n")
    with pytest.raises(SourceError, match=r"negative width or height, as xyxy.*format: xywh"):
        read_source(detect_source(table))
    table.write_text("path,x,y,width,height\na.png,0,0,0.5,1\nb.png,1,2,3,4\n")
    with pytest.raises(SourceError, match=r"at most one pixel .*shares of the image"):
        read_source(detect_source(table))
    assert len(read_source(detect_source(table, boxes=Boxes(unit="pixels"))).samples) == 2
    table.write_text('path,bbox\na.png,"[1, 2, 3, 4]"\n')
    assert any("'bbox' may hold boxes" in note for note in read_source(detect_source(table)).notes)
    table.write_text("path,l\na.png,1\n")
    with pytest.raises(SourceError, match="no column 'x', 'y', 'width', 'height' for the boxes"):
        read_source(detect_source(table, boxes=Boxes()))
    table.write_text("path,x,y,width,height\na.png,1,2,3,4\na.png,1,,3,4\n")
    listing = read_source(detect_source(table))
    assert [(left.reason, left.count) for left in listing.left_out] == [("rows without a box", 1)]
    assert listing.found == 2
    to_predict = read_source(detect_source(table), labelled=False)
    assert to_predict.samples["id"].tolist() == ["a.png#1,2,3,4", "a.png"]
    assert to_predict.samples["path"][1] == str(tmp_path / "a.png")


def test_boxes_beyond_the_image_are_clipped_and_empty_ones_are_failures(tmp_path):
    values = photo(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    boxes = [
        Crop(-5, -5, 15, 15),
        Crop(30, 20, 100, 100),
        Crop(50, 5, 10, 10),
        Crop(5, 5, 0, 10),
        Crop(-0.4, 0, 40.3, 30),
    ]
    pixels, reasons, clipped = rendered([box.locator(path) for box in boxes])
    np.testing.assert_array_equal(pixels[0], resized(values[:10, :10]))
    np.testing.assert_array_equal(pixels[1], resized(values[20:, 30:]))
    assert clipped == [0, 1]
    assert reasons == {
        2: "the box (x 50, y 5, width 10, height 10; pixels) holds no pixel of the image of 40 x "
        "30",
        3: "the box (x 5, y 5, width 0, height 10; pixels) holds no pixel of the image of 40 x 30",
    }


@given(
    st.tuples(*[st.floats(-50, 90)] * 2, *[st.floats(0, 90)] * 2),
    st.integers(1, 60),
    st.integers(1, 60),
)
def test_a_box_in_whole_pixels_lies_in_the_image(box, width, height):
    try:
        left, top, right, bottom = pixel_box(Crop(*box), width, height)
    except ImageError:
        return
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_boxes_are_of_the_upright_image(tmp_path):
    """A photo that a camera has turned: boxes count in what a person sees (exif orientation 6)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    values = photo(tmp_path / "a.png", exif=exif)
    upright = np.rot90(values, -1)
    pixels, _, _ = rendered([Crop(0, 20, 10, 15).locator(str(tmp_path / "a.png"))])
    np.testing.assert_array_equal(pixels[0], resized(upright[20:35, :10]))


def test_an_image_is_read_and_decoded_once_for_its_neighbouring_boxes(tmp_path, monkeypatch):
    """Across tasks and batches, whatever their sizes."""
    paths = []
    for name in ("a.png", "b.png", "c.png"):
        photo(tmp_path / name)
        paths += [Crop(left, 0, 10, 10).locator(str(tmp_path / name)) for left in range(21)]
    counts = {"read": 0, "decoded": 0}
    read, decode = rendering_module.read_bytes, rendering_module.decode_pixels

    def reading(path):
        counts["read"] += 1
        return read(path)

    def decoding(data, how, **options):
        counts["decoded"] += 1
        return decode(data, how, **options)

    monkeypatch.setattr(rendering_module, "read_bytes", reading)
    monkeypatch.setattr(rendering_module, "decode_pixels", decoding)
    expected, _, _ = rendered(paths, batch_size=5)
    assert counts == {"read": 3, "decoded": 3}
    again, _, _ = rendered(paths, batch_size=64, threads=4)
    np.testing.assert_array_equal(expected, again)


def test_crops_have_content_hashes_of_their_own(tmp_path):
    """One reading of each image; a crop's hash is of the image's bytes and the box."""
    photo(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    crops = [Crop(0, 0, 5, 5), Crop(0, 0, 5, 6), None]
    samples = pd.DataFrame(
        {"id": list("abc"), "path": [crop.locator(path) if crop else path for crop in crops]}
    )
    hashed = content_hashes(samples, tmp_path / "index.parquet")
    image_hash = hash_bytes((tmp_path / "a.png").read_bytes())
    assert hashed.hashes == tuple(crop_content(image_hash, crop) for crop in crops)
    assert len(set(hashed.hashes)) == 3
    assert hashed.hashes[2] == image_hash
    assert hashed.read == 1
    (tmp_path / "a.png").unlink()
    gone = content_hashes(samples, tmp_path / "index.parquet")
    assert [image.id for image in gone.unreadable] == ["a", "b", "c"]


def coco(tmp_path):
    photo(tmp_path / "a.png")
    file = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2, "bbox": [1.5, 2, 10, 11]},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [20, 2, 10, 11]},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(file))
    return tmp_path / "coco.json"


def test_annotations_of_coco_are_boxes_where_they_are_asked_for(tmp_path):
    table = coco(tmp_path)
    listing = read_source(detect_source(table, boxes=Boxes()))
    assert list(listing.samples["id"]) == ["a.png#1.5,2,10,11", "a.png#20,2,10,11"]
    assert list(listing.samples["label"]) == ["cat", "dog"]
    assert any("less 1 of crowds" in note for note in listing.notes)
    whole = read_source(detect_source(table))
    assert list(whole.samples["id"]) == ["a.png"]


def test_the_ids_of_a_column_stay_ids(tmp_path):
    photo(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(
        "id,path,x,y,width,height\nd1,a.png,0,0,9,9\nd2,a.png,5,5,9,9\n"
    )
    samples = read_source(detect_source(tmp_path / "t.csv")).samples
    assert list(samples["id"]) == ["d1", "d2"]
    assert split_crop(samples["path"][1]) == (str(tmp_path / "a.png"), Crop(5, 5, 9, 9))


def test_tiles_cover_the_image_and_end_where_it_ends(tmp_path):
    """Each pixel in a tile, all tiles of one size, the label of the image on each."""
    (tmp_path / "wet").mkdir()
    values = photo(tmp_path / "wet" / "a.png", width=50, height=30)
    photo(tmp_path / "wet" / "small.png", width=10, height=12)
    tiles = Tiles(20, overlap=5)
    listing = read_source(detect_source(tmp_path, tiles=tiles, layout="classes"))
    samples = listing.samples
    assert list(samples["id"]) == [
        "wet/a.png#0,0",
        "wet/a.png#15,0",
        "wet/a.png#30,0",
        "wet/a.png#0,10",
        "wet/a.png#15,10",
        "wet/a.png#30,10",
        "wet/small.png#0,0",
    ]
    assert set(samples["label"]) == {"wet"}
    assert listing.found == len(samples)
    assert any("2 images are cut into 7 tiles of 20 pixels" in note for note in listing.notes)
    pixels, reasons, _ = rendered(list(samples["path"]))
    assert not reasons
    np.testing.assert_array_equal(pixels[4], resized(values[10:30, 15:35]))
    np.testing.assert_array_equal(pixels[5], resized(values[10:30, 30:50]))


@given(st.integers(1, 300), st.integers(1, 64), st.data())
def test_every_pixel_is_in_a_tile(length, size, data):
    from headrace.extract.sources.regions import _starts

    overlap = data.draw(st.integers(0, size - 1))
    starts = _starts(length, size, size - overlap)
    covered = np.zeros(length, bool)
    for start in starts:
        covered[start : start + size] = True
        assert start + min(size, length) <= length
    assert covered.all()
    assert len(set(starts)) == len(starts)
    gaps = np.diff(starts)
    assert (gaps <= size - overlap).all()


@pytest.mark.parametrize("background", ["white", "black", "nodata"])
def test_empty_tiles_are_failures_that_say_so(tmp_path, background):
    values = RNG.integers(50, 200, (16, 32, 3), dtype=np.uint8)
    values[:, 16:] = {"white": 240, "black": 5, "nodata": 0}[background]
    Image.fromarray(values).save(tmp_path / "a.png")
    tiles = Tiles(16, background=background, max_background=0.5)
    samples = read_source(detect_source(tmp_path / "a.png", tiles=tiles)).samples
    _, reasons, _ = rendered(list(samples["path"]))
    assert reasons == {
        1: f"an empty tile: 100.0% of its pixels are {background} (images.tiles.max_background "
        "is 0.5)"
    }


def test_tiles_of_many_bands_without_values_are_empty(tmp_path):
    values = RNG.random((16, 32, 4)).astype(np.float32)
    values[:, 16:] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig")
    how = Preprocessing(
        (16, 16), (16, 16), "squash", "bilinear", (0.5,) * 4, (0.5,) * 4, (0, 1), (1, 2, 3, 4)
    )
    tiles = Tiles(16, background="nodata")
    samples = read_source(detect_source(tmp_path / "a.tif", tiles=tiles)).samples
    pixels, reasons, _ = rendered(list(samples["path"]), how)
    assert list(reasons) == [1]
    assert reasons[1].startswith("an empty tile: 100.0%")
    np.testing.assert_allclose(pixels[0], 255 * values[:, :16], rtol=1e-6)


def test_an_image_that_is_none_stays_a_row_with_its_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    samples = read_source(detect_source(tmp_path / "a.png", tiles=Tiles(16))).samples
    assert list(samples["path"]) == [str(tmp_path / "a.png")]
    _, reasons, _ = rendered(list(samples["path"]))
    assert list(reasons) == [0]


def test_boxes_and_tiles_in_archives(tmp_path):
    """A crop of a member of an archive."""
    import zipfile

    values = photo(tmp_path / "a.png", width=32, height=16)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "wet/a.png")
    samples = read_source(detect_source(tmp_path / "a.zip", tiles=Tiles(16))).samples
    pixels, reasons, _ = rendered(list(samples["path"]))
    assert not reasons
    np.testing.assert_array_equal(pixels[1], resized(values[:, 16:]))


def test_an_array_of_many_bands(tmp_path):
    """(N, H, W, 13) in HDF5 and .npy: each image's bands."""
    import h5py

    values = RNG.random((3, 8, 9, 13)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.moveaxis(values, 3, 1)
    how = Preprocessing(
        (8, 9), (8, 9), "squash", "bilinear", (0.5,) * 2, (0.5,) * 2, (0, 1), (13, 4)
    )
    for name in ("a.npy", "a.h5"):
        samples = read_source(detect_source(tmp_path / name)).samples
        pixels, reasons, _ = rendered(list(samples["path"]), how)
        assert not reasons
        np.testing.assert_allclose(pixels, 255 * values[..., [12, 3]], rtol=1e-6)


WINDOWS = RNG.integers(0, 65536, (70, 90, 3), dtype=np.uint16)


@pytest.mark.parametrize(
    "options",
    [
        {"rowsperstrip": 16},
        {"tile": (16, 32)},
        {"tile": (16, 32), "compression": "deflate", "predictor": True},
        {"rowsperstrip": 7, "compression": "lzw", "byteorder": ">"},
        {"planarconfig": "separate", "tile": (32, 16)},
        {"planarconfig": "separate", "rowsperstrip": 9},
    ],
    ids=str,
)
def test_a_window_of_a_tiff_is_that_of_the_whole(options):
    """Whatever the layout: only the tiles and strips that it touches are decoded."""
    buffer = io.BytesIO()
    options = {"planarconfig": "contig", **options}
    is_planar = options["planarconfig"] == "separate"
    stored = np.ascontiguousarray(np.moveaxis(WINDOWS, 2, 0)) if is_planar else WINDOWS
    tifffile.imwrite(buffer, stored, photometric="minisblack", **options)
    bands = decode_deep(buffer.getvalue(), (3, 1, 2), in_parts=True)
    assert isinstance(bands.values, TiffWindows)
    for left, top, right, bottom in (
        (0, 0, 90, 70),
        (5, 6, 7, 8),
        (31, 15, 33, 17),
        (80, 60, 90, 70),
    ):
        part = bands.crop(left, top, right, bottom).floats()
        expected = WINDOWS[top:bottom, left:right][:, :, [2, 0, 1]] / 257
        np.testing.assert_allclose(part, expected, rtol=1e-6)


def test_a_blank_tile_of_a_tiff_in_planes():
    """GDAL writes no bytes for it (SPARSE_OK), in one plane or in all."""
    buffer = io.BytesIO()
    planes = np.ascontiguousarray(np.moveaxis(WINDOWS, 2, 0))
    tifffile.imwrite(
        buffer, planes, photometric="minisblack", planarconfig="separate", tile=(32, 16)
    )
    with tifffile.TiffFile(io.BytesIO(buffer.getvalue())) as tiff:
        page = tiff.pages[0]
        page.databytecounts = (0, *page.databytecounts[1:])
        part = TiffWindows(page, buffer.getvalue())[0:40, 0:20]
    expected = WINDOWS[:40, :20].copy()
    expected[:32, :16, 0] = 0
    np.testing.assert_array_equal(part, expected)


def test_tiles_of_a_tiff_that_is_too_large_to_be_decoded_whole(tmp_path, monkeypatch):
    """Of 8 bits too, in colours; without tiles it is refused."""
    monkeypatch.setattr("headrace.extract.images.bands.MAX_PIXELS", 1000)
    values = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", tile=(16, 16))
    samples = read_source(detect_source(tmp_path / "a.tif", tiles=Tiles(20))).samples
    pixels, reasons, _ = rendered(list(samples["path"]))
    assert not reasons
    np.testing.assert_array_equal(pixels[4], resized(values[20:, 20:40]))


def test_tiles_of_a_large_tiff_whose_zero_is_white(tmp_path, monkeypatch):
    """They are as dark as the same image decoded whole."""
    grey = RNG.integers(0, 256, (40, 60), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="miniswhite", tile=(16, 16))
    path = Crop(20, 20, 20, 20).locator(str(tmp_path / "a.tif"))
    whole, _, _ = rendered([path])
    monkeypatch.setattr("headrace.extract.images.bands.MAX_PIXELS", 1000)
    in_parts, _, _ = rendered([path])
    np.testing.assert_array_equal(in_parts, whole)
    np.testing.assert_array_equal(whole[0], resized(255 - grey[20:, 20:40, None].repeat(3, axis=2)))


def test_an_image_without_pixels_has_no_tiles(tmp_path):
    """However high it says it is: it stays one row, whose decoder says what is wrong."""
    with (tmp_path / "a.png").open("wb") as file:
        np.save(file, np.empty((2**40, 0, 3), np.uint8))
    samples = read_source(ImageSource("folder", tmp_path, tiles=Tiles(20)), labelled=False).samples
    assert list(samples["id"]) == ["a.png"]


def test_a_truncated_tiff_has_the_tiles_that_are_there(tmp_path):
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, WINDOWS, photometric="minisblack", planarconfig="contig", tile=(16, 16)
    )
    (tmp_path / "a.tif").write_bytes(buffer.getvalue()[:-3000])
    how = Preprocessing((8, 8), (8, 8), "squash", "bilinear", (0.5,), (0.5,), None, (1,))
    paths = [Crop(0, 0, 16, 16).locator(str(tmp_path / "a.tif"))]
    paths += [Crop(74, 54, 16, 16).locator(str(tmp_path / "a.tif"))]
    pixels, reasons, _ = rendered(paths, how)
    assert list(reasons) == [1]
    assert pixels[0].any()


def test_a_truncated_planar_tiff_is_refused(tmp_path):
    """Bands whose bytes are not there are no bands of zeros (xarray-spatial#1782)."""
    buffer = io.BytesIO()
    values = RNG.integers(1, 65536, (5, 64, 64), dtype=np.uint16)
    tifffile.imwrite(buffer, values, photometric="minisblack", planarconfig="separate")
    (tmp_path / "a.tif").write_bytes(buffer.getvalue()[:-20000])
    how = Preprocessing(
        (8, 8), (8, 8), "squash", "bilinear", (0.5,) * 5, (0.5,) * 5, None, (1, 2, 3, 4, 5)
    )
    _, reasons, _ = rendered([str(tmp_path / "a.tif")], how)
    assert list(reasons) == [0]


@pytest.mark.parametrize("distance", [0, 18])
def test_a_tiff_whose_pages_have_no_end_is_refused(distance):
    """The second page is followed by itself, or by a long row of others."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, WINDOWS[:16, :16], photometric="minisblack", planarconfig="contig")
    data = buffer.getvalue()
    next_page = 10 + 12 * int.from_bytes(data[8:10], "little")
    pages = b"".join(
        struct.pack("<HHHIII", 1, 256, 3, 1, 7, len(data) + number * distance)
        for number in range(1, 2000)
    )
    data = data[:next_page] + struct.pack("<I", len(data)) + data[next_page + 4 :] + pages
    with pytest.raises(ImageError, match="more than 1,000 pages"):
        decode_deep(data, (1, 3))


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_damaged_tiff_ends_in_a_reason(in_parts):
    """Bytes changed anywhere, the codec's number for one: an ImageError or pixels, nothing else."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, WINDOWS[:16, :16], photometric="minisblack", planarconfig="contig")
    random = np.random.default_rng(1)
    for _ in range(150):
        data = bytearray(buffer.getvalue())
        for place in random.integers(0, min(len(data), 300), 3):
            data[place] = random.integers(256)
        try:
            decode_deep(bytes(data), (1, 3), in_parts=in_parts).crop(0, 0, 8, 8).floats(0.0)
        except ImageError:
            continue
