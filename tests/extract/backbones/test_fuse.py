"""The fast CPU form: used where it is the same network, and not where it would not be."""

import copy

import pytest
import torch
from torch import Tensor, nn

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.backbones.fused import (
    _FusedConv,
    _FusedLinear,
    _FusedPointwise,
    can_fuse,
    fold_batch_norms,
    fuse_layers,
    outputs_agree,
)
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.forward import hook_forward, make_forward, make_normalizer
from headrace.extract.taps.resolve import backbone_nodes, resolve_taps

pytestmark = pytest.mark.skipif(not can_fuse(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def to_32_pixels() -> Preprocessing:
    return Preprocessing((32, 32), (32, 32), "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class UsedTwice(nn.Module):
    """The convolution's output goes into the normalization and, before it, into a sum: folding
    would change the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x)
        out: Tensor = self.head(self.norm(raw) + raw)
        return out


def used_twice() -> tuple[nn.Module, Preprocessing]:
    torch.manual_seed(0)
    module = UsedTwice()
    nn.init.normal_(module.norm.running_mean, std=2.0)  # type: ignore[arg-type]
    return module, to_32_pixels()


class SharedActivation(nn.Module):
    """One activation module in two places: after a convolution, and after a sum that no kernel has
    activated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        out: Tensor = self.act(self.second(x) - x)
        return out


def shared_activation() -> tuple[nn.Module, Preprocessing]:
    torch.manual_seed(0)
    return SharedActivation(), to_32_pixels()


class OwnMoments(nn.BatchNorm2d):
    """Normalizes each batch by its own moments, also in evaluation."""

    def train(self, mode: bool = True) -> "OwnMoments":
        return super().train()


def own_moments() -> tuple[nn.Module, Preprocessing]:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), OwnMoments(8, momentum=0), nn.Conv2d(8, 4, 1)
    ), to_32_pixels()


def outputs(name: str, taps: list[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the pass gives, and what the untouched modules give."""
    backbone = load_backbone(BackboneSpec(f"python:{__name__}:{name}"))
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    found = make_forward(backbone, resolve_taps(backbone, taps))(pixels)
    wanted: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, key=key: wanted.update({key: out.clone()}))
        for key, module in backbone.module.named_modules()
    ]
    with torch.inference_mode():
        backbone.module(make_normalizer(backbone, "cpu")(pixels))
    for handle in handles:
        handle.remove()
    return found, wanted


def test_a_value_that_is_used_twice() -> None:
    """What the watch of one run cannot see, the comparison of results does."""
    (head,), wanted = outputs("used_twice", ["head.map"])
    assert outputs_agree([head], [wanted["head"]])
    backbone = load_backbone(BackboneSpec(f"python:{__name__}:used_twice"))
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        wrongly = fuse_layers(backbone.module, {"head"}, x)
        assert not outputs_agree([wrongly(x)], [backbone.module(x)]), (
            "else this network tests nothing"
        )


def test_an_activation_in_two_places() -> None:
    """It is passed over exactly where a kernel has applied it."""
    (logits,), wanted = outputs("shared_activation", ["logits.map"])
    assert outputs_agree([logits], [wanted[""]])
    assert float(logits.min()) == 0


def test_a_normalization_that_stays_in_training_mode() -> None:
    """It is not folded. Extraction refuses such a network, on accelerators only after folding."""
    module = load_backbone(BackboneSpec(f"python:{__name__}:own_moments")).module
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        for fold in (fuse_layers, fold_batch_norms):
            assert outputs_agree([fold(module, set(), image)(image)], [module(image)])


def test_taps_inside_what_could_be_fused() -> None:
    """A tapped convolution is before its normalization, a tapped normalization before its
    activation.
    """
    for tap in ("first", "norm", "second"):
        (found,), wanted = outputs("shared_activation", [f"{tap}.map"])
        assert outputs_agree([found], [wanted[tap]]), tap
        assert float(wanted[tap].min()) < 0


@pytest.mark.parametrize(
    "name", ["timm:tf_efficientnet_lite0", "torchvision:resnet18", "timm:mobilenetv4_conv_small"]
)
def test_ordinary_networks_are_fused(name: str) -> None:
    """Every convolution with a normalization becomes one kernel; without this the form would be
    quietly unused.
    """
    backbone = load_backbone(BackboneSpec(name, "random:0", image_size=64))
    module = fuse_layers(backbone.module, set(), torch.zeros(1, 3, 64, 64))
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    assert norms == []
    assert sum(isinstance(child, _FusedConv | _FusedPointwise) for child in module.modules()) >= 20
    assert any(isinstance(child, nn.BatchNorm2d) for child in backbone.module.modules()), (
        "the original is untouched"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "taps", "left"),
    [
        ("torchvision:resnet18", ["layer2.avg", "layer4.avg"], nn.BatchNorm2d),
        ("timm:test_vit", ["blocks.1.avg", "norm.avg"], nn.Linear),
        ("timm:test_resnet", ["layer2.avg", "layer4.avg"], nn.BatchNorm2d),
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_whole_networks_are_fused_and_stay_the_same(
    name: str, taps: list[str], left: type[nn.Module], batch: int
) -> None:
    """Shortcuts that are added to the very tensor (torchvision's ResNets), GELU behind linear
    layers; at the first batch, whose shape the weights are laid out for, and at others.
    """
    size = 64 if name == "torchvision:resnet18" else None
    backbone = load_backbone(BackboneSpec(name, "random:0", image_size=size))
    nodes = backbone_nodes(backbone)
    placed = [(tap, nodes[tap.node]) for tap in resolve_taps(backbone, taps)]
    normalize = make_normalizer(backbone, "cpu")
    shape = (batch, *backbone.preprocessing.crop, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    fused = fuse_layers(backbone.module, {node.module for _, node in placed}, normalize(pixels[:1]))
    assert not any(type(module) is left for module in fused.modules())
    plain = hook_forward(copy.deepcopy(backbone.module), placed, normalize, "float32")(pixels)
    faster = hook_forward(fused, placed, normalize, "float32")
    for count in (batch, 1, batch):
        ours = faster(pixels[:count])
        assert outputs_agree(ours, [output[:count] for output in plain])
    for ours, theirs in zip(
        make_forward(backbone, [tap for tap, _ in placed])(pixels), faster(pixels), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_tapped_linear_layer_is_not_activated() -> None:
    """Its own output is asked for."""
    backbone = load_backbone(BackboneSpec("timm:test_vit", "random:0"))
    image = make_normalizer(backbone, "cpu")(
        torch.zeros((1, *backbone.preprocessing.crop, 3), dtype=torch.uint8)
    )
    fused = fuse_layers(backbone.module, {"blocks.0.mlp.fc1"}, image)
    assert type(fused.get_submodule("blocks.0.mlp.fc1")) is nn.Linear
    assert type(fused.get_submodule("blocks.1.mlp.fc1")) is _FusedLinear
