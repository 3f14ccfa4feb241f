"""Loading of model directories, as values that predict from images."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

from headrace.cache.format.sealed import SealBroken, read_sealed_json
from headrace.cache.home import expand_home
from headrace.extract.spec import BackboneSpec, backbone_path, called_code, is_weights_file
from headrace.heads.persist import WRITE_AGAIN, code_name
from headrace.pipelines.models.ensemble import ENSEMBLE_DESCRIPTION, EnsembleModel
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.head import HEAD_DESCRIPTION, HeadModel
from headrace.pipelines.models.network import NetworkModel
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.records import read_record

# A file in each folder that `headrace export` wrote; here, because export's modules import torch.
EXPORT_MARKER = ".headrace-export"
# The three have the same methods: `load` (and `is_in`), `save`, `predict_proba` (and `predict`),
# `to_torch`, `describe`.
Model = HeadModel | NetworkModel | EnsembleModel
_KINDS: tuple[type[Model], ...] = (EnsembleModel, NetworkModel, HeadModel)


def load_model(model_path: Path | str, *, trust_code: Collection[str] = ()) -> Model:
    """Load a model directory, or the selected model of a run (its directory or its recipe): the
    winner, or the ensemble if the interval of its gain lies above 0.

    A model may name code to import: a network of the user's ("python:module:function"), or an
    estimator by its import path. Only code in `trust_code` ("module:function") is imported, and
    code that the recipe names if the run is given by its recipe. Raises InvalidInput, which says
    what is there instead; CodeNotTrusted; ModelError for a model that cannot be used; HeadError for
    a damaged head.
    """
    model_directory = _model_directory(model_path)
    allowed_code = trusted_code(model_path, trust_code)
    # Of a directory without a model, a head says what is missing.
    kind = next((kind for kind in _KINDS if kind.is_in(model_directory)), HeadModel)
    model = kind.load(model_directory, allowed_code=allowed_code)
    return dataclasses.replace(model, trust_code=tuple(sorted(allowed_code)))


def trusted_code(given_path: Path | str, trust_code: Collection[str] = ()) -> set[str]:
    """Return the code and files that a model or run may load: those in `trust_code` and, if it is
    given by its recipe, those that the recipe names.
    """
    # The name of a weights file in the current folder looks like the import path of a class, and
    # must not be taken for one.
    weights_files = {name for name in trust_code if is_weights_file(name)}
    return {code_name(name) for name in trust_code} | weights_files | _code_of_recipe(given_path)


def _code_of_recipe(given_path: Path | str) -> set[str]:
    """Return the code and files that a recipe names; a directory names none."""
    # A recipe is the user's own text. A run's directory may come from anyone.
    recipe_path = expand_home(given_path)
    if not recipe_path.is_file():
        return set()
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    network_code = {
        called_code(BackboneSpec(backbone.name, model=backbone.model))
        for backbone in recipe.backbones
    }
    estimators = {code_name(section.estimator) for section in recipe.heads.sklearn}
    files = {
        name
        for backbone in recipe.backbones
        for name in (backbone.name, backbone.weights)
        if name and (is_weights_file(name) or backbone_path(name) is not None)
    }
    return {code_text for code_text in network_code if code_text} | estimators | files


def _model_directory(given_path: Path | str) -> Path:
    model_path = expand_home(given_path)
    if _holds_model(model_path):
        return model_path
    if (model_path / EXPORT_MARKER).is_file():
        raise ModelError(
            f"{model_path} was written by headrace export, and the file that says what its model "
            f"is ({HEAD_DESCRIPTION}, network.json or {ENSEMBLE_DESCRIPTION}) is gone, or it was "
            f"exported in another format. {WRITE_AGAIN}"
        )
    # Imported here, with the recipe's modules: a model directory needs neither, and loads 0.2 s
    # sooner without.
    from headrace.pipelines.run_directory import find_run, require_finished

    run = find_run(model_path, or_model=True)
    uses_ensemble = ensemble_is_selected(run) and _holds_model(run.ensemble)
    selected = run.ensemble if uses_ensemble else run.winner
    if not _holds_model(selected):
        require_finished(run, selected)
    return selected


def _holds_model(model_path: Path) -> bool:
    return any(kind.is_in(model_path) for kind in _KINDS)


def ensemble_is_selected(run: RunPaths) -> bool:
    """Return whether the run's last recipe asks for an ensemble, and the interval of its gain over
    a single head lies above 0.

    Raises RunDamaged for a damaged recipe.json, ModelError for a damaged ensemble.json.
    """
    try:
        requested = read_record(run.recipe).get("ensemble") is not None
    except FileNotFoundError:
        return False
    description_path = run.ensemble / ENSEMBLE_DESCRIPTION
    if not requested or not description_path.is_file():
        return False
    # An error here must not be taken for "no": the winner would silently be used in its place.
    try:
        return bool(read_sealed_json(description_path.read_bytes())["nested"]["chosen"])
    except SealBroken as error:
        raise ModelError(
            f"{description_path} is not as it was written: {error}. {WRITE_AGAIN}"
        ) from error
    except (KeyError, TypeError):  # an ensemble that was saved outside of a run was not compared
        return False
