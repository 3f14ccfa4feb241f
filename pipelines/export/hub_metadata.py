"""The YAML header of a model card for the Hugging Face Hub: task, base models, scores.

Keys: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from collections.abc import Mapping
from typing import Any

import yaml

from headrace.extract.spec import BackboneSpec, is_weights_file
from headrace.pipelines.models.model import Model


def hub_metadata(model: Model, test_result: Mapping[str, Any] | None) -> str:
    """Return the header, in `---` lines, with the score on the test split if there is one."""
    hub_task = "image-classification"
    if model.task_kind == "regression":
        hub_task = "image-feature-extraction"  # the Hub has no task for regression from images
    # Licence and data set are left to the user: nothing here knows them.
    values: dict[str, Any] = {
        "library_name": "headrace",
        "pipeline_tag": hub_task,
        "tags": ["transfer-learning", hub_task, "headrace"],
    }
    backbones = [backbone for member in model.members for backbone in member.backbones]
    hub_names = {name for backbone in backbones if (name := _hub_name(backbone))}
    if hub_names:
        values["base_model"] = sorted(hub_names)
    if test_result is not None:
        values["metrics"] = [test_result["metric"]]
        values["model-index"] = [
            {
                "name": model.path.name,
                "results": [
                    {
                        "task": {"type": hub_task},
                        "dataset": {"name": "held-out test split", "type": "custom"},
                        "metrics": [
                            {
                                "type": test_result["metric"],
                                "value": round(float(test_result["value"]), 6),
                                "name": f"test {test_result['metric']}",
                            }
                        ],
                    }
                ],
            }
        ]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _hub_name(backbone: BackboneSpec) -> str | None:
    """Return the name of a backbone's weights on the Hub; None for weights of other origin."""
    library, _, model_name = backbone.name.partition(":")
    weights = backbone.weights
    if weights is not None and (weights.startswith("random:") or is_weights_file(weights)):
        return None
    if library == "timm" and ":" not in model_name:
        import timm

        config = timm.get_pretrained_cfg(f"{model_name}.{weights}" if weights else model_name)
        return f"timm/{model_name}.{config.tag}" if config and config.tag else None
    is_path = model_name.startswith((".", "/", "~"))
    if library == "transformers" and model_name.count("/") == 1 and not is_path:
        return model_name
    return None
