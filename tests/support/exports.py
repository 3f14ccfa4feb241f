"""Exported models, and heads of every kind to export."""

import atexit
import functools
import json
import os
import subprocess
import sys

import numpy as np
from support import forks
from support.forks import ONE_THREAD

from headrace.heads.bank import fit_bank
from headrace.heads.data.task import REFIT, Task
from headrace.heads.discriminant.kind import LDASpec
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.networks.kind import ConvSpec, MLPSpec
from headrace.heads.persist import TrainedHead

# Runs where nothing of headrace can be found: -I leaves out the folder and the user's paths, and
# the finder is taken out. It imports the libraries once, and is forked for each request.
ALONE = """
import sys, json, os
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__ + getattr(finder, "__name__", "")]
sys.path = [place for place in sys.path if "__editable__" not in place]
try:
    import headrace.pipelines.run
    sys.exit("headrace can be imported: this proves nothing")
except ImportError:
    pass
import numpy as np, onnxruntime, torch
for request in sys.stdin:
    folder, paths, what = json.loads(request)
    if child := os.fork():
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    os.chdir(folder)
    sys.path.insert(0, folder)
    from preprocess import INPUTS, load
    pixels = {name: np.stack([load(path, name) for path in paths]) for name in INPUTS}
    if what == "torch":
        model = torch.export.load("model.pt2").module()
        found = model(*(torch.from_numpy(value) for value in pixels.values())).numpy()
    else:
        found = onnxruntime.InferenceSession("model.onnx").run(None, pixels)[0]
    assert not any(name.startswith("headrace.") for name in sys.modules)
    np.save("alone.npy", found)
    os._exit(0)
"""


EVERY = ("single", "multi", "regression")


CASES = [
    *((LogisticSpec(0.1), kind) for kind in EVERY[:2]),
    *((RidgeSpec(10.0), kind) for kind in EVERY),
    *((MLPSpec((8,), epochs=3), kind) for kind in EVERY),
    *((ConvSpec((4,), (5,), epochs=2), kind) for kind in EVERY),
    *((KNNSpec(3), kind) for kind in EVERY),
    (KNNSpec(5, "euclidean", "distance"), "single"),
    (CentroidSpec(), "single"),
    (LDASpec(0.3), "single"),
    (CentroidSpec("euclidean"), "single"),
]


def fitted(spec, kind):
    """A head trained on 60 rows, and 20 rows that it was not trained on."""
    rng = np.random.default_rng(0)
    shape = (60, 6, 4, 4) if spec.kind == "conv" else (60, 12)
    X = rng.normal(3, 2, shape).astype(np.float32)
    value = X.reshape(60, -1)
    target = {
        "single": (value[:, 0] > 3).astype(np.int64),
        "multi": (value[:, :2] > 3).astype(np.uint8),
        "regression": value[:, :2].astype(np.float64),
    }[kind]
    classes = ("a", "b")
    fold = (np.arange(60) % 2).astype(np.int16)
    content = np.array([f"{n:032d}" for n in range(60)], "S32")
    task = Task(kind, classes, content.astype(str), content, target, fold, np.ones(60))
    (full,) = [fit for fit in fit_bank(X, task, [spec]) if fit.fold == REFIT]
    assert full.error is None, full.error
    head = TrainedHead(spec, kind, classes, (), {}, full.arrays)
    return head, rng.normal(3, 2, (20, *shape[1:])).astype(np.float32)


WITHOUT_HEADRACE = """\
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "headrace"]:
    del sys.modules[name]
sys.modules["headrace"] = None  # as if it were not there
sys.path.insert(0, ".")
"""


def run_without_headrace(script, folder):
    """Run this Python in `folder`, in a process that has imported libraries but finds no headrace."""
    (folder / "without.py").write_text(WITHOUT_HEADRACE + script)
    with (folder / "said.txt").open("w+") as said:
        call = forks.start((), script=folder / "without.py", cwd=folder, stdout=said, stderr=said)
        status = call.wait(300)
        said.seek(0)
        assert status == 0, said.read()


def run_alone(folder, paths, what):
    """Predictions of the files in `folder`, by a Python that finds no headrace."""
    process = _alone()
    request = [str(folder), [str(path) for path in paths], what]
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    # what it says of an error stands in the test's own output
    assert process.stdout.readline() == "0\n"
    found = np.load(folder / "alone.npy")
    (folder / "alone.npy").unlink()
    return found


@functools.cache
def _alone():
    """That Python, which ends with this process."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-I", "-c", ALONE]
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, env=os.environ | ONE_THREAD
    )

    def end():
        process.stdin.close()
        process.wait()
        process.stdout.close()

    atexit.register(end)
    return process
