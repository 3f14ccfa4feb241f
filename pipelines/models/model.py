"""Model directories: what a run leaves behind, loaded as one value that predicts from images."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import SealBroken, read_sealed_json
from headrace.cache.home import expand_home
from headrace.cache.spec import FeatureSpec
from headrace.extract.spec import (
    PACKAGED,
    BackboneSpec,
    backbone_code,
    backbone_from_fields,
    backbone_path,
    is_weights_file,
)
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.temperature import floor_of
from headrace.heads.persist import (
    WRITE_AGAIN,
    CodeNotTrusted,
    TrainedHead,
    check_outputs,
    check_temperature,
    code_name,
    load_head,
    require_trusted,
)
from headrace.heads.spec import spec_to_json
from headrace.pipelines.models.network import NETWORK, NetworkMember, read_network
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.load import Recipe, load_recipe
from headrace.pipelines.records import RunDamaged, read_record
from headrace.pipelines.run_directory import find_run, moved_with_run, require_finished

if TYPE_CHECKING:
    from headrace.pipelines.models.images import ImageLike

HEAD, ENSEMBLE = "head.json", "ensemble.json"
FORMAT = 2  # of an ensemble; 1 had no temperatures of its members


class ModelError(HeadraceError, ValueError):
    """The directory holds no model that this version can use, or the model cannot be used on
    images.
    """


@dataclass(frozen=True, eq=False)
class Member:
    """A head, for each of its feature sets the network that makes it, and its share of
    the average.
    """

    head: TrainedHead
    backbones: tuple[BackboneSpec, ...]
    weight: float = 1.0
    temperature: float = 1.0  # its own log-odds are divided by it before they are averaged

    @property
    def kind(self) -> str:
        """Of the head."""
        return self.head.spec.kind

    @property
    def features(self) -> tuple[FeatureSpec, ...]:
        """What it reads, in order."""
        return self.head.features

    @property
    def spatial(self) -> bool:
        """Whether it takes maps."""
        return self.head.spec.kind == "conv"

    @property
    def views(self) -> int:
        """The views of an image whose predictions it averages, before the temperature."""
        return len({feature.view for feature in self.head.features})

    @property
    def floor(self) -> float:
        """The smallest probability that its temperature looks at."""
        return floor_of(self.head.spec, self.head.task_kind, len(self.head.classes))


@dataclass(frozen=True, eq=False)
class Model:
    """What predicts: a head on the networks whose features it was trained on, a fine-tuned network,
    or an average of such.

    Nothing large is loaded before it is used.
    """

    path: Path
    task_kind: TaskKind
    classes: tuple[str, ...]  # of a multi-label or regression task, the columns
    metrics: dict[str, float]
    members: tuple[Member | NetworkMember, ...]  # their weights sum to 1
    # the averaged log-odds are divided by it; of one member alone, which has its own, 1
    temperature: float
    digest: str  # of everything that a prediction depends on, weights included
    # what the caller allows it to import, "module:function"; nothing else is
    trust_code: tuple[str, ...] = ()

    def predict_proba(
        self, images: "ImageLike | Iterable[ImageLike]", *, device: str = "cpu"
    ) -> npt.NDArray[np.float32]:
        """(n, C) float32 probabilities of n images in the order of `classes`; for regression the
        values.

        images: a path, a Pillow image, a NumPy array or a torch tensor, or several of these. An
        array or tensor (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4 is one image; (n, H, W,
        C), (n, C, H, W) and of NumPy (n, H, W) are n. uint8, uint16 and bool are as in a file;
        floats are from 0 (black) to 1, unless the model has a pixel_range. Every image is decoded,
        resized, normalised and stored exactly as in the run. Raises ImageUnusable for one that
        cannot be decoded or can be read in two ways; `headrace predict` lists such and goes on.
        """
        from headrace.pipelines.models.images import predict_images

        # mypy reads this file as `pipelines.…` and the import as `headrace.pipelines.…`
        return predict_images(self, images, device=device)  # type: ignore[arg-type]

    def predict(
        self, images: "ImageLike | Iterable[ImageLike]", *, device: str = "cpu"
    ) -> npt.NDArray[Any]:
        """single: (n,) class names; multi: (n, C) 0/1; regression: (n, C) values."""
        return decide(self.predict_proba(images, device=device), self.task_kind, self.classes)


def decide(
    probabilities: npt.NDArray[np.float32], task_kind: TaskKind, classes: tuple[str, ...]
) -> npt.NDArray[Any]:
    """What (n, C) probabilities say: single:

    (n,) class names; multi: (n, C) 0/1; regression: the values themselves.
    """
    if task_kind == "single":
        return np.asarray(np.asarray(classes)[probabilities.argmax(1)])
    return np.asarray(probabilities >= 0.5, np.uint8) if task_kind == "multi" else probabilities


def load_model(directory: Path | str, *, trust_code: Collection[str] = ()) -> Model:
    """Load a model directory; of a run (its directory or its recipe) the selected model: winner, or
    ensemble where the interval of its gain lies above 0.

    A model may ask for code: a network of its own ("python:module:function"), or an estimator by
    import path. None is imported but what `trust_code` names ("module:function"), and what the
    recipe names where the run is given by its recipe. Raises NotARun, saying what is there instead;
    CodeNotTrusted; ModelError for a model that cannot be used; BadHeadFile for a damaged head.
    """
    place = _model_directory(directory)
    trusted = trusted_code(directory, trust_code)
    model = (
        _load_ensemble(place, trusted)
        if (place / ENSEMBLE).is_file()
        else _load_single(place, place, trusted)
    )
    return dataclasses.replace(model, trust_code=tuple(sorted(trusted)))


def _load_single(place: Path, root: Path, trusted: Collection[str]) -> Model:
    """root: the model directory that the caller gave, in which this one is.

    Raises CodeNotTrusted before anything is built.
    """
    if (place / NETWORK).is_file():
        network, about = read_network(place)
        name = str(about["backbone"]["name"])
        require_trusted(backbone_code(name), place, trusted)
        if (path := backbone_path(name)) is not None:
            _require_own_file(name, path, place, root, trusted)
        digest = _digest((network,), 1.0)
        return Model(
            place,
            about["task_kind"],
            tuple(about["classes"]),
            about["metrics"],
            (network,),
            1.0,
            digest,
        )
    head = load_head(place, trust_code=trusted)
    member = Member(head, _backbones(head, place, root, trusted), temperature=head.temperature)
    for backbone in member.backbones:
        require_trusted(backbone_code(backbone.name), place, trusted)
    return Model(
        place, head.task_kind, head.classes, head.metrics, (member,), 1.0, _digest((member,), 1.0)
    )


def trusted_code(given: Path | str, trust_code: Collection[str] = ()) -> set[str]:
    """What a model or run may import: what `trust_code` names and, where it is given by its recipe,
    what that one names.
    """
    # A weights file may be typed as it is named, relative and without a folder, where it reads like
    # a class's path.
    named = {code_name(name) for name in trust_code} | {
        name for name in trust_code if is_weights_file(name)
    }
    return named | _code_of_recipe(given)


def _code_of_recipe(given: Path | str) -> set[str]:
    """What a recipe that the user has named asks for: the user's own words.

    A directory says nothing of the kind.
    """
    file = expand_home(given)
    if not file.is_file():
        return set()
    recipe: Recipe = load_recipe(file)
    code = {backbone_code(backbone.name) for backbone in recipe.backbones}
    return {name for name in code if name} | {
        code_name(each.estimator) for each in recipe.heads.sklearn
    }


def _load_ensemble(place: Path, trusted: Collection[str]) -> Model:
    path = place / ENSEMBLE
    try:
        about = read_sealed_json(path.read_bytes())
        if about["format"] not in (1, FORMAT) or about["kind"] != "ensemble":
            raise ModelError(
                f"{path}: format {about['format']}, this version reads {FORMAT}: update headrace"
            )
        shares = [
            (
                place / entry["model"],
                float(entry["weight"]),
                check_temperature(entry.get("temperature", 1.0)),
            )
            for entry in about["members"]
        ]
        places = [directory.resolve() for directory, _, _ in shares]
        check_outputs(about["task_kind"], about["classes"])
        task_kind: TaskKind = about["task_kind"]
        temperature, classes = check_temperature(about["temperature"]), tuple(about["classes"])
        metrics = {name: float(value) for name, value in about["metrics"].items()}
    except ModelError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        ArithmeticError,
    ) as error:
        raise ModelError(
            f"{path} does not describe an ensemble ({type(error).__name__}: {error}). {WRITE_AGAIN}"
        ) from error
    members: list[Member | NetworkMember] = []
    for (directory, weight, own), own_place in zip(shares, places, strict=True):
        if not own_place.is_relative_to(place.resolve()):
            raise ModelError(
                f"{path}: the member {directory} lies outside of the model's directory: run again"
            )
        model = _load_single(directory, place, trusted)
        if (model.classes, model.task_kind) != (classes, task_kind):
            raise ModelError(
                f"{path}: the member {directory} has other classes than the ensemble: run again"
            )
        members += [
            dataclasses.replace(member, weight=weight, temperature=own) for member in model.members
        ]
    if not abs(sum(member.weight for member in members) - 1) <= 1e-6:  # also NaN, and no members
        raise ModelError(
            f"{path}: the weights of {len(members)} members do not sum to 1: run again"
        )
    digest = _digest(tuple(members), temperature)
    return Model(place, task_kind, classes, metrics, tuple(members), temperature, digest)


def _model_directory(given: Path | str) -> Path:
    place = expand_home(given)
    if _holds_model(place):
        return place
    run = find_run(place, or_model=True)
    selected = (
        run.ensemble if ensemble_is_selected(run) and _holds_model(run.ensemble) else run.winner
    )
    if not _holds_model(selected):
        require_finished(run, selected)
    return selected


def _holds_model(place: Path) -> bool:
    return any((place / name).is_file() for name in (HEAD, ENSEMBLE, NETWORK))


def ensemble_is_selected(run: RunPaths) -> bool:
    """Whether the run's last recipe asks for an ensemble, and the interval of its gain over a
    single head lies above 0.

    Raises RunDamaged for a damaged recipe.json, ModelError for a damaged ensemble.json: the winner
    would stand in its place, and nobody would know.
    """
    try:
        asked = read_record(run.recipe).get("ensemble") is not None
    except FileNotFoundError:
        return False
    path = run.ensemble / ENSEMBLE
    if not asked or not path.is_file():
        return False
    try:
        return bool(read_sealed_json(path.read_bytes())["nested"]["chosen"])
    except SealBroken as error:
        raise ModelError(f"{path} is not as it was written: {error}. {WRITE_AGAIN}") from error
    except (KeyError, TypeError):
        return False


def _backbones(
    head: TrainedHead, place: Path, root: Path, trusted: Collection[str]
) -> tuple[BackboneSpec, ...]:
    """The networks behind the head's feature sets; weights files of relative names lie in the
    model's own directory.
    """
    found = []
    for feature, fields in zip(head.features, head.backbones, strict=True):
        if fields is None:
            raise ModelError(
                f"{place}: it is not recorded which network made the features {feature.name} "
                f"({feature.backbone}). Heads of an earlier version: call `headrace run` again. "
                "Features that were imported: predict from features, "
                "headrace.heads.load_head(DIRECTORY).predict_proba(X)"
            )
        backbone = backbone_from_fields(fields)
        if (
            backbone.weights
            and is_weights_file(backbone.weights)
            and not backbone.weights.startswith(PACKAGED)
        ):
            beside = place / backbone.weights
            weights = (
                str(beside.absolute())
                if beside.is_file()
                else moved_with_run(backbone.weights, place)
            )
            _require_own_file(backbone.weights, Path(weights), place, root, trusted)
            backbone = dataclasses.replace(backbone, weights=weights)
        if (path := backbone_path(backbone.name)) is not None:
            _require_own_file(backbone.name, path, place, root, trusted)
        found.append(backbone)
    return tuple(found)


def _require_own_file(
    named: str, file: Path, place: Path, root: Path, trusted: Collection[str]
) -> None:
    """Raise CodeNotTrusted for a network's file or folder that is neither in the model's directory
    nor one that its run's recipe names.
    """
    file = expand_home(file).absolute()
    if file.resolve().is_relative_to(root.resolve()) or not {named, str(file)}.isdisjoint(trusted):
        return
    for folder in list(place.absolute().parents)[:4]:
        try:
            recipe = read_record(RunPaths(folder).recipe)
            known = [
                backbone[key] for backbone in recipe["backbones"] for key in ("weights", "name")
            ]
            if named in known:
                return
        except (OSError, RunDamaged, KeyError, TypeError):
            continue
    raise CodeNotTrusted(
        f"{place} asks for the weights in {file}, which lies outside of the model's directory. "
        f"If you know the file, type: --trust-code {shlex.quote(str(file))} (in Python: "
        f"trust_code=[{str(file)!r}]). `headrace export`, with that option and --format "
        "safetensors, writes a model that holds its weights and asks for nothing"
    )


def _digest(members: tuple[Member | NetworkMember, ...], temperature: float) -> str:
    hasher = hashlib.sha256(
        json.dumps(
            [temperature, *((member.weight, member.temperature) for member in members)]
        ).encode()
    )
    for member in members:
        if isinstance(member, NetworkMember):
            hasher.update(member.digest.encode())
            continue
        head = member.head
        hasher.update(json.dumps([head.task_kind, head.classes, spec_to_json(head.spec)]).encode())
        for feature in head.features:  # each names the digest of its network's weights
            hasher.update(feature.to_json().encode())
        for name, array in sorted(head.arrays.items()):
            hasher.update(f"{name}|{array.dtype}|{array.shape}|".encode())
            hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()[:24]
