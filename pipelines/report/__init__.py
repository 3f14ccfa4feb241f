"""The report: one self-contained HTML page per run.

The command line imports this, so what it needs is imported late.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.pipelines.finished import NotARun
    from headrace.pipelines.report.build import Report, write_report
    from headrace.pipelines.report.read import FinishedRun, read_run

_LAZY = {
    "Report": "build",
    "write_report": "build",
    "FinishedRun": "read",
    "NotARun": "read",
    "read_run": "read",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


__all__ = ["FinishedRun", "NotARun", "Report", "read_run", "write_report"]
