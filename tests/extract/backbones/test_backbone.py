"""Backbones: built, loaded, described, and refused with an answer; preprocessing is the weights'
own.
"""

import linecache
import re
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from headrace.extract.backbones import library
from headrace.extract.backbones.backbone import _load_cached, build_untrained, load_backbone
from headrace.extract.errors import BackboneError
from headrace.extract.images.preprocessing import Preprocessing, render_crop
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.describe import describe_backbone
from headrace.extract.taps.forward import make_normalizer

TINY = "timm:mobilenetv3_small_050"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    shapes = [(300, 300), (333, 500), (500, 333), (100, 120), (40, 700), (224, 224), (1, 9)]
    rgb = [Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    grey = [Image.fromarray(random.integers(0, 256, shape, np.uint8)) for shape in shapes[:3]]
    return rgb + grey


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("resnet50", "IMAGENET1K_V1"),
        ("resnet50", "IMAGENET1K_V2"),
        ("efficientnet_b0", None),
        ("efficientnet_v2_s", None),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
        ("inception_v3", None),
        ("swin_v2_t", None),
    ],
)
def test_preprocessing_is_torchvisions_own(name: str, tag: str | None) -> None:
    """Bit for bit before the arithmetic, and to rounding after it, for images of every shape."""
    import torchvision.models

    enum = torchvision.models.get_model_weights(name)
    transforms = (enum[tag] if tag else enum.DEFAULT).transforms()
    how = library._preprocessing_of_torchvision(transforms)
    for picture in pictures():
        expected = transforms(picture.convert("RGB"))
        assert_same_input(how, picture, expected)


@pytest.mark.parametrize(
    "config",
    [
        {
            "input_size": (3, 224, 224),
            "crop_pct": 0.875,
            "crop_mode": "center",
            "interpolation": "bicubic",
        },
        {
            "input_size": (3, 224, 224),
            "crop_pct": 0.9,
            "crop_mode": "center",
            "interpolation": "bilinear",
        },
        {
            "input_size": (3, 300, 300),
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
        },
        {
            "input_size": (3, 160, 192),
            "crop_pct": 0.9,
            "crop_mode": "center",
            "interpolation": "bicubic",
        },
        {
            "input_size": (3, 224, 224),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "interpolation": "bicubic",
        },
        {
            "input_size": (3, 224, 224),
            "crop_pct": 0.95,
            "crop_mode": "border",
            "interpolation": "bicubic",
        },
    ],
)
def test_preprocessing_is_timms_own(config: dict[str, object]) -> None:
    """For each crop mode, square and not."""
    from timm.data.transforms_factory import create_transform

    config = {**config, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    how = library._preprocessing_of_timm(config)
    transform = create_transform(**config, is_training=False)
    for picture in pictures():
        assert_same_input(how, picture, transform(picture.convert("RGB")))


def assert_same_input(how: Preprocessing, picture: Image.Image, expected: torch.Tensor) -> None:
    class Only:
        preprocessing = how

    pixels = torch.from_numpy(render_crop(picture, how).copy())
    found = make_normalizer(Only, "cpu")(pixels[None])[0]  # type: ignore[arg-type]
    assert found.shape == expected.shape, (picture.size, found.shape, expected.shape)
    assert float((found - expected).abs().max()) < 2e-6, picture.size


@pytest.mark.slow
def test_overrides() -> None:
    """None keeps the weights' own value; a size alone keeps their ratio of crop to resize."""

    def how(**changes: object) -> Preprocessing:
        spec = BackboneSpec("torchvision:resnet18", "random:0", **changes)  # type: ignore[arg-type]
        return build_untrained(spec)[1]

    assert (how().resize, how().crop) == ((256, 256), (224, 224))
    assert (how(image_size=112).resize, how(image_size=112).crop) == ((128, 128), (112, 112))
    assert (how(image_size=300, crop_fraction=1.0).resize) == (300, 300)
    assert how(crop_fraction=0.5).resize == (448, 448)
    changed = how(mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic")
    assert (changed.mean, changed.std, changed.interpolation) == (
        (0.5,) * 3,
        (0.25,) * 3,
        "bicubic",
    )
    assert (how().mode, how(resize_mode="border").mode) == ("shortest", "border")
    with pytest.raises(BackboneError, match=r"crop_fraction is 1.5"):
        how(crop_fraction=1.5)
    with pytest.raises(BackboneError, match=r"does not run on images of 7 x 7"):
        describe_backbone(BackboneSpec("torchvision:densenet121", "random:0", image_size=7))


def test_random_weights_are_the_same_for_a_seed() -> None:
    """Whatever the state of the generator outside, which is left alone."""
    one = load_backbone(BackboneSpec(TINY, "random:7"))
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    again = load_backbone(
        BackboneSpec(TINY, "random:7", image_size=64)
    )  # another spec, so built anew
    assert torch.equal(torch.rand(3), drawn)
    assert again.weights == one.weights
    assert load_backbone(BackboneSpec(TINY, "random:8")).weights != one.weights
    assert not one.module.training
    assert not any(parameter.requires_grad for parameter in one.module.parameters())
    with pytest.raises(BackboneError, match=r"expected random:SEED"):
        load_backbone(BackboneSpec(TINY, "random:x"))


def test_a_network_beyond_the_memory_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no file says how large it is. What other threads build meanwhile is not counted, nor
    what has no shape yet.
    """
    monkeypatch.setattr("headrace.extract.backbones.backbone._memory_bytes", lambda: 400_000)
    with pytest.raises(
        BackboneError, match=r"resnet18: the network has more than 100,000 .*Take a smaller"
    ):
        load_backbone(BackboneSpec("torchvision:resnet18", "random:991"))
    monkeypatch.undo()
    with library.limit_parameters(1_000, TINY, "and no"):
        other = threading.Thread(target=lambda: built.append(torch.nn.Linear(100, 100)))
        built: list[torch.nn.Module] = [torch.nn.LazyLinear(10)]
        other.start()
        other.join()
    built.append(torch.nn.Linear(100, 100))
    assert len(built) == 3


def test_weights_files(tmp_path: Path) -> None:
    """PyTorch, safetensors, wrapped by a trainer, prefixed by a wrapper, or renamed but in order:
    the same weights.
    """
    state = load_backbone(BackboneSpec(TINY, "random:1")).module.state_dict()
    digest = load_backbone(BackboneSpec(TINY, "random:1")).weights
    torch.save(state, tmp_path / "plain.pth")
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
        tmp_path / "wrapped.pth",
    )
    save_file(
        {name: value.contiguous() for name, value in state.items()}, tmp_path / "plain.safetensors"
    )
    torch.save(
        {f"tensor_{place}": value for place, value in enumerate(state.values())},
        tmp_path / "renamed.pth",
    )
    torch.save(
        {k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "uncounted.pth"
    )
    for name in ("plain.pth", "wrapped.pth", "plain.safetensors"):
        assert load_backbone(BackboneSpec(TINY, str(tmp_path / name))).weights == digest, name
    assert (
        load_backbone(BackboneSpec(TINY, str(tmp_path / "renamed.pth"), "order")).weights == digest
    )
    uncounted = load_backbone(
        BackboneSpec(TINY, str(tmp_path / "uncounted.pth"))
    ).module.state_dict()
    assert all(torch.equal(uncounted[name], value) for name, value in state.items())


def test_a_replaced_file_is_seen(tmp_path: Path) -> None:
    """A worker that lives long must not go on with weights that are no longer there."""
    spec = BackboneSpec(TINY, str(tmp_path / "weights.pth"))
    digests = []
    for seed in (1, 2):
        torch.save(
            {**load_backbone(BackboneSpec(TINY, f"random:{seed}")).module.state_dict()},
            tmp_path / "weights.pth",
        )
        digests.append(load_backbone(spec).weights)
    assert digests[0] != digests[1]


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    """Each says what was found, what was expected, and what to set instead."""
    state = load_backbone(BackboneSpec(TINY, "random:1")).module.state_dict()
    other = load_backbone(BackboneSpec("torchvision:squeezenet1_1", "random:0")).module.state_dict()
    first = next(iter(state))
    cases: dict[str, tuple[object, str, str]] = {
        "other.pth": (other, "name", "missing from the file.*not in the network"),
        "renamed.pth": (
            {f"tensor_{place}": value for place, value in enumerate(state.values())},
            "name",
            "counts agree.*weights_match: order",
        ),
        "fewer.pth": ({first: state[first]}, "order", "needs as many tensors"),
        "swapped.pth": (
            {**state, first: torch.zeros(2)},
            "order",
            r"in order, the file's .* meets the network's",
        ),
        "list.pth": ([torch.zeros(2)], "name", "expected a dictionary of tensors"),
        "mixed.pth": ({**state, "note": "hello"}, "name", "these entries are not: note"),
    }
    for name, (content, match, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(BackboneError, match=f"(?s){message}"):
            load_backbone(BackboneSpec(TINY, str(tmp_path / name), match))  # type: ignore[arg-type]
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(BackboneError, match="not a readable weights file"):
            load_backbone(BackboneSpec(TINY, str(tmp_path / name)))
    with pytest.raises(
        BackboneError, match=r"no such weights file. Files there: .*plain|no such weights file"
    ):
        load_backbone(BackboneSpec(TINY, str(tmp_path / "absent.pth")))


class Payload:
    """What a malicious file would hold: loading it would call a function of its choice."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("/tmp/headrace-was-here"),)  # type: ignore[return-value]


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    torch.save({"weights": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(BackboneError, match="these entries are not: weights"):
        load_backbone(BackboneSpec(TINY, str(tmp_path / "evil.pth")))
    assert not Path("/tmp/headrace-was-here").exists()


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("torchvision:resnt50", None, "no classification model 'resnt50'. Nearest: resnet50"),
        ("timm:efficientnet_lite_0", None, "timm has no model.*Nearest: .*efficientnet_lite0"),
        ("torchvision:resnet50", "IMAGENET1K_V3", "It has: IMAGENET1K_V1, IMAGENET1K_V2"),
        ("timm:resnet50", "a9_in1k", "It has: .*a1_in1k"),
        ("resnet50", None, "expected torchvision:NAME, timm:NAME, transformers:ID_OR_FOLDER"),
        ("facebook/dinov2-base", None, "hub: transformers:facebook/dinov2-base"),
        ("python:no_such_module:f", None, "cannot import 'no_such_module'"),
        (f"python:{__name__}:absent", None, "has no function 'absent'"),
        (f"python:{__name__}:pictures", None, "returned list; expected .torch.nn.Module"),
        (f"python:{__name__}:no_preprocessing", None, "the second value is str"),
    ],
)
def test_names_that_are_not(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(BackboneSpec(name, weights))


def no_preprocessing() -> tuple[torch.nn.Module, str]:
    return torch.nn.Identity(), "imagenet"


def own_network() -> tuple[torch.nn.Module, Preprocessing]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(3600, 5)
    )
    return module, Preprocessing(
        (32, 32), (32, 32), "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )


def test_a_network_of_ones_own() -> None:
    """Any function that returns a module and its preprocessing; its taps are found like any
    other's.
    """
    info = describe_backbone(BackboneSpec(f"python:{__name__}:own_network"))
    assert [tap.node for tap in info.taps] == ["0", "1", "2", "pre_logits", "3", "logits"]
    assert [tap.shape for tap in info.taps][:2] == [(4, 30, 30)] * 2
    assert info.taps[0].map_bytes == 2 * 4 * 30 * 30
    assert info.taps[0].avg_bytes == 8
    assert info.parameters == 4 * 27 + 4 + 3600 * 5 + 5


def test_a_network_of_ones_own_is_another_one_with_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its layers are defined in another file than the function, with equal tensors."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_function.py").write_text(
        "import torch, own_layers\n"
        "from headrace import Preprocessing\n"
        "def make():\n"
        "    how = Preprocessing((8, 8), (8, 8), 'squash', 'bilinear', (0.5,) * 3, (0.5,) * 3)\n"
        "    return torch.nn.Sequential(own_layers.Layer()), how\n"
    )
    digests = []
    for factor in (1, 2, 1):
        (tmp_path / "own_layers.py").write_text(
            "import torch\n"
            "class Layer(torch.nn.Module):\n"
            f"    def forward(self, images):\n        return images * {factor}\n"
        )
        for name in ("own_function", "own_layers"):
            sys.modules.pop(name, None)
        linecache.checkcache()
        _load_cached.cache_clear()
        digests.append(load_backbone(BackboneSpec("python:own_function:make")).weights)
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("name", "tag"),
    [("torchvision:resnet50", None), ("timm:resnet50", "a1_in1k"), ("timm:resnet50", None)],
)
def test_without_a_network(
    name: str, tag: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The network is asked once, and the library, which would retry for most of a minute, not at
    all.
    """
    import huggingface_hub
    import timm
    import torchvision.models

    asked: list[object] = []

    def unreachable(*args: object, **options: object) -> None:
        asked.append(args)
        raise urllib.error.URLError("Name or service not known")

    def not_to_be_called(*args: object, **options: object) -> None:
        raise AssertionError("the library was asked for weights without a network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(timm, "create_model", not_to_be_called)
    monkeypatch.setattr(torchvision.models, "get_model", not_to_be_called)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        BackboneError,
        match=r"(?s)cannot be downloaded.*Name or service.*weights: PATH.pth.*random:0",
    ):
        load_backbone(BackboneSpec(name, tag))
    assert len(asked) == 1


def test_every_model_has_a_name_and_every_family_builds() -> None:
    """All torchvision classifiers and all of timm are listed; one of each family is built without
    weights.
    """
    names = library.backbone_names()
    assert {
        "torchvision:vgg16",
        "torchvision:inception_v3",
        "timm:vit_base_patch16_224",
        "timm:convnext_base",
    } <= set(names)
    assert len(names) > 1000
    for name in (
        "torchvision:vgg16",
        "torchvision:vit_b_16",
        "timm:convnext_base",
        "timm:vit_base_patch16_dinov3",
    ):
        module, preprocessing = build_untrained(BackboneSpec(name))
        assert sum(parameter.numel() for parameter in module.parameters()) > 1e7
        assert next(module.parameters()).is_meta, "nothing is allocated to look at a network"
        assert preprocessing.crop[0] >= 224
    assert library.backbone_tags("torchvision:resnet50")[0] == "IMAGENET1K_V2"
    assert "a1_in1k" in library.backbone_tags("timm:resnet50")


@pytest.mark.slow
def test_every_family_of_torchvision_is_described() -> None:
    """The smallest of each family of torchvision's classifiers builds, runs on shapes alone, and
    offers taps.
    """
    from torchvision.models import get_model_weights

    smallest: dict[str, tuple[int, str]] = {}
    for name in [name for name in library.backbone_names() if name.startswith("torchvision:")]:
        weights = list(get_model_weights(name.removeprefix("torchvision:")))[-1]
        family = re.match(r"torchvision:[a-z]+(_v\d)?", name)
        assert family
        sized = (weights.meta["num_params"], name)
        smallest[family[0]] = min(smallest.get(family[0], sized), sized)
    assert len(smallest) >= 20
    for _, name in smallest.values():
        info = describe_backbone(BackboneSpec(name))
        assert info.multiply_adds > 1e7, name
        assert len(info.auto) >= 3, name


def test_the_backbones_command() -> None:
    """Searches by part of a name; shows a whole name's taps; answers a wrong one with
    the nearest.
    """
    import typer
    from typer.testing import CliRunner

    from headrace.pipelines.cli.backbones import backbones_command

    app = typer.Typer()
    app.command()(backbones_command)

    def output(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
        assert result.exit_code == 0, result
        return result.output

    assert "torchvision:vgg16_bn" in output("VGG16")
    assert "more of" in output("")
    shown = output("torchvision:resnet18")
    assert "11.7 M parameters, 1.81 G multiply-adds" in shown
    assert "layer4" in shown
    assert "layer4.1.conv2" not in shown
    assert "512x7x7" in shown
    assert "50,176" in shown
    assert "layer4.0.avg, layer4.0.max, pre_logits.vector]" in shown
    assert "layer4.1.conv2" in output("torchvision:resnet18", "--all")
    assert "128x4x4" in output("torchvision:resnet18", "--image-size", "32")
    refused = CliRunner().invoke(app, ["resnetx"])
    assert isinstance(refused.exception, BackboneError)
    assert "no model 'resnetx'. Nearest: " in str(refused.exception)
