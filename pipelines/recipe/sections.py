"""The recipe's sections except `heads`: images, task, backbones, how and where to work.

Comments beside the fields are their descriptions in the reference page and the JSON Schema.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic

from headrace.cache.count_text import count_text
from headrace.pipelines.recipe.values import (
    Fraction,
    NonEmptyFloats,
    NonNegative,
    Positive,
    Section,
    Seed,
    Share,
    as_texts,
    check_views,
)

if TYPE_CHECKING:
    from headrace.extract.sources.source import ImageSource


class BoxesSection(Section):
    """The columns of a table that hold a box for each row."""

    # default: x, y, width and height, or others that say what they are, such as xmin, ymin, xmax,
    # ymax
    columns: tuple[str, str, str, str] | None = None
    # of the columns; xywh: left, top, width, height; xyxy: both corners; cxcywh: centre, width,
    # height
    format: Literal["xywh", "xyxy", "cxcywh"] = "xywh"
    # fraction: of the image's width and height; default: pixels, unless all numbers are from 0 to 1
    unit: Literal["pixels", "fraction"] | None = None


class TilesSection(Section):
    """The grid that large images are cut into."""

    size: Annotated[int, pydantic.Field(ge=8)]  # pixels of an edge
    # pixels that neighbours share: at most 7/8 of size, and 8 less than it
    overlap: Annotated[int, pydantic.Field(ge=0)] = 0
    # leave out empty tiles, which are of this; white: 220 of 255 and more in every channel; black:
    # 8 and less; nodata: 0, or no value
    background: Literal["white", "black", "nodata"] | None = None
    max_background: Share = 0.9  # a tile with a larger share of background is left out as empty

    @pydantic.model_validator(mode="after")
    def _is_a_grid(self) -> "TilesSection":
        from headrace.extract.sources.regions import Tiles  # imports pandas

        Tiles(**self.model_dump())
        return self


class Images(Section):
    """The images: a folder per class, a table that names or holds them, archives, or arrays."""

    # one sub-folder per class; or train/, val/ and test/ with the classes below them
    folder: Path | None = None
    # CSV, JSON lines, JSON (COCO too), Parquet or Arrow; a pattern, or a folder that `datasets`
    # saved
    table: Path | None = None
    # tar archives, compressed or not: one, a folder of them, or a pattern, train-{000..031}.tar
    tar: Path | None = None
    zip: Path | None = None  # as `tar`
    array: Path | None = None  # .npy, .npz, HDF5 or idx (.gz too)
    # what the outer folders are; auto: as their names say
    layout: Literal["auto", "classes", "split"] = "auto"
    exclude: tuple[str, ...] = ()  # ids, or folders that they lie in, to leave out; * and ? match
    # of a folder or a table: a regular expression, searched for in the images' paths, whose named
    # groups are columns, such as '(?P<patient>P[0-9]+)_(?P<label>[a-z]+)'
    name_pattern: str | None = None
    # the table's column with the paths, or the images; default: found by what it holds
    path_column: str | None = None
    # default: `id` where there is such a column, else the path as written in the table
    id_column: str | None = None
    # what relative paths in the table start from; default: the table's folder
    root: Path | None = None
    # the paths, from columns of the table: train/{id}.jpg; part_*/{id:05}.jpg looks for each file
    # in all of these folders, and fills ids with zeros to five digits
    path_pattern: str | None = None
    array_key: str | None = None  # the array in a .npz or HDF5 file
    labels: Path | None = None  # the array's labels: another such file
    labels_key: str | None = None  # the array in that file
    # images without labels, of any of these kinds: never trained or scored on, predicted in the end
    unlabelled: Path | None = None
    # black and white of pixels of more than 8 bits, such as [0, 4095]; default: what the file's
    # format says
    pixel_range: tuple[pydantic.FiniteFloat, pydantic.FiniteFloat] | None = None
    # rows of a table that are boxes of images; auto: where it has the columns x, y, width and
    # height, or the like; {} for COCO's annotations
    boxes: BoxesSection | Literal["auto", "none"] = "auto"
    tiles: TilesSection | None = None  # the grid that each image is cut into
    # MegaDetector's results (JSON): the animals in it are the rows, instead of whole images
    detections: Path | None = None
    min_confidence: Share = 0.2  # of detections
    # float32: images of more than 8 bits keep their depth until they are normalized; those of 8
    # bits are the same in both
    pixel_dtype: Literal["uint8", "float32"] = "uint8"
    # pixels without a value (NaN, or what a GeoTIFF declares), of float32: the image is refused, or
    # they get the mean of their band
    nodata: Literal["refuse", "mean"] = "refuse"
    # scaled: JPEGs much larger than the network's input are decoded at a smaller size, four times
    # as fast
    decode: Literal["exact", "scaled"] = "exact"

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "Images":
        if len(self._named_sources) != 1:
            raise ValueError(
                "give exactly one of `folder` (one sub-folder per class), `table` (CSV, JSON lines "
                "or Parquet), `tar`, `zip` and `array` (npy, npz, HDF5, idx)"
            )
        return self

    @pydantic.field_validator("name_pattern")
    @classmethod
    def _names_columns(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            names = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        if not names or {"id", "path"} & set(names):
            raise ValueError(
                "expected named groups, which become columns (not id or path), such as "
                f"'(?P<label>[a-z]+)_[0-9]+'; found {', '.join(names) or 'none'}"
            )
        return pattern

    @pydantic.model_validator(mode="after")
    def _names_are_files(self) -> "Images":
        if self.name_pattern is not None and self.folder is None and self.table is None:
            raise ValueError("name_pattern is for the images of a `folder` or a `table`")
        return self

    @pydantic.field_validator("pixel_range")
    @classmethod
    def _black_is_below_white(
        cls, values: tuple[float, float] | None
    ) -> tuple[float, float] | None:
        if values is not None and values[0] >= values[1]:
            raise ValueError(
                "expected [black, white] with black below white, such as [0, 4095]; found "
                f"{list(values)}"
            )
        return values

    @property
    def _named_sources(self) -> list[tuple[str, Path]]:
        locations = (
            ("folder", self.folder),
            ("table", self.table),
            ("archive", self.tar),
            ("archive", self.zip),
            ("array", self.array),
        )
        return [(kind, location) for kind, location in locations if location is not None]

    @property
    def has_source(self) -> bool:
        """Whether the section names images; for features given from Python it names none."""
        return bool(self._named_sources)

    def source(self) -> "ImageSource":
        """Return the section as a source of `headrace.extract`."""
        # Imported here, because it imports pandas, which checking a recipe does not need.
        from headrace.extract.sources.regions import Boxes, Tiles
        from headrace.extract.sources.source import ImageSource

        ((kind, location),) = self._named_sources
        # Not of the source: how pixels are decoded, and the images without labels.
        not_options = {"pixel_dtype", "nodata", "decode", "unlabelled"}
        options = self.model_dump(exclude={"folder", "table", "tar", "zip", "array", *not_options})
        if isinstance(self.boxes, BoxesSection):
            options["boxes"] = Boxes(**options["boxes"])
        if self.tiles is not None:
            options["tiles"] = Tiles(**options["tiles"])
        return ImageSource(kind, location, **options)  # type: ignore[arg-type]

    def unlabelled_source(self) -> "ImageSource | None":
        """Return the source of the images without labels, if any; with the same boxes and tiles."""
        if self.unlabelled is None:
            return None
        from headrace.extract.sources.read import detect_source

        labelled = self.source()
        return detect_source(
            self.unlabelled,
            boxes=labelled.boxes,
            tiles=labelled.tiles,
            detections=labelled.detections,
            min_confidence=labelled.min_confidence,
        )


class TaskSection(Section):
    """What to predict, and which rows may be seen when."""

    # the column to predict; several columns for several labels or numbers, or for one class where
    # exactly one of them holds a 1
    target: str | tuple[str, ...] = "label"
    # one class for each image; 0/1 columns; numbers
    kind: Literal["single", "multi", "regression"] = "single"
    # rows of one group (patient, module, scene) never stand on two sides of a split
    group: str | None = None
    # what is predicted and scored as one (patient, slide, sequence), by all of its images; never on
    # two sides of a split
    unit: str | None = None
    # how predictions of a unit's images are combined; max, with two classes: the largest
    # probability of the second one
    unit_aggregation: Literal["mean", "max"] = "mean"
    # a unit's target where its images differ; same: refuse; majority: the commonest class (of
    # several labels, those of half of the images); any: labels that any image has; mean: of numbers
    unit_label: Literal["same", "majority", "any", "mean"] = "same"
    # tabular columns beside the image (age, site, exposure) as inputs of heads: a list, or
    # {column: number, category or auto}; every input is tried with and without them
    side_columns: tuple[str, ...] | dict[str, Literal["auto", "number", "category"]] = ()
    split: str | None = None  # a column with train / validation / test
    fold: str | None = None  # a column with fold numbers
    # where the split or fold column puts copies of an image on different sides: refuse, or keep it
    # as it is
    copies: Literal["refuse", "keep"] = "refuse"
    # between several labels in one cell, as in `cat;dog`; for kind: multi
    separator: Annotated[str, pydantic.Field(min_length=1)] | None = None
    # values of the target and what they count as, such as {-1: 1, "": 0, unsure: null}; "" is an
    # empty cell, null is no value, as an empty cell has none
    relabel: Annotated[dict[str, str | None], pydantic.BeforeValidator(as_texts)] = pydantic.Field(
        default_factory=dict
    )
    # set aside at random where no column marks test rows; 0: no test split
    test_fraction: Fraction = 0.25
    folds: Annotated[int, pydantic.Field(ge=2, le=100)] = 5  # the winner is chosen on these
    # default: accuracy (single), average_precision (multi), r2 (regression)
    metric: str | None = None
    seed: Seed = 0  # of the test split and the folds

    @pydantic.model_validator(mode="after")
    def _unit_label_fits(self) -> "TaskSection":
        kinds = {"majority": ("single", "multi"), "any": ("multi",), "mean": ("regression",)}
        if self.unit is None and (self.unit_label != "same" or self.unit_aggregation != "mean"):
            raise ValueError(
                "unit_label and unit_aggregation say how images make up a unit: name its column, "
                "as in `unit: patient`"
            )
        if self.kind not in kinds.get(self.unit_label, (self.kind,)):
            raise ValueError(
                f"unit_label: {self.unit_label} is for kind: "
                f"{' and '.join(kinds[self.unit_label])}; this task is of kind {self.kind}"
            )
        return self

    @pydantic.field_validator("target")
    @classmethod
    def _columns_differ(cls, target: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not target:
            raise ValueError("name at least one column, such as `target: label`")
        column_names = [target] if isinstance(target, str) else target
        repeated_names = {name for name in column_names if column_names.count(name) > 1}
        if repeated_names:
            raise ValueError(
                f"the column {min(repeated_names)!r} is named twice: name each column once"
            )
        return target

    @pydantic.model_validator(mode="after")
    def _side_columns_are_inputs(self) -> "TaskSection":
        targets = [self.target] if isinstance(self.target, str) else list(self.target)
        for key, column in (("unit", self.unit), ("group", self.group)):
            if column in targets:
                raise ValueError(
                    f"{key} and target name one column, {column!r}: all images of a class would "
                    f"be one {key}"
                )
        for key, columns in (
            ("target", targets),
            ("group", [self.group]),
            ("unit", [self.unit]),
            ("split", [self.split]),
            ("fold", [self.fold]),
        ):
            for name in self.side_columns:
                if name in columns:
                    raise ValueError(
                        f"side_columns names {name!r}, which is the task's {key}: an image to "
                        "predict has none that was seen in training. Leave it out of side_columns"
                    )
        return self


class Backbone(Section):
    """A frozen network and the taps to keep."""

    # torchvision:…, timm:…, transformers:…, open_clip:… (`headrace backbones` lists them),
    # onnx:FILE, or python:module:function
    name: str
    # default: the library's own pretrained weights; a tag, a file, or random:SEED
    weights: str | None = None
    # order: as they come in a .pth; shapes and roles are checked
    weights_match: Literal["name", "order"] = "name"
    # what the network's names follow in the weights file, such as `student.`; default: found
    weights_prefix: str | None = None
    # arguments of the library's builder, such as {reg_tokens: 4, init_values: 1.0e-5}
    model: dict[str, pydantic.JsonValue] | None = None
    # class, register and distillation tokens before the patches; default: those it declares
    prefix_tokens: Annotated[int, pydantic.Field(ge=0)] | None = None
    alias: str | None = None  # how the leaderboard calls it when there are several backbones
    # nodes with their pooling, such as layer4.avg; auto: averages and maxima of the last block at
    # each resolution, or of each quarter of a transformer, and more
    taps: Literal["auto"] | Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = "auto"
    # pixels; default: what the weights were trained with
    image_size: Annotated[int, pydantic.Field(ge=16, le=4096)] | None = None
    # share of the shorter edge that the crop keeps; default: the weights' own
    crop_fraction: Share | None = None
    # shortest: the shorter edge is resized, and the crop cuts the longer one; squash: both edges,
    # to a square; border: the longer edge, with a border of the mean; default: the weights' own
    resize_mode: Literal["shortest", "squash", "border"] | None = None
    # bands of the files, counted from 1 as in GDAL, such as [4, 3, 2]: the network's channels, and
    # its first convolution is adapted to their number; default: grey or colours
    bands: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)] | None = None
    # black and white of each of these bands; default: images.pixel_range
    band_ranges: tuple[tuple[pydantic.FiniteFloat, pydantic.FiniteFloat], ...] | None = None
    # of the normalization, one value for each channel, white being 1; default: the weights' own,
    # for other than three bands their mean
    mean: tuple[pydantic.FiniteFloat, ...] | None = None
    # as `mean`
    std: tuple[Positive, ...] | None = None
    # of the resizing; default: the weights' own
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    # 1: the evaluation crop; more: augmented renderings as well; flips: the crop and its 3 mirror
    # images; dihedral: turned by quarters too, 8 in all
    views: Annotated[int | Literal["flips", "dihedral"], pydantic.BeforeValidator(check_views)] = 1

    @pydantic.model_validator(mode="after")
    def _one_value_per_channel(self) -> "Backbone":
        n_channels = 3 if self.bands is None else len(self.bands)
        for name in ("mean", "std", "band_ranges"):
            values = getattr(self, name)
            if values is not None and len(values) != n_channels:
                raise ValueError(
                    f"{name} has {count_text(len(values), 'value')}; expected {n_channels}, one "
                    "for each "
                    + ("of red, green and blue" if self.bands is None else "of the bands")
                )
        if self.band_ranges is not None and self.bands is None:
            raise ValueError("band_ranges goes with bands; for all images: images.pixel_range")
        return self


class EnsembleSection(Section):
    """Averages of several heads, picked from their stored validation predictions.

    Nothing is trained for it.
    """

    max_members: pydantic.PositiveInt = 8  # different heads at most
    max_backbones: pydantic.PositiveInt | None = None  # forward passes; default: no limit
    # each backbone beyond the first must lower the loss by this share
    min_gain_per_backbone: Fraction = 0.01
    # picks; a head picked twice weighs twice
    rounds: Annotated[int, pydantic.Field(ge=1, le=1000)] = 30
    candidates: Annotated[int, pydantic.Field(ge=2)] = 200  # heads to pick from, the best ones
    # level of the interval of its gain over a single head; the selected model only if all of that
    # lies above 0
    confidence: Annotated[float, pydantic.Field(gt=0.5, lt=1)] = 0.95


class ReuseSection(Section):
    """Partial reuse: a new head on pretrained or new blocks above a node; the two are compared."""

    # everything above this node trains, as `blocks.4`; from its cached map (`blocks.4.map`) where
    # the backbone has that tap
    train_above: str
    # taps above the node that the new head is given
    inputs: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]
    hidden: tuple[pydantic.PositiveInt, ...] = ()
    start: Annotated[tuple[Literal["pretrained", "random"], ...], pydantic.Field(min_length=1)] = (
        "pretrained",
        "random",
    )


class FinetuneSection(Section):
    """Which heads become networks trained by gradients, how deep, and at what cost."""

    # how many heads, best first, one of each inputs and kind
    top_k: Annotated[int, pydantic.Field(ge=0)] = 1
    # What trains: head, all, scratch (all, from a random start), or a node: everything above it.
    train_above: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = ("all",)
    reuse: tuple[ReuseSection, ...] = ()
    learning_rate: NonEmptyFloats = (3e-4,)
    layer_decay: Share = 0.7  # learning rate of each block, as a share of that of the block above
    weight_decay: NonNegative = 1e-2
    warmup_fraction: Fraction = 0.1  # share of all steps
    epochs: pydantic.PositiveInt = 10
    patience: pydantic.PositiveInt = 4
    batch_size: pydantic.PositiveInt = 32
    dropout: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    class_weight: Literal["none", "balanced"] = "none"
    grad_clip_norm: Positive = 1.0
    batch_norm: Literal["frozen", "trainable"] = "frozen"
    augment: Literal["none", "flip", "flips", "views"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: Seed = 0
    # minutes of training, as computing time of each worker; default: no limit
    budget_minutes: Positive | None = None


class InputHalvingSection(Section):
    """Successive halving of the inputs: all start on few images; only the best get all heads."""

    # of the training images, round by round
    sample_fractions: Annotated[tuple[Share, ...], pydantic.Field(min_length=1)] = (0.1, 0.3)
    keep_fraction: Share = 0.5  # of the inputs, after each round
    min_inputs: pydantic.PositiveInt = 2  # inputs that stay whatever their rank


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu|hpu|mtia)(:\d+)?", name):
        raise ValueError(
            "expected auto, cpu or an accelerator of PyTorch's, such as cuda, xpu or mps; of "
            f"several with its number, cuda:1; found {name!r}"
        )
    return name


# the name of a device in PyTorch, such as cuda:1
Device = Annotated[str, pydantic.AfterValidator(_check_device)]


class Compute(Section):
    """How the work is done. Nothing here changes a result beyond floating-point tolerance."""

    workers: pydantic.PositiveInt | None = None  # default: one per core
    # per work unit, and so rows per shard; default: 128, on a GPU 1,024
    images_per_shard: pydantic.PositiveInt | None = None
    # of the forward pass: cpu or an accelerator of PyTorch's (cuda is ROCm's name too), one of
    # several by its number, cuda:1; auto: the accelerator that PyTorch sees, if any
    device: Device = "auto"
    # of logistic, mlp, conv and bags heads; auto: a GPU where `workers` is 1, so that no other
    # process wants it
    heads_device: Device = "auto"
    # images per forward pass; default: found by trying
    batch_size: pydantic.PositiveInt | None = None
    # of the pass on a CPU in float32: openvino is faster for many images, and needs
    # headrace[openvino]
    runtime: Literal["torch", "openvino"] = "torch"
    compile: bool = False  # PyTorch's compiler, on a GPU: minutes once per network, for long runs
    # kernels of a pass launched as one CUDA graph, every batch filled up to the same size; not yet
    # tried on a GPU
    cuda_graphs: bool = False
    # stop at an image that cannot be decoded, instead of listing it and going on
    strict: bool = False


class SlurmSection(Section):
    """What a SLURM job asks for. A job has several one-core workers on one node."""

    partition: str | None = None  # for heads, and for extraction on CPUs
    gpu_partition: str | None = None  # for extraction with device: cuda
    gpus_per_job: pydantic.PositiveInt = 1  # one worker each
    account: str | None = None
    workers_per_job: pydantic.PositiveInt = 1
    memory_per_job: str = "4 GB"
    walltime: Annotated[str, pydantic.Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")] = "01:00:00"
    interface: str | None = None  # of the network that nodes share, such as ib0
    directives: tuple[str, ...] = ()  # more #SBATCH lines, such as --qos=long
    # shell lines before the workers start, such as `module load cuda`
    prologue: tuple[str, ...] = ()


class KubernetesSection(Section):
    """What the Dask operator of a Kubernetes cluster is asked for."""

    image: str = "headrace:latest"  # with headrace and its extra `kubernetes` in it
    namespace: str | None = None
    memory: str = "4Gi"
    volume_claim: str | None = None  # the volume with the images, the cache and the run's directory
    # where it lies in every pod, and here: paths in a task are the same on both sides
    mount_path: str = "/data"


class ClusterSection(Section):
    """Where tasks run. Nothing here changes a result beyond floating-point tolerance."""

    # local, cuda (one worker per GPU of this machine), slurm, kubernetes, or a scheduler's address
    where: str = "local"
    # a task that takes longer counts as hung, and its worker is ended
    task_timeout_s: Positive = 3600.0
    memory: str | None = None  # of one worker; default: this machine's, shared equally
    tls: Path | None = None  # the folder that `headrace cluster tls` wrote
    slurm: SlurmSection = SlurmSection()
    kubernetes: KubernetesSection = KubernetesSection()

    @pydantic.field_validator("where")
    @classmethod
    def _known(cls, where: str) -> str:
        if where not in ("local", "cuda", "slurm", "kubernetes") and "://" not in where:
            raise ValueError(
                "expected local, cuda, slurm, kubernetes or a scheduler's address such as "
                "tls://host:8786"
            )
        return where


class Storage(Section):
    """How features are computed and kept. All of it is part of what a feature set is."""

    # how features are kept; uint8 is a quarter of float32
    dtype: Literal["float16", "float32", "bfloat16", "uint8"] = "float16"
    # of the forward pass; GPUs are faster in bfloat16
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    # for maps with many zeros; reading is slower
    compression: Literal["none", "bitshuffle-lz4"] = "none"
    # disk space that new features may take; default: what is free, less a reserve
    budget_gb: Positive | None = None


class LogSection(Section):
    """Trackers that a finished run is reported to. Nothing is read from them."""

    # a folder (a SQLite file is made in it), or a tracking URI: http://server:5000
    mlflow: str | None = None
    tensorboard: Path | None = None  # a folder for its event files
    experiment: str = "headrace"
    # the best settings, each as a run of its own
    settings: Annotated[int, pydantic.Field(ge=0, le=1000)] = 20
