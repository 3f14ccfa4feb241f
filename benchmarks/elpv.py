"""The whole pipeline on ELPV: head, partial reuse, fine-tuned and ensemble side by side on a 75/25
split, over seeds.

    python benchmarks/elpv.py --cache CACHE --out RUNS [--seeds 5] [--no-finetune] [--quick]
    python benchmarks/elpv.py --case dinov2 [--weights dinov2.safetensors]

Runs examples/solar-cells-finetune.yaml for each seed of the split; features are extracted once,
into the cache. What each approach has to offer is chosen on validation folds; then each is shown
that seed's test split once, on record. --quick: one seed. --case dinov2: the best head on frozen
DINOv2 ViT-S/14 at 224 pixels (taps: auto) beside the best on each EfficientNet-Lite, after
comparing its features with transformers' Dinov2Model; weights: benchmarks/dinov2_weights.py. Published: 82.44 % (hand-crafted features
and an SVM) and 88.42 % (a VGG-19, fine-tuned; Deitsch et al. 2019).

Measured, five seeds, 95 % intervals of the means: head 88.29 % ± 1.07, ensemble of heads on three
networks 89.21 % ± 1.11, the selected model 88.75 % ± 1.14; fine-tuned above blocks.5 87.56 % on
validation folds. docs/finetune.md says what these figures depend on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from dinov2_weights import transformers_names
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.forward import make_forward, make_normalizer
from headrace.extract.taps.resolve import resolve_taps
from headrace.pipelines.cli.demo import solar_cells
from headrace.pipelines.models.reference import ModelAverage, model_ref
from headrace.pipelines.planning.run_state import read_run_state
from headrace.pipelines.recipe.load import Recipe, load_recipe
from headrace.pipelines.result import RunResult
from headrace.pipelines.run import run_recipe
from headrace.pipelines.selection.calibration import temperature_of
from headrace.pipelines.stages.evaluate import evaluate_model

EXAMPLE = Path(__file__).parent.parent / "examples" / "solar-cells-finetune.yaml"
PUBLISHED = 88.42


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=Path("headrace-elpv/cache"))
    parser.add_argument("--out", type=Path, default=Path("headrace-elpv/runs"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-finetune", action="store_true", help="heads and ensemble only")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--case", default="elpv", choices=["elpv", "dinov2"])
    parser.add_argument("--weights", type=Path, help="of DINOv2; default: fetched into --out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out.absolute() / "solar-cells.csv"
    solar_cells().to_csv(table, index=False)
    if options.case == "dinov2":
        compare_networks(options, table)
        return
    rows = []
    for seed in range(1 if options.quick else options.seeds):
        recipe = recipe_of(
            seed,
            table,
            options.cache.absolute(),
            options.out.absolute(),
            finetune=not options.no_finetune,
        )
        result = run_recipe(recipe, console=Console(stderr=True), workers=options.workers)
        rows += scores(seed, recipe, result)
        print(pd.DataFrame(rows).query("seed == @seed").to_string(index=False), flush=True)
    report(pd.DataFrame(rows))


def compare_networks(options: argparse.Namespace, table: Path) -> None:
    """Heads on DINOv2 beside those on each network of the example, on the same splits."""
    out = options.out.absolute()
    weights = (options.weights or out / "dinov2_vits14.safetensors").absolute()
    if not weights.is_file():
        script = Path(__file__).parent / "dinov2_weights.py"
        subprocess.run([sys.executable, script, weights], check=True)
    differences = compare_with_transformers(weights)
    spec = BackboneSpec("timm:vit_small_patch14_dinov2", str(weights), image_size=224)
    taps = [str(tap) for tap in resolve_taps(load_backbone(spec), "auto")]
    rows = []
    for seed in range(1 if options.quick else options.seeds):
        fields = yaml.safe_load(EXAMPLE.read_text())
        for network in fields["backbones"]:
            network["taps"] = [tap for tap in network["taps"] if not tap.endswith(".map")]
        dinov2 = {"name": spec.name, "weights": spec.weights, "image_size": 224}
        fields["backbones"].append(dinov2 | {"alias": "dinov2", "taps": taps})
        inputs = [
            [f"{network['alias']}:{tap}" for tap in network["taps"]]
            for network in fields["backbones"]
        ]
        logistic, (rbf,) = fields["heads"]["logistic"], fields["heads"]["sklearn"]
        fields["heads"] = {
            "logistic": {"C": [0.0003, 0.001, *logistic["C"], 0.1], "inputs": inputs},
            "sklearn": [rbf | {"inputs": inputs}],
        }
        fields["images"]["table"] = str(table)
        fields["task"]["seed"] = seed
        del fields["finetune"]
        fields |= {"cache": str(options.cache.absolute()), "out": str(out / f"dinov2-seed{seed}")}
        file = out / f"dinov2-seed{seed}.yaml"
        file.write_text(yaml.safe_dump(fields))
        recipe = load_recipe(file)
        result = run_recipe(recipe, console=Console(stderr=True), workers=options.workers)
        rows += network_scores(seed, recipe, result)
        print(pd.DataFrame(rows).query("seed == @seed").to_string(index=False), flush=True)
    report(pd.DataFrame(rows), differences)


def compare_with_transformers(weights: Path) -> dict[str, float]:
    """The largest relative differences between the last normalized tokens here and those of
    Dinov2Model, from the same tensors at 224 and 518 pixels.
    """
    from transformers import Dinov2Config, Dinov2Model

    differences = {}
    for size in (224, 518):
        spec = BackboneSpec("timm:vit_small_patch14_dinov2", str(weights), image_size=size)
        backbone = load_backbone(spec)
        # at the size itself, with the position embeddings as timm resamples them
        config = Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=size
        )
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            tensors = transformers_names(backbone.module.state_dict())
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                f"{folder}/model.safetensors",
            )
            theirs = Dinov2Model.from_pretrained(folder).eval()
        pixels = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8)
        taps = resolve_taps(backbone, ["norm.cls", "norm.avg"])
        found = torch.cat(make_forward(backbone, taps)(pixels))
        with torch.inference_mode():
            tokens = theirs(make_normalizer(backbone, "cpu")(pixels)).last_hidden_state
        expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)])
        difference = float((found - expected).abs().max() / expected.abs().max())
        assert difference < 1e-4, f"DINOv2 at {size} pixels differs by {difference:.1e}"
        differences[f"difference_from_transformers_{size}"] = difference
    return differences


def network_scores(seed: int, recipe: Recipe, result: RunResult) -> list[dict[str, object]]:
    """Validation and test accuracy of the best head on each network."""
    found = read_run_state(recipe)
    whole = result.board[(result.board["failed"] == 0) & result.board["final"]]
    rows: list[dict[str, object]] = []
    for network in recipe.backbones:
        own = whole["inputs"].map(
            lambda names, alias=network.alias: names[0].startswith(f"{alias}:")
        )
        best = whole[own].iloc[0]
        train = found.dataset.train
        model = model_ref(best, found.paths, found.feature_inputs)
        tested = evaluate_model(
            found.paths.test_evaluations,
            ModelAverage.of_one(model, temperature_of(best, train), train),
            found.dataset.test,
            train.digest,
            found.metric,
        )
        rows.append(
            {
                "seed": seed,
                "approach": network.alias,
                "validation": 100 * best[found.metric],
                "test": 100 * tested.value,
                "settings": best["settings"],
            }
        )
    return rows


def recipe_of(seed: int, table: Path, cache: Path, out: Path, *, finetune: bool) -> Recipe:
    """The example for one split."""
    recipe = load_recipe(EXAMPLE)
    return recipe.model_copy(
        update={
            "images": recipe.images.model_copy(update={"table": table}),
            "task": recipe.task.model_copy(update={"seed": seed}),
            "finetune": recipe.finetune if finetune else None,
            "cache": cache,
            "out": out / f"seed{seed}",
        }
    )


def scores(seed: int, recipe: Recipe, result: RunResult) -> list[dict[str, object]]:
    """Validation and test accuracy of the best of each approach, and of the selected model that the
    run gave.
    """
    found = read_run_state(recipe)
    test, digest = found.dataset.test, found.dataset.train.digest
    rows: list[dict[str, object]] = []

    def add(approach: str, validation: float, tested: object | None) -> None:
        accuracy = float("nan") if tested is None else 100 * tested.value  # type: ignore[attr-defined]
        rows.append(
            {"seed": seed, "approach": approach, "validation": 100 * validation, "test": accuracy}
        )

    whole = result.board[(result.board["failed"] == 0) & result.board["final"]]
    text = whole["settings"]
    for approach, chosen in (
        ("head", whole["kind"] != "finetune"),
        ("partial reuse", text.str.startswith("reused")),
        ("fine-tuned", text.str.startswith("fine-tuned")),
    ):
        if chosen.any():
            best = whole[chosen].iloc[0]
            model = model_ref(best, found.paths, found.feature_inputs)
            own = temperature_of(best, found.dataset.train)
            tested = evaluate_model(
                found.paths.test_evaluations,
                ModelAverage.of_one(model, own, found.dataset.train),
                test,
                digest,
                found.metric,
            )
            add(approach, best[found.metric], tested)
        elif (
            result.finetuned is not None
        ):  # rolled back: never trained on all rows, and so never shown the test split
            compared = result.finetuned.compared
            tried = compared[(compared["approach"] == approach) & compared[found.metric].notna()]
            if len(tried):
                add(approach, tried[found.metric].max(), None)
    if result.ensemble is not None:
        models = [
            model_ref(member.row, found.paths, found.feature_inputs)
            for member in result.ensemble.members
        ]
        tested = evaluate_model(
            found.paths.test_evaluations,
            result.ensemble.average_of(models),
            test,
            digest,
            result.ensemble.metric,
        )
        add("ensemble", result.ensemble.value, tested)
    validation = (
        result.ensemble.value if result.ensemble and result.ensemble.chosen else result.winner.score
    )
    add("the selected model", validation, result.test)
    return rows


def report(rows: pd.DataFrame, more: Mapping[str, float] | None = None) -> None:
    """Means over seeds with the seeds' spread; the last line is JSON."""
    console = Console(width=120)
    table = Table(
        title="ELPV, 75/25 split: accuracy in %, mean over seeds (published fine-tuned VGG-19: "
        f"{PUBLISHED})"
    )
    for column in ("approach", "seeds", "validation", "test", "95 % of the mean", "of each seed"):
        table.add_column(column)
    figures = {}
    for approach, own in rows.groupby("approach", sort=False):
        tests = own["test"].dropna().to_numpy(np.float64)
        half = (
            2.776 * tests.std(ddof=1) / np.sqrt(len(tests)) if len(tests) == 5 else float("nan")
        )  # Student, 4 degrees
        each = " ".join(f"{value:.2f}" for value in tests)
        shown = (
            (f"{tests.mean():.2f}", f"± {half:.2f}", each)
            if len(tests)
            else ("rolled back", "", "")
        )
        table.add_row(str(approach), str(len(own)), f"{own['validation'].mean():.2f}", *shown)
        name = str(approach).replace(" ", "_")
        figures[f"{name}_validation_accuracy"] = round(float(own["validation"].mean()), 2)
        if len(tests):
            figures[f"{name}_test_accuracy"] = round(float(tests.mean()), 2)
    console.print(table)
    print(json.dumps(figures | dict(more or {})))


if __name__ == "__main__":
    main()
