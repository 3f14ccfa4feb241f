"""A backbone that takes its process down at some images, as a bug in a decoder or a kernel does."""

import os
import signal

import torch

from headrace.extract.images.preprocessing import Preprocessing


@torch.fx.wrap
def look(pixels):
    """Die of a white image."""
    if (pixels.flatten(1).amin(dim=1) > 0.99).any():
        os.kill(os.getpid(), signal.SIGSEGV)
    return pixels


class Eye(torch.nn.Module):
    """Means of the colours."""

    def __init__(self):
        super().__init__()
        self.pool = torch.nn.AdaptiveAvgPool2d(4)

    def forward(self, pixels):
        return self.pool(look(pixels))


def on_white():
    """`python:support.deadly_networks:on_white`, whose tap `pool.avg` has three values."""
    size = {"resize": (32, 32), "crop": (32, 32), "mode": "squash", "interpolation": "bilinear"}
    return Eye(), Preprocessing(**size, mean=(0.0,) * 3, std=(1.0,) * 3)
