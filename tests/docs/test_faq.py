"""The messages that docs/faq.md quotes are those that the code gives: each is made here, by what
its section says.
"""

import inspect
import re
import shutil
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.runs import RECIPE, headrace, make_photos

from headrace.cache.errors import CacheError
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import FeatureSpec
from headrace.heads.data.lookup import FeatureLookup
from headrace.pipelines.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "faq.md").read_text()
HOME = "/home/me"  # what the page writes for the reader's own folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A reader's folder, with photos of two classes and a recipe."""
    make_photos(tmp_path / "photos", n=12)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replace(old, new):
    """Change the recipe."""
    file = Path("recipe.yaml")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def table(**columns):
    """A table of the photos with further columns, and a recipe that reads it."""
    paths = sorted(str(path) for path in Path("photos").rglob("*.png"))
    pd.DataFrame({"path": paths, **columns}).to_csv("labels.csv", index=False)
    replace("folder: photos", "table: labels.csv")


def misspelt_key():
    replace("    dropout:", "    droput:")
    return "run recipe.yaml"


def wrong_value():
    replace("C: [0.01, 1]", "C: [0, 1]")
    return "run recipe.yaml"


def no_recipe():
    return "run experiment.yaml"


def recipe_exists():
    return "init photos"  # where recipe.yaml is already


def no_images():
    Path("notes").mkdir()
    Path("notes", "todo.txt").touch()
    return "init notes --out notes.yaml"


def one_class():
    return "init photos/fine --out fine.yaml"


def misspelt_column():
    table(label=["a", "b"] * 6)
    replace("task:", "task:\n  target: lable")
    return "run recipe.yaml"


def wrong_root():
    table(label=["a", "b"] * 6)
    replace("table: labels.csv", "table: labels.csv\n  root: scans")
    return "run recipe.yaml"


def a_number():
    make_photos(Path("photos"), n=60)
    table(age=[i / 7 for i in range(60)])
    replace("task:", "task:\n  target: age")
    return "run recipe.yaml"


def a_class_of_raw_files():
    Path("photos/owl").mkdir()
    for number in range(3):
        Path(f"photos/owl/{number}.nef").touch()
    return "run recipe.yaml"


def a_folder_beside_train_and_test():
    for side in ("train", "test"):
        shutil.copytree("photos", f"sides/{side}")
    shutil.copytree("photos", "sides/old")
    return "init sides --out sides.yaml"


def no_header():
    table(label=["a", "b"] * 6)
    text = Path("labels.csv").read_text()
    Path("labels.csv").write_text(text[text.index("\n") + 1 :].replace(f"{Path.cwd()}/", ""))
    return "init labels.csv --out labels.yaml"


def no_images_in_a_table():
    pd.DataFrame({"number": range(100, 112), "label": ["a", "b"] * 6}).to_csv(
        "labels.csv", index=False
    )
    return "init labels.csv --out labels.yaml"


def copies_on_two_sides():
    table(label=["a", "a", "b", "b"] * 3, split=["train", "test"] * 6)
    shutil.copy(sorted(Path("photos").rglob("*.png"))[0], sorted(Path("photos").rglob("*.png"))[1])
    replace("task:", "task:\n  split: split")
    return "run recipe.yaml"


def a_placeholder():
    table(label=["a", "b"] * 6, patient=[*"abcdefghijkl"])
    files = sorted(Path("photos").rglob("*.png"))
    for file in files[1:8]:
        shutil.copy(files[0], file)
    replace("task:", "task:\n  group: patient")
    return "run recipe.yaml"


def not_a_metric():
    replace("task:", "task:\n  metric: rmse")
    return "run recipe.yaml"


def split_patient():
    table(
        label=["a", "b"] * 6,
        patient=["p1", "p1", *"cdefghijkl"],
        split=["train", "test", *["train", "test"] * 5],
    )
    replace("task:", "task:\n  group: patient\n  split: split")
    return "run recipe.yaml"


def unknown_network():
    replace("torchvision:resnet18", "torchvision:resnet81")
    return "run recipe.yaml"


def unknown_tap():
    replace("layer4.avg", "layer5.avg")
    return "run recipe.yaml"


def no_weights_file():
    replace("random:0", "resnet18.pth")
    return "run recipe.yaml"


def other_weights():
    import torch
    import torchvision

    torch.save(torchvision.models.resnet34(weights=None).state_dict(), "resnet34.pth")
    replace("random:0", "resnet34.pth")
    return "run recipe.yaml"


def sorted_weights():
    import torch
    import torchvision

    theirs = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({f"net.{name}": theirs[name] for name in sorted(theirs)}, "resnet18.pth")
    replace("random:0", "resnet18.pth\n    weights_match: order")
    return "run recipe.yaml"


def no_network(monkeypatch):
    def unreachable(*_arguments, **_options):
        raise urllib.error.URLError("[Errno -2] Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", "torch-home")
    replace("random:0", "IMAGENET1K_V1")
    return "run recipe.yaml"


def over_budget():
    replace("compute:", "storage:\n  budget_gb: 0.00000001\ncompute:")
    return "run recipe.yaml"


def no_such_place():
    return "run recipe.yaml --cluster nowhere"


def embeddings(**columns):
    """A table of another program: ids, three features, and further columns."""
    ids = sorted(path.relative_to("photos").as_posix() for path in Path("photos").rglob("*.png"))
    features = {
        f"f{number}": [((7 * row + number) % 12) / 7 for row in range(12)] for number in range(3)
    }
    pd.DataFrame({"id": ids, **features, **columns}).to_csv("theirs.csv", index=False)
    return "cache import theirs.csv --name theirs --recipe recipe.yaml"


def unnamed_columns():
    return embeddings(label=[row // 6 for row in range(12)])


def target_among_the_features():
    return embeddings(is_fine=[row // 6 for row in range(12)]) + " --columns f0:is_fine"


def no_feature_set():
    return "cache show layer4.avg"


def verify_without_recipe():
    return "cache verify --sources"


def demo_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return "demo"


CASES = {
    "unknown key": misspelt_key,
    "A value that cannot be": wrong_value,
    "no such recipe": no_recipe,
    "exists already": recipe_exists,
    "no images found": no_images,
    "one class only": one_class,
    "has no column": misspelt_column,
    "none of the images can be read": wrong_root,
    "many different values": a_number,
    "is no metric of": not_a_metric,
    "on different sides": split_patient,
    "a class would be missing": a_class_of_raw_files,
    "Are these the classes": a_folder_beside_train_and_test,
    "the first line looks like an image": no_header,
    "no column names image files": no_images_in_a_table,
    "exact copies on different sides": copies_on_two_sides,
    "no fair split is left": a_placeholder,
    "no classification model": unknown_network,
    "no node": unknown_tap,
    "no such weights file": no_weights_file,
    "in which the two differ": other_weights,
    "no tap fits": over_budget,
    "expected local, cuda, slurm": no_such_place,
    "no feature set": no_feature_set,
    "need the images": verify_without_recipe,
    "cannot be downloaded": no_network,
    "sorted by name": sorted_weights,
    "columns hold numbers": unnamed_columns,
    "under another name": target_among_the_features,
    "the demo needs": demo_not_installed,
}


def words(text):
    """In one line, addresses masked."""
    return " ".join(re.sub(r"https?://\S+", "URL", text).split())


def quoted(title):
    """The message that the page quotes under this heading."""
    sections = dict(re.findall(r"^### ([^\n]*)\n(.*?)(?=^##|\Z)", PAGE, re.S | re.M))
    (block,) = re.findall(r"^```text\n(.*?)^```", sections[title], re.S | re.M)
    return words(block)


def said(arguments, capsys, monkeypatch):
    """What the command line answers."""
    monkeypatch.setattr(sys, "argv", ["headrace", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("title", CASES)
def test_a_quoted_message_is_what_the_command_says(title, home, capsys, monkeypatch):
    """Word for word, with the reader's own folder in it."""
    case = CASES[title]
    command = case(monkeypatch) if inspect.signature(case).parameters else case()
    assert words(said(command, capsys, monkeypatch).replace(str(home), HOME)) == quoted(title)


@pytest.mark.slow
def test_notes_of_a_run_and_a_damaged_shard_are_as_quoted(home):
    """A truncated image and a copy are told at the end of the run; a changed byte is found."""
    whole = Path("photos/fine/001.png").read_bytes()
    Path("photos/fine/broken.png").write_bytes(whole[:300])
    shutil.copy("photos/fine/003.png", "photos/fine/copy.png")
    done = headrace("run", "recipe.yaml", cwd=home)
    assert done.returncode == 0, done.stderr
    shown = words(done.stdout.replace(str(home), HOME))
    for title in ("images could not be read", "exact copies"):
        assert quoted(title) in shown
    shard = next(Path("headrace-cache", "features").rglob("*.h5"))
    changed = bytearray(shard.read_bytes())
    changed[-5] ^= 1
    shard.write_bytes(changed)
    done = headrace("cache", "verify", cwd=home)
    assert done.returncode == 1
    masked = re.sub(r"xxh3_128 \w+|\b[0-9a-f]{16,32}\b|(?<=shard )\d", "#", done.stdout)
    assert quoted("its bytes have changed since they were written") in words(masked)


@pytest.mark.slow
def test_images_without_a_range_are_told_what_to_write(home):
    """A run in which no image can be used ends with the first reason."""
    for path in Path("photos").rglob("*.png"):
        with Image.open(path) as image:
            image.convert("F").save(path.with_suffix(".tif"))
        path.unlink()
    done = headrace("run", "recipe.yaml", cwd=home)
    assert done.returncode == 2
    assert quoted("no range of their own") in words(done.stderr.replace(str(home), HOME))


@pytest.mark.slow
def test_a_script_without_its_main_line_is_told_so(home):
    """Instead of starting workers that start workers."""
    Path("script.py").write_text(
        "from headrace import BackboneSpec, extract_features\n"
        'network = BackboneSpec("torchvision:resnet18", weights="random:0", image_size=32)\n'
        'extract_features("photos", network, taps=["layer1.avg"], workers=1)\n'
    )
    done = headrace(cwd=home, script=home / "script.py")
    assert done.returncode == 1
    assert quoted("This script starts worker processes") in words(done.stderr)
    assert done.stderr.count("Traceback") == 1  # no worker was started


def test_an_id_of_two_images_is_refused_as_quoted(home):
    """In a feature set of a cache that serves two folders."""
    spec = FeatureSpec(
        "torchvision:resnet18",
        "0" * 64,
        "layer4",
        "avg",
        "{}",
        "{}",
        "pillow",
        "float32",
        "float32",
        (2,),
    )
    directory = create_feature_set(home, spec)
    for unit, content in (("a", "1" * 32), ("b", "2" * 32)):
        publish_shard(
            directory,
            unit,
            features=np.ones((1, 2)),
            ids=["fine/001.png"],
            content_hashes=[content],
        )
    with pytest.raises(CacheError) as refused:
        FeatureLookup(directory).fit(["fine/001.png"])
    assert words(f"CacheError: {refused.value}") == quoted("stands for 2 images")


def test_every_quoted_message_is_made_here():
    """No section of the page is left untried."""
    titles = set(re.findall(r"^### ([^\n]*)", PAGE, re.M))
    slow = {
        "images could not be read",
        "no range of their own",
        "exact copies",
        "its bytes have changed since they were written",
        "This script starts worker processes",
    }
    assert titles == set(CASES) | slow | {"stands for 2 images"}
