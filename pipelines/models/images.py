"""From images to probabilities: each decoded once, one pass per network, every member's prediction
from what came out.

Letters of shapes: N images, H rows, W columns, C channels (1, 3 or 4).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, ImageOps

from headrace.cache.errors import HeadraceError
from headrace.cache.format.encoding import decode_rows, encode_rows
from headrace.cache.spec import FeatureSpec
from headrace.extract.backbones.fused import keep_freed_memory
from headrace.extract.errors import ImageError
from headrace.extract.images.byte_ranges import array_bytes, encode_path, read_bytes
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.images.decoding import PixelRange, decode_image, pillow_raw_mode, to_rgb
from headrace.extract.images.views import Augmentation
from headrace.extract.run.decode_ahead import (
    PixelBatch,
    Rendering,
    decoded_batches,
    render_into_buffers,
)
from headrace.extract.run.device import BatchLimit, check_device, launch_forward
from headrace.extract.run.work_unit import (
    ForwardPass,
    batch_limit_of,
    find_unstorable_rows,
    make_forward_passes,
    quiet_decoding,
)
from headrace.extract.spec import BackboneSpec, Sample
from headrace.extract.taps.forward import make_forward
from headrace.extract.taps.resolve import Tap
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.ensemble import average
from headrace.heads.kind import CannotPredict
from headrace.heads.link import tempered
from headrace.pipelines.environment import available_cores

if TYPE_CHECKING:
    from headrace.extract.backbones.backbone import Backbone
    from headrace.pipelines.models.head import HeadModel
    from headrace.pipelines.models.model import Model
    from headrace.pipelines.models.network import NetworkModel

ImageLike = str | PathLike[str] | Image.Image | npt.NDArray[Any] | torch.Tensor
Floats = npt.NDArray[np.float32]
_BATCH = 32  # images decoded together; passes take as many at a time as is fast on their device
_CHANNELS = (1, 3, 4)
_UNIT: PixelRange = (0.0, 1.0)  # of floats in memory, as torchvision and scikit-image have them
_HALF_STEP = (
    0.5 / 255
)  # what a float may lie beyond them: it is rounded to black or white in any case


class ImageUnusable(HeadraceError, ValueError):
    """An image cannot be decoded or read in one way only, or the network's output for it cannot be
    used.
    """


@dataclass(frozen=True)
class Predicted:
    """Some of the images, in order. Rows are positions in what was given."""

    rows: list[int]
    probabilities: Floats  # (len(rows), C)
    failed: list[tuple[int, str]]  # (row, reason)
    unread: frozenset[int] = (
        frozenset()
    )  # rows among the failed whose file could not be read; another time it may be


@dataclass(frozen=True)
class Engine:
    """A model's networks on a device: a batch of pixels in, probabilities out."""

    model: "Model"
    device: str
    passes: tuple[ForwardPass, ...]
    limits: tuple[BatchLimit, ...]  # of `passes`
    heads: tuple[Callable[[Floats], Floats], ...]  # of the model's members

    @property
    def renderings(self) -> list[Rendering]:
        """What pixels a batch holds, in order."""
        return [each.rendering for each in self.passes]


def open_engine(model: "Model", device: str = "cpu") -> Engine:
    """Load the networks.

    Raises BackboneError for weights that are not there, SpecMismatch for other weights.
    """
    check_device(device)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    wanted: dict[BackboneSpec, dict[FeatureSpec, None]] = {}
    passes: list[ForwardPass] = []
    for member in model.members:
        trained_backbone = member.trained_backbone()
        if trained_backbone is not None:
            passes.append(_trained_pass(trained_backbone, member.features, device))
            continue
        for backbone, feature in zip(member.backbones, member.features, strict=True):
            wanted.setdefault(backbone, {})[feature] = None
    passes += [
        each
        for backbone, features in wanted.items()
        for each in make_forward_passes(backbone, list(features), device)
    ]
    limits = [
        batch_limit_of(each.forward, each.rendering.preprocessing.crop, device, None)
        for each in passes
    ]
    return Engine(
        model,
        device,
        tuple(passes),
        tuple(limits),
        tuple(member.head_function() for member in model.members),
    )


def predict_batch(engine: Engine, batch: PixelBatch) -> Predicted:
    """Probabilities of the images in a batch; those that failed, here or in decoding, with the
    reason.
    """
    launched = [
        launch_forward(each.forward, pixels, engine.device, limit)
        for each, pixels, limit in zip(engine.passes, batch.pixels, engine.limits, strict=True)
        if batch.rows
    ]
    features: dict[FeatureSpec, npt.NDArray[Any]] = {}
    bad: dict[int, str] = {}
    for each, result in zip(engine.passes, launched, strict=False):  # none are launched for no rows
        for spec, output in zip(each.specs, result(), strict=True):
            bad |= find_unstorable_rows(output, spec)
            features[spec] = output
    good = [place for place in range(len(batch.rows)) if place not in bad]
    failed = [
        *batch.undecodable,
        *batch.unread,
        *((batch.rows[place], reason) for place, reason in bad.items()),
    ]
    unread = frozenset(row for row, _ in batch.unread)
    if not good:
        return Predicted(
            [], np.empty((0, len(engine.model.classes)), np.float32), sorted(failed), unread
        )
    stored = {spec: as_stored(output[good], spec.dtype) for spec, output in features.items()}
    parts = [
        predict_member(member, head, stored, engine.model.task_kind)
        for member, head in zip(engine.model.members, engine.heads, strict=True)
    ]
    classes = len(engine.model.classes)
    if odd := [part.shape[1] for part in parts if part.shape != (len(good), classes)]:
        raise CannotPredict(
            f"{engine.model.path}: its head has {odd[0]} outputs for {classes} classes: fetch the "
            "model again"
        )
    return Predicted(
        [batch.rows[place] for place in good], combine(engine.model, parts), sorted(failed), unread
    )


def predict_samples(engine: Engine, samples: Sequence[Sample], threads: int) -> Iterator[Predicted]:
    """Predictions of the samples, in order, a batch at a time; decoding goes on while the network
    is busy.
    """
    batch_size = max(_BATCH, *(limit.images for limit in engine.limits))
    with ThreadPoolExecutor(threads, "decode") as pool, quiet_decoding():
        for batch in decoded_batches(
            pool,
            samples,
            engine.renderings,
            batch_size=batch_size,
            pin_memory=torch.device(engine.device).type != "cpu",
        ):
            yield predict_batch(engine, batch)


def predict_images(
    model: "Model", images: ImageLike | Iterable[ImageLike], *, device: str = "cpu"
) -> Floats:
    """See Model.predict_proba."""
    given = _many(images)
    engine = open_engine(model, device)
    found = np.empty((len(given), len(model.classes)), np.float32)
    with ThreadPoolExecutor(available_cores(), "decode") as pool, quiet_decoding():
        for start in range(0, len(given), _BATCH):
            rows = list(range(start, min(start + _BATCH, len(given))))
            pixels = [
                torch.empty((len(rows), *each.preprocessing.crop, 3), dtype=torch.uint8)
                for each in engine.renderings
            ]
            jobs = [
                pool.submit(_render_into, given[row], row, engine.renderings, pixels, slot)
                for slot, row in enumerate(rows)
            ]
            for job in jobs:
                job.result()
            predicted = predict_batch(engine, PixelBatch(rows, pixels))
            if predicted.failed:
                row, reason = predicted.failed[0]
                raise ImageUnusable(f"{_name(given[row], row)}: {reason}")
            found[predicted.rows] = predicted.probabilities
    return found


def _trained_pass(
    backbone: "Backbone", features: tuple[FeatureSpec, ...], device: str
) -> ForwardPass:
    """Return the pass from pixels to what a fine-tuned network's head is given."""
    taps = [Tap(feature.tap, feature.pooling) for feature in features]
    forward = make_forward(backbone, taps, device=device)
    return ForwardPass(Rendering(backbone.preprocessing, 0, Augmentation()), forward, features)


def combine(model: "Model", parts: Sequence[Floats]) -> Floats:
    """(n, C) of the members' predictions, each at its temperature: their weighted average, at the
    model's.
    """
    if len(parts) == 1 and model.average_temperature == 1:
        return parts[0]
    mean = average(np.array(model.weights), np.stack(parts))
    return tempered(mean, model.task_kind, model.average_temperature)


def as_stored(features: npt.NDArray[Any], dtype: str) -> Floats:
    """Features (n, ...) with the round-off of their storage dtype, which is what heads are trained
    on.

    uint8 is left out: its scale depends on the rows that happen to be stored together.
    """
    if dtype == "uint8":
        return np.asarray(features, np.float32)
    encoded = encode_rows(features, [""] * len(features), dtype)
    return np.asarray(decode_rows(encoded.stored, dtype), np.float32)


def predict_member(
    member: "HeadModel | NetworkModel",
    head: Callable[[Floats], Floats],
    features: dict[FeatureSpec, Floats],
    task_kind: TaskKind,
) -> Floats:
    """(n, C) of one head at its temperature, the mean over the views that it was trained on; its
    inputs side by side as in `load_rows`. head: its `head_function()`.
    """
    columns: dict[str, list[Floats]] = {}
    for spec in member.features:
        columns.setdefault(replace(spec, view="").to_json(), []).append(features[spec])
    spatial = member.spatial
    views = [
        np.concatenate([part if spatial else part.reshape(len(part), -1) for part in parts], axis=1)
        for parts in zip(*columns.values(), strict=True)
    ]
    if len(views) == 1:
        return head(views[0])
    return tempered(
        np.mean([head(view) for view in views], axis=0), task_kind, member.temperature, member.floor
    )


def _render_into(
    image: ImageLike,
    row: int,
    renderings: Sequence[Rendering],
    buffers: Sequence[torch.Tensor],
    slot: int,
) -> None:
    try:
        decode, content = _decoder(image)
        render_into_buffers(decode, content, renderings, buffers, slot)
    except (ImageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageUnusable(f"{_name(image, row)}: {reason}") from error


def _decoder(image: ImageLike) -> tuple[Callable[[PixelRange | None], Image.Image], str]:
    """What decodes the image with a pixel_range, and the image's content hash.

    Raises ImageError and OSError.
    """
    if isinstance(image, Image.Image) and not (data := _unread_file(image)):
        upright = ImageOps.exif_transpose(image)
        return partial(to_rgb, upright), hash_bytes(upright.tobytes())
    if isinstance(image, str | PathLike):
        data = read_bytes(image if isinstance(image, str) else encode_path(Path(image)))
    elif not isinstance(image, Image.Image):
        array = _one_image(_as_array(image))
        data = array_bytes(array)
        if array.dtype.kind == "f":
            return partial(_decode_floats, array, data), hash_bytes(data)
    return partial(decode_image, data), hash_bytes(data)


def _decode_floats(
    array: npt.NDArray[Any], data: bytes, pixel_range: PixelRange | None
) -> Image.Image:
    """Floats in memory, which are from 0 to 1 unless the model has a pixel_range.

    Raises ImageError for others.
    """
    if pixel_range is None:
        low, high = (float(array.min()), float(array.max())) if array.size else _UNIT
        if low < -_HALF_STEP or high > 1 + _HALF_STEP:
            raise ImageError(
                f"{array.dtype} values from {low:g} to {high:g}; expected 0 to 1, as torchvision "
                "and scikit-image have it. Divide them by the value that is white, leave a "
                "normalisation out, or give uint8. A model whose recipe says images.pixel_range: "
                "[0, 255] takes floats from 0 to 255"
            )
    return decode_image(data, pixel_range or _UNIT)


def _unread_file(image: Image.Image) -> bytes:
    """The bytes of the file of an image that is opened and not read yet; empty where it has been
    read, or made.

    Pillow's pixels of more than 8 bits have lost what their file says of them: a PGM's white, the
    low byte of colours.
    """
    if (
        not isinstance(image, ImageFile.ImageFile)
        or not image.tile
        or image.fp is None
        or image.tell() != 0
    ):
        return b""  # read or made already, or another page than the first
    if not (
        image.format == "PPM" or (image.format in ("PNG", "TIFF") and ";" in pillow_raw_mode(image))
    ):
        return b""  # of 8 bits, which Pillow keeps
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(place)
    image.load()  # which closes the file, as every other use of the image does
    return data


def _many(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """Each image by itself: of an array or tensor the first axis is cut up where it counts images.

    Raises ImageUnusable.
    """
    if isinstance(images, str | PathLike | Image.Image):
        return [images]
    if not isinstance(images, np.ndarray | torch.Tensor):
        return list(images)
    if isinstance(images, np.ndarray) and images.ndim == 1:
        return cast(list[ImageLike], images.tolist())  # of paths, as a column of a table gives them
    try:
        array = _as_array(images)
        if array.ndim == 4:
            _channels_first(array.shape, "a batch")
        elif array.ndim != 3 or isinstance(images, torch.Tensor) or not _is_grey_batch(array.shape):
            return [
                array
            ]  # torch has no images without channels: a tensor of three axes is (C, H, W)
        return list(array)
    except ImageError as error:
        raise ImageUnusable(str(error)) from None


def _is_grey_batch(shape: tuple[int, ...]) -> bool:
    """Whether an array is (N, H, W), N grey images, and not (H, W, C).

    Raises ImageError where it could be (C, H, W) too.
    """
    count, height, width = shape
    if width in _CHANNELS or count == 1:
        return False
    if count in _CHANNELS:
        raise ImageError(
            f"an array of shape {shape} is one image of {count} channels and {height} x {width} "
            f"pixels, (C, H, W), or {count} grey images of {height} x {width} pixels, (N, H, W). "
            "Give [array] for the one image, and list(array) for the many"
        )
    return True


def _as_array(image: object) -> npt.NDArray[Any]:
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        # NumPy has no bfloat16
        return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    if isinstance(image, np.ndarray):
        if image.dtype.kind in "OV":
            raise ImageError(f"pixels of type {image.dtype}; expected numbers")
        return image
    raise ImageError(
        f"an image is given as {type(image).__name__}; expected a path, a Pillow image, a NumPy "
        "array or a torch tensor"
    )


def _one_image(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array as (H, W) or (H, W, C).

    Raises ImageError where it is neither it nor (C, H, W), or could be both.
    """
    if array.ndim == 2:
        return array
    if array.ndim != 3:
        raise ImageError(
            f"an array of shape {array.shape} is no image; expected (H, W), (H, W, C) or (C, H, W)"
        )
    return np.moveaxis(array, 0, 2) if _channels_first(array.shape, "an image") else array


def _channels_first(shape: tuple[int, ...], what: str) -> bool:
    """Whether an image's channels stand before its rows.

    Raises ImageError where both readings are possible, or none.
    """
    first, last = shape[-3] in _CHANNELS, shape[-1] in _CHANNELS
    if first and last:
        rows, columns = shape[-3:-1], shape[-2:]
        raise ImageError(
            f"{what} of shape {shape} has {shape[-1]} channels and {rows[0]} x {rows[1]} pixels, "
            f"if the channels come last, or {shape[-3]} channels and {columns[0]} x {columns[1]} "
            "pixels, if they come first. Put them where they cannot be mistaken: "
            "np.moveaxis(array, -1, -3) where they are last now, np.moveaxis(array, -3, -1) where "
            "they are first"
        )
    if not (first or last):
        raise ImageError(
            f"{what} of shape {shape} has no axis of 1, 3 or 4 channels; expected (H, W, C) or (C, "
            "H, W) for an image, (N, H, W, C) or (N, C, H, W) for many"
        )
    return first


def _name(image: ImageLike, row: int) -> str:
    return str(image) if isinstance(image, str | PathLike) else f"image {row}"
