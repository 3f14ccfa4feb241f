"""Images, labels, heads and features as notebooks have them: used, or answered with what to type."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.runs import make_photos
from torchvision.datasets import ImageFolder

from headrace.extract.sources.read import SourceWarning
from headrace.pipelines.api import _with_content, extract_features, feature_matrix, train_heads
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.given_images import image_table
from headrace.pipelines.models.image_input import split_images
from headrace.pipelines.recipe.targets import DataError
from headrace.pipelines.recipe.text import RecipeError
from headrace.pipelines.run import run_recipe


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given") / "photos"
    make_photos(folder, n=8)
    return folder


def test_paths_in_any_form_are_the_same_images(photos):
    paths = sorted(photos.rglob("*.png"))
    texts = [str(path) for path in paths]
    forms = [paths, texts, tuple(texts), iter(paths), np.array(texts), pd.Series(texts)]
    for form in forms:
        table = image_table(form, labelled=False)
        assert table["path"].tolist() == table["id"].tolist() == texts
    named = pd.DataFrame({"path": paths, "id": range(8), "site": "a"})
    table = image_table(named, labelled=False)
    assert table["id"].tolist() == list(range(8))
    assert table["path"].tolist() == texts
    assert table["site"].tolist() == ["a"] * 8


def test_an_image_folder_brings_its_labels(photos):
    """With the names of its classes; and so does a subset of it."""
    dataset = ImageFolder(str(photos))
    table = image_table(dataset, labelled=True)
    assert [Path(path).parent.name for path in table["path"]] == table["label"].tolist()
    dataset.classes = [
        (name, "synonym") for name in dataset.classes
    ]  # as of torchvision's ImageNet
    assert set(image_table(dataset, labelled=True)["label"]) == {
        f"{label}, synonym" for label in table["label"]
    }
    subset = torch.utils.data.Subset(dataset, [5, 1])
    assert image_table(subset, labelled=True)["id"].tolist() == table["id"].iloc[[5, 1]].tolist()


@pytest.mark.parametrize(
    ("images", "answer"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), "ndarray of ndarray.*numpy.savez"),
        (torch.zeros(2, 3, 8, 8), "Tensor of Tensor.*numpy.savez"),
        ([Image.new("L", (8, 8))], "list of Image.*numpy.savez"),
        ([], "no image is given"),
        (5, "given as int. Expected a folder"),
        (None, "given as NoneType. Expected a folder"),
        ({"a.png": "cat"}, "given as dict. Expected a folder"),
        (pd.DataFrame({"file": ["a.png"]}), r"no column path.*rename\(columns={'file': 'path'}\)"),
        (pd.DataFrame([["a.png", "cat"]]), r"no column path.*rename\(columns={0: 'path'}\)"),
        (pd.DataFrame({"label": ["cat"]}, pd.Index(["a"], name="path")), r"table.reset_index\(\)"),
        (pd.DataFrame([["a", "b"]], columns=["path", "path"]), "several columns 'path'"),
        (pd.DataFrame({"path": ["a", "b"], "id": [1, "x"]}), r"id.*no order.*astype\(str\)"),
        (torch.utils.data.DataLoader([0]), "given as DataLoader. Expected a folder"),
        (
            pd.DataFrame({"path": ["a.png", "b.png", "b.png"], "id": [7, 7, 7]}),
            r"'7' for several images.*rename\(columns={'id': 'patient'}\)",
        ),
        (pd.DataFrame({"path": ["a.png", None]}), "1 of 2 images have no path: that of row 1"),
    ],
)
def test_what_holds_no_paths_is_told(images, answer):
    with pytest.raises(InvalidInput, match=answer):
        image_table(images, labelled=False)


@pytest.mark.parametrize("labels", [["cat", "dog"], np.array([0, 1]), pd.Series(["cat"])])
def test_labels_come_with_their_images(labels):
    with pytest.raises(InvalidInput, match=r"DataFrame\({'path': PATHS, 'label': LABELS}\)"):
        train_heads({}, labels)


def test_files_that_cannot_be_read_are_counted(photos, tmp_path):
    paths = [str(path) for path in sorted(photos.rglob("*.png"))]
    table = image_table([*paths, "gone.png"], labelled=False)
    with pytest.warns(
        SourceWarning, match=r"1 of 9 images cannot be read, first gone.png \(No such"
    ):
        assert _with_content(table, tmp_path)["path"].tolist() == paths
    with pytest.raises(InvalidInput, match=r"1 of 1 image cannot be read, first gone.png"):
        extract_features(["gone.png"], "torchvision:resnet18", cache=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(_with_content(table.iloc[:8], tmp_path)) == 8


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ({"heads": {"logistic": {"C": 1}}}, r"heads.logistic.C: .* found 1: write \[1\]"),
        ({"heads": {"logistics": {}}}, "unknown key 'heads.logistics': did you mean 'logistic'"),
        ({"heads": ["logistic", "svm"]}, "unknown key 'heads.svm'"),
        ({"task": {"fold": 3}}, "task.fold: a text is expected"),
        ({"task": "label"}, "task: a section with keys is expected, found 'label'"),
    ],
    ids=str,
)
def test_sections_from_python_are_checked_as_in_a_recipe(arguments, answer):
    with pytest.raises(RecipeError, match=answer):
        train_heads({}, "photos", **arguments)


def test_features_and_columns_that_are_not_there_are_told(photos, tmp_path):
    with pytest.raises(InvalidInput, match=r"features are given as ndarray.*LogisticHead"):
        train_heads(np.zeros((8, 3)), photos, out=tmp_path)
    paths = [str(path) for path in sorted(photos.rglob("*.png"))]
    with pytest.raises(DataError, match="the table of images has no column 'label'"):
        train_heads({}, pd.DataFrame({"path": paths}), out=tmp_path)

    labelled = pd.DataFrame({"path": paths, "label": "a"})
    with pytest.raises(InvalidInput, match="no features are given"):
        train_heads({}, labelled, out=tmp_path)
    with pytest.raises(RecipeError, match="heads"):
        train_heads({}, labelled, heads=None, out=tmp_path)
    with pytest.raises(InvalidInput, match=r"given as dict. Expected one .*features\['a.avg'\]"):
        feature_matrix({"a.avg": None}, paths)


def test_an_index_and_columns_of_the_users_own_change_no_image(photos, tmp_path):
    """The name of an index may be that of a column, and a column content may hold captions."""
    paths = sorted(photos.rglob("*.png"))
    table = pd.DataFrame({"path": paths, "content": "a caption"}).rename_axis("id")
    hashes = _with_content(image_table(table, labelled=False), tmp_path)
    assert hashes.sort_values("id")["content"].nunique() == len(paths)


def test_a_recipe_may_be_named_by_its_file():
    with pytest.raises(RecipeError, match="no such recipe"):
        run_recipe("nowhere.yaml")


def test_a_model_is_given_images_and_no_folder_or_table(photos):
    with pytest.raises(InvalidInput, match=r"rglob\('\*.jpg'\).*headrace predict MODEL"):
        split_images(photos)
    with pytest.raises(InvalidInput, match=r"predict\(table\['path'\]\)"):
        split_images(pd.DataFrame({"path": ["a.png"]}))
