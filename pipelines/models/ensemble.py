"""A weighted average of models as a model: ensemble.json, and a directory for each member."""

import contextlib
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cache.atomic_io import publish_replace, read_regular
from headrace.cache.format.sealed import read_sealed_json, sealed_json
from headrace.heads.data.side_columns import SideColumn
from headrace.heads.data.task import TaskKind
from headrace.heads.persist import WRITE_AGAIN, check_outputs, check_temperature
from headrace.heads.unit_rule import UnitRule, read_unit_rule, rule_fields
from headrace.pipelines.models.base import ImagePredictor
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.head import HeadModel
from headrace.pipelines.models.image_parts import ImageParts, parts_fields, read_image_parts
from headrace.pipelines.models.network import NetworkModel

ENSEMBLE_DESCRIPTION = "ensemble.json"
FORMAT = 2  # 1 had no temperatures of its members


@dataclass(frozen=True, eq=False)
class EnsembleModel(ImagePredictor):
    """The weighted average of heads and networks, and the temperature of the average."""

    path: Path
    task_kind: TaskKind
    classes: tuple[str, ...]  # the columns, in a multi-label or regression task
    metrics: dict[str, float]
    members: tuple[HeadModel | NetworkModel, ...]
    weights: tuple[float, ...]  # of the members, summing to 1
    temperature: float  # the averaged log-odds are divided by it
    names: tuple[str, ...]  # of the members' folders
    trust_code: tuple[str, ...] = ()
    # Further fields of ensemble.json for people: of each member, and of how the average was scored.
    member_columns: tuple[Mapping[str, Any], ...] = ()
    nested: Mapping[str, Any] | None = None
    unit_rule: UnitRule | None = None  # how the average of images becomes that of units
    image_parts: ImageParts | None = None  # boxes or tiles that its members were trained on

    @staticmethod
    def is_in(model_directory: Path) -> bool:
        """Return whether a directory holds an ensemble."""
        return (model_directory / ENSEMBLE_DESCRIPTION).is_file()

    @classmethod
    def load(cls, model_directory: Path, *, allowed_code: Collection[str] = ()) -> "EnsembleModel":
        """Read what `save` wrote.

        Raises CodeNotTrusted; ModelError also for members outside of the directory, members of
        other classes, and weights that do not sum to 1.
        """
        description_path = model_directory / ENSEMBLE_DESCRIPTION
        temperatures, fields = _read_description(description_path)
        members: list[HeadModel | NetworkModel] = []
        for member_name, temperature in zip(fields["names"], temperatures, strict=True):
            member_directory = model_directory / member_name
            # The file may come from anyone, and must not lead to models elsewhere on this disk.
            if not member_directory.resolve().is_relative_to(model_directory.resolve()):
                raise ModelError(
                    f"{description_path}: the member {member_directory} lies outside of the "
                    "model's directory: run again"
                )
            is_network = NetworkModel.is_in(member_directory)
            kind: type[HeadModel | NetworkModel] = NetworkModel if is_network else HeadModel
            member = kind.load(
                member_directory, model_root=model_directory, allowed_code=allowed_code
            )
            if (member.classes, member.task_kind) != (fields["classes"], fields["task_kind"]):
                raise ModelError(
                    f"{description_path}: the member {member_directory} has other classes than the "
                    "ensemble: run again"
                )
            # One table of side columns is read for all members.
            columns_of_members = (earlier.side_columns for earlier in members)
            read_before = next((columns for columns in columns_of_members if columns), ())
            if member.side_columns and read_before and member.side_columns != read_before:
                raise ModelError(
                    f"{description_path}: its members read different side columns: run again"
                )
            members.append(member.at_temperature(temperature))
        weights = fields["weights"]
        if not abs(sum(weights) - 1) <= 1e-6:  # also NaN, and no members
            raise ModelError(
                f"{description_path}: the weights of {len(weights)} members do not sum to 1: run "
                "again"
            )
        return cls(path=model_directory, members=tuple(members), **fields)

    def save(self, model_directory: Path) -> Path:
        """Write the ensemble's directory and return the path of ensemble.json."""
        # The members, then ensemble.json, then the members of an earlier ensemble are removed: a
        # process that dies in between leaves a whole ensemble.
        entries: list[dict[str, Any]] = []
        columns_of_member = self.member_columns or ({},) * len(self.members)
        for member, weight, member_name, extra_columns in zip(
            self.members, self.weights, self.names, columns_of_member, strict=True
        ):
            member.save(model_directory / member_name)
            entry = {"model": member_name, "weight": weight, "temperature": member.temperature}
            entries.append(entry | dict(extra_columns))
        description = {
            "format": FORMAT,
            "kind": "ensemble",
            "members": entries,
            "temperature": self.temperature,
            "task_kind": self.task_kind,
            "classes": list(self.classes),
            "metrics": self.metrics,
            **rule_fields(self.unit_rule),
            **parts_fields(self.image_parts),
        }
        if self.nested is not None:
            description["nested"] = dict(self.nested)
        description_path = model_directory / ENSEMBLE_DESCRIPTION
        publish_replace(description_path, sealed_json(description, indent=2))
        for old_member in (model_directory / "members").iterdir():
            if f"members/{old_member.name}" not in self.names:
                with contextlib.suppress(OSError):  # a member that stays only takes space
                    shutil.rmtree(old_member)
        return description_path

    def describe(self) -> str:
        """Return a phrase for a model card: how many models are averaged."""
        return (
            f"The weighted average of {len(self.members)} models, temperature "
            f"{self.temperature:.3g}:"
        )

    @property
    def side_columns(self) -> tuple[SideColumn, ...]:
        """The tabular columns that its members read beside each image: the same, or none."""
        return next((member.side_columns for member in self.members if member.side_columns), ())

    @property
    def takes_units(self) -> bool:
        """Whether a member predicts the images of a unit together."""
        return any(member.takes_units for member in self.members)

    @property
    def average_temperature(self) -> float:
        """The temperature of the members' average."""
        return self.temperature


def _read_description(description_path: Path) -> tuple[list[float], dict[str, Any]]:
    """Return the members' temperatures, and the fields of the ensemble that ensemble.json has, all
    checked. Raises ModelError.
    """
    try:
        description = read_sealed_json(read_regular(description_path))
        if description["format"] not in (1, FORMAT) or description["kind"] != "ensemble":
            raise ModelError(
                f"{description_path}: format {description['format']}, this version reads {FORMAT}: "
                "update headrace"
            )
        check_outputs(description["task_kind"], description["classes"])
        members = description["members"]
        names = tuple(str(Path(member["model"])) for member in members)
        # resolve() raises ValueError for what cannot be a file name, such as one with a zero byte.
        for name in names:
            (description_path.parent / name).resolve()
        temperatures = [check_temperature(member.get("temperature", 1.0)) for member in members]
        return temperatures, {
            "task_kind": description["task_kind"],
            "classes": tuple(description["classes"]),
            "metrics": {name: float(value) for name, value in description["metrics"].items()},
            "names": names,
            "weights": tuple(float(member["weight"]) for member in members),
            "temperature": check_temperature(description["temperature"]),
            "unit_rule": read_unit_rule(description),
            "image_parts": read_image_parts(description.get("image_parts"), description_path),
        }
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
            f"{description_path} does not describe an ensemble ({type(error).__name__}: {error}). "
            f"{WRITE_AGAIN}"
        ) from error
