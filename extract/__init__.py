"""Images to features: list samples, hash their contents, plan the units that are missing, run each."""

from headrace.extract.backbone import Backbone, BackboneSpec, load_backbone
from headrace.extract.containers import list_array, list_tar
from headrace.extract.contents import Contents, Unreadable, content_hashes
from headrace.extract.describe import BackboneInfo, TapInfo, describe_backbone, feature_specs
from headrace.extract.errors import BackboneError, SourceError
from headrace.extract.plan import ExtractJob, Network, plan_networks, plan_units
from headrace.extract.preprocess import Preprocessing
from headrace.extract.samples import IMAGE_SUFFIXES, list_folder, read_table
from headrace.extract.taps import Tap, parse_tap, resolve_taps
from headrace.extract.unit import UnitReport, run_unit
from headrace.extract.views import Augmentation

__all__ = [
    "IMAGE_SUFFIXES",
    "Augmentation",
    "Backbone",
    "BackboneError",
    "BackboneInfo",
    "BackboneSpec",
    "Contents",
    "ExtractJob",
    "Network",
    "Preprocessing",
    "SourceError",
    "Tap",
    "TapInfo",
    "UnitReport",
    "Unreadable",
    "content_hashes",
    "describe_backbone",
    "feature_specs",
    "list_array",
    "list_folder",
    "list_tar",
    "load_backbone",
    "parse_tap",
    "plan_networks",
    "plan_units",
    "read_table",
    "resolve_taps",
    "run_unit",
]
