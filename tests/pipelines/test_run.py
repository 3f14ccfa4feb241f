"""Whole runs on small made images: the main job, doing only what is missing, and every refusal at
the command line.
"""

import json
import shutil
import sys
import zlib

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from support.models import run_here
from support.runs import HEADS, RECIPE, headrace, make_photos

from headrace.cache.errors import HeadraceError
from headrace.pipelines.cli.main import main
from headrace.pipelines.planning.run_state import read_run_state
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.run import run_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its folder and its result. The tests leave it as it is."""
    folder = tmp_path_factory.mktemp("run")
    make_photos(folder / "photos")
    (folder / "photos" / "fine" / "broken.png").write_bytes(b"this is no image")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder, run_recipe(load_recipe(folder / "recipe.yaml"), console=Console(quiet=True))


def test_images_become_a_ranked_leaderboard(finished):
    """Every head that the recipe asks for is there, ranked by validation score, and the winner
    knows the classes.
    """
    _, result = finished
    assert (result.heads["fold"] >= 0).sum() == HEADS
    assert result.failed_heads == 0
    assert result.board["accuracy"].is_monotonic_decreasing
    assert result.winner.score == result.board["accuracy"].max()
    assert result.test.value >= 0.9
    assert result.test.low <= result.test.value <= result.test.high
    assert result.test.images == 15
    assert result.selection.validation == result.winner.score
    assert result.selection.low <= result.selection.expected <= result.selection.high
    assert (
        json.loads(result.paths.selection.read_text())["statistically_tied"]
        == result.selection.statistically_tied
    )
    assert (
        pd.read_csv(result.paths.comparisons)["statistically_tied"].sum()
        == result.selection.statistically_tied
    )
    description = json.loads((result.paths.winner / "head.json").read_text())
    assert description["classes"] == ["coarse", "fine"]


def test_an_undecodable_image_is_listed_and_shifts_nothing(finished):
    """The run goes on; the image is named with its reason."""
    _, result = finished
    assert result.failed_images == 1
    (row,) = pd.read_csv(result.paths.failed_images).to_dict("records")
    assert row["id"] == "fine/broken.png"
    assert row["reason"]


@pytest.mark.slow
def test_strict_refuses_what_cannot_be_decoded(finished):
    """Also when it was recorded by an earlier call that went on."""
    folder, _ = finished
    done = headrace("run", "recipe.yaml", "--strict", cwd=folder)
    assert done.returncode == 2
    assert "1 image cannot be decoded" in done.stderr
    assert "failed-images.csv" in done.stderr


def test_a_second_call_does_no_work_and_tells_the_same(finished):
    """No forward pass, no head trained, no second evaluation of the test split."""
    folder, first = finished
    recipe = load_recipe(folder / "recipe.yaml")
    plan = read_run_state(recipe).plan
    assert (plan.units, plan.banks) == ((), ())
    files = {path: path.stat().st_mtime_ns for path in first.paths.banks.iterdir()}
    again = run_recipe(recipe, console=Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in first.paths.banks.iterdir()} == files
    pd.testing.assert_frame_equal(again.board, first.board)
    assert again.test == first.test
    assert len(first.paths.test_evaluations.read_text().splitlines()) == 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    """Images, bytes, heads, and the command that does it; no cache and no results directory appear."""
    make_photos(tmp_path / "photos", n=20)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = ("--set", "task.seed=1", "--cluster", "slurm", "--retry-failed")
    done = headrace("run", "recipe.yaml", "--dry-run", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 of 20 images go through a network" in done.stdout
    assert f"{HEADS} of {HEADS} heads to train" in done.stdout
    command = "headrace run recipe.yaml --cluster=slurm --set=task.seed=1 --retry-failed"
    assert f"Next: {command}\n" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "recipe.yaml"]


def test_only_what_is_new_is_done(finished, tmp_path):
    """A new image and a new strength: one image forward, and the other strengths stay where the
    rows stay.
    """
    folder, _ = finished
    text = RECIPE.replace("folder: photos", f"folder: {folder / 'photos'}").replace(
        "[0.01, 1]", "[0.01, 0.1, 1]"
    )
    text += f"cache: {folder / 'headrace-cache'}\nout: {folder / 'headrace-runs' / 'recipe'}\n"
    (tmp_path / "more.yaml").write_text(text)
    plan = read_run_state(load_recipe(tmp_path / "more.yaml"), write=False).plan
    assert plan.units == ()
    assert plan.heads_new == (3 + 1) * 3  # the one new strength, on four inputs, in three folds
    (folder / "photos" / "fine" / "new.png").write_bytes(
        (folder / "photos" / "coarse" / "000.png").read_bytes()
    )
    try:
        assert (
            read_run_state(load_recipe(tmp_path / "more.yaml"), write=False).plan.images_new == 0
        )  # a copy: its bytes are known
        Image.new("RGB", (40, 40), "red").save(folder / "photos" / "fine" / "new.png")
        assert read_run_state(load_recipe(tmp_path / "more.yaml"), write=False).plan.images_new == 1
    finally:
        (folder / "photos" / "fine" / "new.png").unlink()


@pytest.mark.slow
def test_input_halving_leaves_the_promising_inputs(finished, tmp_path):
    """Only they get all heads, the first stage says which, and a second call trains
    nothing anew.
    """
    folder, whole = finished
    text = RECIPE.replace("folder: photos", f"folder: {folder / 'photos'}")
    text += (
        "input_halving:\n  sample_fractions: [0.5]\n  keep_fraction: 0.1\n  min_inputs: 1\ncache: "
        f"{folder / 'headrace-cache'}\nout: {tmp_path / 'out'}\n"
    )
    (tmp_path / "halved.yaml").write_text(text)
    first = run_here(tmp_path / "halved.yaml")
    assert first.board["inputs"].nunique() == 1
    assert set(first.board["inputs"]) < set(whole.board["inputs"])
    assert first.test.images == 15
    assert next(stage.did for stage in first.stages if stage.name == "halve inputs").startswith(
        "1 of 4 inputs go on: "
    )
    files = {path: path.stat().st_mtime_ns for path in first.paths.input_halving.rglob("*.h5")}
    assert files
    again = run_here(tmp_path / "halved.yaml")
    assert {
        path: path.stat().st_mtime_ns for path in first.paths.input_halving.rglob("*.h5")
    } == files
    assert next(stage.did for stage in again.stages if stage.name == "train") == "nothing missing"
    pd.testing.assert_frame_equal(again.board, first.board)


def test_init_writes_a_recipe_that_runs(finished, tmp_path):
    """For a folder per class; the recipe is valid, and says what was found."""
    folder, _ = finished
    done = headrace("init", folder / "photos", "--out", tmp_path / "mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "61 images in 2 classes" in done.stdout
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.images.folder.resolve() == (folder / "photos").resolve()
    again = headrace("init", folder / "photos", "--out", tmp_path / "mine.yaml", cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_init_finds_the_columns_of_a_table(finished, tmp_path):
    """The path column by its values, label, split and group by their names."""
    folder, _ = finished
    files = sorted((folder / "photos").rglob("0*.png"))
    table = pd.DataFrame(
        {
            "patient": [i // 3 for i in range(len(files))],
            "photo": [str(file) for file in files],
            "diagnosis": [file.parent.name for file in files],
            "split": ["train", "val", "test"] * (len(files) // 3),
        }
    )
    table.to_csv(tmp_path / "photos.csv", index=False)
    done = headrace("init", "photos.csv", "-o", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.images.path_column == "photo"
    assert (recipe.task.target, recipe.task.split, recipe.task.group) == (
        "diagnosis",
        "split",
        "patient",
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of photos for recipes that are refused."""
    folder = tmp_path_factory.mktemp("photos")
    make_photos(folder / "photos", n=20)
    make_photos(folder / "one", n=8)
    shutil.rmtree(folder / "one" / "fine")
    make_photos(folder / "gap", n=8)
    for file in (folder / "gap" / "fine").iterdir():
        file.unlink()
    (folder / "none").mkdir()
    (folder / "none" / "notes.txt").write_text("no image")
    pd.DataFrame({"path": ["photos/fine/001.png"], "kind": ["x"]}).to_csv(
        folder / "table.csv", index=False
    )
    weights = folder / "other.pth"
    import torch

    torch.save({"fc.weight": torch.zeros(3, 4)}, weights)
    return folder


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("folder: photos", "folder: fotos", ["fotos", "no such file or folder", "photos"]),
        ("folder: photos", "folder: none", ["no images", "1 .txt"]),
        ("folder: photos", "folder: one", ["one class only, 'coarse'"]),
        (
            "folder: photos",
            "folder: gap",
            ["folder fine", "this class would be missing", "images.exclude: [fine]"],
        ),
        ("folder: photos", "table: table.csv", ["no column 'label'", "kind"]),
        ("layer2.max", "layre2.max", ["layre2", "layer2"]),
        ("layer2.max", "layer2.maximum", ["maximum", "max"]),
        ("torchvision:resnet18", "torchvision:resnet81", ["resnet81", "resnet18"]),
        ("torchvision:resnet18", "resnet18", ["torchvision:NAME", "timm:NAME"]),
        ("random:0", "other.pth", ["other.pth", "conv1.weight"]),
        ("random:0", "absent.pth", ["absent.pth"]),
        ("folds: 3", "folds: 3\n  metric: acuracy", ["acuracy", "accuracy"]),
        (
            "folds: 3",
            "folds: 3\n  kind: regression",
            ["heads.logistic", "task.kind is regression", "ridge, mlp"],
        ),
        ("folds: 3", "flods: 3", ["line 4", "did you mean 'folds'"]),
    ],
)
def test_bad_input_is_one_clear_error(photos, request, capsys, monkeypatch, old, new, said):
    """What was found, what was expected, what to type; exit code 2, no traceback,
    nothing written.
    """
    assert old in RECIPE
    recipe = photos / f"recipe{zlib.crc32(request.node.name.encode())}.yaml"
    recipe.write_text(RECIPE.replace(old, new))
    before = sorted(photos.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["headrace", "run", str(recipe)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error:")
    for word in said:
        assert word in error
    assert sorted(photos.rglob("*")) == before


def test_folds_that_cannot_be_are_refused_before_a_network_is_built(photos, monkeypatch):
    """Building one takes seconds, and with a download minutes."""
    recipe = photos / "folds.yaml"
    recipe.write_text(RECIPE.replace("folds: 3", "folds: 50"))
    monkeypatch.setattr("headrace.pipelines.planning.networks.load_feature_specs", None)
    with pytest.raises(HeadraceError, match=r"folds"):
        read_run_state(load_recipe(recipe))


def test_a_recipe_that_is_not_there_is_one_clear_error(tmp_path):
    """The simplest mistake of all."""
    done = headrace("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "headrace init" in done.stderr


@pytest.mark.slow
def test_other_weights_are_another_winner_and_another_evaluation(tmp_path):
    """The printed score is that of the features in use, and the record counts every winner that has
    seen these images.
    """
    make_photos(tmp_path / "photos", n=60)
    recipe = RECIPE[: RECIPE.index("  mlp:")].replace("layer2.max, ", "") + "out: {out}\n"
    results = {}
    for name, weights, size, out in (
        ("first", "random:0", 32, "out"),
        ("other", "random:1", 16, "out"),
        ("fresh", "random:1", 16, "elsewhere"),
        ("again", "random:0", 32, "out"),
    ):
        text = recipe.replace("random:0", weights).replace("image_size: 32", f"image_size: {size}")
        (tmp_path / f"{name}.yaml").write_text(text.format(out=out))
        results[name] = run_here(tmp_path / f"{name}.yaml")
    assert results["other"].test.metrics == results["fresh"].test.metrics
    assert [results[name].test.n_evaluations for name in results] == [1, 2, 1, 2]
    assert results["again"].test.metrics == results["first"].test.metrics
    # A renamed image is the same image: the split keeps its history.
    (tmp_path / "photos" / "fine" / "001.png").rename(tmp_path / "photos" / "fine" / "999.png")
    assert run_here(tmp_path / "first.yaml").test.n_evaluations == 3


@pytest.mark.slow
def test_failed_heads_are_kept_until_asked_to_be_tried_again(tmp_path, monkeypatch):
    """A head that fails is a row with its reason; --retry-failed trains it, and it alone, once
    more.
    """
    make_photos(tmp_path / "photos", n=40)
    text = RECIPE.replace(
        "  mlp:\n    hidden: [[8]]\n    dropout: [0]\n    epochs: 5\n",
        "  sklearn:\n    - estimator: late_estimator.Late\n      inputs: [all]\n",
    )
    assert "late_estimator" in text
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    first = run_here(tmp_path / "recipe.yaml")
    assert first.failed_heads > 0
    assert read_run_state(recipe).plan.banks == ()
    (tmp_path / "late_estimator.py").write_text(
        "from sklearn.tree import DecisionTreeClassifier as Late\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # workers start with this process's search path
    again = run_recipe(recipe, console=Console(quiet=True), retry_failed=True)
    assert again.failed_heads == 0
    assert (
        len(set(again.heads["path"]) - set(first.heads["path"])) == 1
    )  # one new file; the others stay
    assert read_run_state(recipe).plan.banks == ()


@pytest.mark.slow
def test_advice_for_a_finished_run(finished):
    """From its directory alone; the second call trains nothing; a folder that is no run
    is told so.
    """
    folder, result = finished
    done = headrace("advise", result.paths.root, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "LogME" in done.stdout
    said = json.loads(result.paths.advice.read_text())
    assert said["action"] == "head"  # 45 images of two classes that are told apart without an error
    assert [tap["name"] for tap in said["evidence"]["taps"]] == [
        "layer1.avg",
        "layer2.max",
        "layer4.avg",
    ]
    files = {path: path.stat().st_mtime_ns for path in result.paths.advice_folder.rglob("*.h5")}
    assert len(files) in (
        6 * 3,
        6 * 3 * 2,
    )  # sizes, folds, and the winner when it is no linear head
    said_first = [line for line in done.stdout.splitlines() if not line.startswith('{"stage"')]
    assert headrace("advise", result.paths.root, cwd=folder).stdout.splitlines() == said_first
    assert {
        path: path.stat().st_mtime_ns for path in result.paths.advice_folder.rglob("*.h5")
    } == files
    refused = headrace("advise", folder / "photos", cwd=folder)
    assert refused.returncode == 2
    assert "is not a run's directory" in refused.stderr
