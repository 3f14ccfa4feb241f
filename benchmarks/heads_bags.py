"""A bank of heads on bags against a torch loop, and attention against the mean of a unit's images.

    python benchmarks/heads_bags.py --case bank|needle|all [--quick]

bank: 32 settings of gated attention (8 learning rates x 4 dropouts and seeds), 300 units of 1 to 20
rows, 512 features, minibatches of 16 units, against the same network trained setting by setting as
people write it: torch.nn modules, torch.optim.AdamW, a softmax for each unit of a minibatch. Both
sides train the same epochs on minibatches of the same size and validate after each; one thread of
one process, in turn, CPU seconds. Then the same with larger units.

needle: units of ten rows of which one carries the label: it is moved by 4 deviations, up or down,
along one of 16 features, and by 6 along another, which tells it from the others. The mean of a
unit moves by 0.4 of a deviation while its noise is 1/sqrt(10): no rule on means is right more often
than Phi(0.4 sqrt(10)) = 0.897. Who reads the marked row alone is right Phi(4) = 0.99997 of the time.

Measured on 2 cores of an AMD EPYC, 10 epochs, CPU seconds of the bank and of the loop, with both
cores free, and their ratios in three runs: units of 1 to 20 rows 1.6 and 6.4 (4.0 to 4.2 x), of 1
to 80 rows 3.4 and 13.7 (3.9 to 4.4 x), of 50 to 400 rows 2.8 and 11.1 (3.4 to 4.3 x). Beside much
other work, which costs the loop more, in seven runs 5.0 to 7.0, 4.3 to 5.2 and 3.8 to 5.0 x.

What the ratio can be: a row costs a head 156,000 operations where it is trained on (131,000 of them
the first layer's) and 74,000 where it is validated, 590 GFLOP in all for the units of 50 to 400
rows. A core does 115 GF/s in float32, which the loop has to take: 5 s of its 15 are products, so
that a bank in float32 can be 3 times as fast at most, wherever its values lie. In bfloat16 it
does 450, and the column "at most" is the loop's time over that of the bank's products alone. What
keeps a bank from it are a dozen passes over hidden values and gates, in bfloat16 too: a row and
head took 0.63 microseconds of a step, 0.35 of them products. Heads that go through a step one by
one, so that their values stay in a core's own 1 MB, have as many calls for each as all together:
1.2 to 1.7 times as long. The smaller the units, the more of the loop's time is calls, which a bank
shares.

Hidden values in bfloat16 change what is rounded, not what is found. The same 32 settings in
float32: mean accuracies 0.603, 0.773 and 0.760 for 0.608, 0.771 and 0.763, rank correlations of the
settings' losses 0.997, 0.988 and 0.999, correlations of the images' weights 0.991 and more. What is
stored and predicted is float32.

needle, 2,000 units to test on: mean 0.8925,
attention 1.0000, maximum 1.0000.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy is imported, so that every library is pinned alike

import numpy as np
import torch

from headrace.heads.bags.bank import fit_bags_bank, units_of
from headrace.heads.bags.kind import BagsSpec
from headrace.heads.data.task import TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.spec import FitResult

# Of one head: 2 x 512 x 64 of the first layer and 2 x 64 x 64 of the two gates forward; where it is
# trained on, the first layer's weights' gradient, and the gates' both gradients.
VALIDATED_ROW_FLOPS = 2 * 512 * 64 + 2 * 64 * 64
TRAINED_ROW_FLOPS = 2 * 2 * 512 * 64 + 3 * 2 * 64 * 64


def made_units(n_units: int, sizes: tuple[int, int], n_features: int = 512) -> TrainingData:
    """Units of `sizes` rows, a quarter of them held out; a tenth of a positive unit's rows, one at
    least, carries the label.
    """
    generator = np.random.default_rng(0)
    sizes = generator.integers(sizes[0], sizes[1] + 1, n_units)
    label = generator.integers(0, 2, n_units)
    unit = np.repeat(np.arange(n_units), sizes)
    X = generator.normal(size=(len(unit), n_features)).astype(np.float32)
    for number in np.flatnonzero(label):
        rows = np.flatnonzero(unit == number)
        X[generator.choice(rows, max(1, len(rows) // 10), replace=False), :8] += 1.5
    fold = np.where(np.arange(n_units) % 4 == 0, 0, TRAIN_ONLY)
    return TrainingData(X, label[unit], fold[unit], 2, unit=unit)


class GatedAttention(torch.nn.Module):
    """ABMIL as its authors' code and most since have it."""

    def __init__(self, n_features: int, spec: BagsSpec) -> None:
        super().__init__()
        width = spec.hidden[0]
        self.embed = torch.nn.Sequential(
            torch.nn.Linear(n_features, width), torch.nn.ReLU(), torch.nn.Dropout(spec.dropout)
        )
        self.tanh = torch.nn.Sequential(
            torch.nn.Linear(width, spec.attention_width), torch.nn.Tanh()
        )
        self.gate = torch.nn.Sequential(
            torch.nn.Linear(width, spec.attention_width), torch.nn.Sigmoid()
        )
        self.attention = torch.nn.Linear(spec.attention_width, 1)
        self.classify = torch.nn.Linear(width, 2)

    def forward(self, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Decisions (B, 2) of units of these sizes, whose rows stand one behind the other."""
        hidden = self.embed(rows)
        logits = self.attention(self.tanh(hidden) * self.gate(hidden))
        pooled = [
            torch.softmax(bag_logits, 0).T @ bag
            for bag, bag_logits in zip(hidden.split(sizes), logits.split(sizes), strict=True)
        ]
        return self.classify(torch.cat(pooled))


def torch_loop(data: TrainingData, specs: list[BagsSpec]) -> float:
    """Train every setting by itself; returns the mean accuracy of their best epochs."""
    units = units_of(data)
    rows_of = [units.order[a:b] for a, b in zip(units.offsets[:-1], units.offsets[1:], strict=True)]
    train, held = (np.flatnonzero(units.data.fold != 0), np.flatnonzero(units.data.fold == 0))
    train_rows = np.concatenate([rows_of[unit] for unit in train])
    Z = (data.X - data.X[train_rows].mean(0)) / data.X[train_rows].std(0)
    rows = torch.from_numpy(Z.astype(np.float32))
    target = torch.from_numpy(np.asarray(units.data.target, np.int64))

    def bags(chosen: np.ndarray) -> tuple[torch.Tensor, list[int]]:
        members = [rows_of[unit] for unit in chosen]
        return rows[np.concatenate(members)], [len(member) for member in members]

    accuracies = []
    for spec in specs:
        torch.manual_seed(spec.seed)
        network = GatedAttention(data.X.shape[1], spec)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        best_loss, accuracy = float("inf"), 0.0
        for epoch in range(spec.epochs):
            network.train()
            order = np.random.default_rng([epoch, spec.seed]).permutation(train)
            for start in range(0, len(order), spec.batch_size):
                batch = order[start : start + spec.batch_size]
                loss = torch.nn.functional.cross_entropy(network(*bags(batch)), target[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            network.eval()
            with torch.no_grad():
                decision = network(*bags(held))
                loss = torch.nn.functional.cross_entropy(decision, target[held])
            if float(loss) < best_loss:
                best_loss = float(loss)
                accuracy = float((decision.argmax(1) == target[held]).float().mean())
        accuracies.append(accuracy)
    return float(np.mean(accuracies))


def mean_accuracy(data: TrainingData, fits: list[FitResult]) -> float:
    """Of units, each counted once."""
    held = data.fold == 0
    _, first = np.unique(data.unit[held], return_index=True)
    target = data.target[held][first]
    return float(np.mean([(fit.validation[first].argmax(1) == target).mean() for fit in fits]))


def seconds_of(work: Callable[[], float]) -> tuple[float, float]:
    """CPU seconds, and what the work returns."""
    started = time.process_time()
    value = work()
    return time.process_time() - started, value


def bank_case(quick: bool) -> dict[str, float]:
    """32 settings in a bank, and one by one, with units of several sizes."""
    epochs = 3 if quick else 10
    specs = [
        BagsSpec(
            learning_rate=float(rate),
            dropout=dropout,
            epochs=epochs,
            patience=epochs,
            seed=seed,
        )
        for rate in np.geomspace(1e-4, 1e-2, 8)
        for dropout, seed in ((0.0, 0), (0.0, 1), (0.5, 2), (0.5, 3))
    ]
    print(f"{len(specs)} settings of gated attention, 512 features, {epochs} epochs, CPU seconds")
    print("  units  rows of each    bank   torch loop      x   at most   accuracy of both")
    found = {}
    rate = product_rate()
    for n_units, sizes in ((300, (1, 20)), (300, (1, 80)), (60, (50, 400))):
        data = made_units(n_units, sizes)
        fit_bags_bank(data, specs[:2], refit=False)  # both sides warm
        torch_loop(data, specs[:1])
        ours_s, ours = seconds_of(
            lambda data=data: mean_accuracy(data, fit_bags_bank(data, specs, refit=False))
        )
        loop_s, loop = seconds_of(lambda data=data: torch_loop(data, specs))
        name = f"{sizes[0]} to {sizes[1]}"
        held_rows = int((data.fold == 0).sum())
        flops = len(data.fold) * TRAINED_ROW_FLOPS - held_rows * (
            TRAINED_ROW_FLOPS - VALIDATED_ROW_FLOPS
        )
        limit = loop_s / (flops * len(specs) * epochs / rate)
        print(
            f"  {n_units:5}  {name:>12}  {ours_s:6.2f}  {loop_s:11.2f}  {loop_s / ours_s:5.1f}   "
            f"{limit:7.1f}   {ours:.3f} {loop:.3f}"
        )
        found |= {f"bank_s {name}": ours_s, f"ratio {name}": loop_s / ours_s}
        found[f"ratio at most {name}"] = limit
    print(f"at most: a bank that does nothing but its products, {rate / 1e9:.0f} GF/s in bfloat16")
    return found


def product_rate() -> float:
    """Return flops a second of the first layer's product for nine heads in bfloat16, the best of
    ten.
    """
    weight, rows = torch.ones(576, 512).bfloat16(), torch.ones(2700, 512).bfloat16()
    seconds = [seconds_of(lambda: float((weight @ rows.t())[0, 0]))[0] for _ in range(10)]
    return 2 * 576 * 512 * 2700 / min(seconds)


def needle_case(quick: bool) -> dict[str, float]:
    """Attention, maximum and mean where one row in ten carries the label."""
    generator = np.random.default_rng(0)
    n_units, size, n_features = (600 if quick else 4000), 10, 16
    X = generator.normal(size=(n_units, size, n_features)).astype(np.float32)
    label = generator.integers(0, 2, n_units)
    carrier = generator.integers(0, size, n_units)
    X[np.arange(n_units), carrier, 0] += np.where(label == 1, 4, -4)
    X[np.arange(n_units), carrier, 1] += 6
    data = TrainingData(
        X.reshape(-1, n_features),
        np.repeat(label, size),
        np.repeat(np.where(np.arange(n_units) % 2 == 0, 0, TRAIN_ONLY), size),
        2,
        unit=np.repeat(np.arange(n_units), size),
    )
    found = {}
    for name, pooling, hidden in (
        ("mean", "mean", ()),
        ("attention", "attention", (32,)),
        ("max", "max", (32,)),
    ):
        spec = BagsSpec(pooling, hidden, learning_rate=3e-3, epochs=40, patience=10)
        (fit,) = fit_bags_bank(data, [spec], refit=False)
        found[name] = mean_accuracy(data, [fit])
        if name == "attention":
            weights = fit.arrays["instance_weight"].reshape(-1, size)
            found["carrier_found"] = float((weights.argmax(1) == carrier[::2]).mean())
    print(f"one row in ten carries the label, {n_units // 2:,} units to train on and to test on")
    print(f"  mean of the features  {found['mean']:.4f}   (at most 0.8970 by theory)")
    print(f"  gated attention       {found['attention']:.4f}   (at most 0.99997)")
    print(f"  maximum               {found['max']:.4f}")
    print(f"  the weightiest row is the carrier in {found['carrier_found']:.1%} of the units")
    return found


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("bank", "needle", "all"), default="all")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = {"bank": bank_case, "needle": needle_case}
    chosen = cases if options.case == "all" else {options.case: cases[options.case]}
    print(json.dumps({name: case(options.quick) for name, case in chosen.items()}))


if __name__ == "__main__":
    main()
