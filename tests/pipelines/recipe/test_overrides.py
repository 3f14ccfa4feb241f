"""`--set KEY=VALUE`: values beside the recipe."""

from pathlib import Path

import pytest
from support.runs import RECIPE

from headrace.pipelines.recipe.load import parse_recipe
from headrace.pipelines.recipe.text import RecipeError


def load(*settings):
    return parse_recipe(RECIPE, Path("recipe.yaml"), settings=settings)


def test_values_take_the_place_of_the_recipes():
    """In sections, in lists, in sections that the recipe does not have, and of any kind."""
    recipe = load(
        "task.folds=4",
        "backbones.0.taps=[layer4.avg]",
        "heads.mlp.hidden=[[64], [256]]",
        "ensemble.max_members=3",
        "heads.logistic=null",
    )
    assert recipe.task.folds == 4
    assert recipe.backbones[0].taps == ("layer4.avg",)
    assert recipe.backbones[0].image_size == 32  # what stands beside stays
    assert recipe.heads.mlp.hidden == ((64,), (256,))
    assert recipe.ensemble.max_members == 3
    assert recipe.heads.logistic is None


def test_the_last_of_two_wins_and_text_may_hold_equal_signs():
    """As on every command line."""
    recipe = load("task.folds=4", "task.folds=5", "out=runs/a=b")
    assert recipe.task.folds == 5
    assert recipe.out.name == "a=b"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.folds", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("task..folds=3", "expected KEY=VALUE"),
        ("task.flods=3", "--set task.flods=3: unknown key 'task.flods': did you mean 'folds'"),
        (
            "heads.logisti.C=5",
            "--set heads.logisti.C=5: unknown key 'heads.logisti': did you mean 'logistic'",
        ),
        ("folds=3", "--set folds=3: unknown key 'folds': did you mean 'task.folds'?"),
        ("task.folds=x", "--set task.folds=x: task.folds: a whole number is expected"),
        ("task.folds.deep=1", "--set task.folds.deep=1: task.folds is 3 in the recipe"),
        ("backbones.7.taps=auto", "backbones is a list of 1; expected the number of an item"),
        ("task.folds=[1", "--set task.folds=[1, line 1: this is not YAML"),
        ("task.folds=3\nother: 4", "expected one value"),
        ("thaw={}", "--set thaw={}: the key 'thaw' is called 'finetune' now"),
    ],
)
def test_mistakes_are_told_with_the_setting(setting, message):
    """The setting that was typed, not a line of the file."""
    with pytest.raises(RecipeError) as raised:
        load(setting)
    assert message in str(raised.value)


def test_an_empty_list_has_no_number_to_type():
    """But it can be set as a whole."""
    with pytest.raises(RecipeError, match="backbones is a list of 0; expected a whole list"):
        load("backbones=[]", "backbones.0.taps=auto")
