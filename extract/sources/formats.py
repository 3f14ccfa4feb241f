"""Recognition of images, by suffix or by their first bytes, and names of other formats."""

import os
from pathlib import Path

from headrace.extract.errors import ImageError
from headrace.extract.images.decoding import array_shape
from headrace.extract.images.heif import is_heif, reads_heif

# What Pillow decodes and people keep data sets in.
IMAGE_SUFFIXES = frozenset(
    {
        *(
            ".jpg",
            ".jpeg",
            ".jpe",
            ".jfif",
            ".jif",
            ".png",
            ".apng",
            ".webp",
            ".tif",
            ".tiff",
            ".bmp",
            ".dib",
        ),
        *(".gif", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"),
    }
)
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})

TABLE_SUFFIXES = frozenset(
    {".csv", ".tsv", ".tab", ".txt", ".parquet", ".pq", ".jsonl", ".ndjson", ".json"}
)
MAYBE_TABLES = frozenset({".txt", ".json"})  # more often something else
ARRAY_KINDS = {".npy": "npy", ".npz": "npz", ".h5": "h5", ".hdf5": "h5", ".hdf": "h5"}
_LONGEST_ARRAY_HEADER = 10_256  # bytes; NumPy reads no longer ones
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz")

# Formats that people keep images in and that are not read here: {suffix: (its name, how to convert
# it)}.
_CONVERT_VIDEO = "write its frames as images, for example: ffmpeg -i FILE frames/%05d.png"
_CONVERT_RAW = "develop it to TIFF or JPEG, for example: dcraw -T FILE"
OTHER_FORMATS = {
    **dict.fromkeys(
        (".heic", ".heif", ".hif"),
        ("HEIF image", "pip install pillow-heif, and headrace reads it; or convert to JPEG"),
    ),
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
        ("camera raw", _CONVERT_RAW),
    ),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"), ("video", _CONVERT_VIDEO)),
    **dict.fromkeys(
        (".dcm", ".dicom"),
        ("DICOM", "write PNG or .npy, for example with pydicom: dcmread(FILE).pixel_array"),
    ),
    **dict.fromkeys(
        (".nii", ".mha", ".nrrd"),
        ("medical volume", "write its slices as .npy, for example with nibabel"),
    ),
    **dict.fromkeys(
        (".svs", ".ndpi", ".mrxs", ".scn"),
        ("whole-slide image", "write tiles, for example with openslide: read_region"),
    ),
    **dict.fromkeys(
        (".tfrecord", ".tfrecords"), ("TFRecord", "write the images as files or tar shards")
    ),
    **dict.fromkeys((".mdb", ".lmdb"), ("LMDB", "write the images as files or tar shards")),
    **dict.fromkeys(
        (".rec", ".beton"), ("RecordIO or FFCV file", "write the images as files or tar shards")
    ),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".pth"),
        ("Python pickle", "save its arrays: numpy.savez(FILE, images=..., labels=...)"),
    ),
    ".mat": (
        "MATLAB file",
        "save its arrays: scipy.io.loadmat, then numpy.savez(FILE, images=..., labels=...)",
    ),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), ("spreadsheet", "save it as CSV (UTF-8)")),
    **dict.fromkeys((".svg", ".eps", ".ps", ".pdf"), ("vector graphic", "render it as PNG")),
    ".psd": ("Photoshop document", "export it as PNG or TIFF"),
    ".xml": ("XML annotation", "write a CSV with the columns path and label"),
    **dict.fromkeys(
        (".7z", ".rar"), ("compressed archive", "unpack it, or pack it as .zip or .tar")
    ),
    **dict.fromkeys((".zst", ".lz4"), ("compressed file", "decompress it first")),
}


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Return whether a file, by its name, is a tar, compressed tar or zip archive."""
    return os.fspath(path).lower().endswith((*TAR_ENDINGS, ".zip"))


def is_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an image: by its suffix, else by its first bytes (`photo.jpg.1`,
    names without a suffix).
    """
    suffix = os.path.splitext(path)[1].lower()  # as Path has it, without parsing the rest
    if suffix in IMAGE_SUFFIXES:
        return True
    if suffix in HEIF_SUFFIXES:
        return reads_heif()
    if (
        suffix in OTHER_FORMATS
        or suffix in TABLE_SUFFIXES
        or suffix in ARRAY_KINDS
        or is_archive(path)
    ):
        return False
    try:
        with open(path, "rb") as file:
            return has_image_signature(file.read(32))
    except OSError:
        return False


def is_image_array(path: str | Path) -> bool:
    """Return whether an `.npy` file among images holds one image of several bands, (H, W, C) or
    (C, H, W): three axes, of which the first or the last is shorter than both others.

    Other arrays there hold many images, labels or features.
    """
    if os.path.splitext(path)[1].lower() != ".npy":
        return False
    try:
        with open(path, "rb") as array_file:
            shape = array_shape(array_file.read(_LONGEST_ARRAY_HEADER))
    except (ImageError, OSError):
        return False
    return len(shape) == 3 and (shape[2] < min(shape[:2]) or shape[0] < min(shape[1:]))


def has_image_signature(head: bytes) -> bool:
    """Return whether a file's first 32 bytes are those of a format in IMAGE_SUFFIXES, or of HEIF
    where it can be read.
    """
    if head.startswith(
        (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0")
    ):
        return True
    if head.startswith((b"\0\0\0\x0cjP  ", b"RIFF")):
        return head[:4] != b"RIFF" or head[8:12] == b"WEBP"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b"\n\r\t ":
        return len(head) > 3
    # two letters are too few: the size of the next header must be one that there is
    if head[:2] == b"BM":
        return head[14:18] in {
            size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)
        }
    if head[4:8] == b"ftyp":
        return head[8:12] in (b"avif", b"avis") or (is_heif(head) and reads_heif())
    return False


def unread_format(path: str | Path) -> str | None:
    """Say what a file in OTHER_FORMATS is and how to convert it; None for others."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in OTHER_FORMATS:
        return None
    kind, cure = OTHER_FORMATS[suffix]
    return f"{path} is a {kind}, which is not read here: {cure}"


def describe_suffix(name: str) -> str:
    """Describe a file that is left out, by its name, with how to use it:

    ".heic (HEIF image: pip install …)".
    """
    suffix = Path(name).suffix.lower()
    if suffix in OTHER_FORMATS:
        kind, cure = OTHER_FORMATS[suffix]
        return f"{suffix} files ({kind}: {cure})"
    if is_archive(name):
        return f"{suffix} archives (name the archive itself to read the images in it)"
    if suffix in ARRAY_KINDS:
        return f"{suffix} arrays (name the file itself to read the images in it)"
    if suffix in TABLE_SUFFIXES - MAYBE_TABLES:
        return f"{suffix} tables (name the file itself to read it)"
    return f"{suffix} files (no image)" if suffix else "files without a suffix (no image)"
