"""The first convolution of a network, adapted to another number of channels as timm does it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headrace.extract.errors import BackboneError


def adapt_channels(module: nn.Module, name: str, n_channels: int) -> None:
    """Change the network so that it takes images of `n_channels` instead of three.

    One channel gets the sum of the weights of red, green and blue; more get those of red, green,
    blue, red, … times 3 / n_channels. So the order of the bands matters: the first three should be
    those closest to red, green and blue. A network that takes n_channels already is not changed.

    Raises BackboneError for a network that cannot be adapted.
    """
    convolutions = _first_convolutions(module)
    channel_counts = {convolution.in_channels for convolution in convolutions.values()}
    if channel_counts == {n_channels}:
        return
    if channel_counts != {3} or any(
        convolution.groups != 1 for convolution in convolutions.values()
    ):
        counts_text = ", ".join(map(str, sorted(channel_counts))) or "an unknown number of"
        raise BackboneError(
            f"{name} has {counts_text} input channels, and {n_channels} bands are asked for. Only "
            "a first convolution on three colours is adapted: give as many bands as it takes"
        )
    if getattr(module, "transform_input", False):
        raise BackboneError(
            f"{name} normalizes red, green and blue itself, and cannot be given {n_channels} "
            "bands: take the network of the same name from timm"
        )
    from timm.models import adapt_input_conv

    for convolution in convolutions.values():
        weight = adapt_input_conv(n_channels, convolution.weight.detach())
        convolution.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
        convolution.in_channels = n_channels
    # Models of transformers compare the channels of their images with this number.
    for part in (*module.modules(), getattr(module, "config", None)):
        if getattr(part, "num_channels", None) == 3:
            part.num_channels = n_channels  # type: ignore[union-attr]


def has_channels(module: nn.Module, tensors: Mapping[str, Tensor], n_channels: int) -> bool:
    """Return whether the first convolution in a weights file takes `n_channels`."""
    names = tuple(f"{name}.weight" for name in _first_convolutions(module))
    shapes = [tensor.shape for key, tensor in tensors.items() if key.endswith(names)]
    return any(len(shape) == 4 and shape[1] == n_channels for shape in shapes)


def _first_convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """Return {name: convolution} of those that timm declares, else of the network's first one."""
    config: Any = getattr(module, "pretrained_cfg", None)
    declared = config.get("first_conv") if isinstance(config, Mapping) else None
    names = (declared,) if isinstance(declared, str) else tuple(declared or ())
    convolutions = {
        name: part for name, part in module.named_modules() if isinstance(part, nn.Conv2d)
    }
    declared_convolutions = {name: convolutions[name] for name in names if name in convolutions}
    return declared_convolutions or dict(list(convolutions.items())[:1])
