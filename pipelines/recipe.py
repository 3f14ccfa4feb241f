"""The recipe: the file that describes a run, and the lesson it gives when a key or a value is wrong."""

import difflib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from headrace.cache import HeadraceError

Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, pydantic.Field(ge=0)]
NonEmptyFloats = Annotated[tuple[Positive, ...], pydantic.Field(min_length=1)]
# "each": every feature set alone; "all": all of them side by side; a list: these feature sets side by side.
HeadInput = Literal["each", "all"] | tuple[str, ...]
# pydantic keeps its own messages for what a union was tried as; these parts of an error's location are no keys of the file.
_UNION_TAGS = ("literal", "tuple", "function", "constrained", "str", "float", "int", "bool", "list")


class RecipeError(HeadraceError, ValueError):
    """The recipe cannot be used: names the file, the line, and the nearest valid key or value."""


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Images(_Model):
    """Where the images are: a folder per class, a table with a path column, WebDataset shards, or an array file."""

    folder: Path | None = None  # one sub-folder per class; or train/, val/ and test/ with the classes below them
    table: Path | None = None  # CSV or Parquet
    path_column: str = "path"  # the table's column with the paths
    id_column: str | None = None  # default: the path as written in the table
    root: Path | None = None  # what relative paths in the table start from; default: the table's folder
    tar: Path | None = None  # an archive, a folder of them, or a pattern: train-{000..031}.tar
    array: Path | None = None  # .npy, .npz, HDF5 or idx (.gz too)
    array_key: str | None = None  # the array in a .npz or HDF5 file
    labels: Path | None = None  # the array's labels: another such file
    labels_key: str | None = None  # the array in that file

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "Images":
        if sum(source is not None for source in (self.folder, self.table, self.tar, self.array)) != 1:
            raise ValueError(
                "give exactly one of `folder` (one sub-folder per class), `table` (CSV or Parquet), "
                "`tar` (WebDataset shards) and `array` (npy, npz, HDF5, idx)"
            )
        return self


class TaskSection(_Model):
    """What to predict, and which rows may be seen when."""

    target: str | tuple[str, ...] = "label"  # the column to predict; several columns for several labels or numbers
    kind: Literal["single", "multi", "regression"] = "single"  # one class for each image; 0/1 columns; numbers
    group: str | None = None  # rows of one group (patient, module, scene) never stand on two sides of a split
    split: str | None = None  # a column with train / validation / test
    fold: str | None = None  # a column with fold numbers
    test_fraction: Fraction = 0.25  # set aside at random where no column marks test rows; 0: no test split
    folds: Annotated[int, pydantic.Field(ge=2, le=100)] = 5  # the winner is chosen on these
    metric: str | None = None  # default: accuracy (single), average_precision (multi), r2 (regression)
    seed: Seed = 0  # of the test split and the folds

    @pydantic.field_validator("target")
    @classmethod
    def _columns_differ(cls, target: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not target:
            raise ValueError("name at least one column, such as `target: label`")
        names = [target] if isinstance(target, str) else target
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"the column {min(twice)!r} is named twice: name each column once")
        return target


class Backbone(_Model):
    """A frozen network and the taps to keep."""

    name: str  # torchvision:…, timm:…, or python:module:function; `headrace backbones` lists them
    weights: str | None = None  # default: the library's own pretrained weights; a tag, a file, or random:SEED
    weights_match: Literal["name", "order"] = "name"  # order: tensors are taken in order, and every shape is checked
    alias: str | None = None  # how the leaderboard calls it when there are several backbones
    # nodes with their reduction, such as layer4.avg; auto: the last node at each resolution
    taps: Literal["auto"] | Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = "auto"
    # pixels; default: what the weights were trained with
    image_size: Annotated[int, pydantic.Field(ge=16, le=4096)] | None = None
    crop_fraction: Share | None = None  # share of the shorter edge that the crop keeps; default: the weights' own
    # of the normalisation; default: the weights' own
    mean: tuple[pydantic.FiniteFloat, pydantic.FiniteFloat, pydantic.FiniteFloat] | None = None
    std: tuple[Positive, Positive, Positive] | None = None  # of the normalisation; default: the weights' own
    # of the resizing; default: the weights' own
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    views: Annotated[int, pydantic.Field(ge=1, le=64)] = 1  # 1: the evaluation crop; more: augmented renderings as well


class LogisticGrid(_Model):
    """Logistic regression: the product of these lists."""

    # inverse strength of the L2 penalty, as in scikit-learn
    C: NonEmptyFloats = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)
    # balanced: every class counts the same
    class_weight: Annotated[tuple[Literal["none", "balanced"], ...], pydantic.Field(min_length=1)] = ("none",)
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each", "all")


class RidgeGrid(_Model):
    """Ridge classification or regression: the product of these lists."""

    alpha: NonEmptyFloats = (1.0, 10.0, 100.0, 1e3, 1e4)  # strength of the L2 penalty, as in scikit-learn
    # balanced: every class counts the same
    class_weight: Annotated[tuple[Literal["none", "balanced"], ...], pydantic.Field(min_length=1)] = ("none",)
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each", "all")


class HalvingSection(_Model):
    """Successive halving inside a bank: after these epochs only the best share of the settings goes on."""

    # epochs after which settings are dropped
    after: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)] = (3,)
    keep: Share = 0.25  # share of the settings that goes on


class MLPGrid(_Model):
    """Multi-layer perceptrons: the product of these lists."""

    # widths of the hidden layers
    hidden: Annotated[
        tuple[Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)], ...],
        pydantic.Field(min_length=1),
    ] = ((64,), (256,))
    learning_rate: NonEmptyFloats = (1e-3,)  # of AdamW
    weight_decay: Annotated[tuple[NonNegative, ...], pydantic.Field(min_length=1)] = (1e-2,)
    # share of units that is left out in training
    dropout: Annotated[tuple[Fraction, ...], pydantic.Field(min_length=1)] = (0.0, 0.5)
    label_smoothing: Annotated[tuple[Fraction, ...], pydantic.Field(min_length=1)] = (0.0,)
    # balanced: every class counts the same
    class_weight: Annotated[tuple[Literal["none", "balanced"], ...], pydantic.Field(min_length=1)] = ("none",)
    # of the first weights and of dropout
    seed: Annotated[tuple[Seed, ...], pydantic.Field(min_length=1)] = (0,)
    batch_size: pydantic.PositiveInt = 256
    epochs: pydantic.PositiveInt = 50  # at most
    patience: pydantic.PositiveInt = 8  # epochs without improvement after which a network stops
    halving: HalvingSection | None = None  # default: every setting is trained to its end
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("all",)


class ConvGrid(_Model):
    """New convolution layers and an MLP on a spatial tap (`layer3.map`): the product of these lists."""

    # of the 3 x 3 convolutions
    channels: Annotated[
        tuple[Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)], ...],
        pydantic.Field(min_length=1),
    ] = ((64,),)
    # widths of the hidden layers after the convolutions
    hidden: Annotated[tuple[tuple[pydantic.PositiveInt, ...], ...], pydantic.Field(min_length=1)] = ((),)
    learning_rate: NonEmptyFloats = (1e-3,)  # of AdamW
    weight_decay: Annotated[tuple[NonNegative, ...], pydantic.Field(min_length=1)] = (1e-2,)
    # share of units that is left out in training
    dropout: Annotated[tuple[Fraction, ...], pydantic.Field(min_length=1)] = (0.0,)
    label_smoothing: Annotated[tuple[Fraction, ...], pydantic.Field(min_length=1)] = (0.0,)
    # balanced: every class counts the same
    class_weight: Annotated[tuple[Literal["none", "balanced"], ...], pydantic.Field(min_length=1)] = ("none",)
    # of the first weights and of dropout
    seed: Annotated[tuple[Seed, ...], pydantic.Field(min_length=1)] = (0,)
    batch_size: pydantic.PositiveInt = 128
    epochs: pydantic.PositiveInt = 30  # at most
    patience: pydantic.PositiveInt = 6  # epochs without improvement after which a network stops
    halving: HalvingSection | None = None  # default: every setting is trained to its end
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each",)


class KNNGrid(_Model):
    """k nearest neighbours: the product of these lists."""

    k: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)] = (1, 5, 20)  # neighbours
    metric: Annotated[tuple[Literal["cosine", "euclidean"], ...], pydantic.Field(min_length=1)] = ("cosine",)
    # distance: nearer neighbours count more
    weighting: Annotated[tuple[Literal["uniform", "distance"], ...], pydantic.Field(min_length=1)] = ("uniform",)
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each",)


class CentroidGrid(_Model):
    """Nearest class mean."""

    metric: Annotated[tuple[Literal["cosine", "euclidean"], ...], pydantic.Field(min_length=1)] = ("cosine",)
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("each",)


class SklearnGrid(_Model):
    """One scikit-learn estimator by import path, with the product of its parameter lists."""

    estimator: str  # import path, such as sklearn.svm.SVC
    parameters: dict[str, tuple[Any, ...]] = {}  # lists of values by the estimator's parameter names
    standardize: bool = False  # scale features by their means and spreads on the training rows first
    # each: every tap alone; all: side by side; a list: these taps side by side
    inputs: tuple[HeadInput, ...] = ("all",)


class Heads(_Model):
    """Which heads to train. A kind that is absent is not trained."""

    logistic: LogisticGrid | None = None
    ridge: RidgeGrid | None = None
    mlp: MLPGrid | None = None
    conv: ConvGrid | None = None
    knn: KNNGrid | None = None
    centroid: CentroidGrid | None = None
    sklearn: tuple[SklearnGrid, ...] = ()

    @pydantic.model_validator(mode="after")
    def _some(self) -> "Heads":
        kinds = list(type(self).model_fields)
        if not any(getattr(self, kind) for kind in kinds):
            raise ValueError(f"no heads to train: give at least one of {', '.join(kinds)}")
        return self


class EnsembleSection(_Model):
    """Averages of several heads, picked from their stored validation predictions. Nothing is trained for it."""

    members: pydantic.PositiveInt = 8  # different heads at most
    networks: pydantic.PositiveInt | None = None  # backbones at most; default: all of the run's
    network_price: Fraction = 0.01  # each backbone beyond the first must lower the loss by this share
    rounds: Annotated[int, pydantic.Field(ge=1, le=1000)] = 30  # picks; a head picked twice weighs twice
    candidates: Annotated[int, pydantic.Field(ge=2)] = 200  # heads to pick from, the best ones
    confidence: Share = 0.9  # the answer only if better than the winner in this share of the resamples


class ReuseSection(_Model):
    """Partial reuse: a new head on the blocks above a cut, which start pretrained or anew; the two are compared."""

    cut: str  # the node to cut at, `blocks.4`; from its cached map (`blocks.4.map`) where the backbone has that tap
    inputs: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]  # taps above the cut that the new head is given
    hidden: tuple[pydantic.PositiveInt, ...] = ()
    start: Annotated[tuple[Literal["pretrained", "random"], ...], pydantic.Field(min_length=1)] = (
        "pretrained",
        "random",
    )


class ThawSection(_Model):
    """Which heads become networks that are trained by gradients, how deep, and what that may cost."""

    promote: Annotated[int, pydantic.Field(ge=0)] = 1  # so many heads, best first, one of each inputs and kind
    # What trains: head, all, scratch (all, from a random start), or a node: everything above it.
    depths: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = ("all",)
    reuse: tuple[ReuseSection, ...] = ()
    learning_rate: NonEmptyFloats = (3e-4,)
    layer_decay: Share = 0.7  # each block learns at so much of the rate of the one above
    weight_decay: NonNegative = 1e-2
    warm_up: Fraction = 0.1  # share of all steps
    epochs: pydantic.PositiveInt = 10
    patience: pydantic.PositiveInt = 4
    batch_size: pydantic.PositiveInt = 32
    dropout: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    class_weight: Literal["none", "balanced"] = "none"
    clip: Positive = 1.0
    batch_norm: Literal["held", "trained"] = "held"
    augment: Literal["none", "flip", "flips", "views"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: Seed = 0
    budget_minutes: Positive | None = None  # of training, computing time on each worker; default: no limit


class ScreenSection(_Model):
    """Successive halving of the inputs: all start on few images, the promising ones go on, and only they get all heads."""

    images: Annotated[tuple[Share, ...], pydantic.Field(min_length=1)] = (
        0.1,
        0.3,
    )  # of the training images, round by round
    keep: Share = 0.5  # of the inputs, after each round
    least: pydantic.PositiveInt = 2  # inputs that stay whatever their rank


class Compute(_Model):
    """How the work is done. Nothing here changes a result beyond floating-point tolerance."""

    workers: pydantic.PositiveInt | None = None  # default: one per core
    unit_images: pydantic.PositiveInt | None = (
        None  # per work unit, and so rows per shard; default: 128, on a GPU 1,024
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the forward pass
    # of logistic, mlp and conv heads; auto: a GPU where `workers` is 1, so that no other process wants it
    heads_device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: pydantic.PositiveInt | None = None  # images per forward pass; default: found by trying
    compile: bool = False  # PyTorch's compiler, on a GPU: minutes once per network, for long runs
    strict: bool = False  # stop at an image that cannot be decoded, instead of listing it and going on


class SlurmSection(_Model):
    """What a SLURM job is asked for. One job is one node's share: several workers of one core each."""

    partition: str | None = None  # of the heads, and of extraction on CPUs
    gpu_partition: str | None = None  # of extraction with device: cuda
    gpus_per_job: pydantic.PositiveInt = 1  # one worker each
    account: str | None = None
    workers_per_job: pydantic.PositiveInt = 1
    memory_per_job: str = "4 GB"
    walltime: Annotated[str, pydantic.Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")] = "01:00:00"
    interface: str | None = None  # of the network that nodes share, such as ib0
    directives: tuple[str, ...] = ()  # more #SBATCH lines, such as --qos=long
    prologue: tuple[str, ...] = ()  # shell lines before the workers start, such as `module load cuda`


class KubernetesSection(_Model):
    """What the Dask operator of a Kubernetes cluster is asked for."""

    image: str = "headrace:latest"  # with headrace and its extra `kubernetes` in it
    namespace: str | None = None
    memory: str = "4Gi"
    volume_claim: str | None = None  # the volume with the images, the cache and the run's directory
    mount_path: str = "/data"  # where it lies in every pod, and here: paths in a task are the same on both sides


class ClusterSection(_Model):
    """Where tasks run. Nothing here changes a result beyond floating-point tolerance."""

    # local, cuda (one worker per GPU of this machine), slurm, kubernetes, or a scheduler's address
    where: str = "local"
    deadline_s: Positive = 3600.0  # a task that takes longer is taken for hung; its worker is ended
    memory: str | None = None  # of one worker; default: this machine's, shared equally
    tls: Path | None = None  # the folder that `headrace cluster tls` wrote
    slurm: SlurmSection = SlurmSection()
    kubernetes: KubernetesSection = KubernetesSection()

    @pydantic.field_validator("where")
    @classmethod
    def _known(cls, where: str) -> str:
        if where not in ("local", "cuda", "slurm", "kubernetes") and "://" not in where:
            raise ValueError("expected local, cuda, slurm, kubernetes or a scheduler's address such as tls://host:8786")
        return where


class Storage(_Model):
    """How features are computed and kept. All of it is part of what a feature set is."""

    # how features are kept; uint8 is a quarter of float32
    dtype: Literal["float16", "float32", "bfloat16", "uint8"] = "float16"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the forward pass; GPUs are faster in bfloat16
    compression: Literal["none", "bitshuffle-lz4"] = "none"  # for maps with many zeros; reading is slower
    budget_gb: Positive | None = None  # what new features may take; default: what the disk has, less a reserve


class LogSection(_Model):
    """Programs that are told of the finished run too. Nothing is read from them."""

    mlflow: str | None = None  # a folder (a SQLite file is made in it), or a tracking URI: http://server:5000
    tensorboard: Path | None = None  # a folder for its event files
    experiment: str = "headrace"
    settings: Annotated[int, pydantic.Field(ge=0, le=1000)] = 20  # the best settings, each as a run of its own


class Recipe(_Model):
    """A run. Relative paths start from the recipe's own folder."""

    images: Images
    task: TaskSection = TaskSection()
    backbones: tuple[Backbone, ...] = ()
    heads: Heads = Heads(logistic=LogisticGrid(), mlp=MLPGrid())
    thaw: ThawSection | None = None  # `thaw: {}` takes the defaults
    imported: tuple[str, ...] = ()  # features of other programs, under the names that `headrace cache import` gave them
    screen: ScreenSection | None = None  # `screen: {}` takes the defaults; default: every input gets every head
    ensemble: EnsembleSection | None = None  # `ensemble: {}` takes the defaults
    storage: Storage = Storage()
    cache: Path = Path("headrace-cache")
    out: Path | None = None  # default: headrace-runs/<name of the recipe>
    compute: Compute = Compute()
    cluster: ClusterSection = ClusterSection()
    log: LogSection | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _heads_of_the_task(cls, values: Any) -> Any:
        """Numbers are predicted by ridge heads where no heads are named, for logistic ones cannot."""
        task = values.get("task") if isinstance(values, dict) else None
        if isinstance(task, dict) and task.get("kind") == "regression" and "heads" not in values:
            return {**values, "heads": {"ridge": {}, "mlp": {}}}
        return values

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> "Recipe":
        names = [backbone.alias or backbone.name for backbone in self.backbones]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two backbones are called {twice.pop()!r}: give each its own `alias`")
        if not names and not self.imported:
            raise ValueError("the key 'backbones' is missing: name at least one network (or `imported` features)")
        return self


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; relative paths in it become absolute.

    Raises RecipeError naming the file, the line and the nearest valid key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"{path}: no such recipe. Write one with: headrace init FOLDER") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise RecipeError(
            f"{path}: not a recipe (a YAML text file). For a folder of images, write one with: headrace init {path}"
        ) from None
    return parse_recipe(text, path)


def elsewhere(recipe: Recipe, where: str) -> Recipe:
    """The recipe with its tasks run on another cluster. Raises RecipeError for a word that names none."""
    try:
        section = ClusterSection.model_validate(recipe.cluster.model_dump() | {"where": where})
    except pydantic.ValidationError as error:
        raise RecipeError(f"--cluster {where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return recipe.model_copy(update={"cluster": section})


def parse_recipe(text: str, path: Path) -> Recipe:
    """As `load_recipe`, from text; `path` names it in messages and is where relative paths start."""
    root, values = _read_yaml(text, path)
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise RecipeError("\n".join(_explain(problem, root, path) for problem in _own(error.errors()))) from None
    return _absolute(recipe, path)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose every complaint about a value has a line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        # What int("foo") for `!!int foo`, or datetime for a thirteenth month, answers.
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


def _read_yaml(text: str, path: Path) -> tuple[yaml.MappingNode, Any]:
    """The nodes, which know their lines, and the values. Raises RecipeError."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
        _refuse_odd_nodes(root, path, above=set(), seen=set())
        return root, loader.construct_document(root)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{path}, line {line}: this is not YAML: the character {error.character!r}: {error.reason}. Delete it"
        ) from None
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(
            f"{path}, line {line}: this value cannot be read: {error.problem}. Expected text, a number, a list or a "
            "mapping, without a tag (!…); put text in quotes"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: this is not YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        line = loader.line + 1 if loader else 1
        raise RecipeError(
            f"{path}, line {line}: lists or mappings stand too deep in each other; a recipe needs six levels at most"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _absolute(recipe: Recipe, path: Path) -> Recipe:
    base = path.absolute().parent

    def resolve(value: Path | None) -> Path | None:
        return None if value is None else (base / value.expanduser())

    files = ("folder", "table", "root", "tar", "array", "labels")
    images = recipe.images.model_copy(update={name: resolve(getattr(recipe.images, name)) for name in files})
    backbones = tuple(
        backbone.model_copy(update={"weights": _weights_file(backbone.weights, base)}) for backbone in recipe.backbones
    )
    cluster = recipe.cluster.model_copy(update={"tls": resolve(recipe.cluster.tls)})
    out = resolve(recipe.out) or base / "headrace-runs" / path.stem
    return recipe.model_copy(
        update={
            "images": images,
            "backbones": backbones,
            "cache": resolve(recipe.cache),
            "out": out,
            "cluster": cluster,
            "log": _absolute_log(recipe.log, base),
        }
    )


def _absolute_log(log: LogSection | None, base: Path) -> LogSection | None:
    if log is None:
        return None
    mlflow = log.mlflow if log.mlflow is None or "://" in log.mlflow else str(base / Path(log.mlflow).expanduser())
    board = None if log.tensorboard is None else base / log.tensorboard.expanduser()
    return log.model_copy(update={"mlflow": mlflow, "tensorboard": board})


def _weights_file(weights: str | None, base: Path) -> str | None:
    """A name that ends as weights files do is a path from the recipe's folder; anything else is a tag."""
    if weights and weights.endswith((".pth", ".pt", ".bin", ".safetensors")):
        return str(base / Path(weights).expanduser())
    return weights


def _refuse_odd_nodes(node: yaml.Node, path: Path, *, above: set[int], seen: set[int]) -> None:
    """Refuses repeated keys, keys that are no words, and anchors inside themselves.

    above: ids of the nodes that this one stands in; seen: of those that are known to be good, as an anchor's may be.
    """
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    if id(node) in above:
        raise RecipeError(
            f"{path}, line {node.start_mark.line + 1}: what stands here holds itself, by its anchor (&…). Write it out"
        )
    above.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_odd_nodes(item, path, above=above, seen=seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                raise RecipeError(f"{path}, line {line}: a {kind} stands where a key is expected. Write: key: value")
            # YAML's loader lets the last of two equal keys win in silence: half of what the user wrote would be lost.
            if key.value in lines:
                raise RecipeError(
                    f"{path}, line {line}: the key {key.value!r} stands already in line {lines[key.value]}"
                )
            lines[key.value] = line
            _refuse_odd_nodes(value, path, above=above, seen=seen)
    above.remove(id(node))
    seen.add(id(node))


def _own(problems: typing.Sequence[typing.Any]) -> list[typing.Any]:
    """Without the complaints that a list is too short where one of its items was refused: the user's list is not."""

    def follows(problem: typing.Any) -> bool:
        loc = problem["loc"]
        return problem["type"] == "too_short" and any(
            len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in problems
        )

    return [problem for problem in problems if not follows(problem)]


def _explain(problem: typing.Any, root: yaml.MappingNode, path: Path) -> str:
    """One line for one pydantic error: file, line, key, what is wrong, the nearest valid key."""
    location = [part for part in problem["loc"] if not _is_union_tag(part)]
    line, found = _line_of(root, location)
    where = f"{path}, line {line}"
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        valid = _keys_at(Recipe, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        return f"{where}: unknown key {key!r}: {hint}Valid here: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"{where}: the key {key!r} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = "" if not found or isinstance(problem["input"], dict | list) else f" (found {problem['input']!r})"
    return f"{where}: {key}: {message}{value}" if key else f"{where}: {message}"


def _is_union_tag(part: object) -> bool:
    return isinstance(part, str) and (part in _UNION_TAGS or part.startswith(tuple(f"{tag}[" for tag in _UNION_TAGS)))


def _line_of(node: yaml.Node, location: typing.Sequence[str | int]) -> tuple[int, bool]:
    """The line (from 1) of the deepest part of the location that stands in the file, and whether all of it does."""
    line = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if str(part) not in pairs:
                return line, False
            key, node = pairs[str(part)]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line, False
    return line, True


def _keys_at(model: type[pydantic.BaseModel], location: typing.Sequence[str | int]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        model = next(m for m in _models_in(model.model_fields[part].annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> typing.Iterator[type[pydantic.BaseModel]]:
    if typing.get_origin(annotation) is None and isinstance(annotation, type):
        if issubclass(annotation, pydantic.BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
