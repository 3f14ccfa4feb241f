"""MLP banks, successive halving and neighbour search against what people run today.

    python benchmarks/heads_mlp.py --case mlp|mlp-wide|halving|knn|all [--quick]

Features: the handwritten digits of scikit-learn (1,797 images, public, in the package), shifted by
up to a pixel and with noise, through fixed random convolutions, rounded to float16. Images are
split before they are
shifted: train, validation (early stopping, choosing), test (the accuracies below).

Every side runs on one thread of one process, in turn, with its own warm-up. CPU seconds and wall
seconds are reported: on a shared machine only the first is fair. Same epochs, batch size, widths,
learning rates for all; all of them are counted whole (standardizing, training, validating).

Measured on 2 cores of an AMD EPYC (Zen 4), shared with other work, medians over 5 seeds, CPU
seconds, × is theirs / ours:
  64 heads, 5,000 x 512, hidden 64, 10 epochs: ours 5.3 (float32 7.5), torch loop 23.2 (4.4 x), its
  bfloat16 autocast
  23.7 (4.0 x), scikit-learn 16.5 (3.0 x); test accuracy 0.7152, 0.7151, 0.7144, 0.7144, 0.7101
  (s.e. 0.005 each). Halving, 20 epochs, a quarter kept after 2 and 6: 2.1 s against 35.1 (15.7 x
  torch), 29.2 (14.1 x scikit-learn); regret of the winner 0.003 in accuracy, standard deviation
  over seeds of one configuration 0.008. 16 heads, 5,000 x 1,280, hidden 256, 2 epochs, 1 seed: 2.3
  (float32 3.7) against 4.6 and 4.6 (1.9 x each), autocast
  3.3 (1.4 x). Wide heads are bound by the products, which run at 190 GF/s in bfloat16 and take over
  half of the time. knn, 16 settings x 5 folds, 5,000 x 512: 1.6 against 9.9 (6.0 x scikit-learn),
  equal accuracies.
"""

import argparse
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy is imported, so that every library is pinned alike

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier

from headrace.heads.data.task import REFIT, TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.neighbors.bank import fit_knn_bank
from headrace.heads.neighbors.kind import KNNSpec
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.networks.mlp import fit_mlp_bank
from headrace.heads.predict import predict_head
from headrace.heads.spec import Halving

Rows = dict[str, tuple[np.ndarray, np.ndarray]]


def digit_features(rows: int, width: int, seed: int = 0) -> Rows:
    """{"train" | "validation" | "test":

    (X (n, width) float32, y (n,))}; `rows` to train, a quarter for each other.
    """
    generator = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    filters = generator.normal(size=(256, 9)).astype(np.float32)
    mixing = generator.normal(size=(256 * 4, width)).astype(np.float32) / 32
    order = generator.permutation(len(images))
    sizes = {"train": rows, "validation": rows // 4, "test": rows // 4}
    parts = dict(zip(sizes, np.split(order, [1000, 1400]), strict=True))
    made: Rows = {}
    for name, members in parts.items():
        chosen = generator.choice(members, sizes[name])
        noisy = images[chosen] + 0.25 * generator.normal(size=(len(chosen), 8, 8)).astype(
            np.float32
        )
        moved = np.stack(
            [
                np.roll(i, s, (0, 1))
                for i, s in zip(noisy, generator.integers(-1, 2, (len(noisy), 2)), strict=True)
            ]
        )
        patches = np.lib.stride_tricks.sliding_window_view(moved, (3, 3), axis=(1, 2)).reshape(
            len(moved), 36, 9
        )
        responses = (
            np.maximum(patches @ filters.T, 0).reshape(len(moved), 2, 3, 2, 3, 256).mean((2, 4))
        )
        features = np.maximum(responses.reshape(len(moved), -1) @ mixing, 0).astype(np.float16)
        made[name] = features.astype(np.float32), labels[chosen]
    return made


def configurations(number: int, hidden: tuple[int, ...], epochs: int, seed: int) -> list[MLPSpec]:
    """Random search over learning rate and weight decay, log-uniform; the same for every side."""
    generator = np.random.default_rng(seed + 1000)
    rates, decays = 10 ** generator.uniform(-4, -2, number), 10 ** generator.uniform(-5, -1, number)
    pairs = zip(rates, decays, strict=True)
    return [
        MLPSpec(hidden, float(r), float(d), epochs=epochs, patience=epochs, seed=1000 * seed + i)
        for i, (r, d) in enumerate(pairs)
    ]


def bank(rows: Rows, specs: Sequence[MLPSpec], **options: Any) -> list[np.ndarray]:
    """Test predictions (n,) of every head of a bank."""
    X = np.concatenate([rows["train"][0], rows["validation"][0]])
    y = np.concatenate([rows["train"][1], rows["validation"][1]])
    fold = np.repeat([TRAIN_ONLY, 0], [len(rows["train"][1]), len(rows["validation"][1])]).astype(
        np.int16
    )
    fits = fit_mlp_bank(TrainingData(X, y, fold, 10), specs, refit=False, **options)
    return [predict_head(fit.spec, fit.arrays, rows["test"][0]).argmax(1) for fit in fits]


def scaling(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the training rows; 1 where a feature is constant, as StandardScaler has
    it.
    """
    scale = rows["train"][0].std(0)
    return rows["train"][0].mean(0), np.where(scale > 0, scale, 1)


def torch_loop(rows: Rows, specs: Sequence[MLPSpec], *, autocast: bool = False) -> list[np.ndarray]:
    """One head at a time, written well: tensors made once, fused AdamW, no DataLoader, the best
    epoch kept.
    """
    mean, scale = scaling(rows)
    parts = {name: torch.from_numpy((X - mean) / scale) for name, (X, _) in rows.items()}
    y = {name: torch.from_numpy(labels) for name, (_, labels) in rows.items()}
    loss_of = torch.nn.CrossEntropyLoss()
    predictions = []
    for spec in specs:
        torch.manual_seed(spec.seed)
        sizes = (parts["train"].shape[1], *spec.hidden)
        layers: list[torch.nn.Module] = []
        for i, o in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
        net = torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], 10))
        optimizer = torch.optim.AdamW(
            net.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True
        )
        best, kept = float("inf"), net.state_dict()
        for _ in range(spec.epochs):
            for index in torch.randperm(len(y["train"])).split(spec.batch_size):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = loss_of(net(parts["train"][index]), y["train"][index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                held = float(loss_of(net(parts["validation"]).float(), y["validation"]))
            if held < best:
                best, kept = held, {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(kept)
        with torch.no_grad():
            predictions.append(net(parts["test"]).argmax(1).numpy())
    return predictions


def scikit_learn(rows: Rows, specs: Sequence[MLPSpec]) -> list[np.ndarray]:
    """MLPClassifier in float32 with as many epochs; it validates nothing, which is in
    its favour.
    """
    mean, scale = scaling(rows)
    X, test = (rows["train"][0] - mean) / scale, (rows["test"][0] - mean) / scale
    predictions = []
    for spec in specs:
        model = MLPClassifier(
            spec.hidden,
            batch_size=spec.batch_size,
            learning_rate_init=spec.learning_rate,
            alpha=spec.weight_decay,
            max_iter=spec.epochs,
            n_iter_no_change=spec.epochs + 1,
            random_state=spec.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predictions.append(model.fit(X, rows["train"][1]).predict(test))
    return predictions


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """What the function returns, CPU seconds, wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    value = function(*arguments)
    return value, time.process_time() - cpu, time.perf_counter() - wall


def peak() -> float:
    """Float32 products of this machine now, GF/s of one thread."""
    a, b = np.ones((1024, 1280), np.float32), np.ones((1280, 1024), np.float32)
    return 2 * 1024 * 1280 * 1024 / min(timed(lambda: a @ b)[1] for _ in range(10)) / 1e9


def mlp_case(
    *, quick: bool, hidden: tuple[int, ...] = (64,), width: int = 512, epochs: int = 10
) -> dict[str, Any]:
    """64 heads that differ in learning rate, weight decay and seed."""
    number, epochs, seeds, train = (8, 3, 2, 2000) if quick else (64, epochs, 5, 5000)
    sides: dict[str, Callable[[Rows, Sequence[MLPSpec]], list[np.ndarray]]] = {
        "headrace": bank,
        "headrace float32": lambda rows, specs: bank(rows, specs, precision="float32"),
        "torch loop": torch_loop,
        "torch loop bfloat16": lambda rows, specs: torch_loop(rows, specs, autocast=True),
        "scikit-learn": scikit_learn,
    }
    rows = digit_features(train, width)
    for side in sides.values():
        side(rows, configurations(1, hidden, 1, 0))
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    accuracy: dict[str, list[float]] = {name: [] for name in sides}
    for seed in range(seeds):
        rows = digit_features(train, width, seed)
        specs = configurations(number, hidden, epochs, seed)
        for name, side in sides.items():
            predictions, own_cpu, own_wall = timed(side, rows, specs)
            cpu[name].append(own_cpu)
            wall[name].append(own_wall)
            accuracy[name].append(
                float(np.mean([(p == rows["test"][1]).mean() for p in predictions]))
            )
    shape = (
        f"{number} heads, {train:,} x {width}, hidden {hidden}, {epochs} epochs of batches of 256, "
        f"{seeds} seeds"
    )
    print(f"\nmlp: {shape}; GEMM float32 {peak():.0f} GF/s")
    print(
        f"{'':22}{'CPU s':>9}{'spread':>8}{'wall s':>9}{'x ours':>8}   mean test accuracy (s.e. "
        "over seeds)"
    )
    found = {}
    for name in sides:
        ratio = np.median(np.array(cpu[name]) / np.array(cpu["headrace"]))
        error = np.std(accuracy[name], ddof=1) / np.sqrt(seeds)
        spread = (max(cpu[name]) - min(cpu[name])) / np.median(cpu[name])
        print(
            f"{name:22}{np.median(cpu[name]):9.2f}{spread:8.0%}{np.median(wall[name]):9.2f}{ratio:8.2f} "
            f"  {np.mean(accuracy[name]):.4f} ({error:.4f})"
        )
        found[name] = {
            "cpu_s": float(np.median(cpu[name])),
            "ratio": float(ratio),
            "accuracy": float(np.mean(accuracy[name])),
        }
        found[name]["standard_error"] = float(error)
        difference = np.array(accuracy["headrace"]) - np.array(accuracy[name])
        found[name]["accuracy_difference"] = float(difference.mean())
    return {"case": "mlp", "shape": shape, "sides": found}


def halving_case(*, quick: bool) -> dict[str, Any]:
    """64 configurations with and without halving; regret of the winner against the noise of its
    seed.
    """
    number, epochs, seeds, train = (8, 4, 2, 2000) if quick else (64, 20, 5, 5000)
    schedule = Halving(after=(1, 2), keep=0.5) if quick else Halving(after=(2, 6), keep=0.25)
    sides: dict[str, list[float]] = {
        "halving": [],
        "whole bank": [],
        "torch loop": [],
        "scikit-learn": [],
    }
    regret, noise = [], []
    for seed in range(seeds):
        rows = digit_features(train, 512, seed)
        specs = configurations(number, (64,), epochs, seed)
        y = rows["test"][1]
        (won, _), cpu, _ = timed(_winner, rows, specs, schedule)
        sides["halving"].append(cpu)
        (best, _), cpu, _ = timed(_winner, rows, specs, None)
        sides["whole bank"].append(cpu)
        # One head in eight of the others stands for all of them: their time doesn't depend on the
        # learning rate.
        share = specs[::8]
        sides["torch loop"].append(timed(torch_loop, rows, share)[1] * number / len(share))
        sides["scikit-learn"].append(timed(scikit_learn, rows, share)[1] * number / len(share))
        # The same two winners with other seeds: the difference that is due to the choice, and what
        # a seed alone does.
        again = [
            replace(spec, seed=9000 + i) for spec in (specs[best], specs[won]) for i in range(8)
        ]
        scores = np.array([(p == y).mean() for p in bank(rows, again)]).reshape(2, 8)
        regret.append(float(scores[0].mean() - scores[1].mean()))
        noise.append(float(scores[0].std(ddof=1)))
    print(
        f"\nhalving: {number} heads, {epochs} epochs, {schedule.keep} of them kept after "
        f"{schedule.after}, {seeds} seeds"
    )
    print(f"{'':22}{'CPU s':>9}{'x ours':>8}")
    ratios = {
        name: float(np.median(np.array(s) / np.array(sides["halving"])))
        for name, s in sides.items()
    }
    for name, seconds in sides.items():
        print(f"{name:22}{np.median(seconds):9.2f}{ratios[name]:8.2f}")
    print(
        f"regret of the winner, test accuracy: mean {np.mean(regret):+.4f}, each "
        f"{np.round(regret, 4).tolist()}"
    )
    print(f"one configuration over 8 seeds: standard deviation {np.mean(noise):.4f}")
    return {
        "case": "halving",
        "ratios": ratios,
        "regret": float(np.mean(regret)),
        "seed_noise": float(np.mean(noise)),
    }


def _winner(rows: Rows, specs: Sequence[MLPSpec], halving: Halving | None) -> tuple[int, float]:
    """The configuration with the best validation accuracy among those that ran to the end."""
    X = np.concatenate([rows["train"][0], rows["validation"][0]])
    y = np.concatenate([rows["train"][1], rows["validation"][1]])
    fold = np.repeat([TRAIN_ONLY, 0], [len(rows["train"][1]), len(rows["validation"][1])]).astype(
        np.int16
    )
    fits = fit_mlp_bank(TrainingData(X, y, fold, 10), specs, refit=False, halving=halving)
    last = max(fit.iterations for fit in fits)
    scores = [
        float((fit.validation.argmax(1) == rows["validation"][1]).mean())
        if fit.validation is not None and fit.iterations == last
        else -1.0
        for fit in fits
    ]
    return int(np.argmax(scores)), max(scores)


def knn_case(*, quick: bool) -> dict[str, Any]:
    """Every k, both metrics, five folds: one pass, against scikit-learn's cross-validation of each
    setting.
    """
    train, width, repeats = (1000, 256, 2) if quick else (5000, 512, 5)
    X, y = digit_features(train, width)["train"]
    fold = (np.arange(train) % 5).astype(np.int16)
    specs = [
        KNNSpec(k, metric)
        for k in (1, 3, 5, 10, 20, 50, 100, 200)
        for metric in ("cosine", "euclidean")
    ]  # type: ignore[arg-type]

    def ours() -> list[float]:
        fits = fit_knn_bank(TrainingData(X, y, fold, 10), specs, refit=False)
        scores = [
            (f.validation.argmax(1) == y[fold == f.fold]).mean()
            for f in fits
            if f.fold != REFIT and f.validation is not None
        ]
        return [float(value) for value in np.reshape(scores, (len(specs), 5)).mean(1)]

    def theirs() -> list[float]:
        split = PredefinedSplit(fold)
        models = [KNeighborsClassifier(s.k, metric=s.metric, algorithm="brute") for s in specs]
        return [float(cross_val_score(model, X, y, cv=split).mean()) for model in models]

    ours(), theirs()
    runs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    ratio = float(np.median([b[1] / a[1] for a, b in runs]))
    difference = float(np.abs(np.array(runs[0][0][0]) - np.array(runs[0][1][0])).max())
    print(f"\nknn: {len(specs)} settings x 5 folds, {train:,} x {width}")
    print(f"{'headrace, one pass':22}{np.median([a[1] for a, _ in runs]):9.2f} CPU s")
    print(
        f"{'scikit-learn, each':22}{np.median([b[1] for _, b in runs]):9.2f} CPU s{ratio:8.2f} x "
        "ours"
    )
    print(f"largest difference in accuracy of a setting: {difference:.4f} (ties among neighbours)")
    return {"case": "knn", "ratio": ratio, "accuracy_difference": difference}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "mlp": mlp_case,
    "mlp-wide": lambda *, quick: (
        mlp_case(quick=quick, hidden=(256,), width=1280, epochs=4) | {"case": "mlp-wide"}
    ),
    "halving": halving_case,
    "knn": knn_case,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = list(CASES) if options.case == "all" else [options.case]
    figures = {}
    for name in chosen:
        figures |= {
            f"{name} {measure}": value
            for measure, value in flat(CASES[name](quick=options.quick)).items()
        }
    print(json.dumps(figures))


def flat(found: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested dictionaries by their joined names; texts are left out."""
    figures: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, dict):
            figures |= flat(value, f"{prefix}{name} ")
        elif isinstance(value, int | float):
            figures[prefix + name] = float(f"{value:.4g}")
    return figures


if __name__ == "__main__":
    main()
