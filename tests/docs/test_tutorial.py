"""The ten-minute tutorial: its commands run as written, in order, and print what the page shows.

`TUTORIAL_RECORD=1 pytest tests/docs/test_tutorial.py` writes what they print into the page.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
PROGRESS = re.compile(r"^\d\d:\d\d:\d\d .*\n?", re.M)
FENCE = re.compile(r"(<!-- not run by the test -->\n)?^```(sh|text)\n(.*?)^```", re.S | re.M)


def steps(text):
    """(commands, what the page shows after them) for each block of commands that is run."""
    found = []
    for skipped, language, block in FENCE.findall(text):
        if language == "sh" and not skipped:
            found.append([block, None])
        elif language == "text":
            found[-1][1] = block
    return found


def outline(output, home):
    """What stays the same from machine to machine: words, titles of tables; numbers and the winner
    masked.
    """
    words = []
    for line in output.replace(str(home), "/home/me").splitlines():
        if line.startswith(("┏", "┡", "└", "├")) or PROGRESS.match(line) or not line.strip():
            continue
        if line.startswith(("│", "┃")):
            if line.startswith("┃"):
                words.append(line)
            continue
        words.append(line)
    text = re.sub(r"\d[\d,.]*(?:e[+-]\d+,?)?", "0", " ".join(" ".join(words).split()))
    text = re.sub(r"(?<=Winner: ).*?(?= chosen on)", "…", text)
    text = re.sub(r"cannot be told apart on these 0 images(; the one .*?\))?", "…", text)
    text = re.sub(r"Ensemble.*?(?= Test)", "…", text)
    text = re.sub(r"functional: 0, defective: 0|defective: 0, functional: 0", "…", text)
    return re.sub(r"\b[kM]?B\b", "B", re.sub(r"(?<=,)(defective|functional)(?=,)", "class", text))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a busy machine is slow at it, not wrong
def test_the_tutorial_prints_what_it_shows(tmp_path, command_path):
    """Every block of commands ends well; what it prints has the words of the page."""
    environment = os.environ | {"PATH": command_path, "COLUMNS": "100"}
    record = os.environ.get("TUTORIAL_RECORD")
    text = PAGE.read_text()
    together = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    blocks = steps(text)
    assert len(blocks) >= 7
    for commands, shown in blocks:
        run = ["bash", "-euo", "pipefail", "-c", commands]
        done = subprocess.run(
            run, cwd=tmp_path, env=environment, text=True, timeout=900, **together
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}"
        if record:
            printed = re.sub(PROGRESS, "", done.stdout.replace(str(tmp_path), "/home/me"))
            printed = re.sub(r" +$", "", printed, flags=re.M).rstrip() + "\n"
            text = text.replace(shown, printed, 1) if shown else text
        elif shown is not None:
            assert outline(done.stdout, tmp_path) == outline(shown, tmp_path), commands
    if record:
        PAGE.write_text(text)
