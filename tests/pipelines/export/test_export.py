"""`headrace export`: heads as graphs, files that predict the same where headrace is not installed,
and their card.
"""

import json
import os
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.exports import CASES, fitted, run_alone
from support.models import client_here
from support.runs import headrace, make_photos

from headrace.cache.errors import HeadraceError
from headrace.extract.backbones.backbone import Backbone, load_backbone, override_preprocessing
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.preprocessing import Preprocessing, render_crop
from headrace.extract.sources.samples import list_folder
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.resolve import backbone_nodes, parse_tap, tap_shape
from headrace.heads.bank import fit_bank
from headrace.heads.data.features import load_rows
from headrace.heads.data.task import REFIT, Task
from headrace.heads.evaluate.temperature import with_temperature
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.networks.kind import ConvSpec, MLPSpec
from headrace.heads.persist import TrainedHead, save_head
from headrace.heads.sklearn.kind import SklearnSpec
from headrace.heads.spec import spec_to_json
from headrace.pipelines.api import extract_features
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.export import write as export
from headrace.pipelines.export.mlflow_model import save_mlflow_model
from headrace.pipelines.export.model_card import _data_section
from headrace.pipelines.export.output_check import TOLERANCE
from headrace.pipelines.export.preprocessing_file import preprocess_file
from headrace.pipelines.export.write import export_model, spec_of_file
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.model import load_model
from headrace.pipelines.models.network import load_network, save_network
from headrace.pipelines.models.torch_graph import GraphInput
from headrace.pipelines.models.torch_head import head_module, probability_module
from headrace.pipelines.models.torch_network import Network
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec
from headrace.pipelines.records import write_record

NETWORK = BackboneSpec("torchvision:resnet18", weights="random:0", image_size=32, crop_fraction=1.0)
OTHER = BackboneSpec("torchvision:squeezenet1_1", weights="random:0", image_size=48)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "photos"
    make_photos(folder, n=40)
    return folder


@pytest.fixture(scope="module")
def features(photos):
    """Of two networks, for every photo."""
    cache = photos.parent / "cache"
    with client_here() as client:
        one = extract_features(
            photos, NETWORK, ["layer1.avg", "layer2.map"], cache=cache, client=client
        )
        two = extract_features(photos, OTHER, ["features.6.max"], cache=cache, client=client)
    return {"avg": one["layer1.avg"], "map": one["layer2.map"], "max": two["features.6.max"]}


def model_directory(place, photos, features, spec, names):
    """A head of this spec, trained on the photos, as a model directory."""
    sets = [features[name] for name in names]
    labels = list_folder(photos).set_index("id")["label"]
    ids = sets[0].ids()
    target = (labels[ids] == "fine").to_numpy().astype(np.int64)
    fold = (np.arange(len(ids)) % 3).astype(np.int16)
    task = Task(
        "single",
        ("coarse", "fine"),
        np.array(ids),
        sets[0].content_hashes(),
        target,
        fold,
        np.ones(len(ids)),
    )
    X, _ = load_rows(sets, task.content, spatial=spec.kind == "conv")
    (full,) = [fit for fit in fit_bank(X, task, [spec]) if fit.fold == REFIT]
    assert full.error is None
    networks = {"avg": NETWORK, "map": NETWORK, "max": OTHER}
    head = TrainedHead(
        spec,
        "single",
        task.classes,
        tuple(feature.spec for feature in sets),
        {"validation_accuracy": 0.9},
        full.arrays,
        tuple(asdict(networks[name]) for name in names),
    )
    save_head(place, head)
    return place


@pytest.mark.parametrize(
    ("spec", "kind"), CASES, ids=[f"{spec.kind}-{kind}" for spec, kind in CASES]
)
def test_a_head_as_a_module_is_the_same_function(spec, kind):
    """Of every kind and task that has arrays, on rows that it was not trained on."""
    head, unseen = fitted(spec, kind)
    expected = head.predict_proba(unseen)
    with torch.no_grad():
        found = probability_module(head, 1.0)(torch.from_numpy(unseen)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, np.abs(expected).max()))


@pytest.mark.slow
def test_a_head_is_the_same_where_headrace_is_not(photos, features, tmp_path):
    """A program, an ONNX file and safetensors of one head; the first two with torch and onnxruntime
    alone.
    """
    place = model_directory(tmp_path / "model", photos, features, LogisticSpec(0.1), ["avg"])
    model = load_model(place)
    exported = export_model(model, tmp_path / "out", ["torch", "onnx", "safetensors"])
    assert max(exported.differences.values()) <= TOLERANCE
    paths = sorted(photos.rglob("*.png"))[::5]
    expected = model.predict_proba(paths)
    for what in ("torch", "onnx"):
        np.testing.assert_allclose(
            run_alone(tmp_path / "out", paths, what), expected, atol=TOLERANCE
        )
    np.testing.assert_allclose(
        load_model(tmp_path / "out").predict_proba(paths), expected, atol=1e-6
    )
    assert (
        tmp_path / "out" / "model.pt2"
    ).stat().st_size < 2e6  # without the network behind the tap
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    for said in (
        "0. coarse",
        "1. fine",
        "logistic",
        "model.pt2",
        "model.onnx",
        "validation accuracy",
        "headrace",
    ):
        assert said in card


def test_a_copied_network_has_the_preprocessing_of_its_weights():
    """Whatever the library's default weights have."""
    default = Preprocessing((256, 256), (224, 224), "shortest", "bilinear", (0.5,) * 3, (0.2,) * 3)
    preprocessing = Preprocessing(
        (378, 378),
        (378, 378),
        "squash",
        "bicubic",
        (0.4, 0.5, 0.6, 0.7),
        (0.1, 0.2, 0.3, 0.4),
        pixel_range=(0.0, 4095.0),
        bands=(4, 3, 2, 1),
        nodata="mean",
        decode="scaled",
    )
    loaded = Backbone(
        BackboneSpec("timm:test_resnet", "tag"), torch.nn.Identity(), preprocessing, ""
    )
    spec = spec_of_file(loaded, "weights.safetensors")
    assert override_preprocessing(default, spec) == preprocessing


@pytest.mark.parametrize("key", ["folder", "table", "tar", "zip", "array"])
def test_a_card_names_the_images_of_the_run(tmp_path, key):
    """Whatever holds them."""
    run = RunPaths(tmp_path)
    write_record(run.recipe, {"images": {key: "/data/birds"}})
    assert "of `birds`" in _data_section(run)


@pytest.mark.slow
def test_an_mlflow_model_predicts_the_same(photos, features, tmp_path):
    """From paths in a list or in a table; nothing but safetensors and text is in it."""
    pyfunc = pytest.importorskip("mlflow.pyfunc")
    place = model_directory(tmp_path / "model", photos, features, LogisticSpec(0.1), ["avg"])
    model = load_model(place)
    save_mlflow_model(model, tmp_path / "out")
    with pytest.raises(InvalidInput, match="is there already"):
        save_mlflow_model(model, tmp_path / "out")
    paths = [str(path) for path in sorted(photos.rglob("*.png"))[:4]]
    loaded = pyfunc.load_model(str(tmp_path / "out"))
    table = loaded.predict(paths)
    assert list(table) == ["p_coarse", "p_fine"]
    np.testing.assert_array_equal(table.to_numpy(), model.predict_proba(paths))
    assert loaded.predict(pd.DataFrame({"path": paths})).equals(table)
    assert not list((tmp_path / "out").rglob("*.pkl"))


@pytest.mark.slow
def test_an_ensemble_is_the_same_where_headrace_is_not(photos, features, tmp_path):
    """Heads of four kinds on two networks of different input sizes, weighted and tempered: two
    inputs, one output.
    """
    members = [
        (MLPSpec((8,), epochs=3), ["avg", "max"], 0.4),
        (ConvSpec((4,), epochs=2), ["map"], 0.3),
        (CentroidSpec(), ["max"], 0.2),
        (KNNSpec(3), ["avg"], 0.1),
    ]
    listed = []
    for place, (spec, names, weight) in enumerate(members):
        model_directory(tmp_path / "model" / "members" / str(place), photos, features, spec, names)
        listed.append(
            {"model": f"members/{place}", "weight": weight, "temperature": 0.5 + place / 2}
        )
    about = {"format": 2, "kind": "ensemble", "members": listed, "temperature": 0.7, "task_kind": "single",
             "classes": ["coarse", "fine"], "metrics": {}}  # fmt: skip
    (tmp_path / "model" / "ensemble.json").write_text(json.dumps(about))
    model = load_model(tmp_path / "model")
    exported = export_model(model, tmp_path / "out", ["torch", "onnx", "safetensors"])
    assert [each.name for each in exported.inputs] == ["images_0", "images_1"]
    paths = sorted(photos.rglob("*.png"))[::5]
    expected = model.predict_proba(paths)
    np.testing.assert_allclose(expected.sum(1), 1, atol=1e-5)
    for what in ("torch", "onnx"):
        np.testing.assert_allclose(
            run_alone(tmp_path / "out", paths, what), expected, atol=TOLERANCE
        )
    np.testing.assert_allclose(
        load_model(tmp_path / "out").predict_proba(paths), expected, atol=1e-6
    )


def test_what_differs_is_not_published(photos, features, tmp_path, monkeypatch):
    """A graph that predicts otherwise is refused, and leaves nothing behind."""
    place = model_directory(tmp_path / "model", photos, features, LogisticSpec(0.1), ["avg"])
    model = load_model(place)
    from headrace.pipelines.models import torch_graph

    monkeypatch.setattr(torch_graph, "tempered", lambda found, *_: found * 0.9)
    with pytest.raises(HeadraceError, match="predicts otherwise"):
        export_model(model, tmp_path / "out", ["torch"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_refusals_say_what_to_do(photos, features, tmp_path, monkeypatch):
    """A head that is code, a folder that is there, a format that is none, a library that is
    missing.
    """
    svc = SklearnSpec("sklearn.naive_bayes.GaussianNB")
    model = load_model(model_directory(tmp_path / "svc", photos, features, svc, ["avg"]))
    with pytest.raises(ModelError, match="safetensors"):
        export_model(model, tmp_path / "out", ["torch"])
    exported = export_model(model, tmp_path / "out", ["safetensors"])
    assert exported.differences == {"safetensors": 0.0}
    with pytest.raises(InvalidInput, match="--force"):
        export_model(model, tmp_path / "out", ["safetensors"])
    export_model(model, tmp_path / "out", ["safetensors"], force=True)
    with pytest.raises(InvalidInput, match="expected one or several of torch"):
        export_model(model, tmp_path / "other", ["pickle"])
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HeadraceError, match=r"headrace\[onnx\]"):
        export_model(model, tmp_path / "other", ["onnx"])
    assert not (tmp_path / "other").exists()


def test_an_exported_file_is_as_readable_as_any(photos, features, tmp_path):
    """As the umask says; the weights too, which safetensors' own writer keeps from
    everybody else.
    """
    model = load_model(
        model_directory(tmp_path / "ridge", photos, features, RidgeSpec(1.0), ["avg"])
    )
    before = os.umask(0o027)
    try:
        export_model(model, tmp_path / "out", ["safetensors"])
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert "backbone_0.safetensors" in modes
    assert set(modes.values()) == {0o640}


def test_words_of_a_model_are_no_placeholders(tmp_path):
    """What a model directory says of its preprocessing stays text in the file that is run later."""
    how = Preprocessing(
        (40, 40), (36, 32), "{source} {first}", "bicubic", (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)
    )
    namespace = {"__name__": "preprocess_case"}
    exec(preprocess_file([GraphInput("images", how)], "0"), namespace)
    assert namespace["INPUTS"]["images"]["mode"] == "{source} {first}"


@pytest.mark.parametrize("mode", ["shortest", "squash", "border"])
def test_the_preprocessing_file_makes_headraces_pixels(tmp_path, mode):
    """To the last bit: odd sizes, grey, transparency, 16 bit, orientation, images smaller than the
    crop.
    """
    how = Preprocessing((40, 40), (36, 32), mode, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    (tmp_path / "preprocess_case.py").write_text(preprocess_file([GraphInput("images", how)], "0"))
    namespace = {"__name__": "preprocess_case"}
    exec((tmp_path / "preprocess_case.py").read_text(), namespace)  # a file of the user's by then
    rng = np.random.default_rng(0)
    cases = {
        "wide.png": Image.fromarray(rng.integers(0, 256, (37, 91, 3), np.uint8)),
        "tall.png": Image.fromarray(rng.integers(0, 256, (120, 45, 3), np.uint8)),
        "grey.png": Image.fromarray(rng.integers(0, 256, (50, 50), np.uint8)),
        "tiny.png": Image.fromarray(rng.integers(0, 256, (9, 14, 3), np.uint8)),
        "alpha.png": Image.fromarray(rng.integers(0, 256, (50, 70, 4), np.uint8)),
        "deep.png": Image.fromarray(rng.integers(0, 65536, (50, 70), np.uint16)),
        "palette.png": Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8)).convert("P"),
        "bits.png": Image.fromarray(rng.integers(0, 256, (50, 70), np.uint8)).convert("1"),
    }
    for name, image in cases.items():
        image.save(tmp_path / name)
    turned = Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    for path in [*(tmp_path / name for name in cases), tmp_path / "turned.jpg"]:
        expected = render_crop(decode_image(path.read_bytes()), how)
        np.testing.assert_array_equal(namespace["load"](path), expected, err_msg=path.name)


def network_directory(place, kind="logistic"):
    """A small network with other weights than its library's, and a head on two of its taps, as
    fine-tuning stores it.
    """
    backbone = load_backbone(
        BackboneSpec("timm:test_resnet", "random:0", image_size=64, crop_fraction=1.0)
    )
    torch.manual_seed(0)
    if kind == "conv":
        taps, head_spec = ["layer3.map"], ConvSpec((4,))
        width = backbone_nodes(backbone)["layer3"].shape[0]
        arrays = {"kernel0": torch.randn(4, width, 3, 3) / 20, "shift0": torch.zeros(4), "weight0": torch.randn(3, 4),
                  "bias0": torch.zeros(3), "mean": torch.zeros(width), "inverse_scale": torch.ones(width)}  # fmt: skip
    else:
        taps, head_spec = ["layer2.max", "layer4.avg"], LogisticSpec(1.0)
        nodes = backbone_nodes(backbone)
        width = sum(tap_shape(parse_tap(tap), nodes[parse_tap(tap).node])[0] for tap in taps)
        arrays = {"weight": torch.randn(3, width) / 10, "bias": torch.zeros(3)}
    arrays = {name: value.numpy() for name, value in arrays.items()}
    head = head_module(head_spec, arrays, "single")
    network = Network(backbone, [parse_tap(tap) for tap in taps], head).eval()
    for parameter in network.backbone.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    spec = FineTuneSpec(head=spec_to_json(head_spec), train_above="all")
    save_network(
        place,
        network,
        backbone,
        spec=spec,
        task_kind="single",
        classes=("a", "b", "c"),
        metrics={"x": 0.5},
        temperature=1.0,
    )
    return place


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["logistic", "conv"])
def test_a_fine_tuned_network_is_the_same_everywhere(photos, tmp_path, kind):
    """From images through headrace, as a torch program, as safetensors, as a copy elsewhere: what
    its own module says.
    """
    model = load_model(network_directory(tmp_path / "model", kind))
    assert model.classes == ("a", "b", "c")
    trained = load_network(tmp_path / "model")
    paths = sorted(photos.rglob("*.png"))[::5]
    pixels = np.stack(
        [
            render_crop(decode_image(path.read_bytes()), trained.model.preprocessing)
            for path in paths
        ]
    )
    expected = trained.predict_proba(pixels)
    assert np.ptp(expected, axis=0).max() > 1e-3
    np.testing.assert_allclose(model.predict_proba(paths), expected, atol=1e-4)
    exported = export_model(model, tmp_path / "out", ["torch", "safetensors"])
    assert max(exported.differences.values()) < TOLERANCE
    np.testing.assert_allclose(
        load_model(tmp_path / "out").predict_proba(paths), expected, atol=1e-4
    )
    if kind == "logistic":
        np.testing.assert_allclose(
            run_alone(tmp_path / "out", paths, "torch"), expected, atol=TOLERANCE
        )


@pytest.mark.slow
def test_a_network_in_an_ensemble_is_the_same_in_onnx(photos, tmp_path):
    """Two networks of one architecture whose weights differ are not taken for each other."""
    for place in (0, 1):
        network_directory(tmp_path / "model" / "members" / str(place), ("logistic", "conv")[place])
    about = {"format": 1, "kind": "ensemble", "temperature": 1.2, "task_kind": "single", "classes": ["a", "b", "c"],
             "members": [{"model": "members/0", "weight": 0.75}, {"model": "members/1", "weight": 0.25}],
             "metrics": {}}  # fmt: skip
    (tmp_path / "model" / "ensemble.json").write_text(json.dumps(about))
    model = load_model(tmp_path / "model")
    paths = sorted(photos.rglob("*.png"))[::5]
    parts = [
        load_model(tmp_path / "model" / "members" / str(place)).predict_proba(paths)
        for place in (0, 1)
    ]
    expected = with_temperature("single", 0.75 * parts[0] + 0.25 * parts[1], 1.2)
    np.testing.assert_allclose(model.predict_proba(paths), expected, atol=1e-5)
    export_model(model, tmp_path / "out", ["onnx"])
    np.testing.assert_allclose(run_alone(tmp_path / "out", paths, "onnx"), expected, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["torch", "safetensors"])
def test_a_full_disk_is_an_error_and_leaves_nothing(photos, features, tmp_path, what):
    """A file that cannot grow: the reason and what to do, where torch's own writer would end the
    process.
    """
    model_directory(tmp_path / "model", photos, features, LogisticSpec(0.1), ["avg"])
    full = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, "
        "resource.RLIM_INFINITY))"
    )
    done = headrace("export", "model", "out", "--format", what, cwd=tmp_path, first=full)
    assert done.returncode == 2, done.stderr
    assert "Nothing was written: make room" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
