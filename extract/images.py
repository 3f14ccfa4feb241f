"""Decoding: the bytes of an image file to 8-bit pixels, the same way every time, or a reason why not."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageFile

from headrace.extract.errors import ImageError

# Part of every fingerprint: another Pillow can round a resize or a JPEG differently.
DECODER = f"pillow {PIL.__version__}"
# Every conversion that is not the file's own pixels is named here, and this text is part of every fingerprint.
COLOUR = "rgb; exif orientation applied; alpha over white; 16 bit scaled; first frame"

# Pillow's own limit on what it opens without a warning: 1 GiB of pixels / 4 / 3. Above it lie decompression bombs.
MAX_PIXELS = 1024**3 // 4 // 3

_NUMPY = b"\x93NUMPY"
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> Image.Image:
    """The image in `data`, upright, in mode "RGB", or "L" where its three channels would be equal.

    Keeping grey images in one channel makes their resize three times cheaper; the pixels are the same.
    Raises ImageError, and only that, with the reason why it cannot be decoded.
    """
    if not data:
        raise ImageError("the file is empty")
    if data.startswith(_NUMPY):
        return _decode_array(data)
    # Some libraries switch this on for the whole process, and truncated files then decode to grey bars in silence.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"{width} x {height} pixels: more than the limit of {MAX_PIXELS}")
            if width * height == 0:
                raise ImageError("the image has no pixels")
            image.load()
            return to_rgb(_upright(image))
    except (ImageError, MemoryError):
        raise  # too little memory is no fault of the image, and must not be recorded as one
    except Exception as error:  # decoders raise anything on malformed input, and a run must go on
        raise ImageError(_reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode "RGB" or "L": see COLOUR. Raises ImageError for modes whose scale cannot be known."""
    mode = image.mode
    if mode in ("RGB", "L"):
        # A transparent colour without an alpha channel (PNG tRNS) is still transparency.
        return _over_white(image.convert("RGBA")) if "transparency" in image.info else image
    if mode == "1":
        return image.convert("L")
    if mode.startswith("I;16"):
        return Image.fromarray(_to_8_bit(np.asarray(image).astype(np.uint16)))
    if mode in ("I", "F"):
        return Image.fromarray(_to_8_bit(np.asarray(image)))
    if mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return _over_white(image.convert("RGBA"))
    if mode == "P":
        return _over_white(image.convert("RGBA")) if "transparency" in image.info else image.convert("RGB")
    return image.convert("RGB")  # CMYK, YCbCr, HSV; Pillow raises for LAB


def _decode_array(data: bytes) -> Image.Image:
    """One image as an `.npy` file: (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ImageError(_reason(error)) from error
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ImageError(f"an array of shape {array.shape} is no image; expected (H, W), (H, W, C) or (C, H, W)")
    if array.size > MAX_PIXELS:
        raise ImageError(f"{array.size} values: more than the limit of {MAX_PIXELS}")
    pixels = _to_8_bit(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return _over_white(image) if image.mode == "RGBA" else image


def _to_8_bit(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Whole numbers to 255 as they are, to 65535 scaled; real ones from 0 to 1 or from 0 to 255. Raises ImageError."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise ImageError(f"pixels of type {values.dtype}; expected numbers")
    if not np.isfinite(values).all():
        raise ImageError("floating-point pixels with NaN or infinity")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 255:
        rounded: npt.NDArray[np.uint8] = np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
        return rounded
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        if high <= 255 and values.dtype.itemsize != 2:
            return values.astype(np.uint8)  # 8-bit values in a wider type
        # 65535 / 255 = 257 exactly; Pillow's own conversion would clip everything above 255 to white.
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    expected = "0 to 1, or 0 to 255" if values.dtype.kind == "f" else "0 to 65535"
    raise ImageError(f"{values.dtype} pixels from {low:g} to {high:g}; expected {expected}")


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - a damaged EXIF block says nothing about orientation, and the pixels are there
        return image
    method = _ORIENTATIONS.get(orientation)
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = image.info
    return turned


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image in a format that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb: more than {2 * MAX_PIXELS} pixels declared"
    text = str(error).strip() or "no details"
    return f"{type(error).__name__}: {text}"[:300]
