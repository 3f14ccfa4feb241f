"""Images for benchmarks, as many as wanted and of graded relevance to one another: letters,
symbols, textures.

Glyphs of the fonts that matplotlib brings along, turned, sheared, scaled and shifted, on a
background of waves and noise.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

SIZE = 24  # pixels of a side
_LARGE = 64  # of a glyph before it is turned
_FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique")  # these hold letters and symbols
_UPPER = "ABDEFGHJKLMNPQRTUVWYZabdefghijkmnqrty"
_GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρσφψω"
_CYRILLIC = "БГДЖИЛЦЧШЩЪЫЭЮЯбвджзйклцчшщыэюя"
_SYMBOLS = "".join(
    map(
        chr,
        [
            *range(0x2190, 0x21B8),
            *range(0x2200, 0x2240),
            *range(0x25A0, 0x25D8),
            *range(0x2660, 0x2670),
        ],
    )
)


def alphabets() -> dict[str, tuple[str, str]]:
    """By kind, glyphs to pretrain on and glyphs for tasks: no glyph is in both."""
    found = {}
    for kind, glyphs in (("letters", _UPPER + _GREEK + _CYRILLIC), ("symbols", _SYMBOLS)):
        order = np.random.default_rng(0).permutation(len(glyphs))
        half = len(glyphs) // 2
        found[kind] = (
            "".join(glyphs[k] for k in order[:half]),
            "".join(glyphs[k] for k in order[half:]),
        )
    return found


def glyph_images(
    glyphs: Sequence[str], count: int, rng: np.random.Generator, *, clean: bool = False
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(count, SIZE, SIZE, 3) pixels and (count,) classes, in turn. clean: upright, in the middle,
    without background.
    """
    target = np.arange(count) % len(glyphs)
    ink = np.empty((count, SIZE, SIZE), np.float32)
    for place, number in enumerate(target):
        face = _FACES[int(rng.integers(len(_FACES)))]
        turn, shear = (0.0, 0.0) if clean else (rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.3))
        scale, shift = (
            (1.0, np.zeros(2)) if clean else (rng.uniform(0.75, 1.3), rng.uniform(-6, 6, 2))
        )
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array(
            [[1, shear], [0, 1]]
        )
        matrix *= _LARGE / SIZE / scale
        offset = _LARGE / 2 - matrix @ np.full(2, SIZE / 2) + shift
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        drawn = _drawn(glyphs[number], face).transform(
            (SIZE, SIZE),
            Image.Transform.AFFINE,
            tuple(map(float, coefficients)),
            Image.Resampling.BILINEAR,
        )
        ink[place] = np.asarray(drawn, np.float32) / 255
    return _on_background(ink, rng, clean=clean), target


def texture_images(
    count: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(count, SIZE, SIZE, 3) pixels and (count,) classes: waves of eight directions and four
    lengths.
    """
    target = np.arange(count) % 32
    angle = (target % 8) * np.pi / 8 + rng.uniform(-0.15, 0.15, count)
    length = np.array([3.0, 4.5, 7.0, 11.0])[target // 8] * rng.uniform(0.9, 1.1, count)
    waves = _waves(angle, length, rng.uniform(0, 2 * np.pi, count))
    return _on_background(waves / 2 + 0.5, rng), target


@functools.cache
def _drawn(glyph: str, face: str) -> Image.Image:
    font = ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"), 44
    )
    canvas = Image.new("L", (_LARGE, _LARGE))
    ImageDraw.Draw(canvas).text((_LARGE / 2, _LARGE / 2), glyph, 255, font, anchor="mm")
    return canvas


def _waves(
    angle: npt.NDArray[np.float64], length: npt.NDArray[np.float64], phase: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    y, x = np.mgrid[:SIZE, :SIZE]
    across = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    return np.sin(2 * np.pi * across / length[:, None, None] + phase[:, None, None]).astype(
        np.float32
    )


def _on_background(
    ink: npt.NDArray[np.float32], rng: np.random.Generator, *, clean: bool = False
) -> npt.NDArray[np.uint8]:
    count = len(ink)
    if clean:
        values = ink
    else:
        ground = 0.15 * _waves(
            rng.uniform(0, np.pi, count),
            rng.uniform(5, 25, count),
            rng.uniform(0, 2 * np.pi, count),
        )
        contrast = rng.uniform(0.35, 0.8, count) * rng.choice(
            [-1, 1], count
        )  # dark on light, or light on dark
        values = 0.5 - contrast[:, None, None] / 2 + contrast[:, None, None] * ink + ground
        values = values + rng.normal(0, 0.08, ink.shape)
    return np.repeat((np.clip(values, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=3)
