"""Arguments of a library's builder, networks of timm from the hub and from folders, and one
sentence where weights cannot be had.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import errors
from timm.models import save_for_hf
from torch import nn

from headrace.extract.backbones import library
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.errors import BackboneError
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.spec import BackboneSpec, absolute_name, backbone_from_fields, backbone_path
from headrace.extract.taps.describe import feature_specs
from headrace.extract.taps.forward import make_forward, make_normalizer
from headrace.extract.taps.resolve import backbone_nodes, resolve_taps
from headrace.pipelines.recipe.load import load_recipe

VIT = "timm:test_vit"


def own_network(width: int = 4, *, bias: bool = True) -> tuple[nn.Module, Preprocessing]:
    module = nn.Sequential(nn.Conv2d(3, width, 3, bias=bias), nn.ReLU())
    return module, Preprocessing((32, 32), (32, 32), "squash", "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_arguments_reach_the_builder() -> None:
    """Of timm, torchvision and one's own function; at the input size that they name."""
    vit = load_backbone(
        BackboneSpec(VIT, "random:0", model={"img_size": 96, "reg_tokens": 4, "init_values": 1e-5})
    )
    assert backbone_nodes(vit)["norm"].shape[0] == 1 + 4 + 36
    assert vit.preprocessing.crop == (96, 96)
    assert float(vit.module.blocks[0].ls1.gamma[0].detach()) == pytest.approx(1e-5)
    resnet = load_backbone(
        BackboneSpec("torchvision:resnet18", "random:0", image_size=64, model={"num_classes": 7})
    )
    assert backbone_nodes(resnet)["logits"].shape == (7,)
    own = load_backbone(BackboneSpec(f"python:{__name__}:own_network", model={"width": 6}))
    assert backbone_nodes(own)["0"].shape[0] == 6


def test_classes_of_timm_are_named() -> None:
    """As UNI 2 and Virchow 2 are built: a packed SwiGLU instead of the MLP."""
    arguments = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": 4.0}
    module = load_backbone(BackboneSpec(VIT, "random:0", model=arguments)).module
    assert type(module.blocks[0].mlp) is timm.layers.GluMlp
    with pytest.raises(BackboneError, match=r"mlp_layer 'system' is no layer of timm\.layers"):
        load_backbone(BackboneSpec(VIT, "random:0", model={"mlp_layer": "system"}))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (VIT, {"reg_token": 4}, r"cannot be built with model: \{\"reg_token\": 4\}.*reg_token"),
        (VIT, {"checkpoint_path": "/etc/passwd"}, "checkpoint_path is not an argument of the"),
        (VIT, {"pretrained_cfg": {"file": "/x"}}, "pretrained_cfg is not an argument"),
        (VIT, {"features_only": True}, "features_only is not an argument"),
        ("transformers:/", {"_attn_implementation": "a/b"}, "_attn_implementation is not an arg"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "weights is not an argument"),
        ("torchvision:resnet18", {"depth": 3}, r"cannot be built with model: \{\"depth\": 3\}"),
        ("timm:test_resnet", {"in_chans": 5}, r"in_chans is 5, .* named: bands: \[1, 2, 3, 4, 5\]"),
        (f"python:{__name__}:own_network", {"size": 3}, "unexpected keyword argument 'size'"),
    ],
)
def test_arguments_that_are_not(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(BackboneSpec(name, "random:0", model=arguments))


@pytest.mark.parametrize(
    "arguments",
    [{"a": float("nan")}, {"a": nn.ReLU}, {"not a name": 1}, {"a": "x" * 20_000}, "[1]"],
)
def test_values_are_plain(arguments: object) -> None:
    with pytest.raises(BackboneError, match=r"expected arguments of plain values, such as model:"):
        BackboneSpec(VIT, model=arguments)  # type: ignore[arg-type]


def test_num_classes_is_refused_where_timm_would_compare_no_names() -> None:
    with pytest.raises(BackboneError, match="num_classes changes the head alone"):
        load_backbone(BackboneSpec("timm:resnet18", model={"num_classes": 7}))


def test_arguments_are_part_of_the_identity() -> None:
    """In any order, through JSON and back; others are other features, though no tensor differs."""
    one = BackboneSpec(VIT, "random:0", model={"b": 2, "a": [1, None]})
    assert one == BackboneSpec(VIT, "random:0", model={"a": [1, None], "b": 2})
    assert hash(one) == hash(dataclasses.replace(one))
    assert backbone_from_fields(json.loads(json.dumps(dataclasses.asdict(one)))) == one
    assert one.model_arguments == {"a": [1, None], "b": 2}
    assert BackboneSpec(VIT, model={}) == BackboneSpec(VIT)
    plain, other = (
        load_backbone(BackboneSpec(VIT, "random:0", model=arguments))
        for arguments in (None, {"dynamic_img_pad": True})
    )
    taps = resolve_taps(plain, ["norm.cls"])
    assert all(map(torch.equal, plain.module.parameters(), other.module.parameters()))
    assert feature_specs(plain, taps)[0].fingerprint != feature_specs(other, taps)[0].fingerprint


@pytest.fixture
def timm_folder(tmp_path: Path) -> tuple[Path, nn.Module]:
    """What timm saves for the hub, of a network that was built with arguments."""
    torch.manual_seed(0)
    arguments = {"img_size": 64, "reg_tokens": 4, "init_values": 0.1, "num_classes": 0}
    network = timm.create_model("test_vit", **arguments).eval()
    save_for_hf(network, tmp_path / "net", model_args=arguments)
    return tmp_path / "net", network


def test_a_folder_that_timm_saved(timm_folder: tuple[Path, nn.Module]) -> None:
    """Its numbers are those of the network, its arguments are read, and count in the digest."""
    folder, network = timm_folder
    backbone = load_backbone(BackboneSpec(f"timm:local-dir:{folder}", image_size=64))
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    average, first = make_forward(backbone, resolve_taps(backbone, ["norm.avg", "norm.cls"]))(
        pixels
    )
    with torch.inference_mode():
        tokens = network.forward_features(make_normalizer(backbone, "cpu")(pixels))  # type: ignore[operator]
    torch.testing.assert_close(average, tokens[:, 5:].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first, tokens[:, 0], rtol=1e-4, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["act_layer"] = "silu"
    (folder / "config.json").write_text(json.dumps(config))
    assert load_backbone(BackboneSpec(f"timm:local-dir:{folder}")).weights != backbone.weights


def test_a_folder_is_found_from_the_recipe_and_nowhere_else(
    timm_folder: tuple[Path, nn.Module],
) -> None:
    folder, _ = timm_folder
    recipe = folder.parent / "recipe.yaml"
    (folder.parent / "images").mkdir()
    recipe.write_text(
        "images: {folder: images}\nbackbones:\n  - name: timm:local-dir:net\n"
        "    model: {reg_tokens: 4}\n    prefix_tokens: 5\n    weights_prefix: teacher.\n"
    )
    (backbone,) = load_recipe(recipe).backbones
    assert (backbone.name, backbone.alias) == (f"timm:local-dir:{folder}", "timm:local-dir:net")
    assert (backbone.model, backbone.prefix_tokens) == ({"reg_tokens": 4}, 5)
    assert absolute_name("timm:hf-hub:timm/resnet18", folder) == "timm:hf-hub:timm/resnet18"
    assert backbone_path("timm:hf-hub:timm/resnet18") is None
    with pytest.raises(BackboneError, match="no such file or folder"):
        load_backbone(BackboneSpec("timm:local-dir:/no/such/folder"))
    (folder / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"is not a model that timm saved.*config\.json"):
        load_backbone(BackboneSpec(f"timm:local-dir:{folder}", image_size=32))


def hub_error(kind: type[Exception]) -> Exception:
    """An exception of the hub's library, whatever it wants to be made with."""
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error")
    return error


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            errors.GatedRepoError,
            r"is gated: accept its licence at .*/ORG/NAME, log in with `hf auth",
        ),
        (errors.RepositoryNotFoundError, r"the hub has no model ORG/NAME, or it is private"),
        (errors.LocalEntryNotFoundError, r"cannot be reached: fetch it .*hf download ORG/NAME"),
        (errors.OfflineModeIsEnabled, r"cannot be reached: fetch it .*hf download ORG/NAME"),
        (errors.RemoteEntryNotFoundError, r"lacks a file that this library needs"),
    ],
)
@pytest.mark.parametrize(
    "name", ["timm:hf-hub:ORG/NAME", "transformers:ORG/NAME", "open_clip:hf-hub:ORG/NAME"]
)
def test_one_sentence_where_the_hub_refuses(
    name: str, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the library's own exception, wrapped as each library does it."""
    import huggingface_hub

    def refuse(*args: object, **options: object) -> None:
        raise hub_error(kind)

    pytest.importorskip(name.partition(":")[0])
    monkeypatch.setattr(library, "_require_network", lambda *args: None)
    for module in (
        "timm.models._hub",
        "transformers.utils.hub",
        "open_clip.pretrained",
        "open_clip.factory",
    ):
        for function in ("hf_hub_download", "cached_download"):
            monkeypatch.setattr(f"{module}.{function}", refuse, raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(BackboneError, match=f"^{name}.*{said}") as raised:
        load_backbone(BackboneSpec(name))
    assert "\n" not in str(raised.value)


def test_names_of_the_hub_that_are_not() -> None:
    for name in ("timm:hf-hub:a/b/c", "open_clip:hf-hub:a/b/c"):
        with pytest.raises(BackboneError, match="neither a folder nor a name of the hub"):
            load_backbone(BackboneSpec(name))
    with pytest.raises(BackboneError, match="holds its own weights, and has no tag 'a1'"):
        load_backbone(BackboneSpec("timm:hf-hub:timm/resnet18", "a1"))
