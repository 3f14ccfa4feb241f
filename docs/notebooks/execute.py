"""Runs the notebooks in a fresh folder and keeps what they show. By hand, after a change to them:

python docs/notebooks/execute.py            # or the names of some: features-to-heads
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(notebook: Path, folder: str | Path) -> Any:
    """The notebook, run in `folder`: its cells have the outputs of this run.

    Raises nbclient's CellExecutionError.
    """
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        content, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    for cell in content.cells:
        cell.metadata.pop("execution", None)  # times of day, which would differ in every run
        if cell.cell_type == "code":  # and what libraries say about the machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    content.metadata.pop("widgets", None)
    content.metadata.language_info = {"name": "python"}
    return content


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.ipynb")):
        file = HERE / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as fresh:
            nbformat.write(execute(file, fresh), file)
