"""The recipe: what it accepts, and the lesson it gives when it refuses."""

import contextlib
import re
import time

import pytest
import yaml

from headrace.extract.errors import BackboneError
from headrace.heads.sklearn.bank import BadEstimator
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.grid import check_kinds
from headrace.pipelines.recipe.load import RecipeError, load_recipe
from headrace.pipelines.recipe.text import RENAMED_KEYS, naming_lines
from headrace.pipelines.records import write_record
from headrace.pipelines.run_directory import stored_recipe

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


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[1e-3, 1]", "[1e-3, 1]\n    max_iter: 9", "Valid here: inputs, C, class_weight"),
        ("  logistic:", "  svm: {}\n  logistic:", "sklearn: [{estimator: sklearn.svm.SVC}]"),
        ("[1e-3, 1]", "[1]\n  mlp: {lr: [1]}", "did you mean 'learning_rate'?"),
        ("[1e-3, 1]", "[1]\n  mlp: {C: [1]}", "did you mean 'heads.logistic.C'?"),
        ("[1e-3, 1]", "[1]\n    size: [1]", "'heads.logistic.size': Valid here"),
        (
            "[1e-3, 1]",
            "[1]\n  mlp: {epochs: [30]}",
            "a whole number is expected (found [30]; write 30)",
        ),
        ("images:", "batch-size: 3\nimages:", "did you mean 'heads.mlp.batch_size'?"),
        ("images:", "trainer: {}\nimages:", "unknown key 'trainer': Valid here"),
        ("[1e-3, 1]", "[1]\ntask: {test_fraction: 25%}", "(found '25%'; write 0.25)"),
        ("[1e-3, 1]", "[1]\ntask: {test_fraction: 25}", "(found 25; write 0.25)"),
        ("[1e-3, 1]", "[1]\ntask: {test_fraction: '25'}", "(found '25'; write 0.25)"),
        ("[1e-3, 1]", "[1]\ntask: {target: yes}", "put what you wrote in quotes"),
        ("images:", "list: 3\nimages:", "unknown key 'list': Valid here"),
        ("photos", "photos\n  boxes: {fromat: xyxy}", "did you mean 'format'?"),
        ("photos", "photos\n  boxes:", "images.boxes: a section with keys is expected"),
        (
            "[layer1.avg, layer4.avg]",
            "last",
            "'auto' or a list is expected, found last: write [last]",
        ),
        ("  folder", "\tfolder", "Indent with blanks, not tabs"),
        ("folder: photos", "folder photos\n  layout: auto", "a key lacks its colon"),
        ("photos", '"C:\\Users\\me"', "write paths in single quotes"),
        ("heads:", "heads: [logistic, mlp]\nx:", "write {logistic: {}, mlp: {}}"),
        (
            "heads:",
            "cluster: {where: slurm, slurm: {memory: 3}}\nheads:",
            "did you mean 'memory_per_job'",
        ),
    ],
)
def test_mistakes_that_people_bring_from_elsewhere(tmp_path, old, new, said):
    """Other tools' keys, lists and scalars, percent, YAML's own words: one line, and what to type."""
    assert old in GOOD
    with pytest.raises(RecipeError) as refusal:
        load_recipe(write(tmp_path, GOOD.replace(old, new, 1)))
    assert said in str(refusal.value)
    assert re.search(r"recipe.yaml, line \d+: ", str(refusal.value))
    assert "Input should" not in str(refusal.value)


def test_a_recipe_as_windows_shells_write_it(tmp_path):
    """UTF-16 with its mark."""
    (tmp_path / "recipe.yaml").write_bytes(GOOD.encode("utf-16"))
    assert load_recipe(tmp_path / "recipe.yaml").images.folder == tmp_path / "photos"


def test_a_refusal_after_reading_has_its_line_too(tmp_path):
    """Where one line names what is wrong; a word that stands nowhere has none."""
    path = write(tmp_path, GOOD)
    for quoted, place in (("layer4.avg", f"{path}, line 6: "), ("layer9", "")):
        with pytest.raises(BackboneError) as refusal, naming_lines(path):
            raise BackboneError(f"no node {quoted!r}")
        assert str(refusal.value) == f"{place}no node {quoted!r}"


def test_estimators_of_scikit_learn_are_looked_up_before_anything_is_extracted(tmp_path):
    """A short or misspelt name, a parameter that is none; code of others is left to the run."""
    for entry, said in (
        ("{estimator: SVC}", "give the full path"),
        ("{estimator: sklearn.svm.SVCC}", "cannot be imported"),
        ("{estimator: sklearn.svm.SVC, parameters: {c: [1]}}", "it takes C, kernel"),
        ("{estimator: mine.Model}", None),
    ):
        recipe = load_recipe(write(tmp_path, GOOD + f"  sklearn: [{entry}]\n"))
        with pytest.raises(BadEstimator, match=said) if said else contextlib.nullcontext():
            check_kinds(recipe.heads, "single")


def test_relative_paths_start_from_the_recipe(tmp_path):
    """Where the command was called does not matter."""
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.images.folder == tmp_path / "photos"
    assert recipe.cache == tmp_path / "headrace-cache"
    assert recipe.out == tmp_path / "headrace-runs" / "recipe"
    assert recipe.heads.logistic.C == (1e-3, 1.0)  # YAML 1.1 reads 1e-3 as text
    assert recipe.heads.mlp is None
    for weights, is_file in {
        **dict.fromkeys(("last.ckpt", "NET.PTH", "nets/epoch-9", "net.pth.tar"), True),
        **dict.fromkeys(("random:0", "pypi:weights", "IMAGENET1K_V2"), False),
    }.items():
        (backbone,) = load_recipe(write(tmp_path, GOOD.replace("random:0", weights))).backbones
        assert backbone.weights == (str(tmp_path / weights) if is_file else weights)


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("    taps:", "    tap:", 6, "did you mean 'taps'"),
        ("  logistic:", "  logistik:", 8, "did you mean 'logistic'"),
        ("images:", "image:", 1, "did you mean 'images'"),
        ("    C: [1e-3", "    c: [1e-3", 9, "did you mean 'C'"),
        ("[1e-3, 1]", "0.1", 9, "a list is expected, found 0.1: write [0.1]"),
        ("[1e-3, 1]", "[1e-3, -1]", 9, "greater than 0 (found -1)"),
        ("[1e-3, 1]", "[]", 9, "at least 1 item"),
        ("    C: [1e-3, 1]", "    C: [1e-3, 1]\n    inputs: some", 10, "heads.logistic.inputs"),
        ("  folder: photos", "  folder: photos\n  table: t.csv", 1, "exactly one of `folder`"),
        ("heads:", "heads: 3\nx:", 7, "heads"),
        (
            "    taps:",
            "    views: flip\n    taps:",
            6,
            "or dihedral (quarter turns too) (found 'flip')",
        ),
        ("    taps:", "    views: 65\n    taps:", 6, "from 1 to 64"),
        ("backbones:", "storage: float8\nbackbones:", 3, "found 'float8'"),
        ("  folder: photos", "  folder: photos\n  folder: other", 3, "stands already in line 2"),
        (
            "  - name: torchvision:resnet18\n",
            "  - weights_match: order\n",
            4,
            "'backbones.0.name' is missing",
        ),
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


@pytest.mark.parametrize("old_key", RENAMED_KEYS)
def test_a_key_of_an_earlier_version_is_answered_with_its_name_today(tmp_path, old_key):
    """One sentence, with a name that the section has."""
    *sections, old_name = old_key.split(".")
    values = {old_name: {}}
    for section in reversed(sections):
        values = {section: [values] if section == "reuse" else values}
    path = write(tmp_path, GOOD + yaml.safe_dump(values))
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    new_name = RENAMED_KEYS[old_key]
    assert f"is called {new_name!r} now" in str(refusal.value)
    new_values = {new_name: {}}
    for section in reversed(sections):
        new_values = {section: [new_values] if section == "reuse" else new_values}
    with pytest.raises(RecipeError) as refusal:
        load_recipe(write(tmp_path, GOOD + yaml.safe_dump(new_values) + "nonsense: 1\n"))
    assert str(refusal.value).count("unknown key") == 1, "the new name is one that the section has"


def test_the_recipe_of_a_run_of_an_earlier_version_is_answered_with_names_of_today(tmp_path):
    """Also keys inside sections; and the answer says what to do."""
    paths = RunPaths(tmp_path)
    values = {"images": {"folder": "photos"}, "thaw": None, "cluster": {"deadline_s": 60.0}}
    write_record(paths.recipe, values)
    with pytest.raises(InvalidInput, match="run the recipe again") as refusal:
        stored_recipe(paths)
    assert "thaw is called finetune now" in str(refusal.value)
    assert "deadline_s is called task_timeout_s now" in str(refusal.value)


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


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("C: [1e-3, 1]", "C: !foo [1]", 9, "'!foo'"),
        ("C: [1e-3, 1]", "C: [!!int foo]", 9, "foo"),
        ("C: [1e-3, 1]", "C: &c [0.01, *c]", 9, "holds itself"),
        ("C: [1e-3, 1]", "C: &c {a: *c}", 9, "holds itself"),
        ("C: [1e-3, 1]", "? [a, b]\n    : 1", 9, "a list stands where a key"),
        ("C: [1e-3, 1]", "? {a: b}\n    : 1", 9, "a mapping stands where a key"),
        ("C: [1e-3, 1]", "C: " + "[" * 2000, 9, "too deep"),
        ("torchvision:resnet18", "2020-13-45", 4, "month must be in 1..12"),
        ("torchvision:resnet18", "a\x00b", 4, "not YAML"),
        ("    taps: [layer1.avg, layer4.avg]", "    taps: [a]\n    1: x", 7, "1"),
    ],
)
def test_what_yaml_can_say_and_a_recipe_cannot(tmp_path, old, new, line, said):
    """Tags, dates that do not exist, anchors inside themselves, keys that are lists:
    one line each.
    """
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}, line {line}:")
    assert said in message
    assert message.count("\n") == 0


def _merges(levels):
    lines = [f"x{i}: &x{i} {{<<: [*x{i - 1}, *x{i - 1}]}}\n" for i in range(1, levels)]
    return "x0: &x0 {k: v}\n" + "".join(lines)


BOMBS = {
    "merge keys of merge keys": (_merges(40) + GOOD, "line 2: merge keys"),
    "twenty thousand unknown keys": (
        GOOD + "".join(f"key{i}: 1\n" for i in range(20_000)),
        "and 19,980 more",
    ),
    "a list a thousand deep": (GOOD + "x: " + "[" * 1000 + "]" * 1000, "too deep"),
    "a number of 200,000 digits": (GOOD + "x: " + "1" * 200_000, "a number of 200,000 characters"),
    "a number to the base of sixty": (GOOD + "x: 1" + ":1" * 100_000, "a number of"),
    "a key of 200,000 letters": (GOOD + "? " + "x" * 200_000 + "\n: 1", "unknown key 'x{80}…'"),
    "a text of 200,000 letters": (GOOD + "metric: [" + "x" * 200_000 + "]", "unknown key 'metric'"),
    "a megabyte": (GOOD + "#" * 2**20, "at most"),
    "three gigabytes": (None, "not YAML|at most"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_recipe_that_would_fill_time_or_memory_is_told_so(tmp_path, name):
    """Each has one short message within seconds; none is unfolded, measured or printed in full."""
    text, said = BOMBS[name]
    path = tmp_path / "recipe.yaml"
    if text is None:
        with path.open("wb") as file:
            file.truncate(3 << 30)
    else:
        path.write_text(text)
    began = time.process_time()
    with pytest.raises(RecipeError, match=said) as refusal:
        load_recipe(path)
    assert time.process_time() - began < 30
    assert len(str(refusal.value)) < 6000


def test_anchors_are_looked_at_once(tmp_path):
    """An anchor used twice is fine; thirty lists of two anchors each are not followed a billion
    times.
    """
    shared = GOOD.replace("C: [1e-3, 1]", "C: &c [1e-3, 1]\n  ridge:\n    alpha: *c")
    assert load_recipe(write(tmp_path, shared)).heads.ridge.alpha == (1e-3, 1.0)
    with pytest.raises(RecipeError, match="unknown key 'a0'"):
        load_recipe(write(tmp_path, GOOD + "a0: &a0 [1]\na1: [*a0, *a0]"))
    lines = ["a0: &a0 [1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30)]
    with pytest.raises(RecipeError, match="stand for more than 50,000"):
        load_recipe(write(tmp_path, GOOD + "\n".join(lines)))


@pytest.mark.parametrize(
    ("old", "new"),
    [("[1e-3, 1]", "[-1]"), ("taps: [layer1.avg, layer4.avg]", "taps: []"), ("[1e-3, 1]", "[]")],
)
def test_a_refused_item_does_not_make_its_list_too_short(tmp_path, old, new):
    """No line about a list whose items are the trouble."""
    with pytest.raises(RecipeError) as refusal:
        load_recipe(write(tmp_path, GOOD.replace(old, new)))
    message = str(refusal.value)
    assert " backbones: " not in message
    assert message.count("at least 1 item") == (new != "[-1]")


MLP = GOOD + "  mlp:\n    {}\n"
TASK = GOOD + "task:\n  {}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace("[1e-3, 1]", "[.inf]"), "finite"),
        (GOOD.replace("[1e-3, 1]", "[.nan]"), "finite"),
        (MLP.format("weight_decay: [.inf]"), "finite"),
        (MLP.format("weight_decay: [-1]"), "greater than or equal to 0"),
        (MLP.format("dropout: [.nan]"), "finite"),
        (MLP.format("seed: [-1]"), "greater than or equal to 0"),
        (MLP.format("halving: {keep: .nan}"), "finite"),
        (TASK.format("seed: -1"), "greater than or equal to 0"),
        (TASK.format("target: []"), "task.target: name at least one column"),
        (TASK.format("target: ''"), "task.target: name at least one column"),
        (TASK.format("target: [a, b, a]"), "task.target: the column 'a' is named twice"),
    ],
)
def test_numbers_are_finite_and_columns_are_named_once(tmp_path, text, said):
    """Each of these would fail hours later, or train the same thing twice."""
    with pytest.raises(RecipeError) as refusal:
        load_recipe(write(tmp_path, text))
    assert said in str(refusal.value)
    assert str(refusal.value).count("\n") == 0


def test_a_list_of_one_target_is_fine(tmp_path):
    """With the kind that is the default."""
    assert load_recipe(write(tmp_path, TASK.format("target: [label]"))).task.target == ("label",)


def test_numbers_are_predicted_by_heads_that_can(tmp_path):
    """Where no heads are named, a regression gets ridge and MLP heads; named heads are left as they
    are.
    """
    unnamed = GOOD[: GOOD.index("heads:")]
    heads = load_recipe(write(tmp_path, unnamed + "task: {target: age, kind: regression}\n")).heads
    assert (heads.ridge is not None, heads.mlp is not None, heads.logistic) == (True, True, None)
    assert load_recipe(write(tmp_path, unnamed)).heads.logistic is not None
    named = load_recipe(write(tmp_path, GOOD + "task: {target: age, kind: regression}\n")).heads
    assert (named.ridge, named.logistic is not None) == (
        None,
        True,
    )  # refused by the run, with what to type


def test_one_default_of_weight_decay_wherever_a_network_is_asked_for():
    """In recipes, in specs and in scikit-learn's faces; `init` writes it too."""
    from headrace.heads.estimators import MLPHead, MLPRegressionHead
    from headrace.heads.networks.kind import WEIGHT_DECAY, ConvSpec, MLPSpec
    from headrace.pipelines.cli.init import _RECIPE
    from headrace.pipelines.recipe.heads import HEAD_GRIDS

    for kind in ("mlp", "conv"):
        assert HEAD_GRIDS[kind]().weight_decay == (WEIGHT_DECAY,)
    assert MLPSpec().weight_decay == ConvSpec().weight_decay == WEIGHT_DECAY
    assert MLPHead().weight_decay == MLPRegressionHead().weight_decay == WEIGHT_DECAY
    assert f"weight_decay: [{WEIGHT_DECAY}]" in _RECIPE


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("images", "photos", "{folder: photos}"),
        ("task", "label", "{target: label}"),
        ("backbones", "timm:resnet18", "[{name: timm:resnet18}]"),
        ("backbones", ["timm:resnet18"], "{name: timm:resnet18}"),
        ("heads", "logistic", "{logistic: …}"),
        ("heads", {"sklearn": {"estimator": "sklearn.svm.SVC"}}, "'- ' before its first key"),
        ("ensemble", True, "{}"),
    ],
)
def test_a_word_where_a_section_stands_is_answered_with_what_to_write(
    tmp_path, key, value, written
):
    """In YAML that can be copied."""
    recipe = yaml.safe_load(GOOD) | {key: value}
    with pytest.raises(RecipeError) as refusal:
        load_recipe(write(tmp_path, yaml.safe_dump(recipe)))
    assert f"write {written}" in str(refusal.value)


def test_an_empty_section_has_its_defaults_and_null_leaves_it_out(tmp_path):
    recipe = load_recipe(
        write(tmp_path, GOOD + "  ridge:\n  knn: null\n  lda: ~\nensemble:\nfinetune: null\n")
    )
    assert len(recipe.heads.ridge.alpha) > 5
    assert recipe.heads.knn is recipe.heads.lda is recipe.finetune is None
    assert recipe.ensemble.max_members == 8
    assert load_recipe(tmp_path / "recipe.yaml", settings=["ensemble=null"]).ensemble is None


def test_a_folder_in_place_of_a_recipe_is_told_a_command_that_works(tmp_path):
    """Its name has a blank, as folders of photos have."""
    (tmp_path / "my photos").mkdir()
    with pytest.raises(RecipeError, match=r"headrace init '.*/my photos'$"):
        load_recipe(tmp_path / "my photos")
