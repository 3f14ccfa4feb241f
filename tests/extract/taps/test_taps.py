"""Every tap is what a forward hook on the untouched network gives, whatever the form in which the
network is run.
"""

import dataclasses
import itertools
import warnings

import pytest
import torch

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.backbones.nodes import find_nodes
from headrace.extract.errors import BackboneError
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.describe import feature_specs
from headrace.extract.taps.forward import make_forward, make_normalizer
from headrace.extract.taps.resolve import (
    MAX_AUTO_FEATURES,
    Tap,
    auto_taps,
    backbone_nodes,
    parse_tap,
    resolve_taps,
)

# Small inputs of families that differ: plain, residual, inverted residual, dense, multi-branch,
# grouped, ConvNeXt, class-token transformers of two libraries, windowed (channels last),
# squeeze-excite, pooling instead of attention.
ARCHITECTURES = [
    ("torchvision:alexnet", 64),
    ("torchvision:resnet18", 64),
    ("torchvision:inception_v3", 96),
    ("torchvision:googlenet", 64),
    ("torchvision:densenet121", 64),
    ("torchvision:mobilenet_v3_small", 64),
    ("torchvision:shufflenet_v2_x0_5", 64),
    ("torchvision:squeezenet1_1", 64),
    ("torchvision:efficientnet_b0", 64),
    ("timm:convnext_atto", 64),
    ("torchvision:regnet_y_400mf", 64),
    ("torchvision:swin_t", 64),
    ("timm:tf_efficientnet_lite0", 75),
    ("timm:mobilenetv4_conv_small", 64),
    ("timm:vit_tiny_patch16_224", 224),
    ("timm:poolformer_s12", 64),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As in a worker; and many threads on a busy machine wait for each other."""
    torch.set_num_threads(1)


def random_pixels(count: int, size: int) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (count, size, size, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(3),
    )


def hooked_outputs(
    module: torch.nn.Module, names: set[str], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The reference: plain forward hooks, outputs copied before anything can overwrite them."""
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: outputs.update({name: out.clone()})
        )
        for name in names
    ]
    with torch.inference_mode():
        module(x)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), ARCHITECTURES)
def test_taps_equal_forward_hooks_on_the_untouched_network(name: str, size: int) -> None:
    """For taps spread over the network, reduced in every way, in batches of 1 and 3; and the
    network's state stays.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own deprecations
        backbone = load_backbone(BackboneSpec(name, "random:0", image_size=size))
    before = {key: value.clone() for key, value in backbone.module.state_dict().items()}
    nodes = backbone_nodes(backbone)
    maps = [node for node in nodes.nodes if node.layout in ("NCHW", "NHWC") and min(node.shape) > 1]
    tokens = [node for node in nodes.nodes if node.layout == "NTC"]
    spread = (maps or tokens)[:: max(1, len(maps or tokens) // 9)]
    taps = [
        Tap(node.name, pooling)
        for node in spread
        for pooling in ("avg", "max", "gem", "grid2", "map")
    ]
    taps += [Tap(node.name, "cls") for node in spread if node.has_class_token]
    taps += [tap for tap in auto_taps(nodes) if tap not in taps and tap.node != "pre_logits"]
    pixels = random_pixels(3, size)
    x = make_normalizer(backbone, "cpu")(pixels)
    expected = hooked_outputs(backbone.module, {nodes[tap.node].module for tap in taps}, x)
    forward = make_forward(backbone, taps)
    for rows in (slice(0, 3), slice(1, 2)):
        for tap, found in zip(taps, forward(pixels[rows]), strict=True):
            node = nodes[tap.node]
            raw = expected[node.module][rows]
            if node.layout == "NHWC":
                raw = raw.movedim(-1, 1)
            elif node.layout == "NTC":
                if tap.pooling == "cls":
                    assert_close(found, raw[:, 0], tap)
                    continue
                side = int((raw.shape[1] - node.n_prefix_tokens) ** 0.5)
                raw = raw[:, node.n_prefix_tokens :].transpose(1, 2).unflatten(2, (side, side))
            assert_close(found, plainly_pooled(raw, tap.pooling), tap)
    after = backbone.module.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items()), (
        "the network's state has changed"
    )


def plainly_pooled(raw: torch.Tensor, pooling: str) -> torch.Tensor:
    flat = raw.flatten(2)
    if pooling == "avg":
        return flat.mean(2)
    if pooling == "vector":
        return raw
    if pooling == "max":
        return flat.max(2).values
    if pooling == "gem":
        return (flat.clamp(min=1e-6) ** 3).mean(2) ** (1 / 3)
    if pooling == "grid2":
        return torch.nn.functional.adaptive_avg_pool2d(raw, 2)
    return raw


def assert_close(found: torch.Tensor, expected: torch.Tensor, tap: Tap) -> None:
    scale = float(expected.abs().max()) or 1.0
    assert found.shape == expected.shape, f"{tap}: {found.shape} {expected.shape}"
    assert float((found - expected).abs().max()) <= 2e-4 * scale, str(tap)


def test_pre_logits_are_what_the_classifier_is_given() -> None:
    """In torchvision and timm alike, found by running and not by name."""
    for name, expected in (("torchvision:resnet18", "flatten"), ("timm:resnet18", "forward_head")):
        backbone = load_backbone(BackboneSpec(name, "random:1", image_size=64))
        pixels = random_pixels(2, 64)
        x = make_normalizer(backbone, "cpu")(pixels)
        with torch.inference_mode():
            if expected == "flatten":
                wanted = torch.nn.Sequential(*list(backbone.module.children())[:-1])(x).flatten(1)
            else:
                wanted = backbone.module.forward_head(
                    backbone.module.forward_features(x), pre_logits=True
                )  # type: ignore[operator]
        (found,) = make_forward(backbone, resolve_taps(backbone, ["pre_logits"]))(pixels)
        assert_close(found, wanted, Tap("pre_logits", "vector"))


def test_the_pass_ends_at_the_deepest_tap() -> None:
    """Nothing behind it runs: the modules after it are never called."""
    backbone = load_backbone(BackboneSpec("torchvision:resnet18", "random:0", image_size=64))
    called: list[str] = []
    handles = [
        child.register_forward_pre_hook(lambda _m, _a, name=name: called.append(name))
        for name, child in backbone.module.named_children()
    ]
    forward = make_forward(
        backbone, [Tap("layer2", "avg"), Tap("layer1", "max")]
    )  # copies the hooks too
    called.clear()
    forward(random_pixels(1, 64))
    for handle in handles:
        handle.remove()
    assert called[-1] == "layer2"
    assert "layer3" not in called


def test_shape_bytes_and_cost_of_nodes() -> None:
    """Shapes are those of a real forward; the cost rises along the network and ends at 1."""
    backbone = load_backbone(BackboneSpec("torchvision:resnet18", "random:0", image_size=64))
    nodes = backbone_nodes(backbone)
    assert nodes["layer4"].shape == (512, 2, 2)
    assert nodes["logits"].shape == (1000,)
    costs = [node.cost for node in nodes.nodes]
    assert costs == sorted(costs)
    assert costs[-1] == 1.0
    # 1.81 G multiply-adds at 224 x 224 in the literature, and 49 / 4 = 12.25 times fewer positions
    # at 64 x 64
    assert find_nodes(
        backbone.module, (224, 224, 3), "resnet18", None
    ).multiply_adds == pytest.approx(1.814e9, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "torchvision:resnet18",
            "layer1.* layer2.* layer3.0.* layer3.* layer4.0.* pre_logits.vector",
        ),
        (
            "timm:tf_efficientnet_lite0",
            "blocks.1.* blocks.2.* blocks.3.* blocks.4.* blocks.5.* blocks.6.* pre_logits.vector",
        ),
        # its widest middles would be more than MOST_FEATURES
        ("timm:resnet50", "layer1.* layer2.* layer3.2.* layer3.* pre_logits.vector"),
        (  # what its classifier is given is another layer's, so the last map is there too
            "torchvision:alexnet",
            "features.4.* features.8.* features.11.* pre_logits.vector",
        ),
        (
            "timm:vit_tiny_patch16_224",
            "blocks.2.* blocks.5.* blocks.8.cls blocks.8.* blocks.9.cls blocks.10.cls "
            "blocks.11.cls blocks.11.* pre_logits.vector",
        ),
    ],
)
def test_auto_picks_early_to_late(name: str, expected: str) -> None:
    backbone = load_backbone(BackboneSpec(name, "random:0"))
    wanted = " ".join(
        f"{text[:-1]}avg {text[:-1]}max" if text.endswith("*") else text
        for text in expected.split()
    )
    assert " ".join(str(tap) for tap in resolve_taps(backbone, "auto")) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "torchvision:resnet18",
        "timm:tf_efficientnet_lite0",
        "torchvision:squeezenet1_1",
        "timm:mobilenetv3_small_050",
        "timm:dla34",  # a stage that is a convolution, its normalization and its activation
        "torchvision:alexnet",  # convolutions, activations and poolings in one row
    ],
)
def test_no_automatic_tap_is_another_one(name: str) -> None:
    """No column stands twice in "all", but for one that is normalized once more, which the widths
    show.
    """
    backbone = load_backbone(BackboneSpec(name, "random:0", image_size=64))
    taps = resolve_taps(backbone, "auto")
    found = [tensor.flatten(1) for tensor in make_forward(backbone, taps)(random_pixels(4, 64))]
    assert sum(tensor.shape[1] for tensor in found) <= MAX_AUTO_FEATURES
    for (first, a), (second, b) in itertools.combinations(zip(taps, found, strict=True), 2):
        assert a.shape != b.shape or not torch.allclose(
            a.float(), b.float(), rtol=1e-3, atol=1e-3
        ), (first, second)


def test_taps_that_cannot_be() -> None:
    """Each mistake is answered with what would be right."""
    resnet = load_backbone(BackboneSpec("torchvision:resnet18", "random:0", image_size=64))
    for text, message in (
        (
            "layer9.avg",
            r"no node 'layer9'. Nearest: layer\d.*headrace backbones torchvision:resnet18",
        ),
        ("layer1.median", r"no node 'layer1.median'.*The poolings of layer1 are avg, max, gem"),
        ("layer1.0.relu.avg", r"runs more than once.*Tap the block around it: layer1.0"),
        ("layer4.cls", "has no class token; try layer4.avg"),
        ("fc.grid2", "nothing to pool"),
        ("layer4.vector", "not a vector"),
        ("", "a tap is empty"),
        ("avg", "names a pooling and no node; expected something like layer4.avg"),
    ):
        with pytest.raises(BackboneError, match=message):
            resolve_taps(resnet, [text])
    with pytest.raises(BackboneError, match="no taps"):
        resolve_taps(resnet, [])


def test_tap_words() -> None:
    """No pooling and "mean" are the average, and the same tap twice is one tap."""
    assert (
        parse_tap("layer4")
        == parse_tap("layer4.mean")
        == parse_tap("layer4.avg")
        == Tap("layer4", "avg")
    )
    assert parse_tap("features.12.grid3") == Tap("features.12", "grid3")
    resnet = load_backbone(BackboneSpec("torchvision:resnet18", "random:0", image_size=64))
    assert resolve_taps(resnet, ["layer4", "layer4.avg", "fc.avg"]) == (
        Tap("layer4", "avg"),
        Tap("fc", "vector"),
    )


def test_feature_specs_tell_everything_apart() -> None:
    """Another tap, pooling, view, size, weight or dtype is another feature set; the same again is
    the same.
    """
    spec = BackboneSpec("torchvision:resnet18", "random:0", image_size=64)
    backbone = load_backbone(spec)
    taps = resolve_taps(backbone, ["layer1.avg", "layer1.max", "layer2.avg"])
    prints = [each.fingerprint for each in feature_specs(backbone, taps, views=3)]
    other_weights = load_backbone(BackboneSpec("torchvision:resnet18", "random:1", image_size=64))
    other_size = load_backbone(BackboneSpec("torchvision:resnet18", "random:0", image_size=96))
    for other in (
        feature_specs(backbone, taps, dtype="float32"),
        feature_specs(backbone, taps, compute_dtype="bfloat16"),
        feature_specs(other_weights, taps),
        feature_specs(other_size, taps),
    ):
        prints += [each.fingerprint for each in other]
    assert len(set(prints)) == len(prints) == 9 + 12
    again = load_backbone(BackboneSpec("torchvision:resnet18", "random:0", image_size=64))
    assert [each.fingerprint for each in feature_specs(again, taps, views=3)] == prints[:9]


def test_half_precision_passes_stay_close() -> None:
    """bfloat16 has 8 bits: the averaged features agree to some percent, and are not the float32
    ones.
    """
    backbone = load_backbone(BackboneSpec("torchvision:resnet18", "random:0", image_size=64))
    taps = resolve_taps(backbone, ["layer3.avg"])
    pixels = random_pixels(2, 64)
    (full,), (half,) = (
        make_forward(backbone, taps)(pixels),
        make_forward(backbone, taps, compute_dtype="bfloat16")(pixels),
    )
    error = float((half.float() - full).norm() / full.norm())
    assert 1e-5 < error < 0.05


def test_dtypes_and_views_that_are_not() -> None:
    backbone = load_backbone(BackboneSpec("torchvision:resnet18", "random:0", image_size=64))
    taps = resolve_taps(backbone, ["layer1"])
    for options, message in (
        ({"dtype": "int4"}, "dtype is 'int4'; expected one of float16"),
        ({"compute_dtype": "uint8"}, "compute_dtype is 'uint8'; expected one of float32"),
        ({"views": 0}, "views is 0; expected at least 1"),
        ({"views": 9, "symmetric": True}, "views is 9; expected at most 8"),
    ):
        with pytest.raises(BackboneError, match=message):
            feature_specs(backbone, taps, **options)
    wide = dataclasses.replace(
        backbone, preprocessing=dataclasses.replace(backbone.preprocessing, crop=(64, 96))
    )
    with pytest.raises(BackboneError, match="64 × 96 pixels"):
        feature_specs(wide, taps, views=8, symmetric=True)
