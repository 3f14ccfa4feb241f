"""Images of which each band or channel is a file of its own, told by the ends of their names."""

import re
import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from headrace.pipelines.recipe.targets import name_some

# Ends of names: Sentinel and Landsat (B02, B8A_20m, SR_B4), microscopes (ch1, ch1sk1fk1fl1 of
# Operetta, w2 of MetaXpress), colours of stains (Human Protein Atlas) and of cameras. A number
# alone may be that of a photo, and b1 or c1 that of a copy or a camera.
_BAND = re.compile(
    r"(?P<image>.+)[-_ ](?P<band>(SR_)?B\d{1,2}A?(_\d0m)?|(?i:ch\d{1,2}(sk\d+fk\d+fl\d+)?|w\d"
    r"|red|green|blue|yellow|nir|red_?edge|swir\d?))"
)
_MIN_IMAGES = 2  # of one image alone, the names of its files might mean anything


@dataclass(frozen=True)
class BandFiles:
    """Images in files of one band each."""

    bands: tuple[str, ...]  # the ends of their names, sorted
    n_images: int
    example: str  # id of one file
    lacks_classes: bool  # whether each folder holds a single image, or fewer than two are named

    def message(self, folder: Path) -> str:
        """Return what the files are, and the command that stacks them."""
        folder_name = folder.absolute().name
        # Other names would need quotes within those of the command.
        is_plain = re.fullmatch(r"[\w.-]+", folder_name) is not None
        name = f"{folder_name}-stacked" if is_plain else "stacked"
        pattern = f"(.*)[-_ ]({'|'.join(map(re.escape, self.bands))})"
        suffix = PurePosixPath(self.example).suffix
        # Where the folders are those of single images, they would be taken for classes again.
        image_name = "m[1]" if self.lacks_classes else "f.parent / m[1]"
        script = (
            "import collections, pathlib, re, numpy as n; from PIL import Image as I; "
            "g = collections.defaultdict(list); "
            f"[g[{image_name}].append(f) for f in sorted(pathlib.Path().rglob('*{suffix}')) "
            f"for m in [re.fullmatch('{pattern}', f.stem)] if m]; "
            f"[((o := pathlib.Path('../{name}', f'{{k}}.npy')).parent.mkdir(parents=True, "
            "exist_ok=True), n.save(o, n.dstack([n.asarray(i.resize(max(j.size for j in s), 0)) "
            "for i in s]))) for k, v in g.items() for s in [[I.open(f) for f in v]]]"
        )
        stacked = folder.absolute().parent / name
        next_text = f"headrace init {shlex.quote(str(stacked))}"
        if self.lacks_classes:
            next_text = (
                f"write a CSV with the columns path ({name}/NAME.npy) and label, and name that"
            )
        return (
            f"each image seems to be {len(self.bands)} files, one per band or channel "
            f"({name_some(self.bands)}), such as {self.example}. To make one file of each "
            f'image, with its bands in this order, type in {folder} `python -c "{script}"`, then '
            f"{next_text}"
        )


def find_band_files(samples: pd.DataFrame) -> BandFiles | None:
    """Return the bands that images are divided into; None for whole images.

    They are divided if every file ends in the name of a band, and every image has the same ones.
    samples: with `id`, `path` and `label`.
    """
    bands_of_image: dict[tuple[str, str], list[str]] = defaultdict(list)
    images_of_label: dict[Any, set[tuple[str, str]]] = defaultdict(set)
    for image_id, label in zip(samples["id"], samples["label"], strict=True):
        path = PurePosixPath(image_id)
        match = _BAND.fullmatch(path.stem)
        if match is None:
            return None
        image = (str(path.parent), match["image"])
        bands_of_image[image].append(match["band"])
        if pd.notna(label):
            images_of_label[label].add(image)
    band_sets = {tuple(sorted(bands)) for bands in bands_of_image.values()}
    if len(bands_of_image) < _MIN_IMAGES or len(band_sets) > 1:
        return None
    (bands,) = band_sets
    if not 1 < len(bands) == len(set(bands)):
        return None
    lacks_classes = len(images_of_label) < 2 or all(
        len(images) == 1 for images in images_of_label.values()
    )
    return BandFiles(bands, len(bands_of_image), str(samples["id"].iloc[0]), lacks_classes)
