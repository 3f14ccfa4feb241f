"""Image files written sample by sample, of every depth and type that a test needs; no library
writes them all.
"""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.extract.images.locators import array_bytes

Range = tuple[float, float]


def png(
    values: np.ndarray, depth: int, colour: int, transparent: Sequence[int] | None = None
) -> bytes:
    """A PNG of (H, W) or (H, W, C) samples; colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if depth >= 8:
        lines = [row.astype(f">u{depth // 8}").tobytes() for row in rows]
    else:
        bits = (rows[:, :, None] >> np.arange(depth - 1, -1, -1)) & 1
        lines = [
            line.tobytes()
            for line in np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
        ]
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    if transparent is not None:
        body += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    body += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff(
    values: np.ndarray,
    *,
    order: str = "<",
    photometric: int | None = 1,
    bits: int | None = None,
    extra: Sequence[int] = (),
    planes: bool = False,
    deflate: bool = False,
    orientation: int = 1,
) -> bytes:
    """A TIFF of one strip (or one for each plane); the type of `values` is the type of its samples.

    photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK. bits: 12 packs two values into
    three bytes.
    """
    height, width = values.shape[:2]
    samples = 1 if values.ndim == 2 else values.shape[2]
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    stored = values.astype(values.dtype.newbyteorder(order))
    strips = (
        [stored[:, :, channel].tobytes() for channel in range(samples)]
        if planes
        else [stored.tobytes()]
    )
    if bits == 12:
        packed = ((values.reshape(-1, 1) >> np.arange(11, -1, -1)) & 1).astype(np.uint8)
        strips = [np.packbits(packed.reshape(-1)).tobytes()]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    blob, offsets = b"", []
    for strip in strips:
        offsets.append(8 + len(blob))
        blob += strip + b"\0" * (len(strip) % 2)
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits or 8 * values.dtype.itemsize] * samples),
        259: ("H", [8 if deflate else 1]),
        273: ("I", offsets),
        274: ("H", [orientation]),
        277: ("H", [samples]),
        278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if planes else 1]),
        339: ("H", [sample_format] * samples),
    }
    if photometric is not None:
        tags[262] = ("H", [photometric])
    if extra:
        tags[338] = ("H", list(extra))
    start = 8 + len(blob)
    entries, beyond, place = b"", b"", start + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        body = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(body) > 4:
            beyond, body = beyond + body, struct.pack(f"{order}I", place + len(beyond))
        entries += struct.pack(
            f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)
        ) + body.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return (
        head
        + blob
        + struct.pack(f"{order}H", len(tags))
        + entries
        + struct.pack(f"{order}I", 0)
        + beyond
    )


def pnm(values: np.ndarray, magic: str, white: int) -> bytes:
    """A PGM (P2 digits, P5 bytes) or a PPM (P3, P6) whose header says that `white` is white."""
    height, width = values.shape[:2]
    head = f"{magic} # made by hand\n{width} {height}\n{white}\n".encode()
    if magic in ("P2", "P3"):
        return head + " ".join(map(str, values.reshape(-1).tolist())).encode() + b"\n"
    return head + values.astype(">u2" if white > 255 else "u1").tobytes()


@dataclass(frozen=True)
class Kind:
    """One kind of file: how its samples are written, and what black and white are by its format."""

    build: Callable[[np.ndarray], bytes]
    dtype: str
    own: Range | None  # None: the format does not say
    channels: int = 1  # 2: grey and alpha, 4: colours and alpha
    inverted: bool = False
    reaches: bool = True  # whether pixel_range applies: not to 8 bits and fewer

    def draw(self, seed: int, height: int = 5, width: int = 7) -> np.ndarray:
        """Samples over the whole of the kind's range, with both ends; of floats and wide integers
        some around zero.
        """
        rng = np.random.default_rng(seed)
        shape = (height, width) if self.channels == 1 else (height, width, self.channels)
        if self.own is not None:
            values = rng.integers(int(self.own[0]), int(self.own[1]) + 1, shape)
            values.flat[0], values.flat[-1] = self.own
        else:
            values = rng.normal(0, 10.0 ** rng.integers(-2, 3), shape)
            if self.dtype.lstrip("<>")[0] == "u":
                values = np.abs(values)
        info = np.iinfo(self.dtype) if np.dtype(self.dtype).kind in "iu" else None
        return (values if info is None else values.clip(info.min, info.max)).astype(self.dtype)


def _kinds() -> dict[str, Kind]:
    kinds = {
        f"PNG grey {depth}": Kind(
            lambda v, d=depth: png(v, d, 0), "u1", (0, 2**depth - 1), reaches=False
        )
        for depth in (1, 2, 4, 8)
    }
    kinds["PNG grey 16"] = Kind(lambda v: png(v, 16, 0), "u2", (0, 65535))
    for name, colour, channels in (("RGB", 2, 3), ("grey and alpha", 4, 2), ("RGBA", 6, 4)):
        kinds[f"PNG {name} 8"] = Kind(
            lambda v, c=colour: png(v, 8, c), "u1", (0, 255), channels, reaches=False
        )
        kinds[f"PNG {name} 16"] = Kind(
            lambda v, c=colour: png(v, 16, c), "u2", (0, 65535), channels
        )
    for white in (1, 15, 100, 254, 255, 256, 1023, 4095, 65535):
        dtype, wide = ("u2", True) if white > 255 else ("u1", False)
        for magic, channels in (("P2", 1), ("P5", 1), ("P3", 3), ("P6", 3)):
            kinds[f"{magic} white {white}"] = Kind(
                lambda v, m=magic, w=white: pnm(v, m, w), dtype, (0, white), channels, reaches=wide
            )
    for order in "<>":
        for deflate in (False, True):
            name = f"TIFF {'little' if order == '<' else 'big'} endian{', deflate' * deflate}"
            options = {"order": order, "deflate": deflate}
            kinds[f"{name}, uint8"] = Kind(
                lambda v, o=options: tiff(v, **o), "u1", (0, 255), reaches=False
            )
            kinds[f"{name}, uint16"] = Kind(lambda v, o=options: tiff(v, **o), "u2", (0, 65535))
            for dtype in ("i1", "i2", "i4", "f4", *(["u4"] if order == "<" else [])):
                kinds[f"{name}, {np.dtype(dtype).name}"] = Kind(
                    lambda v, o=options: tiff(v, **o), dtype, None
                )
            for dtype, own in (
                ("u1", (0, 255)),
                ("f4", None),
                *([("u2", (0, 65535))] if order == "<" else []),
            ):
                kinds[f"{name}, white is zero, {np.dtype(dtype).name}"] = Kind(
                    lambda v, o=options: tiff(v, photometric=0, **o),
                    dtype,
                    own,
                    inverted=True,
                    reaches=dtype != "u1",
                )
            for planes in (False, *([] if deflate else [True])):
                for channels, extra in ((3, ()), (4, (2,))):
                    kinds[f"{name}, {channels} x uint16{', planes' * planes}"] = Kind(
                        lambda v, o=options, p=planes, e=extra: tiff(
                            v, photometric=2, planes=p, extra=e, **o
                        ),
                        "u2",
                        (0, 65535),
                        channels,
                    )
    kinds["TIFF 12 bit"] = Kind(lambda v: tiff(v[:, :6], bits=12), "u2", (0, 4095))
    own_ranges = {"?": (0, 1), "u1": (0, 255), "<u2": (0, 65535), ">u2": (0, 65535)}
    for dtype in ("?", "u1", "<u2", ">u2", "i1", "<i2", ">i4", "u4", "i8", "u8", "f2", ">f4", "f8"):
        for channels in (1, 3, 4):
            kinds[f"npy {np.dtype(dtype).name} {dtype} x {channels}"] = Kind(
                array_bytes,
                dtype,
                own_ranges.get(dtype),
                channels,
                reaches=dtype not in ("?", "u1"),
            )
    return kinds


KINDS = _kinds()


def encoded(image: object, kind: str, **options: object) -> bytes:
    """A Pillow image as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[attr-defined]
    return stream.getvalue()
