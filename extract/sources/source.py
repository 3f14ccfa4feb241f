"""A source of images, as a recipe or a caller describes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headrace.cache.home import expand_home
from headrace.extract.errors import SourceError
from headrace.extract.sources.detections import MIN_CONFIDENCE
from headrace.extract.sources.layout import Layout
from headrace.extract.sources.regions import Boxes, Tiles

SourceKind = Literal["folder", "table", "archive", "array", "image"]


@dataclass(frozen=True)
class ImageSource:
    """Where images are and how to read them; the recipe's section `images`.

    None means that the reader decides.
    """

    kind: SourceKind
    location: str | Path | Sequence[str | Path]  # several: archives, from Python
    layout: Layout = "auto"  # of folders, on disk or in archives, see `read_layout`
    exclude: tuple[str, ...] = ()  # shell patterns of ids, or of folders that they lie in
    # Of a folder: a regular expression, searched for in ids, whose named groups become columns;
    # images whose ids it does not match are left out.
    name_pattern: str | None = None
    # Of a table, as are the next three. None: see `find_image_column`.
    path_column: str | None = None
    id_column: str | None = None  # None: `id` if there is such a column, else the path as written
    root: str | Path | None = None  # folder of relative paths; None: the table's own
    path_pattern: str | None = None  # a path with columns in braces: train/{id}.jpg
    # The array in a `.npz` or HDF5 file. Not needed if only one can be images, or if there is one
    # for each side of a split, with names as MedMNIST's `train_images` and `train_labels` or
    # Keras's `x_train` and `y_train`.
    array_key: str | None = None
    # Another file of arrays, with one label or a row of labels for each image.
    labels: str | Path | None = None
    labels_key: str | None = None  # the array of labels in that file, or in the same file
    pixel_range: tuple[float, float] | None = None  # black and white, if pixels are not 8 bits
    boxes: Boxes | Literal["auto", "none"] = "auto"  # of a table's rows
    tiles: Tiles | None = None  # that images are cut into
    detections: Path | None = None  # MegaDetector's results, whose boxes are the rows
    min_confidence: float = MIN_CONFIDENCE

    @property
    def path(self) -> Path:
        """The location, `~` expanded. Raises SourceError for several, which only archives are."""
        if not isinstance(self.location, str | Path):
            raise SourceError(f"{len(self.location)} locations of a {self.kind}: give one of them")
        return expand_home(self.location)
