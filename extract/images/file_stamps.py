"""File stamps: what the file system tells of an unread file, to notice that it was replaced."""

import os
import time
from collections.abc import Iterable
from typing import NamedTuple

# The coarsest clock of a file system in use (FAT, old NFS) ticks every 2 s. A file that was written
# twice within one tick has one stamp for two contents.
_CLOCK_TICK_NS = 2_000_000_000


class FileStamp(NamedTuple):
    """One state of a file.

    Two equal stamps mean the same bytes, as far as the file system can tell.

    Size and modification time are not enough: uncompressed images of a data set are all of one
    size, and `cp -p`, `rsync -t`, `tar -x` and archives of a fixed date keep modification times.
    The time of the last change of the inode (ctime) cannot be set by a program, and another file
    has another inode number.

    No file system tells of: a second write within one tick of its clock (see `is_settled`); a write
    while the clock stood back at the very time of the earlier one; a write that another computer
    has made and the attribute cache of this NFS client does not show yet (up to a minute by
    default); and, on FAT, exFAT and some network drives, which keep no ctime of their own and
    number files anew at each mounting, a replacement of the same size and modification time. Device
    numbers are left out, since they differ from one mounting of a disk to the next.
    """

    size: int  # bytes
    mtime_ns: int  # modification of the content, which programs set at will; ns since 1970
    ctime_ns: int  # change of the inode: content, name, owner, times; on Windows the creation
    inode: int

    @property
    def text(self) -> str:
        """The stamp as one line of text, to be kept in a file.

        No integer column is wide enough for every file system.
        """
        return f"{self.size} {self.mtime_ns} {self.ctime_ns} {self.inode}"

    def is_settled(self, now_ns: int) -> bool:
        """Return whether a write at `now_ns` (ns since 1970) or later would change this stamp,
        which was taken before.

        The later of both times counts: a copy that keeps its mtime is as young as its ctime.
        """
        return self._changed_ns < now_ns - _CLOCK_TICK_NS

    @property
    def _changed_ns(self) -> int:
        return max(self.mtime_ns, self.ctime_ns)


def file_stamp(file: str | os.PathLike[str]) -> FileStamp:
    """The stamp of a file, or of a link's file, at the cost of one `stat`; see FileStamp.

    Raises OSError where there is none, ValueError for a name that no file can have.
    """
    file_status = os.stat(file)
    return FileStamp(
        file_status.st_size, file_status.st_mtime_ns, file_status.st_ctime_ns, file_status.st_ino
    )


def file_stamps(files: Iterable[str]) -> list[FileStamp | OSError | ValueError]:
    """The stamps of files, in their order; in place of a stamp the reason why there is none.

    A file that occurs many times, as an archive does in the list of its members, is asked for once.
    """
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
    """Sleep until a write to these files would change their stamps: some seconds where one has just
    been written.

    Files whose times lie in the future are not waited for.
    """
    now_ns = time.time_ns()
    # Within one tick ahead: the clock of a file server is seldom ours to the second.
    recent_ns = [ns for stamp in stamps if (ns := stamp._changed_ns) < now_ns + _CLOCK_TICK_NS]
    wait_ns = max(recent_ns, default=0) + _CLOCK_TICK_NS + 1 - now_ns
    if wait_ns > 0:
        time.sleep(wait_ns / 1e9)
