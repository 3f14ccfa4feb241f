"""How many images a second a network takes on this machine."""

import time

import torch

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.forward import make_forward
from headrace.extract.taps.resolve import Tap, auto_taps, backbone_nodes

_BATCH_IMAGES = 16  # in one pass


def measure_rate(spec: BackboneSpec, *, device: str = "cpu", seconds: float = 3.0) -> float:
    """Return images per second of the pass to the taps that `auto` picks, without decoding.

    Uses all threads of this process. spec: weights may be random, for they do not change the rate.
    Raises BackboneError.
    """
    backbone = load_backbone(spec)
    taps: tuple[Tap, ...] = auto_taps(backbone_nodes(backbone))
    forward = make_forward(backbone, taps, device=device)
    pixels = torch.zeros((_BATCH_IMAGES, *backbone.preprocessing.crop, 3), dtype=torch.uint8)
    pixels = pixels.to(device)
    forward(pixels)[-1].cpu()  # the first pass also compiles and allocates
    n_images, started_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started_s) < seconds or not n_images:
        forward(pixels)[-1].cpu()
        n_images += _BATCH_IMAGES
    return n_images / elapsed_s
