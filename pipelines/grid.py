"""From the recipe's lists to head specs: products, in a fixed order, each spec once."""

import difflib
import itertools
import json
from collections.abc import Iterator, Sequence

from headrace.heads import CentroidSpec, HeadSpec, KNNSpec, LogisticSpec, MLPSpec, RidgeSpec, SklearnSpec
from headrace.pipelines.recipe import HeadInput, Heads, RecipeError

# (names of the feature sets that stand side by side, specs of one kind to train on them)
Wanted = tuple[tuple[str, ...], tuple[HeadSpec, ...]]


def wanted_heads(heads: Heads, names: Sequence[str]) -> list[Wanted]:
    """Every (inputs, specs) pair that the recipe asks for; `names` are the feature sets there are.

    Raises RecipeError for an input that is not one of them.
    """
    return [
        (columns, tuple(dict.fromkeys(specs))) for inputs, specs in _grids(heads) for columns in _expand(inputs, names)
    ]


def _grids(heads: Heads) -> Iterator[tuple[tuple[HeadInput, ...], list[HeadSpec]]]:
    # One entry per (kind, class weight): these heads share their products best in one bank.
    if grid := heads.logistic:
        for class_weight in grid.class_weight:
            yield grid.inputs, [LogisticSpec(C=c, class_weight=class_weight) for c in sorted(grid.C)]
    if ridge := heads.ridge:
        for class_weight in ridge.class_weight:
            yield ridge.inputs, [RidgeSpec(alpha=alpha, class_weight=class_weight) for alpha in sorted(ridge.alpha)]
    if mlp := heads.mlp:
        axes = itertools.product(
            mlp.hidden,
            mlp.learning_rate,
            mlp.weight_decay,
            mlp.dropout,
            mlp.label_smoothing,
            mlp.class_weight,
            mlp.seed,
        )
        yield (
            mlp.inputs,
            [
                MLPSpec(
                    hidden=hidden,
                    learning_rate=rate,
                    weight_decay=decay,
                    dropout=dropout,
                    label_smoothing=smoothing,
                    class_weight=class_weight,
                    batch_size=mlp.batch_size,
                    epochs=mlp.epochs,
                    patience=mlp.patience,
                    seed=seed,
                )
                for hidden, rate, decay, dropout, smoothing, class_weight, seed in axes
            ],
        )
    if knn := heads.knn:
        yield (
            knn.inputs,
            [KNNSpec(k=k, metric=m, weighting=w) for k, m, w in itertools.product(knn.k, knn.metric, knn.weighting)],
        )
    if centroid := heads.centroid:
        yield centroid.inputs, [CentroidSpec(metric=metric) for metric in centroid.metric]
    for estimator in heads.sklearn:
        for values in itertools.product(*estimator.parameters.values()):
            parameters = json.dumps(dict(zip(estimator.parameters, values, strict=True)), sort_keys=True)
            yield (
                estimator.inputs,
                [SklearnSpec(estimator=estimator.estimator, parameters=parameters, standardize=estimator.standardize)],
            )


def _expand(inputs: Sequence[HeadInput], names: Sequence[str]) -> list[tuple[str, ...]]:
    columns: list[tuple[str, ...]] = []
    for item in inputs:
        if item == "each":
            columns += [(name,) for name in names]
        elif item == "all":
            columns.append(tuple(names))
        else:
            columns.append(tuple(_known(name, names) for name in item))
    return list(dict.fromkeys(columns))


def _known(name: str, names: Sequence[str]) -> str:
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise RecipeError(f"heads: inputs names {name!r}, which no backbone gives: {hint}There are: {', '.join(names)}")
