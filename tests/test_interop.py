"""Features to and from other programs: imports by id, exports that come back the same, scikit-learn pipelines."""

import h5py
import numpy as np
import pandas as pd
import pytest
from deliver_cases import here, run_here
from run_cases import RECIPE, headrace, make_photos
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from headrace.cache import RowsMissing, open_feature_set
from headrace.cache.export import EXPORTS
from headrace.cache.foreign import ForeignFeatures, import_features, imported_sets, read_foreign
from headrace.extract import BackboneSpec, list_folder
from headrace.heads import FeatureLookup
from headrace.pipelines import RecipeError, extract_features, load_recipe, survey
from headrace.pipelines.deliver.model import ModelError, load_model

NETWORK = BackboneSpec("torchvision:resnet18", weights="random:0", image_size=32, crop_fraction=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos, one of them copied, and features of our own."""
    folder = tmp_path_factory.mktemp("interop")
    make_photos(folder / "photos", n=30)
    (folder / "photos" / "fine" / "copy.png").write_bytes((folder / "photos" / "fine" / "001.png").read_bytes())
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    with here():
        return extract_features(
            folder / "photos", NETWORK, ["layer1.avg", "layer4.map"], cache=folder / "ours", workers=1
        )


def foreign_table(folder):
    """Ids of all photos in another order, with two numbers that tell the classes apart, and one id of no photo."""
    samples = list_folder(folder / "photos").sample(frac=1, random_state=0)
    ids = [*samples["id"], "elsewhere/9.png"]
    rng = np.random.default_rng(0)
    sign = np.array([1.0 if name.startswith("fine") else -1.0 for name in ids])
    return ids, np.stack([sign * (1 + rng.random(len(ids))), rng.normal(size=len(ids))], axis=1).astype(np.float32)


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
            pd.DataFrame({"id": ids, "a": values[:, 0], "b": values[:, 1]}).to_csv(source, index=False)
        case "h5":
            with h5py.File(source, "w") as file:
                file["deep/features"] = values
                file["names"] = np.array(ids, dtype=h5py.string_dtype())
    read = read_foreign(source, ids=table, columns=["a,b"] if kind == "csv" else ())
    assert read.ids == ids
    np.testing.assert_allclose(read.features, values, rtol=1e-6)
    known = {name: f"{place:032x}" for place, name in enumerate(ids[:-1])}
    done = import_features(tmp_path / "cache", "theirs", read, known)
    assert (done.rows, done.unknown, done.copies) == (len(ids) - 1, 1, 0)
    np.testing.assert_allclose(done.features.load([known[name] for name in ids[:-1]]), values[:-1], rtol=1e-6)
    again = import_features(tmp_path / "cache", "theirs", read, known)
    assert again.features.spec == done.features.spec
    assert again.features.n_rows == done.rows


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("tap", ["layer1.avg", "layer4.map"])
def test_what_is_exported_comes_back(ours, tmp_path, kind, tap):
    """Ids, hashes and values of our own files, vectors and maps, without being told where the images are."""
    features = ours[tap]
    target = tmp_path / f"f.{kind}"
    EXPORTS[kind](features, target)
    done = import_features(tmp_path / "cache", "back", read_foreign(target), dtype="float16")
    assert done.features.shape == features.shape
    np.testing.assert_array_equal(done.features.load(features.content()), features.load(features.content()))
    assert dict(zip(done.features.ids(), done.features.content(), strict=True)) == dict(
        zip(features.ids(), features.content(), strict=True)
    )


def test_a_recipe_trains_on_imported_features(folder, tmp_path, monkeypatch):
    """Beside taps of ours and alone; the command says what it kept, and the winner says that it has no network."""
    ids, values = foreign_table(folder)
    np.save(tmp_path / "theirs.npy", values)
    (tmp_path / "theirs.rows.csv").write_text("id\n" + "\n".join(ids) + "\n")
    text = RECIPE.replace("folder: photos", f"folder: {folder / 'photos'}") + "imported: [theirs]\n"
    backbones = text[text.index("backbones:") : text.index("heads:")]
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "alone.yaml").write_text(text.replace(backbones, ""))
    with pytest.raises(RecipeError, match="headrace cache import"):
        survey(load_recipe(tmp_path / "recipe.yaml"), write=False)
    done = headrace("cache", "import", "theirs.npy", "--name", "theirs", "--recipe", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "30 rows of shape (2,) kept as theirs" in done.stdout
    assert "1 are of exact copies" in done.stdout
    assert "1 have ids that no image has" in done.stdout
    result = run_here(tmp_path / "alone.yaml")
    assert result.names == ("theirs",)
    assert result.winner["accuracy"] == 1.0
    with pytest.raises(ModelError, match="imported"):
        load_model(result.paths.root)
    assert survey(load_recipe(tmp_path / "recipe.yaml"), write=False).plan.features[-1].name == "theirs"
    kept = headrace("cache", "gc", "alone.yaml", "--cache", "headrace-cache", cwd=tmp_path)
    (features,) = imported_sets(tmp_path / "headrace-cache", "theirs")
    assert str(features.path) not in kept.stdout


def test_images_without_an_imported_row_are_named(folder, tmp_path):
    """Nothing can make up for them, so the run does not begin."""
    ids, values = foreign_table(folder)
    text = RECIPE.replace("folder: photos", f"folder: {folder / 'photos'}") + "imported: [some]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    np.save(tmp_path / "some.npy", values[:20])
    (tmp_path / "ids.txt").write_text("\n".join(ids[:20]))
    done = headrace(
        "cache", "import", "some.npy", "--ids", "ids.txt", "--name", "some", "--recipe", "recipe.yaml", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(RecipeError, match="has no row for"):
        survey(load_recipe(tmp_path / "recipe.yaml"), write=False)


def test_imports_that_cannot_be_are_refused(tmp_path):
    """What the file holds, and what to give."""
    values = np.ones((3, 2), np.float32)
    np.save(tmp_path / "f.npy", values)
    with pytest.raises(ForeignFeatures, match="--ids"):
        read_foreign(tmp_path / "f.npy")
    with pytest.raises(ForeignFeatures, match="no such file"):
        read_foreign(tmp_path / "g.npy")
    with pytest.raises(ForeignFeatures, match=r"expected \.npy"):
        read_foreign(_touched(tmp_path / "f.mat"))
    for lines, said in (("a\nb", "2 ids"), ("a\nb\na", "more than once")):
        (tmp_path / "ids.txt").write_text(lines)
        with pytest.raises(ForeignFeatures, match=said):
            read_foreign(tmp_path / "f.npy", ids=tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("a\nb\nc")
    read = read_foreign(tmp_path / "f.npy", ids=tmp_path / "ids.txt")
    with pytest.raises(ForeignFeatures, match="--recipe"):
        import_features(tmp_path, "x", read)
    with pytest.raises(ForeignFeatures, match=r"look like 'fine/1\.png'"):
        import_features(tmp_path, "x", read, {"fine/1.png": "0" * 32})
    with pytest.raises(ForeignFeatures, match="a word"):
        import_features(tmp_path, "../x", read, {"a": "0" * 32})
    import_features(tmp_path, "x", read, {"a": "0" * 32})
    with pytest.raises(ForeignFeatures, match="headrace cache rm"):
        import_features(tmp_path, "x", read, {"a": "0" * 32, "b": "1" * 32})


def _touched(path):
    path.write_bytes(b"")
    return path


def test_a_pipeline_reads_features_by_id(folder, ours):
    """scikit-learn's own tools work on ids: cross-validation, cloning, several sets side by side."""
    features = ours["layer1.avg"]
    samples = list_folder(folder / "photos")
    samples = samples[samples["id"].isin(features.ids())]
    ids, labels = samples["id"].to_numpy(), samples["label"].to_numpy()
    lookup = FeatureLookup([features, ours["layer4.map"].path])
    rows = lookup.fit(ids).transform(ids)
    assert rows.shape == (len(ids), features.shape[1] + int(np.prod(ours["layer4.map"].spec.shape)))
    contents = dict(zip(features.ids(), features.content().astype(str), strict=True))
    np.testing.assert_array_equal(rows, lookup.transform([contents[name] for name in ids]))
    np.testing.assert_array_equal(
        rows, FeatureLookup([features, open_feature_set(ours["layer4.map"].path)]).transform(ids)
    )
    pipeline = make_pipeline(FeatureLookup(features), StandardScaler(), LogisticRegression())
    assert cross_val_score(pipeline, ids, labels, cv=3).mean() > 0.8
    check_is_fitted(lookup)
    with pytest.raises(RowsMissing, match="'nobody'"):
        pipeline.fit(ids, labels).predict(["nobody"])
