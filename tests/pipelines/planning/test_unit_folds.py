"""Tasks of units: one target, one fold, one side of the split for all images of a patient."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from headrace.heads.data.folds import BadSplit
from headrace.pipelines.planning.dataset import make_dataset
from headrace.pipelines.recipe.load import RecipeError, parse_recipe
from headrace.pipelines.recipe.sections import TaskSection
from headrace.pipelines.recipe.targets import DataError


def dataset(frame, content=None, **section):
    content = content or [hashlib.sha256(name.encode()).hexdigest()[:32] for name in frame["id"]]
    return make_dataset(frame, content, TaskSection.model_validate(section))


def patients(n_images=60, n_patients=20, **columns):
    """Images dealt to patients; every second patient is ill."""
    patient = np.arange(n_images) % n_patients
    return pd.DataFrame(
        {
            "id": [f"{i:04}.png" for i in range(n_images)],
            "label": np.where(patient % 2, "ill", "well"),
            "patient": [f"p{number}" for number in patient],
            **columns,
        }
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 15), min_size=60, max_size=120), st.integers(0, 5), st.integers(2, 4)
)
def test_a_unit_is_in_one_fold_as_of_group_k_fold(patient, seed, folds):
    """Folds are scikit-learn's GroupKFold in kind: no unit on two sides, every row held out once."""
    names = sorted(set(patient))
    if len(names) < 12:
        return
    frame = pd.DataFrame(
        {
            "id": [f"{i:04}.png" for i in range(len(patient))],
            "patient": [f"p{number}" for number in patient],
            "label": ["ill" if names.index(number) % 2 else "well" for number in patient],
        }
    )
    made = dataset(frame, unit="patient", seed=seed, folds=folds)
    assert not set(made.train.units) & set(made.test.units)
    fold_of_unit = pd.DataFrame({"unit": made.train.units, "fold": made.train.fold})
    assert fold_of_unit.groupby("unit")["fold"].nunique().max() == 1
    assert sorted(set(made.train.fold)) == list(range(folds))
    assert sorted([*made.train.units, *made.test.units]) == sorted(frame["patient"])


def test_rows_know_their_unit_and_are_resampled_with_it():
    frame = patients()
    made = dataset(frame, unit="patient", unit_aggregation="max")
    patient_of = dict(zip(frame["id"], frame["patient"], strict=True))
    assert made.train.units.tolist() == [patient_of[name] for name in made.train.ids]
    assert made.train.unit_aggregation == "max"
    pairs = set(zip(made.train.units.tolist(), made.groups.tolist(), strict=True))
    assert len(pairs) == len(set(made.train.units)) == len(set(made.groups))
    assert dataset(frame).train.units is None


def test_units_of_one_group_stay_together():
    """Two breasts of a woman are two units, and one group."""
    frame = patients(n_images=80, n_patients=40)
    frame["woman"] = frame["patient"].str[1:].astype(int) // 4
    made = dataset(frame, unit="patient", group="woman")
    woman_of = dict(zip(frame["id"], frame["woman"], strict=True))
    sides = [{woman_of[name] for name in task.ids} for task in (made.train, made.test)]
    assert not sides[0] & sides[1]
    assert len(set(made.groups)) == len(sides[0]) < len(set(made.train.units))


def test_a_unit_with_most_of_the_images_leaves_sides_to_the_others():
    """One slide has 2,000 tiles, and 39 have 3: sides and folds have about equal shares of slides."""
    many = pd.DataFrame({"patient": "p0", "label": "well"}, index=range(2000))
    few = pd.DataFrame({"patient": [f"p{1 + row // 3}" for row in range(117)]})
    few["label"] = np.where(few["patient"].str[1:].astype(int) % 2, "ill", "well")
    frame = pd.concat([many, few], ignore_index=True)
    frame["id"] = [f"{row:04}.png" for row in range(len(frame))]
    made = dataset(frame, unit="patient")
    assert len(set(made.test.units)) == 10
    sizes = [len(set(made.train.units[made.train.fold == fold])) for fold in range(5)]
    assert sizes == [6] * 5
    for fold in range(5):
        assert set(made.train.target[made.train.fold == fold]) == {0, 1}


def test_too_few_units_for_the_folds_are_told_where_the_others_are():
    with pytest.raises(BadSplit) as refusal:
        dataset(patients(n_patients=5), unit="patient")
    assert "4 groups cannot make 5 folds: use at most 4 folds" in str(refusal.value)
    assert str(refusal.value).endswith("The others are in the test split: task.test_fraction")


@pytest.mark.parametrize(
    ("section", "contents", "counted"),
    [
        ({"unit": "patient", "group": "site"}, None, "31 units of 'patient' in 1 group"),
        ({"group": "site"}, None, "100 images in 1 group"),
        ({}, ["a" * 32, "b" * 32] * 50, "2 images without their copies"),
    ],
)
def test_a_refused_split_says_what_it_counts(section, contents, counted):
    """Units where one has more images than a side, images without their copies, or images."""
    frame = patients(n_images=100, n_patients=100, site="one")
    frame["patient"] = [f"p{min(row, 30)}" for row in range(100)]
    frame.loc[frame["patient"] == "p30", "label"] = "well"
    if contents:
        frame["label"] = ["well", "ill"] * 50
    with pytest.raises(BadSplit) as refusal:
        dataset(frame, contents, **section)
    assert str(refusal.value).startswith(counted)


def test_units_written_as_numbers_in_two_ways_are_told():
    """A spreadsheet has made 7 of one patient's number and 7.0 or 07 of another cell's."""
    frame = patients()
    frame["patient"] = frame["patient"].str[1:]
    frame.loc[7, "patient"] = "7.0"
    frame.loc[8, "patient"] = "08"
    (note,) = (note for note in dataset(frame, unit="patient").notes if "count as" in note)
    assert "accents or zeros alone" in note
    assert note.endswith("'7' and '7.0', '08' and '8'")
    frame["patient"] = "1" + "0" * 20 + frame["patient"].str.zfill(8)
    frame.loc[[7, 8], "patient"] = frame["patient"][[27, 28]].array
    assert not any("count as" in note for note in dataset(frame, unit="patient").notes)


def test_units_that_lie_in_several_groups_join_them():
    """A patient who was seen at two sites is on one side with both."""
    frame = patients(n_images=80, n_patients=40)
    frame["site"] = np.arange(80) % 20
    frame.loc[0, "site"] = 1
    made = dataset(frame, unit="patient", group="site")
    for task in (made.train, made.test):
        here = frame[frame["id"].isin(task.ids)]
        assert {0, 1} <= set(here["site"]) or not {0, 1} & set(here["site"])


def test_images_of_a_unit_that_differ_in_class_are_refused_with_names():
    frame = patients()
    frame.loc[0, "label"] = "ill"
    with pytest.raises(DataError) as refusal:
        dataset(frame, unit="patient")
    assert "1 of 20 have several: 'p0'" in str(refusal.value)
    assert "'0000.png' is ill, '0020.png' of the same patient is well" in str(refusal.value)
    assert "task.unit_label: majority" in str(refusal.value)


def test_the_commonest_class_counts_if_asked():
    frame = patients()
    frame.loc[0, "label"] = "ill"  # one image of p0's three
    frame.loc[[1, 21, 41], "label"] = ["ill", "well", "well"]  # two of p1's three
    made = dataset(frame, unit="patient", unit_label="majority")
    target_of = dict(
        zip(
            [*made.train.units, *made.test.units],
            [*made.train.target, *made.test.target],
            strict=True,
        )
    )
    assert made.train.classes == ("ill", "well")
    assert (target_of["p0"], target_of["p1"], target_of["p3"]) == (1, 1, 0)
    assert any(
        "2 of 20 values of 'patient' have images with different" in note for note in made.notes
    )


def test_a_draw_between_classes_is_said():
    frame = patients(n_images=40)
    frame.loc[0, "label"] = "ill"
    made = dataset(frame, unit="patient", unit_label="majority")
    assert any(
        "1 of them have as many images of one class as of another" in n and "p0" in n
        for n in made.notes
    )


def test_several_labels_of_a_unit():
    """By default refused; `any`: what one image has; `majority`: what half of them have."""
    frame = patients(lesion=0, fluid=[i % 2 for i in range(60)])
    frame.loc[0, "lesion"] = 1
    columns = {"target": ("lesion", "fluid"), "kind": "multi", "unit": "patient"}
    with pytest.raises(
        DataError, match=r"'0000.png' is lesion, '0020.png' of the same patient is no label"
    ):
        dataset(frame, **columns)
    for unit_label, lesions in (("any", 3), ("majority", 0)):
        made = dataset(frame, **columns, unit_label=unit_label)
        assert made.train.target[:, 0].sum() + made.test.target[:, 0].sum() == lesions


def test_numbers_of_a_unit():
    """The mean if asked; one number per unit needs nothing."""
    frame = patients(age=[float(i % 20) for i in range(60)])
    task = {"target": "age", "kind": "regression", "unit": "patient"}
    assert dataset(frame, **task).train.units is not None
    frame.loc[0, "age"] = 6.0
    with pytest.raises(DataError, match=r"'0000.png' is 6, '0020.png' of the same patient is 0"):
        dataset(frame, **task)
    made = dataset(frame, **task, unit_label="mean")
    here = np.concatenate([task.target[task.units == "p0"] for task in (made.train, made.test)])
    assert here.ravel().tolist() == [2.0, 2.0, 2.0]


def test_a_split_that_divides_a_unit_is_refused():
    frame = patients(side=["train"] * 30 + ["test"] * 30)
    with pytest.raises(DataError, match="puts images of the same 'patient'"):
        dataset(frame, unit="patient", split="side")


def test_an_image_without_a_unit_is_named():
    frame = patients()
    frame.loc[5, "patient"] = " "
    with pytest.raises(DataError, match=r"task.unit 'patient' is empty for '0005.png'"):
        dataset(frame, unit="patient")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{unit_label: majority}", "name its column, as in `unit: patient`"),
        ("{unit: p, unit_label: mean}", "unit_label: mean is for kind: regression; this task"),
        ("{unit: p, unit_label: any}", "unit_label: any is for kind: multi"),
        ("{unit: p, unit_aggregation: max}\nensemble: {}", "the largest of averages is not"),
    ],
)
def test_recipes_that_cannot_mean_it(tmp_path, task, message):
    text = f"images: {{folder: x}}\nbackbones: [{{name: 'timm:vit'}}]\ntask: {task}\n"
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, tmp_path / "recipe.yaml")


def test_few_units_with_numbers_have_a_test_split_too():
    """Deciles of twenty patients hold hardly more rows than one of them has: the share is kept all
    the same, by half at least.
    """
    for seed in range(5):
        frame = patients(age=[40.0 + (i % 20) % 5 + 10 * (i % 2) for i in range(60)])
        made = dataset(frame, target="age", kind="regression", unit="patient", seed=seed)
        assert 8 <= len(made.test.ids) <= 22
        assert len(set(made.test.units)) >= 3
