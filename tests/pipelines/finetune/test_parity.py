"""The parity check: the network put together from backbone and head predicts what the cached head
did, or is refused.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import LOGISTIC, SMALL, Case, make_case

from headrace.cache.errors import SpecMismatch
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.images.views import Symmetries, mirror_pixels, view_json
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.resolve import Tap, backbone_nodes
from headrace.heads.data.features import load_rows
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.link import link
from headrace.heads.neighbors.kind import KNNSpec
from headrace.heads.networks.kind import ConvSpec, MLPSpec
from headrace.heads.predict import predict_head
from headrace.heads.results import read_bank
from headrace.heads.spec import HeadSpec
from headrace.pipelines.finetune.data import ImageSource
from headrace.pipelines.finetune.parity import (
    MAX_DIFFERENCE,
    MAX_FEATURE_ERROR,
    MAX_MEAN_DIFFERENCE,
    ParityResult,
    check_parity,
)
from headrace.pipelines.finetune.task import pilot
from headrace.pipelines.finetune.train_above import blocks_of, owners_above, trainable_blocks
from headrace.pipelines.models.errors import CannotSplit, ModelError
from headrace.pipelines.models.reference import paths_of_content
from headrace.pipelines.models.split_network import part_above
from headrace.pipelines.models.torch_head import head_module, standardize_head
from headrace.pipelines.models.torch_network import Network

HEADS: list[tuple[HeadSpec, tuple[str, ...]]] = [
    (LOGISTIC, ("layer4.avg",)),
    (LogisticSpec(C=100.0, class_weight="balanced"), ("layer2.avg", "layer3.avg", "layer4.max")),
    (RidgeSpec(alpha=10.0), ("layer4.avg", "layer4.max")),
    (MLPSpec(hidden=(8,), epochs=3), ("layer3.avg", "layer4.avg")),
    (MLPSpec(hidden=(8, 4), epochs=3, dropout=0.5), ("layer4.avg",)),
    (ConvSpec(channels=(6,), hidden=(4,), epochs=3), ("layer3.map",)),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("parity"))


def parity(
    case: Case,
    *,
    backbone: BackboneSpec = SMALL,
    taps: tuple[Tap, ...] = (Tap("layer4", "avg"),),
    train: bool = False,
    swap: bool = False,
) -> ParityResult:
    """The check on all images of the case with a logistic head on layer4.avg, something being other
    than it was.
    """
    bank = read_bank(case.bank(LOGISTIC, "layer4.avg"))
    arrays = {fold: bank.arrays(LOGISTIC, fold) for fold in range(2)}
    if swap:
        arrays = {
            fold: {name: -array for name, array in own.items()} for fold, own in arrays.items()
        }
    heads = {fold: head_module(LOGISTIC, own, "single") for fold, own in arrays.items()}
    loaded = load_backbone(backbone)
    network = Network(loaded, taps, heads[0]).round_to(["float16"])
    network.train(train)
    job = case.job(cut=None, backbone=backbone)
    paths = paths_of_content(Path(job.images), case.task.content)
    (batch,) = ImageSource(case.task.content, paths, loaded.preprocessing).batches(
        np.arange(48), 48
    )
    cached, _ = load_rows(case.features("layer4.avg"), case.task.content)
    expected = bank.out_of_fold_predictions(LOGISTIC)
    return check_parity(
        network, heads, [batch.inputs], case.task.fold, expected, [cached], "single"
    )


def test_symmetric_views_are_drawn_row_by_row(case: Case) -> None:
    """Where mirror images are cached, an epoch sees each image in a turn of its own, and evaluation
    sees none.
    """
    loaded = load_backbone(SMALL)
    paths = paths_of_content(Path(case.job(cut=None, backbone=SMALL).images), case.task.content)
    views = [view_json(index, Symmetries()) for index in range(4)]
    source = ImageSource(case.task.content, paths, loaded.preprocessing, views)
    order = np.arange(48)
    crop = np.concatenate([batch.inputs.numpy() for batch in source.batches(order, 20)])
    batches = list(source.batches(order, 20, generator=np.random.default_rng(0)))
    drawn = np.concatenate([batch.inputs.numpy() for batch in batches])
    turns = [
        next(index for index in range(4) if np.array_equal(seen, mirror_pixels(image, index)))
        for image, seen in zip(crop, drawn, strict=True)
    ]
    assert set(turns) == {0, 1, 2, 3}
    assert np.array_equal(np.concatenate([batch.rows for batch in batches]), order)


def test_the_network_as_it_was_passes_by_a_wide_margin(case: Case) -> None:
    """Rounding leaves a hundredth of the tolerance."""
    found = parity(case)
    assert found.rows == 48
    assert found.largest < MAX_DIFFERENCE / 100
    assert found.mean < MAX_MEAN_DIFFERENCE / 100
    assert found.features < MAX_FEATURE_ERROR / 100


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SMALL, interpolation="bicubic"),
        dataclasses.replace(SMALL, interpolation="nearest"),
        dataclasses.replace(SMALL, crop_fraction=0.875),
        dataclasses.replace(SMALL, mean=(0.45, 0.45, 0.45)),
        dataclasses.replace(SMALL, std=(0.25, 0.25, 0.25)),
        dataclasses.replace(SMALL, weights="random:1"),
    ],
    ids=["bicubic", "nearest", "crop", "mean", "std", "weights"],
)
def test_another_resize_mean_std_or_weights_is_caught(case: Case, other: BackboneSpec) -> None:
    """A network that sees other pixels, or has other weights, is refused; the message says what to
    look at.
    """
    with pytest.raises(
        ModelError, match=r"another resize, crop, mean or std .* Nothing was trained"
    ):
        parity(case, backbone=other)


def test_batch_normalization_in_training_mode_is_caught(case: Case) -> None:
    """Statistics of the batch in place of the network's own are another network."""
    with pytest.raises(ModelError, match="batch normalization in training mode"):
        parity(case, train=True)


def test_swapped_classes_are_caught(case: Case) -> None:
    """A head whose classes stand in another order has the right features and the wrong answers."""
    with pytest.raises(ModelError, match="classes in another order"):
        parity(case, swap=True)


@pytest.mark.parametrize("tap", [Tap("layer4", "max"), Tap("layer4.0.conv2", "avg")], ids=str)
def test_a_wrong_tap_of_the_same_width_is_caught(case: Case, tap: Tap) -> None:
    """Another reduction, or another node, of as many channels."""
    with pytest.raises(ModelError, match="another tap"):
        parity(case, taps=(tap,))


@pytest.mark.slow
@pytest.mark.parametrize(("head", "taps"), HEADS, ids=lambda value: getattr(value, "kind", ""))
def test_heads_of_every_kind_that_has_gradients_pass(
    case: Case, head: HeadSpec, taps: tuple[str, ...]
) -> None:
    """From the images, and from the cached maps of the cut where something lies above it."""
    cut = None if head.kind == "conv" else "layer3.map"
    found = pilot(case.job(head, taps, cut, train_above="all" if cut is None else "layer3"))
    for parity in (found.parity, found.split_parity) if cut else (found.parity,):
        assert parity["largest"] < MAX_DIFFERENCE / 10
        assert parity["rows"] == 48
    assert found.step_seconds > 0


def test_views_are_averaged_as_the_head_did(tmp_path: Path) -> None:
    """With an augmented view, stored predictions are means over views, and so are the network's."""
    case = make_case(tmp_path, images=24, views=2)
    assert pilot(case.job()).parity["largest"] < MAX_DIFFERENCE / 10


def test_a_stale_network_is_refused_before_anything_runs(case: Case) -> None:
    """Other weights or preprocessing than the features': the field is named."""
    with pytest.raises(SpecMismatch, match="the preprocessing here"):
        pilot(case.job(backbone=dataclasses.replace(SMALL, mean=(0.45, 0.45, 0.45))))
    with pytest.raises(SpecMismatch, match="the weights here"):
        pilot(case.job(backbone=dataclasses.replace(SMALL, weights="random:1")))


def test_a_neighbour_search_cannot_be_finetuned(case: Case) -> None:
    """No gradient passes through it: refused with the kinds that can."""
    with pytest.raises(
        ModelError, match="fine-tune a head of kind logistic, ridge, lda, mlp, conv"
    ):
        pilot(case.job(KNNSpec(k=3)))


@pytest.mark.parametrize(("head", "taps"), HEADS, ids=lambda value: getattr(value, "kind", ""))
def test_a_head_in_standardized_coordinates_is_the_same_function(
    case: Case, head: HeadSpec, taps: tuple[str, ...]
) -> None:
    """The module predicts as `predict_head`, before and after its first layer is put into
    standardized coordinates.
    """
    X, _ = load_rows(case.features(*taps), case.task.content, spatial=head.kind == "conv")
    arrays = read_bank(case.bank(head, *taps)).arrays(head)
    expected = predict_head(head, arrays, X)
    module = head_module(head, arrays, "single").eval()
    features = torch.from_numpy(X)
    with torch.no_grad():
        np.testing.assert_allclose(link(module(features).numpy(), "single"), expected, atol=1e-5)
        if not module.spatial:
            flat = features.double()
            standardize_head(module, flat.mean(0), flat.std(0, correction=0), is_new=False)
        np.testing.assert_allclose(link(module(features).numpy(), "single"), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "node", "size"),
    [
        ("timm:test_efficientnet", "blocks.2", 64),
        ("timm:test_convnext", "stages.1", 64),
        ("torchvision:mobilenet_v2", "features.10", 64),
        ("torchvision:densenet121", "features.denseblock2", 64),
        ("torchvision:alexnet", "features.5", 64),
    ],
)
def test_a_network_runs_from_any_stage_on(name: str, node: str, size: int) -> None:
    """What comes out of the part above a node, given the node's output, is what the whole network
    gives.
    """
    backbone = load_backbone(BackboneSpec(name, "random:0", image_size=size, crop_fraction=1.0))
    module, found = backbone.module, []
    part = part_above(module, backbone_nodes(backbone)[node])
    handle = module.get_submodule(node).register_forward_hook(
        lambda _m, _a, output: found.append(output.clone())
    )
    with torch.no_grad():
        whole = module(
            torch.randn(
                2, 3, *backbone.preprocessing.crop, generator=torch.Generator().manual_seed(0)
            )
        )
        handle.remove()
        assert torch.equal(part(found[0]), whole)
    above = owners_above(module, node, backbone.preprocessing.pixel_shape)
    assert 0 < len(above) < len(owners_above(module, None, backbone.preprocessing.pixel_shape))
    assert sum(map(len, blocks_of(module, above))) == len(above)


def test_places_where_no_cut_is_possible_say_so() -> None:
    """Inside a residual block, in a transformer, and below a tap that lies around the cut."""
    backbone = load_backbone(SMALL)
    nodes = backbone_nodes(backbone)
    with pytest.raises(CannotSplit, match="also reads what lies below it"):
        part_above(backbone.module, nodes["layer3.0.conv1"])
    vit = load_backbone(BackboneSpec("timm:test_vit", "random:0"))
    with pytest.raises(CannotSplit, match="layout NTC"):
        part_above(vit.module, backbone_nodes(vit)["blocks.1"])
    width = nodes["layer4"].shape[0]
    head = head_module(LOGISTIC, {"weight": np.zeros((1, width)), "bias": np.zeros(1)}, "single")
    with pytest.raises(CannotSplit, match="lies in"):
        Network(backbone, [Tap("layer4", "avg")], head, split_node="layer4.0")
    with pytest.raises(CannotSplit, match="no node 'layer9'"):
        trainable_blocks(Network(backbone, [Tap("layer4", "avg")], head), "layer9")
    with pytest.raises(CannotSplit, match="has parameters"):
        trainable_blocks(Network(backbone, [Tap("layer4", "avg")], head), "layer4")


def test_only_blocks_that_a_tap_needs_train() -> None:
    """Above layer2 with a tap on layer3, neither layer4 nor the classifier trains."""
    backbone = load_backbone(SMALL)
    width = backbone_nodes(backbone)["layer3"].shape[0]
    head = head_module(LOGISTIC, {"weight": np.ones((1, width)), "bias": np.zeros(1)}, "single")
    blocks = trainable_blocks(Network(backbone, [Tap("layer3", "avg")], head), "layer2")
    assert blocks
    assert {block[0].split(".")[0] for block in blocks} == {"layer3"}
