"""The part of the preprocessing that lies outside an exported model, as a file that needs Pillow and NumPy alone."""

from headrace.extract import Preprocessing
from headrace.pipelines.deliver.graph import Input

NAME = "preprocess.py"

_TEXT = '''\
"""An image file to what the exported model takes: uint8 RGB pixels (height, width, 3). Written by headrace {version}.

    python preprocess.py photo.jpg photo.npy
"""

import sys

import numpy as np
from PIL import Image, ImageOps

# What each input of the model takes. Sizes are (height, width).
INPUTS = {inputs}


def load(path, name="{first}"):
    """uint8, shape (height, width, 3): upright, alpha over white, 16 bit scaled to 8, resized, cropped in the middle."""
    how = INPUTS[name]
    with Image.open(path) as image:
        image.load()
        image = rgb(ImageOps.exif_transpose(image))
    width, height = image.size
    size = scaled(height, width, how)
    if size != (height, width):
        image = image.resize((size[1], size[0]), Image.Resampling[how["interpolation"].upper()])
    return np.asarray(centre(image, how).convert("RGB"))


def rgb(image):
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        high = values.max()
        if values.dtype.kind == "f":
            values = np.rint(values * (255 if high <= 1 else 1))
        elif high > 255 or values.dtype.itemsize == 2:
            values = (values.astype(np.uint32) + 128) // 257
        return Image.fromarray(values.astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def scaled(height, width, how):
    rows, columns = how["resize"]
    if how["mode"] == "squash":
        return rows, columns
    if how["mode"] == "shortest" and rows == columns:
        if width <= height:
            return max(int(columns * height / width), 1), columns
        return rows, max(int(rows * width / height), 1)
    ratios = height / rows, width / columns
    ratio = max(ratios) if how["mode"] == "border" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def centre(image, how):
    (rows, columns), (width, height) = how["crop"], image.size
    if height < rows or width < columns:
        above, left = max((rows - height) // 2, 0), max((columns - width) // 2, 0)
        canvas = Image.new("RGB", (max(width, columns), max(height, rows)), how["fill"])
        canvas.paste(image.convert("RGB"), (left, above))
        image, (width, height) = canvas, canvas.size
    top, left = round((height - rows) / 2.0), round((width - columns) / 2.0)
    return image.crop((left, top, left + columns, top + rows))


if __name__ == "__main__":
    np.save(sys.argv[2], load(sys.argv[1]))
'''


def preprocess_file(inputs: list[Input], version: str) -> str:
    """The text of the file."""
    lines = [f'    "{each.name}": {_settings(each.preprocessing)!r},\n' for each in inputs]
    described = "{\n" + "".join(lines) + "}"
    return _TEXT.replace("{version}", version).replace("{inputs}", described).replace("{first}", inputs[0].name)


def _settings(how: Preprocessing) -> dict[str, object]:
    fill = tuple(round(255 * value) for value in how.mean) if how.mode == "border" else (0, 0, 0)
    return {
        "resize": how.resize,
        "crop": how.crop,
        "mode": how.mode,
        "interpolation": how.interpolation,
        "fill": fill,
    }
