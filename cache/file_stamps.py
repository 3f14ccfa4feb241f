"""File stamps: size, times and inode of a file, by which a change is noticed without reading it."""

import os
import time
from collections.abc import Iterable
from typing import NamedTuple

# The coarsest clock of a file system in use (FAT, old NFS) ticks every 2 s. A file that was written
# twice within one tick has one stamp for two contents.
_CLOCK_TICK_NS = 2_000_000_000


class FileStamp(NamedTuple):
    """One state of a file: equal stamps mean equal bytes, as far as the file system can tell.

    Size and modification time are not enough: uncompressed images of a data set are all of one
    size, and `cp -p`, `rsync -t`, `tar -x` and archives of a fixed date keep modification times.
    The time of the last change of the inode (ctime) cannot be set by a program, and another file
    has another inode number.

    Changes that a stamp does not show: a second write within one tick of the clock (see
    `is_settled`); a write after the clock was set back, at the same time as the earlier one; a
    write by another computer that the attribute cache of this NFS client does not show yet (up to a
    minute by default); and, on FAT, exFAT and some network drives, which keep no ctime of their own
    and number files anew at each mounting, a replacement of the same size and modification time.

    Device numbers are no part of it: they change from one mounting of a disk to the next.
    """

    size: int  # bytes
    mtime_ns: int  # modification of the content, which programs set at will; ns since 1970
    ctime_ns: int  # change of the inode: content, name, owner, times; on Windows the creation
    inode: int

    @property
    def text(self) -> str:
        """The stamp as one line of text, to be kept in a file."""
        # Not as integers: some file systems' inode numbers are wider than any integer column.
        return f"{self.size} {self.mtime_ns} {self.ctime_ns} {self.inode}"

    def is_settled(self, now_ns: int) -> bool:
        """Return whether a write at `now_ns` (ns since 1970) or later would change this stamp."""
        return self._changed_ns < now_ns - _CLOCK_TICK_NS

    @property
    def _changed_ns(self) -> int:
        # The later of both: a copy that keeps its mtime is as young as its ctime.
        return max(self.mtime_ns, self.ctime_ns)


def file_stamp(file: str | os.PathLike[str]) -> FileStamp:
    """Return the stamp of a file, or of the file that a link leads to.

    Raises OSError if there is none, ValueError for a name that no file can have.
    """
    file_status = os.stat(file)
    return FileStamp(
        file_status.st_size, file_status.st_mtime_ns, file_status.st_ctime_ns, file_status.st_ino
    )


def file_stamps(files: Iterable[str]) -> list[FileStamp | OSError | ValueError]:
    """Return the stamp of each file, in their order, or the error of asking for it."""
    # Each file once: an archive occurs once for each of its members.
    stamp_of_file: dict[str, FileStamp | OSError | ValueError] = {}
    stamps: list[FileStamp | OSError | ValueError] = []
    for file_path in files:
        file_state = stamp_of_file.get(file_path)
        if file_state is None:
            try:
                file_state = file_stamp(file_path)
            except (OSError, ValueError) as error:
                file_state = error
            stamp_of_file[file_path] = file_state
        stamps.append(file_state)
    return stamps


def wait_until_settled(stamps: Iterable[FileStamp]) -> None:
    """Sleep until a write to these files would change their stamps.

    That is some seconds if one has just been written. Files with times in the future are ignored.
    """
    now_ns = time.time_ns()
    # Up to one tick ahead of us is not the future: clocks of file servers differ by a second or so.
    recent_ns = [ns for stamp in stamps if (ns := stamp._changed_ns) < now_ns + _CLOCK_TICK_NS]
    wait_ns = max(recent_ns, default=0) + _CLOCK_TICK_NS + 1 - now_ns
    if wait_ns > 0:
        time.sleep(wait_ns / 1e9)
