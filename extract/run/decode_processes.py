"""Decoding in processes, for devices that are faster than the threads of one process can decode.

Python's interpreter lock is held for 0.75 ms of every image, so one process decodes at most 1,300
images a second on any number of cores. Each decoding process is served by one thread, which sends
it samples over a pipe and takes their pixels from shared memory. That memory is a file without a
name, and a pipe closes with its process: after a SIGKILL of either side nothing is left. A process
that dies is replaced, and its samples are decoded again, one by one.
"""

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import BinaryIO

import numpy as np

from headrace.cache.errors import HeadraceError
from headrace.cache.format.memory_file import nameless_file
from headrace.extract.run.rendering import (
    Outcome,
    PixelBuffer,
    Rendering,
    SharedImage,
    render_samples,
    runs_of_one_image,
)
from headrace.extract.spec import Sample

# Images that a process gets together. Enough that a message of 0.1 ms does not matter, and few,
# because their pixels take shared memory: 1.2 MB at 224 pixels.
_IMAGES_PER_REQUEST = 8
_CROPS_PER_REQUEST = 64  # neighbouring crops of one image together, which is decoded once
_ALIGNMENT = 64  # bytes, of each rendering's pixels in the shared memory
# A sample is recorded as a failure when it has ended so many processes: the first perhaps because
# of other samples that were decoded with it, the last ones alone.
_MAX_DEATHS = 3
_READY = b"r"
_START = "import sys; sys.path[:] = {path}; from {module} import serve; serve({fd})"


class DecodeProcesses:
    """Up to `count` processes that decode; each is started when there is work for it."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, "decode-process")
        self._thread_local = threading.local()
        self._processes: list[_Process] = []

    def submit(
        self,
        samples: Sequence[Sample],
        renderings: Sequence[Rendering],
        pixel_buffers: Sequence[PixelBuffer],
    ) -> "list[Future[list[Outcome]]]":
        """Start decoding `samples` into the buffers, (len(samples), H, W, C) per rendering.

        The outcomes of the futures are in the order of the samples. A sample that ends its process
        at every try has an outcome that says so. The futures raise HeadraceError if processes
        cannot be started.
        """
        futures = []
        for start, end in _portions(samples):
            buffers = [buffer[start:end] for buffer in pixel_buffers]
            work = samples[start:end], renderings, buffers
            futures.append(self._threads.submit(self._decode, *work))
        return futures

    def shutdown(self, *, cancel_futures: bool = False) -> None:
        """End the processes when their work is done.

        cancel_futures: drop work that has not begun.
        """
        self._threads.shutdown(cancel_futures=cancel_futures)
        for process in self._processes:
            process.end()

    def _decode(
        self,
        samples: Sequence[Sample],
        renderings: Sequence[Rendering],
        pixel_buffers: Sequence[PixelBuffer],
        deaths: int = 0,
    ) -> list[Outcome]:
        try:
            return self._process().decode(samples, renderings, pixel_buffers)
        except (OSError, EOFError, pickle.UnpicklingError):
            # The process has died, as by a decoder's crash: its pipe is closed, or ends within an
            # answer.
            reason = self._process().end()
        if deaths + 1 == _MAX_DEATHS:
            text = f"decoding it ends the process that does ({reason})"
            return [Outcome(text, is_content_fault=True)]
        # One by one, because it is not known which of the samples ended the process.
        outcomes = []
        for slot, sample in enumerate(samples):
            slot_buffers = [buffer[slot : slot + 1] for buffer in pixel_buffers]
            outcomes += self._decode([sample], renderings, slot_buffers, deaths + 1)
        return outcomes

    def _process(self) -> "_Process":
        """Return the process of this thread."""
        process: _Process | None = getattr(self._thread_local, "process", None)
        if process is None:
            process = self._thread_local.process = _Process()
            self._processes.append(process)
        return process


class _Process:
    """A decoding process of one thread, started at first use and again after it has died."""

    def __init__(self) -> None:
        self._memory_file = nameless_file()
        self._memory: mmap.mmap | None = None
        self._running: subprocess.Popen[bytes] | None = None

    def decode(
        self,
        samples: Sequence[Sample],
        renderings: Sequence[Rendering],
        pixel_buffers: Sequence[PixelBuffer],
    ) -> list[Outcome]:
        """Decode samples into the buffers.

        Raises OSError, EOFError or pickle.UnpicklingError if the process has died.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        n_bytes = sum(_aligned_bytes(rendering, len(samples)) for rendering in renderings)
        memory = self._mapped(n_bytes)
        pickle.dump((tuple(samples), tuple(renderings), len(memory)), process.stdin, protocol=5)
        process.stdin.flush()
        outcomes: list[Outcome] = pickle.load(process.stdout)
        shared_buffers = _buffers_in(memory, renderings, len(samples))
        for buffer, shared in zip(pixel_buffers, shared_buffers, strict=True):
            np.copyto(buffer, shared)
        return outcomes

    def end(self) -> str:
        """End the process, if there is one, and return how it ended."""
        process, self._running = self._running, None
        if process is None:
            return "not started"
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()  # at the end of its input the process ends
        process.stdout.close()
        try:
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            # It is still decoding, and does not look at its input meanwhile.
            process.kill()
            status = process.wait()
        return f"{signal.Signals(-status).name}" if status < 0 else f"exit code {status}"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is None:
            start = _START.format(path=sys.path, module=__name__, fd=self._memory_file)
            self._running = subprocess.Popen(
                [sys.executable, "-P", "-c", start],  # -P: nothing from the current folder
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self._memory_file,),
            )
            assert self._running.stdout is not None
            if self._running.stdout.read(len(_READY)) != _READY:
                # HeadraceError, which `_decode` does not catch: this is no fault of an image.
                raise HeadraceError(
                    f"a process that decodes images does not start ({self.end()}); what it said "
                    "stands above"
                )
        return self._running

    def _mapped(self, n_bytes: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < n_bytes:
            os.ftruncate(self._memory_file, n_bytes)
            self._memory = mmap.mmap(self._memory_file, n_bytes)
        return self._memory

    def __del__(self) -> None:
        os.close(self._memory_file)


def serve(memory_file: int) -> None:
    """Run the loop of a decoding process until its input ends.

    Samples come from standard input, pixels go to the shared memory of the descriptor
    `memory_file`, outcomes to standard output.
    """
    # Ctrl-C reaches all processes of the terminal; the parent ends this one by closing its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Output that a library prints must not be taken for a reply.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")  # Pillow's, see `quiet_decoding`
    memory: mmap.mmap | None = None
    last_image: list[SharedImage] = []
    replies.write(_READY)
    replies.flush()
    while (request := _next_request(requests)) is not None:
        samples, renderings, n_bytes = request
        if memory is None or len(memory) != n_bytes:
            memory = mmap.mmap(memory_file, n_bytes)
        buffers = _buffers_in(memory, renderings, len(samples))
        outcomes = [
            outcome
            for start, end, image in runs_of_one_image(samples, last_image, _CROPS_PER_REQUEST)
            for outcome in render_samples(image, samples[start:end], renderings, buffers, start)
        ]
        pickle.dump(outcomes, replies, protocol=5)
        replies.flush()


def _next_request(
    requests: BinaryIO,
) -> tuple[tuple[Sample, ...], tuple[Rendering, ...], int] | None:
    try:
        request: tuple[tuple[Sample, ...], tuple[Rendering, ...], int] = pickle.load(requests)
    except (EOFError, pickle.UnpicklingError):  # the parent has died, perhaps amid a request
        return None
    return request


def _portions(samples: Sequence[Sample]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each request: several crops of one image, or several images."""
    start = 0
    for run_start, run_end, _ in runs_of_one_image(samples, [], _CROPS_PER_REQUEST):
        if run_end - run_start > 1 or run_end - start > _IMAGES_PER_REQUEST:
            if start < run_start:
                yield start, run_start
            start = run_start
        if run_end - run_start > 1:
            yield run_start, run_end
            start = run_end
    if start < len(samples):
        yield start, len(samples)


def _aligned_bytes(rendering: Rendering, n_samples: int) -> int:
    preprocessing = rendering.preprocessing
    n_bytes = (
        n_samples * prod(preprocessing.pixel_shape) * np.dtype(preprocessing.pixel_dtype).itemsize
    )
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _buffers_in(
    memory: mmap.mmap, renderings: Sequence[Rendering], n_samples: int
) -> list[PixelBuffer]:
    """Return the buffers of the renderings, which follow one another in the shared memory."""
    buffers, start = [], 0
    for rendering in renderings:
        preprocessing = rendering.preprocessing
        shape = (n_samples, *preprocessing.pixel_shape)
        buffers.append(
            np.frombuffer(memory, preprocessing.pixel_dtype, prod(shape), start).reshape(shape)
        )
        start += _aligned_bytes(rendering, n_samples)
    return buffers
