"""Checks of Python, the libraries, torch with torchvision, and the GPU."""

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.pipelines.doctor.finding import Finding


def check_python(
    python_version: Sequence[int] = sys.version_info[:3],
    pointer_bits: int = 8 * ctypes.sizeof(ctypes.c_void_p),
) -> Finding:
    """Check for Python 3.11 or newer, 64 bit."""
    observation = f"{python_version[0]}.{python_version[1]}.{python_version[2]}, {pointer_bits} bit"
    if tuple(python_version[:2]) < (3, 11):
        return Finding(
            "Python",
            "fail",
            observation,
            "headrace needs Python 3.11 or newer: make PYTHON=python3.12 dev",
        )
    if pointer_bits < 64:
        return Finding(
            "Python",
            "fail",
            observation,
            "a 32-bit Python cannot map large shards: install a 64-bit one",
        )
    return Finding("Python", "ok", observation)


def check_libraries(find_version: Callable[[str], str] = importlib.metadata.version) -> Finding:
    """Check that the libraries that headrace requires are installed, in the right versions."""
    from packaging.requirements import Requirement

    problems = []
    requirements = [Requirement(text) for text in importlib.metadata.requires("headrace") or ()]
    for requirement in requirements:
        # Extras, and what other systems need, may be absent.
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed_version = find_version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} (absent)")
            continue
        if not requirement.specifier.contains(installed_version, prereleases=True):
            problems.append(
                f"{requirement.name} {installed_version}, expected {requirement.specifier}"
            )
    if problems:
        return Finding(
            "libraries",
            "fail",
            "; ".join(problems),
            "pip install --upgrade headrace, in this environment",
        )
    return Finding("libraries", "ok", "all that headrace requires")


def _torch_and_torchvision() -> tuple[str, str]:
    """Return the versions of torch and torchvision, after running a compiled operator of
    torchvision.

    torchvision is not imported, because it imports torch's compilers, which takes as long as all
    other checks together: its library of operators is loaded directly, and the torch that it was
    built for is read from its metadata.
    """
    import torch
    from packaging.requirements import Requirement

    vision_spec = importlib.util.find_spec("torchvision")  # looks for it, and imports nothing
    if vision_spec is None or vision_spec.origin is None:
        raise ImportError("torchvision is not installed")
    vision_folder = Path(vision_spec.origin).parent
    torch_version = str(torch.__version__)
    # Its __version__ has the build (+cpu, +cu128), which the package's metadata lacks.
    version_line = re.search(
        r"^__version__ = ['\"](.+)['\"]",
        (vision_folder / "version.py").read_text(encoding="utf-8"),
        re.M,
    )
    vision_version = version_line[1] if version_line else importlib.metadata.version("torchvision")
    for requirement in map(Requirement, importlib.metadata.requires("torchvision") or ()):
        if requirement.name == "torch" and not requirement.specifier.contains(
            torch_version, prereleases=True
        ):
            raise RuntimeError(
                f"torchvision {vision_version} is built for torch{requirement.specifier}, found "
                f"{torch_version}"
            )
    operator_libraries = [
        library_path
        for library_path in vision_folder.glob("_C*")
        if library_path.suffix in (".so", ".pyd", ".dylib")
    ]
    if operator_libraries:
        torch.ops.load_library(str(operator_libraries[0]))  # type: ignore[no-untyped-call]
    else:
        importlib.import_module("torchvision")
    # A torchvision that was built for another torch fails at its first compiled operator.
    torch.ops.torchvision.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    vision_cuda = int(torch.ops.torchvision._cuda_version())  # 12080 for 12.8, -1 for none
    if (
        vision_cuda != -1
        and torch.version.cuda
        and torch.version.cuda.split(".")[0] != str(vision_cuda // 1000)
    ):
        raise RuntimeError(
            f"torchvision {vision_version} is built for CUDA {vision_cuda // 1000}, torch for "
            f"{torch.version.cuda}"
        )
    return torch_version, vision_version


def check_torch(load_libraries: Callable[[], tuple[str, str]] = _torch_and_torchvision) -> Finding:
    """Check that torch and torchvision are built for each other."""
    try:
        torch_version, vision_version = load_libraries()
    except Exception as error:  # noqa: BLE001 - a broken pair raises RuntimeError, AttributeError, ImportError, OSError
        # Torch's errors are paragraphs; the beginning says what is wrong.
        error_text = " ".join(str(error).split())[:200]
        if "nms" in error_text or "torchvision" in error_text:
            return Finding(
                "torch",
                "fail",
                f"torchvision does not fit torch: {error_text}",
                "torchvision's operators (nms is the first that torch looks for) are compiled for "
                "one version and one build of torch, such as +cpu or +cu128. Install both again, "
                "together and from the same place: pip install --force-reinstall torch torchvision",
            )
        return Finding(
            "torch",
            "fail",
            f"{type(error).__name__}: {error_text}",
            "pip install --force-reinstall torch torchvision",
        )
    return Finding("torch", "ok", f"torch {torch_version}, torchvision {vision_version}")


def _gpus() -> tuple[int, bool, str]:
    """Return the number of NVIDIA GPUs of the system, whether torch can use one, and its name; or
    torch's version if it cannot.
    """
    import torch

    n_devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    is_usable = torch.cuda.is_available()
    return (
        n_devices,
        is_usable,
        torch.cuda.get_device_name(0) if is_usable else str(torch.__version__),
    )


def check_cuda(find_gpus: Callable[[], tuple[int, bool, str]] = _gpus) -> Finding:
    """Check that torch can use the GPU, if the system has one."""
    try:
        n_devices, is_usable, name = find_gpus()
    except Exception as error:  # noqa: BLE001 - torch is broken, which its own line says
        return Finding(
            "GPU",
            "note",
            f"could not be asked for ({type(error).__name__})",
            "see the line `torch`",
        )
    if is_usable:
        return Finding("GPU", "ok", name)
    # The driver sees a GPU that this build of torch does not: a +cpu build, or too old a driver.
    if n_devices:
        return Finding(
            "GPU",
            "fail",
            f"{n_devices} there, but torch {name} sees none",
            "install a torch with CUDA in place of a +cpu build, or a driver that is new enough "
            "for it (nvidia-smi says which)",
        )
    return Finding("GPU", "ok", "none; the networks run on the processor")
