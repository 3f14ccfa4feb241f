"""Rectangles of a large TIFF: only the tiles and strips that they touch are decoded."""

import math
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.extract.errors import ImageError
from headrace.extract.images.opening import check_size, decoding_reason

_KEPT_BYTES = 2**26  # of decoded tiles and strips, because neighbouring rectangles share them


class TiffWindows:
    """The samples (H, W, C) of a page of a TIFF, like an array that is indexed by
    `[top:bottom, left:right]` only.

    page: tifffile's. data: the bytes of the file. Safe to use from several threads. Raises
    ImageError, also when it is indexed.
    """

    def __init__(self, page: Any, data: bytes) -> None:
        self.shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
        self.dtype = page.dtype
        self._page, self._data = page, data
        is_tiled = page.is_tiled
        # A segment is a tile or a strip. They are numbered plane by plane (planarconfig 2: a plane
        # for each channel), each from left to right and then down.
        self._length = page.tilelength if is_tiled else min(page.rowsperstrip, page.imagelength)
        self._width = page.tilewidth if is_tiled else page.imagewidth
        self._n_planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self._n_down = math.ceil(page.imagelength / self._length)
        self._n_across = math.ceil(page.imagewidth / self._width)
        n_segments = self._n_planes * self._n_down * self._n_across
        if min(len(page.dataoffsets), len(page.databytecounts)) < n_segments:
            raise ImageError(
                f"truncated: a TIFF of {n_segments} tiles or strips that lists "
                f"{len(page.dataoffsets)}"
            )
        self._lock = threading.Lock()
        self._decoded: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()

    def __getitem__(self, window: tuple[slice, slice]) -> npt.NDArray[Any]:
        rows, columns = window
        top, bottom, _ = rows.indices(self.shape[0])
        left, right, _ = columns.indices(self.shape[1])
        check_size(right - left, bottom - top)
        values = np.empty((bottom - top, right - left, self.shape[2]), self.dtype)
        for plane in range(self._n_planes):
            channels = slice(plane, plane + 1) if self._n_planes > 1 else slice(None)
            for row in range(top // self._length, math.ceil(bottom / self._length)):
                for column in range(left // self._width, math.ceil(right / self._width)):
                    segment = self._segment((plane * self._n_down + row) * self._n_across + column)
                    first_row, first_column = row * self._length, column * self._width
                    start_y, start_x = max(top, first_row), max(left, first_column)
                    end_y = min(bottom, first_row + self._length)
                    end_x = min(right, first_column + self._width)
                    values[start_y - top : end_y - top, start_x - left : end_x - left, channels] = (
                        segment[
                            start_y - first_row : end_y - first_row,
                            start_x - first_column : end_x - first_column,
                        ]
                    )
        return values

    def _segment(self, index: int) -> npt.NDArray[Any]:
        """Return a decoded tile or strip (h, w, channels), at least its part inside the image."""
        with self._lock:
            if index in self._decoded:
                self._decoded.move_to_end(index)
                return self._decoded[index]
        start, size = self._page.dataoffsets[index], self._page.databytecounts[index]
        if start + size > len(self._data):
            raise ImageError(
                f"truncated: {len(self._data)} bytes, and tile or strip {index} ends at "
                f"{start + size}"
            )
        if size == 0:  # sparse: nothing was ever written there
            n_channels = 1 if self._n_planes > 1 else self.shape[2]
            return np.full((self._length, self._width, n_channels), self._page.nodata, self.dtype)
        try:
            decoded, _, _ = self._page.decode(
                self._data[start : start + size], index, jpegtables=self._page.jpegtables
            )
            segment: npt.NDArray[Any] = decoded[0]
        except MemoryError:
            raise
        # Codecs raise anything on malformed input, and a run must go on.
        except Exception as error:
            raise ImageError(decoding_reason(error, b"")) from error
        with self._lock:
            self._decoded[index] = segment
            while len(self._decoded) > 1 and (
                sum(array.nbytes for array in self._decoded.values()) > _KEPT_BYTES
            ):
                self._decoded.popitem(last=False)
        return segment
