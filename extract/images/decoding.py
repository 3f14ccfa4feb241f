"""Decoding: the bytes of an image file to 8-bit pixels, the same way every time, or a reason why
not.

Which value is black and which is white comes from the file's format, its bit depth, or the caller's
`pixel_range`; never from the values of one image, which would make a dark frame as bright as a
bright one.

`headrace export` copies this module into `preprocess.py`, so that it needs Pillow and NumPy alone.
"""

import functools
import io
import math
import re
import sys
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageFile

from headrace.extract.errors import ImageError
from headrace.extract.images.heif import is_heif, register_heif

# Part of every fingerprint: another Pillow can round a resize or a JPEG differently.
DECODER = f"pillow {PIL.__version__}"
# Every conversion that is not the file's own pixels is named here, and this text is part of every
# fingerprint.
COLOUR = (
    "rgb; exif orientation applied; alpha over white; first frame; black and white by bit depth, "
    "header or pixel_range"
)

# Pillow's own limit on what it opens without a warning: 1 GiB of pixels / 4 / 3. Above it lie
# decompression bombs.
MAX_PIXELS = 1024**3 // 4 // 3
# Pillow's resize keeps a table of 16 to 48 bytes per pixel of the edge that it shortens: 50 MB at
# this length, 4 GB for the 90 million pixels in one line that MAX_PIXELS would allow. Cameras and
# scanners end below 100,000 pixels.
MAX_EDGE = 2**20

# What Pillow is asked for: the formats that listings know (IMAGE_SUFFIXES), and none of its others.
# Nobody keeps data sets in those, and some hand the bytes to other programs (EPS to Ghostscript).
# HEIF's plug-in is asked for HEIF alone.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "JPEG2000", "PPM")

# (the value that is black, the value that is white), in the file's own numbers
PixelRange = tuple[float, float]

# exact: every pixel of the file. scaled: of a JPEG much larger than the network's input, the
# decoder computes a smaller image from the low frequencies alone.
DecodeMode = Literal["exact", "scaled"]
JPEG_REDUCTIONS = (8, 4, 2)  # what libjpeg does quickly

_NUMPY, _JPEG = b"\x93NUMPY", b"\xff\xd8\xff"  # what files of these formats begin with
# values that are converted at a time: what float64 needs beside the image stays at some MB
_BLOCK = 2**20
_SIXTEEN_BITS = (0.0, 65535.0)
_ORIENTATION_TAG = 0x0112
_BITS_TAG, _PHOTOMETRIC_TAG, _PLANES_TAG, _SAMPLE_FORMAT_TAG = 258, 262, 284, 339  # of a TIFF
_UNSIGNED, _SIGNED = 1, 2  # TIFF sample formats
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILE_BOX = "headrace_file_box"  # of Image.info
# The turns that swap height and width, and those that bring the upright image's left or top what
# stands at the right or below in the file.
_SIDEWAYS = tuple(ORIENTATIONS[number] for number in (5, 6, 7, 8))
_RIGHT_IS_LEFT = tuple(ORIENTATIONS[number] for number in (2, 3, 6, 7))
_BELOW_IS_ABOVE = tuple(ORIENTATIONS[number] for number in (3, 4, 7, 8))


class Samples(NamedTuple):
    """Values as they stand in a file, before they become pixels."""

    # (H, W), or (H, W, C): C = 2 grey and alpha, 3 colours, 4 colours and alpha
    values: npt.NDArray[Any]
    name: str  # what they are, for a message: "float32 values of a TIFF"
    # black and white by the file's format; None where that says nothing
    own_range: PixelRange | None
    alpha_range: PixelRange | None = None  # None: as the colours
    white_is_zero: bool = False
    transparent: Any = None  # the value, or the three, that a PNG declares to be transparent
    nodata: float | None = None  # the value that a GeoTIFF declares to be none


def decode_image(
    data: bytes, pixel_range: PixelRange | None = None, reduction: int = 1
) -> Image.Image:
    """The image in `data`, upright, in mode "RGB", or "L" where its three channels would be equal.

    pixel_range: the values that are black and white, for images of more than 8 bits; what lies
    beyond is clipped. Images of 8 bits and fewer have their own. Without it 16-bit images and PGM
    files still have one, by their depth or header; floats, signed and 32-bit integers have none and
    are refused. Keeping grey images in one channel makes their resize three times cheaper; the
    pixels are the same. reduction: 1, or one of JPEG_REDUCTIONS, by which the decoder of a JPEG
    divides its edges (rounded up, see `file_box`); other formats are decoded in full. Raises
    ImageError, and only that, with the reason why it cannot be decoded.
    """
    if not data:
        raise ImageError("the file is empty")
    if data.startswith(_NUMPY):
        return _decode_array(data, pixel_range)
    # Some libraries switch this on for the whole process, and truncated files then decode to grey
    # bars in silence.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with open_image(data) as image:
            check_size(*image.size)
            samples = file_samples(image, data, pixel_range)
            if samples is not None:
                return upright(_eight_bits(samples, pixel_range), image)
            file_size = image.size
            if reduction > 1:
                # Does nothing for other formats than JPEG.
                image.draft(None, (image.width // reduction, image.height // reduction))
            image.load()
            if image.size != file_size:
                _cover_padding(image, file_size, reduction)
            upright_image = to_rgb(upright(image, image), pixel_range)
            if image.size != file_size:
                upright_image.info[_FILE_BOX] = _file_box(image, file_size, reduction)
            return upright_image
    except (ImageError, MemoryError):
        raise  # too little memory is no fault of the image, and must not be recorded as one
    except Exception as error:  # decoders raise anything on malformed input, and a run must go on
        raise ImageError(decoding_reason(error, data)) from error


def file_box(image: Image.Image) -> tuple[float, float, float, float]:
    """(left, top, right, bottom): the part of a decoded image that the file's pixels cover, all of
    it unless a decoder has divided the edges and rounded up.
    """
    box: tuple[float, float, float, float] = image.info.get(_FILE_BOX, (0, 0, *image.size))
    return box


def _cover_padding(image: Image.Image, file_size: tuple[int, int], reduction: int) -> None:
    """Give the last column and the last row, of which the file's pixels cover only a part, the
    values of those before.

    The rest of them comes from the padding of the file's last blocks, which may hold anything
    (Pillow's issue 3419 shows a coloured line).
    """
    width, height = image.size
    if file_size[0] % reduction and width > 1:
        image.paste(image.crop((width - 2, 0, width - 1, height)), (width - 1, 0))
    if file_size[1] % reduction and height > 1:
        image.paste(image.crop((0, height - 2, width, height - 1)), (0, height - 1))


def _file_box(
    image: Image.Image, file_size: tuple[int, int], reduction: int
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom): what the file's pixels cover of the upright image of `image`,
    both edges of which were divided and rounded up.
    """
    turn = orientation_of(image)
    width, height = (edge / reduction for edge in file_size)
    # What was rounded up stands at the right and below in the file.
    right, below = image.width - width, image.height - height
    if turn in _SIDEWAYS:
        width, height, right, below = height, width, below, right
    left = right if turn in _RIGHT_IS_LEFT else 0.0
    above = below if turn in _BELOW_IS_ABOVE else 0.0
    return left, above, left + width, above + height


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of the upright image of a JPEG, of which only the header is read; None for
    other formats, and for what is no image.
    """
    if not data.startswith(_JPEG):
        return None
    try:
        with open_image(data) as image:
            width, height = image.size
            is_sideways = orientation_of(image) in _SIDEWAYS
    except Exception:  # noqa: BLE001 - decoding it in full says what is wrong
        return None
    return (width, height) if is_sideways else (height, width)


def has_deep_pixels(data: bytes) -> bool:
    """Return whether an image file's pixels have more than 8 bits, so that a `pixel_range` applies.

    Raises whatever its decoder does.
    """
    if data.startswith(_NUMPY):
        return _array_header(data)[2] not in (np.uint8, np.bool_)
    with open_image(data) as image:
        return file_samples(image, data, None) is not None


def open_image(data: bytes) -> ImageFile.ImageFile:
    """The image in `data`, its pixels not yet decoded, where it is in one of FORMATS; raises
    whatever its decoder does.
    """
    if is_heif(data[:12]):
        register_heif()
        return Image.open(io.BytesIO(data), formats=_available("HEIF"))
    return Image.open(io.BytesIO(data), formats=_available(*FORMATS))


@functools.cache
def _available(*formats: str) -> tuple[str, ...]:
    """Select the formats that this build of Pillow, with its plug-ins, can open.

    Pillow makes a KeyError of any other name.
    """
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def to_rgb(image: Image.Image, pixel_range: PixelRange | None = None) -> Image.Image:
    """`image` in mode "RGB" or "L": see COLOUR and `decode_image`.

    Raises ImageError for modes whose range is not known.
    """
    check_size(*image.size)
    mode = image.mode
    if mode in ("RGB", "L", "1"):
        plain_image = image.convert("L") if mode == "1" else image
        if "transparency" not in image.info:
            return plain_image
        plain_image.info["transparency"] = image.info["transparency"]
        # A transparent colour without an alpha channel (PNG tRNS) is still transparency.
        return _over_white(plain_image.convert("RGBA"))
    if mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        return _eight_bits(Samples(values, "16-bit values", _SIXTEEN_BITS), pixel_range)
    if mode in ("I", "F"):
        values = np.asarray(image)
        return _eight_bits(
            Samples(values, f"{values.dtype} values (Pillow's mode {mode})", None), pixel_range
        )
    if mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return _over_white(image.convert("RGBA"))
    if mode == "P":
        return (
            _over_white(image.convert("RGBA"))
            if "transparency" in image.info
            else image.convert("RGB")
        )
    return image.convert("RGB")  # CMYK, YCbCr, HSV; Pillow raises for LAB


def check_size(width: int, height: int) -> None:
    if width * height == 0:
        raise ImageError("the image has no pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels: more than the limit of {MAX_PIXELS}")
    if max(width, height) > MAX_EDGE:
        raise ImageError(
            f"{width} x {height} pixels: an edge is longer than the limit of {MAX_EDGE}; cut it "
            "into pieces"
        )


def file_samples(
    image: ImageFile.ImageFile, data: bytes, pixel_range: PixelRange | None
) -> Samples | None:
    """The samples of a file whose depth Pillow's own pixels do not keep, or keep without their
    meaning; otherwise None.
    """
    samples = None
    if image.format == "PPM":
        samples = _pnm_samples(image, data)
    elif image.format == "PNG":
        samples = _png_samples(image, data)
    elif image.format == "TIFF":
        samples = _tiff_samples(image, data)
    if samples is None and pixel_range is not None and _reduced_by_pillow(image, data):
        raise ImageError(
            "more than 8 bits per sample, of which Pillow hands over 8: pixel_range cannot be "
            "applied. Save it as PNG, as an uncompressed TIFF, or as .npy"
        )
    return samples


def _pnm_samples(image: ImageFile.ImageFile, data: bytes) -> Samples | None:
    """PGM and PPM: the header's greatest value is white.

    Pillow scales it to 255 or 65535, colours always to 255.
    """
    codec, _, offset, codec_args = image.tile[0]
    if image.mode not in ("L", "I", "RGB") or codec_args in ("L", "RGB"):
        return None  # bits and floats; and 255 is white, as everywhere
    white_value = codec_args[1] if isinstance(codec_args, tuple) else 65535
    is_plain = codec == "ppm_plain"
    if is_plain and white_value < 256:
        return None  # Pillow reads numbers in decimal digits rightly, and scales them to 255
    width, height = image.size
    pixel_values: npt.NDArray[Any]
    n_channels = 3 if image.mode == "RGB" else 1
    n_values = width * height * n_channels
    if is_plain:
        # As a grey image Pillow keeps all digits of the three colours, scaled to 65535, and that is
        # undone exactly.
        grey_file = b"P2 %d %d %d\n" % (width * n_channels, height, white_value) + data[offset:]
        with Image.open(io.BytesIO(grey_file), formats=["PPM"]) as scaled_image:
            pixel_values = np.rint(np.asarray(scaled_image) * (white_value / 65535)).astype(
                np.uint16
            )
    else:
        stored_dtype = np.dtype(">u2" if white_value > 255 else "u1")
        if len(data) < offset + n_values * stored_dtype.itemsize:
            raise ImageError(
                f"truncated: {len(data) - offset} of {n_values * stored_dtype.itemsize} bytes of "
                "pixels are there"
            )
        pixel_values = np.frombuffer(data, stored_dtype, n_values, offset)
    shape = (height, width, 3) if n_channels == 3 else (height, width)
    return Samples(
        pixel_values.reshape(shape), "values of a PGM or PPM file", (0.0, float(white_value))
    )


def _png_samples(image: ImageFile.ImageFile, data: bytes) -> Samples | None:
    raw_name = pillow_raw_mode(image)
    transparent_value = image.info.get("transparency")
    if raw_name in ("L;2", "L;4") and isinstance(transparent_value, int):
        # Pillow scales the pixels to 0..255, and leaves the transparent value (PNG tRNS) as it is
        # in the file.
        image.info["transparency"] = transparent_value * (85 if raw_name == "L;2" else 17)
    if not raw_name.endswith(";16B"):
        return None
    if raw_name == "LA;16B":
        # high and low byte of grey, high and low byte of alpha
        stored_bytes = _load_raw(image, "RGBA")
        pixel_values = _join_bytes(stored_bytes[:, :, 0::2], stored_bytes[:, :, 1::2])
    elif raw_name == "I;16B":
        pixel_values = _load_raw(image, raw_name).astype(np.uint16)
    else:
        pixel_values = _both_bytes(image, data, raw_name, raw_name.replace(";16B", ";16L"))
    return Samples(
        pixel_values,
        "16-bit values of a PNG",
        _SIXTEEN_BITS,
        _SIXTEEN_BITS,
        transparent=transparent_value,
    )


def _tiff_samples(image: ImageFile.ImageFile, data: bytes) -> Samples | None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits_per_sample, sample_format = (
        max(tags.get(_BITS_TAG, (1,))),
        max(tags.get(_SAMPLE_FORMAT_TAG, (_UNSIGNED,))),
    )
    if bits_per_sample <= 8 and sample_format == _UNSIGNED:
        return None
    if len(image.getbands()) > 1:
        raw_modes = _byte_raw_modes(
            image, "L" if tags.prefix == b"II" else "B", in_planes=tags.get(_PLANES_TAG) == 2
        )
        if raw_modes is None:
            return None
        return Samples(
            _both_bytes(image, data, *raw_modes),
            "16-bit values of a TIFF",
            _SIXTEEN_BITS,
            _SIXTEEN_BITS,
        )
    raw_name = pillow_raw_mode(image)
    if image.tile[0].codec_name == "libtiff" and (
        raw_match := re.fullmatch(r"(I;16|I;32|F;32)B?([SF])", raw_name)
    ):
        # libtiff gives numbers in this machine's byte order; Pillow takes them for the file's, and
        # turns them round.
        raw_name = f"{raw_match[1]}{'' if sys.byteorder == 'little' else 'B'}{raw_match[2]}"
    pixel_values = _load_raw(image, raw_name)
    if bits_per_sample == 8:
        pixel_values = pixel_values.view(np.int8)
    elif bits_per_sample == 32 and sample_format == _UNSIGNED:
        pixel_values = pixel_values.view(np.uint32)  # Pillow's mode "I" is signed
    own_range = (
        (0.0, 2.0**bits_per_sample - 1)
        if bits_per_sample <= 16 and sample_format == _UNSIGNED
        else None
    )
    number_kind = {_UNSIGNED: "unsigned", _SIGNED: "signed"}.get(sample_format, "floating-point")
    # Pillow inverts such images up to 8 bits, and no others
    white_is_zero = tags.get(_PHOTOMETRIC_TAG, 0) == 0
    return Samples(
        pixel_values,
        f"{number_kind} {bits_per_sample}-bit values of a TIFF",
        own_range,
        white_is_zero=white_is_zero,
    )


def _byte_raw_modes(
    image: ImageFile.ImageFile, byte_order: str, *, in_planes: bool
) -> tuple[str, str] | None:
    """The raw modes that read the high and the low bytes of a TIFF's 16-bit colours; None where
    Pillow has none.

    byte_order: the file's bytes, L or B. in_planes: whether the colours lie one after the other.
    Pillow keeps the high byte of a sample; told that the bytes are in the other order it keeps the
    low one.
    """
    raw_name, by_libtiff = pillow_raw_mode(image), image.tile[0].codec_name == "libtiff"
    colour_match = re.fullmatch(r"(RGB[AX]?);16[LBN]", raw_name)
    if by_libtiff:
        if colour_match is None or in_planes:
            # inks, colours that are multiplied with alpha; and of planes libtiff keeps the high
            # byte
            return None
        byte_order = "L" if sys.byteorder == "little" else "B"
    elif in_planes:
        if not {tile.args[0] for tile in image.tile if isinstance(tile.args, tuple)} <= set("RGBA"):
            raise ImageError(
                "planes of 16-bit samples that are not red, green, blue and alpha. Save it "
                "interleaved"
            )
    elif colour_match is None:
        return None
    # Pillow reads uncompressed planes, whose raw modes are R, G, B and A, as if they had 8 bits.
    base_mode = "R" if in_planes else colour_match[1] if colour_match else ""
    return f"{base_mode};16{byte_order}", f"{base_mode};16{'B' if byte_order == 'L' else 'L'}"


def _both_bytes(
    image: ImageFile.ImageFile, data: bytes, high_mode: str, low_mode: str
) -> npt.NDArray[Any]:
    """Return 16-bit channels (H, W, C) uint16, decoded twice: Pillow has no mode for them."""
    with open_image(data) as second_image:
        low_bytes = _load_raw(second_image, low_mode)
    return _join_bytes(_load_raw(image, high_mode), low_bytes)


def _join_bytes(high_bytes: npt.NDArray[Any], low_bytes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    joined: npt.NDArray[Any] = high_bytes.astype(np.uint16) << 8 | low_bytes
    return joined


def _load_raw(image: ImageFile.ImageFile, raw_name: str) -> npt.NDArray[Any]:
    """The pixels, unpacked as `raw_name` says instead of as Pillow chose."""
    raw_tiles = []
    for tile in image.tile:
        tile_args = tile.args
        own_mode, other_args = (
            (tile_args[0], tile_args[1:]) if isinstance(tile_args, tuple) else (tile_args, None)
        )
        # Planes have a raw mode each: R, G, B, A.
        chosen_mode = (
            raw_name.replace("R", own_mode, 1) if own_mode in ("R", "G", "B", "A") else raw_name
        )
        raw_tiles.append(
            tile._replace(args=chosen_mode if other_args is None else (chosen_mode, *other_args))
        )
    image.tile = raw_tiles
    image.load()
    return np.asarray(image)


def pillow_raw_mode(image: ImageFile.ImageFile) -> str:
    """Return how Pillow unpacks the pixels ("RGB;16B"); empty for formats with other means."""
    tile_args = image.tile[0].args if image.tile else ""
    return str(tile_args[0] if isinstance(tile_args, tuple) and tile_args else tile_args)


def _reduced_by_pillow(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Return whether Pillow scaled samples of more than 8 bits, or dropped their low byte."""
    if image.format == "JPEG2000":
        # the codestream; the depth of its first component stands 42 bytes on
        codestream_start = data.find(b"\xff\x4f\xff\x51")
        return (
            codestream_start < 0
            or len(data) < codestream_start + 43
            or (data[codestream_start + 42] & 0x7F) >= 8
        )
    return image.format == "TIFF" and bool(max(image.tag_v2.get(_BITS_TAG, (1,))) > 8)  # type: ignore[attr-defined]


def _decode_array(data: bytes, pixel_range: PixelRange | None) -> Image.Image:
    """One image as an `.npy` file:

    (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, the last where both fit.
    """
    return _eight_bits(array_samples(data), pixel_range)


def array_samples(data: bytes, most_bands: int | None = None) -> Samples:
    """The values of an `.npy` file that holds one image: (H, W), or (H, W, C) or (C, H, W).

    C is 1, 3 or 4; last where both fit. most_bands: C may be any number from this one on, and is
    the shorter of the two axes where both fit. Raises ImageError.
    """
    shape, in_fortran_order, dtype, offset = _array_header(data)
    channels_last, channels_first = (
        len(shape) == 3
        and (shape[axis] in (1, 3, 4) if most_bands is None else shape[axis] >= most_bands)
        for axis in (-1, 0)
    )
    if channels_last and channels_first and most_bands is not None:
        channels_last = shape[2] <= shape[0]
    if not (len(shape) == 2 or channels_last or channels_first) or min(shape) < 1:
        needed = (
            ". Of other bands, the backbone in the recipe says which are meant: bands: [4, 3, 2]"
            if most_bands is None
            else f", with at least {most_bands} bands"
        )
        raise ImageError(
            f"an array of shape {shape} is no image; expected (H, W), (H, W, C) or (C, H, W)"
            f"{needed}"
        )
    if dtype.kind not in "buif":
        raise ImageError(f"pixels of type {dtype}; expected numbers")
    height, width = shape[1:] if channels_first and not channels_last else shape[:2]
    check_size(width, height)
    n_values = math.prod(shape)
    if len(data) - offset < n_values * dtype.itemsize:
        raise ImageError(
            f"truncated: an array of shape {shape} and type {dtype} has "
            f"{n_values * dtype.itemsize} bytes; {len(data) - offset} are there"
        )
    # A view: an image of any size costs no memory before its pixels do.
    pixel_values = np.frombuffer(data, dtype, n_values, offset).reshape(
        shape, order="F" if in_fortran_order else "C"
    )
    if channels_first and not channels_last:
        pixel_values = np.moveaxis(pixel_values, 0, 2)
    if pixel_values.ndim == 3 and pixel_values.shape[2] == 1:
        pixel_values = pixel_values[:, :, 0]
    own_range = {"|u1": (0.0, 255.0), "|b1": (0.0, 1.0), "<u2": _SIXTEEN_BITS}.get(
        dtype.newbyteorder("<").str
    )
    return Samples(pixel_values, f"{dtype.name} values of an array", own_range)


def array_shape(data: bytes) -> tuple[int, ...]:
    """The shape that the header of an `.npy` file declares. Raises ImageError."""
    return _array_header(data)[0]


def _array_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, whether in Fortran's order, type, where the values begin) of an `.npy` file, of which
    only that is read.
    """
    stream = io.BytesIO(data)
    try:
        npy_version = np.lib.format.read_magic(stream)
        header_readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if npy_version not in header_readers:
            raise ImageError(
                f"an .npy file of version {npy_version[0]}.{npy_version[1]}; expected 1.0 or 2.0"
            )
        shape, in_fortran_order, dtype = header_readers[npy_version](stream)
        shape = tuple(int(length) for length in shape)
    except ImageError:
        raise
    # The header is a Python literal of at most 10,000 characters. A malformed one can exhaust the
    # parser's stack, which is a MemoryError and yet the file's fault.
    except Exception as error:
        raise ImageError(f"not a whole .npy file ({decoding_reason(error, b'')})") from error
    return shape, bool(in_fortran_order), dtype, stream.tell()


def check_pixel_range(pixel_range: Any) -> None:
    """Raise ValueError for what is no (black, white): two finite numbers, the smaller first."""
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


def _eight_bits(samples: Samples, pixel_range: PixelRange | None) -> Image.Image:
    """The samples as an image in mode "RGB" or "L".

    Raises ImageError where their range is not known.
    """
    values = samples.values
    has_eight_bits = values.dtype in (np.uint8, np.bool_)
    value_range = samples.own_range if has_eight_bits or pixel_range is None else pixel_range
    if value_range is None:
        raise ImageError(
            f"{samples.name} have no range of their own. Say which value is black and which is "
            "white: images.pixel_range: [0, 1] in the recipe where 0 is black and 1 is white (in "
            "Python: pixel_range=(0, 1))"
        )
    n_channels = values.shape[2] if values.ndim == 3 else 1
    colour_values = values[:, :, : n_channels - 1] if n_channels in (2, 4) else values
    grey_or_rgb = _scale(colour_values, *value_range)
    if samples.white_is_zero:
        grey_or_rgb = 255 - grey_or_rgb
    if samples.transparent is not None:
        is_transparent = values == np.asarray(samples.transparent)
        # nothing of it is left over white
        grey_or_rgb[is_transparent.all(axis=2) if n_channels > 1 else is_transparent] = 255
    if n_channels in (2, 4):
        alpha_pixels = _scale(
            values[:, :, n_channels - 1 :],
            *(value_range if samples.alpha_range is None else samples.alpha_range),
        )
        return _over_white(
            Image.fromarray(np.concatenate([grey_or_rgb, alpha_pixels], axis=2)).convert("RGBA")
        )
    return Image.fromarray(np.ascontiguousarray(grey_or_rgb))


def _scale(
    values: npt.NDArray[Any], black_value: float, white_value: float
) -> npt.NDArray[np.uint8]:
    """uint8, of the same shape:

    `black_value` is 0, `white_value` is 255, what lies beyond is clipped. Raises ImageError for
    NaN.
    """
    if values.dtype == np.uint8 and (black_value, white_value) == (0, 255):
        return values
    flat_values = np.ascontiguousarray(values).reshape(-1)
    flat_values = flat_values.view(np.uint8) if flat_values.dtype == np.bool_ else flat_values
    has_few_values = flat_values.dtype.kind == "u" and flat_values.dtype.itemsize <= 2
    value_table = (
        _scale_table(black_value, white_value, 8 * flat_values.dtype.itemsize)
        if has_few_values
        else None
    )
    scaled = np.empty(flat_values.shape, np.uint8)
    for start in range(0, len(flat_values), _BLOCK):
        value_block = flat_values[start : start + _BLOCK]
        scaled[start : start + _BLOCK] = (
            _scale_block(value_block, black_value, white_value)
            if value_table is None
            else value_table[value_block]
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
    """`image`, the pixels of `file_image`, as the file's EXIF orientation says."""
    transpose_method = orientation_of(file_image)
    if transpose_method is None:
        return image
    upright_image = image.transpose(transpose_method)
    upright_image.info = image.info
    return upright_image


def orientation_of(file_image: Image.Image) -> Image.Transpose | None:
    """The turn that makes a file's pixels upright, by its EXIF orientation; None for none."""
    try:
        return ORIENTATIONS.get(file_image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - a damaged EXIF block says nothing about orientation, and the pixels are there
        return None


def decoding_reason(error: Exception, data: bytes) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        if data.startswith((b"II*\0", b"MM\0*")):
            return (
                "a TIFF whose layout Pillow does not know (bits, type or number of samples). Save "
                "it as PNG or .npy"
            )
        return (
            f"not an image in a format that is read here ({', '.join(FORMATS)}). Save it as PNG, "
            "or as .npy"
        )
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb: more than {2 * MAX_PIXELS} pixels declared"
    # Where an object lies in memory is another place each time, and reasons are part of what a
    # shard holds.
    reason_text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)).strip() or "no details"
    return f"{type(error).__name__}: {reason_text}"[:300]
