"""A file in memory that stores only the bytes that were written to it.

HDF5 lays out a shard in it and writes the headers, some kilobytes. It never writes the range of the
features, whose bytes go from the caller's array to the disk without a copy.
"""

import io
from typing import Any


class SparseFile(io.RawIOBase):
    """The part of the binary file interface that the HDF5 library uses.

    Bytes that were never written are zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self._position = 0
        self._writes: list[tuple[int, bytes]] = []

    def read_range(self, start: int, stop: int) -> bytes:
        """Return the bytes from start to stop."""
        range_bytes = bytearray(stop - start)
        # In the order of the writes: later ones overwrite earlier ones.
        for offset, data in self._writes:
            overlap_start, overlap_stop = max(start, offset), min(stop, offset + len(data))
            if overlap_start < overlap_stop:
                range_bytes[overlap_start - start : overlap_stop - start] = data[
                    overlap_start - offset : overlap_stop - offset
                ]
        return bytes(range_bytes)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def write(self, data: Any) -> int:
        written = bytes(data)
        self._writes.append((self._position, written))
        self._position += len(written)
        self.size = max(self.size, self._position)
        return len(written)

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self._position))
        buffer[:count] = self.read_range(self._position, self._position + count)
        self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size
