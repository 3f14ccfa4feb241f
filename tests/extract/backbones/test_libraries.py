"""Networks of transformers, open_clip and ONNX: their own numbers, at their own and at other sizes,
and one sentence where they cannot be had.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import run_here
from support.runs import make_photos

from headrace import load_model
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.backbones.open_clip_tower import _weights_tag
from headrace.extract.errors import BackboneError
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.preprocessing import render_crop
from headrace.extract.spec import BackboneSpec, absolute_name, weights_stamp
from headrace.extract.taps.describe import describe_backbone, feature_specs
from headrace.extract.taps.forward import make_forward, make_normalizer
from headrace.extract.taps.left_out import WeightsWarning
from headrace.extract.taps.resolve import auto_taps, backbone_nodes, resolve_taps
from headrace.heads.persist import CodeNotTrusted
from headrace.pipelines.recipe.load import load_recipe

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50_000,
}
SQUASH = {"size": {"height": 56, "width": 56}}
CROP = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "resample": 3}
# what a folder is made of: (model, configuration, image processor); its last block, prefix tokens
FOLDERS = {
    "dinov2": ("Dinov2", {**SIZES, "mlp_ratio": 2}, ("Bit", CROP), "encoder.layer.3", 1),
    "registers": (
        "Dinov2WithRegisters",
        {**SIZES, "mlp_ratio": 2, "num_register_tokens": 4},
        ("Bit", CROP),
        "encoder.layer.3",
        5,
    ),
    "dinov3": (
        "DINOv3ViT",
        {**SIZES, "intermediate_size": 64, "num_register_tokens": 4},
        ("ViT", SQUASH),
        "model.layer.3",
        5,
    ),
    "vit": ("ViT", {**SIZES, "intermediate_size": 64}, ("ViT", SQUASH), "layers.3", 1),
    "deit": ("DeiT", {**SIZES, "intermediate_size": 64}, ("ViT", SQUASH), "layers.3", 2),
    "siglip": (
        "Siglip",
        {"text_config": TEXT, "vision_config": {**SIZES, "intermediate_size": 64}},
        ("Siglip", SQUASH),
        "encoder.layers.3",
        0,
    ),
    "clip": (
        "CLIP",
        {"text_config": TEXT, "vision_config": {**SIZES, "intermediate_size": 64}},
        ("CLIP", {**CROP, "size": {"shortest_edge": 56}}),
        "encoder.layers.3",
        1,
    ),
}


def save_folder(folder, kind):
    """A small model of transformers as `save_pretrained` writes it, and its image processor."""
    model_name, fields, (processor_name, options), *_ = FOLDERS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{model_name}Config")(**fields)
    model = getattr(transformers, f"{model_name}Model")(config).eval()
    processor = getattr(transformers, f"{processor_name}ImageProcessor")(**options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def photo(width=90, height=70):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], 2).astype(np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {kind: (root / kind, *save_folder(root / kind, kind)) for kind in FOLDERS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_transformers_gives_its_own_numbers(folders, kind):
    """Features of the last block equal a hook on the model as transformers loads it, on pixels of
    its own image processor; class and register tokens are left out of the average.
    """
    folder, _, processor = folders[kind]
    node, n_prefix = FOLDERS[kind][3:]
    backbone = load_backbone(BackboneSpec(f"transformers:{folder}"))
    untouched = transformers.AutoModel.from_pretrained(folder)
    untouched = getattr(untouched, "vision_model", untouched).eval()
    seen = []
    untouched.get_submodule(node).register_forward_hook(lambda *args: seen.append(args[2]))
    image = photo()
    with torch.no_grad():
        untouched(pixel_values=processor(image, return_tensors="pt")["pixel_values"])
    tokens = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    taps = resolve_taps(backbone, [f"{node}.avg", f"{node}.map"])
    pixels = torch.from_numpy(render_crop(image, backbone.preprocessing).copy())[None]
    average, grid = make_forward(backbone, taps)(pixels)
    # Pillow and torchvision round an enlarged pixel differently, by one of 255
    np.testing.assert_allclose(average[0], tokens[0, n_prefix:].mean(0), atol=2e-2)
    assert grid.shape == (1, 32, 4, 4)
    exact = backbone_nodes(backbone)[node]
    assert (exact.n_prefix_tokens, exact.has_class_token) == (n_prefix, n_prefix > 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_other_sizes_are_resampled_as_transformers_does_it(folders, kind):
    """At twice its size the network equals the library's own interpolation."""
    folder, *_ = folders[kind]
    node, n_prefix = FOLDERS[kind][3:]
    backbone = load_backbone(BackboneSpec(f"transformers:{folder}", image_size=112))
    untouched = transformers.AutoModel.from_pretrained(folder)
    untouched = getattr(untouched, "vision_model", untouched).eval()
    seen = []
    untouched.get_submodule(node).register_forward_hook(lambda *args: seen.append(args[2]))
    pixels = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8)
    images = make_normalizer(backbone, "cpu")(pixels)
    names = untouched.forward.__func__.__code__.co_varnames
    options = (
        {"interpolate_pos_encoding": True}
        if "interpolate_pos_encoding" in names or kind in ("vit", "deit", "clip", "siglip")
        else {}
    )
    with torch.no_grad():
        untouched(pixel_values=images, **options)
    tokens = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    (average,) = make_forward(backbone, resolve_taps(backbone, [f"{node}.avg"]))(pixels)
    np.testing.assert_allclose(average, tokens[:, n_prefix:].mean(1), atol=1e-5)
    with pytest.raises(BackboneError, match=r"patches are 14 x 14 pixels: take a multiple.*98 or"):
        load_backbone(BackboneSpec(f"transformers:{folder}", image_size=100))


def test_the_configuration_is_part_of_the_digest(folders, tmp_path):
    """The same tensors with another number of heads are another network."""
    folder, model, processor = folders["dinov2"]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    first, second = (
        load_backbone(BackboneSpec(f"transformers:{where}")) for where in (folder, tmp_path)
    )
    assert first.weights != second.weights
    before = weights_stamp(second.spec)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert weights_stamp(second.spec) != before
    assert load_backbone(second.spec).weights == first.weights


def test_what_the_weights_lack_is_not_random(tmp_path):
    """A classifier's checkpoint has no pooler, which transformers draws anew at every load."""
    sizes = {**SIZES, "intermediate_size": 64}
    transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).save_pretrained(
        tmp_path
    )
    transformers.ViTImageProcessor(**SQUASH).save_pretrained(tmp_path)
    backbone = load_backbone(BackboneSpec(f"transformers:{tmp_path}"))
    with pytest.warns(WeightsWarning, match=r"not in the file.* \(2\): pooler.*classifier"):
        feature_specs(backbone, resolve_taps(backbone, ["layers.3.cls", "layernorm.avg"]))
    with pytest.raises(BackboneError, match=r"pooler.vector depends on .*pooler\.dense"):
        feature_specs(backbone, resolve_taps(backbone, ["pooler"]))


def test_values_of_the_configuration_are_replaced(folders):
    """By their names, of the images' part where there is text too; the digest follows."""
    for kind in ("vit", "clip"):
        name = f"transformers:{folders[kind][0]}"
        plain, other = (
            load_backbone(BackboneSpec(name, model=model))
            for model in (None, {"hidden_act": "relu"})
        )
        assert other.weights != plain.weights
        assert other.module.config.hidden_act == "relu"
        with pytest.raises(
            BackboneError, match=r"hidden_actt is not in its .* Nearest: hidden_act"
        ):
            load_backbone(BackboneSpec(name, model={"hidden_actt": "relu"}))


def test_random_weights_are_seeded(folders):
    spec = BackboneSpec(f"transformers:{folders['vit'][0]}", "random:3")
    parameter = next(load_backbone(spec).module.parameters())
    assert torch.equal(parameter, next(load_backbone(spec).module.parameters()))


def onnx_file(path, batch, network=None):
    """A small convolutional network as ONNX, for any number of images or for `batch`."""
    torch.manual_seed(0)
    network = network or torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 8, 3, stride=2),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 7 * 7, 5),
    )
    axes = {"image": {0: "n"}} if batch is None else None
    torch.onnx.export(
        network.eval(), (torch.zeros(batch or 1, 3, 32, 32),), str(path), dynamo=False,
        input_names=["image"], dynamic_axes=axes, opset_version=17,
    )  # fmt: skip
    return network


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_an_onnx_file_gives_the_numbers_of_the_network_it_was_made_of(tmp_path, batch):
    """Its inner values are taps; a fixed batch is filled up."""
    network = onnx_file(tmp_path / "net.onnx", batch)
    backbone = load_backbone(BackboneSpec(f"onnx:{tmp_path / 'net.onnx'}"))
    nodes = backbone_nodes(backbone)
    last = nodes.names[-1]
    maps = [node for node in nodes.nodes if node.layout == "NCHW"]
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    taps = resolve_taps(backbone, [f"{maps[-1].name}.map", f"{last}.vector"])
    grid, logits = make_forward(backbone, taps)(pixels)
    with torch.no_grad():
        images = make_normalizer(backbone, "cpu")(pixels)
        np.testing.assert_allclose(grid, network[:3](images), atol=1e-5)
        np.testing.assert_allclose(logits, network(images), atol=1e-5)
    assert auto_taps(nodes)


def test_a_value_computes_only_what_it_depends_on(tmp_path):
    """A graph whose later half fails still gives its earlier values."""
    onnx_file(tmp_path / "net.onnx", None)
    backbone = load_backbone(BackboneSpec(f"onnx:{tmp_path / 'net.onnx'}"))
    graph = backbone.module
    first = next(iter(graph._value_of))
    part = graph._session((graph._value_of[first],))
    assert [output.name for output in part.get_outputs()] == [graph._value_of[first]]
    assert len(graph._graph.graph.node) > 1


def test_a_size_that_the_graph_does_not_take_is_refused(tmp_path):
    onnx_file(tmp_path / "net.onnx", None)
    with pytest.raises(BackboneError, match=r"takes images of 32 pixels only: leave image_size"):
        load_backbone(BackboneSpec(f"onnx:{tmp_path / 'net.onnx'}", image_size=64))


def test_gradients_through_onnx_are_refused(tmp_path):
    onnx_file(tmp_path / "net.onnx", None)
    backbone = load_backbone(BackboneSpec(f"onnx:{tmp_path / 'net.onnx'}"))
    with pytest.raises(BackboneError, match="has no gradients"):
        backbone.module(torch.zeros(1, 3, 32, 32))


@pytest.mark.slow
def test_a_tower_of_open_clip_gives_its_own_numbers():
    """At its own size and at another one, to which its positions are resampled."""
    spec = BackboneSpec("open_clip:ViT-S-32-alt", "random:0", image_size=96)
    backbone = load_backbone(spec)
    node = backbone_nodes(backbone)["transformer.resblocks.11"]
    assert (node.shape[0], node.n_prefix_tokens, node.has_class_token) == (10, 1, True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-S-32-alt", pretrained=None, load_weights=False)
    pixels = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    own_size = load_backbone(BackboneSpec("open_clip:ViT-S-32-alt", "random:0"))
    images = make_normalizer(own_size, "cpu")(pixels)
    seen = []
    model.visual.transformer.resblocks[11].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model.visual.eval()(images)
    (average,) = make_forward(own_size, resolve_taps(own_size, ["transformer.resblocks.11.avg"]))(
        pixels
    )
    np.testing.assert_allclose(average, seen[0][:, 1:].mean(1), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("transformers:/no/such/folder", None, "no such file or folder"),
        ("transformers:a/b/c", None, "neither a folder nor a name of the hub"),
        ("onnx:/no/such.onnx", None, "no such file or folder"),
        ("open_clip:ViT-Z", None, "Nearest: ViT-"),
        ("open_clip:ViT-B-32", "absent", "It has: openai"),
        ("open_clip:ViT-B-32", "openai", "with QuickGELU: name open_clip:ViT-B-32-quickgelu"),
        ("clip:x", None, "transformers:ID_OR_FOLDER"),
    ],
)
def test_names_that_are_not(name, weights, said):
    with pytest.raises(BackboneError, match=said):
        load_backbone(BackboneSpec(name, weights))


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("ViT-B-32", "laion2b_e16"),
        ("ViT-B-32-quickgelu", "openai"),
        ("ViT-g-14", "laion2b_s12b_b42k"),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k"),  # of QuickGELU, of which its tag says nothing
    ],
)
def test_the_default_weights_of_open_clip_are_of_the_activation(name, default):
    assert _weights_tag(name, None, {}) == default


@pytest.mark.slow
def test_a_tag_of_open_clip_is_described_without_its_weights():
    """With the tag's own preprocessing; a tag that is none is told."""
    info = describe_backbone(BackboneSpec("open_clip:ViT-L-14", "laion2b_s32b_b82k"))
    assert info.parameters == 303_966_208
    assert json.loads(info.preprocessing)["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(BackboneError, match="has no weights absent"):
        describe_backbone(BackboneSpec("open_clip:ViT-B-32", "absent"))


@pytest.mark.parametrize(
    ("processor", "options"),
    [
        ("MobileViT", {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}),
        ("EfficientNet", {"size": {"height": 56, "width": 56}}),
        ("Levit", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
        ("ViT", {**SQUASH, "do_resize": False}),
    ],
)
def test_image_processors_that_do_more_are_refused(tmp_path, processor, options):
    """They swap colours, normalize twice, resize to another size or not at all."""
    save_folder(tmp_path, "vit")
    getattr(transformers, f"{processor}ImageProcessor")(**options).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=f"{processor}ImageProcessor.*, makes other pixels"):
        load_backbone(BackboneSpec(f"transformers:{tmp_path}"))


def test_files_that_are_no_networks(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf" * 9)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    for name, said in (("onnx", "bad.onnx"), ("transformers", "folder")):
        with pytest.raises(BackboneError, match=said):
            load_backbone(BackboneSpec(f"{name}:{tmp_path / said}"))


def test_relative_names_start_at_the_recipe(tmp_path, folders):
    """A folder beside the recipe is found from anywhere, and shown as the recipe names it."""
    (tmp_path / "net").symlink_to(folders["vit"][0])
    onnx_file(tmp_path / "net.onnx", None)
    (tmp_path / "images").mkdir()
    (tmp_path / "recipe.yaml").write_text(
        "images: {folder: images}\nbackbones:\n"
        "  - {name: 'transformers:net'}\n  - {name: 'onnx:net.onnx'}\n  - {name: 'timm:resnet18'}\n"
    )
    names = [(each.name, each.alias) for each in load_recipe(tmp_path / "recipe.yaml").backbones]
    assert names == [
        (f"transformers:{tmp_path / 'net'}", "transformers:net"),
        (f"onnx:{tmp_path / 'net.onnx'}", "onnx:net.onnx"),
        ("timm:resnet18", None),
    ]
    assert absolute_name("transformers:facebook/dinov2-small", tmp_path) == (
        "transformers:facebook/dinov2-small"
    )


def test_decoded_pixels_are_those_of_the_image_processor(folders, tmp_path):
    """Resize and crop are the processor's to one of 255, apart from rounding."""
    _, _, processor = folders["dinov2"]
    backbone = load_backbone(BackboneSpec(f"transformers:{folders['dinov2'][0]}"))
    photo(200, 150).save(tmp_path / "photo.png")
    image = decode_image((tmp_path / "photo.png").read_bytes())
    pixels = torch.from_numpy(render_crop(image, backbone.preprocessing).copy())[None]
    theirs = processor(Image.open(tmp_path / "photo.png"), return_tensors="pt")["pixel_values"]
    difference = (make_normalizer(backbone, "cpu")(pixels) - theirs).abs().max()
    assert float(difference) <= 1.5 / 255 / 0.224


@pytest.mark.slow
def test_a_run_on_a_folder_and_a_file_predicts_and_is_not_believed_elsewhere(tmp_path, folders):
    """Recipe to predictions with both; sent away from its run, the model may not name a path
    outside of it.
    """
    make_photos(tmp_path / "photos", n=24)
    (tmp_path / "net").symlink_to(folders["registers"][0])
    onnx_file(tmp_path / "net.onnx", None)
    (tmp_path / "recipe.yaml").write_text(
        "images: {folder: photos}\ntask: {folds: 2}\nbackbones:\n"
        "  - {name: 'transformers:net', taps: [encoder.layer.3.avg, encoder.layer.3.cls]}\n"
        "  - {name: 'onnx:net.onnx'}\n"
        "heads: {logistic: {C: [1]}}\nensemble: null\n"
    )
    result = run_here(tmp_path / "recipe.yaml")
    assert {name.split(":")[0] for inputs in result.board["inputs"] for name in inputs} == {
        "transformers",
        "onnx",
    }
    model = load_model(tmp_path / "headrace-runs" / "recipe")
    images = sorted((tmp_path / "photos").rglob("*.png"))
    assert model.predict_proba(images).shape == (24, 2)
    shutil.copytree(tmp_path / "headrace-runs" / "recipe" / "winner", tmp_path / "sent")
    with pytest.raises(CodeNotTrusted, match="lies outside of the model's directory"):
        load_model(tmp_path / "sent")
