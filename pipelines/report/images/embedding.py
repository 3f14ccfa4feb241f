"""The map section: images as points on a plane, laid out by the features that the winner reads.

n images, D features.
"""

import contextlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import xxhash

from headrace.cache.atomic_io import publish_replace
from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import FeatureSet
from headrace.cache.format.sealed import read_sealed_arrays, sealed_arrays
from headrace.cache.manifest import MANIFEST
from headrace.heads.arrays import Doubles, Floats, Index, Strings
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.records import RUN_AGAIN
from headrace.pipelines.report.images.small_copies import SmallCopy
from headrace.pipelines.report.judged import one_by_one
from headrace.pipelines.report.page.blocks import (
    NO_VALUE,
    STEPS,
    Block,
    Colouring,
    Layout,
    Note,
    PointMap,
    Section,
)

MAX_POINTS = 100_000  # as many as a browser can draw
_MAX_BYTES = 1_000_000_000  # of features in memory
_MAX_UMAP = 20_000  # images: UMAP takes about 4 s for each thousand on one core
_UMAP_COMPONENTS = 50  # principal components that UMAP reads
_EXACT = 2048  # features or images up to which PCA is exact
_MAX_CATEGORIES = 12  # numbers of at most so many distinct values are coloured as words
_MAX_WORDS = 5000  # distinct values of a column that images can be coloured by
_READ_ROWS = 4096  # feature maps in memory at once, to be averaged over positions


def map_section(
    run: FinishedRun, images: pd.DataFrame, copies: Mapping[str, SmallCopy], remarks: list[Note]
) -> Section:
    """Return the section.

    images: from `image_table`. copies: pictures, by content hash. remarks: notes below the map, on
    what it cannot show.
    """
    title = "Map of the images"
    lead = (
        "Images that the network sees as alike lie near each other. Draw around some to have them "
        f"as a table; mistakes that lie together have something in common.{one_by_one(run)}"
    )
    names = _input_names(run)
    try:
        features, rows, notes = _read_features(run, names, images["content"].to_numpy(str))
    except (HeadraceError, OSError) as error:
        text = f"No map: the features cannot be read: {error}"
        return Section("map", title, lead, (Note(text, "warning"),))
    blocks: list[Block] = [*remarks, *notes]
    # Two points lie in one line, whatever they are.
    if len(rows) < 3:
        blocks.append(Note(f"No map: {len(rows)} of the images have features."))
        return Section("map", title, lead, tuple(blocks))
    shown = images.iloc[rows].reset_index(drop=True)
    layouts, share = make_layouts(features, run.paths.map_places)
    pictures = tuple(
        copies[content].webp if content in copies else None for content in shown["content"]
    )
    n_pictures = sum(picture is not None for picture in pictures)
    caption = (
        f"{count_text(len(shown), 'image')} by what the winner reads of them, {' + '.join(names)}: "
        f"PCA of the standardized features; the two directions hold {100 * share:.0f} % of the "
        "variance" + (f"; {n_pictures:,} have a picture" if 0 < n_pictures < len(shown) else "")
    )
    point_map = PointMap(
        "map",
        caption,
        layouts,
        colourings(shown, () if run.recipe.task.group is None else (run.recipe.task.group,)),
        tuple(shown["id"].astype(str)),
        # Nothing at all saves the page a list of as many nulls as there are images.
        pictures if n_pictures else (),
    )
    return Section("map", title, lead, (point_map, *blocks))


def make_layouts(
    features: Floats, places_path: Path | None = None, *, seed: int = 0
) -> tuple[tuple[Layout, ...], float]:
    """Return layouts of features (n, D) by PCA and, if umap-learn is installed, by UMAP (McInnes,
    Healy and Melville 2018, arXiv:1802.03426); and the share of the variance in PCA's two
    directions.

    places_path: a file that keeps UMAP's result for the next page of the same features.
    """
    from sklearn.decomposition import PCA

    # Standardized, as for heads; a feature that does not vary would be divided by about zero.
    X = features - features.mean(0)
    spread = X.std(0)
    varies = spread > 1e-6 * spread.max(initial=0)
    X = X[:, varies] / spread[varies]
    if not X.shape[1]:
        return (Layout("PCA", _quantized(np.zeros((len(X), 2)))),), 0.0
    # Exact where that is cheap; beyond, randomized (Halko, Martinsson and Tropp 2011,
    # doi:10.1137/090771806), as in scikit-learn.
    exact = "covariance_eigh" if len(X) >= X.shape[1] else "full"
    pca = PCA(
        min(_UMAP_COMPONENTS, *X.shape),
        svd_solver=exact if min(X.shape) <= _EXACT else "randomized",
        random_state=seed,
    )
    components = pca.fit_transform(X)
    plane = np.zeros((len(X), 2))
    plane[:, : components.shape[1]] = components[:, :2]
    layouts = [Layout("PCA", _quantized(plane))]
    # UMAP needs more points than its neighbourhoods have: 15 by default.
    if importlib.util.find_spec("umap") is not None and len(X) > 15:
        name, rows = "UMAP", None
        if len(X) > _MAX_UMAP:
            name = f"UMAP of {_MAX_UMAP:,}"
            drawn = np.random.default_rng(seed).choice(len(X), _MAX_UMAP, replace=False)
            rows = np.sort(drawn).astype(np.uint32)
        places = _umap_places(components if rows is None else components[rows], places_path, seed)
        if places is not None:
            layouts.append(Layout(name, places, rows))
    return tuple(layouts), float(pca.explained_variance_ratio_[:2].sum())


def _umap_places(
    components: Floats, places_path: Path | None, seed: int
) -> npt.NDArray[np.uint16] | None:
    """Return UMAP's places (n, 2) of these components, from the file if it has them; None if UMAP
    gives no finite ones, as for images that are all alike.
    """
    # UMAP takes half a minute and more, and a page is often written again.
    state = f"{importlib.metadata.version('umap-learn')} {seed} {components.shape}".encode()
    key = np.array([xxhash.xxh3_128_hexdigest(state + components.tobytes())], "S32")
    try:
        stored = read_sealed_arrays(places_path.read_bytes()) if places_path else {}
        if np.array_equal(stored["key"], key) and stored["places"].shape == (len(components), 2):
            return np.asarray(stored["places"], np.uint16)
    except (OSError, ValueError, KeyError):
        pass  # absent or damaged: the places are computed again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns that a seed takes one core; numba warns too
        from umap import UMAP

        plane = np.asarray(UMAP(random_state=seed, n_jobs=1).fit_transform(components))
    if not np.isfinite(plane).all():
        return None
    places = _quantized(plane)
    if places_path is not None:
        with contextlib.suppress(OSError):  # a run in a read-only directory has a map too
            publish_replace(places_path, sealed_arrays({"key": key, "places": places}))
    return places


def _quantized(plane: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """Return places (n, 2) in 16 bits, with one scale for both axes so that distances compare."""
    low, high = plane.min(0), plane.max(0)
    span = float((high - low).max()) or 1.0
    centred = (plane - (low + high) / 2) / span + 0.5
    return np.asarray(np.clip(np.round(centred * 65_535), 0, 65_535), np.uint16)


def colourings(shown: pd.DataFrame, always: Collection[str]) -> tuple[Colouring, ...]:
    """Return what images can be coloured by: each column of `shown` with few words, or numbers.

    always: columns that are offered as words, up to _MAX_WORDS of them, such as the group.
    """
    first_names = [name for name in ("label", "predicted", "outcome", "split") if name in shown]
    other_names = [name for name in shown.columns if name not in (*first_names, "id", "content")]
    colouring_list = []
    for name in (*first_names, *other_names):
        column = shown[name]
        is_number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        if is_number and name not in always and column.nunique() > _MAX_CATEGORIES:
            numbers = column.to_numpy(np.float64)
            colouring_list.append(_number_colouring(str(name), numbers))
            continue
        write = "{:.4g}".format if pd.api.types.is_float_dtype(column) else str
        codes, values = pd.factorize(column.map(write, na_action="ignore").astype(object))
        # A column of one value colours nothing, and one of nearly as many as images names them.
        min_values, max_values = 2, len(shown) // 2
        if name in first_names or name in always:
            min_values, max_values = 1, _MAX_WORDS
        if min_values <= len(values) <= min(max_values, _MAX_WORDS):
            known_codes = np.where(codes < 0, NO_VALUE, codes).astype(np.uint16)
            colouring_list.append(Colouring(str(name), known_codes, tuple(values)))
    return tuple(colouring_list)


def _number_colouring(name: str, numbers: Doubles) -> Colouring:
    finite = np.isfinite(numbers)
    low, high = (numbers[finite].min(), numbers[finite].max()) if finite.any() else (0.0, 0.0)
    steps = np.round((numbers[finite] - low) / ((high - low) or 1.0) * STEPS)
    codes = np.full(len(numbers), NO_VALUE, np.uint16)
    codes[finite] = steps
    return Colouring(name, codes, (), float(low), float(high))


def _input_names(run: FinishedRun) -> list[str]:
    cached_inputs = [name for name in run.winner.inputs if name in run.feature_specs]
    # A fine-tuned network reads images; the last tap stands for it.
    return cached_inputs or list(run.feature_specs)[-1:]


def _read_features(
    run: FinishedRun, names: list[str], content: Strings
) -> tuple[Floats, Index, list[Note]]:
    """Return features (n, D) of the images that have them, maps averaged over positions, these
    images' positions in `content`, and notes.
    """
    notes: list[Note] = []
    feature_sets = [run.open_features(name)[0] for name in names]
    stored_rows = np.stack([features.locate(content.tolist()) for features in feature_sets])
    rows = np.flatnonzero((stored_rows >= 0).all(0))
    if n_lacking := len(content) - len(rows):
        manifests = [
            str(features.path / MANIFEST)
            for features, rows_of_set in zip(feature_sets, stored_rows, strict=True)
            if (rows_of_set < 0).any()
        ]
        text = (
            f"{count_text(n_lacking, 'image is', 'images are')} not on the map, for they have no "
            f"features in {', '.join(manifests)} any more: {RUN_AGAIN}."
        )
        notes.append(Note(text, "warning"))
    width = sum(features.shape[1] for features in feature_sets)
    max_rows = min(MAX_POINTS, max(1000, _MAX_BYTES // (4 * width)))
    if len(rows) > max_rows:
        notes.append(Note(f"Of {len(rows):,} images, {max_rows:,} drawn at random are on the map."))
        rows = np.sort(np.random.default_rng(0).choice(rows, max_rows, replace=False))
    blocks = [
        _read_rows(features, rows_of_set[rows])
        for features, rows_of_set in zip(feature_sets, stored_rows, strict=True)
    ]
    return np.concatenate(blocks, axis=1), rows, notes


def _read_rows(features: FeatureSet, rows: Index) -> Floats:
    averaged = np.empty((len(rows), features.shape[1]), np.float32)
    for start in range(0, len(rows), _READ_ROWS):
        block = features.read(rows[start : start + _READ_ROWS], np.float32)
        averaged[start : start + len(block)] = block.reshape(len(block), block.shape[1], -1).mean(2)
    return averaged
