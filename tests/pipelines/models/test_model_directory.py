"""Model directories, loaded away from their run: the same predictions as the run's, from any form
of image.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import client_here, run_here
from support.runs import RECIPE, make_photos

from headrace.cache.errors import HeadraceError, SpecMismatch
from headrace.cache.feature_set import open_feature_set
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.preprocessing import render_crop
from headrace.extract.sources.samples import list_folder
from headrace.extract.spec import BackboneSpec
from headrace.heads.data.features import load_rows
from headrace.heads.evaluate.temperature import with_temperature
from headrace.heads.persist import load_head
from headrace.heads.predict import predict_head
from headrace.pipelines.api import extract_features, train_heads
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.export.write import export_model
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.model import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with views, and a heads' input of two taps. The tests leave it as it is."""
    folder = tmp_path_factory.mktemp("deliver")
    make_photos(folder / "photos", n=40)
    text = RECIPE.replace(
        "[layer1.avg, layer2.max, layer4.avg]", "[layer1.avg, layer2.max]\n    views: 2"
    )
    (folder / "recipe.yaml").write_text(text)
    return folder, run_here(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def away(run, tmp_path_factory):
    """The winner, copied to another place."""
    place = tmp_path_factory.mktemp("away") / "model"
    shutil.copytree(run[1].paths.winner, place)
    return place


def test_a_model_directory_predicts_as_its_run(run, away):
    """From the files alone: what the head says of the features in the run's cache, to the round-off
    of storing them.
    """
    _, result = run
    model = load_model(away)
    directories = [path for name in result.winner.inputs for path in result.feature_paths[name]]
    features = [open_feature_set(path) for path in directories]
    head = load_head(away)
    samples = list_folder(run[0] / "photos")
    ids = features[0].ids()
    content = dict(zip(ids, features[0].content_hashes(), strict=True))
    samples = samples[samples["id"].isin(ids)]
    X, _ = load_rows(features, np.array([content[name] for name in samples["id"]]))
    assert X.ndim == 3 or len(result.winner.inputs) == 1
    views = [predict_head(head.spec, head.arrays, view) for view in (X if X.ndim == 3 else X[None])]
    expected = with_temperature("single", np.mean(views, axis=0), head.temperature)
    np.testing.assert_allclose(model.predict_proba(samples["path"]), expected, atol=2e-3)
    right = model.predict(samples["path"]) == samples["label"].to_numpy()
    assert right.mean() > 0.9
    # The second view is drawn from an image's bytes, which a module does not get.
    with pytest.raises(ModelError, match="random views"):
        model.to_torch()


@pytest.mark.slow
def test_mirrored_views_are_part_of_an_exported_graph(tmp_path):
    """One network in it, run on four images; what it says of the photos is what headrace says, and
    not what the crop alone says.
    """
    make_photos(tmp_path / "photos", n=40)
    text = RECIPE.replace(
        "[layer1.avg, layer2.max, layer4.avg]", "[layer1.avg, layer2.max]\n    views: flips"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    model = load_model(run_here(tmp_path / "recipe.yaml").paths.winner)
    assert len({feature.view for feature in model.members[0].features}) == 4
    exported = export_model(model, tmp_path / "out", ["torch"])
    assert exported.all_views
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    paths = list_folder(tmp_path / "photos")["path"].tolist()[:12]
    with torch.no_grad():
        how = exported.inputs[0].preprocessing
        pixels = [
            torch.from_numpy(np.array(render_crop(decode_image(Path(path).read_bytes()), how)))
            for path in paths
        ]
        found = program(torch.stack(pixels)).numpy()
    expected = model.predict_proba(paths)
    # In logarithms, for all probabilities are near 0 or 1.
    np.testing.assert_allclose(np.log(found), np.log(expected), atol=1e-3)
    alone = one_view(model).predict_proba(paths)
    assert np.abs(np.log(alone) - np.log(expected)).max() > 0.2
    sizes = sum(value.numel() for value in program.state_dict().values())
    assert sizes < 1.5 * sum(
        p.numel() for p in load_backbone(model.members[0].backbones[0]).module.parameters()
    )


def one_view(model):
    """The model on the evaluation crop alone."""
    member = model.members[0]
    kept = [place for place, feature in enumerate(member.features) if feature.view == '{"index":0}']
    head = dataclasses.replace(
        member.head,
        features=tuple(member.features[place] for place in kept),
        backbones=tuple(member.head.backbones[place] for place in kept),
    )
    return dataclasses.replace(model, head=head)


def test_images_come_in_any_form(run, away):
    """A path, a Pillow image and an array are the same image, alone or among others."""
    model = load_model(run[0] / "headrace-runs" / "recipe")  # of a run, its winner
    path = run[0] / "photos" / "fine" / "001.png"
    by_path = model.predict_proba(path)
    assert by_path.shape == (1, 2)
    assert by_path.dtype == np.float32
    with Image.open(path) as image:
        forms = [path, str(path)]
        if len({json.dumps(f.view) for f in model.members[0].head.features}) == 1:
            forms += [image, np.asarray(image)]  # views are drawn from the file's bytes
        many = model.predict_proba(forms)
    np.testing.assert_allclose(many, np.repeat(by_path, len(forms), axis=0), atol=1e-3)
    arrays = np.zeros((3, 40, 40, 3), np.uint8)
    assert model.predict_proba(arrays).shape == (3, 2)


def test_an_image_that_cannot_be_used_is_named(run, away, tmp_path):
    """No row is left out in silence: the caller gets one error with the path and the reason."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InvalidInput, match=r"broken\.png.*not an image"):
        load_model(away).predict_proba(
            [run[0] / "photos" / "fine" / "001.png", tmp_path / "broken.png"]
        )


def test_other_weights_are_refused(away, tmp_path):
    """The digest of the network's weights is part of the head's description."""
    place = tmp_path / "model"
    shutil.copytree(away, place)
    model = load_model(place)
    swapped = tuple({**fields, "weights": "random:9"} for fields in model.head.backbones)
    model = dataclasses.replace(model, head=dataclasses.replace(model.head, backbones=swapped))
    with pytest.raises(SpecMismatch, match="weights"):
        model.predict_proba(np.zeros((40, 40, 3), np.uint8))


@pytest.mark.parametrize("what", ["absent", "empty", "file"])
def test_what_is_no_model_is_told(tmp_path, what):
    """What was found, and what is expected."""
    place = tmp_path / what
    if what == "empty":
        place.mkdir()
    if what == "file":
        place.write_text("x")
    with pytest.raises(InvalidInput, match=r"Expected a recipe .*, or a directory with a model"):
        load_model(place)


def test_an_export_without_its_model_names_the_command_that_writes_it(tmp_path):
    """Whichever of its files are gone; the folder is still known for an export's."""
    (tmp_path / ".headrace-export").touch()
    for name in ("", "head.json", "network.json"):
        if name:
            (tmp_path / name).write_text("{}")
        with pytest.raises(HeadraceError, match=r"`headrace export RUN FOLDER --format safetensor"):
            load_model(tmp_path)


def test_a_head_from_a_notebook_knows_its_network_too(run, tmp_path):
    """extract_features remembers in the cache what made the features, and train_heads finds it
    there.
    """
    spec = BackboneSpec(
        "torchvision:resnet18", weights="random:0", image_size=32, crop_fraction=1.0
    )
    with client_here() as client:
        features = extract_features(
            run[0] / "photos", spec, ["layer1.avg"], cache=tmp_path / "cache", client=client
        )
        result = train_heads(
            features,
            run[0] / "photos",
            heads={"ridge": {"alpha": [1.0], "inputs": ["each"]}},
            out=tmp_path / "out",
            client=client,
        )
    model = load_model(tmp_path / "out")
    assert model.members[0].backbones == (spec,)
    assert model.predict(run[0] / "photos" / "fine" / "001.png").tolist() == ["fine"]
    assert result.test is not None
