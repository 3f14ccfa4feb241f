"""A file in memory that holds only what was written to it.

HDF5 lays a shard out in it and writes the headers, some kilobytes; the features' place stays a
hole, which costs nothing, and their bytes go from the caller's array to the disk without a copy.
"""

import io
from typing import Any


class SparseFile(io.RawIOBase):
    """As much of a binary file as the HDF5 library asks of one.

    Bytes that were never written are zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self._position = 0
        self._writes: list[tuple[int, bytes]] = []

    def content(self, start: int, stop: int) -> bytes:
        """The bytes from start to stop."""
        found = bytearray(stop - start)
        for offset, data in self._writes:
            first, end = max(start, offset), min(stop, offset + len(data))
            if first < end:
                found[first - start : end - start] = data[first - offset : end - offset]
        return bytes(found)

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
        buffer[:count] = self.content(self._position, self._position + count)
        self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size
