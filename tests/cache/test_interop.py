"""Features to and from other programs: imports by id, exports that come back the same, scikit-learn
pipelines.
"""

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from support.models import client_here, run_here
from support.runs import RECIPE, headrace, make_photos

from headrace.cache.errors import CacheError, ExternalFeaturesInvalid
from headrace.cache.exchange.export import EXPORTS
from headrace.cache.exchange.external import external_feature_sets, import_features
from headrace.cache.exchange.external_files import read_external_features
from headrace.cache.feature_set import open_feature_set
from headrace.extract.images.content_hashes import content_hashes
from headrace.extract.sources.samples import list_folder, read_table
from headrace.extract.spec import BackboneSpec
from headrace.heads.data.lookup import FeatureLookup
from headrace.pipelines.api import extract_features
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.model import load_model
from headrace.pipelines.planning.run_state import read_run_state
from headrace.pipelines.recipe.load import RecipeError, load_recipe

NETWORK = BackboneSpec("torchvision:resnet18", weights="random:0", image_size=32, crop_fraction=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos, one of them copied, and features of our own."""
    folder = tmp_path_factory.mktemp("interop")
    make_photos(folder / "photos", n=30)
    (folder / "photos" / "fine" / "copy.png").write_bytes(
        (folder / "photos" / "fine" / "001.png").read_bytes()
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    with client_here() as client:
        return extract_features(
            folder / "photos",
            NETWORK,
            ["layer1.avg", "layer4.map"],
            cache=folder / "ours",
            client=client,
        )


def foreign_table(folder):
    """Ids of all photos in another order, with two numbers that tell the classes apart, and one id
    of no photo.
    """
    samples = list_folder(folder / "photos").sample(frac=1, random_state=0)
    ids = [*samples["id"], "elsewhere/9.png"]
    rng = np.random.default_rng(0)
    sign = np.array([1.0 if name.startswith("fine") else -1.0 for name in ids])
    return ids, np.stack(
        [sign * (1 + rng.random(len(ids))), rng.normal(size=len(ids))], axis=1
    ).astype(np.float32)


@pytest.mark.parametrize("kind", ["npy", "npz", "parquet", "csv", "h5", "txt"])
def test_every_form_of_foreign_features_is_read_by_its_ids(folder, tmp_path, kind):
    """Order is no matter: each row belongs to the image of its id."""
    ids, values = foreign_table(folder)
    source, table = tmp_path / f"f.{kind}", None
    match kind:
        case "npy" | "txt":
            source = tmp_path / "f.npy"
            np.save(source, values)
            table = tmp_path / ("ids.csv" if kind == "npy" else "ids.txt")
            table.write_text("\n".join(ids if kind == "txt" else ["id", *ids]) + "\n")
        case "npz":
            np.savez(source, embeddings=values, other=np.arange(3))
            pd.DataFrame({"id": ids}).to_csv(tmp_path / "f.rows.csv")
        case "parquet":
            pd.DataFrame({"id": ids, "vector": list(values)}).to_parquet(source)
        case "csv":
            pd.DataFrame({"id": ids, "a": values[:, 0], "b": values[:, 1]}).to_csv(
                source, index=False
            )
        case "h5":
            with h5py.File(source, "w") as file:
                file["deep/features"] = values
                file["names"] = np.array(ids, dtype=h5py.string_dtype())
    external_features = read_external_features(
        source, ids_path=table, column_options=["a,b"] if kind == "csv" else ()
    )
    assert external_features.sample_ids == ids
    np.testing.assert_allclose(external_features.features, values, rtol=1e-6)
    known = {name: f"{place:032x}" for place, name in enumerate(ids[:-1])}
    import_result = import_features(tmp_path / "cache", "theirs", external_features, known)
    assert (import_result.n_rows, import_result.n_unknown, import_result.n_copies) == (
        len(ids) - 1,
        1,
        0,
    )
    np.testing.assert_allclose(
        import_result.features.load([known[name] for name in ids[:-1]]), values[:-1], rtol=1e-6
    )
    again = import_features(tmp_path / "cache", "theirs", external_features, known)
    assert again.features.spec == import_result.features.spec
    assert again.features.n_rows == import_result.n_rows


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("tap", ["layer1.avg", "layer4.map"])
def test_what_is_exported_comes_back(ours, tmp_path, kind, tap):
    """Ids, hashes and values of our own files, vectors and maps, without being told where the
    images are.
    """
    features = ours[tap]
    target = tmp_path / f"f.{kind}"
    EXPORTS[kind](features, target)
    import_result = import_features(
        tmp_path / "cache", "back", read_external_features(target), dtype="float16"
    )
    assert import_result.features.shape == features.shape
    np.testing.assert_array_equal(
        import_result.features.load(features.content_hashes()),
        features.load(features.content_hashes()),
    )
    assert dict(
        zip(import_result.features.ids(), import_result.features.content_hashes(), strict=True)
    ) == dict(zip(features.ids(), features.content_hashes(), strict=True))


@pytest.mark.slow
def test_a_recipe_trains_on_imported_features(folder, tmp_path, monkeypatch):
    """Beside taps of ours and alone; the command says what it kept, and the winner says that it has
    no network.
    """
    ids, values = foreign_table(folder)
    np.save(tmp_path / "theirs.npy", values)
    (tmp_path / "theirs.rows.csv").write_text("id\n" + "\n".join(ids) + "\n")
    text = (
        RECIPE.replace("folder: photos", f"folder: {folder / 'photos'}")
        + "external_features: [theirs]\n"
    )
    backbones = text[text.index("backbones:") : text.index("heads:")]
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "alone.yaml").write_text(text.replace(backbones, ""))
    with pytest.raises(RecipeError, match="headrace cache import"):
        read_run_state(load_recipe(tmp_path / "recipe.yaml"), write=False)
    command_result = headrace(
        "cache", "import", "theirs.npy", "--name", "theirs", "--recipe", "recipe.yaml", cwd=tmp_path
    )
    assert command_result.returncode == 0, command_result.stderr
    assert "30 rows of shape (2,) kept as theirs" in command_result.stdout
    assert "exact copies of other images, which share a row: 1" in command_result.stdout
    assert "left out: 1 with ids that no image has" in command_result.stdout
    result = run_here(tmp_path / "alone.yaml")
    assert result.names == ("theirs",)
    assert result.winner.score == 1.0
    with pytest.raises(ModelError, match="imported"):
        load_model(result.paths.root)
    assert (
        read_run_state(load_recipe(tmp_path / "recipe.yaml"), write=False).plan.features[-1].name
        == "theirs"
    )
    kept = headrace("cache", "gc", "alone.yaml", "--cache", "headrace-cache", cwd=tmp_path)
    (features,) = external_feature_sets(tmp_path / "headrace-cache", "theirs")
    assert str(features.path) not in kept.stdout


def test_images_without_an_imported_row_are_named(folder, tmp_path):
    """Nothing can make up for them, so the run does not begin."""
    ids, values = foreign_table(folder)
    text = (
        RECIPE.replace("folder: photos", f"folder: {folder / 'photos'}")
        + "external_features: [some]\n"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    np.save(tmp_path / "some.npy", values[:20])
    (tmp_path / "ids.txt").write_text("\n".join(ids[:20]))
    command_result = headrace(
        "cache",
        "import",
        "some.npy",
        "--ids",
        "ids.txt",
        "--name",
        "some",
        "--recipe",
        "recipe.yaml",
        cwd=tmp_path,
    )
    assert command_result.returncode == 0, command_result.stderr
    with pytest.raises(RecipeError, match="has no row for"):
        read_run_state(load_recipe(tmp_path / "recipe.yaml"), write=False)


def test_imports_that_cannot_be_are_refused(tmp_path):
    """What the file holds, and what to give."""
    values = np.ones((3, 2), np.float32)
    np.save(tmp_path / "f.npy", values)
    with pytest.raises(ExternalFeaturesInvalid, match="--ids"):
        read_external_features(tmp_path / "f.npy")
    with pytest.raises(ExternalFeaturesInvalid, match="no such file"):
        read_external_features(tmp_path / "g.npy")
    with pytest.raises(ExternalFeaturesInvalid, match=r"expected \.npy"):
        read_external_features(_touched(tmp_path / "f.mat"))
    for lines, said in (("a\nb", "2 ids"), ("a\nb\na", "more than once")):
        (tmp_path / "ids.txt").write_text(lines)
        with pytest.raises(ExternalFeaturesInvalid, match=said):
            read_external_features(tmp_path / "f.npy", ids_path=tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("a\nb\nc")
    external_features = read_external_features(tmp_path / "f.npy", ids_path=tmp_path / "ids.txt")
    with pytest.raises(ExternalFeaturesInvalid, match="--recipe"):
        import_features(tmp_path, "x", external_features)
    with pytest.raises(ExternalFeaturesInvalid, match=r"look like 'fine/1\.png'"):
        import_features(tmp_path, "x", external_features, {"fine/1.png": "0" * 32})
    with pytest.raises(ExternalFeaturesInvalid, match="a word"):
        import_features(tmp_path, "../x", external_features, {"a": "0" * 32})
    import_features(tmp_path, "x", external_features, {"a": "0" * 32})
    with pytest.raises(ExternalFeaturesInvalid, match="headrace cache rm"):
        import_features(tmp_path, "x", external_features, {"a": "0" * 32, "b": "1" * 32})


def _touched(path):
    path.write_bytes(b"")
    return path


def test_a_pipeline_reads_features_by_id(folder, ours):
    """scikit-learn's own tools work on ids: cross-validation, cloning, several sets
    side by side.
    """
    features = ours["layer1.avg"]
    samples = list_folder(folder / "photos")
    samples = samples[samples["id"].isin(features.ids())]
    ids, labels = samples["id"].to_numpy(), samples["label"].to_numpy()
    lookup = FeatureLookup([features, ours["layer4.map"].path])
    rows = lookup.fit(ids).transform(ids)
    assert rows.shape == (len(ids), features.shape[1] + int(np.prod(ours["layer4.map"].spec.shape)))
    contents = dict(zip(features.ids(), features.content_hashes().astype(str), strict=True))
    np.testing.assert_array_equal(rows, lookup.transform([contents[name] for name in ids]))
    np.testing.assert_array_equal(
        rows, FeatureLookup([features, open_feature_set(ours["layer4.map"].path)]).transform(ids)
    )
    pipeline = make_pipeline(FeatureLookup(features), StandardScaler(), LogisticRegression())
    assert cross_val_score(pipeline, ids, labels, cv=3).mean() > 0.8
    check_is_fitted(lookup)
    with pytest.raises(CacheError, match="'nobody'"):
        pipeline.fit(ids, labels).predict(["nobody"])


@pytest.fixture
def two_folders(tmp_path):
    """Two folders of images with the same names, and others, in one cache; and of one image the
    state before an edit.
    """
    make_photos(tmp_path / "one", n=8)
    make_photos(tmp_path / "two", n=6, seed=1)
    with client_here() as client:
        for name in ("one", "two"):
            features = extract_features(
                tmp_path / name, NETWORK, ["layer1.avg"], cache=tmp_path / "cache", client=client
            )
    return tmp_path, features["layer1.avg"]


def test_an_id_that_stands_for_two_images_is_refused(two_folders):
    """Which image is meant is said by content: as hashes, or in a DataFrame, which cross-validation
    can slice.
    """
    folder, features = two_folders
    samples = list_folder(folder / "one")
    samples["content"] = list(content_hashes(samples, folder / "index.parquet").hashes)
    own = features.load(samples["content"].tolist())
    with pytest.raises(
        CacheError,
        match=r"'coarse/000.png' stands for 2 images .*6 of 8 ids.*columns id and content",
    ):
        FeatureLookup(features).fit(samples["id"])
    np.testing.assert_array_equal(FeatureLookup(features).fit_transform(samples["content"]), own)
    np.testing.assert_array_equal(
        FeatureLookup(features).fit_transform(samples[["id", "content"]]), own
    )
    only_here = samples["id"].isin(["coarse/006.png", "fine/007.png"])
    np.testing.assert_array_equal(
        FeatureLookup(features).fit_transform(samples["id"][only_here]), own[only_here]
    )
    pipeline = make_pipeline(FeatureLookup(features), StandardScaler(), LogisticRegression())
    assert cross_val_score(pipeline, samples, samples["label"], cv=2).shape == (2,)


def test_an_edited_image_is_refused_by_its_id(two_folders):
    """Its rows before and after have one id; across feature sets too, where one of them knows the
    old image alone.
    """
    folder, _ = two_folders
    with client_here() as client:
        old = extract_features(
            folder / "one", NETWORK, ["layer1.avg"], cache=folder / "other", client=client
        )["layer1.avg"]
        edited = folder / "one" / "fine" / "007.png"
        edited.write_bytes((folder / "two" / "fine" / "001.png").read_bytes())
        new = extract_features(
            folder / "one",
            NETWORK,
            ["layer1.avg", "layer2.avg"],
            cache=folder / "other",
            client=client,
        )
    with pytest.raises(CacheError, match=r"'fine/007.png' stands for 2 images"):
        FeatureLookup(new["layer1.avg"]).fit(["fine/007.png"])
    with pytest.raises(
        CacheError, match=r"'fine/007.png' stands for one image in layer2.avg and for another"
    ):
        FeatureLookup([old, new["layer2.avg"]]).fit(["fine/007.png"])
    assert FeatureLookup([old, new["layer2.avg"]]).fit_transform(["fine/005.png"]).shape == (
        1,
        64 + 128,
    )


def test_what_is_no_id_is_refused(ours):
    features = ours["layer1.avg"]
    with pytest.raises(CacheError, match="'a'"):
        FeatureLookup(features).fit(pd.DataFrame({"id": ["a"], "content": [None]}))
    with pytest.raises(CacheError, match="'a'"):
        FeatureLookup(features).fit(pd.DataFrame({"id": ["a"], "content": ["0" * 32]}))
    for wrong in (np.array([["a", "b"]]), pd.DataFrame({"id": ["a"], "path": ["b"]})):
        with pytest.raises(ValueError, match=r"shape \(1, 2\).*columns id and content"):
            FeatureLookup(features).fit(wrong)
    assert FeatureLookup(features).fit_transform([]).shape == (0, 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_by_recipe_has_its_images_in_its_order_under_its_ids(two_folders, kind):
    """Of a cache that serves two folders; an image that has no row is counted and named."""
    folder, features = two_folders
    if kind == "zarr":
        pytest.importorskip("zarr")
    order = [
        "fine/005.png",
        "coarse/000.png",
        "fine/001.png",
        "coarse/004.png",
        "new/1.png",
        "coarse/002.png",
    ]
    (folder / "two" / "new").mkdir()
    make_photos(folder / "new", n=2, seed=9)
    (folder / "new" / "fine" / "001.png").rename(folder / "two" / "new" / "1.png")
    table = pd.DataFrame({"path": order, "name": list("fedcba"), "label": list("xyxyxy")})
    table.to_csv(folder / "two" / "t.csv", index=False)
    text = (
        RECIPE.replace("folder: photos", "table: two/t.csv\n  id_column: name") + "cache: cache\n"
    )
    (folder / "recipe.yaml").write_text(text)
    command_result = headrace(
        "cache", "export", "layer1.avg", f"out.{kind}", "--recipe", "recipe.yaml", cwd=folder
    )
    assert command_result.returncode == 0, command_result.stderr
    assert "Left out, without a row: 1 image of the recipe, b." in command_result.stdout
    ids, values = read_export(folder / f"out.{kind}")
    assert ids == list("fedca")
    hashes = content_hashes(
        read_table(folder / "two" / "t.csv", id_column="name"), folder / "index.parquet"
    ).hashes
    np.testing.assert_array_equal(
        values, features.load([name for name in hashes if features.locate([name])[0] >= 0])
    )


def read_export(path):
    """Ids and features of an exported file, as another program reads them."""
    match path.suffix:
        case ".npy":
            return pd.read_csv(path.with_suffix(".rows.csv"), dtype=str)["id"].tolist(), np.load(
                path
            )
        case ".parquet":
            frame = pd.read_parquet(path)
            return frame["id"].tolist(), np.stack(frame["features"])
        case ".zarr":
            import zarr

            group = zarr.open_group(path, mode="r")
            return [bytes(row).rstrip(b"\0").decode() for row in group["id"][:]], group["features"][
                :
            ]


def test_an_export_says_which_ids_stand_for_several_images(two_folders):
    """All rows are written, and `content` tells them apart; what is exported so comes
    back whole.
    """
    folder, features = two_folders
    command_result = headrace(
        "cache", "export", "layer1.avg", "all.parquet", "--cache", "cache", cwd=folder
    )
    assert command_result.returncode == 0, command_result.stderr
    assert "6 ids stand for several images" in command_result.stdout
    assert "`content` tells them apart" in command_result.stdout
    assert len(pd.read_parquet(folder / "all.parquet")) == features.n_rows == 14
    back = import_features(
        folder / "back", "x", read_external_features(folder / "all.parquet"), dtype="float16"
    ).features
    np.testing.assert_array_equal(
        back.load(features.content_hashes()), features.load(features.content_hashes())
    )
    (folder / "recipe.yaml").write_text(
        RECIPE.replace("folder: photos", "folder: empty") + "cache: cache\n"
    )
    make_photos(folder / "empty", n=2, seed=7)
    command_result = headrace(
        "cache", "export", "layer1.avg", "none.npy", "--recipe", "recipe.yaml", cwd=folder
    )
    assert command_result.returncode == 2
    assert "has no row of any of the 2 images" in command_result.stderr
    assert not (folder / "none.npy").exists()


def test_an_export_without_double_ids_says_nothing_of_them(folder, ours):
    command_result = headrace(
        "cache", "export", "layer1.avg", "plain.npy", "--cache", "ours", cwd=folder
    )
    assert command_result.returncode == 0, command_result.stderr
    assert "stand for several" not in command_result.stdout
