"""The map of the images: places are scikit-learn's, colours the images' own, and what cannot be
read is said.
"""

import importlib.util
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from support.reports import HOSTILE

from headrace.pipelines.finished import read_finished_run
from headrace.pipelines.records import read_record, write_record
from headrace.pipelines.report.build import write_report
from headrace.pipelines.report.images import embedding
from headrace.pipelines.report.images.embedding import colourings, make_layouts, map_section
from headrace.pipelines.report.images.small_copies import make_small_copies, measure_image
from headrace.pipelines.report.judged import image_table, judged_sides
from headrace.pipelines.report.page.blocks import NO_VALUE, STEPS, Note, PointMap
from headrace.pipelines.report.selected_model import find_selected, test_predictions as predict_test


@pytest.fixture(scope="module", autouse=True)
def umap_itself(no_umap):
    """Which other files do without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "umap")
        yield


@pytest.fixture(scope="module")
def known(hostile_run):
    """The run, and what is known of its images."""
    run = read_finished_run(hostile_run / "runs" / "single")
    tested = predict_test(run, find_selected(run))
    return run, image_table(run, judged_sides(run, tested))


@pytest.mark.parametrize(("n", "width"), [(300, 40), (60, 200)])
def test_places_are_those_of_scikit_learn(n, width, monkeypatch):
    """Of standardized features, to the 16 bits that they are written in; a constant feature has no
    say.
    """
    monkeypatch.setitem(sys.modules, "umap", None)
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(n, 5)) @ rng.normal(size=(5, width))).astype(np.float32) * 7 + 3
    X[:, 0] = 4
    (layout,), share = make_layouts(X)
    reference = PCA(2, svd_solver="full").fit(StandardScaler().fit_transform(X[:, 1:]))
    expected = reference.transform(StandardScaler().fit_transform(X[:, 1:]))
    assert share == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-3)
    shown = layout.places.astype(float)
    span = np.ptp(expected, 0).max()
    for axis in range(2):
        own = (shown[:, axis] - shown[:, axis].mean()) / 65_535 * span
        sign = np.sign(own @ expected[:, axis])
        assert np.abs(sign * own - expected[:, axis]).max() < 2e-3 * span
    assert shown.min() == 0
    assert shown.max() == 65_535


def test_features_that_are_all_alike_are_one_place():
    """No direction holds anything; no division by zero."""
    (layout, *_), share = make_layouts(np.ones((5, 3), np.float32))
    assert share == 0
    assert len(np.unique(layout.places, axis=0)) == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="needs the extra umap")
def test_umap_is_kept_and_made_again_where_its_file_is_damaged(tmp_path):
    """The same places from the file, from a damaged file, and without one."""
    X = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    path = tmp_path / "map.npz"
    places = [make_layouts(X, path)[0][1].places]
    whole = path.read_bytes()
    places.append(make_layouts(X, path)[0][1].places)
    path.write_bytes(whole[:-50] + bytes(50))
    places.append(make_layouts(X, path)[0][1].places)
    path.unlink()
    places.append(make_layouts(X)[0][1].places)
    assert all(np.array_equal(places[0], other) for other in places[1:])


@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="needs the extra umap")
def test_few_images_and_places_that_are_no_numbers_have_the_first_layout_alone(monkeypatch):
    """UMAP wants more images than neighbours (lmcinnes/umap#266), and may answer with nan (#90)."""
    X = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    assert [layout.title for layout in make_layouts(X[:15])[0]] == ["PCA"]
    assert [layout.title for layout in make_layouts(X)[0]] == ["PCA", "UMAP"]
    # After `make_layouts`, which silences the import's warnings.
    from umap import UMAP

    monkeypatch.setattr(UMAP, "fit_transform", lambda self, X: np.full((len(X), 2), np.nan))
    assert [layout.title for layout in make_layouts(X)[0]] == ["PCA"]


def test_colours_are_words_or_steps():
    """Words by their number, numbers in 65,534 steps, nothing where there is nothing; a column of a
    word of its own for every image is no colour, unless it is the group.
    """
    frame = pd.DataFrame(
        {
            "id": [f"i{n}" for n in range(40)],
            "content": "c",
            "label": ["b", "a"] * 20,
            "light": np.linspace(-1, 3, 40),
            "note": [f"own words {n}" for n in range(40)],
            "patient": [f"p{n}" for n in range(40)],
            "lens": [None, *["wide"] * 20, *["long"] * 19],
            "same": "x",
        }
    )
    frame.loc[3, "light"] = np.nan
    made = {colouring.title: colouring for colouring in colourings(frame, {"patient"})}
    assert list(made) == ["label", "light", "patient", "lens"]
    assert [made["label"].words[code] for code in made["label"].codes] == frame["label"].tolist()
    assert made["lens"].codes[0] == NO_VALUE
    light = made["light"]
    assert (light.low, light.high, light.codes[0], light.codes[-1]) == (-1, 3, 0, STEPS)
    assert light.codes[3] == NO_VALUE
    back = light.low + (light.high - light.low) * light.codes / STEPS
    known = np.isfinite(frame["light"])
    assert back[known] == pytest.approx(frame["light"][known], abs=1e-4)


def test_the_map_shows_every_image_with_its_outcome(known):
    """Right and wrong are the winner's out-of-fold predictions and its evaluation on record."""
    run, frame = known
    copies = make_small_copies(run.images.image_paths, frame["content"].tolist())
    section = map_section(run, frame, copies.by_content, [])
    (point_map,) = [block for block in section.blocks if isinstance(block, PointMap)]
    assert set(point_map.ids) == set(frame["id"])
    assert all(picture.startswith(b"RIFF") for picture in point_map.pictures)
    outcome = next(c for c in point_map.colourings if c.title == "outcome")
    by_id = dict(zip(point_map.ids, [outcome.words[code] for code in outcome.codes], strict=True))
    rows = run.held_out_rows
    right = run.out_of_fold_predictions[rows].argmax(1) == run.bank.target[rows]
    assert {by_id[i] for i in run.bank.ids[rows][right]} == {"right"}
    assert {by_id[i] for i in run.bank.ids[rows][~right]} == {"wrong"}
    label = next(c for c in point_map.colourings if c.title == "label")
    assert set(label.words) == set(run.classes)
    assert HOSTILE[0] in label.words
    stripes = next(c for c in point_map.colourings if c.title == "<i>stripes</i>")
    assert set(stripes.words) == {"0", "1"}


def test_more_images_than_there_is_room_for_are_drawn_and_said(known, monkeypatch):
    """At random, and the caption's number is theirs."""
    run, frame = known
    monkeypatch.setattr(embedding, "MAX_POINTS", 20)
    section = map_section(run, frame, {}, [])
    point_map = section.blocks[0]
    assert len(point_map.ids) == 20
    assert point_map.caption.startswith("20 images")
    notes = [block.text for block in section.blocks if isinstance(block, Note)]
    assert notes == [f"Of {len(frame):,} images, 20 drawn at random are on the map."]


def test_damaged_features_end_the_map_and_not_the_report(hostile_run, tmp_path):
    """A shard with other bytes: the section says why there is no map, the page is written."""
    copy = tmp_path / "copy"
    shutil.copytree(hostile_run, copy)
    stored = copy / "runs" / "single" / "recipe.json"
    write_record(stored, read_record(stored) | {"cache": str(copy / "headrace-cache")})
    run = read_finished_run(copy / "runs" / "single")
    for name in run.feature_specs:
        for shard in run.open_features(name)[0].path.rglob("*.h5"):
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 0xFF
            shard.chmod(0o644)
            shard.write_bytes(bytes(data))
    text = write_report(copy / "runs" / "single").page.read_text()
    assert "No map: the features cannot be read" in text


def test_a_copy_measures_what_is_there():
    """A black image is dark, an even one has no contrast, stripes are sharper than their blur."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::8] = 255
    soft = np.tile((128 + 100 * np.sin(np.arange(64) / 10)).astype(np.uint8), (64, 1))

    def measured(pixels):
        return measure_image("image.png", png(pixels))

    black, white = (
        measured(np.zeros((64, 64), np.uint8)),
        measured(np.full((64, 64), 255, np.uint8)),
    )
    assert (black.brightness, black.contrast, black.sharpness) == (0, 0, 0)
    assert (white.brightness, white.contrast) == (1, 0)
    assert measured(stripes).sharpness > 10 * measured(soft).sharpness > 0
    assert (black.width, black.height) == (64, 64)


def test_a_turned_jpeg_has_the_size_that_is_seen(tmp_path):
    """The tag of a camera that was held upright swaps width and height."""
    image = Image.new("RGB", (600, 300))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    copy = measure_image("turned.jpg", (tmp_path / "turned.jpg").read_bytes())
    assert (copy.width, copy.height) == (300, 600)


def test_images_that_changed_or_are_gone_are_counted(tmp_path):
    """Neither has a picture."""
    from headrace.extract.images.content_hashes import hash_bytes

    paths, contents = {}, []
    for number, pixels in enumerate((10, 20, 30)):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(np.full((8, 8), pixels, np.uint8)))
        contents.append(hash_bytes(path.read_bytes()))
        paths[contents[-1]] = str(path)
    (tmp_path / "1.png").write_bytes(b"other bytes")
    (tmp_path / "2.png").unlink()
    copies = make_small_copies(paths, [*contents, "no such hash"])
    assert (list(copies.by_content), copies.unreadable) == ([contents[0]], 3)


def test_labels_of_test_images_are_shown_only_where_they_were_evaluated(hostile_run, tmp_path):
    """Without the record, no test image is on the map."""
    root = tmp_path / "run"
    shutil.copytree(hostile_run / "runs" / "single", root)
    for name in ("test-evaluations.jsonl", ".test-evaluations.jsonl"):
        (root / name).unlink()
    run = read_finished_run(root)
    tested = predict_test(run, find_selected(run))
    frame = image_table(run, judged_sides(run, tested))
    assert set(frame["split"]) == {"validation"}
    assert not set(frame["id"]) & set(run.images.dataset.test.ids)


def test_a_network_has_the_map_of_the_last_tap():
    """It reads images; the last tap stands for it."""
    run = SimpleNamespace(
        winner=SimpleNamespace(inputs=("image",)), feature_specs={"a.avg": 1, "b.avg": 2}
    )
    assert embedding._input_names(run) == ["b.avg"]
    run.winner.inputs = ("a.avg",)
    assert embedding._input_names(run) == ["a.avg"]


def png(pixels):
    import io

    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG")
    return stored.getvalue()
