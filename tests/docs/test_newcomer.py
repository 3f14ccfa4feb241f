"""A newcomer's ten minutes on three terminals: what the commands show, kept as text beside this
file. `NEWCOMER_RECORD=1 pytest tests/docs/test_newcomer.py` writes it anew.

The photographs are of scikit-learn: digits that 43 people wrote for a census form in the 1990s.
"""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits
from support import forks

KEPT = Path(__file__).parent / "newcomer"
COMMANDS = (
    "init digits",
    "run recipe.yaml --dry-run",
    "run recipe.yaml",
    "status recipe.yaml",
    "report recipe.yaml",
    "predict recipe.yaml new",
)
# What a terminal obeys that a bar of progress uses, and what it shows.
TOKEN = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")

# The process that is forked had files as its standard streams, and a terminal is none.
STREAMS = """
import os, sys
sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of three digits, and one of new ones."""
    folder = tmp_path_factory.mktemp("newcomer")
    digits = load_digits()
    kept = [number for number in range(300) if digits.target[number] in (1, 4, 7)]
    for place, number in enumerate(kept[:84]):
        name = f"digits/{digits.target[number]}" if place < 72 else "new"
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[number] * 15.9).astype("uint8")
        Image.fromarray(pixels).resize((64, 64)).save(folder / name / f"{number:04}.png")
    return folder


def screen(output):
    """The text that stands on a terminal of any height once all of it was written."""
    lines, row, column = [""], 0, 0
    for token in TOKEN.findall(output):
        if token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b"):
            row = max(0, row - int(token[2:-1] or 1)) if token.endswith("A") else row
            lines[row] = "" if token.endswith("K") else lines[row]
        else:
            before, after = lines[row][:column].ljust(column), lines[row][column + len(token) :]
            lines[row], column = before + token + after, column + len(token)
    return "\n".join(line.rstrip() for line in lines)


def shown(words, columns, folder):
    """What a command shows on a terminal of so many columns; in a pipe where there are none."""
    reader, writer = pty.openpty() if columns else os.pipe()
    if columns:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    parts = []

    def read():
        try:
            while part := os.read(reader, 1 << 16):
                parts.append(part)
        except OSError:  # what a terminal answers when its last writer has gone
            pass

    reading = threading.Thread(target=read)
    reading.start()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm-256color"} | forks.ONE_THREAD
    with os.fdopen(writer, "wb") as file:
        call = forks.start(
            words, cwd=folder, stdout=file, stderr=file, env=environment, first=STREAMS
        )
    assert call.wait(timeout=300) == 0, b"".join(parts).decode()
    reading.join()
    os.close(reader)
    return screen(b"".join(parts).decode()).replace(str(folder), "/home/me").rstrip()


def outline(text):
    """What is the same on every machine: numbers and the winner's setting are masked."""
    text = re.sub(r"(ridge|logistic) \S+=\S+(\s+banded=True)?", "…", text)
    text = re.sub(r"settings cannot be told apart.*?(?=\nTest)", "…", text, flags=re.S)
    text = re.sub(r"\d[\d,.:]*(e[+-]\d+)?", "0", text)
    return re.sub(r"[ ─━]+", " ", re.sub(r"\b[kM]?B\b", "B", text))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_ten_minutes(folder):
    """From a folder to predictions by what the commands themselves say, and nothing is cut."""
    for name, columns in (("80", 80), ("200", 200), ("pipe", None)):
        (folder / "recipe.yaml").unlink(missing_ok=True)
        pages = [(words, shown(words.split(), columns, folder)) for words in COMMANDS]
        text = "\n\n".join(f"$ headrace {words}\n{page}" for words, page in pages) + "\n"
        path = KEPT / f"{name}.txt"
        if os.environ.get("NEWCOMER_RECORD"):
            path.write_text(text)
        assert "…" not in text
        assert outline(text) == outline(path.read_text()), name
