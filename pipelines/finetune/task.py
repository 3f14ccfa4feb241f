"""Tasks of workers for one candidate: the pilot, and the training of a fold or of the network on
all rows.

They take paths and specs, write files and return a small dictionary. What is on disk already is not
done again.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.cache.atomic_io import publish_bytes, publish_replace
from headrace.cache.errors import SpecMismatch
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.cache.format.sealed import SealBroken, is_sealed_file, read_sealed_json, sealed_json
from headrace.extract.backbones.backbone import Backbone, load_backbone
from headrace.extract.cores import available_cores
from headrace.extract.errors import BackboneError
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.resolve import Tap, backbone_nodes, tap_shape
from headrace.heads.data.task import REFIT, Task, load_task, seed_of_fold
from headrace.heads.evaluate.temperature import fit_temperature
from headrace.heads.evaluate.units import held_out_metrics
from headrace.heads.kinds import spec_from_json
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.results import read_bank, remove_damaged, results_bytes
from headrace.heads.spec import FitResult
from headrace.pipelines.finetune.candidates import PilotResult, require_differentiable
from headrace.pipelines.finetune.data import BatchSource, ImageSource, MapSource, sets_by_view
from headrace.pipelines.finetune.parity import ParityResult, check_parity
from headrace.pipelines.finetune.train import TrainedFold, Training, TrainingPlan
from headrace.pipelines.finetune.train_above import trainable_blocks
from headrace.pipelines.models.errors import CannotSplit, ModelError
from headrace.pipelines.models.network import WEIGHTS, save_network
from headrace.pipelines.models.reference import paths_of_content
from headrace.pipelines.models.torch_head import head_module, new_head, standardize_head
from headrace.pipelines.models.torch_network import Network
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec

PARITY_ROWS = 48  # images of the parity check
CALIBRATION_ROWS = 256  # training rows whose features standardize a head's first layer


@dataclass(frozen=True)
class FinetuneJob:
    """One candidate: a head, its backbone, and how to train them."""

    key: str  # from `training_key`; a checkpoint of another key is not resumed
    task: str  # path of an .npz by `save_task`, without test rows
    images: str  # path of the listing for `paths_of_content`
    backbone: BackboneSpec
    features: tuple[str, ...]  # feature sets of the head's inputs, tap by tap, each view by view
    split_maps: tuple[str, ...]  # cached maps of the split node, view by view; (): from the images
    head_result: str  # results file of the trained head; "": the head is new
    spec: FineTuneSpec
    folder: str  # for parts, curves and checkpoints
    result: str  # path of the results file
    model: str  # directory of the network that is trained on all rows
    device: str = "cpu"


@dataclass(frozen=True)
class FoldJob:
    """The training of one fold of a candidate."""

    job: FinetuneJob
    fold: int  # REFIT: on all rows
    seconds: float = math.inf  # at most, by `train.clock`
    epochs: int | None = None  # of REFIT, which has no validation rows to stop early by


@dataclass(frozen=True)
class _OpenedJob:
    task: Task
    backbone: Backbone
    taps: list[Tap]
    features_of_view: dict[str, list[FeatureSet]]  # of the head's inputs, by view
    map_of_view: dict[str, FeatureSet]  # of the split node, by view; {}: train from the images
    no_split_reason: str | None = None  # why the job's maps are not used

    @property
    def crop_features(self) -> list[FeatureSet]:
        """The head's inputs in their first view, the evaluation crop."""
        return next(iter(self.features_of_view.values()))

    @property
    def split_node(self) -> str:
        return next(iter(self.map_of_view.values())).spec.tap


def pilot(job: FinetuneJob) -> PilotResult:
    """Check parity and measure the time of a step. Raises ModelError, CannotSplit, SpecMismatch."""
    torch.set_num_threads(1)  # one worker runs on each core
    opened = _open_job(job)
    parity = split_parity = None
    if job.spec.start == "head":
        parity = dataclasses.asdict(_check_parity(job, opened, from_maps=False))
        if opened.map_of_view:
            split_parity = dataclasses.asdict(_check_parity(job, opened, from_maps=True))
    # A step takes the same time in every fold.
    training = _make_training(FoldJob(job, int(opened.task.fold.max())), opened)
    return PilotResult(
        parity,
        split_parity,
        opened.no_split_reason,
        step_seconds=training.time_steps(),
        steps=training.steps_per_epoch,
        evaluation_share=len(training.validation_rows) / max(1, len(training.train_rows)),
        blocks=len(training.plan.blocks),
    )


def train_fold(fold_job: FoldJob) -> dict[str, Any]:
    """Train one fold, or with fold REFIT on all rows, from the fold's checkpoint if there is one,
    and publish a results file of one head, the curve, and for REFIT the network's directory.

    Returns {"fold", "best_epoch", "epochs", "seconds", "stopped", "resumed_from", "micro_batch",
    "curve", "skipped"}: numbers of epochs, seconds, images of a pass, rows as in TrainingProgress.
    """
    job, fold = fold_job.job, fold_job.fold
    part_file = part_path(job, fold)
    curve_path = part_file.with_suffix(".json")
    remove_damaged(part_file)
    stored_curve = _read_curve(curve_path)
    # For REFIT the results file alone is not enough: the network itself is needed.
    has_network = fold != REFIT or is_sealed_file(Path(job.model) / WEIGHTS)
    checkpoint = Path(job.folder) / f"checkpoint{_fold_name(fold)}.safetensors"
    if stored_curve is not None and part_file.exists() and has_network:
        checkpoint.unlink(missing_ok=True)  # left by a process that died after publishing
        return stored_curve | {"skipped": True}
    # A results file without its network or curve is removed, because the first one published stays.
    part_file.unlink(missing_ok=True)
    torch.set_num_threads(1)
    opened = _open_job(job)
    training = _make_training(fold_job, opened)
    trained = training.run(checkpoint, f"{job.key} {fold}")
    summary: dict[str, Any] = {
        "fold": fold,
        "best_epoch": trained.progress.best_epoch,
        "epochs": trained.progress.epoch,
        "seconds": trained.progress.seconds,
        "stopped": trained.stopped,
        "resumed_from": trained.resumed_from,
        "micro_batch": training.micro_batch_size,
        "curve": trained.progress.curve,
    }
    fold_result = _fold_result(job.spec, fold, trained)
    if fold == REFIT:
        # The stored network reads pixels, even if it was trained from cached maps.
        pixel_network = Network(opened.backbone, opened.taps, training.network.head.cpu())
        pixel_network.backbone.load_state_dict(training.network.backbone.cpu().state_dict())
        task = opened.task
        save_network(
            Path(job.model),
            pixel_network,
            opened.backbone,
            spec=job.spec,
            task_kind=task.kind,
            classes=task.classes,
            metrics={},
            temperature=_fold_temperature(job, task),
        )
    part_file.parent.mkdir(parents=True, exist_ok=True)
    publish_replace(curve_path, sealed_json(summary, indent=1))
    publish_bytes(part_file, _results_bytes(job, opened, [fold_result]))
    checkpoint.unlink(missing_ok=True)
    return summary | {"skipped": False}


def _fold_temperature(job: FinetuneJob, task: Task) -> float:
    """Return the temperature of the network on all rows: that of its folds' predictions."""
    row_blocks, predictions = [], []
    for fold in range(task.n_folds):
        part_file = part_path(job, fold)
        validation = read_bank(part_file).validation(job.spec, fold) if part_file.exists() else None
        if validation is not None:
            row_blocks.append(np.flatnonzero(task.fold == fold))
            predictions.append(validation)
    if not predictions:
        return 1.0
    row_index = np.concatenate(row_blocks)
    return fit_temperature(
        task.kind, task.target[row_index], np.concatenate(predictions), task.weight[row_index]
    )


def publish_result(job: FinetuneJob, failures: dict[int, str]) -> Path:
    """Join the folds' results into one file. failures: reasons of folds (or REFIT) without any."""
    opened = _open_job(job, without_backbone=True)
    fold_results = []
    for fold in [*range(opened.task.n_folds), REFIT]:
        part_file, nan = part_path(job, fold), float("nan")
        if part_file.exists():
            bank = read_bank(part_file)
            row = bank.table.iloc[0]
            loss, epoch, seconds = row["objective"], int(row["iterations"]), row["seconds"]
            validation = bank.validation(job.spec, fold)
            fold_results.append(
                FitResult(job.spec, fold, {}, loss, nan, epoch, seconds, validation)
            )
        elif fold in failures:
            fold_results.append(
                FitResult(job.spec, fold, {}, nan, nan, 0, 0.0, None, failures[fold])
            )
    part_file = Path(job.result)
    part_file.parent.mkdir(parents=True, exist_ok=True)
    publish_replace(part_file, _results_bytes(job, opened, fold_results))
    return part_file


def _read_curve(path: Path) -> dict[str, Any] | None:
    try:
        return read_sealed_json(path.read_bytes())
    except (OSError, SealBroken):
        return None


def part_path(job: FinetuneJob, fold: int) -> Path:
    """Return the path of one fold's results file."""
    return Path(job.folder) / f"fold{_fold_name(fold)}.h5"


def _fold_name(fold: int) -> str:
    return "-full" if fold == REFIT else f"-{fold}"


def _open_job(job: FinetuneJob, *, without_backbone: bool = False) -> _OpenedJob:
    """Open the files that the job names. without_backbone: without building the network."""
    task = load_task(Path(job.task))
    features_of_view = sets_by_view(map(open_feature_set, job.features))
    first_view = next(iter(features_of_view.values()))
    map_of_view = {feature.spec.view: feature for feature in map(open_feature_set, job.split_maps)}
    taps = [Tap(feature.spec.tap, feature.spec.pooling) for feature in first_view]
    if without_backbone:
        return _OpenedJob(task, None, taps, features_of_view, map_of_view)  # type: ignore[arg-type]
    backbone = load_backbone(job.backbone)
    for feature in (*first_view, *map_of_view.values()):
        for name, value_here, stored_value in (
            ("weights", backbone.weights, feature.spec.weights),
            ("preprocessing", backbone.preprocessing.to_json(), feature.spec.preprocessing),
        ):
            if value_here != stored_value:
                raise SpecMismatch(
                    f"{job.backbone.name}: the {name} here are {value_here}, but "
                    f"{feature.spec.name} was made with {stored_value}: run the recipe again, so "
                    "that features and network agree"
                )
    no_split_reason = _no_split_reason(backbone, taps, map_of_view)
    if no_split_reason:
        map_of_view = {}
    return _OpenedJob(task, backbone, taps, features_of_view, map_of_view, no_split_reason)


def _no_split_reason(
    backbone: Backbone, taps: list[Tap], map_of_view: dict[str, FeatureSet]
) -> str | None:
    """Return why the network cannot run from these maps; None if it can, or there are none."""
    if not map_of_view:
        return None
    nodes = backbone_nodes(backbone)
    n_features = sum(math.prod(tap_shape(tap, nodes[tap.node])) for tap in taps)
    head = new_head(MLPSpec(hidden=()), n_features, 1)
    try:
        Network(backbone, taps, head, split_node=next(iter(map_of_view.values())).spec.tap)
    except CannotSplit as error:
        return str(error)
    return None


def _check_parity(job: FinetuneJob, opened: _OpenedJob, *, from_maps: bool) -> ParityResult:
    head_spec = spec_from_json(job.spec.head)
    require_differentiable(head_spec)
    bank, task = read_bank(job.head_result), opened.task
    if not np.array_equal(bank.content, task.content) or not np.array_equal(bank.fold, task.fold):
        raise ModelError(
            f"{job.head_result} was trained on other rows or folds than {job.task} has: run the "
            "recipe again"
        )
    out_of_fold = bank.out_of_fold_predictions(head_spec)
    predicted_rows = np.flatnonzero((task.fold >= 0) & np.isfinite(out_of_fold).all(1))
    row_index = _spread(predicted_rows, PARITY_ROWS)
    folds = sorted(set(task.fold[row_index].tolist()))
    heads = {
        fold: head_module(head_spec, bank.arrays(head_spec, fold), task.kind) for fold in folds
    }
    split_node = opened.split_node if from_maps else None
    network = Network(opened.backbone, opened.taps, heads[folds[0]], split_node=split_node)
    network.round_to([feature.spec.dtype for feature in opened.crop_features])
    network.eval().to(job.device)
    heads = {fold: head.eval().to(job.device) for fold, head in heads.items()}
    batch_source = _batch_source(job, opened, network)
    inputs: list[Tensor] = []
    below: list[Tensor | None] = []
    cached_features = []
    for view, view_features in enumerate(opened.features_of_view.values()):
        columns = [feature.load(task.content[row_index], np.float32) for feature in view_features]
        if not network.head.spatial:
            columns = [column.reshape(len(row_index), -1) for column in columns]
        cached_features.append(np.concatenate(columns, axis=1))
        (batch,) = batch_source.batches(row_index, len(row_index), default_view=view)
        view_inputs, view_below = batch.on_device(job.device)
        inputs.append(view_inputs)
        below.append(view_below)
    fold, expected = task.fold[row_index], out_of_fold[row_index]
    return check_parity(
        network, heads, inputs, fold, expected, cached_features, task.kind, features_below=below
    )


def _make_training(fold_job: FoldJob, opened: _OpenedJob) -> Training:
    job, fold, task, spec = fold_job.job, fold_job.fold, opened.task, fold_job.job.spec
    split_node = opened.split_node if opened.map_of_view else None
    # Two classes need one logit.
    n_outputs = 1 if task.kind == "single" and len(task.classes) == 2 else len(task.classes)
    head_spec = spec_from_json(spec.head)
    if spec.start == "head":
        require_differentiable(head_spec)
        head = head_module(head_spec, read_bank(job.head_result).arrays(head_spec, fold), task.kind)
    else:
        if not isinstance(head_spec, MLPSpec):
            require_differentiable(head_spec)
            raise ModelError(f"a new head is an mlp, and this one is of kind {head_spec.kind}")
        head = new_head(
            # Another start for each fold; ×1000, so that it is not that of a neighbouring seed.
            dataclasses.replace(head_spec, seed=spec.seed + 1000 * seed_of_fold(fold)),
            sum(math.prod(feature.spec.shape) for feature in opened.crop_features),
            n_outputs,
        )
    head.dropout = max(head.dropout, spec.dropout)
    network = Network(opened.backbone, opened.taps, head, split_node=split_node)
    blocks = trainable_blocks(network, spec.train_above)
    if spec.start == "random":
        _draw_anew(network, job.backbone, [name for block in blocks for name in block], spec.seed)
    batch_source = _batch_source(job, opened, network)
    epochs = spec.epochs if fold_job.epochs is None else fold_job.epochs
    plan = TrainingPlan(spec, blocks, task, fold, epochs, job.device, fold_job.seconds)
    training = Training(network, batch_source, plan)
    _calibrate_head(training, new=spec.start != "head")
    return training


def _calibrate_head(training: Training, *, new: bool) -> None:
    """Standardize the head's first layer by its features' statistics over some training rows."""
    row_index = _spread(training.train_rows, CALIBRATION_ROWS)
    network, device = training.network, training.plan.device
    # In training mode, because newly drawn batch normalization has no running statistics yet.
    training.train_mode()
    feature_blocks = []
    with torch.no_grad():
        for batch in training.source.batches(row_index, 32):
            features = network.features(*batch.on_device(device))
            feature_blocks.append(features.flatten(1).double())
    if not network.head.spatial:
        # Stored heads are in raw coordinates, where features of unlike scales would need learning
        # rates of their own.
        features = torch.cat(feature_blocks)
        standardize_head(network.head, features.mean(0), features.std(0, correction=0), is_new=new)


def _draw_anew(network: Network, spec: BackboneSpec, module_names: list[str], seed: int) -> None:
    """Give these modules of the backbone random parameters, as its library draws them."""
    if spec.name.startswith("python:"):
        raise BackboneError(
            f"{spec.name}: how a network of your own starts at random is not known: use start "
            "pretrained"
        )
    random_network = load_backbone(dataclasses.replace(spec, weights=f"random:{seed}")).module
    for module_name in module_names:
        random_module = random_network.get_submodule(module_name)
        target_module = network.backbone.get_submodule(module_name)
        for value_name, value in (
            *random_module.named_parameters(recurse=False),
            *random_module.named_buffers(recurse=False),
        ):
            getattr(target_module, value_name).data.copy_(value)


def _batch_source(job: FinetuneJob, opened: _OpenedJob, network: Network) -> BatchSource:
    task = opened.task
    if network.split_node is None:
        return ImageSource(
            task.content,
            paths_of_content(Path(job.images), task.content),
            opened.backbone.preprocessing,
            tuple(opened.features_of_view),
            # A GPU is fed by one process, to which all cores belong.
            1 if job.device == "cpu" else available_cores(),
        )
    features_below = [
        [
            feature
            for tap, feature in zip(opened.taps, opened.features_of_view[view], strict=True)
            if tap in network.taps_below
        ]
        for view in opened.map_of_view
    ]
    return MapSource(task.content, list(opened.map_of_view.values()), features_below)


def _spread(rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Return `count` rows, or all if there are fewer, evenly spaced from the first to the last."""
    positions = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)
    return rows[np.unique(positions)]


def _fold_result(spec: FineTuneSpec, fold: int, trained: TrainedFold) -> FitResult:
    progress, nan = trained.progress, float("nan")
    # Epoch 0, the untrained network, has none.
    train_losses = {row["epoch"]: row.get("train_loss", nan) for row in progress.curve}
    loss, epoch = train_losses.get(progress.best_epoch, nan), progress.best_epoch
    return FitResult(spec, fold, {}, loss, nan, epoch, progress.seconds, trained.validation)


def _results_bytes(job: FinetuneJob, opened: _OpenedJob, fold_results: list[FitResult]) -> bytes:
    task = opened.task
    metrics = [held_out_metrics(task, result.fold, result.validation) for result in fold_results]
    features = [
        {"fingerprint": feature.spec.fingerprint, "spec": json.loads(feature.spec.to_json())}
        for view_features in opened.features_of_view.values()
        for feature in view_features
    ]
    return results_bytes(task, task.digest, fold_results, metrics, features=features, dropped=[])
