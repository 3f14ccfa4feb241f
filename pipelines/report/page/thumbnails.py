"""Small copies of images as data URIs, since the page must open without the images."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from headrace.extract.errors import ImageError
from headrace.extract.images.content_hashes import read_unchanged
from headrace.extract.images.crops import decode_picture
from headrace.extract.images.raw_pixels import PixelRange
from headrace.pipelines.report.page.blocks import Picture

SIDE = 384  # pixels: shown small, and enlarged by a click
# Images up to _SMALL pixels wide and high are enlarged without smoothing, so that their pixels
# show; up to about _ENLARGED_SIDE.
_SMALL = 48
_ENLARGED_SIDE = 144


@dataclass
class Thumbnails:
    """The images of a run by content hash, each read once.

    `missing` counts those that are no longer there.
    """

    paths: Mapping[str, str]
    pixel_range: PixelRange | None = None  # the run's: a picture looks as the network saw it
    missing: int = 0
    _made: dict[str, str | None] = field(default_factory=dict)

    def get(self, content: str) -> str | None:
        """Return a data URI; None if the file is gone or has other bytes than the run saw."""
        # One image may be a mistake, a likely label error and the darkest.
        if content not in self._made:
            self._made[content] = self._make(content)
            self.missing += self._made[content] is None
        return self._made[content]

    def picture(
        self,
        contents: Sequence[str],
        alt: Sequence[str],
        title: str,
        lines: tuple[tuple[str, str], ...],
    ) -> Picture:
        """Return one image, or several to compare, with its texts and, where known, its file."""
        paths = tuple(self.paths.get(content, "") for content in contents)
        return Picture(tuple(map(self.get, contents)), tuple(alt), title, lines, paths)

    def _make(self, content: str) -> str | None:
        try:
            path = self.paths[content]
            image = decode_picture(path, read_unchanged(path, content), self.pixel_range)
        # The image was moved or altered since the run: counted in `missing`, and told on the page.
        except (KeyError, OSError, ImageError):
            return None
        if max(image.size) <= _SMALL:
            # A whole number, so that all pixels stay equally large.
            scale = _ENLARGED_SIDE // max(image.size)
            image = image.resize(
                (image.width * scale, image.height * scale), Image.Resampling.NEAREST
            )
        else:
            image.thumbnail((SIDE, SIDE))
        stored = io.BytesIO()
        # Encoded anew, so that no metadata of the original (a place, a name) gets into the page.
        image.save(stored, "WEBP", quality=70, method=4)
        return "data:image/webp;base64," + base64.b64encode(stored.getvalue()).decode()
