"""The objects that commands print with `--json`; each class gives its JSON Schema.

NaN, such as a score that could not be measured, is null. Error rates are from 0 to 1, times in
seconds, sizes in bytes.
"""

import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AliasPath, Field

from headrace.pipelines.console import utf8_stdout, valid_text


def _null_for_nan(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(value: Any) -> Any:
    return valid_text(str(value)) if isinstance(value, str | Path) else value


# The length of a sequence.
Length = Annotated[int, pydantic.BeforeValidator(lambda value: len(value))]
# JSON has no NaN, and other programs stop at it.
Number = Annotated[float | None, pydantic.BeforeValidator(_null_for_nan)]
# Names of files may have bytes that are no UTF-8, which JSON cannot hold.
Text = Annotated[str, pydantic.BeforeValidator(_as_text)]


class JsonOutput(pydantic.BaseModel):
    """The base class of objects that commands print."""

    # from_attributes: `model_validate` takes the fields of headrace's own objects by their names.
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, from_attributes=True)


def print_output(output: JsonOutput) -> None:
    """Print the object on the standard output, where a command with --json prints nothing else."""
    # JSON is UTF-8 by its standard, whatever the locale.
    with utf8_stdout() as stream:
        stream.write(json_text(output))


def json_text(output: JsonOutput) -> str:
    """Return the object as it is printed."""
    return output.model_dump_json(indent=2) + "\n"


class ErrorDetail(JsonOutput):
    """Why a command ended without its result."""

    kind: str  # the exception's class: RecipeError, SourceError, NoSuchOption, FileNotFoundError …
    message: Text  # as on the standard error
    next: tuple[Text, ...]  # the commands that the message tells to type
    exit_status: int  # 2: wrong arguments, files or machine; 130: interrupted; 1: a bug in headrace


class ErrorOutput(JsonOutput):
    """The object that any command prints when it fails."""

    error: ErrorDetail


class Interval(JsonOutput):
    """A score with its 95 % interval."""

    value: Number
    low: Number
    high: Number


class InitOutput(JsonOutput):
    """`headrace init --json`."""

    recipe: Text
    found: str  # in words
    notes: tuple[str, ...]


class LeftOutCount(JsonOutput):
    """Entries of the source that are not images to train on or to predict."""

    reason: Text
    count: int


class ImageCounts(JsonOutput):
    """Counts of the source's entries by what happens to them; `found` is the sum of the others."""

    found: int
    train: int
    test: int
    unlabelled: int
    unreadable: int
    failed: int
    annotations: int
    left_out: tuple[LeftOutCount, ...]


class PlannedFeatures(JsonOutput):
    """A feature set that heads can be given."""

    name: Text
    shape: tuple[int, ...]  # of one image's row
    images: int = Field(validation_alias="rows_total")
    images_cached: int = Field(validation_alias="rows_cached")
    bytes_new: int


class PlannedHeads(JsonOutput):
    """Heads of one kind on the same inputs."""

    inputs: tuple[Text, ...]
    kind: str = Field(validation_alias=AliasPath("specs", 0, "kind"))
    settings: Length = Field(validation_alias="specs")


class PlanOutput(JsonOutput):
    """`headrace run --dry-run --json`: what would be done."""

    cache: Text
    out: Text
    counts: ImageCounts | None
    notes: tuple[str, ...]
    features: tuple[PlannedFeatures, ...]
    heads: tuple[PlannedHeads, ...]
    images: int
    images_new: int
    heads_total: int
    heads_new: int
    folds: int
    core_s: float  # of all CPU cores together
    gpu_s: float
    is_measured: bool  # whether the times are from earlier calls of this run, or else estimates
    device: str


class ExtractOutput(JsonOutput):
    """`headrace extract --json`."""

    cache: Text
    features: dict[Text, tuple[Text, ...]]  # directories of the feature sets: one for each view
    found: int
    images: int  # different images that can be read
    images_new: int  # that went through a network
    failed: int
    failed_images: Text  # the table that lists them
    notes: tuple[str, ...]
    seconds: float


class Setting(JsonOutput):
    """A row of the leaderboard: a kind of head, its settings and its inputs."""

    rank: int
    inputs: Text
    kind: str
    settings: str
    score: Number  # mean over the validation folds
    standard_error: Number
    features: int


class ExpectedScore(Interval):
    """The winner's expected score on new images, corrected for its choice as the best of many."""

    value: Number = Field(validation_alias="expected")
    tried: int
    statistically_tied: int


class EnsembleOutput(Interval):
    """An ensemble: heads whose predictions are averaged."""

    members: Length
    gain: Number
    gain_low: Number
    gain_high: Number
    level: float  # of the gain's interval
    is_selected: bool = Field(validation_alias="chosen")


class TestScore(Interval):
    """The selected model's score on the test split."""

    images: int
    units: int | None  # that were scored, each by its images; null: images were
    # of different winners on this test split, so far
    evaluations: int = Field(validation_alias="n_evaluations")
    metrics: Mapping[str, Number]


class FinetunedRow(Interval):
    """A fine-tuned network, or the head that it is compared with."""

    approach: str
    inputs: Text
    settings: str
    gain: Number
    gain_low: Number
    gain_high: Number
    minutes: Number
    decision: str


class StageOutput(JsonOutput):
    """A stage of the call."""

    name: str
    did: str
    seconds: float


class RunOutput(JsonOutput):
    """`headrace run --json`: the result of a run."""

    out: Text
    metric: str
    counts: ImageCounts | None
    notes: tuple[str, ...]
    failed_images: int
    failed_heads: int
    winner: Setting
    expected: ExpectedScore | None
    ensemble: EnsembleOutput | None
    test: TestScore | None
    finetuned: tuple[FinetunedRow, ...]
    leaderboard: tuple[Setting, ...]  # the first 100; leaderboard.csv holds all
    settings: int
    stages: tuple[StageOutput, ...]
    files: dict[str, Text]


# stopped: by Ctrl-C; gone: killed, or its machine is down
DriverState = Literal["running", "finished", "failed", "stopped", "gone"]


class DriverOutput(JsonOutput):
    """One call of `headrace run` or `headrace extract`."""

    driver: str
    state: DriverState
    started: datetime.datetime
    heard: datetime.datetime  # its last sign of life
    stage: str
    done: int
    total: int
    unit: str
    failed: int
    workers: int
    deaths: int  # of worker processes
    dashboard: str | None
    waits: str | None  # why there is no worker, while there is none
    error: str | None
    left_s: Number  # estimate of the time left


class StatusOutput(JsonOutput):
    """`headrace status --json`."""

    out: Text
    drivers: tuple[DriverOutput, ...]  # the latest last


class ReportOutput(JsonOutput):
    """`headrace report --json`."""

    page: Text
    bytes: int
    tables: tuple[Text, ...]
    missing_images: int


class AdviceOutput(JsonOutput):
    """`headrace advise --json`."""

    action: str
    sentence: str
    reasons: tuple[str, ...]
    # with action fine-tune: the layers above it should be trained, or "head" alone; null: all
    tap: str | None
    class_name: Text | None  # with action collect: images of this class; null: of all
    more: dict[str, Any] | None  # with action collect: how many images, with an interval
    evidence: dict[str, Any] | None  # the numbers on which the reasons rest


class PredictOutput(JsonOutput):
    """`headrace predict --json`; the table of predictions is the file `out`."""

    out: Text
    units: Text | None  # the table of units (patients, slides), if the model predicts these
    weights: Text | None  # the table of the images' weights in their units, if the model has any
    images: int
    new: int
    cached: int  # of `new`, those whose features were in the cache
    failed: int
    counts: dict[Text, int]  # images per predicted class or label
    notes: tuple[str, ...]


class ExportOutput(JsonOutput):
    """`headrace export --json`."""

    out: Text
    card: Text
    differences: dict[str, float]  # from headrace's own predictions, by format
    tolerance: float


class TapOutput(JsonOutput):
    """A node of a backbone."""

    node: str
    shape: tuple[int, ...]
    map_bytes: int
    avg_bytes: int
    cost: float  # of computing it, as a share of the whole network's


class WeightsOutput(JsonOutput):
    """Pretrained weights of a library; null for what the library does not say."""

    tag: str
    image_size: int | None
    classes: int | None  # that they were trained on; 0: without labels
    licence: str | None
    imagenet_accuracy: float | None  # top 1 on ImageNet-1k


class BackboneOutput(JsonOutput):
    """A backbone, described."""

    name: str
    parameters: int
    multiply_adds: int
    images_per_s: float | None  # on this machine, with --measure
    preprocessing: dict[str, Any]
    weights: tuple[WeightsOutput, ...]
    auto: tuple[str, ...]  # what `taps: auto` picks
    taps: tuple[TapOutput, ...]


class BackbonesOutput(JsonOutput):
    """`headrace backbones --json`: the names that were found, and the one that was named."""

    names: tuple[str, ...]
    backbone: BackboneOutput | None


class FeatureSetOutput(JsonOutput):
    """A feature set of a cache."""

    fingerprint: str
    path: Text
    is_broken: bool
    backbone: Text | None = None
    tap: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    rows: int | None = None
    failed: int | None = None
    bytes: int | None = None
    last_written: datetime.datetime | None = None
    written_by: tuple[str, ...] = ()


class FeatureSetsOutput(JsonOutput):
    """`headrace cache ls --json`."""

    cache: Text
    feature_sets: tuple[FeatureSetOutput, ...]


class FailureOutput(JsonOutput):
    """An image without a row of features."""

    id: Text
    reason: Text


class FeatureSetDetail(FeatureSetOutput):
    """`headrace cache show --json`."""

    spec: dict[str, Any]  # everything from which the fingerprint is made
    shards: int
    largest_error: Number  # of rounding to its dtype, measured when written; null: nothing rounded
    failures: tuple[FailureOutput, ...]


class ProblemOutput(JsonOutput):
    """A difference between a feature set's files and its manifest."""

    kind: str
    message: Text
    is_harmless: bool


class VerifiedFeatureSet(JsonOutput):
    """A feature set whose every byte was read; tap and rows are null if it is broken."""

    fingerprint: str
    tap: str | None
    rows: int | None
    problems: tuple[ProblemOutput, ...]


class RecomputedOutput(JsonOutput):
    """Rows that were extracted again; differences are relative to the values' root mean square."""

    tap: str
    rows: int
    largest_difference: float
    tolerance: float
    is_equal: bool  # within the tolerance


class VerifyOutput(JsonOutput):
    """`headrace cache verify --json`."""

    cache: Text
    feature_sets: tuple[VerifiedFeatureSet, ...]
    sources: tuple[ProblemOutput, ...]
    recomputed: tuple[RecomputedOutput, ...]
    problems: int  # the harmless ones not counted


class RepairedFeatureSet(JsonOutput):
    """The shards of a feature set after its repair: a number, or their names."""

    fingerprint: str
    kept: int
    removed: tuple[str, ...]
    missing: tuple[str, ...]
    listed_again: tuple[str, ...]
    rewritten_files: tuple[str, ...]


class RepairOutput(JsonOutput):
    """`headrace cache repair --json`."""

    cache: Text
    feature_sets: tuple[RepairedFeatureSet, ...]


class GarbageOutput(JsonOutput):
    """`headrace cache gc --json`."""

    paths: tuple[Text, ...]
    bytes: int
    is_removed: bool
    leases_removed: int


class RemovedOutput(JsonOutput):
    """`headrace cache rm --json`."""

    path: Text | None  # null if only an interrupted removal was finished
    bytes: int
    finished_removals: tuple[str, ...]  # fingerprints


class CacheExportOutput(JsonOutput):
    """`headrace cache export --json`."""

    files: tuple[Text, ...]
    missing: tuple[Text, ...]  # ids of the recipe's images without a row
    ambiguous_ids: tuple[Text, ...]  # ids of several images


class CacheImportOutput(JsonOutput):
    """`headrace cache import --json`."""

    name: Text
    path: Text
    shape: tuple[int, ...]
    rows: int
    copies: int  # of other images, which share a row
    unknown: int  # rows that were left out, because no image has their id


class TlsOutput(JsonOutput):
    """`headrace cluster tls --json`."""

    folder: Text
    certificate: Text
    key: Text
    settings: Text  # of Dask, for DASK_CONFIG


class FindingOutput(JsonOutput):
    """The result of one of the doctor's checks."""

    name: str
    state: Literal["ok", "note", "fail"]
    observation: str
    advice: str


class DoctorOutput(JsonOutput):
    """`headrace doctor --json`."""

    version: str
    platform: str
    findings: tuple[FindingOutput, ...]


# By command, as typed; `headrace schema NAME` prints the schema of each.
ERROR = "error"
OUTPUTS: Mapping[str, type[JsonOutput]] = {
    "init": InitOutput,
    "run": RunOutput,
    "run --dry-run": PlanOutput,
    "extract": ExtractOutput,
    "extract --dry-run": PlanOutput,
    "status": StatusOutput,
    "report": ReportOutput,
    "advise": AdviceOutput,
    "predict": PredictOutput,
    "export": ExportOutput,
    "backbones": BackbonesOutput,
    "doctor": DoctorOutput,
    "cache ls": FeatureSetsOutput,
    "cache show": FeatureSetDetail,
    "cache verify": VerifyOutput,
    "cache repair": RepairOutput,
    "cache gc": GarbageOutput,
    "cache rm": RemovedOutput,
    "cache export": CacheExportOutput,
    "cache import": CacheImportOutput,
    "cluster tls": TlsOutput,
    ERROR: ErrorOutput,
}
