"""From columns to splits: nobody trains on what is tested, whatever the table looks like."""

import hashlib

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import assume, given, settings, strategies as st

from headrace.cache.errors import HeadraceError
from headrace.extract.errors import as_yaml_list
from headrace.heads.data.folds import BadSplit
from headrace.heads.data.task import TRAIN_ONLY
from headrace.pipelines.planning.dataset import drop_rows, make_dataset
from headrace.pipelines.recipe.sections import TaskSection
from headrace.pipelines.recipe.targets import DataError


def content_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def table(n=80, classes=("cat", "dog"), **columns):
    return pd.DataFrame(
        {
            "id": [f"{i:04}.png" for i in range(n)],
            "label": [classes[i % len(classes)] for i in range(n)],
            **columns,
        }
    )


def dataset(frame, content=None, **section):
    content = [content_of(name) for name in frame["id"]] if content is None else content
    return make_dataset(frame, content, TaskSection.model_validate(section))


def test_every_row_is_trained_on_or_tested_never_both():
    """A quarter of each class is the test split; every other row is held out exactly once."""
    made = dataset(table())
    assert set(made.train.ids) | set(made.test.ids) == set(table()["id"])
    assert not set(made.train.ids) & set(made.test.ids)
    assert np.bincount(made.test.target).tolist() == [10, 10]
    assert np.bincount(made.train.fold).tolist() == [12] * 5


def test_the_order_of_the_table_does_not_matter():
    """The split depends on ids, targets and the seed alone."""
    frame = table()
    shuffled = frame.sample(frac=1, random_state=1, ignore_index=True)
    assert dataset(frame).train.digest == dataset(shuffled).train.digest
    assert dataset(frame).train.digest != dataset(frame, seed=1).train.digest


def test_rows_without_target_or_content_are_left_out():
    """And the user is told."""
    frame = table()
    frame.loc[3, "label"] = None
    content = [content_of(name) for name in frame["id"]]
    content[5] = None
    made = dataset(frame, content)
    assert len(made.train.ids) + len(made.test.ids) == 78
    assert any("1 image has no label" in note for note in made.notes)


@settings(deadline=None, max_examples=50)  # the first call imports scikit-learn
@given(st.lists(st.integers(0, 12), min_size=40, max_size=80), st.integers(0, 5))
def test_copies_of_an_image_stay_on_one_side(copies, seed):
    """The same bytes under several names are one row to every split: none is trained on and tested
    on.
    """
    frame = table(len(copies))
    frame["label"] = ["cat" if copy % 2 else "dog" for copy in copies]
    n_odd = len({copy for copy in copies if copy % 2})
    # Enough for the test split and both folds: fewer are refused.
    assume(min(n_odd, len(set(copies)) - n_odd) >= 4)
    made = dataset(frame, [content_of(str(copy)) for copy in copies], seed=seed, folds=2)
    assert not set(made.train.content) & set(made.test.content)
    folds = pd.DataFrame({"content": made.train.content, "fold": made.train.fold})
    assert folds.groupby("content")["fold"].nunique().max() == 1


def test_groups_stay_on_one_side():
    """All images of a patient are on one side of the test split and of every fold."""
    frame = table(patient=[f"p{i // 4}" for i in range(80)])
    made = dataset(frame, group="patient")
    patient = frame.set_index("id")["patient"]
    assert not set(patient[made.train.ids]) & set(patient[made.test.ids])
    folds = pd.DataFrame({"patient": patient[made.train.ids].to_numpy(), "fold": made.train.fold})
    assert folds.groupby("patient")["fold"].nunique().max() == 1


def test_a_split_column_is_followed():
    """train / val / test in the user's own spelling: one fold, validated on the user's rows."""
    frame = table(split=["Train"] * 40 + ["val"] * 20 + ["TEST"] * 20)
    made = dataset(frame, split="split")
    assert set(made.test.ids) == set(frame["id"][60:])
    assert set(made.train.ids[made.train.fold == 0]) == set(frame["id"][40:60])
    assert set(made.train.ids[made.train.fold == TRAIN_ONLY]) == set(frame["id"][:40])


def test_a_share_that_accuracy_hides_is_pointed_out():
    """49 of 50 images of one class: ignoring the other is worth 97.9 % of 375 training images;
    other metrics need no note.
    """
    frame = table(500, classes=("no",) * 49 + ("yes",))
    assert "97.9 % of the images are no" in " ".join(dataset(frame).notes)
    assert dataset(frame, metric="balanced_accuracy").notes == ()


def test_notes_of_a_thousand_classes_stay_short():
    """Ten names, and how many more."""
    (note,) = dataset(
        table(2000, classes=tuple(f"k{i}" for i in range(1000))), folds=2, test_fraction=0
    ).notes
    assert "and 990 more" in note
    assert len(note) < 300


def test_a_split_that_is_not_asked_for_is_pointed_out():
    """A column `split` of train / test beside a drawn split is told of; one of other words is the
    user's own affair.
    """
    assert "task.split: split" in " ".join(dataset(table(split=["train", "test"] * 40)).notes)
    assert dataset(table(split=["left", "right"] * 40)).notes == ()


def test_a_split_column_without_test_rows_draws_them_from_train():
    """And says so; the user's validation rows stay what they are."""
    frame = table(split=["train"] * 60 + ["val"] * 20)
    made = dataset(frame, split="split")
    assert set(made.train.ids[made.train.fold == 0]) == set(frame["id"][60:])
    assert set(made.test.ids) < set(frame["id"][:60])
    assert any("no test rows" in note for note in made.notes)


def test_given_folds_are_followed():
    """A fold column, whatever its names."""
    frame = table(site=["ABCD"[i % 4] for i in range(80)])
    made = dataset(frame, fold="site", test_fraction=0)
    assert made.train.n_folds == 4
    assert len(made.test.ids) == 0


def test_numbers_are_classes_in_numeric_order():
    """Class 10 comes after class 9, and whole numbers that were read as floats are whole again."""
    frame = table(44).assign(label=[float(i % 11) for i in range(44)])
    assert dataset(frame).train.classes == tuple(str(i) for i in range(11))


def test_multi_label_and_regression_targets():
    """Columns of 0/1, and numbers."""
    rng = np.random.default_rng(0)
    frame = table(80, a=rng.integers(0, 2, 80), b=rng.integers(0, 2, 80), age=rng.normal(size=80))
    multi = dataset(frame, kind="multi", target=["a", "b"])
    assert multi.train.target.dtype == np.uint8
    assert multi.train.target.shape == (60, 2)
    assert dataset(frame, kind="regression", target="age").train.target.shape == (60, 1)


@pytest.mark.parametrize(
    ("columns", "section", "said"),
    [
        ({"label": ["cat"] * 80}, {}, "one class only, 'cat'"),
        ({"label": list(np.linspace(0, 1, 80))}, {}, "set task.kind: regression"),
        ({"label": [None] * 80}, {}, "nothing to learn"),
        ({"a": ["x"] * 80}, {"kind": "multi", "target": "a"}, "needs numbers in a"),
        ({"a": [2] * 80}, {"kind": "multi", "target": "a"}, "0 or 1"),
        (
            {"split": ["train", "exam"] * 40},
            {"split": "split"},
            "'exam'; expected train, validation or test",
        ),
        ({"patient": ["p", None] * 40}, {"group": "patient"}, "is empty for '0001.png'"),
    ],
)
def test_targets_that_cannot_be_learned_are_refused(columns, section, said):
    """Each with what was found and what was expected."""
    with pytest.raises(DataError) as refusal:
        dataset(table().assign(**columns), **section)
    assert said in str(refusal.value)


def test_copies_with_different_labels_are_pointed_out():
    """The same picture called cat and dog is a label error that headrace can see."""
    frame = table()
    content = [content_of(name) for name in frame["id"]]
    content[1] = content[0]
    assert any("carries different targets" in note for note in dataset(frame, content).notes)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)  # the first call imports scikit-learn
@given(st.data())
def test_groups_that_share_a_copy_are_one_group(data):
    """Neither a group nor a copy stands on two sides, also where copies tie groups together."""
    groups = data.draw(st.lists(st.integers(0, 14), min_size=60, max_size=60))
    copies = data.draw(st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=3))
    frame = table(60, patient=[f"p{group}" for group in groups])
    content = [content_of(name) for name in frame["id"]]
    for one, other in copies:
        content[one] = content[other]
    try:
        made = dataset(frame, content, group="patient", folds=2, seed=data.draw(st.integers(0, 3)))
    except HeadraceError:
        return  # too few groups for two sides, or one side of one class
    patient = frame.set_index("id")["patient"]
    assert not set(patient[made.train.ids]) & set(patient[made.test.ids])
    assert not set(made.train.content) & set(made.test.content)
    for column in (patient[made.train.ids].to_numpy(), made.train.content):
        assert (
            pd.DataFrame({"column": column, "fold": made.train.fold})
            .groupby("column")["fold"]
            .nunique()
            .max()
            == 1
        )


def test_a_test_split_drawn_beside_given_validation_rows_keeps_groups_whole():
    """Groups with a validation row give no test row."""
    frame = table(
        80, patient=[f"p{i // 4}" for i in range(80)], split=["train"] * 50 + ["val"] * 30
    )
    with pytest.raises(DataError, match="p12"):  # rows 48 to 51 are on both sides
        dataset(frame, group="patient", split="split")
    frame["split"] = ["train"] * 48 + ["val"] * 32
    made = dataset(frame, group="patient", split="split")
    patient = frame.set_index("id")["patient"]
    assert len(made.test.ids) > 0
    assert not set(patient[made.train.ids]) & set(patient[made.test.ids])


def test_a_fold_column_with_gaps_is_refused_and_its_test_rows_are_the_test_split():
    """Whole numbers that were read as floats are fold numbers; -1 is a test row, and no more are
    drawn.
    """
    frame = table(80, f=[-1.0, 0.0, 1.0, 2.0] * 20).assign(
        label=["cat", "dog"] * 20 + ["dog", "cat"] * 20
    )
    made = dataset(frame, fold="f")
    assert set(made.test.ids) == set(frame["id"][::4])
    assert made.train.n_folds == 3
    frame.loc[5, "f"] = None
    with pytest.raises(DataError, match=r"empty for '0005\.png'"):
        dataset(frame, fold="f")


def test_rows_that_a_feature_set_lost_are_left_out_for_all_heads():
    """The others keep their folds, and the task is another one; a fold that loses all its rows is
    refused.
    """
    made = dataset(table())
    lost = dict.fromkeys([*made.train.content[:3].astype(str), content_of("elsewhere")], "torn")
    kept = drop_rows(made, lost)
    assert kept.train.ids.tolist() == made.train.ids[3:].tolist()
    assert kept.train.fold.tolist() == made.train.fold[3:].tolist()
    assert kept.train.digest != made.train.digest
    assert drop_rows(made, {}) is made
    fold_rows = made.train.fold == 0
    with pytest.raises(
        DataError, match=f"fold 0 failed; the first is {made.train.ids[fold_rows][0]}: torn"
    ):
        drop_rows(made, dict.fromkeys(made.train.content[fold_rows].astype(str).tolist(), "torn"))


@pytest.mark.parametrize(
    ("columns", "section", "said"),
    [
        ({"split": ["val"] * 80}, {"split": "split", "test_fraction": 0}, "no image to train on"),
        (
            {"split": ["train"] * 40 + ["val"] * 40, "label": ["cat"] * 40 + ["dog"] * 40},
            {"split": "split"},
            "one class",
        ),
        (
            {"age": [np.inf] + [1.0] * 79},
            {"kind": "regression", "target": "age"},
            "infinite in 1 row",
        ),
        ({"label": [1, "1"] * 40}, {}, "one class only, '1'"),
        (
            {"label": ["ill"] * 4 + ["well"] * 76},
            {"metric": "auc", "test_fraction": 0, "folds": 6},
            "fold 4 has only one class, so that auc is undefined there and no head could be chosen "
            "by it. Take fewer folds (task.folds: 4) or another metric (task.metric: log_loss)",
        ),
        (
            {"split": ["val"] * 9 + ["train"] * 71, "a": [0] * 9 + [1, 0] * 35 + [1]},
            {"kind": "multi", "target": ["a"], "split": "split"},
            "average_precision is undefined there and no head could be chosen by it. Take another",
        ),
    ],
)
def test_splits_and_targets_that_cannot_work_are_refused_before_anything_is_extracted(
    columns, section, said
):
    """Each would have failed, or misled, after the work."""
    with pytest.raises(DataError) as refusal:
        dataset(table().assign(**columns), **section)
    assert said in str(refusal.value)


def test_labels_are_text_as_written():
    """Codes with zeros and words that mean nothing elsewhere are classes; blanks and the form of
    accents are not.
    """
    words = ["1.10", "1.1", "01", "1", "None", "NA", " é ", "e\u0301"]
    made = dataset(table(80, label=[words[i % 8] for i in range(80)]), folds=2)
    assert sorted(made.train.classes) == sorted({"1.10", "1.1", "01", "1", "None", "NA", "é"})
    assert (
        dataset(table(80, label=["x", "  "] * 20 + ["y", None] * 20), folds=2).unlabelled.ids.size
        == 40
    )


def test_classes_and_groups_that_a_person_would_take_for_one_are_told():
    """They stay different, for nobody knows better; a note names them."""
    notes = " ".join(dataset(table(80, label=["Cat", "cat", "Käfer", "kafer"] * 20)).notes)
    assert "'Cat' and 'cat'" in notes
    assert "'Käfer' and 'kafer'" in notes
    notes = " ".join(
        dataset(
            table(80, site=[["P1", "p 1", "q", "r"][i // 2 % 4] for i in range(80)]),
            group="site",
            folds=2,
        ).notes
    )
    assert "'P1' and 'p 1'" in notes
    assert not any(
        "differ in case" in note
        for note in dataset(table(80, label=["1.1", "1.10", "-1", "1"] * 20)).notes
    )


def test_copies_on_two_sides_of_the_users_split():
    """The run is refused with the rows named, or the column is followed to the letter: none is
    moved in silence.
    """
    frame = table(split=["train"] * 60 + ["test"] * 20)
    content = [content_of(name) for name in frame["id"]]
    content[70] = content[10]
    with pytest.raises(
        DataError, match=r"2 images, first '0010.png' and '0070.png'.*task.copies: keep"
    ):
        dataset(frame, content, split="split")
    made = dataset(frame, content, split="split", copies="keep", folds=3)
    assert set(made.test.ids) == set(frame["id"][60:])
    assert set(made.train.ids) == set(frame["id"][:60])
    assert any("what is tested was trained on" in note for note in made.notes)
    assert made.train.n_folds == 3
    frame["split"] = frame["id"].isin(["0010.png", "0070.png"]).map({True: "test", False: "train"})
    assert set(dataset(frame, content, split="split").test.ids) == {
        "0010.png",
        "0070.png",
    }  # on one side: nothing to say
    folds = table(fold=[i % 4 for i in range(80)])
    with pytest.raises(DataError, match="exact copies of an image on different sides"):
        dataset(folds, [content_of(str(i // 2)) for i in range(80)], fold="fold", test_fraction=0)


def test_an_image_that_many_groups_share():
    """It joins them, and that is told with its name; where most images would be one group, the run
    is refused.
    """
    frame = table(160, patient=[f"p{i // 4:02}" for i in range(160)])
    content = [
        content_of("blank" if i % 4 == 0 and i < 40 else name) for i, name in enumerate(frame["id"])
    ]
    (note,) = [note for note in dataset(frame, content, group="patient").notes if "joined" in note]
    assert "'0000.png' and its copies are in 10 of the 40 groups of 'patient'" in note
    assert "40 of 160 images" in note
    content = [
        content_of("blank" if i % 4 == 0 and i < 120 else name)
        for i, name in enumerate(frame["id"])
    ]
    with pytest.raises(
        DataError,
        match=r"No fair split is left.*images.exclude: \[0000.png, 0004.png, .* and 10 more",
    ):
        dataset(frame, content, group="patient")


def test_several_labels_in_a_cell():
    """By a named separator, or as lists; an empty list is an image without any, an empty cell an
    image without an answer.
    """
    frame = table(80, tags=["a; b", "b", "c ;a", None] * 20)
    made = dataset(frame, kind="multi", target="tags", separator=";", folds=2)
    assert made.train.classes == ("a", "b", "c")
    assert len(made.unlabelled.ids) == 20
    row = (
        made.train.target[made.train.ids == "0000.png"]
        if "0000.png" in made.train.ids
        else made.test.target[made.test.ids == "0000.png"]
    )
    assert row.tolist() == [[1, 1, 0]]
    lists = table(80, tags=[["a", "b"], ["b"], [], ["a"]] * 20)
    made = dataset(lists, kind="multi", target="tags", folds=2)
    assert len(made.unlabelled.ids) == 0
    assert (made.train.target.sum(1) == 0).any()
    with pytest.raises(DataError, match=r"holds lists.*task.kind: multi"):
        dataset(lists, target="tags")
    with pytest.raises(
        DataError, match=r"needs numbers in tags; found 'a; b' for '0000.png'.*task.separator: ';'"
    ):
        dataset(frame, kind="multi", target="tags")


def test_columns_of_which_one_holds_a_one_are_classes():
    """As ISIC's tables have them: the same task as one column of names, and nothing guessed."""
    names = np.array(["cat", "dog", "emu"])[np.random.default_rng(0).integers(0, 3, 60)]
    one_hot = {name: (names == name).astype(float) for name in ("cat", "dog", "emu", "fox")}
    by_columns = dataset(table(60, **one_hot), target=[*one_hot], folds=3).train
    by_name = dataset(table(60, label=names), target="label", folds=3).train
    assert by_columns.classes == by_name.classes == ("cat", "dog", "emu")
    assert (by_columns.target == by_name.target).all()
    assert (by_columns.fold == by_name.fold).all()
    one_hot["fox"] = np.where(np.arange(60) < 2, 1.0, 0.0)
    with pytest.raises(DataError, match="2 of 60 images have not exactly one 1 among zeros"):
        dataset(table(60, **one_hot), target=[*one_hot])


def test_numbers_are_numbers_only_where_the_task_says_so():
    """A table's text is read as numbers for regression and 0/1 columns; what is none is named with
    its row.
    """
    frame = table(80, age=[f" {i}.5 " for i in range(79)] + [None])
    made = dataset(frame, kind="regression", target="age")
    assert len(made.unlabelled.ids) == 1
    assert made.train.target.max() < 80
    made = dataset(table(80, age=[f"{i},5" for i in range(80)]), kind="regression", target="age")
    assert set(made.train.target[:, 0] % 1) == {0.5}
    # 1.5, or fifteen hundred in English
    with pytest.raises(
        DataError,
        match=r"found '1,500' for '0000.png' \(80 such rows\). Write decimals with a point",
    ):
        dataset(table(80, age=["1,500"] * 80), kind="regression", target="age")
    multi = dataset(
        table(80, a=["0", "1"] * 40, b=["True", "False"] * 40), kind="multi", target=["a", "b"]
    )
    assert multi.train.target.shape[1] == 2


def test_folds_of_a_text_table():
    """Numbers of folds are numbers, also where the table has only text; folds counted from one are
    names.
    """
    for column in (
        [str(i % 4) for i in range(80)],
        [str(1 + i % 4) for i in range(80)],
        [i % 4 for i in range(80)],
    ):
        assert dataset(table(fold=column), fold="fold", test_fraction=0).train.n_folds == 4
    with pytest.raises(DataError, match=r"empty in 1 row, first '0079.png'"):
        dataset(table(split=["train"] * 40 + ["test"] * 39 + [" "]), split="split")


@pytest.mark.parametrize("grouped", [False, True])
def test_what_is_drawn_beside_a_column_that_mixes_copies_keeps_them_together(grouped):
    """The user's column may put copies on two sides; the test split and the folds that headrace
    draws may not.
    """
    content = [content_of(str(i // 2)) for i in range(80)]
    frame = table(
        label=["cat", "cat", "dog", "dog"] * 20,
        patient=[f"p{(i + (i > 55)) // 4}" for i in range(80)],
    )
    section = {"copies": "keep", "group": "patient" if grouped else None}
    frame["split"] = ["train"] * 59 + ["val"] * 21  # rows 58 and 59 are copies
    made = dataset(frame, content, split="split", **section)
    assert set(made.train.ids[made.train.fold == 0]) == set(frame["id"][59:])
    assert len(made.test.ids) > 0
    assert not set(made.test.content) & set(made.train.content)
    assert any("80 images are exact copies of one another" in note for note in made.notes)
    assert not any("stay on one side" in note for note in made.notes)
    frame["split"] = ["train"] * 59 + ["test"] * 21
    made = dataset(frame, content, split="split", folds=2, **section)
    assert set(made.test.ids) == set(frame["id"][59:])
    folds = pd.DataFrame({"content": made.train.content, "fold": made.train.fold})
    assert folds.groupby("content")["fold"].nunique().max() == 1
    frame["fold"] = [i // 20 if i != 59 else 3 for i in range(80)]
    made = dataset(frame, content, fold="fold", copies="keep")
    assert len(made.test.ids) > 0
    assert not set(made.test.content) & set(made.train.content)
    frame["split"] = "val"
    with pytest.raises(DataError, match=r"none can be drawn.*task.test_fraction: 0"):
        dataset(frame, content, split="split")


def test_a_text_beside_lists_is_one_label():
    """Without a separator nothing is split, blanks included; a separator that is no text is refused
    with its key.
    """
    mixed = table(80, tags=[["golden retriever", "cat"], "golden retriever", ["cat"], 7] * 20)
    made = dataset(mixed, kind="multi", target="tags", folds=2)
    assert made.train.classes == ("7", "cat", "golden retriever")
    with pytest.raises(ValueError, match="separator"):
        TaskSection.model_validate({"kind": "multi", "separator": ""})
    words = table(80, tags=["cat dog", "cat", "dog", "cat  dog"] * 20)
    assert dataset(words, kind="multi", target="tags", separator=" ", folds=2).train.classes == (
        "cat",
        "dog",
    )


def test_fold_names_of_many_digits():
    """Numbers too long for an integer are names; beside the -1 of test rows, which no name can be,
    they are refused.
    """
    long = "9" * 20
    for column in ([long, "8" * 20] * 40, [long, "0"] * 40):
        assert (
            dataset(
                table(80, f=column, label=["a", "a", "b", "b"] * 20), fold="f", test_fraction=0
            ).train.n_folds
            == 2
        )
    with pytest.raises(DataError, match=f"holds -1 beside {long}: number the folds 0, 1"):
        dataset(table(80, f=[long, "-1"] * 40), fold="f")


@given(st.lists(st.text(), max_size=3))
def test_a_list_in_a_message_is_the_list_that_is_read(names):
    """YAML gives back the texts, whatever they look like."""
    assert yaml.safe_load(as_yaml_list(names)) == names


def test_names_that_yaml_takes_for_something_else_are_quoted():
    """Numbers, words for true and nothing, dates, lone surrogates; plain names are not."""
    assert as_yaml_list(["a b/c-1_.png", "Käfer"]) == "[a b/c-1_.png, Käfer]"
    assert as_yaml_list(["0", "no", "a, b"]) == '["0", "no", "a, b"]'
    odd = [
        "0",
        "2020",
        "no",
        "null",
        "1.5",
        "~",
        "2020-13-45",
        "2020-01-01",
        "- a",
        "a: b",
        "...",
        "---",
        " ",
        "",
        "\udcff",
    ]
    assert yaml.safe_load(as_yaml_list(odd)) == odd


def test_a_column_of_folds_divides_what_a_split_leaves_to_train_on():
    """Both columns were accepted, and then no row was left for validation."""
    sides, folds = ["train"] * 60 + ["test"] * 20, [str(i % 3) for i in range(60)] + [""] * 20
    made = dataset(table(80, split=sides, fold=folds), split="split", fold="fold")
    assert len(made.test.ids) == 20
    assert np.bincount(made.train.fold).tolist() == [20, 20, 20]
    copies = [content_of(str(max(i, 1))) for i in range(80)]
    with pytest.raises(DataError, match="puts exact copies of an image on different sides"):
        dataset(table(80, split=sides, fold=folds), copies, split="split", fold="fold")
    with pytest.raises(DataError, match=r"has validation rows, and task\.fold 'fold' has folds"):
        dataset(table(80, split=["val", *sides[1:]], fold=folds), split="split", fold="fold")


def test_one_group_is_not_told_to_make_one_fold():
    frame = table(80, site=["a"] * 40 + ["b"] * 40)
    with pytest.raises(BadSplit, match=r"^1 group cannot make 5 folds: name a finer group column"):
        dataset(frame, group="site")


def test_values_count_as_what_relabel_says():
    """CheXpert's: an empty cell is a no, and -1 is uncertain, so that its row has no value."""
    cells = ["1.0", "-1.0", "", "0.0"] * 20
    frame = table(edema=cells, mass=["1.0", "0.0", "", ""] * 20)
    with pytest.raises(DataError, match=r"found -1\. .*task.relabel: \{-1: 0\}"):
        dataset(frame, target=["edema", "mass"], kind="multi")
    section = yaml.safe_load('{target: [edema, mass], kind: multi, relabel: {"": 0, -1: null}}')
    made = dataset(frame, **section)
    assert len(made.train.ids) + len(made.test.ids) == 60
    assert sorted(map(tuple, np.unique(made.train.target, axis=0))) == [(0, 0), (1, 1)]
    assert len(made.unlabelled.ids) == 20
    assert not any("values in some" in note for note in made.notes)  # not told what is done
    section["relabel"][-1] = 1
    made = dataset(frame, **section)
    target_of = dict(zip(made.train.ids, made.train.target.tolist(), strict=True))
    assert all(target_of.get(name, [1, 0]) == [1, 0] for name in frame["id"][1::4])
    assert not len(made.unlabelled.ids)


def test_rows_with_some_labels_are_told():
    """Of them nothing is learned, and most of CheXpert's are so."""
    frame = table(edema=["1", "0"] * 40, mass=["1", ""] * 40)
    (note,) = (
        note
        for note in dataset(frame, target=["edema", "mass"], kind="regression").notes
        if "predicted in the end" in note
    )
    assert "40 of them have values in some of these columns" in note
    assert 'task.relabel: {"": 0}' in note


def test_classes_are_merged_named_and_left_out_by_relabel():
    frame = table(classes=("Cat", "cat", "dog", "unsure"))
    relabel = {"cat": "Cat", "unsure": None, "cow": "ox"}
    made = dataset(frame, relabel=relabel)
    assert made.train.classes == ("Cat", "dog")
    assert np.bincount(made.train.target).tolist() == [30, 15]
    assert "task.relabel: no image has 'cow', for which it gives another value" in made.notes
    (note,) = (note for note in dataset(frame).notes if "count as different" in note)
    assert dataset(frame, **yaml.safe_load(note.partition("task.")[2])).train.classes == (
        *("cat", "dog", "unsure"),
    )
    cells = table(classes=("a;b", "b;junk", "a;c"))
    made = dataset(cells, kind="multi", separator=";", relabel={"junk": None, "c": "b"})
    assert made.train.classes == ("a", "b")
    assert set(map(tuple, made.train.target.tolist())) == {(1, 1), (0, 1)}


@pytest.mark.parametrize(
    ("name", "cells", "sides"),
    [
        ("Usage", ["Training", "PublicTest", "PrivateTest", "Training"], (0.5, 0, 0.5)),
        ("is_valid", ["False", "True", "False", "False"], (0.75, 0.25, 0)),
        ("subset", ["train2017", "val2017", "test-dev2017x", "train2017"], None),
        ("part", ["seg_train", "seg_val", "seg_test", "seg_train"], (0.5, 0.25, 0.25)),
        ("is_train", ["1", "0", "1", "1"], (0.75, 0, 0.25)),
        ("is_wet", ["1", "0", "1", "1"], None),
    ],
)
def test_sides_of_a_split_under_other_names_are_read(name, cells, sides):
    """FER2013's, fastai's and COCO's."""
    frame = table(**{name: cells * 20}).assign(label=["cat", "cat", "dog", "dog"] * 20)
    frame["label"] = ["cat"] * 40 + ["dog"] * 40
    if sides is None:
        with pytest.raises(DataError, match=f"task.split '{name}' holds"):
            dataset(frame, split=name)
        return
    made = dataset(frame, split=name, test_fraction=0)
    n_validation = int((made.train.fold == 0).sum()) if sides[1] else 0
    assert (n_validation / 80, len(made.test.ids) / 80) == sides[1:]
