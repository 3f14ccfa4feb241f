"""The notebooks run from top to bottom in a fresh folder, and keep what they show."""

import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
execute = runpy.run_path(str(FOLDER / "execute.py"))["execute"]


def code_cells(notebook):
    """Its cells of code, as they are kept."""
    return [
        cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs_are_whole_and_say_nothing_of_a_machine(notebook):
    """Every cell has run, in order; no error, no path of the machine that ran it."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [
        output
        for output in outputs
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(
        r"/(tmp|home|root|Users)/",
        json.dumps([output for output in outputs if "image/png" not in output.get("data", {})]),
    )
    assert notebook.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a busy machine is slow at it, not wrong
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own connections
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_fresh_folder(notebook, tmp_path):
    """No cell raises, and the same cells have something to show as in the kept one."""
    cells = [cell for cell in execute(notebook, tmp_path).cells if cell.cell_type == "code"]
    assert [bool(cell.outputs) for cell in cells] == [
        bool(cell["outputs"]) for cell in code_cells(notebook)
    ]
