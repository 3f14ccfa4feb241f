"""Thawing: promote the best heads against fine-tuning everything; training from a cached map against running what is frozen.

    python benchmarks/thaw.py [--case promote] [--case cut] [--quick]

promote: 32 small networks, pretrained for 0 to 12 epochs on handwritten digits of scikit-learn that are inverted and turned
by up to 40°; the task is 240 upright digits. headrace's way: heads on every network's features (three strengths, five folds),
the best two networks fine-tuned. The other way: all 32 fine-tuned, the best on validation rows kept. Both are scored on 1,200
digits that nobody trained on. CPU seconds, one thread, everything counted on both sides: features, heads, training.

cut: a step of training above a node from its cached map (read from memory) against the same step from pixels in memory, in
turn, CPU seconds; beside what the multiply-adds predict, a backward pass counted as two forward ones.

The last line is JSON: {measure: figure}. --quick: fewer seeds and steps.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy is imported, so that every library is pinned alike

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.ndimage import rotate, zoom  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from torch import nn  # noqa: E402

from headrace.extract import BackboneSpec, Preprocessing, Tap, load_backbone  # noqa: E402
from headrace.extract.backbone import Backbone  # noqa: E402
from headrace.extract.taps import backbone_nodes  # noqa: E402
from headrace.heads import FULL, FineTuneSpec, LogisticSpec, MLPSpec, Task, make_folds, spec_to_json  # noqa: E402
from headrace.heads.logistic import fit_logistic_bank  # noqa: E402
from headrace.pipelines.thaw.cut import cost_above  # noqa: E402
from headrace.pipelines.thaw.data import Batch  # noqa: E402
from headrace.pipelines.thaw.head import head_module, new_head, standardise  # noqa: E402
from headrace.pipelines.thaw.network import Network, trainable_blocks  # noqa: E402
from headrace.pipelines.thaw.train import Plan, Training  # noqa: E402

TAP = Tap("stage3", "avg")
HOW = Preprocessing((16, 16), (16, 16), "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TRAIN, PROMOTED = 240, 2
ROWS = 32  # of a step
EPOCHS = (0, 0, 0, 0, 1, 2, 4, 12)  # of pretraining; each at four widths: 32 networks
WIDTHS = (12, 16, 24, 32)
SOURCE = 600  # images to pretrain on


class Memory:
    """Pixels or maps in memory, as a source of batches."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs

    def batches(
        self, order: np.ndarray, size: int, *, view: int = 0, draw: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield Batch(rows, self.inputs[rows], None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["promote", "cut"], action="append")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for case in options.case or ["promote", "cut"]:
        figures |= promote(2 if options.quick else 10) if case == "promote" else cut(5 if options.quick else 15)
    print(json.dumps(figures))


def small_network(width: int) -> nn.Module:
    """Three stages of convolution, batch normalisation, ReLU and pooling."""
    net, channels = nn.Sequential(), 3
    for stage in (1, 2, 3):
        layers = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        net.add_module(f"stage{stage}", nn.Sequential(*layers, nn.MaxPool2d(2)))
        channels, width = width, 2 * width
    net.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net.add_module("fc", nn.Linear(channels, 10))
    return net


def pixels(images: np.ndarray) -> torch.Tensor:
    """(n, 16, 16, 3) uint8 of digits (n, 8, 8)."""
    large = zoom(images, (1, 2, 2), order=1) * (255 / 16)
    return torch.from_numpy(np.repeat(np.clip(large, 0, 255).astype(np.uint8)[..., None], 3, axis=3))


def pretrained(seed: int, width: int, epochs: int, source: torch.Tensor, labels: torch.Tensor) -> Backbone:
    torch.manual_seed(seed)
    net = small_network(width).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    inputs = (source.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(inputs[rows]), labels[rows]).backward()
            optimiser.step()
    return Backbone(BackboneSpec("python:benchmark:net"), net.eval().requires_grad_(False), HOW, str(seed))


def promote(seeds: int) -> dict[str, float]:
    """The figures of the first case."""
    digits = load_digits()
    images, target = digits.images, digits.target.astype(np.int64)
    rng = np.random.default_rng(0)
    turned = np.stack(
        [rotate(16 - image, rng.uniform(-40, 40), reshape=False, mode="nearest") for image in images[:SOURCE]]
    )
    everything, source = pixels(images), pixels(turned)
    hits, near, ratios, lost = [], [], [], []
    print(f"{'seed':>4} {'all s':>7} {'ours s':>7} {'ratio':>6} {'all %':>6} {'ours %':>6}  promoted, best")
    for seed in range(seeds):
        order = np.random.default_rng([seed, 1]).permutation(len(images))
        chosen, test = order[:TRAIN], order[-1200:]
        backbones = [
            pretrained(100 * seed + number, width, epochs, source, torch.from_numpy(target[:SOURCE]))
            for number, (width, epochs) in enumerate((w, e) for w in WIDTHS for e in EPOCHS)
        ]
        fold = make_folds(target[chosen], n_folds=5, seed=seed)
        task = Task("single", tuple("0123456789"), np.array([""] * TRAIN), np.array([b""] * TRAIN), target[chosen], fold,
                    np.ones(TRAIN))  # fmt: skip
        started = time.process_time()
        ranked = [validation(backbone, everything[chosen], task) for backbone in backbones]
        best = sorted(range(len(backbones)), key=lambda k: -ranked[k][0])[:PROMOTED]
        heads_s = time.process_time() - started
        tuned, seconds = [], []
        for backbone, (_, spec, arrays) in zip(backbones, ranked, strict=True):
            started = time.process_time()
            score, network = fine_tuned(backbone, spec, arrays, everything[chosen], task)
            seconds.append(time.process_time() - started)
            with torch.no_grad():
                tuned.append((score, network.eval()(everything[test]).argmax(1).numpy()))
        correct = [float((predicted == target[test]).mean()) for _, predicted in tuned]
        ours = max(best, key=lambda k: tuned[k][0])
        theirs = max(range(len(tuned)), key=lambda k: tuned[k][0])
        truth = max(range(len(tuned)), key=lambda k: correct[k])
        ratios.append(sum(seconds) / (heads_s + sum(seconds[k] for k in best)))
        lost.append(100 * (correct[theirs] - correct[ours]))
        hits.append(truth in best)
        near.append(max(correct[k] for k in best) >= correct[truth] - 0.005)
        ours_s = heads_s + sum(seconds[k] for k in best)
        print(f"{seed:4} {sum(seconds):7.1f} {ours_s:7.1f} {ratios[-1]:6.1f} {100 * correct[theirs]:6.2f} "
              f"{100 * correct[ours]:6.2f}  {best}, {truth}", flush=True)  # fmt: skip
    return {
        "compute_ratio": round(float(np.median(ratios)), 2),
        "points_lost": round(float(np.mean(lost)), 3),
        "best_promoted_share": float(np.mean(hits)),
        "best_within_half_a_point_share": float(np.mean(near)),
    }


def validation(
    backbone: Backbone, images: torch.Tensor, task: Task
) -> tuple[float, LogisticSpec, dict[str, np.ndarray]]:
    """The best head's mean accuracy over folds, its spec, and its arrays from fold 0's training rows."""
    width = backbone_nodes(backbone)[TAP.node].shape[0]
    network = Network(backbone, [TAP], new_head(MLPSpec(hidden=()), width, 10))
    with torch.no_grad():
        X = network.features(images).numpy()
    specs = [LogisticSpec(C=C) for C in (0.1, 1.0, 10.0)]
    fits = fit_logistic_bank(X, task.target, n_classes=10, fold=task.fold, specs=specs, full=False)
    score = dict.fromkeys(specs, 0.0)
    for fit in fits:
        held = task.target[task.fold == fit.fold]
        score[fit.spec] += float((fit.validation.argmax(1) == held).mean()) / 5
    best = max(specs, key=lambda spec: score[spec])
    return score[best], best, next(fit.arrays for fit in fits if fit.spec == best and fit.fold == 0)


def fine_tuned(
    backbone: Backbone, head: LogisticSpec, arrays: dict, images: torch.Tensor, task: Task
) -> tuple[float, Network]:
    """All layers trained without fold 0: accuracy on fold 0, and the network."""
    network = Network(backbone, [TAP], head_module(head, arrays, "single"))
    spec = FineTuneSpec(head=spec_to_json(head), depth="all", epochs=16, patience=16, learning_rate=2e-3, batch_size=16)
    training = Training(network, Memory(images), Plan(spec, trainable_blocks(network, "all"), task, 0, spec.epochs))
    with torch.no_grad():
        features = network.features(images).double()
    standardise(network.head, features.mean(0), features.std(0, correction=0), new=False)
    done = training.run(None, "")
    held = task.target[task.fold == 0]
    assert done.validation is not None
    # Accuracy in steps of one row leaves ties, which the loss decides.
    return float((done.validation.argmax(1) == held).mean()) - 1e-3 * done.progress.best_loss, network


def cut(steps: int) -> dict[str, float]:
    """The figures of the second case."""
    figures = {}
    print(f"{'network, cut':<36} {'pixels s':>9} {'map s':>7} {'ratio':>6} {'flops':>6} {'share':>6}")
    for name, node, tap, size in (
        ("timm:tf_efficientnet_lite0", "blocks.4", "conv_head.avg", 224),
        ("torchvision:resnet18", "layer3", "layer4.avg", 224),
    ):
        backbone = load_backbone(BackboneSpec(name, "random:0", image_size=size, crop_fraction=1.0))
        nodes = backbone_nodes(backbone)
        place = Tap(tap.rpartition(".")[0], "avg")
        images = torch.randint(0, 256, (ROWS, size, size, 3), dtype=torch.uint8)
        maps = torch.randn(ROWS, *nodes[node].shape).half()
        target = np.arange(ROWS) % 2
        task = Task("single", ("a", "b"), np.array([""] * ROWS), np.array([b""] * ROWS), target, np.zeros(ROWS, np.int16),
                    np.ones(ROWS))  # fmt: skip
        sides = []
        for source, where in ((images, None), (maps, node)):
            network = Network(backbone, [place], new_head(MLPSpec(hidden=()), nodes[place.node].shape[0], 1), cut=where)
            spec = FineTuneSpec(head=spec_to_json(MLPSpec(hidden=())), depth=node, start="pretrained", batch_size=ROWS)
            plan = Plan(spec, trainable_blocks(network, node), task, FULL, 1)
            sides.append((Training(network, Memory(source), plan), source))
        seconds: list[list[float]] = [[], []]
        rows = np.arange(ROWS)
        for step in range(steps + 1):
            for side, (training, source) in enumerate(sides):
                training.mode()
                started = time.process_time()
                # A map is stored in float16, so that its conversion is part of the step.
                training._step(0, rows, source if source.dtype == torch.uint8 else source.float(), None)
                if step:
                    seconds[side].append(time.process_time() - started)
        medians = [float(np.median(own)) for own in seconds]
        above = cost_above(nodes, node)
        ratio, predicted = medians[0] / medians[1], (1 - above + 3 * above) / (3 * above)
        short = name.split(":")[1]
        print(
            f"{short + ', ' + node:<36} {medians[0]:9.3f} {medians[1]:7.3f} {ratio:6.2f} {predicted:6.2f} {ratio / predicted:6.2f}"
        )
        figures |= {f"{short}_ratio": round(ratio, 3), f"{short}_of_predicted": round(ratio / predicted, 3)}
    return figures


if __name__ == "__main__":
    main()
