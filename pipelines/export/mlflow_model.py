"""Export to MLflow, for `mlflow.pyfunc.load_model(folder).predict(images)`."""

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.export.write import export_model
from headrace.pipelines.models.model import Model, load_model

if TYPE_CHECKING:
    from collections.abc import Mapping


def save_mlflow_model(model: Model, out: Path | str, **options: Any) -> None:
    """Write an MLflow model of the flavor `python_function` to `out`, which must not exist.

    Loading it needs headrace and mlflow-skinny. options: of `mlflow.pyfunc.save_model`, such as
    `metadata`. Raises InvalidInput.
    """
    out = Path(out)
    if importlib.util.find_spec("mlflow") is None:
        raise InvalidInput("an MLflow model needs mlflow. Try: pip install 'headrace[mlflow]'")
    if out.exists():
        raise InvalidInput(f"{out} is there already: give another name, or move it away")
    if model.takes_units or model.side_columns:
        raise InvalidInput(
            "an MLflow model is given images alone, and this model reads their units or side "
            "columns beside them: use headrace export"
        )
    import mlflow.pyfunc

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model"
        export_model(model, exported, ["safetensors"])
        # A module that loads the safetensors, because MLflow would pickle an object.
        mlflow.pyfunc.save_model(
            out,
            loader_module=__name__,
            data_path=exported,
            pip_requirements=[f"headrace=={importlib.metadata.version('headrace')}"],
            **options,
        )


class _ImagePredictor:
    """The object that MLflow calls for predictions."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, images: Any, params: "Mapping[str, Any] | None" = None) -> pd.DataFrame:
        """Return a row for each image: probabilities of the classes, or values.

        images: n paths, as a list or as the first column of a DataFrame. params: unused, but MLflow
        passes them.
        """
        paths = images.iloc[:, 0] if isinstance(images, pd.DataFrame) else images
        paths = np.asarray(paths, dtype=object).ravel().tolist()
        prefix = "" if self.model.task_kind == "regression" else "p_"
        columns = [f"{prefix}{name}" for name in self.model.classes]
        return pd.DataFrame(self.model.predict_proba(paths), columns=columns)


def _load_pyfunc(exported: str) -> _ImagePredictor:
    """Return the predictor of an exported folder. MLflow calls this function by its name."""
    return _ImagePredictor(load_model(exported))
