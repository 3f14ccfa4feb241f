"""Black and white come from a file's format, its depth or `pixel_range`, never from the values of
one image; and no small image asks for much memory. Decoding, the exported preprocessing,
extraction, prediction and the report agree on it.
"""

import ast
import dataclasses
import functools
import io
import json
import re
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from rich.console import Console
from support.models import run_here
from support.pixels import KINDS, Kind, Range, encoded, png, pnm, tiff

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.errors import BackboneError, ImageError
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.locators import array_bytes
from headrace.extract.images.opening import MAX_EDGE, MAX_PIXELS
from headrace.extract.images.preprocessing import (
    DecodedImage,
    Preprocessing,
    decode_pixels,
    render_crop,
)
from headrace.extract.images.views import Augmentation
from headrace.extract.run import rendering as decode_module
from headrace.extract.run.decode_ahead import decoded_batches
from headrace.extract.run.rendering import Rendering
from headrace.extract.spec import BackboneSpec, Sample, check_spec
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.export.preprocessing_file import preprocess_file
from headrace.pipelines.models.model import load_model
from headrace.pipelines.models.torch_graph import GraphInput, pixels_of
from headrace.pipelines.planning.networks import backbone_spec
from headrace.pipelines.predict import bulk
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.report.page.thumbnails import Thumbnails
from headrace.pipelines.selection.signatures import signatures

CURE = r"no range of their own.*images\.pixel_range: \[0, 1\].*pixel_range=\(0, 1\)"
RANGES = st.none() | st.tuples(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5)).map(
    lambda pair: (pair[0], sum(pair))
)
KIND = st.sampled_from(sorted(KINDS))
SEED = st.integers(0, 2**32 - 1)


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def expected_pixels(kind: Kind, values: np.ndarray, pixel_range: Range | None) -> np.ndarray | None:
    """(H, W, 3) by what the formats say, written without a look at the decoder; None where nobody
    can know.
    """
    shown = pixel_range if kind.reaches and pixel_range is not None else kind.own
    if shown is None:
        return None

    def scaled(part: np.ndarray, ends: Range) -> np.ndarray:
        return 255 * (part.astype(float).clip(*ends) - ends[0]) / (ends[1] - ends[0])

    stacked = values[:, :, None] if values.ndim == 2 else values
    has_alpha = kind.channels in (2, 4)
    colours = np.rint(scaled(stacked[:, :, :-1] if has_alpha else stacked, shown))
    if kind.inverted:
        colours = 255 - colours
    if has_alpha:
        # In a PNG and a TIFF alpha has the file's depth; in an array it is a number like the
        # others.
        alpha = scaled(stacked[:, :, -1:], shown if kind.build is array_bytes else kind.own) / 255
        colours = colours * alpha + 255 * (1 - alpha)
    return np.broadcast_to(colours, (*colours.shape[:2], 3))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=8, deadline=None)
@given(seed=SEED, pixel_range=RANGES)
def test_every_kind_of_file_is_scaled_by_its_format_or_the_range(
    name: str, seed: int, pixel_range: Range | None
) -> None:
    """Whatever the values:

    8 bits by themselves, 16 bits and PGM by depth and header, everything else when it is said.
    """
    kind = KINDS[name]
    values = kind.draw(seed, width=6)
    expected = expected_pixels(kind, values, pixel_range)
    if expected is None:
        with pytest.raises(ImageError, match=CURE):
            decode_image(kind.build(values), pixel_range)
        return
    off = np.abs(rgb(decode_image(kind.build(values), pixel_range)) - expected)
    assert off.max() <= (
        2 if kind.channels in (2, 4) else 0.5 if kind.own is None or pixel_range else 0
    ), off.max()


@settings(max_examples=200, deadline=None)
@given(name=KIND, seed=SEED, pixel_range=RANGES)
def test_a_pixel_does_not_depend_on_its_neighbours(
    name: str, seed: int, pixel_range: Range | None
) -> None:
    """Of a picture and of a part of it each value is the same: no image is scaled by what it
    happens to hold.
    """
    kind = KINDS[name]
    values = kind.draw(seed, height=8, width=6)
    dark = values[
        np.argsort(values.reshape(8, -1).max(1))[:3]
    ]  # the rows that know nothing of the bright ones
    try:
        whole = rgb(decode_image(kind.build(values), pixel_range))
    except ImageError:
        with pytest.raises(ImageError):
            decode_image(kind.build(dark), pixel_range)
        return
    assert np.array_equal(
        rgb(decode_image(kind.build(dark), pixel_range)),
        whole[np.argsort(values.reshape(8, -1).max(1))[:3]],
    )


def test_the_same_picture_is_the_same_in_every_format() -> None:
    """4,096 shades of a 12-bit camera:

    PGM by its header, 12-bit TIFF by its depth, all others with [0, 4095].
    """
    shades = np.arange(4096, dtype=np.uint16).reshape(32, 128)
    expected = np.rint(shades / 4095 * 255).astype(np.uint8)
    three = np.repeat(shades[:, :, None], 3, axis=2)
    said = (0, 4095)
    for data, pixel_range in (
        (pnm(shades, "P5", 4095), None),
        (pnm(shades, "P2", 4095), None),
        (pnm(shades, "P5", 65535), said),
        (tiff(shades, bits=12), None),
        (tiff(shades), said),
        (tiff(shades.astype(np.int32)), said),
        (tiff(4095 - shades, photometric=0), said),
        (tiff(shades.astype(np.float32), order=">", deflate=True), said),
        (tiff(three, photometric=2, planes=True), said),
        (png(shades, 16, 0), said),
        (png(three, 16, 2), said),
        (pnm(three, "P6", 4095), None),
        (pnm(three, "P3", 65535), said),
        (array_bytes(shades), said),
        (array_bytes(shades / 4095), (0, 1)),
    ):
        found = rgb(decode_image(data, pixel_range))
        assert np.array_equal(found, np.repeat(expected[:, :, None], 3, axis=2)), (
            data[:12],
            pixel_range,
        )


# What people reported of other programs: where, what went wrong there, the file, the range, and the
# pixels that are right.
RAMP16 = np.array([[0, 128 * 257, 65535]], np.uint16)
RGB16 = np.array([[[0, 300, 65535], [10, 20, 30]]], np.uint16)
STRANGERS = {
    "python-pillow/Pillow#3011, #2574, #1108: a 16-bit grey PNG is clipped to white": (
        png(RAMP16, 16, 0), None, [0, 128, 255]),
    "python-pillow/Pillow#5991, fossasia/visdom#1087: a dark 16-bit frame must stay dark": (
        png(RAMP16 // 4096, 16, 0), None, [0, 0, 0]),
    "python-pillow/Pillow#6202: PGM of 12 bits, maxval 4095": (
        pnm(np.array([[0, 2048, 4095]]), "P5", 4095), None, [0, 128, 255]),
    "python-pillow/Pillow#5403: PGM of 10 bits is nearly black": (
        pnm(np.array([[0, 512, 1023]]), "P5", 1023), None, [0, 128, 255]),
    "python-pillow/Pillow#5008: PGM whose header says 11 for white": (
        pnm(np.array([[3, 7, 11]]), "P5", 11), None, [70, 162, 255]),
    "python-pillow/Pillow#6732: a black PGM whose header says 0 for white": (
        b"P5 1 1 0 \0", None, "maxval must be greater than 0"),
    "python-pillow/Pillow#414: 12-bit TIFF of a camera": (
        tiff(np.array([[0, 2048, 4095, 4095]], np.uint16), bits=12), None, [0, 128, 255, 255]),
    "python-pillow/Pillow#274: 12-bit values in a 16-bit TIFF": (
        tiff(np.array([[0, 447, 4095]], np.uint16)), (0, 4095), [0, 28, 255]),
    "python-pillow/Pillow#5248: 16-bit colours with a fourth sample that means nothing": (
        tiff(np.dstack([RGB16, RGB16[:, :, :1]]), photometric=2, extra=(0,)), None, [0, 1, 255, 0, 0, 0]),
    "python-pillow/Pillow#4819: elevations, signed 16 bits": (
        tiff(np.array([[-32768, 0, 1200]], np.int16)), None, CURE),
    "python-pillow/Pillow#4819, with the range said: no data is black": (
        tiff(np.array([[-32768, 0, 1200]], np.int16)), (0, 1200), [0, 0, 255]),
    "python-pillow/Pillow#7333: a float TIFF may mean anything": (
        tiff(np.array([[0, 0.5, 1]], np.float32)), None, CURE),
    "python-pillow/Pillow#3159: floats from 0 to 1": (
        tiff(np.array([[0, 0.5, 1]], np.float32)), (0, 1), [0, 128, 255]),
    "darktable-org/darktable#18815, InsightSoftwareConsortium/ITK#6636: white is zero, 16 bits": (
        tiff(RAMP16, photometric=0), None, [255, 127, 0]),
    "python-pillow/Pillow#9281: the transparent value of a 1-bit PNG": (
        png(np.array([[0, 1]]), 1, 0, (1,)), None, [0, 0, 0, 255, 255, 255]),
    "oxipng/oxipng#470: the transparent value of a 2-bit PNG": (
        png(np.array([[0, 1, 2, 3]]), 2, 0, (1,)), None, [0] * 3 + [255] * 3 + [170] * 3 + [255] * 3),
    "python-pillow/Pillow#3150 (PngSuite tbbn2c16): the transparent colour of a 16-bit PNG": (
        png(RGB16, 16, 2, (10, 20, 30)), None, [0, 1, 255, 255, 255, 255]),
    "pytorch/vision#2322, #8188: mode I;16 is unsigned": (
        encoded(Image.fromarray(RAMP16), "TIFF"), None, [0, 128, 255]),
    "python-pillow/Pillow#2157: a palette in a TIFF has 16 bits": (
        encoded(Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P"), "TIFF"), None, [0, 0, 0, 1, 1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("report", STRANGERS)
def test_what_strangers_reported(report: str) -> None:
    """Each input that went wrong in another program is read as its file means it, or refused with
    what to do.
    """
    data, pixel_range, expected = STRANGERS[report]
    if isinstance(expected, str):
        with pytest.raises(ImageError, match=expected):
            decode_image(data, pixel_range)
    else:
        assert np.asarray(decode_image(data, pixel_range)).reshape(-1).tolist() == expected


def test_colours_that_pillow_reduces_are_refused_when_their_range_is_said() -> None:
    """Inks, colours multiplied with alpha, planes within libtiff: without a range by their depth,
    with one not at all.
    """
    four = np.full((2, 3, 4), 65535, np.uint16)
    for data in (
        tiff(four, photometric=5),
        tiff(four, photometric=2, extra=(1,)),
        tiff(four[:, :, :3], photometric=2, planes=True, deflate=True),
        encoded(Image.fromarray(four[:, :, 0]), "JPEG2000"),
    ):
        assert set(np.unique(rgb(decode_image(data)))) <= {0, 255}
        with pytest.raises(ImageError, match="pixel_range cannot be applied"):
            decode_image(data, (0, 4095))
    with pytest.raises(ImageError, match="Save it interleaved"):
        decode_image(tiff(four, photometric=5, planes=True))
    assert (
        decode_image(
            encoded(Image.fromarray(four[:, :, 0] > 0).convert("L"), "JPEG2000"), (0, 4095)
        ).mode
        == "L"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    """Also with a range: nobody knows what they should look like."""
    values = np.array([[0, value]], np.float32)
    for data in (array_bytes(values), tiff(values), encoded(Image.fromarray(values), "TIFF")):
        with pytest.raises(ImageError, match="NaN or infinity"):
            decode_image(data, (0, 1))


def npy(header: str) -> bytes:
    """An .npy file with this header and 320 bytes behind it."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(320)


@pytest.mark.parametrize(
    ("descr", "shape", "reason"),
    [
        ("'|u1'", "(1099511627776,8,3)", "more than the limit"),
        ("'|u1'", "(20000,20000)", "more than the limit"),
        ("'|u1'", f"({MAX_EDGE + 1},1)", "an edge is longer"),
        ("'<f8'", "(8000,8000)", r"truncated: .* 512000000 bytes; 320 are there"),
        ("'|u1'", "(-8,-8)", "no image"),
        ("'|u1'", "(0,8)", "no image"),
        ("'|O'", "(8,8)", "type object; expected numbers"),
        ("'<c16'", "(4,4)", "expected numbers"),
        ("[('r','u1'),('g','u1')]", "(4,4)", "expected numbers"),
        ("'|u1'", "(8,8", "not a whole .npy file"),
        ("'|u1'", "(8%x,8)", r"not a whole .npy file \((?!.*0x).*\)"),
        ("'nonsense'", "(8,8)", "not a whole .npy file"),
    ],
)
def test_an_array_is_judged_by_its_header(descr: str, shape: str, reason: str) -> None:
    """What it declares is refused before any memory is asked for it."""
    data = npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")
    tracemalloc.start()
    with pytest.raises(ImageError, match=reason):
        decode_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_an_array_in_fortrans_order() -> None:
    """As `np.save` writes what is transposed."""
    values = np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    stream = io.BytesIO()
    np.save(stream, values)
    assert np.array_equal(np.asarray(decode_image(stream.getvalue())), values)


# Exported preprocessing


@functools.cache
def compiled_without_inputs(text: str) -> dict[str, object]:
    """The namespace of an exported file that is the same for all inputs; takes 30 ms."""
    namespace: dict[str, object] = {"__name__": "preprocess_case"}
    exec(text, namespace)
    return namespace


def exported(how: Preprocessing) -> dict[str, object]:
    """The namespace of the file that `headrace export` writes."""
    before, inputs, after = re.split(
        r"^INPUTS = (.*?\})\n\n",
        preprocess_file([GraphInput("images", how)], "0"),
        flags=re.S | re.M,
    )
    namespace = compiled_without_inputs(before + after)
    namespace["INPUTS"] = ast.literal_eval(inputs)
    return namespace


def made_by(
    path: Path, data: bytes, how: Preprocessing, namespace: dict[str, object]
) -> list[object]:
    """What headrace and the exported file make of one image: pixels, or the reason why not."""
    path.write_bytes(data)
    outcomes: list[object] = []
    for make in (
        lambda: render_crop(decode_image(data, how.pixel_range), how),
        lambda: namespace["load"](path),
    ):
        try:
            outcomes.append(np.asarray(make()).tolist())
        except (ImageError, namespace["ImageError"]) as error:  # type: ignore[misc]
            outcomes.append(str(error))
    return outcomes


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"]


@st.composite
def any_file(draw: st.DrawFn) -> bytes:
    """A file of any kind, as another program or Pillow writes it, whole or with a damaged byte."""
    seed = draw(SEED)
    if draw(st.booleans()):
        kind = KINDS[draw(KIND)]
        data = kind.build(kind.draw(seed, draw(st.integers(1, 40)), draw(st.integers(6, 40))))
    else:
        mode, form = (
            draw(st.sampled_from(MODES)),
            draw(st.sampled_from(["PNG", "TIFF", "PPM", "WEBP", "GIF", "JPEG"])),
        )
        size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        picture = Image.fromarray(noise if mode in ("P", "RGB", "CMYK", "RGBA") else noise[:, :, 0])
        options = (
            {"transparency": 7}
            if draw(st.booleans()) and form == "PNG" and mode in ("1", "L", "P")
            else {}
        )
        try:
            data = encoded(picture.convert(mode), form, **options)
        except (OSError, ValueError):  # not every format has every mode
            data = encoded(picture, "PNG")
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(data) - 1))
        data = data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
    return data


@pytest.mark.filterwarnings("ignore")  # Pillow's and NumPy's, of damaged metadata
@settings(max_examples=400, deadline=None)
@given(data=any_file(), mode=st.sampled_from(["shortest", "squash", "border"]), pixel_range=RANGES)
def test_the_exported_file_makes_the_same_pixels_and_refuses_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, mode: str, pixel_range: Range | None
) -> None:
    """To the last bit and the last word."""
    how = Preprocessing(
        (12, 12), (11, 9), mode, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), pixel_range
    )
    path = tmp_path_factory.getbasetemp() / "exported-case"
    ours, theirs = made_by(path, data, how, exported(how))
    assert ours == theirs


def test_the_exported_file_needs_pillow_and_numpy_alone(tmp_path: Path) -> None:
    """It imports nothing of headrace, runs as a command, and says of which range it is."""
    how = Preprocessing((12, 12), (8, 8), "shortest", "bilinear", (0.5,) * 3, (0.5,) * 3, (0, 4095))
    text = preprocess_file([GraphInput("images", how)], "0")
    assert "headrace.extract" not in text
    assert "'pixel_range': (0.0, 4095.0)" in text
    (tmp_path / "preprocess.py").write_text(text)
    (tmp_path / "a.png").write_bytes(png(np.full((9, 9), 4095, np.uint16), 16, 0))
    command = [sys.executable, "-I", "preprocess.py", "a.png", "a.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "a.npy").tolist() == np.full((8, 8, 3), 255).tolist()


# Bounded work

LINES = (
    (40_000, 1),
    (1, 40_000),
    (2**20, 1),
    (1, 2**20),
    (80_000_000, 1),
    (250, 1),
    (1, 250),
    (20_000, 1000),
)
DECODE = """
import resource, sys, time
from pathlib import Path
from headrace.extract.errors import ImageError
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.preprocessing import Preprocessing, render_crop

how = Preprocessing((256, 256), (224, 224), sys.argv[1], "bicubic", (0.5,) * 3, (0.5,) * 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path().glob("*.png")):
    started = time.perf_counter()
    try:
        said = str(render_crop(decode_image(path.read_bytes()), how).shape)
    except ImageError as error:
        said = str(error)
    print(path.stem, said)
    assert time.perf_counter() - started < 20, path
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images one pixel high and one pixel wide, of some kB each, and a panorama."""
    folder = tmp_path_factory.mktemp("lines")
    for number, size in enumerate(LINES):
        Image.new("RGB" if size[0] * size[1] < 2**25 else "1", size).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shortest", "squash", "border"])
def test_no_line_of_pixels_asks_for_much_memory(lines: Path, mode: str) -> None:
    """They are refused where resizing would take gigabytes, with both sizes; nothing takes half a
    gigabyte.
    """
    command = [sys.executable, "-c", DECODE, mode]
    done = subprocess.run(command, cwd=lines, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *said, kilobytes = done.stdout.splitlines()
    refused = [line for line in said if "limit of" in line]
    assert len(refused) == {"shortest": 5, "squash": 2, "border": 1}[mode], done.stdout
    assert all("224, 224, 3" in line for line in said if line not in refused)
    if mode == "shortest":
        assert "40000 x 1 pixels would be resized to 10240000 x 256" in refused[0]
    if mode == "squash":
        assert "resized to 256 x 256 by way of 256 x 1048576" in refused[0]
    assert float(kilobytes) / 1e6 < 0.5, done.stdout


def test_panoramas_are_used() -> None:
    """Up to 250 :

    1 at 256 pixels, 60 : 1 at 1024, and 5 : 1 at 4096, which is the largest input that a recipe may
    ask for.
    """
    for size, edge in (((25_000, 100), 256), ((6000, 100), 1024), ((1000, 200), 4096)):
        how = Preprocessing(
            (edge, edge), (edge, edge), "shortest", "nearest", (0.5,) * 3, (0.5,) * 3
        )
        assert edge * edge * max(size) / min(size) <= MAX_PIXELS
        assert render_crop(Image.new("L", size), how).shape == (edge, edge, 3)


# The range as a part of what features are

HOW = Preprocessing((8, 8), (8, 8), "squash", "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_the_range_is_part_of_every_fingerprint() -> None:
    """Another range is another feature set; the same one is the same however it is written."""
    texts = {
        dataclasses.replace(HOW, pixel_range=ends).to_json() for ends in (None, (0, 1), (0, 4095))
    }
    assert len(texts) == 3
    assert (
        dataclasses.replace(HOW, pixel_range=(0, 1)).to_json()
        == dataclasses.replace(HOW, pixel_range=[0.0, 1.0]).to_json()
    )
    assert json.loads(HOW.to_json())["pixel_range"] is None
    assert pixels_of(HOW) != pixels_of(dataclasses.replace(HOW, pixel_range=(0, 1)))
    spec = BackboneSpec("timm:test_resnet", "random:0", pixel_range=(0, 4095))
    assert load_backbone(spec).preprocessing.pixel_range == (0, 4095)
    assert (
        load_backbone(dataclasses.replace(spec, pixel_range=None)).preprocessing.pixel_range is None
    )


@pytest.mark.parametrize(
    "ends", [(1, 0), (0, 0), (0, np.inf), (np.nan, 1), (-1e308, 1e308), (0,), "ab", 255]
)
def test_what_is_no_range(ends: object) -> None:
    """Refused before a network is built, with what was found."""
    with pytest.raises(BackboneError, match=r"pixel_range is .*expected"):
        check_spec(BackboneSpec("torchvision:resnet18", "random:0", pixel_range=ends))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pixel_range is .*expected"):
        dataclasses.replace(HOW, pixel_range=ends)


def test_an_image_is_decoded_once_for_each_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two networks with one range share the pixels, a third has its own."""
    (tmp_path / "a.png").write_bytes(png(np.full((8, 8), 4095, np.uint16), 16, 0))
    asked: list[Range | None] = []

    def counting(data: bytes, how: Preprocessing, *, in_parts: bool) -> DecodedImage:
        asked.append(how.pixel_range)
        return decode_pixels(data, how, in_parts=in_parts)

    monkeypatch.setattr(decode_module, "decode_pixels", counting)
    ranges = (None, (0, 4095), None, (0, 4095))
    renderings = [
        Rendering(dataclasses.replace(HOW, pixel_range=ends), 0, Augmentation()) for ends in ranges
    ]
    with ThreadPoolExecutor(1) as pool:
        sample = Sample("a", str(tmp_path / "a.png"), "")
        (batch,) = decoded_batches(pool, [sample], renderings, batch_size=1)
    assert asked == [None, (0, 4095)]
    assert [int(pixels.max()) for pixels in batch.pixels] == [16, 255, 16, 255]


# From a recipe to predictions

RECIPE = """\
images: {{folder: frames, pixel_range: {ends}}}
task: {{folds: 2, test_fraction: 0}}
backbones:
  - {{name: "timm:test_resnet", weights: "random:0", image_size: 32, crop_fraction: 1.0, taps: [layer1.avg]}}
heads: {{logistic: {{C: [1], inputs: [each]}}}}
compute: {{workers: 1}}
"""


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12-bit camera frames in 16-bit PNG files, bright and dark, whose pictures are alike; and runs
    with and without range.
    """
    folder = tmp_path_factory.mktemp("frames")
    rng = np.random.default_rng(0)
    for number in range(24):
        name, bright = (("dark", 0.3), ("light", 1.0))[number % 2]
        (folder / "frames" / name).mkdir(parents=True, exist_ok=True)
        frame = (bright * rng.integers(0, 4096, (32, 32))).astype(np.uint16)
        (folder / "frames" / name / f"{number:02}.png").write_bytes(png(frame, 16, 0))
    for name, ends in (("camera", "[0, 4095]"), ("plain", "null")):
        (folder / f"{name}.yaml").write_text(RECIPE.format(ends=ends))
        run_here(folder / f"{name}.yaml")
    return folder


@pytest.fixture(scope="module")
def camera(frames: Path) -> object:
    """The model of the run with pixel_range: [0, 4095]."""
    return load_model(frames / "headrace-runs" / "camera")


@pytest.fixture(scope="module")
def plain(frames: Path) -> object:
    """The model of the run without a range."""
    return load_model(frames / "headrace-runs" / "plain")


def test_a_recipe_says_the_range_and_the_model_keeps_it(
    frames: Path, camera: object, plain: object
) -> None:
    """From images.pixel_range to the backbone, its fingerprint, and the model that predicts."""
    recipe = load_recipe(frames / "camera.yaml")
    assert backbone_spec(recipe.backbones[0], recipe).pixel_range == (0, 4095)
    (member,) = camera.members
    assert member.backbones[0].pixel_range == (0, 4095)
    assert json.loads(member.features[0].preprocessing)["pixel_range"] == [0, 4095]
    assert plain.members[0].backbones[0].pixel_range is None
    assert camera.digest != plain.digest
    paths = sorted((frames / "frames").rglob("*.png"))
    assert camera.predict(paths).tolist() == [path.parent.name for path in paths]
    assert np.abs(camera.predict_proba(paths) - plain.predict_proba(paths)).max() > 0.001


@pytest.mark.parametrize("ends", ["[1, 0]", "[0, .inf]", "[0]", "white"])
def test_a_recipe_with_no_range_is_refused(tmp_path: Path, ends: str) -> None:
    """With the key's name, before anything is read."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(ends=ends))
    with pytest.raises(ValueError, match=r"images\.pixel_range"):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_report_shows_what_the_network_saw(frames: Path, tmp_path: Path) -> None:
    """Thumbnails and signatures have the run's range, and signatures of another range are not taken
    for these.
    """
    path = next((frames / "frames" / "light").glob("*.png"))
    data = path.read_bytes()
    content = hash_bytes(data)
    means = {}
    for ends in (None, (0, 4095), None):
        (grey,), _ = signatures({content: str(path)}, [content], tmp_path / "signatures.npz", ends)
        means[ends] = float(grey.mean())
    assert means[None] < 10 < 100 < means[0, 4095]
    shown = [Thumbnails({content: str(path)}, ends).get(content) for ends in (None, (0, 4095))]
    assert shown[0] != shown[1]


def test_everything_in_memory_is_the_image_that_it_is_in_a_file(
    frames: Path, camera: object, plain: object, tmp_path: Path
) -> None:
    """Paths, Pillow images, arrays and tensors, in any mixture and order of axes: the same picture,
    the same prediction.
    """
    path = sorted((frames / "frames").rglob("*.png"))[0]
    odd = tmp_path / "x::tar:0:9:a.png"  # a name that reads like a place in an archive
    odd.write_bytes(path.read_bytes())
    with Image.open(path) as image:
        values = np.array(image)
    for model, unit in ((camera, 4095), (plain, 65535)):
        (expected,) = model.predict_proba(path)
        floats = (values / unit).astype(np.float32) if model is plain else values.astype(np.float32)
        mixture = [
            path,
            odd,
            str(path),
            Image.open(path),
            values,
            floats,
            torch.from_numpy(values),
            torch.from_numpy(floats)[None],
            torch.from_numpy(floats).expand(3, -1, -1),
            np.repeat(floats[:, :, None], 3, axis=2),
            np.repeat(floats[None], 3, axis=0),
        ]
        np.testing.assert_allclose(
            model.predict_proba(mixture), np.tile(expected, (len(mixture), 1)), atol=2e-3
        )
        for many in (
            np.stack([values, values]),
            np.stack([values, values])[:, :, :, None],
            torch.from_numpy(np.stack([floats, floats]))[:, None],
            np.stack([np.repeat(floats[:, :, None], 3, axis=2)] * 2),
        ):
            found = model.predict_proba(many)
            np.testing.assert_allclose(found, np.tile(expected, (2, 1)), atol=2e-3)
        one = torch.from_numpy(floats).expand(3, -1, -1)
        np.testing.assert_allclose(model.predict_proba(one), expected[None], atol=2e-3)
        np.testing.assert_allclose(model.predict_proba(values), expected[None], atol=2e-3)


def test_an_open_pillow_image_is_its_file(plain: object, tmp_path: Path) -> None:
    """Pillow's own pixels of a PGM have lost what is white; of an image that is not read yet the
    file is asked.
    """
    for name, data in (
        ("a.pgm", pnm(np.full((9, 9), 30), "P5", 30)),
        ("a.tif", tiff(np.zeros((9, 9), np.uint16), photometric=0)),
    ):
        (tmp_path / name).write_bytes(data)
        with Image.open(tmp_path / name) as image:
            found = plain.predict_proba([image, Image.new("L", (9, 9), 255)])
        assert np.array_equal(found[0], found[1])
    with pytest.raises(InvalidInput, match=rf"image 0: .*mode F.*{CURE}"):
        plain.predict_proba(Image.new("F", (9, 9)))


BLANK = np.zeros((32, 32, 3))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([BLANK + 2], r"image 0: float64 values from 2 to 2; expected 0 to 1"),
        ([np.uint8(BLANK), BLANK - 0.5], r"image 1: float64 values from -0.5"),
        (torch.full((3, 32, 32), 255.0), r"float32 values from 255 to 255; expected 0 to 1"),
        ([np.full((8, 8), np.nan)], "NaN"),
        ([np.zeros((8, 8), np.int64)], CURE),
        (
            np.zeros((3, 32, 3), np.uint8),
            r"3 channels and 3 x 32 pixels.*3 channels and 32 x 3 pixels",
        ),
        (torch.zeros(3, 32, 3), r"3 channels and 3 x 32 pixels.*3 channels and 32 x 3 pixels"),
        (
            [np.zeros((4, 32, 3), np.uint8)],
            r"image 0: .*3 channels and 4 x 32 pixels.*4 channels and 32 x 3 pixels",
        ),
        (np.zeros((2, 3, 32, 3), np.uint8), r"a batch of shape \(2, 3, 32, 3\)"),
        (np.zeros((3, 32, 32), np.uint8), r"one image of 3 channels .* or 3 grey images"),
        (np.zeros((4, 32, 32), np.uint8), r"one image of 4 channels .* or 4 grey images"),
        (torch.zeros(5, 32, 32), "no axis of 1, 3 or 4 channels"),
        (np.zeros((2, 5, 32, 7), np.uint8), "no axis of 1, 3 or 4 channels"),
        (np.zeros((2, 2, 3, 8, 8), np.uint8), "no image"),
        ([np.array([["a"]])], "expected numbers"),
        ([np.array([[None]])], "expected numbers"),
        ([{"path": "a.png"}], "image 0: an image is given as dict"),
    ],
)
def test_what_could_mean_two_things_is_refused_with_both(
    plain: object, given: object, reason: str
) -> None:
    """Never guessed by size or by values."""
    with pytest.raises(InvalidInput, match=f"(?s){reason}"):
        plain.predict_proba(given)


def test_floats_may_be_rounded_beyond_their_range(plain: object) -> None:
    """What is rounded to black or to white in any case: a resize in float32 goes a
    little beyond.
    """
    near = plain.predict_proba([BLANK + 1.0001, BLANK - 0.0001])
    assert np.array_equal(near, plain.predict_proba([BLANK + 1.0, BLANK]))


def test_a_failed_image_has_its_reason(
    frames: Path, plain: object, camera: object, tmp_path: Path
) -> None:
    """A float TIFF and a line of pixels among others: their rows say why, in a moment, and the
    others are predicted.
    """
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.tif").write_bytes(tiff(np.full((32, 32), 4095, np.float32)))
    Image.new("L", (2**20, 1)).save(tmp_path / "new" / "b.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "new" / "c.png")
    paths = [str(path) for path in sorted((tmp_path / "new").iterdir())]
    images = pd.DataFrame({"file": paths, "path": paths})
    started = time.perf_counter()
    errors = {}
    for name, model in (("plain", plain), ("camera", camera)):
        bulk.predict_table(
            model, images, tmp_path / f"{name}.csv", "csv", console=Console(quiet=True)
        )
        table = pd.read_csv(tmp_path / f"{name}.csv")
        errors[name] = table["error"].fillna("").tolist()
    assert time.perf_counter() - started < 30
    assert "no range of their own" in errors["plain"][0]
    assert errors["camera"][0] == errors["camera"][2] == ""
    assert all("would be resized to" in each[1] for each in errors.values())
