"""Checkpoints as training scripts leave them: without a head, with another one, under prefixes, of
several networks. What lies below the taps fits exactly, or is refused with names.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.extract.backbones.backbone import _load_cached, load_backbone
from headrace.extract.errors import BackboneError
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.describe import feature_specs
from headrace.extract.taps.forward import make_forward
from headrace.extract.taps.left_out import WeightsWarning
from headrace.extract.taps.resolve import resolve_taps

VIT = "timm:test_vit"
RESNET = "timm:test_resnet"
TAPS = {VIT: ["blocks.5.cls", "norm.avg"], RESNET: ["layer2.avg", "layer4.avg"]}
PIXELS = torch.randint(
    0, 256, (1, 160, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def state_of(name: str, seed: int = 1) -> dict[str, Tensor]:
    module = load_backbone(BackboneSpec(name, f"random:{seed}")).module
    return {key: value.clone() for key, value in module.state_dict().items()}


@functools.cache
def features_of_seed(name: str, seed: int = 1) -> list[Tensor]:
    """What files with the weights of `state_of` have to give."""
    return features(BackboneSpec(name, f"random:{seed}"), TAPS[name])


def features(spec: BackboneSpec, taps: list[str]) -> list[Tensor]:
    backbone = load_backbone(spec)
    resolved = resolve_taps(backbone, taps)
    feature_specs(backbone, resolved)  # where unfit weights are refused
    return make_forward(backbone, resolved)(PIXELS)


def saved(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TAPS)
@pytest.mark.parametrize("kind", ["headless", "foreign"])
def test_a_head_that_is_absent_or_of_other_classes(tmp_path: Path, name: str, kind: str) -> None:
    """Features are those of the whole checkpoint, and what was left out is listed, once."""
    state = state_of(name)
    head = ("head." if name == VIT else "fc.") + "weight"
    if kind == "headless":
        del state[head]
    else:
        state[head] = torch.zeros(7, state[head].shape[1])
    spec = BackboneSpec(name, saved(tmp_path / "part.pth", state))
    with pytest.warns(
        WeightsWarning, match=rf"left out: not in the file.* \(1\): {head}"
    ) as warned:
        found = features(spec, TAPS[name])
    assert len(warned) == 1
    expected = features_of_seed(name)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert load_backbone(spec).left_out.absent == (head,)
    with pytest.raises(BackboneError, match=rf"logits.* depends on .*not in the file.*{head}"):
        features(spec, ["logits"])
    digest = load_backbone(spec).weights
    _load_cached.cache_clear()  # as in another process
    assert load_backbone(spec).weights == digest


@pytest.mark.slow
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "backbone.",
        "visual.",
        "student.",
        "teacher.",
        "encoder.",
        "model.",
        "module.backbone.",
        "_orig_mod.module.",
        "model.encoder_q.",
    ],
)
def test_prefixes_are_found(tmp_path: Path, prefix: str) -> None:
    """With a projection head beside, as self-supervised training has one."""
    state = {prefix + key: value for key, value in state_of(RESNET).items()}
    state = {
        key: value for key, value in state.items() if not key.endswith(("fc.weight", "fc.bias"))
    }
    state["projector.0.weight"] = torch.zeros(8, 8)
    save_file(state, tmp_path / "part.safetensors")
    with pytest.warns(WeightsWarning, match="projector.0.weight"):
        found = features(BackboneSpec(RESNET, str(tmp_path / "part.safetensors")), TAPS[RESNET])
    expected = features_of_seed(RESNET)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def test_of_student_and_teacher_the_teacher_is_taken(tmp_path: Path) -> None:
    """And said; the student where it is asked for. Nested or flat, as DINO and DINOv2 save them."""
    nested = {
        "student": under("module.backbone.", state_of(RESNET, 1)),
        "teacher": under("backbone.", state_of(RESNET, 2)),
        "epoch": 99,
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": []},
    }
    flat = under("student.backbone.", state_of(RESNET, 1)) | under(
        "teacher.backbone.", state_of(RESNET, 2)
    )
    teacher = features_of_seed(RESNET, 2)
    student = features_of_seed(RESNET)
    for number, content in enumerate((nested, flat)):
        file = saved(tmp_path / f"{number}.pth", content)
        with pytest.warns(WeightsWarning, match=r"taken from teacher\.backbone\.\*"):
            found = features(BackboneSpec(RESNET, file), TAPS[RESNET])
        torch.testing.assert_close(found, teacher, rtol=0, atol=0)
        asked = "student.module.backbone." if content is nested else "student.backbone."
        with pytest.warns(WeightsWarning, match="taken from student"):
            found = features(BackboneSpec(RESNET, file, weights_prefix=asked), TAPS[RESNET])
        torch.testing.assert_close(found, student, rtol=0, atol=0)


def test_two_copies_without_a_rule_are_refused(tmp_path: Path) -> None:
    """MoCo's query and key encoders; copies of the same values are one."""
    file = saved(
        tmp_path / "moco.pth",
        under("module.encoder_q.", state_of(RESNET, 1))
        | under("module.encoder_k.", state_of(RESNET, 2)),
    )
    with pytest.raises(
        BackboneError, match=r"2 copies .* differ.*'encoder_k\.', 'encoder_q\.'.*weights_prefix: '"
    ):
        load_backbone(BackboneSpec(RESNET, file))
    with pytest.warns(WeightsWarning, match=r"taken from encoder_q\.\*"):
        found = features(BackboneSpec(RESNET, file, weights_prefix="encoder_q."), TAPS[RESNET])
    expected = features_of_seed(RESNET)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(BackboneError, match=r"no tensor's name begins with .*'x\.'.* encoder_k"):
        load_backbone(BackboneSpec(RESNET, file, weights_prefix="x."))
    state = state_of(RESNET, 1)
    same = saved(tmp_path / "same.pth", under("net.", state) | under("net_copy.", state))
    with pytest.warns(WeightsWarning, match=r"taken from net\.\*"):
        features(BackboneSpec(RESNET, same), TAPS[RESNET])


def test_what_lies_below_a_tap_must_fit(tmp_path: Path) -> None:
    """A missing tensor, one of another shape, one too many inside a block: refused with its name;
    the taps below it are right.
    """
    whole = features(BackboneSpec(RESNET, "random:1"), ["layer2.avg"])
    state = state_of(RESNET)
    missing = {key: value for key, value in state.items() if key != "layer3.0.conv1.weight"}
    other_shape = {**state, "layer3.0.conv1.weight": torch.zeros(3, 3, 1, 1)}
    deeper = {**state, "layer3.1.conv1.weight": torch.zeros(3, 3, 1, 1)}
    for number, content in enumerate((missing, other_shape, deeper)):
        spec = BackboneSpec(RESNET, saved(tmp_path / f"{number}.pth", content))
        with pytest.raises(BackboneError, match=r"layer4\.avg depends on .*layer3\.[01]\.conv1"):
            features(spec, ["layer2.avg", "layer4.avg"])
        with pytest.warns(WeightsWarning, match=r"layer3\.[01]\.conv1\.weight"):
            found = features(spec, ["layer2.avg"])
        torch.testing.assert_close(found, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        # layer scale in the file, an identity in the network: every number would be another
        ("blocks.0.ls1.gamma", (64,), r"depends on .*in the file, and not in the network \(1\): b"),
        ("reg_token", (1, 4, 64), r"not in the network \(1\): reg_token(.|\n)*reg_tokens"),
        ("norm_pre.weight", (64,), r"depends on .*norm_pre\.weight"),
    ],
)
def test_tensors_that_the_network_has_no_place_for(
    tmp_path: Path, key: str, shape: tuple[int, ...], message: str
) -> None:
    spec = BackboneSpec(VIT, saved(tmp_path / "w.pth", {**state_of(VIT), key: torch.zeros(shape)}))
    with pytest.raises(BackboneError, match=message):
        features(spec, ["blocks.5.cls"])


def test_a_deeper_network_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Every tensor of ResNet-18 stands in a file of ResNet-34, with the same shape."""
    file = saved(tmp_path / "w.pth", state_of("timm:resnet34"))
    with pytest.raises(BackboneError, match=r"layer1\.avg depends on .*layer1\.2\.conv1"):
        features(BackboneSpec("timm:resnet18", file, image_size=32), ["layer1.avg"])


def test_positions_of_another_size_are_not_taken_for_nothing(tmp_path: Path) -> None:
    state = state_of(VIT)
    state["pos_embed"] = state["pos_embed"][:, :26]
    with pytest.raises(BackboneError, match=r"depends on .*pos_embed.*image_size"):
        features(BackboneSpec(VIT, saved(tmp_path / "w.pth", state)), ["blocks.5.cls"])


def test_blocks_in_chunks(tmp_path: Path) -> None:
    """As DINOv2's training saves its teacher: six blocks in chunks of two, with a head beside."""
    state = state_of(VIT)
    chunked = {
        re.sub(
            r"^blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) // 2}.{match[1]}", key
        ): value
        for key, value in state.items()
        if not key.startswith("head.")
    }
    content = under("teacher.backbone.", {**chunked, "mask_token": torch.zeros(1, 64)})
    content["teacher.dino_head.mlp.0.weight"] = torch.zeros(4, 4)
    with pytest.warns(WeightsWarning, match=r"mask_token.*dino_head"):
        found = features(BackboneSpec(VIT, saved(tmp_path / "w.pth", content)), TAPS[VIT])
    expected = features_of_seed(VIT)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_names_that_wrappers_change_inside(tmp_path: Path) -> None:
    """torch.compile of each block, and FSDP."""
    state = {
        key.replace("layer1.", "layer1._orig_mod.").replace(
            "layer2.", "layer2._fsdp_wrapped_module."
        ): value
        for key, value in state_of(RESNET).items()
    }
    found = features(BackboneSpec(RESNET, saved(tmp_path / "w.pth", state)), TAPS[RESNET])
    expected = features_of_seed(RESNET)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_the_weights_is_named_where_a_tap_depends_on_it(
    tmp_path: Path, value: float
) -> None:
    """A training that failed leaves it; in a head above the taps it is noted alone."""
    state = state_of(RESNET)
    state["layer4.0.conv1.weight"][0, 0] = value
    spec = BackboneSpec(RESNET, saved(tmp_path / "failed.pth", state))
    with pytest.raises(
        BackboneError,
        match=r"layer4\.avg depends on .* NaN or infinities \(1\): layer4\.0\.conv1\.weight\. .*earlier",
    ):
        features(spec, TAPS[RESNET])
    with pytest.warns(
        WeightsWarning, match=r"NaN or infinite in 1 of its tensors: layer4\.0\.conv1\.weight"
    ):
        found = features(spec, ["layer2.avg"])
    assert found[0].isfinite().all()


def test_tensors_of_a_trainer_beside_the_network_s_are_told_how_to_leave_out(
    tmp_path: Path,
) -> None:
    """A LightningModule that is the network has its metrics beside the layers, without a prefix."""
    file = saved(tmp_path / "x.ckpt", state_of(RESNET) | {"train_acc.confmat": torch.zeros(2, 2)})
    with pytest.raises(BackboneError, match=r"All tensors .* not name\.startswith\('train_acc'\)"):
        load_backbone(BackboneSpec(RESNET, file))
    with pytest.raises(BackboneError, match="it holds no tensor"):
        load_backbone(BackboneSpec(RESNET, saved(tmp_path / "empty.pth", {})))
