"""Images without a label, features without a task, predictions without a network, units of several
images: one run of a table of patients.
"""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from support import forks
from support.models import client_here, run_here
from support.runs import RECIPE, counted, headrace, make_photos

from headrace.cache.feature_set import list_feature_sets
from headrace.extract.images.content_hashes import hash_bytes
from headrace.heads.evaluate.temperature import with_temperature
from headrace.pipelines.export.write import export_model
from headrace.pipelines.finished import read_finished_run
from headrace.pipelines.models.model import load_model
from headrace.pipelines.planning.run_state import read_run_state
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.run import extract_recipe

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
UNITS = RECIPE.replace("folder: photos", "table: table.csv\n  unlabelled: more").replace(
    "folds: 3", "folds: 3\n  unit: patient"
)
EXTRACT = ["--backbone", "torchvision:resnet18", "--weights", "random:0", "--image-size", "32"]


def make_project(folder):
    """Sixty photos of twenty patients, six of them without a label in the table, and thirty more
    that no table names.
    """
    make_photos(folder / "photos", 60)
    rows = [
        {"path": str(path.relative_to(folder)), "label": path.parent.name, "patient": i // 3}
        for i, path in enumerate(sorted((folder / "photos").rglob("*.png")))
    ]
    table = pd.DataFrame(rows)
    table.loc[::10, "label"] = ""
    table.to_csv(folder / "table.csv", index=False)
    make_photos(folder / "made", 30, seed=7)
    (folder / "more").mkdir()
    for path in (folder / "made").rglob("*.png"):
        path.rename(folder / "more" / f"u{path.name}")
    shutil.rmtree(folder / "made")
    (folder / "recipe.yaml").write_text(UNITS)
    return table


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project, run. The tests leave it as it is."""
    folder = tmp_path_factory.mktemp("units")
    make_project(folder)
    run_here(folder / "recipe.yaml")
    return folder


def test_each_image_is_extracted_once_and_counted(project):
    """Also those without a label: in the plan, in the accounting, in the table of predictions."""
    for features in list_feature_sets(project / "headrace-cache"):
        assert features.n_rows == 90
        assert len(set(features.content_hashes().tolist())) == 90
    state = read_run_state(load_recipe(project / "recipe.yaml"), write=False)
    assert (state.plan.images, state.plan.images_new) == (90, 0)
    accounting = state.accounting
    assert (accounting.found, accounting.unlabelled, counted(accounting)) == (90, 36, 90)
    assert "36 without a label, to predict" in accounting.sentence()
    predictions = pd.read_parquet(project / "headrace-runs/recipe/predictions.parquet")
    counts = predictions["split"].value_counts()
    assert counts["unlabelled"] == 36
    assert (accounting.train, accounting.test) == (counts["train"], counts["test"])
    assert predictions["label"].isna().tolist() == (predictions["split"] == "unlabelled").tolist()
    assert predictions["id"].str.startswith("more/").sum() == 30


def test_no_head_is_trained_or_scored_on_an_image_without_a_label(project):
    table = pd.read_csv(project / "table.csv")
    nameless = set(table.loc[table["label"].isna(), "path"])
    run = read_finished_run(project / "headrace-runs/recipe")
    used = {*run.bank.ids.tolist(), *run.images.dataset.test.ids.tolist()}
    assert not used & nameless
    assert not any(name.startswith("more/") for name in used)
    assert len(used) == 54


def test_the_runs_predictions_are_those_of_predict_with_and_without_the_cache(project, tmp_path):
    """From the cache to the last bit of a float32 or nearly; from pixels within 1e-3, for the
    features are kept in float16 and batches of other sizes round otherwise.
    """
    stored = pd.read_parquet(project / "headrace-runs/recipe/predictions.parquet")
    stored = stored.set_index("id")["p_fine"]
    for options, tolerance in (((), 1e-6), (("--no-cache",), 1e-3)):
        out = tmp_path / "p.parquet"
        command = ["predict", "recipe.yaml", "table.csv", "more", "-o", out, "--force", *options]
        done = headrace(*command, cwd=project)
        assert done.returncode == 0, done.stderr
        assert ("90 from cached features" in done.stderr) == (not options)
        table = pd.read_parquet(out).set_index("file")["p_fine"]
        assert set(table.index) == set(stored.index)
        assert np.abs(table - stored[table.index]).max() <= tolerance


def test_known_images_run_no_network(project, tmp_path):
    """Neither under another name, by which the index does not know them."""
    shutil.copy(project / "more" / "u000.png", tmp_path / "renamed.png")
    command = ["predict", project / "headrace-runs/recipe", tmp_path / "renamed.png", "-o"]
    done = headrace(*command, tmp_path / "p.csv", cwd=project, first=_NO_NETWORK)
    assert done.returncode == 0, done.stderr
    assert "1 from cached features" in done.stderr


_NO_NETWORK = """\
import headrace.pipelines.models.images as images
def no_network(*_, **__):
    raise AssertionError("a network is loaded")
images.open_engine = no_network
"""


def test_a_cache_of_another_fingerprint_is_never_used(project, tmp_path):
    """Features of other weights lie under another fingerprint; an empty cache has none."""
    other = UNITS.replace("random:0", "random:1").replace("table.csv", str(project / "table.csv"))
    other = other.replace("unlabelled: more", f"unlabelled: {project / 'more'}")
    (tmp_path / "other.yaml").write_text(other)
    with client_here() as client:
        extract_recipe(load_recipe(tmp_path / "other.yaml"), console=QUIET, client=client)
    command = ["predict", project / "headrace-runs/recipe", "more", "--cache"]
    done = headrace(*command, tmp_path / "headrace-cache", "-o", tmp_path / "p.csv", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "cached features" not in done.stderr
    assert "no such folder" in headrace(*command, "nowhere", cwd=project).stderr


def test_unknown_images_go_into_the_cache_when_asked(project, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(project / "headrace-cache", cache)
    make_photos(tmp_path / "new", 8, seed=9)
    (tmp_path / "new" / "bad.png").write_bytes(b"no image")
    command = ["predict", project / "headrace-runs/recipe", "new", "--cache", cache, "--force"]
    for options in (("--update-cache",), ()):
        done = headrace(*command, "-o", "p.csv", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "9 images, 8 from cached features" in done.stderr
    # the superuser may write to any folder
    readonly = "import os; os.access = lambda path, mode, **_: mode != os.W_OK"
    for images, status in (("new", 0), ("more", 2)):
        shutil.copytree(project / "more", tmp_path / "more", dirs_exist_ok=True)
        for number, photo in enumerate((tmp_path / "more").rglob("*.png")):
            photo.write_bytes(photo.read_bytes() + bytes([number]))  # other bytes than are known
        arguments = [*command[:2], images, *command[3:], "-o", "q.csv", "--update-cache"]
        done = headrace(*arguments, cwd=tmp_path, first=readonly)
        assert done.returncode == status, done.stderr
    assert "cannot be written to. Leave out --update-cache, or name another" in done.stderr
    # of the taps that the model reads, and no other
    assert sorted({features.n_rows for features in list_feature_sets(cache)}) in ([90, 98], [98])


def test_scores_are_those_of_units(project):
    """Leaderboard, temperature and test against plain NumPy on the stored predictions of images."""
    run = read_finished_run(project / "headrace-runs/recipe")
    task, bank = run.task, run.bank
    accuracies = []
    predicted = bank.out_of_fold_predictions(run.winner.spec)
    for fold in range(3):
        rows = np.flatnonzero(task.fold == fold)
        units = sorted(set(task.units[rows]))
        means = np.stack([predicted[rows][task.units[rows] == unit].mean(0) for unit in units])
        target = np.array([task.target[rows][task.units[rows] == unit][0] for unit in units])
        accuracies.append((means.argmax(1) == target).mean())
    assert run.winner.score == pytest.approx(np.mean(accuracies))
    selection = json.loads((project / "headrace-runs/recipe/selection.json").read_text())
    assert selection["images"] == len(set(task.units))
    result = run.winner_evaluation["result"]
    test = run.images.dataset.test
    assert (result["images"], result["units"]) == (len(test.ids), len(set(test.units)))
    assert result["groups"] == result["units"]
    rule = load_model(project / "headrace-runs/recipe/winner").unit_rule
    assert (rule.column, rule.aggregation) == ("patient", "mean")
    assert rule.temperature == pytest.approx(selection["calibration"]["temperature"])


def test_units_are_predicted_beside_images(project, tmp_path):
    """The mean of the images at the temperature of units; a unit of which no image can be used has
    none.
    """
    (tmp_path / "bad.png").write_bytes(b"no image")
    table = pd.read_csv(project / "table.csv").assign(
        path=lambda frame: [str(project / path) for path in frame["path"]]
    )
    bad = {"path": str(tmp_path / "bad.png"), "label": "", "patient": 77}
    pd.concat([table, pd.DataFrame([bad])]).to_csv(tmp_path / "table.csv", index=False)
    done = headrace(
        "predict", project / "recipe.yaml", "table.csv", "-o", "p.parquet", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    images, units = (pd.read_parquet(tmp_path / f"p{name}.parquet") for name in ("", ".units"))
    assert len(units) == 21
    last = units.iloc[-1]
    assert (last["unit"], last["images"], last["failed"]) == ("77", 0, 1)
    assert last[["class", "probability", "p_fine"]].isna().all()
    rule = load_model(project / "headrace-runs/recipe/winner").unit_rule
    means = images.iloc[:60][["p_coarse", "p_fine"]].groupby(table["patient"]).mean().to_numpy()
    expected = with_temperature("single", means, rule.temperature, rule.floor)
    assert np.allclose(units[["p_coarse", "p_fine"]][:20], expected, atol=1e-6)
    stored = pd.read_parquet(project / "headrace-runs/recipe/unit-predictions.parquet")
    whole = stored[(stored["images"] == 3) & (stored["split"] != "unlabelled")].set_index("unit")
    again = units.set_index("unit").loc[whole.index]
    assert np.allclose(whole["p_fine"], again["p_fine"].astype(float), atol=1e-6)


def test_an_export_predicts_units_where_headrace_is_not(project, tmp_path):
    """By the function of preprocess.py, from the predictions of images, as `predict` does."""
    export_model(load_model(project / "headrace-runs/recipe"), tmp_path / "out", ["safetensors"])
    command = ("predict", project / "recipe.yaml", "table.csv", "-o", tmp_path / "p.parquet")
    done = headrace(*command, cwd=project)
    assert done.returncode == 0, done.stderr
    alone = """import sys
sys.modules["headrace"] = None
import pandas as pd
from preprocess import predict_unit
images = pd.read_parquet("../p.parquet")[["p_coarse", "p_fine"]]
of = pd.read_csv(sys.argv[1])["patient"].to_numpy()
for name, unit in pd.read_parquet("../p.units.parquet").set_index("unit").iterrows():
    found = predict_unit(images[of == int(name)].to_numpy())
    assert abs(found - unit[["p_coarse", "p_fine"]].to_numpy()).max() < 1e-6, (name, found, unit)
"""
    arguments = [sys.executable, "-c", alone, project / "table.csv"]
    subprocess.run(arguments, cwd=tmp_path / "out", check=True)
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["unit"]["column"] == "patient"


def test_features_without_a_task(tmp_path):
    """A dry run writes nothing; a killed call is continued; a second one does nothing; what cannot
    be decoded is counted and named.
    """
    make_photos(tmp_path / "photos", 140)
    for path in list((tmp_path / "photos").rglob("*.png")):
        path.rename(tmp_path / "photos" / path.name)
    (tmp_path / "photos" / "000.png").write_bytes(b"no image")
    for name in ("coarse", "fine"):
        (tmp_path / "photos" / name).rmdir()
    command = ["extract", "photos", *EXTRACT, "--tap", "layer1.avg", "--workers", "1"]
    dry = headrace(*command, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "140 of 140 images go through a network, in 2 work units" in dry.stdout
    assert "core-seconds" in dry.stdout
    assert not (tmp_path / "headrace-cache").exists()
    shards = tmp_path / "headrace-cache" / "features"
    with (tmp_path / "said.txt").open("w") as said:
        call = forks.start(command, cwd=tmp_path, stdout=said, stderr=said)
    while not list(shards.rglob("*.h5")):
        assert call.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.005)
    call.kill()
    call.wait()
    done = headrace(*command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["found"], result["images"], result["failed"]) == (140, 140, 1)
    assert result["images_new"] in (12, 140)
    failed = pd.read_csv(tmp_path / "headrace-cache/extraction/failed-images.csv")
    assert failed["id"].tolist() == ["000.png"]
    (features,) = list_feature_sets(tmp_path / "headrace-cache")
    assert features.n_rows == 139
    again = headrace(*command, cwd=tmp_path)
    assert "0 of 140 images went through a network" in again.stdout
    assert "Images: 140 found = 139 with features + 1 that cannot be used" in again.stdout
    assert headrace(*command, "--strict", cwd=tmp_path).returncode == 2
    (tmp_path / "table.csv").write_text("path,label\nphotos/001.png,a\n")
    assert "name the network" in headrace("extract", "photos", cwd=tmp_path).stderr
    no_network = headrace("extract", "photos", "--tap", "layer1.avg", cwd=tmp_path)
    assert "belong to --backbone" in no_network.stderr


def test_a_run_finds_what_extract_has_kept(project, tmp_path):
    """The same fingerprints: the run after it extracts nothing."""
    recipe = UNITS.replace("table.csv", str(project / "table.csv"))
    recipe = recipe.replace("unlabelled: more", f"unlabelled: {project / 'more'}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    with client_here() as client:
        result = extract_recipe(load_recipe(tmp_path / "recipe.yaml"), console=QUIET, client=client)
    assert (result.new, result.failed) == (90, 0)
    state = read_run_state(load_recipe(tmp_path / "recipe.yaml"), write=False)
    assert state.plan.units == ()
    mine, theirs = (
        {features.spec.fingerprint for features in list_feature_sets(root / "headrace-cache")}
        for root in (tmp_path, project)
    )
    assert mine == theirs


def test_predictions_are_made_again_when_the_answer_changes(project, tmp_path):
    """And not when nothing has."""
    folder = tmp_path / "copy"
    shutil.copytree(project, folder)
    table = folder / "headrace-runs/recipe/predictions.parquet"
    stamp = table.stat().st_mtime_ns
    again = run_here(folder / "recipe.yaml")
    assert [stage.did for stage in again.stages if stage.name == "predict"] == ["nothing missing"]
    assert table.stat().st_mtime_ns == stamp
    Image.new("RGB", (40, 40), "red").save(folder / "more" / "new.png")
    more = run_here(folder / "recipe.yaml")
    assert more.accounting.unlabelled == 37
    content = hash_bytes((folder / "more" / "new.png").read_bytes())
    assert all(
        content in features.cached_hashes()
        for features in list_feature_sets(folder / "headrace-cache")
    )
    assert "more/new.png" in pd.read_parquet(table)["id"].tolist()
