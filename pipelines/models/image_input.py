"""Decoding of images as callers give them: paths, Pillow images, arrays and tensors.

Letters of shapes: N images, H rows, W columns, C channels (1, 3 or 4).
"""

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image, ImageFile, ImageOps

from headrace.extract.errors import ImageError
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.images.decoding import to_rgb
from headrace.extract.images.locators import array_bytes, encode_path, read_bytes
from headrace.extract.images.preprocessing import DecodedImage, Preprocessing, decode_pixels
from headrace.extract.images.raw_pixels import PixelRange, pillow_raw_mode
from headrace.extract.run.rendering import Rendering
from headrace.pipelines.errors import InvalidInput

ImageLike = str | PathLike[str] | Image.Image | npt.NDArray[Any] | torch.Tensor
_CHANNELS = (1, 3, 4)  # grey, colours, colours and alpha
# Black and white of floats in memory, the convention of torchvision and scikit-image.
_UNIT: PixelRange = (0.0, 1.0)
# Floats beyond them by up to this much, as a resize gives them, still round to black or white.
_HALF_STEP = 0.5 / 255


def split_images(
    images: ImageLike | Iterable[ImageLike], highest_band: int | None = None
) -> list[ImageLike]:
    """Return the images as a list: an array or tensor of several images is split.

    highest_band: the highest band that a model of many-band images reads, None for other models.
    Raises InvalidInput for a folder, for a table, and if an array can be read as one image and as
    several.
    """
    if isinstance(images, str | PathLike) and Path(images).is_dir():
        raise InvalidInput(
            f"{images} is a folder, and predict takes images: "
            f"predict(list(pathlib.Path({str(images)!r}).rglob('*.jpg'))), or, for a table of "
            f"predictions, headrace predict MODEL {shlex.quote(str(images))}"
        )
    if isinstance(images, pd.DataFrame):
        raise InvalidInput(
            f"a table with the columns {', '.join(map(str, images.columns))} is given for images: "
            "give the column of their paths, predict(table['path'])"
        )
    if isinstance(images, str | PathLike | Image.Image):
        return [images]
    if not isinstance(images, np.ndarray | torch.Tensor):
        return list(images)
    if isinstance(images, np.ndarray) and images.ndim == 1:
        return cast(list[ImageLike], images.tolist())  # an array of paths, as from a table's column
    try:
        pixel_array = _as_array(images)
        if highest_band is not None:
            return list(pixel_array) if pixel_array.ndim == 4 else [pixel_array]
        if pixel_array.ndim == 4:
            _channels_first(pixel_array.shape, "a batch")
        elif (
            pixel_array.ndim != 3
            or isinstance(images, torch.Tensor)
            or not _is_grey_batch(pixel_array.shape)
        ):
            # Torch's images always have channels: a tensor of three axes is one image (C, H, W).
            return [pixel_array]
        return list(pixel_array)
    except ImageError as error:
        raise InvalidInput(str(error)) from None


def _is_grey_batch(array_shape: tuple[int, ...]) -> bool:
    """Return whether an array of three axes is N grey images (N, H, W), and not (H, W, C).

    Raises ImageError if it could also be (C, H, W).
    """
    n_images, height, width = array_shape
    if width in _CHANNELS or n_images == 1:
        return False
    if n_images in _CHANNELS:
        raise ImageError(
            f"an array of shape {array_shape} is one image of {n_images} channels and {height} x "
            f"{width} pixels, (C, H, W), or {n_images} grey images of {height} x {width} pixels, "
            "(N, H, W). Give [array] for the one image, and list(array) for the many"
        )
    return True


def image_decoder(
    image: ImageLike, highest_band: int | None
) -> tuple[Callable[[Preprocessing], DecodedImage], str]:
    """Return a function that decodes the image for a preprocessing, and the image's content hash.

    highest_band: the highest band that some preprocessing reads, None if none reads bands. Raises
    ImageError and OSError.
    """
    if isinstance(image, Image.Image) and not (image_bytes := _unread_file(image)):
        upright_image = ImageOps.exif_transpose(image)
        if highest_band is None:
            return partial(_decode_pillow, upright_image), hash_bytes(upright_image.tobytes())
        image = np.asarray(upright_image)
    if isinstance(image, str | PathLike):
        image_bytes = read_bytes(image if isinstance(image, str) else encode_path(Path(image)))
    elif not isinstance(image, Image.Image):
        pixel_array = _as_array(image) if highest_band else _one_image(_as_array(image))
        image_bytes = array_bytes(pixel_array)
        if pixel_array.dtype.kind == "f":
            return partial(_decode_floats, pixel_array, image_bytes), hash_bytes(image_bytes)
    return partial(decode_pixels, image_bytes), hash_bytes(image_bytes)


def _decode_pillow(image: Image.Image, preprocessing: Preprocessing) -> DecodedImage:
    is_16_bit = image.mode.startswith("I;16")
    if preprocessing.pixel_dtype == "float32" and (is_16_bit or image.mode in ("I", "F")):
        # Mode I is int32 in memory also where its values are an unsigned file's.
        dtype = np.uint16 if is_16_bit else np.float64
        return decode_pixels(array_bytes(np.asarray(image).astype(dtype)), preprocessing)
    return to_rgb(image, preprocessing.pixel_range)  # type: ignore[arg-type]


def _decode_floats(
    pixel_array: npt.NDArray[Any], image_bytes: bytes, preprocessing: Preprocessing
) -> DecodedImage:
    """Decode floats in memory. Raises ImageError if they are not from 0 to 1 and the model has no
    pixel_range.
    """
    if preprocessing.pixel_range is not None:
        return decode_pixels(image_bytes, preprocessing)
    lowest, highest = (
        (float(pixel_array.min()), float(pixel_array.max())) if pixel_array.size else _UNIT
    )
    if lowest < -_HALF_STEP or highest > 1 + _HALF_STEP:
        raise ImageError(
            f"{pixel_array.dtype} values from {lowest:g} to {highest:g}; expected 0 to 1, as "
            "torchvision and scikit-image have it. Divide them by the value that is white, "
            "leave a normalization out, or give uint8. A model whose recipe says "
            "images.pixel_range: [0, 255] takes floats from 0 to 255"
        )
    return decode_pixels(image_bytes, replace(preprocessing, pixel_range=_UNIT))


def _unread_file(image: Image.Image) -> bytes:
    """Return the bytes of the file behind a Pillow image that has been opened but not read; else
    b"", and also where Pillow's pixels serve as well.
    """
    if (
        not isinstance(image, ImageFile.ImageFile)
        or not image.tile
        or image.fp is None
        or image.tell() != 0
    ):
        return b""  # already read, made in memory, or on another page than the first
    # Of more than 8 bits Pillow's pixels lack what the file has: a PGM's value of white, the low
    # byte of colours. A JPEG can be decoded at a smaller size only from its file.
    has_more = image.format in ("PNG", "TIFF") and ";" in pillow_raw_mode(image)
    if image.format not in ("PPM", "JPEG", "MPO") and not has_more:
        return b""
    file_position = image.fp.tell()
    image.fp.seek(0)
    file_bytes = image.fp.read()
    image.fp.seek(file_position)
    image.load()  # closes the file, as every other use of the image does
    return file_bytes


def _as_array(image: object) -> npt.NDArray[Any]:
    if isinstance(image, torch.Tensor):
        pixels = image.detach().cpu()
        # NumPy has no bfloat16.
        return np.asarray((pixels.float() if pixels.dtype == torch.bfloat16 else pixels).numpy())
    if isinstance(image, np.ndarray):
        if image.dtype.kind in "OV":
            raise ImageError(f"pixels of type {image.dtype}; expected numbers")
        return image
    raise ImageError(
        f"an image is given as {type(image).__name__}; expected a path, a Pillow image, a NumPy "
        "array or a torch tensor"
    )


def _one_image(pixel_array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array (H, W), (H, W, C) or (C, H, W) as (H, W) or (H, W, C).

    Raises ImageError for another shape, or one that can be read both ways.
    """
    if pixel_array.ndim == 2:
        return pixel_array
    if pixel_array.ndim != 3:
        raise ImageError(
            f"an array of shape {pixel_array.shape} is no image; expected (H, W), (H, W, C) or (C, "
            "H, W)"
        )
    is_channels_first = _channels_first(pixel_array.shape, "an image")
    return np.moveaxis(pixel_array, 0, 2) if is_channels_first else pixel_array


def _channels_first(array_shape: tuple[int, ...], subject: str) -> bool:
    """Return whether channels are the first axis of an image, (C, H, W).

    subject: the image in messages. Raises ImageError if both readings are possible, or none.
    """
    first_fits, last_fits = array_shape[-3] in _CHANNELS, array_shape[-1] in _CHANNELS
    if first_fits and last_fits:
        last_layout, first_layout = array_shape[-3:-1], array_shape[-2:]
        raise ImageError(
            f"{subject} of shape {array_shape} has {array_shape[-1]} channels and {last_layout[0]} "
            f"x {last_layout[1]} pixels, if the channels come last, or {array_shape[-3]} channels "
            f"and {first_layout[0]} x {first_layout[1]} pixels, if they come first. Put them where "
            "they cannot be mistaken: np.moveaxis(array, -1, -3) where they are last now, "
            "np.moveaxis(array, -3, -1) where they are first"
        )
    if not (first_fits or last_fits):
        raise ImageError(
            f"{subject} of shape {array_shape} has no axis of 1, 3 or 4 channels; expected (H, W, "
            "C) or (C, H, W) for an image, (N, H, W, C) or (N, C, H, W) for many"
        )
    return first_fits


def highest_band(renderings: Sequence[Rendering]) -> int | None:
    """Return the highest band that some rendering reads; None if none reads bands."""
    bands = [band for rendering in renderings for band in rendering.preprocessing.bands or ()]
    return max(bands, default=None)


def image_name(image: ImageLike, image_index: int) -> str:
    return str(image) if isinstance(image, str | PathLike) else f"image {image_index}"
