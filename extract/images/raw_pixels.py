"""Raw pixels: values of more than 8 bits as PNM, PNG, TIFF and .npy files hold them.

Pillow's pixels keep only 8 bits of most of them. H rows, W columns, C channels.
"""

import io
import math
import re
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from headrace.extract.errors import ImageError
from headrace.extract.images.opening import check_size, decoding_reason, open_image

# (value that is black, value that is white), in the file's own numbers.
PixelRange = tuple[float, float]

SIXTEEN_BITS = (0.0, 65535.0)  # black and white of unsigned 16-bit values
MAX_ARRAY_HEADER_BYTES = 10_256  # of an .npy file; NumPy refuses longer headers
_BITS_TAG, _PHOTOMETRIC_TAG, _PLANES_TAG, _SAMPLE_FORMAT_TAG = 258, 262, 284, 339  # of a TIFF
_UNSIGNED, _SIGNED = 1, 2  # TIFF sample formats


class RawPixels(NamedTuple):
    """Values as a file holds them, before they are scaled to pixels."""

    # (H, W), or (H, W, C): C = 2 grey and alpha, 3 colours, 4 colours and alpha
    values: npt.NDArray[Any]
    name: str  # type and format, for messages: "float32 values of a TIFF"
    own_range: PixelRange | None  # by the file's format; None if the format has none
    alpha_range: PixelRange | None = None  # None: that of the colours
    white_is_zero: bool = False
    transparent: Any = None  # value, or three values, of transparent pixels of a PNG (tRNS)
    nodata: float | None = None  # value of pixels without one in a GeoTIFF


def read_raw_pixels(
    image: ImageFile.ImageFile, data: bytes, pixel_range: PixelRange | None
) -> RawPixels | None:
    """Return the samples of a file whose depth or range Pillow's pixels do not keep, else None.

    Raises ImageError if there is a `pixel_range` and the full depth cannot be read, and for a file
    that is truncated; Pillow raises anything for a damaged one.
    """
    raw = None
    if image.format == "PPM":
        raw = _pnm_pixels(image, data)
    elif image.format == "PNG":
        raw = _png_pixels(image, data)
    elif image.format == "TIFF":
        raw = _tiff_pixels(image, data)
    if raw is None and pixel_range is not None and _reduced_by_pillow(image, data):
        raise ImageError(
            "more than 8 bits per sample, of which Pillow hands over 8: pixel_range cannot be "
            "applied. Save it as PNG, as an uncompressed TIFF, or as .npy"
        )
    return raw


def _pnm_pixels(image: ImageFile.ImageFile, data: bytes) -> RawPixels | None:
    """Return the samples of a PGM or PPM file; the largest value that the header declares is white.

    None where Pillow, which scales it to 255 or 65535 (colours to 255), does so correctly.
    """
    codec, _, offset, codec_args = image.tile[0]
    if image.mode not in ("L", "I", "RGB") or codec_args in ("L", "RGB"):
        return None  # bits and floats, or 8 bits whose white is 255
    white_value = codec_args[1] if isinstance(codec_args, tuple) else 65535
    is_plain = codec == "ppm_plain"  # values in decimal digits
    if is_plain and white_value < 256:
        return None
    width, height = image.size
    pixel_values: npt.NDArray[Any]
    n_channels = 3 if image.mode == "RGB" else 1
    n_values = width * height * n_channels
    if is_plain:
        # Read as a grey image three times as wide: of grey, Pillow keeps 16 bits, scaled to 65535,
        # which is undone exactly.
        grey_file = b"P2 %d %d %d\n" % (width * n_channels, height, white_value) + data[offset:]
        with Image.open(io.BytesIO(grey_file), formats=["PPM"]) as scaled_image:
            scaled_values = np.asarray(scaled_image)
        pixel_values = np.rint(scaled_values * (white_value / 65535)).astype(np.uint16)
    else:
        stored_dtype = np.dtype(">u2" if white_value > 255 else "u1")
        n_bytes = n_values * stored_dtype.itemsize
        if len(data) < offset + n_bytes:
            raise ImageError(
                f"truncated: {len(data) - offset} of {n_bytes} bytes of pixels are there"
            )
        pixel_values = np.frombuffer(data, stored_dtype, n_values, offset)
    shape = (height, width, 3) if n_channels == 3 else (height, width)
    return RawPixels(
        pixel_values.reshape(shape), "values of a PGM or PPM file", (0.0, float(white_value))
    )


def _png_pixels(image: ImageFile.ImageFile, data: bytes) -> RawPixels | None:
    raw_name = pillow_raw_mode(image)
    transparent_value = image.info.get("transparency")
    if raw_name in ("L;2", "L;4") and isinstance(transparent_value, int):
        # Pillow scales the pixels of 2 and 4 bits to 0..255, but not the transparent value (tRNS).
        image.info["transparency"] = transparent_value * (85 if raw_name == "L;2" else 17)
    if not raw_name.endswith(";16B"):
        return None
    if raw_name == "LA;16B":
        # Read as RGBA: high and low byte of grey, high and low byte of alpha.
        stored_bytes = _load_raw(image, "RGBA")
        pixel_values = _join_bytes(stored_bytes[:, :, 0::2], stored_bytes[:, :, 1::2])
    elif raw_name == "I;16B":
        pixel_values = _load_raw(image, raw_name).astype(np.uint16)
    else:
        pixel_values = _both_bytes(image, data, raw_name, raw_name.replace(";16B", ";16L"))
    return RawPixels(
        pixel_values,
        "16-bit values of a PNG",
        SIXTEEN_BITS,
        SIXTEEN_BITS,
        transparent=transparent_value,
    )


def _tiff_pixels(image: ImageFile.ImageFile, data: bytes) -> RawPixels | None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits_per_sample = tiff_bits(image)
    sample_format = max(tags.get(_SAMPLE_FORMAT_TAG, (_UNSIGNED,)))
    if bits_per_sample <= 8 and sample_format == _UNSIGNED:
        return None
    if len(image.getbands()) > 1:
        raw_modes = _byte_raw_modes(
            image, "L" if tags.prefix == b"II" else "B", in_planes=tags.get(_PLANES_TAG) == 2
        )
        if raw_modes is None:
            return None
        values = _both_bytes(image, data, *raw_modes)
        return RawPixels(values, "16-bit values of a TIFF", SIXTEEN_BITS, SIXTEEN_BITS)
    raw_name = pillow_raw_mode(image)
    if image.tile[0].codec_name == "libtiff" and (
        raw_match := re.fullmatch(r"(I;16|I;32|F;32)B?([SF])", raw_name)
    ):
        # libtiff returns numbers in this machine's byte order; Pillow takes it for the file's, and
        # would swap the bytes.
        raw_name = f"{raw_match[1]}{'' if sys.byteorder == 'little' else 'B'}{raw_match[2]}"
    pixel_values = _load_raw(image, raw_name)
    if bits_per_sample == 8:
        pixel_values = pixel_values.view(np.int8)
    elif bits_per_sample == 32 and sample_format == _UNSIGNED:
        pixel_values = pixel_values.view(np.uint32)  # Pillow's mode "I" is signed
    has_range = bits_per_sample <= 16 and sample_format == _UNSIGNED
    number_kind = {_UNSIGNED: "unsigned", _SIGNED: "signed"}.get(sample_format, "floating-point")
    return RawPixels(
        pixel_values,
        f"{number_kind} {bits_per_sample}-bit values of a TIFF",
        (0.0, 2.0**bits_per_sample - 1) if has_range else None,
        # Pillow inverts such images only up to 8 bits.
        white_is_zero=tags.get(_PHOTOMETRIC_TAG, 0) == 0,
    )


def _byte_raw_modes(
    image: ImageFile.ImageFile, byte_order: str, *, in_planes: bool
) -> tuple[str, str] | None:
    """Return Pillow's raw modes for the high and low bytes of a TIFF's 16-bit colours, or None.

    byte_order: of the file, "L" (little) or "B" (big).
    in_planes: whether the file has one plane per colour, not interleaved samples.

    Raises ImageError for planes of other colours.
    """
    # Pillow keeps the high byte of a sample. With the other byte order it keeps the low one.
    raw_name, by_libtiff = pillow_raw_mode(image), image.tile[0].codec_name == "libtiff"
    colour_match = re.fullmatch(r"(RGB[AX]?);16[LBN]", raw_name)
    if by_libtiff:
        # None: inks, or colours multiplied with alpha. Of planes, libtiff keeps only the high byte.
        if colour_match is None or in_planes:
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
    # R stands for each plane's own mode (R, G, B or A), which `_load_raw` puts in: Pillow reads
    # uncompressed planes as if they had 8 bits.
    base_mode = "R" if in_planes else colour_match[1] if colour_match else ""
    return f"{base_mode};16{byte_order}", f"{base_mode};16{'B' if byte_order == 'L' else 'L'}"


def _both_bytes(
    image: ImageFile.ImageFile, data: bytes, high_mode: str, low_mode: str
) -> npt.NDArray[Any]:
    """Return 16-bit channels (H, W, C) uint16."""
    # Decoded twice, for each byte, because Pillow has no mode for several 16-bit channels.
    with open_image(data) as second_image:
        low_bytes = _load_raw(second_image, low_mode)
    return _join_bytes(_load_raw(image, high_mode), low_bytes)


def _join_bytes(high_bytes: npt.NDArray[Any], low_bytes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    joined: npt.NDArray[Any] = high_bytes.astype(np.uint16) << 8 | low_bytes
    return joined


def _load_raw(image: ImageFile.ImageFile, raw_name: str) -> npt.NDArray[Any]:
    """Return the pixels, unpacked with the raw mode `raw_name` instead of the one Pillow chose."""
    raw_tiles = []
    for tile in image.tile:
        own_mode, *rest = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        # Each plane has a raw mode of its own: R, G, B or A.
        is_plane = own_mode in ("R", "G", "B", "A")
        mode = raw_name.replace("R", own_mode, 1) if is_plane else raw_name
        raw_tiles.append(
            tile._replace(args=(mode, *rest) if isinstance(tile.args, tuple) else mode)
        )
    image.tile = raw_tiles
    image.load()
    return np.asarray(image)


def pillow_raw_mode(image: ImageFile.ImageFile) -> str:
    """Return the raw mode with which Pillow unpacks the pixels ("RGB;16B"), "" if it has none."""
    tile_args = image.tile[0].args if image.tile else ""
    return str(tile_args[0] if isinstance(tile_args, tuple) and tile_args else tile_args)


def _reduced_by_pillow(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Return whether Pillow scaled samples of more than 8 bits, or dropped their low byte."""
    if image.format == "JPEG2000":
        # The marker at which the codestream starts; byte 42 has its first component's depth less 1.
        codestream_start = data.find(b"\xff\x4f\xff\x51")
        return (
            codestream_start < 0
            or len(data) < codestream_start + 43
            or (data[codestream_start + 42] & 0x7F) >= 8
        )
    return image.format == "TIFF" and tiff_bits(image) > 8


def tiff_bits(image: ImageFile.ImageFile) -> int:
    """Return the bits per sample of a TIFF, the most of its channels."""
    return int(max(image.tag_v2.get(_BITS_TAG, (1,))))  # type: ignore[attr-defined]


def read_array_pixels(data: bytes, highest_band: int | None = None) -> RawPixels:
    """Return the values of an `.npy` file that holds one image: (H, W), (H, W, C) or (C, H, W).

    highest_band: None for C = 1, 3 or 4, the last axis if both fit. A number: C may be that or any
    larger one, the shorter axis if both fit.

    Raises ImageError.
    """
    shape, in_fortran_order, dtype, offset = array_header(data)
    channels_last, channels_first = (
        len(shape) == 3
        and (shape[axis] in (1, 3, 4) if highest_band is None else shape[axis] >= highest_band)
        for axis in (-1, 0)
    )
    if channels_last and channels_first and highest_band is not None:
        channels_last = shape[2] <= shape[0]
    if not (len(shape) == 2 or channels_last or channels_first) or min(shape) < 1:
        needed = (
            ". Of other bands, the backbone in the recipe says which are meant: bands: [4, 3, 2]"
            if highest_band is None
            else f", with at least {highest_band} bands"
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
    own_range = {"|u1": (0.0, 255.0), "|b1": (0.0, 1.0), "<u2": SIXTEEN_BITS}.get(
        dtype.newbyteorder("<").str
    )
    return RawPixels(pixel_values, f"{dtype.name} values of an array", own_range)


def array_shape(data: bytes) -> tuple[int, ...]:
    """Return the shape that the header of an `.npy` file declares. Raises ImageError."""
    return array_header(data)[0]


def array_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return (shape, whether in Fortran order, dtype, byte offset of the values) of an `.npy` file.

    Raises ImageError.
    """
    stream = io.BytesIO(data)
    try:
        npy_version = np.lib.format.read_magic(stream)
        header_readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
            # As 2.0, but for letters in the names of a table's columns, which nobody reads.
            (3, 0): np.lib.format.read_array_header_2_0,
        }
        if npy_version not in header_readers:
            raise ImageError(
                f"an .npy file of version {npy_version[0]}.{npy_version[1]}; expected 1.0 to 3.0"
            )
        shape, in_fortran_order, dtype = header_readers[npy_version](stream)
        shape = tuple(int(length) for length in shape)
    except ImageError:
        raise
    # Also MemoryError: the header is a Python literal of at most 10,000 characters, and a malformed
    # one can exhaust the parser's stack.
    except Exception as error:
        raise ImageError(f"not a whole .npy file ({decoding_reason(error, b'')})") from error
    return shape, bool(in_fortran_order), dtype, stream.tell()
