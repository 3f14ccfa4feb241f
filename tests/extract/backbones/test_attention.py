"""Attention by oneDNN: the same outputs as PyTorch's, and only where it is much faster."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headrace.extract.backbones import attention as attention_module
from headrace.extract.backbones.attention import attend, with_fast_attention
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.backbones.fused import can_fuse
from headrace.extract.spec import BackboneSpec
from headrace.extract.taps.forward import make_forward
from headrace.extract.taps.resolve import resolve_taps

pytestmark = pytest.mark.skipif(not can_fuse(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def heads(tokens: int, images: int = 2, n_heads: int = 3, width: int = 16) -> list[Tensor]:
    """Query, key and value as a network cuts them from one linear layer's output."""
    torch.manual_seed(0)
    return list(torch.randn(images, tokens, 3, n_heads, width).permute(2, 0, 3, 1, 4).unbind(0))


@pytest.mark.parametrize("tokens", [1, 50, 257])
@pytest.mark.parametrize("most", [2**21, 100])
def test_outputs_are_those_of_pytorch(
    tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the scores of a head are made in parts, and with fewer queries than keys."""
    monkeypatch.setattr(attention_module, "_MAX_SCORES", most)
    query, key, value = heads(tokens)
    for asked in (query, query[:, :, :1]):
        ours, theirs = (
            attend(asked, key, value, 0.3),
            scaled_dot_product_attention(asked, key, value, scale=0.3),
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (399, {}),
        (400, {"is_causal": True}),
        (400, {"dropout_p": 0.1}),
        (400, {"attn_mask": torch.ones(400, 400, dtype=torch.bool)}),
    ],
)
def test_other_kinds_of_attention_stay_pytorchs(tokens: int, options: dict) -> None:
    """Masked, causal, with dropout, of few tokens, grouped, in half precision, without heads."""
    query, key, value = heads(tokens)
    with mock.patch.object(attention_module, "attend", side_effect=AssertionError):
        assert attention_module._attend_if_served(query, key, value, **options) is None
        query, key, value = heads(400)
        for others in (
            (query, key[:, :1], value[:, :1]),
            (query.bfloat16(), key.bfloat16(), value.bfloat16()),
            (query[0], key[0], value[0]),
        ):
            assert attention_module._attend_if_served(*others) is None


@pytest.mark.parametrize(("gain", "n_calls"), [(1.2, 0), (1.3, 2)])
def test_it_is_used_where_it_is_much_faster(
    gain: float, n_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module._Trial, "gain", lambda _: gain)
    query, key, value = heads(400)

    def forward(pixels: Tensor) -> list[Tensor]:
        return [scaled_dot_product_attention(query * pixels.mean(), key, value)]

    chosen = with_fast_attention(forward, torch.ones(1))
    with mock.patch.object(attention_module, "attend", wraps=attend) as attended:
        for pixels in (torch.ones(1), torch.zeros(1)):
            torch.testing.assert_close(chosen(pixels), forward(pixels), rtol=1e-5, atol=1e-6)
    assert attended.call_count == n_calls


def test_a_transformer_has_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's, at a size with 401 tokens; and a network without attention is left as it is."""
    vit = load_backbone(BackboneSpec("timm:test_vit", "random:0", image_size=320))
    taps = resolve_taps(vit, ["blocks.1.avg", "norm.avg"])
    pixels = torch.randint(0, 256, (2, 320, 320, 3), dtype=torch.uint8)
    features = []
    for gain in (0.0, 2.0):
        monkeypatch.setattr(attention_module._Trial, "gain", lambda _, gain=gain: gain)
        forward = make_forward(vit, taps)
        with mock.patch.object(attention_module, "attend", wraps=attend) as attended:
            features.append(forward(pixels))
        assert (attended.call_count > 0) == (gain > 1)
    for ours, theirs in zip(*features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()

    def forward_without(pixels: Tensor) -> list[Tensor]:
        return [pixels * 2]

    assert with_fast_attention(forward_without, torch.ones(1)) is forward_without
