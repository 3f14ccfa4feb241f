"""What a worker does for one candidate: the pilot, the training of a fold, and the network that is
trained on all rows.

From paths and specs to files and a small dictionary; what is on disk already is not done again.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.cache.atomic_io import publish_bytes, publish_replace
from headrace.cache.errors import HeadraceError, SpecMismatch
from headrace.cache.feature_set import FeatureSet
from headrace.cache.format.sealed import (
    SealBroken,
    is_sealed_file,
    read_sealed_json,
    sealed_json,
)
from headrace.extract.backbones.backbone import Backbone, load_backbone
from headrace.extract.errors import BackboneError
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.resolve import Tap, backbone_nodes, tap_shape
from headrace.heads.data.task import REFIT, Task, load_task, seed_of_fold
from headrace.heads.evaluate.metrics import all_metrics
from headrace.heads.evaluate.temperature import fit_temperature
from headrace.heads.results import read_bank, remove_damaged, results_bytes
from headrace.heads.spec import FineTuneSpec, FitResult, MLPSpec, spec_from_json
from headrace.pipelines.finetune.candidates import require_differentiable
from headrace.pipelines.finetune.data import (
    ImageSource,
    MapSource,
    Source,
    by_view,
    decoding_threads,
    open_all,
)
from headrace.pipelines.finetune.errors import FinetuneRefused
from headrace.pipelines.finetune.parity import check_parity
from headrace.pipelines.finetune.train import Plan, Trained, Training
from headrace.pipelines.finetune.train_above import trainable_blocks
from headrace.pipelines.models.errors import CannotSplit
from headrace.pipelines.models.network import WEIGHTS, save_network
from headrace.pipelines.models.reference import paths_of_content
from headrace.pipelines.models.torch_head import head_module, new_head, standardise
from headrace.pipelines.models.torch_network import Network

PARITY_ROWS = 48
CALIBRATION_ROWS = 256  # whose features give a head's first layer its scale


@dataclass(frozen=True)
class FinetuneJob:
    """One candidate: a head, its backbone, and how to train them."""

    key: str  # as `training_key` makes it: a checkpoint of another training is not gone on from
    task: str  # path of an .npz of `save_task`, without test rows
    images: str  # Parquet with the columns content and path
    backbone: BackboneSpec
    # feature sets of the head's inputs, tap by tap, and of each tap its views
    features: tuple[str, ...]
    # feature sets of the cut's maps, view by view; none: training starts from the images
    cut: tuple[str, ...]
    head_result: str  # results file of the trained head; "": the head is new
    spec: FineTuneSpec
    folder: str  # of parts, curves and checkpoints
    result: str  # path of the results file
    model: str  # directory of the network that is trained on all rows
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class FoldJob:
    """One fold of a candidate, in at most so many seconds of training."""

    job: FinetuneJob
    fold: int
    seconds: float | None = None
    epochs: int | None = None  # REFIT: to train so long, for there is nothing to stop early by


@dataclass(frozen=True)
class _Opened:
    task: Task
    backbone: Backbone
    taps: list[Tap]
    views: dict[str, list[FeatureSet]]  # of the head's inputs, by view
    maps: dict[str, FeatureSet]  # of the cut, by view; none: from the images
    uncut: str | None = None  # why the job's maps are not used


def pilot(job: FinetuneJob) -> dict[str, Any]:
    """The parity check and the measured time of a step.

    Returns {"parity": {rows, largest, mean} or None for a new head, "cut_parity": the same from the
    cached maps, "uncut": why they are not used, where the network cannot be cut there and runs from
    the images instead, "step_seconds", "steps" (per epoch and fold), "blocks" (how many train)}.
    Raises FinetuneRefused, CannotSplit, SpecMismatch.
    """
    torch.set_num_threads(job.threads)
    opened = _open(job)
    found: dict[str, Any] = {"parity": None, "cut_parity": None, "uncut": opened.uncut}
    if job.spec.start == "head":
        found["parity"] = dataclasses.asdict(_parity(job, opened, cut=False))
        if opened.maps:
            found["cut_parity"] = dataclasses.asdict(_parity(job, opened, cut=True))
    training = _training(FoldJob(job, int(opened.task.fold.max())), opened)
    found |= {
        "step_seconds": training.time_steps(),
        "steps": training.steps,
        "evaluation_share": len(training.held_rows) / max(1, len(training.train_rows)),
        "blocks": len(training.plan.blocks),
    }
    return found


def train_fold(fold_job: FoldJob) -> dict[str, Any]:
    """Train one fold, or with fold REFIT on all rows, and publish what came of it: a results file
    of one head, the curve, and for REFIT the network's own directory. Goes on from the fold's
    checkpoint.

    Returns {"fold", "best_epoch", "epochs", "seconds", "stopped", "resumed_from", "skipped"}.
    """
    job, fold = fold_job.job, fold_job.fold
    path = part_path(job, fold)
    curve = path.with_suffix(".json")
    remove_damaged(path)
    known = _curve(curve)
    has_network = fold != REFIT or is_sealed_file(
        Path(job.model) / WEIGHTS
    )  # the part says how; the network is what is needed
    checkpoint = Path(job.folder) / f"checkpoint{_name(fold)}.safetensors"
    if known is not None and path.exists() and has_network:
        checkpoint.unlink(missing_ok=True)  # of a process that died before it did so
        return known | {"skipped": True}
    path.unlink(
        missing_ok=True
    )  # the first to publish wins: one without its network, or without its curve, would stay
    torch.set_num_threads(job.threads)
    opened = _open(job)
    training = _training(fold_job, opened)
    trained = training.run(checkpoint, f"{job.key} {fold}")
    about: dict[str, Any] = {
        "fold": fold,
        "best_epoch": trained.progress.best_epoch,
        "epochs": trained.progress.epoch,
        "seconds": trained.progress.seconds,
        "stopped": trained.stopped,
        "resumed_from": trained.resumed_from,
        "micro_batch": training.micro,
        "curve": trained.progress.curve,
    }
    fit = _fit(job.spec, fold, trained)
    if fold == REFIT:
        # The network sees pixels from now on, whatever it was trained from.
        whole = Network(opened.backbone, opened.taps, training.network.head.cpu())
        whole.backbone.load_state_dict(training.network.backbone.cpu().state_dict())
        task = opened.task
        save_network(
            Path(job.model),
            whole,
            opened.backbone,
            spec=job.spec,
            task_kind=task.kind,
            classes=task.classes,
            metrics={},
            temperature=_temperature(job, task),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_replace(curve, sealed_json(about, indent=1))
    publish_bytes(path, _results(job, opened, [fit]))
    checkpoint.unlink(missing_ok=True)
    return about | {"skipped": False}


def _temperature(job: FinetuneJob, task: Task) -> float:
    """What the predictions of the folds that are trained give to the network on all rows."""
    rows, told = [np.empty(0, np.int64)], []
    for fold in range(task.n_folds):
        path = part_path(job, fold)
        validation = read_bank(path).validation(job.spec, fold) if path.exists() else None
        if validation is not None:
            rows.append(np.flatnonzero(task.fold == fold))
            told.append(validation)
    found = np.concatenate(rows)
    if not told:
        return 1.0
    return fit_temperature(task.kind, task.target[found], np.concatenate(told), task.weight[found])


def publish_result(job: FinetuneJob, failures: dict[int, str]) -> Path:
    """Join the parts into the candidate's results file. failures: reasons of the folds (REFIT too)
    that have no part.
    """
    opened = _open(job, light=True)
    fits = []
    for fold in [*range(opened.task.n_folds), REFIT]:
        path, nan = part_path(job, fold), float("nan")
        if path.exists():
            part = read_bank(path)
            row = part.table.iloc[0]
            validation = part.validation(job.spec, fold)
            fits.append(
                FitResult(
                    job.spec,
                    fold,
                    {},
                    row["objective"],
                    nan,
                    int(row["iterations"]),
                    row["seconds"],
                    validation,
                )
            )
        elif fold in failures:
            fits.append(FitResult(job.spec, fold, {}, nan, nan, 0, 0.0, None, failures[fold]))
    path = Path(job.result)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_replace(path, _results(job, opened, fits))
    return path


def _curve(path: Path) -> dict[str, Any] | None:
    """What `train_fold` returned when it trained this fold; None where that is gone or damaged."""
    try:
        return read_sealed_json(path.read_bytes())
    except (OSError, SealBroken):
        return None


def part_path(job: FinetuneJob, fold: int) -> Path:
    """The results file of one fold."""
    return Path(job.folder) / f"fold{_name(fold)}.h5"


def _name(fold: int) -> str:
    return "-full" if fold == REFIT else f"-{fold}"


def _open(job: FinetuneJob, *, light: bool = False) -> _Opened:
    """Everything that the job names; light: without building the backbone."""
    task = load_task(Path(job.task))
    views = by_view(open_all(job.features))
    first = next(iter(views.values()))
    maps = {feature.spec.view: feature for feature in open_all(job.cut)}
    taps = [Tap(feature.spec.tap, feature.spec.reduction) for feature in first]
    if light:
        return _Opened(task, None, taps, views, maps)  # type: ignore[arg-type]
    backbone = load_backbone(job.backbone)
    for feature in (*first, *maps.values()):
        for name, here, stored in (
            ("weights", backbone.weights, feature.spec.weights),
            ("preprocessing", backbone.preprocessing.to_json(), feature.spec.preprocessing),
        ):
            if here != stored:
                raise SpecMismatch(
                    f"{job.backbone.name}: the {name} here are {here}, but {feature.spec.name} was "
                    f"made with {stored}: run the recipe again, so that features and network agree"
                )
    reason = _uncuttable(backbone, taps, maps)
    return _Opened(task, backbone, taps, views, {} if reason else maps, reason)


def _uncuttable(backbone: Backbone, taps: list[Tap], maps: dict[str, FeatureSet]) -> str | None:
    """Why the network cannot be run from these maps on; None where it can, or where
    there are none.
    """
    if not maps:
        return None
    nodes = backbone_nodes(backbone)
    width = sum(math.prod(tap_shape(tap, nodes[tap.node])) for tap in taps)
    try:
        Network(
            backbone,
            taps,
            new_head(MLPSpec(hidden=()), width, 1),
            cut=next(iter(maps.values())).spec.tap,
        )
    except CannotSplit as error:
        return str(error)
    return None


def _parity(job: FinetuneJob, opened: _Opened, *, cut: bool) -> Any:
    head_spec = spec_from_json(job.spec.head)
    require_differentiable(head_spec)
    bank, task = read_bank(job.head_result), opened.task
    if not np.array_equal(bank.content, task.content) or not np.array_equal(bank.fold, task.fold):
        raise FinetuneRefused(
            f"{job.head_result} was trained on other rows or folds than {job.task} has: run the "
            "recipe again"
        )
    out_of_fold = bank.out_of_fold(head_spec)
    rows = np.flatnonzero((task.fold >= 0) & np.isfinite(out_of_fold).all(1))
    rows = rows[
        np.unique(np.linspace(0, len(rows) - 1, min(PARITY_ROWS, len(rows))).astype(np.int64))
    ]
    folds = sorted(set(task.fold[rows].tolist()))
    heads = {
        fold: head_module(head_spec, bank.arrays(head_spec, fold), task.kind) for fold in folds
    }
    network = Network(
        opened.backbone, opened.taps, heads[folds[0]], cut=_cut(opened) if cut else None
    )
    network.round_to([feature.spec.dtype for feature in next(iter(opened.views.values()))])
    network.eval().to(job.device)
    heads = {fold: head.eval().to(job.device) for fold, head in heads.items()}
    source = _source(job, opened, network)
    inputs: list[Tensor] = []
    held: list[Tensor | None] = []
    cached = []
    for view, own in enumerate(opened.views.values()):
        columns = [feature.load(task.content[rows], np.float32) for feature in own]
        cached.append(
            np.concatenate(
                [c if network.head.spatial else c.reshape(len(rows), -1) for c in columns], axis=1
            )
        )
        batches = list(source.batches(rows, len(rows), view=view))
        inputs.append(torch.cat([batch.inputs for batch in batches]).to(job.device))
        parts = [batch.held for batch in batches if batch.held is not None]
        held.append(torch.cat(parts).to(job.device) if parts else None)
    return check_parity(
        network, heads, inputs, task.fold[rows], out_of_fold[rows], cached, task.kind, held=held
    )


def _training(fold_job: FoldJob, opened: _Opened) -> Training:
    job, fold, task, spec = fold_job.job, fold_job.fold, opened.task, fold_job.job.spec
    cut = _cut(opened) if opened.maps else None
    outputs = 1 if task.kind == "single" and len(task.classes) == 2 else len(task.classes)
    head_spec = spec_from_json(spec.head)
    if spec.start == "head":
        require_differentiable(head_spec)
        head = head_module(head_spec, read_bank(job.head_result).arrays(head_spec, fold), task.kind)
    else:
        if not isinstance(head_spec, MLPSpec):
            require_differentiable(head_spec)
            raise FinetuneRefused(f"a new head is an mlp, and this one is of kind {head_spec.kind}")
        width = _width(opened)
        head = new_head(
            dataclasses.replace(head_spec, seed=spec.seed + 1000 * seed_of_fold(fold)),
            width,
            outputs,
        )
    head.dropout = max(head.dropout, spec.dropout)
    network = Network(opened.backbone, opened.taps, head, cut=cut)
    blocks = trainable_blocks(network, spec.train_above)
    if spec.start == "random":
        _draw_anew(network, job.backbone, [name for block in blocks for name in block], spec.seed)
    source = _source(job, opened, network)
    epochs = spec.epochs if fold_job.epochs is None else fold_job.epochs
    plan = Plan(spec, blocks, task, fold, epochs, job.device, fold_job.seconds)
    training = Training(network, source, plan)
    _calibrate(training, new=spec.start != "head")
    return training


def _calibrate(training: Training, *, new: bool) -> None:
    """Give the head's first layer the scale of its features, as they are now, over some training
    rows.
    """
    rows = training.train_rows
    rows = rows[
        np.unique(np.linspace(0, len(rows) - 1, min(CALIBRATION_ROWS, len(rows))).astype(np.int64))
    ]
    network, device = training.network, training.plan.device
    training.mode()  # batch normalisation drawn anew has no statistics yet but the batch's own
    parts = []
    with torch.no_grad():
        for batch in training.source.batches(rows, 32):
            held = None if batch.held is None else batch.held.to(device)
            parts.append(network.features(batch.inputs.to(device), held).flatten(1).double())
    if not network.head.spatial:
        features = torch.cat(parts)
        standardise(network.head, features.mean(0), features.std(0, correction=0), new=new)


def _draw_anew(network: Network, spec: BackboneSpec, modules: list[str], seed: int) -> None:
    """Give these modules of the backbone the parameters and statistics of a network with random
    weights.
    """
    if spec.name.startswith("python:"):
        raise BackboneError(
            f"{spec.name}: how a network of your own starts at random is not known: use start "
            "pretrained"
        )
    fresh = load_backbone(dataclasses.replace(spec, weights=f"random:{seed}")).module
    for name in modules:
        own: dict[str, Tensor] = dict(fresh.get_submodule(name).named_parameters(recurse=False))
        own |= dict(fresh.get_submodule(name).named_buffers(recurse=False))
        target = network.backbone.get_submodule(name)
        for field, value in own.items():
            getattr(target, field).data.copy_(value)


def _source(job: FinetuneJob, opened: _Opened, network: Network) -> Source:
    task = opened.task
    if network.cut is None:
        return ImageSource(
            task.content,
            paths_of_content(Path(job.images), task.content),
            opened.backbone.preprocessing,
            tuple(opened.views),
            decoding_threads(job.threads, job.device),
        )
    held = [
        [
            feature
            for tap, feature in zip(opened.taps, opened.views[view], strict=True)
            if tap in network.held
        ]
        for view in opened.maps
    ]
    return MapSource(task.content, list(opened.maps.values()), held)


def _cut(opened: _Opened) -> str:
    return next(iter(opened.maps.values())).spec.tap


def _width(opened: _Opened) -> int:
    return sum(int(np.prod(feature.spec.shape)) for feature in next(iter(opened.views.values())))


def _fit(spec: FineTuneSpec, fold: int, trained: Trained) -> FitResult:
    curve = {int(row["epoch"]): row for row in trained.progress.curve}
    loss = curve.get(trained.progress.best_epoch, {}).get("train_loss", float("nan"))
    progress = trained.progress
    return FitResult(
        spec,
        fold,
        {},
        loss,
        float("nan"),
        progress.best_epoch,
        progress.seconds,
        trained.validation,
    )


def _results(job: FinetuneJob, opened: _Opened, fits: list[FitResult]) -> bytes:
    task = opened.task
    specs = [feature.spec for own in opened.views.values() for feature in own]
    metrics = [
        {}
        if fit.validation is None
        else all_metrics(task.kind, task.target[task.fold == fit.fold], fit.validation)
        for fit in fits
    ]
    return results_bytes(
        task,
        task.digest,
        fits,
        metrics,
        features=[
            {"fingerprint": spec.fingerprint, "spec": json.loads(spec.to_json())} for spec in specs
        ],
        dropped=[],
    )


def failure(error: BaseException) -> str:
    """The reason of a failed row, in one line."""
    return str(error) if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"


__all__ = [
    "FinetuneJob",
    "FoldJob",
    "failure",
    "part_path",
    "pilot",
    "publish_result",
    "train_fold",
]
