"""Decoding: every kind of image file comes out as the pixels it shows, and whatever cannot be
decoded says why.
"""

import gzip
import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile
from support.malformed_images import bomb, encoded, gradient, malformed_corpus

from headrace.extract.errors import ImageError
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.locators import array_bytes
from headrace.extract.images.opening import FORMATS
from headrace.extract.sources.formats import IMAGE_SUFFIXES


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "jpeg"}, 12),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 95}, 12),
        ("JPEG", {"quality": 95, "progressive": True}, 12),
        ("GIF", {}, 40),
        ("PPM", {}, 0),
    ],
)
def test_formats(kind: str, options: dict[str, object], tolerance: int) -> None:
    """The pixels of each format, to the loss of its compression."""
    original = gradient()
    decoded = decode_image(encoded(original, kind, **options))
    assert decoded.mode == "RGB"
    assert np.abs(rgb(decoded) - rgb(original)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """A photograph is shown upright, whatever way the camera was held, and whatever the format."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the stored pixels are the upright ones turned the other way
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = gradient()
    stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF", "JPEG"):
        decoded = decode_image(encoded(stored, kind, exif=exif))
        assert decoded.size == upright.size, kind
        assert np.abs(rgb(decoded) - rgb(upright)).max() <= (16 if kind == "JPEG" else 0), kind


def test_sixteen_bits_are_scaled() -> None:
    """0 … 65535 becomes 0 … 255 evenly; Pillow's own conversion clips all above 255 to white."""
    values = np.linspace(0, 65535, 64 * 8).reshape(8, 64).astype(np.uint16)
    expected = np.rint(values / 257)
    for data in (
        encoded(Image.fromarray(values), "PNG"),
        encoded(Image.fromarray(values), "TIFF"),
        array_bytes(values),
    ):
        decoded = decode_image(data)
        assert decoded.mode == "L"
        assert np.abs(np.asarray(decoded) - expected).max() == 0
    big_endian = Image.frombytes("I;16B", (64, 8), values.astype(">u2").tobytes())
    assert np.abs(np.asarray(decode_image(encoded(big_endian, "TIFF"))) - expected).max() == 0


def test_alpha_is_laid_over_white() -> None:
    """Transparent is white, half transparent is half way, whether the alpha is a channel or a
    palette's entry.
    """
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 0, 0, 255)
    pixels[0, 1] = (200, 0, 0, 0)
    pixels[1, 0] = (0, 0, 0, 128)
    pixels[1, 1] = (7, 7, 7, 0)
    expected = np.array([[[200, 0, 0], [255, 255, 255]], [[127, 127, 127], [255, 255, 255]]])
    assert np.abs(rgb(decode_image(encoded(Image.fromarray(pixels), "PNG"))) - expected).max() <= 1
    assert np.abs(rgb(decode_image(array_bytes(pixels))) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert rgb(decode_image(encoded(palette, "PNG", transparency=1)))[0].tolist() == [
        [10, 20, 30],
        [255, 255, 255],
    ]
    grey = Image.fromarray(np.array([[0, 100]], np.uint8))
    assert rgb(decode_image(encoded(grey, "PNG", transparency=0)))[0].tolist() == [
        [255] * 3,
        [100] * 3,
    ]


def test_other_modes() -> None:
    """Grey, one bit, palette, CMYK and YCbCr come out in the colours they show."""
    original = gradient()
    grey = original.convert("L")
    assert decode_image(encoded(grey, "PNG")).mode == "L"
    assert np.array_equal(np.asarray(decode_image(encoded(grey, "PNG"))), np.asarray(grey))
    one_bit = original.convert("1")
    assert set(np.unique(np.asarray(decode_image(encoded(one_bit, "PNG"))))) == {0, 255}
    quantized = original.quantize(64)
    assert np.abs(rgb(decode_image(encoded(quantized, "PNG"))) - rgb(quantized)).max() == 0
    cmyk = original.convert("CMYK")
    for kind in ("TIFF", "JPEG"):
        assert np.abs(rgb(decode_image(encoded(cmyk, kind))) - rgb(original)).max() <= 16, kind


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "TIFF"):
        data = encoded(
            frames[0],
            kind,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if kind == "WEBP" else {}),
        )
        assert rgb(decode_image(data))[4, 4].tolist() == [255, 0, 0], kind


def test_arrays() -> None:
    """Channels first or last, one channel or none, 8 and 16 bits, and with their range said other
    numbers: the same picture.
    """
    picture = np.asarray(gradient())
    for array, pixel_range in (
        (picture, None),
        (np.moveaxis(picture, 2, 0), None),
        (picture.astype(np.int64), (0, 255)),
        (picture.astype(np.float32), (0, 255)),
        (picture.astype(np.float64) / 255, (0, 1)),
        (picture.astype(np.uint16) * 257, None),
    ):
        assert np.array_equal(rgb(decode_image(array_bytes(array), pixel_range)), picture)
    assert decode_image(array_bytes(picture[:, :, :1])).mode == "L"
    assert np.array_equal(
        np.asarray(decode_image(array_bytes(picture[:, :, 0] > 100))),
        (picture[:, :, 0] > 100) * 255,
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (gzip.compress(b"image", mtime=0), "not an image"),
        (encoded(gradient(400, 300), "JPEG")[:2000], "truncated"),
        (encoded(gradient(400, 300), "PNG")[:300], "truncated|Truncated"),
        (array_bytes(np.zeros((3, 4, 5, 6), np.uint8)), "no image"),
        (
            array_bytes(np.full((4, 4), 0.5)),
            r"float64 values .* no range .* images.pixel_range: \[0, 1\]",
        ),
        (array_bytes(np.full((4, 4), -1)), "int64 values .* no range"),
        (array_bytes(np.zeros((0, 4), np.uint8)), "no image"),
        (array_bytes(np.array([["a", "b"]])), "expected numbers"),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_unopened() -> None:
    """Within Pillow's limit nothing is refused for its size; above it, nothing is decoded."""
    for width, height in ((20_000, 10_000), (65_000, 65_000)):
        with pytest.raises(ImageError, match="limit of 178,956,970 pixels"):
            decode_image(bomb(width, height))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_photos_of_a_hundred_megapixels_are_images() -> None:
    """Phones take 12,000 x 9,000 pixels: more than those above which Pillow warns."""
    photo = encoded(Image.new("L", (12_000, 9_000)), "JPEG")
    assert decode_image(photo).size == (12_000, 9_000)


def test_truncation_is_never_hidden() -> None:
    """Other libraries switch LOAD_TRUNCATED_IMAGES on for the whole process."""
    data = encoded(gradient(400, 300), "JPEG")
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2])


def test_malformed_files_decode_or_say_why() -> None:
    """Nothing but ImageError ever comes out, and what decodes has pixels."""
    corpus = malformed_corpus()
    assert len(corpus) >= 300
    decoded = 0
    reasons: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
        for data in corpus:
            try:
                image = decode_image(data)
            except ImageError as error:
                reasons.append(str(error))
            else:
                decoded += 1
                assert image.mode in ("RGB", "L")
                assert image.width * image.height > 0
    assert all(reason.strip() for reason in reasons)
    assert 30 < decoded < len(corpus) - 100, "both kinds must be there for this to test anything"


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
showpage
"""


def test_formats_beyond_those_that_listings_know_are_not_decoded():
    """EPS, which Pillow hands to Ghostscript, and all that nobody keeps data sets in, are no
    images, whatever their name.
    """
    with pytest.raises(ImageError, match="not an image in a format that is read here"):
        decode_image(EPS)
    for name in ("TGA", "PCX", "ICO", "PDF", "SGI"):
        stored = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stored, name)
        with pytest.raises(ImageError, match="not an image in a format that is read here"):
            decode_image(stored.getvalue())


def test_the_formats_are_those_of_the_suffixes():
    """Every suffix that a listing takes for an image is of a format that is decoded, and no format
    is without a suffix.
    """
    known = Image.registered_extensions()
    asked = {known.get(suffix, "JPEG" if suffix == ".jif" else None) for suffix in IMAGE_SUFFIXES}
    assert asked == set(FORMATS)
