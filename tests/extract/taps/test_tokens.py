"""Tokens: which of them are patches is declared by the network or asked of the recipe, and never
guessed; layers that return tuples are taps; an ONNX graph runs once.
"""

import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from headrace.extract.backbones.backbone import Backbone, load_backbone
from headrace.extract.backbones.nodes import PrefixTokens
from headrace.extract.errors import BackboneError
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.forward import make_forward, make_normalizer
from headrace.extract.taps.resolve import backbone_nodes, resolve_taps

HOW = Preprocessing((64, 64), (64, 64), "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PIXELS = torch.randint(
    0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class Tokens(nn.Module):
    """16 patches of 64 pixels, after tokens whose parameters are called as asked."""

    def __init__(self, **counts: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, 16)
        self.block = nn.Linear(8, 8)
        self.names = list(counts)
        for name, count in counts.items():
            self.register_parameter(name, nn.Parameter(torch.randn(1, count, 8)))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        before = [getattr(self, name).expand(len(images), -1, -1) for name in self.names]
        return self.block(torch.cat([*before, patches], dim=1)).mean(1)  # type: ignore[no-any-return]


class StorageTokens(Tokens):
    """As DINOv3 says it: a number, and tokens under a name of their own."""

    n_storage_tokens = 4

    def __init__(self) -> None:
        super().__init__(cls_token=1, extra=4)


def unknown(count: int = 5) -> tuple[nn.Module, Preprocessing]:
    torch.manual_seed(0)
    return Tokens(learned=count), HOW


def registers() -> tuple[nn.Module, Preprocessing]:
    return Tokens(cls_token=1, register_tokens=4), HOW


def distilled() -> tuple[nn.Module, Preprocessing]:
    return Tokens(cls_token=1, dist_token=1), HOW


def storage() -> tuple[nn.Module, Preprocessing]:
    return StorageTokens(), HOW


@pytest.mark.parametrize(
    ("function", "count"), [("registers", 5), ("distilled", 2), ("storage", 5)]
)
def test_declared_tokens_are_left_out(function: str, count: int) -> None:
    backbone = load_backbone(BackboneSpec(f"python:{__name__}:{function}"))
    node = backbone_nodes(backbone)["block"]
    assert (node.shape, node.n_prefix_tokens, node.has_class_token) == (
        (16 + count, 8),
        count,
        True,
    )
    average, grid, first = make_forward(
        backbone, resolve_taps(backbone, ["block.avg", "block.map", "block.cls"])
    )(PIXELS)
    tokens = hooked(backbone, "block")
    torch.testing.assert_close(average, tokens[:, count:].mean(1))
    torch.testing.assert_close(grid.flatten(2), tokens[:, count:].transpose(1, 2))
    torch.testing.assert_close(first, tokens[:, 0])


def hooked(backbone: Backbone, node: str) -> Tensor:
    """What a plain hook on the untouched network sees, the first value where there are several."""
    seen: list[Tensor] = []
    handle = backbone.module.get_submodule(node).register_forward_hook(
        lambda *args: seen.append(args[2][0] if isinstance(args[2], tuple) else args[2])
    )
    with torch.inference_mode():
        backbone.module(make_normalizer(backbone, "cpu")(PIXELS))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("pooling", ["avg", "map", "max", "gem", "grid2"])
def test_tokens_that_nothing_explains_are_refused(pooling: str) -> None:
    """With what to type, which then works, and makes other feature sets."""
    name = f"python:{__name__}:unknown"
    with pytest.raises(
        BackboneError,
        match=rf"block\.{pooling} would average or map 21 tokens.*4 x 4 patches and 5 more.*"
        r"prefix_tokens: 5 in the recipe's backbone",
    ):
        resolve_taps(load_backbone(BackboneSpec(name)), [f"block.{pooling}"])
    asked = load_backbone(BackboneSpec(name, prefix_tokens=5))
    (average,) = make_forward(asked, resolve_taps(asked, ["block.avg"]))(PIXELS)
    torch.testing.assert_close(average, hooked(asked, "block")[:, 5:].mean(1))
    assert asked.weights != load_backbone(BackboneSpec(name)).weights


def test_a_wrong_count_is_refused_too() -> None:
    backbone = load_backbone(BackboneSpec(f"python:{__name__}:unknown", prefix_tokens=3))
    with pytest.raises(BackboneError, match="nothing explains"):
        resolve_taps(backbone, ["block.avg"])
    named = load_backbone(
        BackboneSpec(f"python:{__name__}:unknown", prefix_tokens=7, model={"count": 7})
    )
    assert str(resolve_taps(named, ["block.avg"])[0]) == "block.avg"


def test_four_registers_of_timm() -> None:
    """DINOv2 with registers, small: class token and registers are no patches, patches alone are."""
    arguments = {"reg_tokens": 4, "class_token": True}
    backbone = load_backbone(BackboneSpec("timm:test_vit", "random:0", model=arguments))
    node = backbone_nodes(backbone)["norm"]
    assert (node.n_prefix_tokens, node.shape[0]) == (5, 105)


def test_patches_alone_have_nothing_before_them() -> None:
    """Inside of a network whose tokens come later; nor does a count have to be a square."""
    tokens = PrefixTokens(5, n_patches=12)
    assert [tokens.before_patches(count) for count in (21, 16, 17, 12)] == [5, 0, 5, 0]
    assert tokens.before_patches(19) is None


transformers_models = [
    ("Swin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}, "layers"),
    (
        "Data2VecVision",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "use_shared_relative_position_bias": False,
            "use_relative_position_bias": True,
        },
        "layer",
    ),
]


@pytest.mark.parametrize(("kind", "fields", "layers"), transformers_models)
def test_layers_that_return_tuples_are_taps(
    tmp_path: Path, kind: str, fields: dict[str, object], layers: str
) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(image_size=64, patch_size=8, **fields)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    size = {"height": 64, "width": 64}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path)
    backbone = load_backbone(BackboneSpec(f"transformers:{tmp_path}"))
    node = f"encoder.{layers}.1"
    (average,) = make_forward(backbone, resolve_taps(backbone, [f"{node}.avg"]))(PIXELS)
    n_prefix = 0 if kind == "Swin" else 1
    expected = hooked(backbone, node)[:, n_prefix:].mean(1)
    torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def onnx_vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = timm.create_model("test_vit", img_size=64, dynamic_img_size=False).eval()
    file = tmp_path_factory.mktemp("onnx") / "vit.onnx"
    with warnings.catch_warnings():  # of the tracer, that shapes become constants
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(1, 3, 64, 64),), str(file), dynamo=False, input_names=["image"],
            dynamic_axes={"image": {0: "n"}}, opset_version=17,
        )  # fmt: skip
    return file, network


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tokens_of_onnx_are_asked_for(onnx_vit: tuple[Path, nn.Module]) -> None:
    """And then are those of the network that the file was made of."""
    file, network = onnx_vit
    names = backbone_nodes(load_backbone(BackboneSpec(f"onnx:{file}"))).names
    last = next(name for name in reversed(names) if name.startswith("blocks.blocks.5."))
    with pytest.raises(BackboneError, match=r"17 tokens.*4 x 4 patches and 1 more"):
        resolve_taps(load_backbone(BackboneSpec(f"onnx:{file}")), [f"{last}.avg"])
    backbone = load_backbone(BackboneSpec(f"onnx:{file}", prefix_tokens=1))
    seen: list[Tensor] = []
    handle = network.blocks[5].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.inference_mode():
        logits = network(make_normalizer(backbone, "cpu")(PIXELS))
    handle.remove()
    taps = resolve_taps(backbone, [f"{last}.avg", f"{last}.cls", f"{last}.map", "logits"])
    average, first, grid, given = make_forward(backbone, taps)(PIXELS)
    for found, expected in (
        (average, seen[0][:, 1:].mean(1)),
        (first, seen[0][:, 0]),
        (grid.flatten(2), seen[0][:, 1:].transpose(1, 2)),
        (given, logits),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_auto_takes_the_blocks_of_onnx(onnx_vit: tuple[Path, nn.Module]) -> None:
    """Each by the last value in its scope, which is the block's output."""
    file, network = onnx_vit
    with pytest.raises(BackboneError, match="prefix_tokens: 1"):
        resolve_taps(load_backbone(BackboneSpec(f"onnx:{file}")), "auto")
    backbone = load_backbone(BackboneSpec(f"onnx:{file}", prefix_tokens=1))
    taps = resolve_taps(backbone, "auto")
    of_torch = load_backbone(BackboneSpec("timm:test_vit", "random:0"))
    assert len(taps) == len(resolve_taps(of_torch, "auto")) - 1  # pre_logits has no name in ONNX
    found = make_forward(backbone, taps)(PIXELS)
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda *args: outputs.append(args[2]))
        for block in network.blocks
    ]
    with torch.inference_mode():
        network(make_normalizer(backbone, "cpu")(PIXELS))
    for handle in handles:
        handle.remove()
    expected = []
    for block, tokens in enumerate(outputs):
        patches = tokens[:, 1:]
        expected += [tokens[:, 0]] if block >= 2 else []
        expected += [patches.mean(1), patches.amax(1)] if block in (1, 2, 4, 5) else []
    torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_onnx_graph_runs_once(
    onnx_vit: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For inner values and its own output together."""
    from headrace.extract.backbones.onnx_network import OnnxNetwork

    backbone = load_backbone(BackboneSpec(f"onnx:{onnx_vit[0]}", prefix_tokens=1))
    inner = next(name for name in backbone_nodes(backbone).names if ".blocks.3." in name)
    forward = make_forward(backbone, resolve_taps(backbone, [f"{inner}.cls", "logits"]))
    runs: list[list[str]] = []
    run = OnnxNetwork._run
    monkeypatch.setattr(
        OnnxNetwork, "_run", lambda self, names, x: (runs.append(names), run(self, names, x))[1]
    )
    forward(PIXELS)
    assert [len(names) for names in runs] == [2]
