"""found = used + left out, in every command: init, a dry run, a run, its report, and predict; and
each reads what the others read.
"""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.runs import counted, make_photos
from typer.testing import CliRunner

from headrace.extract.sources.read import read_source
from headrace.pipelines.cli.init import write_recipe
from headrace.pipelines.cli.main import app
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.planning.accounting import Accounting, accounting_from_json
from headrace.pipelines.planning.dataset import list_samples
from headrace.pipelines.planning.run_state import read_run_state
from headrace.pipelines.predict.listing import list_images
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.records import RunDamaged, read_record, write_record
from headrace.pipelines.report.build import write_report

SMALL = """
backbones:
  - name: torchvision:resnet18
    weights: random:0
    image_size: 32
    taps: [layer1.avg]
heads:
  logistic: {C: [1], inputs: [each]}
compute: {workers: 1}
"""


def command(*arguments: object) -> str:
    """Run the command line in this process; its output."""
    done = CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.output


def shorten(recipe: Path) -> Path:
    """The recipe that init wrote, with a small network instead of the one that it names."""
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text[: text.index("backbones:")] + SMALL, encoding="utf-8")
    return recipe


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Forty photographs of two classes, a damaged one, and what lies among people's images."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", n=40)
    (tmp_path / "photos/fine/broken.png").write_bytes(b"this is no image")
    (tmp_path / "photos/fine/gone.png").symlink_to("nowhere.png")
    for name in (
        "fine/notes.txt",
        "fine/clip.mp4",
        "coarse/raw.nef",
        "coarse/.DS_Store",
        "readme.md",
    ):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.mark.slow
def test_every_command_counts_the_same(photos, tmp_path):
    """47 files:

    40 used, one damaged, one gone, five left out by four reasons, told by each command and in the
    report.
    """
    said = command("init", photos)
    assert "left out: 1 .mp4 file (video" in said
    assert "42 images in 2 classes (coarse, fine)" in said
    recipe = shorten(tmp_path / "recipe.yaml")
    dry = command("run", recipe, "--dry-run")
    assert (
        "Images: 47 found = 31 to train on + 10 to test on + 1 that cannot be read + 5 left out"
        in dry
    )
    ran = command("run", recipe)
    assert (
        "Images: 47 found = 30 to train on + 10 to test on + 1 that cannot be read + 1 that cannot "
        "be used + 5 left out"
    ) in ran
    for name in ("notes.txt", "clip.mp4", "raw.nef", ".DS_Store", "readme.md"):
        assert name in ran
    stored = accounting_from_json(
        read_record(RunPaths(tmp_path / "headrace-runs/recipe").accounting)
    )
    assert counted(stored) == stored.found == 47
    page = write_report(recipe).page.read_text(encoding="utf-8")
    assert "Images: 47 found" in page
    assert "camera raw" in page
    output = command("predict", recipe, photos, "--out", "p.csv")
    assert "left out: 1 .nef file (camera raw" in output
    assert len(pd.read_csv("p.csv")) == 42


def test_counts_of_another_version_are_named(tmp_path):
    """As what a run writes again, not as a missing key."""
    paths = RunPaths(tmp_path)
    write_record(paths.accounting, {"found": 3, "left_out": []})
    run = FinishedRun(paths, None, "accuracy", pd.DataFrame(), pd.DataFrame())
    with pytest.raises(RunDamaged, match=r"other fields .* `headrace run RECIPE` writes it again"):
        run.accounting  # noqa: B018 (reads it)


def make_sources(root: Path) -> dict[str, Path]:
    """The same twelve images in every kind of source."""
    make_photos(root / "photos", n=12)
    files = sorted((root / "photos").rglob("*.png"))
    rows = [
        {"path": f"photos/{file.parent.name}/{file.name}", "label": file.parent.name}
        for file in files
    ]
    frame = pd.DataFrame(rows)
    frame.to_csv(root / "t.csv", index=False)
    frame.assign(id=[f"row{n}" for n in range(12)]).to_csv(root / "ids.tsv", index=False, sep="\t")
    frame.to_json(root / "t.jsonl", orient="records", lines=True)
    with tarfile.open(root / "p.tar.gz", "w:gz") as archive:
        archive.add(root / "photos", "photos")
    with zipfile.ZipFile(root / "p.zip", "w") as zipped:
        for file in files:
            zipped.write(file, f"{file.parent.name}/{file.name}")
    images = pa.array(
        [{"bytes": file.read_bytes(), "path": None} for file in files],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(
        pa.table({"image": images, "label": [file.parent.name for file in files]}),
        root / "p.parquet",
    )
    np.savez(
        root / "a.npz",
        images=np.zeros((12, 8, 8), np.float32) + np.arange(12)[:, None, None] / 12,
        labels=np.arange(12) % 2,
    )
    kaggle = root / "kaggle"
    (kaggle / "train").mkdir(parents=True)
    for number, file in enumerate(files):
        (kaggle / f"train/{number:04}.png").write_bytes(file.read_bytes())
    pd.DataFrame({"id": [f"{n:04}" for n in range(12)], "label": frame["label"]}).to_csv(
        kaggle / "train.csv", index=False
    )
    names = (
        "photos",
        "t.csv",
        "ids.tsv",
        "t.jsonl",
        "p.tar.gz",
        "p.zip",
        "p.parquet",
        "a.npz",
        "kaggle/train.csv",
    )
    return {name: root / name for name in names}


def test_what_run_reads_predict_reads(tmp_path):
    """init, run and predict list the same images in the same order, from the source and from the
    recipe.
    """
    for name, source in make_sources(tmp_path).items():
        recipe = tmp_path / "r.yaml"
        command("init", source, "--out", recipe, "--force")
        samples = list_samples(load_recipe(shorten(recipe)))
        assert len(samples) == 12, name
        by_source, by_recipe = list_images([source]), list_images([recipe])
        assert by_source.samples["path"].tolist() == samples["path"].tolist(), name
        assert by_recipe.samples["path"].tolist() == samples["path"].tolist(), name
        assert by_source.found == by_recipe.found, name
        shown = [file.removeprefix(f"{source}/") for file in by_source.samples["file"]]
        assert shown == samples["id"].tolist(), name
        accounting = read_run_state(load_recipe(recipe), write=False).accounting
        assert isinstance(accounting, Accounting)
        assert accounting.found == counted(accounting), name


def test_a_folder_that_holds_our_predictions_or_other_tables(tmp_path):
    """The sub-folders stay the classes, and the other reading is told with the command for it."""
    make_photos(tmp_path / "photos", n=12)
    files = sorted((tmp_path / "photos").rglob("*.png"))
    predictions = pd.DataFrame(
        {"file": [str(file) for file in files], "class": "fine", "p_fine": 1.0, "error": None}
    )
    predictions.to_csv(tmp_path / "photos/predictions.csv", index=False)
    # Of values, with its record; in lines of JSON; and of weights in units.
    values = predictions[["file", "p_fine", "error"]].rename(columns={"p_fine": "age"})
    values.to_csv(tmp_path / "photos/values.csv", index=False)
    (tmp_path / "photos/values.csv.json").write_text("{}")
    lines = predictions[["file", "class"]].assign(probabilities=[{"fine": 1.0}] * 12)
    lines.to_json(tmp_path / "photos/lines.jsonl", orient="records", lines=True)
    weights = pd.DataFrame({"unit": "u", "file": predictions["file"], "weight": 1.0})
    weights.to_csv(tmp_path / "photos/p.weights.csv", index=False)
    said = command("init", tmp_path / "photos", "--out", tmp_path / "r.yaml")
    for name in ("predictions.csv", "values.csv", "lines.jsonl", "p.weights.csv"):
        assert f"{name} is a table of predictions and was not read" in said
        (tmp_path / "photos" / name).unlink()
    (tmp_path / "photos/values.csv.json").unlink()
    assert load_recipe(shorten(tmp_path / "r.yaml")).images.folder == tmp_path / "photos"
    labels = pd.DataFrame({"path": [str(file) for file in files], "label": ["x", "y"] * 6})
    labels.to_csv(tmp_path / "photos/labels.csv", index=False)
    said = command("init", tmp_path / "photos", "--out", tmp_path / "r.yaml", "--force")
    assert f"for that, headrace init {tmp_path / 'photos/labels.csv'}" in said
    assert load_recipe(shorten(tmp_path / "r.yaml")).images.folder == tmp_path / "photos"
    command("init", tmp_path / "photos/labels.csv", "--out", tmp_path / "r.yaml", "--force")
    assert set(list_samples(load_recipe(shorten(tmp_path / "r.yaml")))["label"]) == {"x", "y"}


def test_images_of_two_depths_are_told(tmp_path):
    """One sensor's frames in 8 and in 16 bits are told apart by their scale alone."""
    make_photos(tmp_path / "photos", n=12)
    assert "some more" not in command("init", tmp_path / "photos", "--out", tmp_path / "r.yaml")
    for number in range(6):
        Image.fromarray(np.full((8, 8), 800, np.uint16)).save(
            tmp_path / f"photos/fine/deep{number}.png"
        )
    said = command("init", tmp_path / "photos", "--out", tmp_path / "r.yaml", "--force")
    assert "some images have 8 bits (coarse/000.png) and some more (fine/deep" in said
    assert "images.pixel_range" in said


@pytest.mark.slow
def test_several_labels_in_a_cell_are_found(tmp_path):
    """init writes kind: multi with what stands between them; blanks inside of names are none."""
    make_photos(tmp_path / "photos", n=12)
    files = sorted((tmp_path / "photos").rglob("*.png"))
    for cells, separator in (
        (["scab", "rust", "scab rust"] * 4, " "),
        (["a;b", "a", "b"] * 4, ";"),
        (["scab", "rust", "pox", "scab rust", "scab pox", "rust pox"] * 2, " "),
        (["New York", "Rome"] * 6, None),
        (["wild cat", "wild dog", "cat", "dog"] * 3, None),
        (["wild cat", "wild dog", "tame cat", "tame dog", "cat", "dog"] * 2, None),
        (["fire", "truck", "fire truck", "car"] * 3, None),
    ):
        pd.DataFrame({"path": [str(file) for file in files], "label": cells}).to_csv(
            tmp_path / "t.csv", index=False
        )
        said = command("init", tmp_path / "t.csv", "--out", tmp_path / "r.yaml", "--force")
        told = (
            f"'label' are taken for several labels each, separated by {separator!r} "
            "(task.separator); for one label each"
        )
        assert (told in " ".join(said.split())) == (separator is not None)
        task = load_recipe(shorten(tmp_path / "r.yaml")).task
        assert (task.kind, task.separator) == (
            "single" if separator is None else "multi",
            separator,
        )


def test_columns_of_zeros_and_ones_are_targets_together(tmp_path):
    """One class where each image has one 1, else several labels; not where a column is named for
    the task, or two columns are no more than that.
    """
    make_photos(tmp_path / "photos", n=12)
    paths = [str(file) for file in sorted((tmp_path / "photos").rglob("*.png"))]
    bits = np.unpackbits(np.arange(12, dtype=np.uint8)[:, None], axis=1)[:, 5:]
    one_hot = np.eye(3, dtype=int)[np.arange(12) % 3]
    for columns, target, kind, metric in (
        (dict(zip("abc", bits.T, strict=True)), ("a", "b", "c"), "multi", "average_precision"),
        (dict(zip("abc", one_hot.T, strict=True)), ("a", "b", "c"), "single", "accuracy"),
        (dict(zip("ab", bits.T, strict=False)), "a", "single", "accuracy"),
        (
            {**dict(zip("abc", bits.T, strict=True)), "label": ["x", "y"] * 6},
            "label",
            "single",
            "accuracy",
        ),
    ):
        pd.DataFrame({"path": paths, **columns}).to_csv(tmp_path / "t.csv", index=False)
        said = command("init", tmp_path / "t.csv", "--out", tmp_path / "r.yaml", "--force")
        task = load_recipe(shorten(tmp_path / "r.yaml")).task
        assert (task.target, task.kind, task.metric) == (target, kind, metric)
        assert ("hold 0 and 1 alone (a, b, c)" in " ".join(said.split())) == (len(target) == 3)


def test_classes_in_file_names_are_found(tmp_path):
    """cat.0.jpg, as Kaggle's cats and dogs; not numbers alone, nor words that stand once."""
    for names, classes in (
        (["train/cat.0", "train/cat.1", "train/dog.10", "train/dog.11"], {"cat", "dog"}),
        (["Great_Pyrenees_1", "Great_Pyrenees_2", "pug_1", "pug_2"], {"Great_Pyrenees", "pug"}),
        (["001", "002", "003", "004"], None),
        (["IMG_1", "IMG_2", "cover", "DSC_4"], None),
    ):
        folder = tmp_path / names[0].replace("/", "-")
        for name in names:
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 9, np.uint8)).save(path)
        recipe = tmp_path / "r.yaml"
        if classes is None:
            with pytest.raises(InvalidInput, match="no sub-folder for a class"):
                write_recipe(folder, recipe, force=True)
            continue
        said = command("init", folder, "--out", recipe, "--force")
        assert "images.name_pattern" in " ".join(said.split())
        samples = read_source(load_recipe(recipe).images.source()).samples
        assert set(samples["label"]) == classes


def test_folders_named_for_a_split_are_no_classes_where_a_table_says_them(tmp_path):
    """train_images and test_images beside train.csv, as Kaggle has them."""
    for number in range(12):
        path = tmp_path / f"{'test' if number > 9 else 'train'}_images/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
    pd.DataFrame({"id": range(10), "grade": ["mild", "severe"] * 5}).to_csv(
        tmp_path / "train.csv", index=False
    )
    pd.DataFrame({"id": [10, 11]}).to_csv(tmp_path / "test.csv", index=False)
    said = " ".join(command("init", tmp_path, "--out", tmp_path / "r.yaml").split())
    assert "the sub-folders are sides of a split" in said
    samples = read_source(load_recipe(tmp_path / "r.yaml").images.source()).samples
    assert samples["grade"].tolist() == ["mild", "severe"] * 5
