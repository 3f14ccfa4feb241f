"""Images of other depths and numbers of channels: what reaches the network, against plain NumPy and
PyTorch.
"""

import io

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.backbones.first_convolution import adapt_channels
from headrace.extract.errors import BackboneError, ImageError
from headrace.extract.images.bands import Bands, decode_deep
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.locators import array_bytes
from headrace.extract.images.preprocessing import Preprocessing, decode_pixels, render_crop
from headrace.extract.images.views import Augmentation, Symmetries, render_view
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.forward import make_normalizer
from headrace.extract.taps.resolve import backbone_nodes

RNG = np.random.default_rng(0)


def preprocessing(n_channels=3, **fields):
    values = {
        "resize": (16, 16),
        "crop": (16, 16),
        "mode": "squash",
        "interpolation": "bilinear",
        "mean": (0.5,) * n_channels,
        "std": (0.25,) * n_channels,
    }
    return Preprocessing(**{**values, **fields})


def tiff(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def floats_of(data, bands, pixel_range=None):
    decoded = decode_deep(data, bands, pixel_range)
    assert isinstance(decoded, Bands)
    return decoded.floats()


UINT16 = RNG.integers(0, 65536, (20, 24, 5), dtype=np.uint16)


@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "contig"},
        {"planarconfig": "separate"},
        {"planarconfig": "contig", "byteorder": ">"},
        {"planarconfig": "separate", "byteorder": ">", "compression": "deflate"},
        {"planarconfig": "contig", "compression": "lzw", "predictor": True},
        {"planarconfig": "separate", "tile": (16, 16)},
        {"planarconfig": "contig", "bigtiff": True},
    ],
    ids=str,
)
def test_bands_of_a_tiff_however_it_is_laid_out(options):
    """Interleaved and planar, in strips and tiles, either byte order, compressed, BigTIFF: band b
    is values[:, :, b - 1], at its own depth.
    """
    stored = np.moveaxis(UINT16, 2, 0) if options["planarconfig"] == "separate" else UINT16
    data = tiff(stored, photometric="minisblack", **options)
    expected = UINT16[:, :, [3, 0, 4]].astype(np.float64) / 65535 * 255
    np.testing.assert_allclose(floats_of(data, (4, 1, 5)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64", "int32"])
@pytest.mark.parametrize("n_bands", [1, 2, 3, 4, 13])
def test_every_type_and_number_of_bands_in_a_tiff(dtype, n_bands):
    values = (RNG.random((9, 8, n_bands)) * 200).astype(dtype)
    stored = values if n_bands > 1 else values[:, :, 0]
    data = tiff(stored, photometric="minisblack", planarconfig="contig" if n_bands > 1 else None)
    bands = tuple(range(1, n_bands + 1))
    expected = values.astype(np.float64)  # of 8 bits, white is 255 as ever
    if dtype != "uint8":
        expected = (expected - -100) / (300 - -100) * 255
    np.testing.assert_allclose(floats_of(data, bands, (-100, 300)), expected, rtol=1e-6)


@pytest.mark.parametrize("compression", ["zstd", "lzw", "lzma"])
def test_a_blank_chip_is_an_image(compression, caplog):
    """Compressed more than deflate ever does; and Pillow's log of its bands is not shown."""
    blank = np.zeros((1024, 1024, 13), np.uint16)
    options = {"photometric": "minisblack", "planarconfig": "contig", "tile": (1024, 1024)}
    data = tiff(blank, compression=compression, **options)
    assert blank.nbytes > 1032 * len(data)
    assert not floats_of(data, (1, 13), (0, 1)).any()
    assert not caplog.records


@pytest.mark.parametrize("layout", ["last", "first", "fortran"])
def test_arrays_of_many_bands_in_either_layout(layout):
    """(13, H, W) and (H, W, 13) are one image: the shorter of the two axes is the bands."""
    values = RNG.random((20, 24, 13)).astype(np.float32)
    stored = {
        "last": values,
        "first": np.ascontiguousarray(np.moveaxis(values, 2, 0)),
        "fortran": values,
    }[layout]
    data = array_bytes(stored)
    if layout == "fortran":
        buffer = io.BytesIO()
        np.save(buffer, np.asfortranarray(values))
        data = buffer.getvalue()
    np.testing.assert_allclose(
        floats_of(data, (13, 1), (0, 1)), 255 * values[:, :, [12, 0]], rtol=1e-6
    )


def test_an_image_smaller_than_its_bands_are_many():
    """Five rows of thirteen bands: an axis of five cannot be the bands where band 13 is asked."""
    values = RNG.random((5, 40, 13)).astype(np.float32)
    assert floats_of(array_bytes(values), (1, 13), (0, 1)).shape == (5, 40, 2)


def test_alpha_is_the_fourth_band():
    """Of an RGBA image with bands, colours are not laid over white, and alpha is a band."""
    values = RNG.integers(0, 256, (6, 7, 4), dtype=np.uint8)
    np.testing.assert_array_equal(floats_of(png(values), (1, 2, 3, 4)), values)


def test_bands_of_a_palette_are_its_colours():
    image = Image.fromarray(RNG.integers(0, 256, (6, 7, 3), dtype=np.uint8)).quantize(16)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    np.testing.assert_array_equal(
        floats_of(buffer.getvalue(), (3, 1)), np.asarray(image.convert("RGB"))[:, :, [2, 0]]
    )


def test_channels_of_a_microscope_are_pages():
    """ImageJ and OME store a page for each channel: axes CYX."""
    stored = np.ascontiguousarray(np.moveaxis(UINT16, 2, 0))
    expected = UINT16[:, :, [4]] / 65535 * 255
    for options in ({"imagej": True}, {"ome": True}):
        data = tiff(stored, metadata={"axes": "CYX"}, photometric="minisblack", **options)
        np.testing.assert_allclose(floats_of(data, (5,)), expected, rtol=1e-6)
    with pytest.raises(ImageError, match="axes ZCYX"):
        decode_deep(tiff(np.stack([stored] * 2), imagej=True, metadata={"axes": "ZCYX"}), (1,))


def test_white_is_zero_inverts_a_band():
    values = RNG.integers(0, 65536, (6, 7), dtype=np.uint16)
    data = tiff(values, photometric="miniswhite")
    np.testing.assert_allclose(
        floats_of(data, (1,))[:, :, 0], (65535 - values.astype(float)) / 257, atol=1e-4
    )


def test_a_band_that_is_not_there_is_said():
    with pytest.raises(ImageError, match="5 bands, and band 6 is asked for"):
        decode_deep(tiff(UINT16, photometric="minisblack", planarconfig="contig"), (1, 6))
    with pytest.raises(ImageError, match="at least 6 bands"):
        decode_deep(array_bytes(UINT16[:5, :5]), (6,))
    with pytest.raises(ImageError, match="1 band, and band 3 is asked for"):
        decode_deep(png(UINT16[:, :, 0]), (1, 2, 3))


def test_pixels_without_a_value_are_refused_or_get_the_mean():
    """NaN and what a GeoTIFF declares to be none: zero after the normalization."""
    values = RNG.random((16, 16, 2)).astype(np.float32)
    values[0, 0, 0], values[1, 1, 1] = np.nan, -9999
    data = tiff(
        values,
        photometric="minisblack",
        planarconfig="contig",
        extratags=[(42113, "s", 0, "-9999", True)],
    )
    how = preprocessing(2, bands=(1, 2), pixel_range=(0, 1), mean=(0.25, 0.75))
    with pytest.raises(
        ImageError, match=r"0\.4% of the pixels of a band have no value.*nodata: mean"
    ):
        render_crop(decode_pixels(data, how), how)
    how = preprocessing(2, bands=(1, 2), pixel_range=(0, 1), mean=(0.25, 0.75), nodata="mean")
    pixels = render_crop(decode_pixels(data, how), how)
    assert pixels[0, 0, 0] == 255 * 0.25
    assert pixels[1, 1, 1] == 255 * 0.75
    np.testing.assert_allclose(pixels[2:], 255 * values[2:], rtol=1e-6)


def test_a_range_for_each_band_and_nothing_is_clipped():
    values = np.array([[[0, 50, 3000]]], np.int16).repeat(16, 0).repeat(16, 1)
    how = preprocessing(3, bands=(3, 2, 1), pixel_range=((0, 1000), (0, 100), (-10, 10)))
    pixels = render_crop(decode_pixels(array_bytes(values), how), how)
    np.testing.assert_allclose(pixels[3, 3], [3 * 255, 127.5, 127.5])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_floats_are_resized_as_pytorch_does_with_antialias(interpolation):
    """Pillow's filters on 32-bit floats: torch.nn.functional.interpolate(antialias=True)."""
    values = RNG.random((40, 60, 5)).astype(np.float32)
    how = preprocessing(5, bands=(1, 2, 3, 4, 5), pixel_range=(0, 1), interpolation=interpolation)
    pixels = render_crop(decode_pixels(array_bytes(values), how), how)
    assert pixels.dtype == np.float32
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values).permute(2, 0, 1)[None],
        (16, 16),
        mode=interpolation,
        antialias=True,
    )[0].permute(1, 2, 0)
    # PyTorch's bicubic has another coefficient without antialias alone; with it, Pillow's
    np.testing.assert_allclose(pixels / 255, expected, atol=2e-6)


def test_sixteen_bits_keep_their_depth():
    """A dark frame with 200 levels has one or two in 8 bits, and all of them in float32."""
    values = (1000 + np.arange(256).reshape(16, 16)).astype(np.uint16)
    deep = preprocessing(pixel_dtype="float32")
    pixels = render_crop(decode_pixels(png(values), deep), deep)
    assert pixels.shape == (16, 16, 3)
    np.testing.assert_allclose(pixels[:, :, 1], values / np.float64(257), rtol=1e-6)
    flat = preprocessing()
    assert len(np.unique(render_crop(decode_pixels(png(values), flat), flat))) == 2


def test_colours_of_sixteen_bits_lie_over_white_in_floats():
    values = RNG.integers(0, 65536, (16, 16, 4), dtype=np.uint16)
    data = tiff(values, photometric="rgb", extrasamples=["unassalpha"])
    deep = preprocessing(pixel_dtype="float32")
    share = values[:, :, 3:] / 65535
    expected = values[:, :, :3] / 257 * share + 255 * (1 - share)
    np.testing.assert_allclose(
        render_crop(decode_pixels(data, deep), deep), expected, rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_images_of_eight_bits_are_the_same_in_float32_bit_for_bit(mode):
    image = Image.fromarray(RNG.integers(0, 256, (50, 70, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    flat, deep = preprocessing(), preprocessing(pixel_dtype="float32")
    for index, drawing in ((0, Augmentation()), (1, Augmentation()), (3, Symmetries())):
        flat_view = render_view(decode_pixels(data, flat), "c", index, drawing, flat)
        deep_view = render_view(decode_pixels(data, deep), "c", index, drawing, deep)
        np.testing.assert_array_equal(flat_view, deep_view)
    assert isinstance(decode_pixels(data, deep), Image.Image)
    assert decode_pixels(data, deep).tobytes() == decode_image(data).tobytes()


def test_eight_bits_keep_their_feature_sets():
    """Fields of other depths are in the fingerprint of those alone."""
    assert "bands" not in preprocessing().to_json()
    texts = {
        how.to_json()
        for how in (
            preprocessing(),
            preprocessing(pixel_dtype="float32"),
            preprocessing(bands=(1, 2, 3)),
            preprocessing(bands=(3, 2, 1)),
            preprocessing(bands=(3, 2, 1), nodata="mean"),
            preprocessing(bands=(3, 2, 1), pixel_range=(0, 1)),
            preprocessing(bands=(3, 2, 1), pixel_range=((0, 1), (0, 1), (0, 2))),
        )
    }
    assert len(texts) == 7


def test_the_border_of_bands_has_their_mean():
    how = preprocessing(4, bands=(1, 2, 3, 4), mode="border", mean=(0.1, 0.2, 0.3, 0.4))
    values = RNG.integers(0, 256, (8, 16, 4), dtype=np.uint8)
    pixels = render_crop(decode_pixels(array_bytes(values), how), how)
    np.testing.assert_allclose(pixels[0, 0], 255 * np.array([0.1, 0.2, 0.3, 0.4]), rtol=1e-6)
    np.testing.assert_array_equal(pixels[4:12], values)


@pytest.mark.parametrize("drawing", [Augmentation(), Symmetries()])
def test_views_of_bands_are_drawn_from_the_content_alone(drawing):
    how = preprocessing(4, bands=(1, 2, 3, 4))
    image = decode_pixels(array_bytes(RNG.integers(0, 256, (30, 40, 4), dtype=np.uint8)), how)
    first = render_view(image, "content", 2, drawing, how)
    np.testing.assert_array_equal(first, render_view(image, "content", 2, drawing, how))
    assert first.shape == (16, 16, 4)
    if isinstance(drawing, Symmetries):
        np.testing.assert_array_equal(first, render_crop(image, how)[::-1])
    else:
        assert not np.array_equal(first, render_view(image, "other", 2, drawing, how))


def test_fields_that_go_together():
    with pytest.raises(ValueError, match="2 bands, and mean and std have 3"):
        preprocessing(bands=(1, 2))
    with pytest.raises(ValueError, match="images have three colours"):
        preprocessing(4)
    with pytest.raises(ValueError, match="first band is 1"):
        preprocessing(bands=(0, 1, 2))
    with pytest.raises(ValueError, match="a pair for each of the bands"):
        preprocessing(bands=(1, 2, 3), pixel_range=((0, 1), (0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_channels"),
    [
        *(("resnet18", n_channels) for n_channels in (1, 2, 4, 13)),
        # Where the first convolution has another name.
        ("vit_tiny_patch16_224", 13),
        ("efficientnet_b0", 13),
    ],
)
def test_the_first_convolution_is_adapted_as_timm_does(name, n_channels, tmp_path):
    """timm.create_model(pretrained=True, in_chans=N) from the same weights file."""
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=False)
    file = tmp_path / "weights.pth"
    torch.save(plain.state_dict(), file)
    expected = timm.create_model(
        name,
        pretrained=True,
        in_chans=n_channels,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 1000},
    ).eval()
    bands = tuple(range(1, n_channels + 1))
    backbone = load_backbone(BackboneSpec(f"timm:{name}", weights=str(file), bands=bands))
    images = torch.rand(2, n_channels, *backbone.preprocessing.crop)
    with torch.no_grad():
        torch.testing.assert_close(backbone.module(images), expected(images), rtol=0, atol=0)
    assert backbone.preprocessing.n_channels == n_channels
    assert backbone.preprocessing.mean[0] == pytest.approx(
        (0.485 + 0.456 + 0.406) / 3, abs=0.02
    ) or (backbone.preprocessing.mean[0] == 0.5)
    assert backbone_nodes(backbone).nodes


def test_networks_of_the_other_libraries_take_bands_too():
    """torchvision, transformers (whose models check the number of channels) and open_clip."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    dinov2 = transformers.Dinov2Model(config).eval()
    weight = dinov2.embeddings.patch_embeddings.projection.weight.detach().clone()
    adapt_channels(dinov2, "transformers:x", 4)
    with torch.no_grad():
        dinov2(torch.rand(1, 4, 28, 28))
    adapted = dinov2.embeddings.patch_embeddings.projection.weight
    torch.testing.assert_close(adapted, weight[:, [0, 1, 2, 0]] * 0.75, rtol=0, atol=0)
    backbone = load_backbone(
        BackboneSpec("torchvision:resnet18", weights="random:0", bands=(1, 2, 3, 4, 5, 6))
    )
    plain = load_backbone(BackboneSpec("torchvision:resnet18", weights="random:0"))
    torch.testing.assert_close(
        backbone.module.conv1.weight,
        plain.module.conv1.weight[:, [0, 1, 2, 0, 1, 2]] * 0.5,
        rtol=0,
        atol=0,
    )
    assert backbone.weights != plain.weights


def test_networks_that_cannot_take_bands_say_so():
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    with pytest.raises(BackboneError, match="has an unknown number of input channels"):
        adapt_channels(linear, "python:x", 4)
    with pytest.raises(BackboneError, match="normalizes red, green and blue itself"):
        load_backbone(BackboneSpec("torchvision:googlenet", weights="random:0", bands=(1, 2, 3, 4)))
    with pytest.raises(BackboneError, match="7 input channels, and 4 bands"):
        adapt_channels(torch.nn.Conv2d(7, 2, 3), "python:x", 4)


def test_a_checkpoint_of_as_many_channels_is_loaded_as_it_is(tmp_path):
    """Thirteen bands from a network of thirteen: no weight is summed or repeated (timm#2780)."""
    network = timm.create_model("resnet18", in_chans=13)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = load_backbone(
        BackboneSpec(
            "timm:resnet18", weights=str(tmp_path / "weights.pth"), bands=tuple(range(1, 14))
        )
    )
    torch.testing.assert_close(backbone.module.conv1.weight, network.conv1.weight, rtol=0, atol=0)


def test_the_normalizer_takes_floats_and_bytes_alike():
    backbone = load_backbone(BackboneSpec("timm:resnet18", weights="random:0"))
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    normalize = make_normalizer(backbone, "cpu")
    torch.testing.assert_close(normalize(pixels), normalize(pixels.float()), rtol=0, atol=0)
