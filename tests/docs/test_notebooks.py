"""The notebooks run from top to bottom in a fresh folder, and keep what they show."""

import json
import os
import re
import runpy
from pathlib import Path

import ipykernel_launcher
import pytest
from jupyter_client.provisioning import local_provisioner
from support import forks

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


def forked_kernel(command, *, cwd, env, **_):
    """A kernel as Jupyter starts it, without what its imports cost (support/forks.py)."""
    # The kernel sets a variable for this, which matplotlib reads when it is imported.
    backend = "module://matplotlib_inline.backend_inline"
    first = f"import matplotlib; matplotlib.rcParams['backend'] = {backend!r}"
    # It ends when that process is not its parent, which is here the process that is forked.
    env = {name: value for name, value in env.items() if name != "JPY_PARENT_PID"}
    arguments = command[command.index("ipykernel_launcher") + 1 :]
    script = ipykernel_launcher.__file__
    with open(os.devnull, "w") as nowhere:
        kernel = forks.start(
            arguments, cwd=cwd, stdout=nowhere, stderr=nowhere, env=env, first=first, script=script
        )
    kernel.stdin = kernel.stdout = kernel.stderr = None
    return kernel


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a busy machine is slow at it, not wrong
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own connections
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_fresh_folder(notebook, tmp_path, monkeypatch):
    """No cell raises, and the same cells have something to show as in the kept one."""
    monkeypatch.setattr(local_provisioner, "launch_kernel", forked_kernel)
    cells = [cell for cell in execute(notebook, tmp_path).cells if cell.cell_type == "code"]
    assert [bool(cell.outputs) for cell in cells] == [
        bool(cell["outputs"]) for cell in code_cells(notebook)
    ]
