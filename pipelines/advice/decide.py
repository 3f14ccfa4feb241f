"""Rules that turn evidence into advice: train a head, fine-tune more layers, train from scratch,
collect more images, or abstain.

All thresholds are here. Errors are shares of images: 0.01 is one point.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from headrace.cache.count_text import count_text
from headrace.pipelines.advice.reference import ReferenceEvidence, reference_text
from headrace.pipelines.selection.estimate import Estimate

Action = Literal["head", "fine-tune", "scratch", "collect", "abstain"]

MATERIAL_GAIN = 0.01  # gains below one point are not worth an effort
SURE_PROBABILITY = 0.8  # share of the resamples in which something must hold to be acted on
# The share that suffices to advise more images where nothing else can help: few images, far from
# those that the network was trained on.
LIKELY_PROBABILITY = 0.5
THIN_ROWS = 40  # with fewer images every interval is wider than the differences to decide on
FINE_TUNE_ROWS = 100  # images per class from which training deeper has been found to pay
SCRATCH_ROWS = 500  # images per class from which training from scratch can compete
# If an earlier tap is better than the last by this, the images are far from those that the network
# was trained on.
FAR_LAG = 0.02
ROOM_SHARE = 1 / 3  # share of the error that must not be label noise to advise training deeper
# A class lacks images if it errs by STARVED_GAP more than the median class, and has fewer images
# than STARVED_SHARE of those of the median class.
STARVED_GAP = 0.10
STARVED_SHARE = 0.5
# With fewer images than this, of which most are missed, a class's learning curve has not begun to
# fall.
UNSEEN_IMAGES = 30
UNSEEN_ERROR = 0.5


@dataclass(frozen=True)
class TapEvidence:
    """Error on one feature set alone."""

    name: str
    error: Estimate  # of the best head on it
    lag: Estimate  # by how much it is worse than the best single tap


@dataclass(frozen=True)
class ClassEvidence:
    """Error and learning curve of one class of a single-label task."""

    name: str
    images: int
    error: Estimate  # share of its images that are predicted wrongly
    gap: Estimate  # by how much that is more than the median class's
    gain: Estimate  # by how much it falls with twice as many of its images
    # Further images until it errs like the median class, at most three times what there is. If its
    # curve cannot be seen yet: until it has half as many images as the median class.
    needed: Estimate

    @property
    def unseen(self) -> bool:
        """Whether its learning curve has not begun to fall, for lack of images."""
        return self.images < UNSEEN_IMAGES and self.error.value >= UNSEEN_ERROR


@dataclass(frozen=True)
class PilotEvidence:
    """Gain of a fine-tuned network over the best head."""

    name: str
    tap: str | None  # what is above this tap was trained; "head": the head alone; None: everything
    scratch: bool  # from a random start
    gain: Estimate  # the best head's error less the network's


@dataclass(frozen=True)
class Evidence:
    """All measurements that the advice rests on."""

    images: int
    classes: int  # 0: not a single-label task
    error: Estimate  # of the best head
    # error on the half of the images with the highest confidence: about that of label noise; None
    # if the task is not single-label
    surest: Estimate | None = None
    # By how much the error falls with 2 and 4 times as many images, the error itself then, and the
    # curve (images, error); empty for too few images to draw one.
    gain: dict[int, Estimate] = field(default_factory=dict)
    ahead: dict[int, Estimate] = field(default_factory=dict)
    curve: dict[str, list[float]] = field(default_factory=dict)
    taps: tuple[TapEvidence, ...] = ()  # of one network, early to late
    per_class: tuple[ClassEvidence, ...] = ()
    pilots: tuple[PilotEvidence, ...] = ()
    scores: tuple[dict[str, Any], ...] = ()  # transfer scores by feature set
    reference: tuple[ReferenceEvidence, ...] = ()  # distances to the images of another run

    @property
    def per_class_images(self) -> float:
        """Images per class, on average; all images where the task is not single-label."""
        return self.images / max(self.classes, 1)


@dataclass(frozen=True)
class Advice:
    """Recommended next step, and the reasons for it."""

    action: Action
    sentence: str
    reasons: tuple[str, ...]
    tap: str | None = None  # fine-tune: train what is above this tap, or "head" alone; None: all
    class_name: str | None = None  # collect: images of this class; None: of all
    more: Estimate | None = None  # collect: how many images
    evidence: Evidence | None = field(default=None, repr=False)


def advice_summary(advice: Advice) -> dict[str, Any]:
    """Return everything as a dictionary for JSON: numbers with their intervals."""

    def plain(value: Any) -> Any:
        if isinstance(value, Estimate):
            return value.summary()
        if is_dataclass(value) and not isinstance(value, type):
            return {
                attribute.name: plain(getattr(value, attribute.name)) for attribute in fields(value)
            }
        if isinstance(value, dict):
            return {str(name): plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    summary: dict[str, Any] = plain(advice)
    return summary


def decide(evidence: Evidence) -> Advice:
    """Return the advice by the first of these cases that applies: too few images to say anything; a
    fine-tuned network that is better; a class that lacks images; a learning curve that still falls;
    one that may fall; a flat curve (see `_flat`).
    """
    reasons = [
        f"The best head errs on {percent(evidence.error)} of "
        f"{count_text(evidence.images, 'image')}."
    ]
    advise = partial(_advice, evidence, reasons)
    if evidence.images < THIN_ROWS or not evidence.gain:
        return advise("abstain", "Too few images to say what would help.", _thin(evidence))
    # The largest of several gains is easily luck, so each must be sure by itself.
    better_pilots = [pilot for pilot in evidence.pilots if pilot.gain.above(0) >= 0.95]
    if better_pilots:
        best_pilot = max(better_pilots, key=lambda pilot: pilot.gain.value)
        pilot_text = _pilot_text(best_pilot)
        if best_pilot.scratch:
            return advise("scratch", "Train from scratch.", pilot_text, tap=best_pilot.tap)
        sentence = f"Fine-tune {_above(best_pilot.tap)}."
        return advise("fine-tune", sentence, pilot_text, tap=best_pilot.tap)
    reasons += [_pilot_text(pilot) for pilot in evidence.pilots]
    if (starved_class := _starved(evidence)) is not None:
        sentence = (
            f"Collect about {count_text(_round(starved_class.needed.value), 'more image')} of "
            f"class {starved_class.name}."
        )
        details = _starved_text(starved_class)
        name, needed = starved_class.name, starved_class.needed
        return advise("collect", sentence, *details, class_name=name, more=needed)
    reasons.append(_curve_text(evidence))
    gain_probability = evidence.gain[2].above(MATERIAL_GAIN)
    few_images = evidence.per_class_images < FINE_TUNE_ROWS
    if gain_probability >= (
        LIKELY_PROBABILITY if few_images and is_far(evidence) else SURE_PROBABILITY
    ):
        more_images = Estimate(evidence.images, np.array([evidence.images]))
        sentence = (
            f"Collect more images of all classes: about {_round(evidence.images):,} more, twice "
            "what there is."
        )
        reasons += _depth_text(evidence)
        beyond_noise = _error_beyond_noise(evidence).above(0) >= SURE_PROBABILITY
        if beyond_noise and not few_images and not evidence.pilots:
            reasons.append(
                "Most errors are on images of which the head is unsure, and there are enough "
                "images per class to train deeper: a fine-tuning pilot may bring as much, without "
                "new images."
            )
        return advise("collect", sentence, more=more_images)
    if gain_probability > 1 - SURE_PROBABILITY and not few_images:
        sentence = (
            "The learning curve cannot tell whether more images would help, or training deeper."
        )
        return advise("abstain", sentence, _unclear(evidence))
    return _flat(evidence, reasons)


def _flat(evidence: Evidence, reasons: list[str]) -> Advice:
    """Return the advice for a flat curve: labels are noisy, or the features are at fault."""
    advise = partial(_advice, evidence, reasons)
    if evidence.error.above(2 * MATERIAL_GAIN) < 1 - SURE_PROBABILITY:
        return advise("head", "Train a head; little is left to gain.")
    if evidence.surest is None:
        return advise(
            "abstain",
            "The curve is flat, and the reason is not known.",
            "Whether the errors are label noise is measured for single-label tasks only; a short "
            "fine-tuning pilot would tell.",
        )
    beyond_noise = _error_beyond_noise(evidence)
    reasons.append(_noise_text(evidence.surest))
    if beyond_noise.above(0) < 1 - SURE_PROBABILITY:
        return advise(
            "head",
            "Train a head; nothing on these labels will do much better.",
            "Label noise, then, or images that do not show the class: look at the labels of the "
            "surest errors.",
        )
    if evidence.pilots:
        reason = "Training deeper was tried and was no better."
        return advise("head", "Train a head; training deeper did not pay.", reason)
    if evidence.classes and evidence.per_class_images < FINE_TUNE_ROWS:
        return advise(
            "head",
            "Train a head.",
            f"With {evidence.per_class_images:,.0f} images per class, training deeper rarely pays "
            f"(from about {FINE_TUNE_ROWS} on it may).",
        )
    if beyond_noise.above(0) < SURE_PROBABILITY:
        return advise(
            "abstain",
            "The evidence does not tell noise from a lack of depth.",
            "How much of the error is label noise is too uncertain; a short fine-tuning pilot "
            "would tell.",
        )
    return _deeper(evidence, reasons)


def _deeper(evidence: Evidence, reasons: list[str]) -> Advice:
    """Return the advice how deep to train, when there are enough images, a flat curve, and errors
    that are not label noise.
    """
    advise = partial(_advice, evidence, reasons)
    if len(evidence.taps) < 2:
        return advise(
            "abstain",
            "Training deeper may pay; how deep is not known.",
            "No two taps were tried alone, so how deep is not known: add `inputs: [each]` to some "
            "heads.",
        )
    reasons += _depth_text(evidence)
    tap_names = [tap.name for tap in evidence.taps]
    best_index = min(range(len(tap_names)), key=lambda index: evidence.taps[index].error.value)
    images_are_far = is_far(evidence)
    if images_are_far and best_index < len(tap_names) / 2:
        if evidence.per_class_images >= SCRATCH_ROWS:
            return advise("scratch", "Train from scratch, or everything from the pretrained start.")
        reasons.append(
            f"Fewer than {SCRATCH_ROWS} images per class: a random start would have too little."
        )
        train_above = tap_names[0]
    else:
        # Near images: above the tap before the best, so that the best tap's layers are trained too.
        train_above = tap_names[best_index] if images_are_far else tap_names[max(best_index - 1, 0)]
    return advise("fine-tune", f"Fine-tune {_above(train_above)}.", tap=train_above)


def _error_beyond_noise(evidence: Evidence) -> Estimate:
    """Return the error less that of label noise, less ROOM_SHARE of the error; below 0 most errors
    look like label noise. nan where label noise was not measured.
    """
    if evidence.surest is None:
        return Estimate(float("nan"), np.full(1, np.nan))
    min_room = Estimate(evidence.error.value * ROOM_SHARE, evidence.error.draws * ROOM_SHARE)
    return evidence.error.minus(evidence.surest).minus(min_room)


def is_far(evidence: Evidence) -> bool:
    """Return whether an earlier tap is clearly better than the last one, which then serves other
    images than these.
    """
    return bool(evidence.taps) and evidence.taps[-1].lag.above(FAR_LAG) >= SURE_PROBABILITY


def _starved(evidence: Evidence) -> ClassEvidence | None:
    """Return the class that lacks images and errs most beyond the median class; None if none."""
    if not evidence.per_class:
        return None
    median_images = float(np.median([item.images for item in evidence.per_class]))
    starved_classes = [
        item
        for item in evidence.per_class
        if item.images < STARVED_SHARE * median_images
        and item.gap.above(STARVED_GAP) >= SURE_PROBABILITY
        and (item.unseen or item.gain.above(MATERIAL_GAIN) >= SURE_PROBABILITY)
    ]
    return max(starved_classes, key=lambda item: item.gap.value, default=None)


def _advice(
    evidence: Evidence,
    reasons: list[str],
    action: Action,
    sentence: str,
    *more_reasons: str,
    **fields: Any,
) -> Advice:
    # The distance to another run is only reported. The errors of taps show whether it matters.
    distance = (reference_text(evidence.reference),) if evidence.reference else ()
    return Advice(
        action, sentence, (*reasons, *more_reasons, *distance), evidence=evidence, **fields
    )


def _round(count: float) -> int:
    # To two significant digits; more would claim too much.
    return int(float(f"{count:.1e}")) if count > 0 else 0


def points(difference: Estimate, unit: str = "points") -> str:
    """Return a text such as "1.2 points (95 % interval 0.4 to 2.1)"."""
    low, value, high = 100 * difference.low, 100 * difference.value, 100 * difference.high
    return f"{value:.1f} {unit} (95 % interval {low:.1f} to {high:.1f})"


def percent(error: Estimate) -> str:
    """Return a text such as "12.6 % (95 % interval 10.5 to 14.4)"."""
    return points(error, "%")


def _above(tap: str | None) -> str:
    if tap is None:
        return "everything"
    return "the head alone" if tap == "head" else f"what lies above {tap}"


def _thin(evidence: Evidence) -> str:
    if evidence.images < THIN_ROWS:
        return (
            f"{count_text(evidence.images, 'image is', 'images are')} fewer than the {THIN_ROWS} "
            "from which a learning curve can be drawn."
        )
    return "There is no learning curve."


def _curve_text(evidence: Evidence) -> str:
    words = {2: "twice", 4: "four times"}
    gain_texts = " and by ".join(
        f"{points(gain)} with {words[times]} as many images"
        for times, gain in sorted(evidence.gain.items())
    )
    error_texts = " and ".join(percent(error) for _, error in sorted(evidence.ahead.items()))
    return f"By its learning curve the error would fall by {gain_texts}, to {error_texts}."


def _unclear(evidence: Evidence) -> str:
    return (
        f"In {100 * evidence.gain[2].above(MATERIAL_GAIN):.0f} % of the resamples twice as many "
        f"images bring a point or more: {100 * SURE_PROBABILITY:.0f} % would be needed to say so. "
        "A few hundred images more, or more folds, would tell."
    )


def _noise_text(surest: Estimate) -> str:
    return (
        f"On the half of the images of which it is surest it errs on {percent(surest)}: "
        "errors that stay there are labels that disagree with what can be seen, the others may be "
        "the features' fault."
    )


def _depth_text(evidence: Evidence) -> list[str]:
    if len(evidence.taps) < 2:
        return []
    tap_errors = ", ".join(f"{tap.name} {100 * tap.error.value:.1f}" for tap in evidence.taps)
    verdict = _last_tap_text(evidence.taps[-1], images_are_far=is_far(evidence))
    return [f"Errors in % of the best head on each tap, early to late: {tap_errors}; {verdict}."]


def _last_tap_text(last_tap: TapEvidence, *, images_are_far: bool) -> str:
    if images_are_far:
        return (
            f"the last is worse than the best by {points(last_tap.lag)}: these images are far from "
            "what the network was trained on"
        )
    if last_tap.lag.above(MATERIAL_GAIN) <= 1 - SURE_PROBABILITY:
        return "the last is as good as any: the network sees what matters here"
    return (
        f"the last is worse than the best by {points(last_tap.lag)}: not surely by "
        f"{100 * FAR_LAG:.0f} points, as where images are far from what the network was trained on"
    )


def _starved_text(class_evidence: ClassEvidence) -> list[str]:
    lag_text = (
        f"Class {class_evidence.name} has {count_text(class_evidence.images, 'image')} and is "
        f"missed in {percent(class_evidence.error)} of them, {points(class_evidence.gap)} more "
        "than the middle class."
    )
    if class_evidence.unseen:
        needed_text = (
            "So few images show no learning curve of their own yet; half as many as the middle "
            f"class has would be a start: about {_round(class_evidence.needed.value):,} more."
        )
    else:
        needed_text = (
            "Its own learning curve says that twice as many would lower that by "
            f"{points(class_evidence.gain)}; to err as the middle class does it needs about "
            f"{_round(class_evidence.needed.value):,} more (95 % interval "
            f"{_round(class_evidence.needed.low):,} to {_round(class_evidence.needed.high):,}, at "
            "most three times what there is)."
        )
    return [lag_text, needed_text]


def _pilot_text(pilot: PilotEvidence) -> str:
    return f"Tried: {pilot.name}, better than the best head by {points(pilot.gain)}."
