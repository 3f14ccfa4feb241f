"""A network that gives one image other features in another pass, or beside other images, is
refused: its features would be of no image.
"""

import pytest
import torch
from torch import Tensor, nn

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.errors import BackboneError
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.forward import make_forward
from headrace.extract.taps.resolve import resolve_taps

HALF = (0.5, 0.5, 0.5)
HOW = Preprocessing((16, 16), (16, 16), "squash", "bilinear", HALF, HALF)


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(768, 64)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(images.flatten(1)))  # in evaluation mode too


def drops() -> tuple[nn.Module, Preprocessing]:
    return Drops(), HOW


def unstored() -> tuple[nn.Module, Preprocessing]:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)), HOW


def half() -> tuple[nn.Module, Preprocessing]:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).half(), HOW


def lazy() -> tuple[nn.Module, Preprocessing]:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()), HOW


def scripted() -> tuple[nn.Module, Preprocessing]:
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), HOW


def instance() -> tuple[nn.Module, Preprocessing]:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)), HOW  # by each image's own


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and people have its files
@pytest.mark.parametrize(
    ("name", "tap", "message"),
    [
        ("drops", "logits", "in every pass, so they are random"),
        ("unstored", "1.max", "depend on the batch.*track_running_stats"),
        ("half", "1.avg", r"its weights are float16: return network\.float\(\)"),
        ("lazy", "1.avg", "run it once in the function"),
        ("scripted", "1.avg", "TorchScript program"),
    ],
)
def test_refused(name: str, tap: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        _features(name, tap)


def test_what_an_image_alone_decides_is_not_refused() -> None:
    assert _features("instance", "1.max").shape == (1, 8)


def _features(name: str, tap: str) -> Tensor:
    backbone = load_backbone(BackboneSpec(f"python:{__name__}:{name}"))
    (features,) = make_forward(backbone, resolve_taps(backbone, [tap]))(
        torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    )
    return features
