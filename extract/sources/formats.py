"""Recognition of images, by suffix or by their first bytes, and names of other formats."""

import contextlib
import os
import re
from pathlib import Path

from headrace.extract.errors import ImageError
from headrace.extract.images.heif import is_heif, reads_heif
from headrace.extract.images.raw_pixels import MAX_ARRAY_HEADER_BYTES, array_shape

# Formats that Pillow decodes and data sets are kept in.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".tif", ".tiff"}
    | {".bmp", ".dib", ".gif", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"}
)
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
# Images by their content that repeat the image whose name they begin with: GDAL's overviews
# (1.tif.ovr), ExifTool's backups (1.jpg_original), and editors'.
_REPEATED_IMAGE = re.compile(
    rf"({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES | HEIF_SUFFIXES)))})"
    r"(\.ovr|\.bak|\.orig|_original|~)$",
    re.IGNORECASE,
)

TABLE_SUFFIXES = frozenset(
    {".csv", ".tsv", ".tab", ".txt", ".parquet", ".pq", ".jsonl", ".ndjson", ".json"}
    | {".manifest"}  # SageMaker's JSON lines
)
MAYBE_TABLES = frozenset({".txt", ".json", ".manifest"})  # more often something else
ARRAY_KINDS = {".npy": "npy", ".npz": "npz", ".h5": "h5", ".hdf5": "h5", ".hdf": "h5"}
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz")

# The cures in OTHER_FORMATS below that several suffixes share.
_CONVERT_VIDEO = "write its frames as images, for example: ffmpeg -i FILE frames/%05d.png"
_CONVERT_RAW = "develop it to TIFF or JPEG, for example: dcraw -T FILE"
_DICOM = ("DICOM", "write its pixels beside it")
_JPEG_XL = ("JPEG XL image", "convert it, for example: djxl FILE FILE.png")
_PICKLE = (
    "Python pickle, which could run any code",
    "save its arrays: numpy.savez(FILE, images=..., labels=...)",
)
# Formats that images are kept in and that are not read here: {suffix: (name, how to convert it)}.
OTHER_FORMATS = {
    **dict.fromkeys(
        (".heic", ".heif", ".hif"),
        ("HEIF image", "pip install pillow-heif, and headrace reads it; or convert to JPEG"),
    ),
    ".jxl": _JPEG_XL,
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
        ("camera raw", _CONVERT_RAW),
    ),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"), ("video", _CONVERT_VIDEO)),
    **dict.fromkeys((".dcm", ".dicom"), _DICOM),
    **dict.fromkeys((".nii", ".nii.gz", ".mgz"), ("medical volume", "write its slices beside it")),
    **dict.fromkeys(
        (".mha", ".mhd", ".nrrd"),
        ("volume of ITK", "write its slices as .npy, for example with SimpleITK"),
    ),
    **dict.fromkeys(
        (".svs", ".ndpi", ".mrxs", ".scn"),
        ("whole-slide image", "write a level of it as TIFF, and cut that with images.tiles"),
    ),
    **dict.fromkeys(
        (".czi", ".lif", ".nd2", ".oib", ".oif", ".vsi"),
        ("microscope file", "save it as TIFF, in Fiji or with bfconvert FILE FILE.ome.tif"),
    ),
    **dict.fromkeys(
        (".tfrecord", ".tfrecords"), ("TFRecord", "write the images as files or tar shards")
    ),
    **dict.fromkeys((".mdb", ".lmdb"), ("LMDB", "write the images as files or tar shards")),
    **dict.fromkeys(
        (".rec", ".beton"), ("RecordIO or FFCV file", "write the images as files or tar shards")
    ),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth"), _PICKLE),
    ".mat": (
        "MATLAB file",
        "save its arrays: scipy.io.loadmat, then numpy.savez(FILE, images=..., labels=...)",
    ),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), ("spreadsheet", "save it as CSV (UTF-8)")),
    **dict.fromkeys((".svg", ".eps", ".ps", ".pdf"), ("vector graphic", "render it as PNG")),
    ".psd": ("Photoshop document", "export it as PNG or TIFF"),
    ".xml": (
        "XML annotation",
        "export it as COCO (for boxes), from CVAT also as ImageNet (a folder for each class); or "
        "write a CSV with the columns path and label",
    ),
    **dict.fromkeys(
        (".7z", ".rar"), ("compressed archive", "unpack it, or pack it as .zip or .tar")
    ),
    **dict.fromkeys((".zst", ".lz4"), ("compressed file", "decompress it first")),
}
_VOC_COMMAND = (
    '`python -c "import csv, glob; from xml.etree import ElementTree as E; '
    "w = csv.writer(open('objects.csv', 'w')); e = ['xmin', 'ymin', 'xmax', 'ymax']; "
    "w.writerow(['path', 'label', *e]); [w.writerow(['JPEGImages/' + r.findtext('filename'), "
    "o.findtext('name'), *(o.findtext('bndbox/' + k) for k in e)]) for f in "
    "sorted(glob.glob('Annotations/*.xml')) for r in [E.parse(f)] for o in r.iter('object')]\"`, "
    "then `headrace init objects.csv`"
)
_LABELME_COMMAND = (
    "`python -c \"import csv, glob, json; w = csv.writer(open('objects.csv', 'w')); "
    "w.writerow(['path', 'label', 'xmin', 'ymin', 'xmax', 'ymax']); [w.writerow([r['imagePath'], "
    "s['label'], min(x), min(y), max(x), max(y)]) for f in sorted(glob.glob('*.json')) for r in "
    "[json.load(open(f))] for s in r['shapes'] for x, y in [zip(*s['points'])]]\"`, then "
    "`headrace init objects.csv`"
)
_CAMTRAP_DP_COMMAND = (
    "`python -c \"import pandas as p; m, o = (p.read_csv(f, dtype=str) for f in ('media.csv', "
    "'observations.csv')); o.merge(m.drop(columns='deploymentID'), on='mediaID').rename("
    "columns={'filePath': 'path', 'scientificName': 'species'})[['path', 'species', "
    "'deploymentID']].dropna().drop_duplicates().to_csv('species.csv', index=False)\"`, then "
    "`headrace init species.csv`"
)
_YOLO_COMMAND = (
    "`python -c \"import csv, glob, yaml; n = yaml.safe_load(open('data.yaml'))['names']; "
    "w = csv.writer(open('objects.csv', 'w')); "
    "w.writerow(['path', 'label', 'x_center', 'y_center', 'width', 'height']); "
    "[w.writerow([i, n[int(c)], *b]) for f in sorted(glob.glob('**/labels/**/*.txt', "
    "recursive=True)) for i in glob.glob(glob.escape(f[:-4].replace('labels', 'images', 1)) "
    "+ '.*') for c, *b in map(str.split, open(f)) if len(b) == 4]\"`, then "
    "`headrace init objects.csv`"
)
# {name of a format: commands that convert it}, each tried with the libraries that it needs.
_COMMANDS = {
    "XML annotation": f"For the boxes of Pascal VOC, in the folder of JPEGImages, {_VOC_COMMAND}",
    "TFRecord": "Type `pip install tfrecord`, then, with the keys of your records, `python -c "
    "\"import pathlib, sys, tfrecord; [((d := pathlib.Path('photos', "
    "str(r['image/class/label'].item()))).mkdir(parents=True, exist_ok=True), "
    "(d / f'{k}-{n}.jpg').write_bytes(r['image/encoded'])) for k, f in enumerate(sys.argv[1:]) "
    'for n, r in enumerate(tfrecord.tfrecord_loader(f, None))]" FILES`',
    "LMDB": "Where its values are image files: type `pip install lmdb`, then `python -c "
    "\"import lmdb, os, pathlib, sys; d = pathlib.Path('photos'); d.mkdir(); "
    "[(d / k.decode().replace('/', '_')).write_bytes(v) for k, v in lmdb.open(sys.argv[1], "
    'readonly=True, lock=False, subdir=os.path.isdir(sys.argv[1])).begin().cursor()]" FOLDER`, and '
    "write a CSV with the columns path and label",
    "DICOM": 'Type `pip install pydicom`, then `python -c "import sys, numpy, pydicom; [numpy.save('
    "f + '.npy', numpy.atleast_3d(pydicom.dcmread(f).pixel_array)) for f in sys.argv[1:]]\" FILES`",
    "medical volume": 'Type `pip install nibabel`, then `python -c "import sys, numpy, nibabel; '
    "[numpy.save(f'{f}.{z}.npy', s[..., None]) for f in sys.argv[1:] for z, s in "
    "enumerate(nibabel.load(f).get_fdata().astype('float32').T)]\" FILES`",
    "whole-slide image": "Type `pip install openslide-python openslide-bin`, then `python -c "
    "\"import sys, openslide; [s.read_region((0, 0), n, s.level_dimensions[n]).convert('RGB').save("
    "f + '.tif') for f in sys.argv[1:] for s in [openslide.OpenSlide(f)] for n in "
    '[s.get_best_level_for_downsample(4)]]" FILES`',
    _PICKLE[0]: 'For CIFAR, in the folder above it, `python -c "import numpy, torchvision; a, b = '
    "(torchvision.datasets.CIFAR10('.', train=t) for t in (True, False)); "
    "numpy.savez('cifar10.npz', train_images=a.data, train_labels=numpy.take(a.classes, a.targets),"
    ' test_images=b.data, test_labels=numpy.take(b.classes, b.targets))"`',
}
# {(offset, bytes at it): format}, for formats whose files often have no suffix.
_SIGNATURES = {
    (128, b"DICM"): _DICOM,
    (0, b"\xff\x0a"): _JPEG_XL,
    (0, b"\0\0\0\x0cJXL "): _JPEG_XL,
    **{(0, bytes((0x80, protocol))): _PICKLE for protocol in range(2, 6)},
}


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Return whether a file, by its name, is a tar, compressed tar or zip archive."""
    return os.fspath(path).lower().endswith((*TAR_ENDINGS, ".zip"))


def repeats_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file, by its name, is a tool's smaller or older copy of the image beside it,
    which is the same image once more.
    """
    return _REPEATED_IMAGE.search(os.fspath(path)) is not None


def is_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an image, by its suffix.

    Files with an unknown suffix or none (`photo.jpg.1`) are judged by their first bytes.
    """
    suffix = os.path.splitext(path)[1].lower()  # not Path.suffix, which parses the whole path
    if suffix in IMAGE_SUFFIXES:
        return True
    if suffix in HEIF_SUFFIXES:
        return reads_heif()
    if (
        suffix in OTHER_FORMATS
        or suffix in TABLE_SUFFIXES
        or suffix in ARRAY_KINDS
        or is_archive(path)
        or repeats_image(path)
    ):
        return False
    try:
        with open(path, "rb") as file:
            return has_image_signature(file.read(32))
    except OSError:
        return False


def is_image_array(path: str | Path) -> bool:
    """Return whether an `.npy` file among images holds one image of several bands.

    It does if it has three axes, (H, W, C) or (C, H, W), of which the first or the last is shorter
    than both others. Other arrays hold many images, labels or features.
    """
    if os.path.splitext(path)[1].lower() != ".npy":
        return False
    try:
        with open(path, "rb") as array_file:
            shape = array_shape(array_file.read(MAX_ARRAY_HEADER_BYTES))
    except (ImageError, OSError):
        return False
    return len(shape) == 3 and (shape[2] < min(shape[:2]) or shape[0] < min(shape[1:]))


def has_image_signature(head: bytes) -> bool:
    """Return whether 32 bytes are the beginning of an image, HEIF only if it can be read here."""
    if head.startswith(
        (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0")
    ):
        return True
    if head.startswith((b"\0\0\0\x0cjP  ", b"RIFF")):
        return head[:4] != b"RIFF" or head[8:12] == b"WEBP"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b"\n\r\t ":
        return len(head) > 3
    # Many texts begin with BM, so the size of the header that follows must be one of a BMP file.
    if head[:2] == b"BM":
        return head[14:18] in {
            size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)
        }
    if head[4:8] == b"ftyp":
        return head[8:12] in (b"avif", b"avis") or (is_heif(head) and reads_heif())
    return False


def unread_format(path: str | Path) -> str | None:
    """Return the message for a file in one of OTHER_FORMATS, with how to convert it; None for
    other files.
    """
    kind, cure = OTHER_FORMATS.get(_suffix(path)) or _format_of_content(path) or (None, None)
    if kind is None:
        return None
    command = _COMMANDS.get(kind)
    return f"{path} is not read here ({kind}): {cure}{f'. {command}' if command else ''}"


def annotation_files(folder: Path) -> str | None:
    """Say what boxes of Pascal VOC, YOLO or LabelMe, or observations of Camtrap DP, a folder holds,
    and what makes a table of them; None where there are none.
    """
    if (folder / "media.csv").is_file() and (folder / "observations.csv").is_file():
        return (
            "a package of Camtrap DP, whose images and observations are two tables. In that "
            f"folder, {_CAMTRAP_DP_COMMAND}"
        )
    first_json = next((path for path in folder.glob("*.json") if path.is_file()), None)
    if first_json and b'"imagePath"' in (text := first_json.read_bytes()) and b'"shapes"' in text:
        return f"shapes of LabelMe, a JSON file for each image. In that folder, {_LABELME_COMMAND}"
    if any(folder.glob("Annotations/*.xml")) and (folder / "JPEGImages").is_dir():
        return f"boxes of Pascal VOC, an XML file for each image. In that folder, {_VOC_COMMAND}"
    if any(folder.glob("labels/**/*.txt")) or any(folder.glob("*/labels/*.txt")):
        return (
            "boxes of YOLO, a text file for each image. In that folder, with the names of the "
            f"classes in data.yaml, {_YOLO_COMMAND}"
        )
    return None


def _suffix(path: str | Path) -> str:
    name, suffix = os.path.splitext(os.fspath(path).lower())
    # as TensorFlow names shards; images of such names are known by their content
    if re.fullmatch(r".*(\.tfrecords?)?-\d{5}-of-\d{5}", os.fspath(path).lower()):
        return ".tfrecord"
    return ".nii.gz" if suffix == ".gz" and name.endswith(".nii") else suffix


def _format_of_content(path: str | Path) -> tuple[str, str] | None:
    head = b""
    with contextlib.suppress(OSError):
        if os.path.isfile(path):  # reading a pipe would wait
            with open(path, "rb") as file:
                head = file.read(132)
    return next(
        (
            other_format
            for (offset, signature), other_format in _SIGNATURES.items()
            if head[offset:].startswith(signature)
        ),
        None,
    )


def describe_suffix(name: str) -> str:
    """Describe a file that is left out and how to use it: ".heic (HEIF image: pip install …)"."""
    suffix = _suffix(name)
    if repeats_image(name):
        return "copies that tools keep beside an image (overviews, backups)"
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
