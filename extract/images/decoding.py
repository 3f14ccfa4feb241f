"""Decoding: the bytes of an image file to 8-bit pixels, or the reason why they cannot be decoded.

Which value is black and which is white comes from the file's format, its bit depth, or the caller's
`pixel_range`; never from the values of one image, which would make a dark frame as bright as a
bright one.

`headrace export` copies this module into `preprocess.py`, so it imports only Pillow and NumPy.
"""

import functools
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageFile

from headrace.extract.errors import ImageError
from headrace.extract.images.opening import check_size, decoding_reason, open_image
from headrace.extract.images.raw_pixels import (
    SIXTEEN_BITS,
    PixelRange,
    RawPixels,
    array_header,
    read_array_pixels,
    read_raw_pixels,
)

# Part of every fingerprint: another Pillow can round a resize or a JPEG differently.
DECODER = f"pillow {PIL.__version__}"
# Every conversion of the file's pixels. The text is part of every fingerprint, so that a new way of
# decoding gives new feature sets.
COLOUR = (
    "rgb; exif orientation applied; alpha over white; first frame; black and white by bit depth, "
    "header or pixel_range"
)

# exact: every pixel of the file. scaled: for a JPEG much larger than the network's input, the
# decoder computes a smaller image from the low frequencies only.
DecodeMode = Literal["exact", "scaled"]
JPEG_REDUCTIONS = (8, 4, 2)  # divisors of the edges that libjpeg has fast code for

_NUMPY_MAGIC, _JPEG_MAGIC = b"\x93NUMPY", b"\xff\xd8\xff"  # first bytes of these formats
_BLOCK_VALUES = 2**20  # converted together, so that their float64 copy takes only 8 MB
_ORIENTATION_TAG = 0x0112  # of EXIF
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILE_BOX = "headrace_file_box"  # key in Image.info
# The turns that exchange height and width, and those after which the file's right edge is on the
# left, or its lower edge on top, of the upright image.
SIDEWAYS = tuple(ORIENTATIONS[number] for number in (5, 6, 7, 8))
RIGHT_IS_LEFT = tuple(ORIENTATIONS[number] for number in (2, 3, 6, 7))
BELOW_IS_ABOVE = tuple(ORIENTATIONS[number] for number in (3, 4, 7, 8))


def decode_image(
    data: bytes, pixel_range: PixelRange | None = None, reduction: int = 1
) -> Image.Image:
    """Decode an image to 8 bits, upright, in mode "RGB", or "L" if its three channels are equal.

    pixel_range: the values that are black and white, for images of more than 8 bits; values beyond
    are clipped. Images of at most 8 bits have their own range. Without it 16-bit images and PGM
    files have one too, by their depth or header; floats, signed and 32-bit integers have none and
    are refused.
    reduction: 1, or one of JPEG_REDUCTIONS, by which the decoder of a JPEG divides its edges
    (rounded up, see `file_box`); other formats are decoded in full.

    Raises ImageError, and only that, with the reason why it cannot be decoded.
    """
    if not data:
        raise ImageError("the file is empty")
    if data.startswith(_NUMPY_MAGIC):
        return _eight_bits(read_array_pixels(data), pixel_range)
    # Some libraries switch this on for the whole process; truncated files would then decode to grey
    # bars without an error.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with open_image(data) as image:
            check_size(*image.size)
            raw = read_raw_pixels(image, data, pixel_range)
            if raw is not None:
                return upright(_eight_bits(raw, pixel_range), image)
            file_size = image.size
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            image.load()
            if image.size != file_size:
                _cover_padding(image, file_size, reduction)
            upright_image = to_rgb(upright(image, image), pixel_range)
            if image.size != file_size:
                upright_image.info[_FILE_BOX] = _file_box(image, file_size, reduction)
            return upright_image
    # MemoryError passes: too little memory is no fault of the image, and must not be recorded as a
    # failure of it.
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on malformed input, and a run must go on
        raise ImageError(decoding_reason(error, data)) from error


def file_box(image: Image.Image) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of a decoded image that the file's pixels cover.

    That is all of it, unless a JPEG's edges were divided and rounded up.
    """
    box: tuple[float, float, float, float] = image.info.get(_FILE_BOX, (0, 0, *image.size))
    return box


def _cover_padding(image: Image.Image, file_size: tuple[int, int], reduction: int) -> None:
    """Overwrite the last column and row, which the file's pixels cover in part, by those before."""
    # The rest of them comes from the padding of the file's last blocks, which may hold anything
    # (Pillow's issue 3419 shows a coloured line).
    width, height = image.size
    if file_size[0] % reduction and width > 1:
        image.paste(image.crop((width - 2, 0, width - 1, height)), (width - 1, 0))
    if file_size[1] % reduction and height > 1:
        image.paste(image.crop((0, height - 2, width, height - 1)), (0, height - 1))


def _file_box(
    image: Image.Image, file_size: tuple[int, int], reduction: int
) -> tuple[float, float, float, float]:
    """Return what `file_box` returns for the upright image of `image`, whose edges were divided by
    `reduction` and rounded up.
    """
    turn = orientation_of(image)
    width, height = (edge / reduction for edge in file_size)
    # The part of a pixel that was rounded up is at the right and lower edge in the file.
    right, below = image.width - width, image.height - height
    if turn in SIDEWAYS:
        width, height, right, below = height, width, below, right
    left = right if turn in RIGHT_IS_LEFT else 0.0
    above = below if turn in BELOW_IS_ABOVE else 0.0
    return left, above, left + width, above + height


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of the upright image of a JPEG, read from its header.

    None for other formats, and for damaged files.
    """
    if not data.startswith(_JPEG_MAGIC):
        return None
    try:
        with open_image(data) as image:
            width, height = image.size
            is_sideways = orientation_of(image) in SIDEWAYS
    except Exception:  # noqa: BLE001 - decoding it in full says what is wrong
        return None
    return (width, height) if is_sideways else (height, width)


def has_deep_pixels(data: bytes) -> bool:
    """Return whether an image file's pixels have more than 8 bits, so that a `pixel_range` applies.

    Raises whatever its decoder does.
    """
    if data.startswith(_NUMPY_MAGIC):
        return array_header(data)[2] not in (np.uint8, np.bool_)
    with open_image(data) as image:
        return read_raw_pixels(image, data, None) is not None


def to_rgb(image: Image.Image, pixel_range: PixelRange | None = None) -> Image.Image:
    """Convert an image of Pillow to mode "RGB" or "L", as `decode_image` does.

    Raises ImageError for modes whose range is not known.
    """
    check_size(*image.size)
    mode = image.mode
    if mode in ("RGB", "L", "1"):
        plain_image = image.convert("L") if mode == "1" else image
        if "transparency" not in image.info:
            return plain_image
        # A colour may be transparent without an alpha channel (PNG tRNS); `convert` makes it one.
        plain_image.info["transparency"] = image.info["transparency"]
        return _over_white(plain_image.convert("RGBA"))
    if mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        return _eight_bits(RawPixels(values, "16-bit values", SIXTEEN_BITS), pixel_range)
    if mode in ("I", "F"):
        values = np.asarray(image)
        raw = RawPixels(values, f"{values.dtype} values (Pillow's mode {mode})", None)
        return _eight_bits(raw, pixel_range)
    has_alpha = mode in ("RGBA", "LA", "PA", "La", "RGBa")
    if has_alpha or (mode == "P" and "transparency" in image.info):
        return _over_white(image.convert("RGBA"))
    return image.convert("RGB")  # P, CMYK, YCbCr, HSV, LAB


def check_pixel_range(pixel_range: Any) -> None:
    """Raise ValueError unless it is (black, white): two finite numbers, the smaller first."""
    is_pair = isinstance(pixel_range, (tuple, list)) and len(pixel_range) == 2
    if not is_pair or not all(isinstance(end, (int, float)) for end in pixel_range):
        raise ValueError(
            f"pixel_range is {pixel_range!r}; expected two numbers, black and white, such as (0, 1)"
        )
    black_value, white_value = pixel_range
    if not (black_value < white_value and math.isfinite(white_value - black_value)):
        raise ValueError(
            f"pixel_range is {pixel_range!r}; expected finite numbers, black below white"
        )


def _eight_bits(raw: RawPixels, pixel_range: PixelRange | None) -> Image.Image:
    """Return samples as an image in mode "RGB" or "L".

    Raises ImageError if their range is not known.
    """
    values = raw.values
    has_eight_bits = values.dtype in (np.uint8, np.bool_)
    value_range = raw.own_range if has_eight_bits or pixel_range is None else pixel_range
    if value_range is None:
        raise ImageError(
            f"{raw.name} have no range of their own. Say which value is black and which is "
            "white: images.pixel_range: [0, 1] in the recipe where 0 is black and 1 is white (in "
            "Python: pixel_range=(0, 1))"
        )
    n_channels = values.shape[2] if values.ndim == 3 else 1
    colour_values = values[:, :, : n_channels - 1] if n_channels in (2, 4) else values
    grey_or_rgb = _scale(colour_values, *value_range)
    if raw.white_is_zero:
        grey_or_rgb = 255 - grey_or_rgb
    if raw.transparent is not None:
        is_transparent = values == np.asarray(raw.transparent)
        # Blended with white, a transparent pixel is white.
        grey_or_rgb[is_transparent.all(axis=2) if n_channels > 1 else is_transparent] = 255
    if n_channels in (2, 4):
        alpha = _scale(values[:, :, n_channels - 1 :], *(raw.alpha_range or value_range))
        with_alpha = Image.fromarray(np.concatenate([grey_or_rgb, alpha], axis=2))
        return _over_white(with_alpha.convert("RGBA"))
    return Image.fromarray(np.ascontiguousarray(grey_or_rgb))


def _scale(
    values: npt.NDArray[Any], black_value: float, white_value: float
) -> npt.NDArray[np.uint8]:
    """Return uint8 of the same shape: black is 0, white 255, values beyond are clipped.

    Raises ImageError for NaN and infinity.
    """
    if values.dtype == np.uint8 and (black_value, white_value) == (0, 255):
        return values
    flat_values = np.ascontiguousarray(values).reshape(-1)
    flat_values = flat_values.view(np.uint8) if flat_values.dtype == np.bool_ else flat_values
    # Of 8 and 16 bits there are so few values that a table of all is faster than the arithmetic.
    table, n_bits = None, 8 * flat_values.dtype.itemsize
    if flat_values.dtype.kind == "u" and n_bits <= 16:
        table = _scale_table(black_value, white_value, n_bits)
    scaled = np.empty(flat_values.shape, np.uint8)
    for start in range(0, len(flat_values), _BLOCK_VALUES):
        block = slice(start, start + _BLOCK_VALUES)
        numbers = flat_values[block]
        scaled[block] = (
            _scale_block(numbers, black_value, white_value) if table is None else table[numbers]
        )
    return scaled.reshape(values.shape)


@functools.lru_cache(maxsize=16)
def _scale_table(black_value: float, white_value: float, n_bits: int) -> npt.NDArray[np.uint8]:
    return _scale_block(np.arange(2**n_bits), black_value, white_value)


def _scale_block(
    values: npt.NDArray[Any], black_value: float, white_value: float
) -> npt.NDArray[np.uint8]:
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ImageError("floating-point pixels with NaN or infinity")
    scaled: npt.NDArray[np.uint8] = np.rint(
        (numbers.clip(black_value, white_value) - black_value) / (white_value - black_value) * 255
    ).astype(np.uint8)
    return scaled


def _over_white(image: Image.Image) -> Image.Image:
    white_image = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white_image, image).convert("RGB")


def upright(image: Image.Image, file_image: Image.Image) -> Image.Image:
    """Turn `image`, the pixels of `file_image`, as the file's EXIF orientation says."""
    transpose_method = orientation_of(file_image)
    if transpose_method is None:
        return image
    upright_image = image.transpose(transpose_method)
    upright_image.info = image.info
    return upright_image


def orientation_of(file_image: Image.Image) -> Image.Transpose | None:
    """Return the turn that makes a file's pixels upright, by its EXIF orientation, or None."""
    try:
        return ORIENTATIONS.get(file_image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - with a damaged EXIF block the pixels are used as they are
        return None
