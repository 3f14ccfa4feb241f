"""HEIF images (`.heic`, from phones), which Pillow reads with the plug-in pillow-heif."""

import functools
import importlib.util

_PLUGIN = "pillow_heif"
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def is_heif(head: bytes) -> bool:
    """Return whether a file's first 12 bytes are those of HEIF."""
    return head[4:8] == b"ftyp" and head[8:12] in _BRANDS


@functools.cache
def reads_heif() -> bool:
    """Return whether the plug-in is installed, without importing it."""
    return importlib.util.find_spec(_PLUGIN) is not None


@functools.cache
def register_heif() -> None:
    """Make the format known to Pillow if the plug-in is installed."""
    if reads_heif():
        importlib.import_module(_PLUGIN).register_heif_opener()
