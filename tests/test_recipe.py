"""The recipe: what it accepts, and the lesson it gives when it refuses."""

import pytest

from headrace.pipelines import RecipeError, load_recipe

GOOD = """\
images:
  folder: photos
backbones:
  - name: torchvision:resnet18
    weights: random:0
    taps: [layer1.avg, layer4.avg]
heads:
  logistic:
    C: [1e-3, 1]
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_relative_paths_start_from_the_recipe(tmp_path):
    """Where the command was called does not matter."""
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.images.folder == tmp_path / "photos"
    assert recipe.cache == tmp_path / "headrace-cache"
    assert recipe.out == tmp_path / "headrace-runs" / "recipe"
    assert recipe.heads.logistic.C == (1e-3, 1.0)  # YAML 1.1 reads 1e-3 as text
    assert recipe.heads.mlp is None


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("    taps:", "    tap:", 6, "did you mean 'taps'"),
        ("  logistic:", "  logistik:", 8, "did you mean 'logistic'"),
        ("images:", "image:", 1, "did you mean 'images'"),
        ("[1e-3, 1]", "[1e-3, -1]", 9, "greater than 0 (found -1)"),
        ("[1e-3, 1]", "[]", 9, "at least 1 item"),
        ("    C: [1e-3, 1]", "    C: [1e-3, 1]\n    inputs: some", 10, "heads.logistic.inputs"),
        ("  folder: photos", "  folder: photos\n  table: t.csv", 1, "exactly one of `folder`"),
        ("heads:", "heads: 3\nx:", 7, "heads"),
        ("backbones:", "storage: float8\nbackbones:", 3, "found 'float8'"),
        ("  folder: photos", "  folder: photos\n  folder: other", 3, "stands already in line 2"),
        ("  - name: torchvision:resnet18\n", "  - weights_match: order\n", 4, "'backbones.0.name' is missing"),
    ],
)
def test_a_wrong_key_or_value_names_file_line_and_nearest_key(tmp_path, old, new, line, said):
    """Each refusal says where and what to type."""
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    message = str(refusal.value)
    assert f"{path}, line {line}:" in message
    assert said in message


def test_every_problem_is_named_at_once(tmp_path):
    """Two typing errors are two lines, not two rounds."""
    path = write(tmp_path, GOOD.replace("taps", "tops").replace("logistic", "logistics"))
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    assert "'taps'" in str(refusal.value)
    assert "'logistic'" in str(refusal.value)


def test_not_yaml_names_the_line(tmp_path):
    """Broken YAML is named with its line."""
    with pytest.raises(RecipeError, match="line 3: this is not YAML"):
        load_recipe(write(tmp_path, "images:\n  folder: [a\nbackbones: 3: 4\n"))


def test_an_absent_recipe_says_what_to_type(tmp_path):
    """No such file, and a folder in its place."""
    with pytest.raises(RecipeError, match="headrace init"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="headrace init"):
        load_recipe(tmp_path)


def test_an_empty_file_lists_the_keys(tmp_path):
    """What a recipe is made of."""
    with pytest.raises(RecipeError, match="images, task, backbones, heads"):
        load_recipe(write(tmp_path, ""))


def test_two_backbones_of_one_name_need_an_alias(tmp_path):
    """The leaderboard must be able to tell them apart."""
    twice = GOOD.replace("backbones:\n", "backbones:\n  - name: torchvision:resnet18\n")
    with pytest.raises(RecipeError, match="alias"):
        load_recipe(write(tmp_path, twice))
