"""Where images are: folders, tables, archives and arrays, read by one reader that counts all that
it meets.
"""

from headrace.extract.sources.formats import IMAGE_SUFFIXES
from headrace.extract.sources.layout import SPLIT_WORDS
from headrace.extract.sources.listing import LeftOut, Listing
from headrace.extract.sources.read import (
    ImageSource,
    SourceWarning,
    detect_source,
    read_source,
    warn_of_left_out,
)
from headrace.extract.sources.samples import list_array, list_folder, list_tar, read_table

__all__ = [
    "IMAGE_SUFFIXES",
    "SPLIT_WORDS",
    "ImageSource",
    "LeftOut",
    "Listing",
    "SourceWarning",
    "detect_source",
    "list_array",
    "list_folder",
    "list_tar",
    "read_source",
    "read_table",
    "warn_of_left_out",
]
