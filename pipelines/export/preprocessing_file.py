"""preprocess.py of an export: the part of the preprocessing that is outside the graphs."""

import ast
import dataclasses
import functools
import importlib
import inspect
import pprint
import re
from collections.abc import Mapping, Sequence
from types import ModuleType

from headrace.extract import errors
from headrace.extract.images import preprocessing as preprocess
from headrace.heads.data.side_columns import SideColumn, columns_to_json
from headrace.pipelines.models.torch_graph import GraphInput

PREPROCESS_FILE = "preprocess.py"

_TEXT = '''\
"""An image file to what the exported model takes: pixels (height, width, channels).

Written by headrace {version}.

    python preprocess.py photo.jpg photo.npy

`load` is what to call; it raises ImageError for images that headrace refuses. Below it is the code
of headrace (Apache-2.0) for decoding and resizing, word for word. It needs Python 3.10, Pillow 11
and NumPy 2, or newer; tifffile for TIFFs whose bands Pillow does not read.
"""

{imports}

# What each input of the model takes. Sizes are (height, width); pixel_range: black and white of
# more than 8 bits; bands: of the files, counted from 1.
INPUTS = {inputs}


def load(path, name="{first}", box=None):
    """Pixels of an image file, or of an .npy file: upright, resized, cropped in the middle.

    Shape (height, width, channels) in the input's pixel_dtype: uint8, with alpha over white; or
    float32 with white at 255, of more than 8 bits or of the input's bands. box: (left, top, width,
    height) of the part of the image that is meant, in its pixels: a tile, or a box of an object.
    """
    how = Preprocessing(**INPUTS[name])
    with open(path, "rb") as file:
        data = file.read()
    image = decode_pixels(data, how if box is None else replace(how, decode="exact"))
    if box is not None:
        left, top, width, height = box
        is_picture = isinstance(image, Image.Image)
        columns, rows = image.size if is_picture else image.values.shape[1::-1]
        right, bottom = min(left + width, columns), min(top + height, rows)
        edges = [int(edge + 0.5) for edge in (max(left, 0), max(top, 0), right, bottom)]
        if edges[0] >= edges[2] or edges[1] >= edges[3]:
            raise ImageError("the box holds no pixel of the image")
        image = image.crop(edges) if is_picture else image.crop(*edges)
    return np.array(render_crop(image, how), how.pixel_dtype)


class ImageError(ValueError):
    """The image cannot be decoded; the text is the reason."""
{side}{unit}

{source}


if __name__ == "__main__":
    np.save(sys.argv[2], load(sys.argv[1]))
'''


_SIDE_TEXT = '''

# What the input `side_columns` is made of. levels: the values of a category as text, "" a missing
# one; null: a number.
SIDE_COLUMNS = {columns}


def side_columns(row):
    """One row of the input `side_columns`, a list of floats, of {{name: value}}.

    A number that is None, NaN or absent is missing; so is a category that is None or absent. A
    category that no training image had is none of its levels.
    """
    inputs = []
    for column in SIDE_COLUMNS:
        value = row.get(column["name"])
        if column["levels"] is not None:
            text = "" if value is None else str(value).strip()
            inputs += [float(text == level) for level in column["levels"]]
            continue
        is_missing = value is None or value != value
        known = 0.0 if is_missing else (float(value) - column["center"]) / column["spread"]
        inputs += [known, float(is_missing)] if column["has_missing"] else [known]
    return inputs

'''


_UNIT_TEXT = '''

# How predictions of a unit's images become the unit's.
UNIT_RULE = {rule}


def predict_unit(predictions):
    """The prediction (C,) of a unit, of those (n, C) that the model gives for all its images."""
    values = np.asarray(predictions, np.float64)
    kind, floor = UNIT_RULE["task_kind"], UNIT_RULE["floor"]
    power = 1 / UNIT_RULE["temperature"]
    if UNIT_RULE["aggregation"] == "mean":
        values = values.mean(0)
    else:
        values = values.max(0)
        if kind == "single":
            two = len(values) == 2
            values = np.array([1 - values[1], values[1]]) if two else values / values.sum()
    if kind == "regression" or power == 1:
        return values
    if kind == "multi":
        values = np.clip(values, floor, 1 - floor)
        return 1 / (1 + ((1 - values) / values) ** power)
    values = np.clip(values, floor, None)
    values = (values / values.max()) ** power
    return values / values.sum()

'''


def preprocess_file(
    inputs: list[GraphInput],
    headrace_version: str,
    side_columns: Sequence[SideColumn] = (),
    unit_rule: Mapping[str, object] | None = None,
) -> str:
    """Return the text of preprocess.py.

    side_columns: that the model reads beside each image. unit_rule: fields of UNIT_RULE in that
    file, None for a model without units.
    """
    imports, source = _decoding_source()
    input_fields = {
        model_input.name: dataclasses.asdict(model_input.preprocessing) for model_input in inputs
    }
    placeholders = {
        "version": headrace_version,
        "imports": imports,
        "inputs": pprint.pformat(input_fields, width=100, sort_dicts=False),
        "first": inputs[0].name,
        "side": _SIDE_TEXT.format(
            columns=pprint.pformat(columns_to_json(side_columns), width=100, sort_dicts=False)
        )
        if side_columns
        else "",
        "unit": "" if unit_rule is None else _UNIT_TEXT.format(rule=pprint.pformat(unit_rule)),
        "source": source,
    }
    # All in one pass, so that text of a model that looks like a placeholder is not filled in.
    return re.sub(rf"\{{({'|'.join(placeholders)})\}}", lambda match: placeholders[match[1]], _TEXT)


@functools.cache
def _decoding_source() -> tuple[str, str]:
    """Return headrace's code for decoding and resizing: the imports of other packages, and the
    text.
    """
    # Its own source text, because a second version of that code would come to differ.
    imports: set[str] = set()
    module_bodies = []
    for module in _modules_needed(preprocess):
        module_imports, body = _split_source(module)
        imports |= module_imports
        module_bodies.append(body)
    return "\n".join(sorted(imports)), "\n\n\n".join(module_bodies)


def _modules_needed(module: ModuleType) -> list[ModuleType]:
    """Return the module and headrace's modules that it imports, each after those that it needs."""
    needed_modules: dict[ModuleType, None] = {}
    for node in _import_nodes(inspect.getsource(module)):
        # `_TEXT` has its own ImageError in place of the errors' module.
        if isinstance(node, ast.ImportFrom) and _is_ours(node) and node.module != errors.__name__:
            needed_modules |= dict.fromkeys(
                _modules_needed(importlib.import_module(str(node.module)))
            )
    return [*needed_modules, module]


def _split_source(module: ModuleType) -> tuple[set[str], str]:
    """Return a module's imports of other packages, and its text below all imports."""
    source = inspect.getsource(module)
    import_nodes = _import_nodes(source)
    docstring = ast.parse(source).body[0]  # the last line to drop where nothing is imported
    last_import_line = max(node.end_lineno or 0 for node in (docstring, *import_nodes))
    outside_imports = {ast.unparse(node) for node in import_nodes if not _is_ours(node)}
    return outside_imports, "\n".join(source.splitlines()[last_import_line:]).strip()


def _import_nodes(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [
        node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def _is_ours(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and str(node.module).startswith("headrace.")
