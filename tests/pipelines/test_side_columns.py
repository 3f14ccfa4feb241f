"""Side columns through a whole run: leaderboard, predictions, exports; and columns as people
write them.
"""

import json

import numpy as np
import pandas as pd
import pytest
from support.exports import run_without_headrace
from support.models import run_here
from support.runs import headrace, make_photos

from headrace.extract.sources.samples import list_folder
from headrace.heads.data.side_columns import SIDE_COLUMNS
from headrace.pipelines.export.output_check import TOLERANCE
from headrace.pipelines.export.write import export_model
from headrace.pipelines.models.model import load_model
from headrace.pipelines.planning.dataset import make_dataset
from headrace.pipelines.recipe.load import RecipeError, load_recipe
from headrace.pipelines.recipe.sections import TaskSection
from headrace.pipelines.recipe.targets import DataError

RECIPE = """\
images:
  table: labels.csv
  path_column: path
task:
  folds: 3
  side_columns: [age, site]
backbones:
  - name: torchvision:resnet18
    weights: random:0
    image_size: 32
    crop_fraction: 1.0
    taps: [layer1.avg]
heads:
  logistic: {C: [0.1, 1]}
  mlp: {hidden: [[8]], dropout: [0], epochs: 4}
  knn: {k: [3]}
  sklearn:
    - estimator: sklearn.linear_model.LogisticRegression
compute:
  workers: 2
  images_per_shard: 32
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on photos whose label is the site for the most part: the columns help."""
    folder = tmp_path_factory.mktemp("side")
    make_photos(folder / "photos", n=60)
    listed = list_folder(folder / "photos")
    generator = np.random.default_rng(1)
    label = generator.permutation(listed["label"].to_numpy())  # no picture shows it
    age = np.round(generator.normal(60, 10, 60), 1)
    table = pd.DataFrame({"id": listed["id"], "path": listed["path"], "label": label})
    table["age"] = np.where(generator.random(60) < 0.2, "", age.astype(str))
    flipped = generator.random(60) < 0.1
    table["site"] = np.where((label == "fine") != flipped, "north", "south")
    table.to_csv(folder / "labels.csv", index=False)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder, table, run_here(folder / "recipe.yaml")


@pytest.mark.slow
def test_every_input_is_on_the_leaderboard_with_and_without_the_columns(run):
    _, _, result = run
    assert result.failed_heads == 0, result.heads["error"].dropna().unique()
    ways = {("layer1.avg",), ("layer1.avg", SIDE_COLUMNS)}
    inputs = {kind: set(group["inputs"]) for kind, group in result.board.groupby("kind")}
    assert inputs["logistic"] == inputs["mlp"] == inputs["sklearn"] == ways
    assert inputs["knn"] == {("layer1.avg",)}
    widths = result.board.groupby("inputs")["features"].first()
    assert widths[("layer1.avg", SIDE_COLUMNS)] == widths[("layer1.avg",)] + 4
    assert SIDE_COLUMNS in result.winner.inputs
    best = result.board.groupby("inputs")["accuracy"].max()
    assert best[("layer1.avg", SIDE_COLUMNS)] > best[("layer1.avg",)] + 0.2


def test_predictions_of_images_and_columns_are_those_of_the_run(run):
    """`headrace predict` on the table; and from Python."""
    folder, table, _ = run
    done = headrace(
        "predict",
        "recipe.yaml",
        "labels.csv",
        "--out",
        "out.csv",
        "--path-column",
        "path",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    predicted = pd.read_csv(folder / "out.csv")
    assert list(predicted["file"]) == list(table["id"])
    model = load_model(folder / "headrace-runs" / "recipe")
    assert [column.name for column in model.side_columns] == ["age", "site"]
    probabilities = model.predict_proba(table["path"].tolist(), side_columns=table)
    np.testing.assert_allclose(
        predicted[["p_coarse", "p_fine"]].to_numpy(), probabilities, atol=1e-6
    )
    agree = (predicted["class"] == table["label"]).mean()
    assert agree > 0.8
    # The same files beside other columns are other predictions.
    table.assign(site="north").to_csv(folder / "north.csv", index=False)
    done = headrace(
        "predict",
        "recipe.yaml",
        "north.csv",
        "--out",
        "north.out.csv",
        "--path-column",
        "path",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    moved = pd.read_csv(folder / "north.out.csv")["p_fine"] - predicted["p_fine"]
    assert (moved[table["site"] == "south"] > 0).all()
    assert (moved[table["site"] == "north"].abs() < 1e-6).all()


def test_a_table_without_the_columns_is_told_what_is_missing(run):
    folder, table, _ = run
    table.drop(columns="site").to_csv(folder / "without.csv", index=False)
    for source, there in (("without.csv", "age"), ("photos", "label")):
        done = headrace("predict", "recipe.yaml", source, "--out", "none.csv", cwd=folder)
        assert done.returncode != 0
        assert "the model reads age, site beside each image, and there is no column" in done.stderr
        assert there in done.stderr
    model = load_model(folder / "headrace-runs" / "recipe")
    with pytest.raises(DataError, match="give one row for each image"):
        model.predict_proba(table["path"].tolist(), side_columns=table[:3])
    with pytest.raises(DataError, match="there is no column age, site"):
        model.predict_proba(table["path"].tolist())


def test_unknown_categories_and_missing_numbers_are_predicted_and_counted(run):
    folder, table, _ = run
    strange = table[:4].assign(site=["east", "", "west", "south"], age=["", "nan", "61", "62"])
    strange.to_csv(folder / "strange.csv", index=False)
    done = headrace("predict", "recipe.yaml", "strange.csv", "--out", "s.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "3 images have a site that no training image has" in said
    assert "(empty), east, west" in said
    assert pd.read_csv(folder / "s.csv")["p_fine"].notna().all()
    strange.assign(age="sixty").to_csv(folder / "words.csv", index=False)
    done = headrace("predict", "recipe.yaml", "words.csv", "--out", "w.csv", cwd=folder)
    assert done.returncode != 0
    assert "side column 'age' holds numbers, and 'sixty'" in " ".join(done.stderr.split())


ALONE = """\
import json
from preprocess import load, side_columns
import numpy as np
rows = json.load(open("rows.json"))
pixels = np.stack([load(row.pop("path")) for row in rows])
side = np.array([side_columns(row) for row in rows], np.float32)
import onnxruntime, torch
session = onnxruntime.InferenceSession("model.onnx")
onnx = session.run(None, {"images": pixels, "side_columns": side})[0]
torch_model = torch.export.load("model.pt2").module()
program = torch_model(torch.tensor(pixels), torch.tensor(side)).numpy()
json.dump([onnx.tolist(), program.tolist()], open("out.json", "w"))
"""


@pytest.mark.slow
def test_an_export_predicts_the_same_where_headrace_is_not(run):
    folder, table, _ = run
    model = load_model(folder / "headrace-runs" / "recipe")
    exported = export_model(model, folder / "out", ["torch", "onnx", "safetensors"])
    assert max(exported.differences.values()) <= TOLERANCE
    rows = table[:12].assign(site=["east", *table["site"][1:12]])
    with pytest.warns(UserWarning, match="1 image has a site"):
        expected = model.predict_proba(rows["path"].tolist(), side_columns=rows)
    plain = [
        {"path": path, "age": float(age) if age else None, "site": site}
        for path, age, site in rows[["path", "age", "site"]].itertuples(index=False)
    ]
    (folder / "out" / "rows.json").write_text(json.dumps(plain))
    run_without_headrace(ALONE, folder / "out")
    for found in json.loads((folder / "out" / "out.json").read_text()):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    with pytest.warns(UserWarning, match="1 image has a site"):
        copied = load_model(folder / "out").predict_proba(rows["path"].tolist(), side_columns=rows)
    np.testing.assert_allclose(copied, expected, atol=1e-6)
    card = (folder / "out" / "MODEL_CARD.md").read_text()
    assert "`site`: a category, one column for each of 'north', 'south'" in card
    described = json.loads((folder / "out" / "model.json").read_text())["inputs"][-1]
    assert described["columns"] == ["age", "age missing", "site=north", "site=south"]


def test_columns_that_are_used_elsewhere_are_refused(tmp_path):
    for name, key in (("label", "target"), ("patient", "group")):
        text = RECIPE.replace("[age, site]", f"[{name}]").replace(
            "folds: 3", "folds: 3\n  group: patient"
        )
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(RecipeError, match=f"{name!r}, which is the task's {key}"):
            load_recipe(tmp_path / "recipe.yaml")


def dataset(cells, *, kind="auto", target=None, n=40):
    """The dataset of a made column `x`, repeated to n rows."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.array(["a", "b"] * (n // 2))) if target is None else target
    samples = pd.DataFrame({"id": [f"{i:02}" for i in range(n)], "label": labels})
    samples["x"] = pd.Series([cells[i % len(cells)] for i in range(n)], dtype=object)
    section = TaskSection(side_columns={"x": kind}, test_fraction=0.25, folds=3)
    return make_dataset(samples, [f"{i:032}" for i in range(n)], section)


@pytest.mark.parametrize(
    ("cells", "kind", "levels"),
    [
        (["1", "2.5", "-3e2"], "auto", None),
        (["1", "\u22122.5"], "auto", None),
        ([1, 2, 3], "auto", None),
        ([1, 2, 3], "category", ("1", "2", "3")),
        ([True, False, True], "auto", ("False", "True")),
        (["m", "f", ""], "auto", ("", "f", "m")),
        (["1", "nan", None], "auto", None),
        (["2024-01-02", "2024-03-04"], "category", ("2024-01-02", "2024-03-04")),
    ],
)
def test_what_a_column_holds_is_seen_from_its_values(cells, kind, levels):
    (column,) = dataset(cells, kind=kind).train.side.columns
    assert column.levels == levels


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["3,500", "4,250"], "'3,500' for '00' .40 such rows.: write decimals with a point"),
        (["3,5", "4.25"], "'3,5' for '00' .20 such rows.: write decimals with a point"),
        (["3", "unknown"], "'unknown' for '01' .20 such rows.: empty the cell"),
        (["3", "inf"], "holds numbers, and 'inf'"),
        (
            ["2024-01-02", "2024-03-04"],
            "'x' holds dates or times, such as '2024-01-02'. Give a number",
        ),
        (["12.03.2024", "1.4.2024"], "holds dates"),
        (["07:30", "19:05"], "the month or the hour"),
        ([f"{i} cm" for i in range(40)], "numbers with words, such as '0 cm'. Write the numbers"),
        (["3", "1e300"], "holds numbers, and '1e300'"),
        (["", None], "'x' is empty for every training image: leave it out"),
        ([f"p{i}" for i in range(40)], "it names images rather than describing them"),
    ],
)
def test_columns_that_are_no_input_are_refused_with_advice(cells, said):
    with pytest.raises(DataError, match=said):
        dataset(cells)


def test_a_column_that_is_the_label_is_warned_of():
    label = np.random.default_rng(0).permutation(np.array(["a", "b"] * 20))
    leak = "gives the target away"
    assert any(
        leak in note for note in dataset(np.where(label == "a", "u", "v"), target=label).notes
    )
    assert any(
        leak in note for note in dataset(np.where(label == "a", "1", "2"), target=label).notes
    )
    assert not any(leak in note for note in dataset(["u", "v", "v"]).notes)
    numbers = [str(number) for number in np.random.default_rng(1).normal(size=40)]
    assert not any(leak in note for note in dataset(numbers).notes)
    assert any("has one value in all training images" in note for note in dataset(["u"]).notes)


def test_one_value_that_is_written_in_two_ways_is_told():
    """Levels that differ in case, and a number that stands for a missing one; not a level that
    says how much, nor a number that may be one.
    """
    assert any("'North' and 'north'" in note for note in dataset(["North", "north", "s"]).notes)
    told = "'x' is -999 for"
    numbers = [-999 if i % 5 == 0 else i for i in range(40)]
    assert any(told in note for note in dataset(numbers).notes)
    assert not any("stands for" in note for note in dataset([99 + i for i in range(40)]).notes)
    assert dataset(["2 mm", "3 mm"]).train.side.columns[0].levels == ("2 mm", "3 mm")


def test_levels_and_means_are_those_of_training_rows():
    """A value that test rows alone have is no level, and is counted."""
    plain = dataset(["u", "v"])
    cells = ["u", "v"] * 20
    cells[int(plain.test.ids[0])] = "w"
    changed = dataset(cells)
    assert changed.train.side.columns == plain.train.side.columns
    assert np.isnan(changed.test.side.values).sum() == 1
    assert any("1 image has a x that no training image has" in note for note in changed.notes)


def test_images_without_a_label_have_side_columns_and_unknown_values_are_counted():
    label = np.random.default_rng(0).permutation(np.array(["a", "b"] * 20)).astype(object)
    label[:4] = ""
    cells = ["u", "v"] * 20
    cells[1] = "w"
    found = dataset(cells, target=label)
    assert found.unlabelled.side.values[:, 0].tolist()[0] == 0
    assert np.isnan(found.unlabelled.side.values[1, 0])
    assert any(note.startswith("of those without a label, 1 image has a x") for note in found.notes)
