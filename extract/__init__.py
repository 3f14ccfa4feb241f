"""Images to features: list samples, hash their contents, plan the units that are missing, run each.

Importing this imports no torch: what needs it is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from headrace.extract.changes import Changes, compare_listings, read_listing, write_listing
from headrace.extract.contents import Contents, Unreadable, content_hashes, hash_bytes
from headrace.extract.errors import BackboneError, ImageError, SourceError
from headrace.extract.figures import Figures, UnitReport, figures
from headrace.extract.images import decode_image
from headrace.extract.locate import read_bytes
from headrace.extract.memo import Storing, backbone_features, remember_features, remembered_backbone
from headrace.extract.plan import ExtractJob, Network, plan_networks, plan_units, unit_name
from headrace.extract.preprocess import Preprocessing
from headrace.extract.sources import (
    IMAGE_SUFFIXES,
    SPLIT_WORDS,
    ImageSource,
    LeftOut,
    Listing,
    SourceWarning,
    detect_source,
    list_array,
    list_folder,
    list_tar,
    read_source,
    read_table,
)
from headrace.extract.spec import BackboneSpec, Sample, backbone_from_fields

if TYPE_CHECKING:
    from headrace.extract.backbone import Backbone, load_backbone
    from headrace.extract.describe import BackboneInfo, TapInfo, describe_backbone, feature_specs
    from headrace.extract.library import backbone_names, backbone_tags
    from headrace.extract.taps import Tap, parse_tap, resolve_taps
    from headrace.extract.unit import run_unit, run_units
    from headrace.extract.views import Augmentation, Symmetries

# Names whose modules import torch.
_LAZY = {
    "Augmentation": "views",
    "Backbone": "backbone",
    "BackboneInfo": "describe",
    "Symmetries": "views",
    "Tap": "taps",
    "TapInfo": "describe",
    "backbone_names": "library",
    "backbone_tags": "library",
    "describe_backbone": "describe",
    "feature_specs": "describe",
    "load_backbone": "backbone",
    "parse_tap": "taps",
    "resolve_taps": "taps",
    "run_unit": "unit",
    "run_units": "unit",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    """For tab completion: the names that are imported when first used too."""
    return __all__


__all__ = [
    "IMAGE_SUFFIXES",
    "SPLIT_WORDS",
    "Augmentation",
    "Backbone",
    "BackboneError",
    "BackboneInfo",
    "BackboneSpec",
    "Changes",
    "Contents",
    "ExtractJob",
    "Figures",
    "ImageError",
    "ImageSource",
    "LeftOut",
    "Listing",
    "Network",
    "Preprocessing",
    "Sample",
    "SourceError",
    "SourceWarning",
    "Storing",
    "Symmetries",
    "Tap",
    "TapInfo",
    "UnitReport",
    "Unreadable",
    "backbone_features",
    "backbone_from_fields",
    "backbone_names",
    "backbone_tags",
    "compare_listings",
    "content_hashes",
    "decode_image",
    "describe_backbone",
    "detect_source",
    "feature_specs",
    "figures",
    "hash_bytes",
    "list_array",
    "list_folder",
    "list_tar",
    "load_backbone",
    "parse_tap",
    "plan_networks",
    "plan_units",
    "read_bytes",
    "read_listing",
    "read_source",
    "read_table",
    "remember_features",
    "remembered_backbone",
    "resolve_taps",
    "run_unit",
    "run_units",
    "unit_name",
    "write_listing",
]
