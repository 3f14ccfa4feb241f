"""Features of the demo's solar cells as arrays, and any scikit-learn estimator on them; run `make
demo` first.

python examples/features_in_python.py
"""

from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import cross_val_score

from headrace import load_recipe, run_recipe
from headrace.extract.images.content_hashes import content_hashes
from headrace.extract.sources.samples import read_table

if __name__ == "__main__":
    recipe = load_recipe("headrace-demo/recipe.yaml")
    result = run_recipe(recipe)  # the demo has been run: nothing is computed
    print(
        result.board.head(10)[["rank", "inputs", "kind", "settings", "accuracy", "standard_error"]]
    )

    samples = read_table("headrace-demo/solar-cells.csv", id_column="id")
    hashes = content_hashes(samples, recipe.cache / "contents.parquet").hashes
    X = result.features("blocks.4.avg").load([content for content in hashes if content])
    print(cross_val_score(HistGradientBoostingClassifier(), X, samples["label"], cv=3))
