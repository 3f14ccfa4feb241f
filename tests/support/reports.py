"""A finished run whose data are out to break the page that is made of it, and a leaderboard of ten
thousand settings.
"""

import json

import numpy as np
import pandas as pd
from PIL import Image
from rich.console import Console
from support.runs import make_photos

from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.records import publish_table
from headrace.pipelines.run import run_recipe

# Class names as nobody should have them. Each would do harm where it is taken for HTML, for a
# formula, or for JSON.
HOSTILE = (
    "<script>window.pwned = 1</script>",
    '"><img src=x onerror="window.pwned=2"> $\\frac{ \u202eevil\x07 \u2028',
)
COPIES = 12
FLIPPED = 3

RECIPE = """\
images:
  table: labels.csv
  id_column: id
task:
  kind: {kind}
  target: {target}
  folds: 3
backbones:
  - name: torchvision:resnet18
    weights: random:0
    image_size: 32
    crop_fraction: 1.0
    taps: [layer1.avg, layer4.avg]
heads:
{heads}
compute:
  workers: 1
  images_per_shard: 64
out: runs/{kind}
"""
HEADS = {
    "single": "  logistic:\n    C: [0.01, 1]\n  knn:\n    k: [3]\n",
    "multi": "  logistic:\n    C: [0.01]\n",
    "regression": "  ridge:\n    alpha: [1.0]\n",
}
TARGETS = {"single": "label", "multi": "['<i>stripes</i>', bright]", "regression": "[period]"}


def make_data(folder):
    """60 striped photos, some as re-encoded copies, some with the other class's label, one broken;
    a hostile table.
    """
    make_photos(folder / "photos", n=60)
    rows = []
    for number, path in enumerate(sorted((folder / "photos").rglob("*.png"))):
        fine = path.parent.name == "fine"
        rows.append(
            {"id": f"<b>{path.name}</b>", "path": str(path), "fine": fine ^ (number < FLIPPED)}
        )
        if number % (60 // COPIES) == 4:
            copy = path.with_suffix(".jpg")
            Image.open(path).save(copy, quality=92)
            rows.append({"id": f"copy of {path.name}", "path": str(copy), "fine": fine})
    broken = folder / "photos" / "<svg onload=window.pwned=3>.png"
    broken.write_bytes(b"this is no image")
    rows.append({"id": "broken & <svg onload=window.pwned=3>", "path": str(broken), "fine": True})
    table = pd.DataFrame(rows)
    table["label"] = [HOSTILE[int(fine)] for fine in table["fine"]]
    table["<i>stripes</i>"] = table["fine"].astype(int)
    table["bright"] = np.arange(len(table)) % 2
    table["period"] = np.where(table["fine"], 4.0, 16.0) + np.arange(len(table)) % 3
    table.to_csv(folder / "labels.csv", index=False)


def finished_run(folder, kind="single"):
    """Run one kind of task on the data; returns the run's result."""
    recipe = folder / f"{kind}.yaml"
    recipe.write_text(RECIPE.format(kind=kind, target=TARGETS[kind], heads=HEADS[kind]))
    return run_recipe(load_recipe(recipe), console=Console(quiet=True))


def inflate(root, settings, seed=0):
    """Give a finished run the leaderboard of a run with so many settings, on twelve inputs and of
    four kinds.
    """
    rng = np.random.default_rng(seed)
    board, heads = pd.read_csv(root / "leaderboard.csv"), pd.read_parquet(root / "heads.parquet")
    folds = sorted(heads["fold"].unique())
    first = board.iloc[[0]]
    more = pd.concat([first] * (settings - 1), ignore_index=True)
    number = np.arange(len(more))
    kinds = np.array(["logistic", "mlp", "ridge", "knn"])[number % 4]
    more["kind"], more["inputs"] = kinds, [f"blocks.{n % 12}.avg" for n in number]
    more["accuracy"] = np.sort(
        rng.uniform(0.3, float(first["accuracy"].iloc[0]) - 1e-6, len(more))
    )[::-1]
    more["settings"] = [f"C={n}e-4 lr=0.00{n % 7}" for n in number]
    more["spec"] = [
        json.dumps({"kind": "logistic", "C": float(n + 1)}, sort_keys=True) for n in number
    ]
    more["train_seconds"] = rng.uniform(0.01, 20, len(more))
    more["rank"] = number + 2
    publish_table(
        root / "leaderboard.csv",
        pd.concat([first, more], ignore_index=True).to_csv(index=False).encode(),
    )
    own = heads[heads["spec"] == first["spec"].iloc[0]].drop_duplicates("fold")
    grown = own.loc[own.index.repeat(len(more))].reset_index(drop=True)
    for name in ("spec", "inputs", "kind"):
        grown[name] = np.tile(more[name].to_numpy(), len(folds))
    publish_table(
        root / "heads.parquet", pd.concat([heads, grown], ignore_index=True).to_parquet(index=False)
    )
