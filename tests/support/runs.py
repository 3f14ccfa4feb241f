"""Small made images, a recipe for them, and the command line as a user calls it."""

import dataclasses
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image
from support import forks

RECIPE = """\
images:
  folder: photos
task:
  folds: 3
backbones:
  - name: torchvision:resnet18
    weights: random:0
    image_size: 32
    crop_fraction: 1.0
    taps: [layer1.avg, layer2.max, layer4.avg]
heads:
  logistic:
    C: [0.01, 1]
  mlp:
    hidden: [[8]]
    dropout: [0]
    epochs: 5
compute:
  workers: 2
  images_per_shard: 16
"""
HEADS = (3 + 1) * 2 * 3 + 1 * 3  # logistic: (taps + all) x C x folds; mlp: all x folds


def make_photos(folder, n=60, seed=0):
    """Two classes that even random features tell apart: coarse and fine stripes, with noise."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        name = ("coarse", "fine")[i % 2]
        period = (16, 4)[i % 2]
        stripes = 128 + 80 * np.sign(np.sin(np.arange(40) * 2 * np.pi / period + rng.uniform(0, 6)))
        pixels = np.clip(stripes[None, :, None] + rng.normal(0, 20, (40, 40, 3)), 0, 255).astype(
            np.uint8
        )
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{i:03}.png")


def headrace(*arguments, cwd, timeout=300, env=None, first="", script="", text=True):
    """The command line as a user calls it, in a process of its own that had everything imported
    (forks.py).

    first: Python that is run in it before. script: a Python file that is run instead.
    """
    mode = "w+" if text else "w+b"
    with tempfile.TemporaryFile(mode) as out, tempfile.TemporaryFile(mode) as errors:
        call = forks.start(
            arguments, cwd=cwd, stdout=out, stderr=errors, env=env, first=first, script=script
        )
        try:
            call.wait(timeout)
        except BaseException:
            call.kill()
            raise
        said = []
        for file in (out, errors):
            file.seek(0)
            said.append(file.read())
    return subprocess.CompletedProcess(["headrace", *map(str, arguments)], call.returncode, *said)


def fresh_headrace(*arguments, cwd, timeout=300, env=None):
    """The command line in a fresh interpreter."""
    command = [sys.executable, "-m", "headrace.pipelines", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )


def counted(accounting):
    """The sum of all counts of an accounting, which is to be `found`."""
    counts = dataclasses.asdict(accounting)
    del counts["found"]
    n_left_out = sum(item["count"] for item in counts.pop("left_out"))
    return n_left_out + sum(counts.values())
