"""Opening an image file: the formats that Pillow may use, limits of size, reasons for failures."""

import functools
import io
import logging
import re

import PIL
from PIL import Image, ImageFile

from headrace.extract.errors import ImageError
from headrace.extract.images.heif import is_heif, register_heif

# Pillow logs an error for every TIFF of more bands than it reads, which tifffile reads then.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

# Pillow's own limit, above which it warns of decompression bombs: 1 GiB / 4 / 3.
MAX_PIXELS = 1024**3 // 4 // 3
# Above it Pillow refuses a file. Cameras and phones of 100 to 150 megapixels are below.
MAX_FILE_PIXELS = 2 * MAX_PIXELS
# Pillow's resize keeps a table of 16 to 48 bytes per pixel of the edge that it shortens: 50 MB at
# this length, 8 GB for the 179 million pixels in one line that MAX_FILE_PIXELS would allow. Cameras
# and scanners end below 100,000 pixels.
MAX_EDGE = 2**20
_TOO_MANY_PIXELS = (
    f"more than the limit of {MAX_FILE_PIXELS:,} pixels. Save the image smaller, or cut it into "
    "pieces"
)
# Compression ratio of deflate at most; no other filter of HDF5's own does better on images.
MAX_DEFLATE_RATIO = 1032

# The formats of IMAGE_SUFFIXES, and none of Pillow's others: nobody keeps data sets in those, and
# some hand the bytes to other programs (EPS to Ghostscript). HEIF is read by its plug-in.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "JPEG2000", "PPM")


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open an image in one of FORMATS or HEIF; its pixels are not decoded yet.

    Raises whatever its decoder raises.
    """
    if is_heif(data[:12]):
        register_heif()
        return Image.open(io.BytesIO(data), formats=_available("HEIF"))
    return Image.open(io.BytesIO(data), formats=_available(*FORMATS))


@functools.cache
def _available(*formats: str) -> tuple[str, ...]:
    Image.init()
    # For a format that this build of Pillow does not have, `Image.open` raises KeyError.
    return tuple(name for name in formats if name in Image.OPEN)


def check_size(width: int, height: int) -> None:
    """Raise ImageError for an image without pixels, or beyond MAX_FILE_PIXELS or MAX_EDGE."""
    if width * height == 0:
        raise ImageError("the image has no pixels")
    if width * height > MAX_FILE_PIXELS:
        raise ImageError(f"{width} x {height} pixels: {_TOO_MANY_PIXELS}")
    if max(width, height) > MAX_EDGE:
        raise ImageError(
            f"{width} x {height} pixels: an edge is longer than the limit of {MAX_EDGE}; cut it "
            "into pieces"
        )


def decoding_reason(error: Exception, data: bytes) -> str:
    """Return the text for an error that a decoder raised on these bytes, the same at every call."""
    if isinstance(error, PIL.UnidentifiedImageError):
        if data.startswith(b"version https://git-lfs"):
            return "a pointer of Git LFS, and not yet the image: git lfs pull"
        if data.startswith((b"II*\0", b"MM\0*")):
            return (
                "a TIFF whose layout Pillow does not know (bits, type, compression or number of "
                "samples). images.pixel_dtype: float32 in the recipe reads it by tifffile (pip "
                "install 'headrace[tiff]'); or save it as PNG or .npy"
            )
        return (
            f"not an image in a format that is read here ({', '.join(FORMATS)}). Save it as PNG, "
            "or as .npy"
        )
    if isinstance(error, Image.DecompressionBombError):
        return _TOO_MANY_PIXELS
    # Without addresses of objects, which differ at each call: reasons are stored in shards, whose
    # bytes must be the same.
    reason_text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)).strip() or "no details"
    return f"{type(error).__name__}: {reason_text}"[:300]
