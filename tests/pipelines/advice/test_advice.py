"""Advice is right where the answer is known, abstains where the evidence is thin, and its curves
are curves.
"""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from support.evidence import (
    WORLDS,
    World,
    advice_word,
    content_of,
    live_in,
    store_taps,
    task_of,
)

from headrace.cache.feature_set import open_feature_set
from headrace.heads.bank import BankJob, train_bank
from headrace.heads.data.task import Task, save_task
from headrace.heads.evaluate.intervals import proportion_interval
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.pipelines.advice.decide import (
    ClassEvidence,
    Evidence,
    PilotEvidence,
    TapEvidence,
    advice_summary,
    decide,
)
from headrace.pipelines.advice.measure import advise_on
from headrace.pipelines.advice.reference import reference_evidence, reference_text
from headrace.pipelines.advice.transferability import transferability_scores
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.recipe.sections import InputHalvingSection
from headrace.pipelines.selection.estimate import Estimate
from headrace.pipelines.selection.halving import halve_inputs
from headrace.pipelines.selection.learning_curves import (
    FRACTIONS,
    error_with_more,
    fit_power_law,
    gain_from_more,
    nested_subsets,
    row_draws,
    subset,
)
from headrace.pipelines.stages.select import rank_heads


def in_this_process(jobs):
    for job in jobs:
        train_bank(job)


def asked(world, folder):
    board, task, directories = live_in(world, folder)
    return advise_on(board, task, directories, folder / "advice", in_this_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world", "expected"), WORLDS[::2], ids=[name for name, *_ in WORLDS[::2]]
)
def test_the_advice_is_right_in_made_worlds(tmp_path, name, world, expected):
    """With the tap, the class and the number of images that go with it; benchmarks/advice.py has
    more worlds.
    """
    advice = asked(world, tmp_path)
    assert advice_word(advice) == expected, f"{advice.sentence} {' '.join(advice.reasons)}"
    if expected == "fine-tune":
        # the last tap is the best, so what lies above the one before it trains
        assert advice.tap == "block1.avg"
    if expected == "collect one":
        assert advice.class_name == f"class {world.classes - 1}"
        assert advice.more.value >= world.starved / 2
    json.dumps(advice_summary(advice))


def test_a_second_call_trains_nothing_and_says_the_same(tmp_path):
    """The curve's banks and the transfer scores are kept."""
    board, task, directories = live_in(World(120, 2, (1.0, 3.0)), tmp_path)
    trained = []

    def counted(jobs):
        trained.append(len(jobs))
        in_this_process(jobs)

    first, again = (
        advise_on(board, task, directories, tmp_path / "advice", counted) for _ in range(2)
    )
    assert trained == [6 * 3, 0]
    assert json.dumps(advice_summary(first)) == json.dumps(advice_summary(again))


def test_too_few_images_are_told_so(tmp_path):
    """No curve is drawn."""
    advice = asked(World(36, 2, (1.0, 3.0)), tmp_path)
    assert advice.action == "abstain"
    assert "36 images" in " ".join(advice.reasons)


@pytest.mark.parametrize("kind", ["regression", "multi"])
def test_other_tasks_are_advised_on_by_their_curve(tmp_path, kind):
    """A regression that needs more rows, labels that need none; nothing that only single labels
    have is claimed.
    """
    rng = np.random.default_rng(0)
    rows, width = (150, 60) if kind == "regression" else (200, 4)
    X = rng.normal(size=(rows, width))
    values = X @ rng.normal(size=(width, 2)) / np.sqrt(width)
    target = (
        values + rng.normal(0, 0.3, values.shape)
        if kind == "regression"
        else (values > 0).astype(np.uint8)
    )
    directories = store_taps(tmp_path / "cache", {"block0.avg": X})
    single = task_of(rng.integers(0, 2, rows), folds=3)
    task = Task(kind, ("a", "b"), single.ids, single.content, target, single.fold, single.weight)
    save_task(task, tmp_path / "task.npz")
    specs = (RidgeSpec(10.0),) if kind == "regression" else (LogisticSpec(1.0),)
    path = str(tmp_path / "b.h5")
    train_bank(
        BankJob(str(tmp_path / "task.npz"), (str(directories["block0.avg"][0]),), specs, path)
    )
    from headrace.heads.results import read_bank

    table = read_bank(path).table
    metric = "r2" if kind == "regression" else "average_precision"
    heads = table.assign(path=path, inputs=pd.Series([("block0.avg",)] * len(table)))
    board = rank_heads(heads, metric, {"block0.avg": width}, 3)
    advice = advise_on(board, task, directories, tmp_path / "advice", in_this_process)
    assert (
        advice.action == "collect" if kind == "regression" else advice.action in ("head", "abstain")
    )
    assert advice.evidence.surest is None
    assert advice.evidence.per_class == ()
    (scores,) = transferability_scores(task, directories, tmp_path / "advice")
    assert scores.logme is not None
    assert (scores.h_score, scores.nce, scores.bayes_low) == (None, None, None)


def test_no_whole_head_is_an_error_that_says_what_to_do(tmp_path):
    """Not a traceback."""
    board, task, directories = live_in(World(80, 2, (1.0,)), tmp_path)
    with pytest.raises(InvalidInput, match="headrace run"):
        advise_on(board.assign(failed=1), task, directories, tmp_path / "advice", in_this_process)


@pytest.mark.slow
def test_the_distance_to_reference_images_is_told(tmp_path):
    """About one for images of the same kind, more for others, on the feature sets that both runs
    have; images of both runs are no reference; what is said decides nothing.
    """
    world = World(320, 3, (0.5, 6.0))
    board, task, directories = live_in(world, tmp_path)
    own = {
        name: open_feature_set(path).load(task.content, np.float64)
        for name, (path,) in directories.items()
    }
    for shift, spread in ((0.0, 1.0), (3.0, 1.0), (0.0, 2.0)):
        other = {}
        for name, X in own.items():
            late = X[160:]  # of the same world, and then moved
            other[name] = np.concatenate(
                [X[:160], late.mean(0) + spread * (late - late.mean(0)) + shift * X.std(0)]
            )
        other["block9.avg"] = np.ones((320, 4))
        there = store_taps(tmp_path / f"there {shift} {spread}", other)
        found = reference_evidence(directories, task.content[:160], there, content_of(320))
        assert [each.name for each in found] == ["block0.avg", "block1.avg"]
        assert {each.images for each in found} == {160}
        for each in found:
            assert each.ratio.low <= each.ratio.value <= each.ratio.high
            assert (each.ratio.low > 1.2) == (shift > 0), each
            assert (each.ratio.high < 0.9) == (spread > 1), each
            assert ("further out" in reference_text([each])) == (shift > 0)
    evidence = tmp_path / "advice"
    far = {name: np.concatenate([X, X[:160] + 3 * X.std(0)]) for name, X in own.items()}
    plain = advise_on(board, task, directories, evidence, in_this_process)
    reference = store_taps(tmp_path / "far", far), content_of(480)
    asked = advise_on(board, task, directories, evidence, in_this_process, reference=reference)
    assert asked.sentence == plain.sentence
    assert asked.reasons[:-1] == plain.reasons
    assert asked.reasons[-1].startswith("On block1.avg an image is ")
    assert len(advice_summary(asked)["evidence"]["reference"]) == 2


def test_a_reference_that_cannot_be_compared_says_why(tmp_path):
    """No feature set in common, or no images that only the reference has."""
    _, task, directories = live_in(World(60, 2, (1.0,)), tmp_path)
    elsewhere = store_taps(
        tmp_path / "there", {"block0.avg": np.zeros((60, 4))}, backbone="python:another"
    )
    with pytest.raises(InvalidInput, match="same backbones"):
        reference_evidence(directories, task.content, elsewhere, content_of(60))
    with pytest.raises(InvalidInput, match="at least 20"):
        reference_evidence(directories, task.content, directories, task.content)


def sure(value, spread=0.0, draws=200):
    return Estimate(value, value + spread * np.linspace(-1, 1, draws))


def evidence(**changes):
    """A flat curve on many images, near, with errors that are not noise: fine-tune above the tap
    before the last.
    """
    taps = tuple(
        TapEvidence(f"t{k}", sure(e), sure(e - 0.1)) for k, e in enumerate((0.3, 0.2, 0.1))
    )
    gain = {2: sure(0.001), 4: sure(0.002)}
    ahead = {2: sure(0.099), 4: sure(0.098)}
    return Evidence(**({"images": 2000, "classes": 2, "error": sure(0.1), "surest": sure(0.01), "gain": gain,
                        "ahead": ahead, "curve": {"images": [1], "error": [1]}, "taps": taps} | changes))  # fmt: skip


def test_pilots_outweigh_guesses():
    """One that is better is followed; one that was tried and is not better rules training deeper
    out.
    """
    assert decide(evidence()).tap == "t1"
    head = decide(evidence(pilots=(PilotEvidence("a pilot", "head", False, sure(0.02, 0.01)),)))
    assert head.sentence == "Fine-tune the head alone."
    better = decide(evidence(pilots=(PilotEvidence("a pilot", "t0", False, sure(0.02, 0.01)),)))
    assert (better.action, better.tap) == ("fine-tune", "t0")
    assert (
        decide(evidence(pilots=(PilotEvidence("scratch", None, True, sure(0.02, 0.01)),))).action
        == "scratch"
    )
    assert (
        decide(evidence(pilots=(PilotEvidence("a pilot", "t0", False, sure(0.0, 0.02)),))).action
        == "head"
    )


def test_it_abstains_where_the_evidence_does_not_tell():
    """An uncertain curve; an uncertain share of noise; unknown depth. Each with its reason."""
    uncertain = decide(evidence(gain={2: sure(0.011, 0.02), 4: sure(0.02, 0.04)}))
    assert uncertain.action == "abstain"
    assert "resamples" in uncertain.reasons[-1]
    noise = decide(evidence(surest=sure(0.065, 0.02)))
    assert noise.action == "abstain"
    assert "pilot" in noise.reasons[-1]
    assert decide(evidence(taps=())).action == "abstain"


def test_few_images_per_class_are_not_sent_into_deep_training():
    """Whatever the room."""
    assert decide(evidence(images=150)).action == "head"
    far = tuple(TapEvidence(f"t{k}", sure(e), sure(e - 0.1)) for k, e in enumerate((0.1, 0.2, 0.3)))
    assert decide(evidence(taps=far)).action == "scratch"
    assert decide(evidence(taps=far, images=600)).action == "fine-tune"


@pytest.mark.parametrize(
    ("lag", "spread", "said"),
    [
        (0.0, 0.005, "the last is as good as any"),
        (
            0.05,
            0.2,
            "the last is worse than the best by 5.0 points",
        ),  # most resamples say so, not enough of them
        (0.015, 0.001, "not surely by 2 points, as where images are far"),
        (0.1, 0.01, "these images are far from"),
    ],
)
def test_what_is_said_of_the_last_tap_is_what_was_measured(lag, spread, said):
    """As good as any, worse, or so much worse that the images are far: by how sure each is."""
    taps = (
        TapEvidence("t0", sure(0.1), sure(0.0)),
        TapEvidence("t1", sure(0.1 + lag), sure(lag, spread)),
    )
    (reason,) = [text for text in decide(evidence(taps=taps)).reasons if "early to late" in text]
    assert said in reason
    assert ("as good as any" in reason) == (lag == 0)


def test_a_class_that_is_only_hard_is_not_starved():
    """It has as many images as the others."""
    common = {"error": sure(0.5), "gap": sure(0.4), "gain": sure(0.1), "needed": sure(50)}
    easy = ClassEvidence("easy", 1000, sure(0.05), sure(-0.4), sure(0.0), sure(0))
    assert (
        decide(evidence(per_class=(easy, easy, ClassEvidence("hard", 900, **common)))).action
        == "fine-tune"
    )
    starved = decide(evidence(per_class=(easy, easy, ClassEvidence("rare", 60, **common))))
    assert (starved.action, starved.class_name) == ("collect", "rare")


def test_the_power_law_is_found_and_extrapolated():
    """Exactly without noise, within its interval with it; floors and scales are never negative."""
    sizes = np.array([100, 160, 250, 400, 630, 1000.0])
    law = fit_power_law(sizes, (0.05 + 2 * sizes**-0.5)[:, None])
    assert law.at(4000)[0] == pytest.approx(0.05 + 2 * 4000**-0.5, abs=2e-3)
    assert law.images_for(0.05 + 2 * 2000**-0.5)[0] == pytest.approx(2000, rel=0.1)
    assert np.isinf(law.images_for(0.01)[0])
    rng = np.random.default_rng(0)
    noisy = (0.05 + 2 * sizes**-0.5)[:, None] + rng.normal(0, 0.004, (6, 301))
    gain = gain_from_more(fit_power_law(sizes, noisy), 1000, 2)
    assert gain.low < 2 * 1000**-0.5 - 2 * 2000**-0.5 < gain.high
    rising = fit_power_law(sizes, np.linspace(0.1, 0.2, 6)[:, None])
    assert rising.at(2000)[0] == pytest.approx(rising.at(1000)[0])
    assert (fit_power_law(sizes, rng.normal(0, 0.1, (6, 50))).scale >= 0).all()


def test_subsets_are_nested_stratified_and_apart_from_the_held_out_fold():
    """Each smaller one lies in each larger one, and every class is in each."""
    task = task_of(np.arange(200) % 10 // 9)  # one image in ten is of class 1
    smaller, larger = (subset(task, 1, fraction, seed=0) for fraction in (0.1, 0.4))
    trains = [set(each.ids[each.fold == -2].tolist()) for each in (smaller, larger)]
    assert trains[0] < trains[1]
    assert not trains[1] & set(task.ids[task.fold == 1].tolist())
    assert (larger.ids[larger.fold == 0] == task.ids[task.fold == 1]).all()
    assert np.bincount(smaller.target[smaller.fold == -2]).tolist() == [14, 2]
    whole = subset(task, 1, 1.0, seed=0)
    assert (whole.ids == task.ids).all()


def test_a_group_is_drawn_as_a_whole():
    """Subsets nest, and hold all images of a patient or none: half the patients, not half of each
    one's images.
    """
    task = task_of(np.repeat(np.arange(40) % 2, 5))
    groups = np.repeat(np.arange(40), 5)
    fold = (groups // 8).astype(np.int16)
    task = Task(task.kind, task.classes, task.ids, task.content, task.target, fold, task.weight)
    trains = []
    for fraction in (0.1, 0.25, 0.5, 1.0):
        small = subset(task, 1, fraction, 0, groups)
        taken = set(small.ids[small.fold == -2].tolist())
        counts = np.bincount(groups[np.isin(task.ids, list(taken))], minlength=40)
        assert set(counts.tolist()) <= {0, 5}
        assert len(taken) == pytest.approx(fraction * 160, abs=10)
        assert not trains or trains[-1] < taken
        trains.append(taken)


def test_shares_that_leave_the_same_images_are_one_size():
    """Ten classes of six images: two of each class are the subset of a tenth, a sixth, a quarter
    and two fifths alike.
    """
    task = task_of(np.arange(60) % 10)
    kept, drawn = nested_subsets(task, range(5), FRACTIONS, 0, np.arange(60))
    sizes = [[int((small.fold == -2).sum()) for small in smaller] for smaller in drawn]
    assert len(kept) == len({tuple(each) for each in sizes}) < len(FRACTIONS)
    assert kept[0] == FRACTIONS[0]
    assert sizes[-1] == [48] * 5
    assert all(sum(a) < sum(b) for a, b in itertools.pairwise(sizes))


def test_an_extrapolated_error_carries_both_uncertainties():
    """Wider than the gain's interval around today's error, never negative, and never sure of no
    error at all.
    """
    today = Estimate(0.10, np.full(200, 0.10), (0.06, 0.15))
    gain = Estimate(0.03, np.linspace(0.01, 0.05, 200))
    left = error_with_more(today, gain)
    assert left.value == pytest.approx(0.07)
    assert left.low == pytest.approx(0.07 - np.hypot(0.04, gain.high - 0.03))
    assert left.high == pytest.approx(0.07 + np.hypot(0.05, 0.03 - gain.low))
    none = error_with_more(
        Estimate(0.0, np.zeros(200), proportion_interval(np.zeros(40))), sure(0.0)
    )
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(proportion_interval(np.zeros(40))[1])
    most = error_with_more(Estimate(0.02, np.full(200, 0.02), (0.0, 0.04)), sure(0.03, 0.01))
    assert (most.value, most.low) == (0.0, 0.0)
    assert (most.draws >= 0).all()


def test_draws_resample_folds_and_groups():
    """Rows of one group are drawn together; the first weighting is that of the rows as they are."""
    fold, groups = np.repeat([0, 1, 2], 20), np.repeat(np.arange(30), 2)
    drawn = row_draws(fold, groups, 40)
    assert (drawn[:, 0] == 1).all()
    assert (drawn[::2] == drawn[1::2]).all()
    assert (drawn[:20].sum(0) == 0).any()  # a fold that was not drawn


@pytest.mark.slow
def test_input_halving_keeps_what_is_promising(tmp_path):
    """The best tap of six survives two rounds, each on half as many inputs; a second call trains
    nothing; maps stay.
    """
    world = World(600, 3, (0.4, 0.8, 1.2, 3.0, 0.6, 0.2))
    _, task, directories = live_in(world, tmp_path)
    directories = {**directories, "m.map": ()}
    wanted = [(name,) for name in directories]
    trained = []

    def counted(jobs):
        trained.append(len(jobs))
        in_this_process(jobs)

    section = InputHalvingSection(sample_fractions=(0.2, 0.5), keep_fraction=0.5, min_inputs=1)
    first, again = (
        halve_inputs(wanted, task, directories, section, tmp_path / "s", counted) for _ in range(2)
    )
    assert first == again
    assert first.selected_inputs[-1] == ("m.map",)
    assert ("block3.avg",) in first.selected_inputs
    assert [len(errors) for _, errors in first.rounds] == [6, 3]
    assert len(first.selected_inputs) == 2 + 1
    assert first.selection_luck >= 0
    assert list(first.row_errors) == wanted[:-1]
    assert all(np.isin(wrong, (0, 1)).all() for wrong in first.row_errors.values())
    assert sum(trained[: len(trained) // 2]) == (6 + 3) * 3
    assert sum(trained[len(trained) // 2 :]) == 0
