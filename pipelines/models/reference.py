"""References to the trained models of a run, by their files; each row of a leaderboard is one."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.feature_set import open_feature_set
from headrace.extract.errors import SourceError
from headrace.extract.spec import BackboneSpec, Sample
from headrace.heads.data.features import load_rows
from headrace.heads.data.side_columns import SIDE_COLUMNS, taps_of
from headrace.heads.data.task import REFIT, Task
from headrace.heads.evaluate.ensemble import average
from headrace.heads.evaluate.temperature import FLOOR
from headrace.heads.evaluate.units import scored_rows
from headrace.heads.kinds import HEAD_KINDS, spec_from_json
from headrace.heads.link import tempered
from headrace.heads.persist import TrainedHead, require_trusted
from headrace.heads.predict import probability_floor
from headrace.heads.results import read_bank
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.feature_input import FeatureInput
from headrace.pipelines.models.from_features import RowColumns, predict_views
from headrace.pipelines.models.head import HeadModel
from headrace.pipelines.models.image_parts import ImageParts
from headrace.pipelines.models.network import NetworkModel
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.records import read_record


@dataclass(frozen=True)
class ModelRef:
    """One trained model of a run: its settings, its results file, and the features it reads."""

    kind: str  # of head; "finetune": a fine-tuned network
    spec: str  # canonical JSON
    results_path: Path  # holds out-of-fold predictions, and the arrays of a head
    inputs: tuple[str, ...]  # names of its feature sets, in order
    run: RunPaths
    feature_paths: tuple[Path, ...] = ()  # the feature sets of `inputs`, view by view
    backbones: tuple[BackboneSpec | None, ...] = ()  # of each feature set; None: not known

    @property
    def network_directory(self) -> Path:
        """The directory of a fine-tuned network, trained on all training rows."""
        return self.run.finetune_model(self.results_path.stem)

    @property
    def reads_side_columns(self) -> bool:
        """Whether it reads the task's side columns, after its features."""
        return SIDE_COLUMNS in self.inputs

    def identity(self) -> dict[str, Any]:
        """Return fields that identify this model in the record of test evaluations."""
        return {
            "features": [
                open_feature_set(feature_path).spec.fingerprint
                for feature_path in self.feature_paths
            ],
            "bank": self.results_path.name,
            "inputs": list(self.inputs),
            "spec": self.spec,
        }

    def load(
        self,
        task: Task,
        metrics: dict[str, float],
        temperature: float,
        unit_rule: UnitRule | None = None,
        image_parts: ImageParts | None = None,
    ) -> HeadModel | NetworkModel:
        """Return the model that was trained on every training row, ready to be saved.

        task: of the training rows. Raises ModelError if a network's file is gone or damaged.
        """
        if self.kind == "finetune":
            network = NetworkModel.load(self.network_directory, allowed_code=None)
            return dataclasses.replace(
                network,
                metrics=metrics,
                temperature=temperature,
                unit_rule=unit_rule,
                image_parts=image_parts,
            )
        head = TrainedHead(
            spec=spec_from_json(self.spec),
            task_kind=task.kind,
            classes=task.classes,
            features=tuple(
                open_feature_set(feature_path).spec for feature_path in self.feature_paths
            ),
            metrics=metrics,
            arrays=read_bank(self.results_path).arrays(self.spec, REFIT),
            # So that the directory can be used away from its run.
            backbones=tuple(
                None if backbone is None else dataclasses.asdict(backbone)
                for backbone in self.backbones
            ),
            temperature=temperature,
            side_columns=task.side.columns if self.reads_side_columns and task.side else (),
            unit_rule=unit_rule,
            image_parts=None if image_parts is None else dataclasses.asdict(image_parts),
        )
        return HeadModel(self.results_path.parent, head)

    def predict_rows(
        self, task: Task, *, temperature: float = 1.0, trust_code: Collection[str] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """Return the targets (n, ...) and predictions (n, C) of a task's rows, at a temperature. A
        head predicts from cached features, a network from the images.

        Rows without features are left out. trust_code: "module:name" of code that may be imported;
        None: whatever the model names. Raises CodeNotTrusted for other code, SourceError for an
        image that is gone or has changed, ModelError for a network whose file is gone or damaged.
        """
        if self.kind == "finetune":
            return task.target, self._predict_images(task, temperature, trust_code)
        model = self.load(task, {}, temperature)
        assert isinstance(model, HeadModel)
        if trust_code is not None:
            external_code = HEAD_KINDS[model.kind].external_code(model.head.spec)
            require_trusted(external_code, self.results_path, trust_code)
        features = [open_feature_set(feature_path) for feature_path in self.feature_paths]
        side = task.side if self.reads_side_columns else None
        X, row_index = load_rows(features, task.content, spatial=model.spatial, side=side)
        # Several views: (views, n, D), or (views, n, channels, h, w) of maps.
        view_inputs = list(X) if X.ndim in (3, 5) else [X]
        units = None if task.units is None else task.units[row_index]
        predicted, _ = predict_views(model, model.head_function(), view_inputs, units)
        return task.target[row_index], predicted

    def _predict_images(
        self, task: Task, temperature: float, trust_code: Collection[str] | None
    ) -> npt.NDArray[np.float32]:
        from headrace.extract.cores import available_cores
        from headrace.pipelines.models.images import open_engine, predict_samples  # imports torch

        network = NetworkModel.load(self.network_directory, allowed_code=trust_code)
        engine = open_engine(network.at_temperature(temperature))
        image_paths = paths_of_content(self.run.finetune_images, task.content)
        samples = [
            Sample(image_path, image_path, content_hash.decode())
            for image_path, content_hash in zip(image_paths, task.content, strict=True)
        ]
        probabilities = np.empty((len(samples), len(network.classes)), np.float32)
        for predicted in predict_samples(engine, samples, available_cores(), RowColumns()):
            for row, failure_reason in predicted.failed:  # the first one
                raise SourceError(
                    f"{samples[row].path}: {failure_reason}. Its features were extracted, so it "
                    "could be read then: bring it back, or run again so that it is left out"
                )
            probabilities[predicted.rows] = predicted.probabilities
        return probabilities


class WeightedModel(NamedTuple):
    """A member of an average: its weight, the temperature of its own predictions, and itself."""

    weight: float
    temperature: float
    model: ModelRef


@dataclass(frozen=True)
class ModelAverage:
    """A model of a run alone, or the weighted average of several, with its temperature."""

    members: tuple[WeightedModel, ...]
    # Divides the log-odds of the average, or of the units' predictions if the task has units.
    temperature: float
    floor: float = FLOOR  # the smallest probability of units that counts, see `probability_floor`

    @classmethod
    def of_one(cls, model: ModelRef, temperature: float, task: Task) -> "ModelAverage":
        """Return a model alone. temperature: of its predictions of the task's images or units."""
        floor = probability_floor(model.spec, task.kind, len(task.classes))
        # A model applies its temperature itself, to its log-odds; one that was fitted on units is
        # not meant for their images.
        own, of_units = (temperature, 1.0) if task.units is None else (1.0, temperature)
        return cls((WeightedModel(1.0, own, model),), of_units, floor)

    @property
    def fitted_temperature(self) -> float:
        """The temperature that was fitted to its predictions."""
        # Of the two of a model alone, one is 1.
        own = self.members[0].temperature if len(self.members) == 1 else 1.0
        return own * self.temperature

    def identity(self) -> dict[str, Any]:
        """Return fields that identify this model in the record of test evaluations."""
        if len(self.members) == 1:
            # Without the temperature (runs of earlier versions had none): at another one the same
            # head makes the same decisions, and no test row had a part in it, so that it is not
            # another winner.
            return self.members[0].model.identity()
        return {
            "ensemble": [
                {
                    "weight": member.weight,
                    "temperature": member.temperature,
                    **member.model.identity(),
                }
                for member in self.members
            ],
            "temperature": self.temperature,
        }

    def predict_images(
        self, task: Task, *, trust_code: Collection[str] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the targets (n, ...) and predictions (n, C) of a task's images.

        trust_code, and errors: as of `ModelRef.predict_rows`.
        """
        predictions = []
        for member in self.members:
            target, of_member = member.model.predict_rows(
                task, temperature=member.temperature, trust_code=trust_code
            )
            predictions.append(of_member)
        predicted: npt.NDArray[Any] = predictions[0]
        if len(predictions) > 1:  # one alone keeps its bits
            weights = np.array([member.weight for member in self.members])
            predicted = average(weights, np.stack(predictions))
        if task.units is None:
            predicted = tempered(predicted, task.kind, self.temperature)
        return target, predicted

    def predict_scored(
        self, task: Task, *, trust_code: Collection[str] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the targets and predictions that a task is scored by, of its images or, where it
        has them, of its units; and the predictions (n, C) of its images.
        """
        target, of_images = self.predict_images(task, trust_code=trust_code)
        if task.units is None:
            return target, of_images, of_images
        target, predicted = scored_rows(task, np.arange(len(task.ids)), of_images)
        return target, tempered(predicted, task.kind, self.temperature, self.floor), of_images


def model_ref(
    board_row: "pd.Series[Any]", run: RunPaths, feature_inputs: Mapping[str, FeatureInput]
) -> ModelRef:
    """Return the model of a row of the run's leaderboard. feature_inputs: the run's, by name."""
    inputs = tuple(board_row["inputs"])
    taps = taps_of(inputs)
    return ModelRef(
        kind=str(board_row["kind"]),
        spec=str(board_row["spec"]),
        results_path=Path(board_row["path"]),
        inputs=inputs,
        run=run,
        feature_paths=tuple(path for name in taps for path in feature_inputs[name].views),
        backbones=tuple(
            feature_inputs[name].backbone for name in taps for _ in feature_inputs[name].views
        ),
    )


def paths_of_content(listing_path: Path, content: npt.NDArray[np.bytes_]) -> list[str]:
    """Return the (N,) paths of the images with these content hashes.

    listing_path: the run's finetune/images.json. Raises SourceError if it lacks one.
    """
    path_of_hash, hashes = read_record(listing_path)["paths"], content.astype(str).tolist()
    missing = [content_hash for content_hash in hashes if content_hash not in path_of_hash]
    if missing:
        raise SourceError(
            f"{listing_path} lacks {count_text(len(missing), 'image')}, first with the content "
            f"{missing[0]}: run again"
        )
    return [path_of_hash[content_hash] for content_hash in hashes]
