"""Python, the libraries, torch with torchvision, and a GPU that torch can use."""

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.pipelines.doctor.finding import Finding


def check_python(
    version: Sequence[int] = sys.version_info[:3], bits: int = 8 * ctypes.sizeof(ctypes.c_void_p)
) -> Finding:
    """3.11 or newer, 64 bit."""
    said = f"{version[0]}.{version[1]}.{version[2]}, {bits} bit"
    if tuple(version[:2]) < (3, 11):
        return Finding(
            "Python",
            "fail",
            said,
            "headrace needs Python 3.11 or newer: make PYTHON=python3.12 dev",
        )
    if bits < 64:
        return Finding(
            "Python", "fail", said, "a 32-bit Python cannot map large shards: install a 64-bit one"
        )
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
        return Finding(
            "libraries",
            "fail",
            "; ".join(wrong),
            "pip install --upgrade headrace, in this environment",
        )
    return Finding("libraries", "ok", "all that headrace requires")


def _load_pair() -> tuple[str, str]:
    """The versions of torch and torchvision, after one compiled operator of the latter has run.

    The operators' library is loaded by itself, and torchvision's own word on its torch is read from
    its metadata: importing torchvision brings in torch's compilers, which takes as long as
    everything else together.
    """
    import torch
    from packaging.requirements import Requirement

    spec = importlib.util.find_spec("torchvision")  # looks for it, and imports nothing
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed")
    folder = Path(spec.origin).parent
    built_for = str(torch.__version__)
    # Its own version says the build too (+cpu, +cu128), which the package's metadata does not.
    said = re.search(
        r"^__version__ = ['\"](.+)['\"]", (folder / "version.py").read_text(encoding="utf-8"), re.M
    )
    version = said[1] if said else importlib.metadata.version("torchvision")
    for each in map(Requirement, importlib.metadata.requires("torchvision") or ()):
        if each.name == "torch" and not each.specifier.contains(built_for, prereleases=True):
            raise RuntimeError(
                f"torchvision {version} is built for torch{each.specifier}, found {built_for}"
            )
    libraries = [path for path in folder.glob("_C*") if path.suffix in (".so", ".pyd", ".dylib")]
    if libraries:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
    else:
        importlib.import_module("torchvision")
    torch.ops.torchvision.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    cuda = int(torch.ops.torchvision._cuda_version())  # 12080; -1: built without
    if cuda != -1 and torch.version.cuda and torch.version.cuda.split(".")[0] != str(cuda // 1000):
        raise RuntimeError(
            f"torchvision {version} is built for CUDA {cuda // 1000}, torch for "
            f"{torch.version.cuda}"
        )
    return built_for, version


def check_torch(load: Callable[[], tuple[str, str]] = _load_pair) -> Finding:
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
                "torchvision's operators (nms is the first that torch looks for) are compiled for "
                "one version and one build of torch, such as +cpu or +cu128. Install both again, "
                "together and from the same place: pip install --force-reinstall torch torchvision",
            )
        return Finding(
            "torch",
            "fail",
            f"{type(error).__name__}: {text}",
            "pip install --force-reinstall torch torchvision",
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
        return Finding(
            "GPU",
            "note",
            f"could not be asked for ({type(error).__name__})",
            "see the line `torch`",
        )
    if usable:
        return Finding("GPU", "ok", name)
    if devices:
        return Finding(
            "GPU",
            "fail",
            f"{devices} there, but torch {name} sees none",
            "install a torch with CUDA in place of a +cpu build, or a driver that is new enough "
            "for it (nvidia-smi says which)",
        )
    return Finding("GPU", "ok", "none; the networks run on the processor")
