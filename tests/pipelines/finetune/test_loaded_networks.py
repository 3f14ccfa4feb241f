"""Fine-tuning networks that were loaded in part, built with arguments, or at another input size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import SMALL, make_case

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.images.decoding import decode_image
from headrace.extract.images.preprocessing import render_crop
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.left_out import WeightsWarning
from headrace.heads.data.task import REFIT
from headrace.pipelines.finetune.task import FoldJob, train_fold
from headrace.pipelines.models.network import load_network

pytestmark = pytest.mark.usefixtures("one_thread")


def predicted(model: str, photos: Path) -> np.ndarray:
    saved = load_network(model)
    how = saved.model.preprocessing
    images = [decode_image(path.read_bytes()) for path in sorted(photos.rglob("*.png"))[:4]]
    return saved.predict_proba(np.stack([render_crop(image, how) for image in images]))


def test_from_a_checkpoint_without_a_head(tmp_path: Path) -> None:
    """The head is above the taps: what trains is there, and the saved network predicts."""
    state = load_backbone(SMALL).module.state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "part.pth")
    backbone = BackboneSpec(
        "timm:test_resnet", str(tmp_path / "part.pth"), image_size=64, crop_fraction=1.0
    )
    with pytest.warns(WeightsWarning, match=r"fc\.weight"):
        case = make_case(tmp_path, backbone=backbone)
    job = case.job(backbone=backbone, train_above="all", cut=None)
    train_fold(FoldJob(job, REFIT, epochs=1))
    assert np.isfinite(predicted(job.model, tmp_path / "photos")).all()


def test_a_transformer_at_another_size_with_arguments(tmp_path: Path) -> None:
    """The saved network is built as the backbone was: its positions and registers fit."""
    backbone = BackboneSpec(
        "timm:vit_tiny_patch16_224",
        "random:0",
        image_size=64,
        model={"reg_tokens": 4, "depth": 2, "embed_dim": 24},
    )
    case = make_case(tmp_path, backbone=backbone, taps=("blocks.1.cls", "norm.avg"), images=24)
    job = case.job(backbone=backbone, taps=("norm.avg",), train_above="all", cut=None)
    train_fold(FoldJob(job, REFIT, epochs=1))
    assert np.isfinite(predicted(job.model, tmp_path / "photos")).all()
