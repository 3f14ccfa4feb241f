"""Which run is meant: by its recipe or its directory, for every command, wherever it was moved,
also for a user without a home.
"""

import os
import pwd
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from support.models import run_here
from support.runs import headrace, make_photos

from headrace.cache.feature_set import open_feature_set
from headrace.cache.home import HeadraceError, expand_home, state_directory
from headrace.extract.images.content_hashes import hash_bytes
from headrace.pipelines.cli.main import main
from headrace.pipelines.cli.status import run_status
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.finished import read_finished_run
from headrace.pipelines.models.model import load_model
from headrace.pipelines.recipe.load import RecipeError, load_recipe
from headrace.pipelines.report.build import write_report
from headrace.pipelines.selection.signatures import signatures

RECIPE = """\
images: {folder: photos}
task: {folds: 2}
backbones: [{name: "torchvision:resnet18", weights: net.pth, image_size: 32, taps: [layer1.avg]}]
heads: {logistic: {C: [1], inputs: [each]}}
compute: {workers: 1}
"""
# What each command asks of the run that it is given; `headrace export` and `headrace predict` both
# load the model.
READERS = {
    "report": read_finished_run,
    "status": run_status,
    "advise": read_finished_run,
    "predict": load_model,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with photos, a weights file, a recipe and its finished run.

    The tests leave it as it is.
    """
    folder = tmp_path_factory.mktemp("find") / "project"
    make_photos(folder / "photos", n=24)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), folder / "net.pth")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    run_here(folder / "recipe.yaml")
    return folder


def said_of(reader, given):
    """The sentence that refuses what was given."""
    with pytest.raises(InvalidInput) as refused:
        reader(given)
    return str(refused.value)


@pytest.mark.parametrize("command", READERS)
def test_every_command_takes_the_recipe_or_the_directory(project, monkeypatch, command):
    """As a path from here or from the root, with `~`, and whatever the recipe's file is called."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("HOME", str(project))
    shutil.copy(project / "recipe.yaml", project / "recipe.txt")  # `headrace run` takes any name
    for given in (
        "recipe.yaml",
        "headrace-runs/recipe",
        project / "headrace-runs" / "recipe",
        "~/recipe.yaml",
        "recipe.txt",
    ):
        READERS[command](Path(given))
    (project / "recipe.txt").unlink()


@pytest.mark.parametrize("command", READERS)
def test_what_is_no_run_is_answered_alike_by_every_command(project, tmp_path, command):
    """What was found, what is expected, what to type."""
    reader = READERS[command]
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "new.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\0\xff" * 300_000)
    (tmp_path / "empty").mkdir()
    expected = "Expected a recipe (recipe.yaml) or the directory of its run (headrace-runs/NAME)"
    for name, found in {
        "absent": "no such file or folder",
        "empty": "is not a run's directory: it has no recipe.json",
        "notes.txt": "is neither a recipe nor a run",
        "photo.png": "is neither a recipe nor a run",
    }.items():
        said = said_of(reader, tmp_path / name)
        assert said.startswith(str(tmp_path / name))
        assert found in said
        assert expected in said
        assert ("or a directory with a model" in said) == (command == "predict")
    new = tmp_path / "new.yaml"
    assert said_of(reader, new).endswith(
        f"has not been run yet: {load_recipe(new).out} holds no run. Type: headrace run {new}"
    )
    (tmp_path / "wrong.yaml").write_text("imagez: {}", encoding="utf-8")
    with pytest.raises(RecipeError, match="did you mean 'images'"):
        reader(tmp_path / "wrong.yaml")


def test_the_run_that_was_perhaps_meant_is_named(project, monkeypatch):
    """Around what was given, in it, or of the same name."""
    monkeypatch.chdir(project)
    run = Path("headrace-runs") / "recipe"
    for given in (
        run / "banks",
        run / "leaderboard.csv",
        run / "recipe.json",
        Path(),
        Path("headrace-runs"),
        Path("recipe"),
    ):
        assert f"Did you mean {run}?" in said_of(read_finished_run, given), given


@pytest.mark.parametrize(
    ("gone", "commands"), [("leaderboard.csv", ["report", "advise"]), ("winner", ["predict"])]
)
def test_a_run_that_has_not_ended_says_so(project, tmp_path, gone, commands):
    """And what to type; its status can be asked for all the same."""
    run = tmp_path / "run"
    shutil.copytree(project / "headrace-runs" / "recipe", run)
    shutil.rmtree(run / gone) if (run / gone).is_dir() else (run / gone).unlink()
    for command in commands:
        said = said_of(READERS[command], run)
        assert said == (
            f"{run} has no {gone}: the run has not come to its end, or failed (headrace status "
            f"{run}). Go on with: headrace run RECIPE"
        )
    assert run_status(run)[-1].state == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("given", ["recipe.yaml", "headrace-runs/recipe"])
def test_a_project_that_was_moved_is_whole(project, tmp_path, given):
    """Images, cache and weights file are found where they are now, though the run has noted where
    they were.
    """
    aside = project.with_name("aside")
    moved = tmp_path / "moved"
    shutil.copytree(project, moved)
    project.rename(aside)
    try:
        report = read_finished_run(moved / given)
        assert report.recipe.cache == moved / "headrace-cache"
        assert not isinstance(report.images, str), report.images
        files = read_finished_run(moved / given)
        assert [
            len(open_feature_set(path).ids())
            for paths in files.feature_paths.values()
            for path in paths
        ] == [24]
        photo = moved / "photos" / "fine" / "001.png"
        for place in (moved / given, moved / "headrace-runs" / "recipe" / "winner"):
            assert load_model(place).predict(photo).tolist() == ["fine"]
        assert write_report(moved / given, tmp_path / "report.html").missing_images == 0
    finally:
        aside.rename(project)


def test_a_copied_run_uses_what_was_copied_with_it(project, tmp_path):
    """A run alone goes on with the cache that it was made with; a copied project has a cache of its
    own.
    """
    shutil.copytree(project / "headrace-runs" / "recipe", tmp_path / "alone" / "recipe")
    assert (
        read_finished_run(tmp_path / "alone" / "recipe").recipe.cache == project / "headrace-cache"
    )
    assert load_model(tmp_path / "alone" / "recipe").members[0].backbones[0].weights == str(
        project / "net.pth"
    )
    shutil.copytree(project, tmp_path / "copy")
    assert (
        read_finished_run(tmp_path / "copy" / "headrace-runs" / "recipe").recipe.cache
        == tmp_path / "copy" / "headrace-cache"
    )


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home: no HOME, and a user id that has no account."""

    def unknown(_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.slow
@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_runs_reports_and_predicts(tmp_path):
    """What would be kept in a home only saves time."""
    make_photos(tmp_path / "photos", n=24)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("net.pth", "random:0"), encoding="utf-8")
    run_here(recipe)
    assert write_report(recipe).page.exists()
    assert load_model(recipe).predict(tmp_path / "photos" / "fine" / "001.png").tolist() == ["fine"]
    assert run_status(recipe)[-1].state == "finished"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "headrace-cache",
        "headrace-runs",
        "photos",
        "recipe.yaml",
    ]


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize(
    "arguments", [("status", "~/run"), ("predict", "~/run", "new"), ("run", "r.yaml")]
)
def test_a_home_that_is_not_known_is_a_sentence(tmp_path, monkeypatch, capsys, arguments):
    """On the command line and in a recipe; exit code 2."""
    (tmp_path / "r.yaml").write_text(RECIPE.replace("photos", "~/photos"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "~ stands for your home directory, and none is known" in capsys.readouterr().err


@pytest.mark.slow
def test_a_library_that_asks_for_a_home_does_not_end_the_run(tmp_path):
    """MLflow asks for one as it is imported, when the run has done everything else."""
    make_photos(tmp_path / "photos", n=24)
    text = RECIPE.replace("net.pth", "random:0") + "log: {mlflow: mlruns}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    unknown = (
        "import pwd\ndef unknown(_): raise KeyError('uid not found')\npwd.getpwuid = unknown\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")
    }
    done = headrace("run", "recipe.yaml", cwd=tmp_path, env=environment, first=unknown)
    assert done.returncode == 0, done.stderr
    assert "MLflow told" in done.stdout


def test_what_only_saves_the_report_time_need_not_be_kept(project, tmp_path):
    """The run may be somebody else's, in a folder that cannot be written."""
    paths = {
        hash_bytes(path.read_bytes()): str(path) for path in (project / "photos").rglob("*.png")
    }
    grey, positions = signatures(paths, list(paths), tmp_path / "absent" / "signatures.npz")
    assert grey.shape == (24, 256)
    assert positions == list(range(24))


def test_a_home_is_found_or_refused(monkeypatch, tmp_path):
    """Of this user and of others; what only saves time is kept nowhere then."""
    with pytest.raises(
        HeadraceError,
        match=r"~nobody-here/x: ~nobody-here stands for the home of the user nobody-here",
    ):
        expand_home("~nobody-here/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/x") == tmp_path / "x"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert state_directory() == tmp_path / ".cache" / "headrace"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert state_directory() == Path("/elsewhere/headrace")
