"""Planning is pure: from literals to what has to be done."""

import dataclasses

import numpy as np
import pytest

from headrace.cache.errors import CacheError
from headrace.cache.spec import FeatureSpec
from headrace.heads.data.task import Task
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.neighbors.kind import KNNSpec
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.spec import Halving
from headrace.pipelines.cluster.task_log import TaskLog
from headrace.pipelines.planning.cost_model import (
    TARGET_S,
    Rates,
    bank_seconds,
    measured_rates,
    specs_per_bank,
)
from headrace.pipelines.planning.plan import (
    FeaturePlan,
    bank_group,
    check_space,
    feature_plan,
    plan_run,
)
from headrace.pipelines.recipe.grid import RequestedHeads, requested_heads
from headrace.pipelines.recipe.heads import Heads
from headrace.pipelines.recipe.load import RecipeError

NAMES = ["early.avg", "late.avg"]
TASK = Task(
    "single",
    ("a", "b"),
    ids=np.arange(75).astype(str),
    content=np.arange(75).astype("S32"),
    target=np.arange(75) % 2,
    fold=(np.arange(75) % 5).astype(np.int16),
    weight=np.ones(75),
)


def feature(name, known=0, total=100, shape=(8,), dtype="float16"):
    tap, reduction = name.rsplit(".", 1)
    spec = FeatureSpec("b", "w", tap, reduction, "{}", "{}", "d", "float32", dtype, shape)
    return FeaturePlan(name, (spec,), known, total, total - known)


def planned(heads, trained=None):
    return plan_run(
        features=[feature(name) for name in NAMES],
        units=[],
        images=100,
        requested=requested_heads(Heads.model_validate(heads), NAMES),
        task=TASK,
        trained=lambda group: (trained or {}).get(group, {}),
    )


def test_heads_are_the_product_of_the_lists_on_every_input():
    """each: every feature set alone; all: side by side; nothing twice."""
    heads = {
        "logistic": {"C": [1, 0.1, 1], "class_weight": ["none", "balanced"]},
        "mlp": {"seed": [0, 1]},
    }
    wanted = requested_heads(Heads.model_validate(heads), NAMES)
    logistic = [(inputs, specs) for inputs, specs, _ in wanted if specs[0].kind == "logistic"]
    assert [inputs for inputs, _ in logistic] == 2 * [
        ("early.avg",),
        ("late.avg",),
        ("early.avg", "late.avg"),
    ]
    assert logistic[0][1] == (LogisticSpec(C=0.1), LogisticSpec(C=1.0))
    (inputs, specs, _), *rest = [item for item in wanted if item.specs[0].kind == "mlp"]
    assert not rest
    assert inputs == ("early.avg", "late.avg")
    assert len(set(specs)) == len(specs) == 2 * 2 * 2  # hidden x dropout x seed


def test_with_one_feature_set_each_and_all_are_the_same():
    """No head is trained twice under two names."""
    wanted = requested_heads(Heads.model_validate({"logistic": {}}), ["only.avg"])
    assert [each.inputs for each in wanted] == [("only.avg",)]


def test_an_input_that_is_not_there_names_the_nearest():
    """A typing error in heads.inputs."""
    with pytest.raises(RecipeError, match=r"Did you mean 'early\.avg'"):
        requested_heads(Heads.model_validate({"logistic": {"inputs": [["early.agv"]]}}), NAMES)


def test_only_missing_specs_are_planned():
    """A recipe with one more strength trains that one alone."""
    early = RequestedHeads(("early.avg",), (LogisticSpec(C=0.1),))
    fingerprints = {"early.avg": [feature("early.avg").specs[0].fingerprint]}
    group = bank_group(TASK.digest, early, fingerprints)
    there = {group: {"file": frozenset({LogisticSpec(C=0.1)})}}
    plan = planned({"logistic": {"C": [0.1, 1], "inputs": ["each"]}}, there)
    assert [(bank.inputs, bank.specs) for bank in plan.banks] == [
        (("early.avg",), (LogisticSpec(C=1.0),)),
        (("late.avg",), (LogisticSpec(C=0.1), LogisticSpec(C=1.0))),
    ]
    assert (plan.heads_new, plan.heads_total) == (3 * 5, 4 * 5)


def test_another_task_features_kind_or_halving_is_another_group():
    """Results are never mistaken for those of other data, or of other training."""
    fingerprints = {"a": ["1"], "b": ["2"], "both": ["1", "2"]}
    groups = {
        bank_group(task, RequestedHeads(inputs, (spec,), halving), fingerprints)
        for task in ("t", "u")
        for inputs in (("a",), ("b",), ("a", "b"), ("b", "a"))
        for spec, halving in ((LogisticSpec(C=1), None), (MLPSpec(), None), (MLPSpec(), Halving()))
    }
    assert len(groups) == 2 * 4 * 3


def test_convolution_heads_are_given_maps_and_the_others_are_not():
    """`each` and `all` mean what a kind can use; a name means itself."""
    heads = Heads.model_validate(
        {"conv": {}, "logistic": {"inputs": ["each", "all", ["late.map"]]}}
    )
    wanted = requested_heads(heads, ["early.avg", "late.avg", "late.map"])
    inputs = {
        kind: [each.inputs for each in wanted if each.specs[0].kind == kind]
        for kind in ("conv", "logistic")
    }
    assert inputs["conv"] == [("late.map",)]
    assert inputs["logistic"] == [
        ("early.avg",),
        ("late.avg",),
        ("early.avg", "late.avg"),
        ("late.map",),
    ]
    with pytest.raises(RecipeError, match=r"layer3\.map"):
        requested_heads(Heads.model_validate({"conv": {}}), ["early.avg"])
    with pytest.raises(RecipeError, match=r"late\.avg"):
        requested_heads(Heads.model_validate({"logistic": {}}), ["late.map"])


def test_views_count_once_as_images_and_each_in_bytes():
    """A tap with an augmented view is one input; what a view lacks is what has to be computed."""
    spec = feature("late.avg").specs[0]
    plan = feature_plan("late.avg", [spec, spec], {"a", "b", "c"}, [{"a", "b", "z"}, {"a"}])
    assert (plan.rows_cached, plan.rows_total, plan.rows_missing) == (1, 3, 3)


def test_large_grids_are_cut_into_banks():
    """A death loses one bank, not the whole grid."""
    plan = planned({"mlp": {"seed": list(range(100)), "hidden": [[8]], "dropout": [0]}})
    assert [len(bank.specs) for bank in plan.banks] == [64, 36]
    assert {type(spec) for bank in plan.banks for spec in bank.specs} == {MLPSpec}
    assert len({bank.key for bank in plan.banks}) == 2


def test_settings_that_share_most_of_their_work_stay_together():
    """A neighbour search serves every k. Two banks would search twice, for hardly less time each."""
    settings, sizes = [KNNSpec(k) for k in (1, 5, 20)], (50_000, 1280, 10, 5)
    one, three = (bank_seconds(part, sizes, Rates()) for part in (settings[:1], settings))
    assert TARGET_S < one < three < 1.1 * one
    assert specs_per_bank(settings, sizes, Rates()) > len(settings)


def test_bytes_to_come_are_rows_times_shape_times_item():
    """The figure that `--dry-run` prints: the values, and a little for ids and headers."""
    for dtype, item in (("float16", 2), ("float32", 4), ("uint8", 1)):
        values = 6000 * 8 * 49 * item
        assert (
            values
            < feature("a.map", known=4000, total=10_000, shape=(8, 7, 7), dtype=dtype).bytes_new
            < 1.4 * values
        )


def test_a_budget_names_what_fits_and_what_does_not(tmp_path):
    """Refused before anything is extracted; what is there already costs nothing."""
    plan = dataclasses.replace(
        planned({"logistic": {}}),
        features=(
            feature("a.avg", total=10_000),
            feature("b.map", total=10_000, shape=(64, 20, 20)),
            feature("c.avg", 9, 9),
        ),
    )
    check_space(plan, tmp_path, 1.0)
    with pytest.raises(CacheError, match=r"a\.avg fits, and b\.map \(0\.51\d GB\) does not"):
        check_space(plan, tmp_path, 0.1)


def test_a_unit_that_another_driver_published_tells_no_rate(tmp_path):
    """It took this driver no time, and would make the others look cheap."""
    log = TaskLog(tmp_path / "driver.jsonl")
    for rows, seconds in ((10, 5.0), (990, 0.0)):
        result = {"rows": rows, "decode_s": 0.0, "forward_s": seconds, "publish_s": 0.0}
        log("finished", task="extract", seconds=0.1, result=result)
    assert measured_rates(tmp_path).image_s == 0.5
