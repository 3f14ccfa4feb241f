"""From evidence to advice: train a head, fine-tune deeper, train from scratch, collect more, or
nothing that can be said.

Every threshold is here, and everything is in shares of images: 0.01 is one point.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import numpy as np

from headrace.pipelines.advice.reference import ReferenceEvidence, reference_text
from headrace.pipelines.selection.estimate import Estimate

Action = Literal["head", "fine-tune", "scratch", "collect", "abstain"]

MATERIAL = 0.01  # gains below one point are not worth an effort
SURE = 0.8  # share of the resamples in which something must hold to be acted on
# enough for more images where nothing else can help: few of them, far from what the network was
# made for
LIKELY = 0.5
THIN_ROWS = 40  # fewer images than this, and every interval is wider than what it is to decide
FINE_TUNE_ROWS = 100  # images per class from which training deeper has been found to pay
SCRATCH_ROWS = 500  # and from which a random start can compete
# an earlier tap that is better than the last by this is a domain that the network was not made for
FAR = 0.02
ROOM_SHARE = 1 / 3  # of the error, that must not be label noise before deeper training is advised
STARVED_GAP = 0.10  # a class that errs this much more than the middle class
STARVED_SHARE = 0.5  # and has fewer images than this share of the middle class
# so few images of a class may show no curve at all: where most are missed, it has not begun to fall
UNSEEN_IMAGES = 30
UNSEEN_ERROR = 0.5


@dataclass(frozen=True)
class TapEvidence:
    """One feature set alone."""

    name: str
    error: Estimate  # of the best head on it
    lag: Estimate  # by how much it is worse than the best single tap


@dataclass(frozen=True)
class ClassEvidence:
    """One class of a single-label task."""

    name: str
    images: int
    error: Estimate  # share of its images that are missed
    gap: Estimate  # by how much that is more than of the middle class
    gain: Estimate  # by how much it falls with twice as many of its images
    # Further images of it until it errs as the middle class does, at most three times what there
    # is; of a class whose curve cannot be seen yet, until it has half as many images as the middle
    # class.
    needed: Estimate

    @property
    def unseen(self) -> bool:
        """Whether its own learning curve has not begun to fall, for lack of images."""
        return self.images < UNSEEN_IMAGES and self.error.value >= UNSEEN_ERROR


@dataclass(frozen=True)
class PilotEvidence:
    """A network that was trained deeper, against the best head."""

    name: str
    tap: str | None  # training started above this tap; None: everything
    scratch: bool
    gain: Estimate  # by how much its error is less than the head's


@dataclass(frozen=True)
class Evidence:
    """Everything that the advice rests on."""

    images: int
    classes: int  # 0: not a single-label task
    error: Estimate  # of the best head
    surest: (
        Estimate | None
    )  # error on the half of the images of which it is surest: about what label noise leaves
    gain: dict[int, Estimate]  # by how much the error falls with 2 and 4 times as many images
    # the error itself with 2 and 4 times as many images, by the same curve
    ahead: dict[int, Estimate]
    curve: dict[str, list[float]]  # images, error
    taps: tuple[TapEvidence, ...] = ()  # of one network, early to late
    per_class: tuple[ClassEvidence, ...] = ()
    pilots: tuple[PilotEvidence, ...] = ()
    scores: tuple[dict[str, Any], ...] = ()  # transfer scores by feature set
    # distances to the images of another run, where one is given
    reference: tuple[ReferenceEvidence, ...] = ()

    @property
    def per_class_images(self) -> float:
        """Images of a class, on average."""
        return self.images / max(self.classes, 1)


@dataclass(frozen=True)
class Advice:
    """What to do next, and why."""

    action: Action
    sentence: str
    reasons: tuple[str, ...]
    tap: str | None = None  # fine-tune: what lies above it should train
    class_name: str | None = None  # collect: of this class; None: of all
    more: Estimate | None = None  # collect: images
    evidence: Evidence | None = field(default=None, repr=False)


def advice_summary(advice: Advice) -> dict[str, Any]:
    """Everything, for JSON: numbers with their intervals."""

    def plain(value: Any) -> Any:
        if isinstance(value, Estimate):
            return value.summary()
        if is_dataclass(value) and not isinstance(value, type):
            return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
        if isinstance(value, dict):
            return {str(name): plain(each) for name, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, tuple | list) else value

    found: dict[str, Any] = plain(advice)
    return found


def decide(evidence: Evidence) -> Advice:
    """The advice, by the first of these that the evidence supports:

    too few images to say anything; a pilot that is better; a class that lacks images; a learning
    curve that still falls; a flat one, with errors that are not label noise, on enough images to
    train deeper; a flat one otherwise.
    """
    reasons = [_error_text(evidence)]
    if evidence.images < THIN_ROWS or not evidence.gain:
        return _advice(
            "abstain",
            "Too few images to say what would help.",
            evidence,
            [*reasons, *_thin(evidence)],
        )
    if (better := _best_pilot(evidence)) is not None:
        action: Action = "scratch" if better.scratch else "fine-tune"
        what = "Train from scratch." if better.scratch else f"Fine-tune {_above(better.tap)}."
        return _advice(action, what, evidence, [*reasons, _pilot_text(better)], tap=better.tap)
    reasons += [_pilot_text(pilot) for pilot in evidence.pilots]
    if (starved := _starved(evidence)) is not None:
        what = (
            f"Collect about {_round(starved.needed.value):,} more images of class {starved.name}."
        )
        return _advice(
            "collect",
            what,
            evidence,
            [*reasons, *_starved_text(starved)],
            class_name=starved.name,
            more=starved.needed,
        )
    reasons.append(_curve_text(evidence))
    rising = evidence.gain[2].above(MATERIAL)
    few = evidence.per_class_images < FINE_TUNE_ROWS
    if rising >= (LIKELY if few and is_far(evidence) else SURE):
        more = Estimate(evidence.images, np.array([evidence.images]))
        what = (
            f"Collect more images of all classes: about {_round(evidence.images):,} more, twice "
            "what there is."
        )
        reasons += _depth_text(evidence)
        if _noise(evidence).above(0) >= SURE and not few and not evidence.pilots:
            reasons.append(
                "Most errors are on images of which the head is unsure, and there are enough "
                "images per class to train deeper: a fine-tuning pilot may bring as much, without "
                "new images."
            )
        return _advice("collect", what, evidence, reasons, more=more)
    if rising > 1 - SURE and not few:
        what = "The learning curve cannot tell whether more images would help, or training deeper."
        return _advice("abstain", what, evidence, [*reasons, _unclear(evidence)])
    return _flat(evidence, reasons)


def _flat(evidence: Evidence, reasons: list[str]) -> Advice:
    """The head has what it can get from these features: is what is left noise, or the features'
    fault?
    """
    if evidence.error.above(2 * MATERIAL) < 1 - SURE:
        return _advice("head", "Train a head; little is left to gain.", evidence, reasons)
    if evidence.surest is None:
        text = (
            "Whether the errors are label noise is measured for single-label tasks only; a short "
            "fine-tuning pilot would tell."
        )
        return _advice(
            "abstain", "The curve is flat, and the reason is not known.", evidence, [*reasons, text]
        )
    noise = _noise(evidence)
    reasons = [*reasons, _noise_text(evidence)]
    if noise.above(0) < 1 - SURE:
        text = (
            "Label noise, then, or images that do not show the class: look at the labels of the "
            "surest errors."
        )
        return _advice(
            "head",
            "Train a head; nothing on these labels will do much better.",
            evidence,
            [*reasons, text],
        )
    if evidence.pilots:
        text = "Training deeper was tried and was no better."
        return _advice(
            "head", "Train a head; training deeper did not pay.", evidence, [*reasons, text]
        )
    if evidence.classes and evidence.per_class_images < FINE_TUNE_ROWS:
        text = (
            f"With {evidence.per_class_images:,.0f} images per class, training deeper rarely pays "
            f"(from about {FINE_TUNE_ROWS} on it may)."
        )
        return _advice("head", "Train a head.", evidence, [*reasons, text])
    if noise.above(0) < SURE:
        text = (
            "How much of the error is label noise is too uncertain; a short fine-tuning pilot "
            "would tell."
        )
        return _advice(
            "abstain",
            "The evidence does not tell noise from a lack of depth.",
            evidence,
            [*reasons, text],
        )
    return _deeper(evidence, reasons)


def _deeper(evidence: Evidence, reasons: list[str]) -> Advice:
    """Enough images, a head that cannot use more of them, errors that are not noise: which part of
    the network is at fault?
    """
    if len(evidence.taps) < 2:
        text = (
            "No two taps were tried alone, so how deep is not known: add `inputs: [each]` to some "
            "heads."
        )
        return _advice(
            "abstain", "Training deeper may pay; how deep is not known.", evidence, [*reasons, text]
        )
    reasons = [*reasons, *_depth_text(evidence)]
    names = [tap.name for tap in evidence.taps]
    best = min(range(len(names)), key=lambda place: evidence.taps[place].error.value)
    far = is_far(evidence)
    if far and best < len(names) / 2:
        if evidence.per_class_images >= SCRATCH_ROWS:
            return _advice(
                "scratch",
                "Train from scratch, or everything from the pretrained start.",
                evidence,
                reasons,
            )
        text = f"Fewer than {SCRATCH_ROWS} images per class: a random start would have too little."
        return _advice(
            "fine-tune", f"Fine-tune {_above(names[0])}.", evidence, [*reasons, text], tap=names[0]
        )
    tap = names[best] if far else names[max(best - 1, 0)]
    return _advice("fine-tune", f"Fine-tune {_above(tap)}.", evidence, reasons, tap=tap)


def _noise(evidence: Evidence) -> Estimate:
    """By how much the errors that need not be label noise are more than ROOM_SHARE of all; below 0
    most look like noise.
    """
    if evidence.surest is None:
        return Estimate(float("nan"), np.full(1, np.nan))
    share = Estimate(evidence.error.value * ROOM_SHARE, evidence.error.draws * ROOM_SHARE)
    return evidence.error.minus(evidence.surest).minus(share)


def is_far(evidence: Evidence) -> bool:
    """Whether an earlier tap is surely better than the last: the late layers were made for other
    images.
    """
    return bool(evidence.taps) and evidence.taps[-1].lag.above(FAR) >= SURE


def _starved(evidence: Evidence) -> ClassEvidence | None:
    middle = (
        float(np.median([each.images for each in evidence.per_class]))
        if evidence.per_class
        else 0.0
    )
    lacking = [
        each
        for each in evidence.per_class
        if each.images < STARVED_SHARE * middle
        and each.gap.above(STARVED_GAP) >= SURE
        and (each.unseen or each.gain.above(MATERIAL) >= SURE)
    ]
    return max(lacking, key=lambda each: each.gap.value, default=None)


def _best_pilot(evidence: Evidence) -> PilotEvidence | None:
    better = [pilot for pilot in evidence.pilots if pilot.gain.above(0) >= 0.95]
    return max(better, key=lambda pilot: pilot.gain.value, default=None)


def _advice(
    action: Action, sentence: str, evidence: Evidence, reasons: list[str], **rest: Any
) -> Advice:
    if (
        evidence.reference
    ):  # said, and not decided by: whether a distance matters is what the taps' errors show
        reasons = [*reasons, reference_text(evidence.reference)]
    return Advice(action, sentence, tuple(reasons), evidence=evidence, **rest)


def _round(count: float) -> int:
    """Two significant digits: more would claim to know."""
    return int(float(f"{count:.1e}")) if count > 0 else 0


def points(estimate: Estimate) -> str:
    """ "1.2 points (95 % interval 0.4 to 2.1)"."""
    low, value, high = (100 * number for number in (estimate.low, estimate.value, estimate.high))
    return f"{value:.1f} points (95 % interval {low:.1f} to {high:.1f})"


def _above(tap: str | None) -> str:
    return "everything" if tap is None else f"what lies above {tap}"


def _error_text(evidence: Evidence) -> str:
    return f"The best head errs on {points(evidence.error)} of {evidence.images:,} images."


def _thin(evidence: Evidence) -> list[str]:
    if evidence.images < THIN_ROWS:
        return [
            (
                f"{evidence.images:,} images are fewer than the {THIN_ROWS} from which a learning "
                "curve can be drawn."
            )
        ]
    return ["There is no learning curve."]


def _curve_text(evidence: Evidence) -> str:
    gains = " and ".join(
        f"{points(gain)} with {times} times" for times, gain in sorted(evidence.gain.items())
    )
    left = " and ".join(f"{points(error)}" for _, error in sorted(evidence.ahead.items()))
    return f"By its learning curve the error would fall by {gains} as many images, to {left}."


def _unclear(evidence: Evidence) -> str:
    return (
        f"In {evidence.gain[2].above(MATERIAL):.0%} of the resamples twice as many images bring a "
        f"point or more: {SURE:.0%} would be needed to say so. A few hundred images more, or more "
        "folds, would tell."
    )


def _noise_text(evidence: Evidence) -> str:
    assert evidence.surest is not None
    return (
        f"On the half of the images of which it is surest it errs on {points(evidence.surest)}: "
        "errors that stay there are labels that disagree with what can be seen, the others may be "
        "the features' fault."
    )


def _depth_text(evidence: Evidence) -> list[str]:
    if len(evidence.taps) < 2:
        return []
    profile = ", ".join(f"{tap.name} {100 * tap.error.value:.1f}" for tap in evidence.taps)
    verdict = _last_tap_text(evidence.taps[-1], far=is_far(evidence))
    return [f"Errors in points of the best head on each tap, early to late: {profile}; {verdict}."]


def _last_tap_text(last: TapEvidence, *, far: bool) -> str:
    if far:
        return (
            f"the last is worse than the best by {points(last.lag)}: these images are far from "
            "what the network was trained on"
        )
    if last.lag.above(MATERIAL) <= 1 - SURE:
        return "the last is as good as any: the network sees what matters here"
    return (
        f"the last is worse than the best by {points(last.lag)}, not surely by more than the "
        f"{100 * FAR:.0f} from which on images count as far from what the network was trained on"
    )


def _starved_text(starved: ClassEvidence) -> list[str]:
    first = (
        f"Class {starved.name} has {starved.images:,} images and is missed in "
        f"{points(starved.error)}, {points(starved.gap)} more than the middle class."
    )
    if starved.unseen:
        second = (
            "So few images show no learning curve of their own yet; half as many as the middle "
            f"class has would be a start: about {_round(starved.needed.value):,} more."
        )
    else:
        second = (
            "Its own learning curve says that twice as many would lower that by "
            f"{points(starved.gain)}; to err as the middle class does it needs about "
            f"{_round(starved.needed.value):,} more (95 % interval {_round(starved.needed.low):,} "
            f"to {_round(starved.needed.high):,}, at most three times what there is)."
        )
    return [first, second]


def _pilot_text(pilot: PilotEvidence) -> str:
    return f"Tried: {pilot.name}, better than the best head by {points(pilot.gain)}."
