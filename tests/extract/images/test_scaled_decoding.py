"""Scaled decoding: JPEGs much larger than the network's input come from their low frequencies, and
everything else as it always did.
"""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.extract.errors import BackboneError, ImageError
from headrace.extract.images.crops import Crop
from headrace.extract.images.decoding import decode_image, file_box, jpeg_size
from headrace.extract.images.preprocessing import (
    Preprocessing,
    decode_pixels,
    jpeg_reduction,
    render_crop,
)
from headrace.extract.images.views import Augmentation
from headrace.extract.run.rendering import Rendering, SharedImage, render_samples
from headrace.extract.spec import BackboneSpec, Sample, backbone_from_fields
from headrace.pipelines.export.preprocessing_file import preprocess_file
from headrace.pipelines.models.images import _render_into
from headrace.pipelines.models.torch_graph import GraphInput


def how(resize: int, mode: str = "shortest", decode: str = "scaled") -> Preprocessing:
    grey = (0.5, 0.5, 0.5)
    size = (resize, resize)
    return Preprocessing(size, size, mode, "bilinear", grey, grey, decode=decode)  # type: ignore[arg-type]


def photograph(width: int, height: int, kind: str = "JPEG", **options: object) -> bytes:
    """A picture with large shapes and fine noise, as a file of that kind."""
    random = np.random.default_rng(width)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = (smooth + random.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(noisy)
    if mode := options.pop("mode", ""):
        image = image.convert(str(mode))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "resize", "mode", "reduction"),
    [
        ((4096, 4096), 256, "shortest", 8),
        ((4095, 4096), 256, "shortest", 4),
        ((4000, 3000), 256, "shortest", 4),
        ((3000, 4000), 256, "shortest", 4),
        ((1024, 1024), 256, "shortest", 2),
        ((1023, 1023), 256, "shortest", 1),
        ((4000, 500), 100, "shortest", 2),
        ((4000, 500), 100, "squash", 2),
        ((4000, 500), 100, "border", 8),
        ((16, 16), 256, "shortest", 1),
    ],
)
def test_the_reduction_leaves_twice_the_pixels_of_the_resized_image(size, resize, mode, reduction):
    """Of 8, 4 and 2 the greatest whose image has twice the resized one's edges; else none."""
    data = photograph(*size)
    assert jpeg_reduction(data, how(resize, mode)) == reduction
    assert jpeg_reduction(data, how(resize, mode, "exact")) == 1


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_pixels_are_those_of_pillows_draft(reduction):
    """Edges are divided and rounded up; the last column and row, which the file's pixels do not
    fill, repeat those before.
    """
    data = photograph(403, 301)
    reference = Image.open(io.BytesIO(data))
    reference.draft(None, (403 // reduction, 301 // reduction))
    assert reference.size == (-(-403 // reduction), -(-301 // reduction))
    pixels = np.asarray(decode_image(data, None, reduction))
    assert np.array_equal(pixels[:-1, :-1], np.asarray(reference)[:-1, :-1])
    assert np.array_equal(pixels[-1], pixels[-2])
    assert np.array_equal(pixels[:, -1], pixels[:, -2])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}])
@pytest.mark.parametrize("mode", ["shortest", "squash", "border"])
def test_crops_are_nearly_those_of_exact_decoding(mode, options):
    """A third of one of 255 levels on average; the exact crop is another one. The edges are odd, and
    both images are resized to the same.
    """
    data = photograph(1203, 901, quality=92, **options)
    scaled, exact = (
        render_crop(decode_pixels(data, how(96, mode, decode)), how(96, mode)).astype(int)
        for decode in ("scaled", "exact")
    )
    assert scaled.shape == exact.shape == (96, 96, 3)
    assert 0 < np.abs(scaled - exact).mean() < 0.35


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_that_lie_on_their_side_are_upright(orientation):
    """Sizes are those of the upright image, so that a sideways one has the same reduction."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photograph(1203, 405, exif=exif)
    upright = (1203, 405) if orientation >= 5 else (405, 1203)
    assert jpeg_size(data) == upright
    image = decode_image(data, None, 8)
    assert image.size == (-(-upright[1] // 8), -(-upright[0] // 8))
    left, top, right, bottom = file_box(image)
    assert (bottom - top, right - left) == (upright[0] / 8, upright[1] / 8)
    size = (upright[1] // 16, upright[0] // 16)
    small = decode_image(data).resize(size, Image.Resampling.BILINEAR)
    same = image.resize(size, Image.Resampling.BILINEAR, file_box(image))
    assert np.abs(np.asarray(same).astype(int) - np.asarray(small)).mean() < 0.5


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_other_formats_are_decoded_in_full(kind):
    data = photograph(640, 480, kind)
    assert jpeg_size(data) is None
    assert np.array_equal(decode_pixels(data, how(32)), decode_image(data))


def test_a_photograph_of_several_pictures_is_scaled_as_well():
    """What many telephones write (MPO): the first picture."""
    pictures = [Image.open(io.BytesIO(photograph(800, 600 + extra))) for extra in (0, 8)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "MPO", save_all=True, append_images=pictures[1:])
    data = buffer.getvalue()
    assert jpeg_size(data) == (600, 800)
    assert decode_pixels(data, how(64)).size == (200, 150)


def test_cmyk_is_scaled_and_becomes_rgb():
    image = decode_pixels(photograph(800, 600, mode="CMYK"), how(64))
    assert (image.mode, image.size) == ("RGB", (200, 150))


def test_a_truncated_file_is_refused_for_the_same_reason():
    data = photograph(1200, 900)[:-20_000]
    reasons = []
    for decode in ("exact", "scaled"):
        with pytest.raises(ImageError) as caught:
            decode_pixels(data, how(64, decode=decode))
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    assert "truncated" in reasons[0]


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_what_is_no_image_is_refused(data):
    assert jpeg_size(data) is None
    with pytest.raises(ImageError):
        decode_pixels(data, how(64))


def test_the_mode_is_part_of_the_fingerprint():
    """A cache never mixes the two."""
    assert how(64).to_json() != how(64, decode="exact").to_json()


def test_a_description_that_was_sent_cannot_name_another_mode():
    fields = {"name": "timm:test_resnet", "decode": "scaled"}
    assert backbone_from_fields(fields) == BackboneSpec("timm:test_resnet", decode="scaled")
    with pytest.raises(BackboneError, match="decode: fast, which cannot be"):
        backbone_from_fields({**fields, "decode": "fast"})


def test_an_exported_model_and_a_prediction_decode_as_the_run_did(tmp_path):
    """The file that goes with an exported model, a path, and a Pillow image that is not read yet."""
    data = photograph(1203, 901)
    (tmp_path / "a.jpg").write_bytes(data)
    right = render_crop(decode_pixels(data, how(96)), how(96))
    assert not np.array_equal(right, render_crop(decode_image(data), how(96)))
    namespace: dict[str, Any] = {"__name__": "preprocess"}
    exec(preprocess_file([GraphInput("images", how(96))], "0"), namespace)
    assert np.array_equal(namespace["load"](tmp_path / "a.jpg"), right)
    rendering = Rendering(how(96), 0, Augmentation())
    for image in (tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg")):
        buffer = torch.zeros((1, 96, 96, 3), dtype=torch.uint8)
        _render_into(image, 0, [rendering], [buffer], 0)
        assert np.array_equal(buffer[0], right)


@pytest.mark.parametrize("hidden", [1, 3, 7])
def test_what_an_encoder_has_written_beyond_the_image_is_not_seen(hidden):
    """Blocks end behind the image (Pillow's issue 3419): here they are white there, the image grey."""
    pixels = np.full((640, 640), 90, np.uint8)
    pixels[:, -hidden:] = pixels[-hidden:] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0") + 5  # where the height stands, and then the width
    data[frame : frame + 4] = (640 - hidden).to_bytes(2, "big") * 2
    crop = render_crop(decode_pixels(bytes(data), how(40)), how(40))
    assert jpeg_reduction(bytes(data), how(40)) == 4
    assert np.abs(crop.astype(int) - 90).max() <= 6


def test_boxes_are_cut_from_exact_pixels(tmp_path):
    """Their edges are in pixels of the file, and they are smaller than it."""
    (tmp_path / "a.jpg").write_bytes(photograph(1203, 901))
    box = Crop(40, 50, 800, 600)
    buffers = [np.zeros((1, 96, 96, 3), np.uint8) for _ in range(2)]
    for decode, buffer in zip(("scaled", "exact"), buffers, strict=True):
        image = SharedImage(str(tmp_path / "a.jpg"), in_parts=False)
        sample = Sample("a", box.locator(str(tmp_path / "a.jpg")), "")
        rendering = Rendering(how(96, decode=decode), 0, Augmentation())
        (outcome,) = render_samples(image, [sample], [rendering], [buffer], 0)
        assert outcome.reason is None
    assert np.array_equal(*buffers)
    assert buffers[0].any()
