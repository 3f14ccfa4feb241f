"""A small run's worth of files for fine-tuning: striped images, a small random network, its
features, and trained heads.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from support.runs import make_photos

from headrace.cache.publish import feature_set_path
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.images.content_hashes import content_hashes
from headrace.extract.run.plan import BackboneFeatures, plan_work_units
from headrace.extract.run.work_unit import run_work_unit
from headrace.extract.sources.samples import list_folder
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.describe import feature_specs
from headrace.extract.taps.resolve import resolve_taps
from headrace.heads.bank import BankJob, train_bank
from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import Task, save_task
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.spec import HeadSpec, spec_to_json
from headrace.pipelines.finetune.candidates import training_key
from headrace.pipelines.finetune.task import FinetuneJob
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec
from headrace.pipelines.records import write_record

SMALL = BackboneSpec("timm:test_resnet", "random:0", image_size=64, crop_fraction=1.0)
TAPS = ("layer2.avg", "layer3.map", "layer3.avg", "layer4.avg", "layer4.max")
LOGISTIC = LogisticSpec(C=1.0)
# A run whose only head is held back, so that a network has something to win; the finetune section
# follows.
WEAK_HEAD_RECIPE = """\
images:
  folder: photos
task:
  folds: 2
  metric: log_loss
backbones:
  - name: timm:test_resnet
    weights: random:0
    image_size: 64
    crop_fraction: 1.0
    taps: [layer3.map, layer4.avg]
heads:
  logistic:
    C: [0.0001]
    inputs: [[layer4.avg]]
"""


@dataclasses.dataclass
class Case:
    """Files, and where they are."""

    root: Path
    task: Task
    directories: dict[str, list[Path]]  # by tap, view by view

    def features(self, *taps: str) -> tuple[str, ...]:
        return tuple(str(path) for tap in taps for path in self.directories[tap])

    def bank(self, spec: HeadSpec, *taps: str) -> str:
        """The results file of a head on these taps, trained if need be."""
        name = f"{spec.kind}-{'-'.join(taps)}-{abs(hash(spec))}.h5"
        job = BankJob(
            str(self.root / "task.npz"), self.features(*taps), (spec,), str(self.root / name)
        )
        train_bank(job)
        return job.result

    def job(
        self,
        head: HeadSpec = LOGISTIC,
        taps: tuple[str, ...] = ("layer4.avg",),
        cut: str | None = "layer3.map",
        out: str = "finetune",
        backbone: BackboneSpec = SMALL,
        **settings: Any,
    ) -> FinetuneJob:
        settings = {
            "train_above": "layer3",
            "epochs": 3,
            "learning_rate": 1e-3,
            "batch_size": 16,
        } | settings
        spec = FineTuneSpec(head=spec_to_json(head), **settings)
        started = spec.start == "head"
        folder = self.root / out
        head_result = self.bank(head, *taps) if started else ""
        files = (
            *self.features(*taps),
            *(self.features(cut) if cut else ()),
            head_result,
            "task.npz",
        )
        return FinetuneJob(
            key=training_key(spec, backbone, map(Path, files)),
            task=str(self.root / "task.npz"),
            images=str(self.root / "images.json"),
            backbone=backbone,
            features=self.features(*taps),
            split_maps=self.features(cut) if cut else (),
            head_result=head_result,
            spec=spec,
            folder=str(folder / "parts"),
            result=str(folder / "result.h5"),
            model=str(folder / "model"),
        )


def make_case(
    root: Path,
    *,
    images: int = 48,
    folds: int = 2,
    views: int = 1,
    backbone: BackboneSpec = SMALL,
    taps: Sequence[str] = TAPS,
) -> Case:
    """Images, features of the taps, a task of two classes and folds; all in this process."""
    make_photos(root / "photos", n=images)
    samples = list_folder(root / "photos")
    contents = content_hashes(samples, root / "contents.parquet").hashes
    samples = samples.assign(content=list(contents))
    loaded = load_backbone(backbone)
    specs = feature_specs(loaded, resolve_taps(loaded, taps), views=views)
    for unit in plan_work_units(
        samples, [_network(backbone, specs)], cache_root=root / "cache", images_per_shard=64
    ):
        run_work_unit(unit)
    directories: dict[str, list[Path]] = {}
    for spec in specs:
        directories.setdefault(spec.name, []).append(feature_set_path(root / "cache", spec))
    target = pd.factorize(samples["label"], sort=True)[0].astype(np.int64)
    task = Task(
        "single",
        ("coarse", "fine"),
        samples["id"].to_numpy(np.str_),
        samples["content"].to_numpy("S32"),
        target,
        make_folds(target, n_folds=folds, seed=0),
        np.ones(len(samples)),
    )
    save_task(task, root / "task.npz")
    write_record(
        root / "images.json",
        {"paths": dict(zip(samples["content"], samples["path"].astype(str), strict=True))},
    )
    return Case(root, task, directories)


def _network(backbone: BackboneSpec, specs: Any) -> BackboneFeatures:
    return BackboneFeatures(backbone, specs, [set()] * len(specs))
