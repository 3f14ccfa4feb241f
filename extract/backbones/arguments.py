"""Arguments with which a library builds a network: `model` of a recipe's backbone."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from headrace.extract.errors import BackboneError

# Arguments that choose weights, files, code or another output. `weights`, `taps` and the name
# choose those, and an argument in a stranger's model file must not.
_FORBIDDEN_ARGUMENTS = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
    *("pretrained_model_args", "pretrained_image", "pretrained_image_path", "checkpoint_path"),
    *("weights", "weights_backbone", "cache_dir", "progress", "features_only", "feature_cfg"),
    *("feature_cls", "out_indices", "scriptable", "exportable", "pruned", "kwargs_filter"),
    *("trust_remote_code", "code_revision", "auto_map", "attn_implementation", "model_type"),
    *("experts_implementation", "quantization_config", "torch_dtype", "dtype", "architectures"),
    *("transformers_version", "name_or_path", "backbone", "backbone_config", "backbone_kwargs"),
    *("use_pretrained_backbone", "use_timm_backbone"),
}


@contextlib.contextmanager
def explain_build_errors(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Explain errors of the code within it, which builds the network `name` with these arguments.

    Raises BackboneError for arguments that choose anything but the network, and for those that its
    builder does not take.
    """
    if name.startswith("onnx:") and arguments:
        raise BackboneError(f"{name}: an ONNX file is built already; leave `model` out")
    refused = sorted(
        argument
        for argument in arguments
        if argument in _FORBIDDEN_ARGUMENTS or argument.startswith("_")
    )
    if refused and not name.startswith("python:"):
        raise BackboneError(
            f"{name}: model: {refused[0]} is not an argument of the network. Weights are chosen by "
            "`weights`, outputs by `taps`; leave it out"
        )
    try:
        yield
    except (TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
        if not arguments or isinstance(error, BackboneError):
            raise
        raise BackboneError(
            f"{name} cannot be built with model: {json.dumps(dict(arguments))} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def with_layers_of_timm(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network of timm with `mlp_layer` as a class: a recipe names it
    (`mlp_layer: SwiGLUPacked`).

    Raises BackboneError for a name that is no layer of timm.layers.
    """
    resolved = dict(arguments)
    if isinstance(layer_name := resolved.get("mlp_layer"), str):
        import timm.layers
        from torch import nn

        layer: Any = getattr(timm.layers, layer_name, None)
        layer_class = getattr(layer, "func", layer)  # SwiGLUPacked is a partial of GluMlp
        if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
            raise BackboneError(
                f"timm:{name}: model: mlp_layer {layer_name!r} is no layer of timm.layers; "
                "expected one such as SwiGLUPacked"
            )
        resolved["mlp_layer"] = layer
    return resolved
