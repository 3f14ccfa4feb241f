"""Image files that are whole, broken, or odd."""

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

from headrace.extract.images.locators import array_bytes


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    """Smooth, and different in every corner and channel, so that lossy formats stay close and turns
    are seen.
    """
    x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def malformed_corpus() -> list[bytes]:
    """At least 300 files that are broken, odd, or neither: cut, flipped, spliced, mislabelled and
    strange.
    """
    draw = random.Random(0)
    picture = gradient(64, 48)
    wholes = [
        encoded(picture, "JPEG"),
        encoded(picture, "JPEG", progressive=True),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture, "PNG"),
        encoded(picture.convert("RGBA"), "PNG"),
        encoded(picture.quantize(16), "PNG"),
        encoded(Image.fromarray(np.arange(3072, dtype=np.uint16).reshape(48, 64)), "PNG"),
        encoded(picture, "WEBP"),
        encoded(picture, "TIFF", compression="tiff_lzw"),
        encoded(picture, "BMP"),
        encoded(picture, "GIF"),
        array_bytes(np.asarray(picture)),
    ]
    corpus: list[bytes] = []
    for whole in wholes:
        corpus += [whole[: len(whole) * part // 10] for part in range(0, 10, 2)]
        for _ in range(14):
            broken = bytearray(whole)
            for _ in range(draw.choice((1, 4, 32))):
                broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
            corpus.append(bytes(broken))
        for _ in range(4):  # damage where the structure is
            broken = bytearray(whole)
            for _ in range(3):
                broken[draw.randrange(min(64, len(broken)))] = draw.randrange(256)
            corpus.append(bytes(broken))
        other = draw.choice(wholes)
        corpus.append(whole[: len(whole) // 2] + other[len(other) // 2 :])
        corpus.append(whole + draw.randbytes(100))
        corpus.append(whole)
    corpus += [
        b"",
        b"\0" * 1000,
        b"GIF89a",
        b"BM",
        b"RIFF\0\0\0\0WEBP",
        bomb(60_000, 60_000),
        bomb(1, 1),
        bomb(0, 5),
    ]
    corpus += [draw.randbytes(size) for size in (1, 10, 100, 1000, 10_000)]
    corpus += [
        encoded(Image.new(mode, (3, 5)), "TIFF")
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "LAB")
    ]
    corpus += [
        encoded(Image.new("RGB", size), "PNG") for size in ((1, 1), (1, 500), (500, 1), (7, 3))
    ]
    return list(dict.fromkeys(corpus))
