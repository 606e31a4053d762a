"""The sigmoid loss: closed forms, a naive loop, tiles, the ring, and N ranks against one process."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_vlp.objectives.contrastive import sigmoid_loss
from hf_vlp.objectives.distributed import offset_of, world
from tests.distributed import run_ranks

IDS = torch.tensor([4, 4, 9, 1, 9, 9, 2, 4])
MODES: dict[str, dict[str, Any]] = {
    "gather": {},
    "tiles": {"tile_size": 3},
    "ring": {"exchange": "ring"},
    "ring_tiles": {"exchange": "ring", "tile_size": 2},
}


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def leaves(*tensors: Tensor | float) -> list[Tensor]:
    return [torch.as_tensor(tensor, dtype=torch.float64).clone().requires_grad_() for tensor in tensors]


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), (a, b)


def naive(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            match = i == j if ids is None else bool(ids[i] == ids[j])
            logit = scale * (image @ text) + bias
            total = total - torch.sigmoid(logit if match else -logit).log()
    return total / len(images)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_closed_forms(options: dict[str, Any]) -> None:
    flat = torch.zeros(6, 3)
    # Without knowledge each of the 6 pairs of an image costs ln 2.
    assert sigmoid_loss(flat, flat, 1.0, 0.0, **options).loss.item() == pytest.approx(6 * math.log(2), abs=1e-5)
    by_bias = math.log(1 + math.exp(2.0)) + 5 * math.log(1 + math.exp(-2.0))
    assert sigmoid_loss(flat, flat, 1.0, -2.0, **options).loss.item() == pytest.approx(by_bias, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 8),
    tile=st.integers(1, 9),
    ring=st.booleans(),
    with_ids=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_every_form_equals_the_naive_loop(count: int, tile: int, ring: bool, with_ids: bool, seed: int) -> None:
    tensors = leaves(unit(count, 4, seed=seed), unit(count, 4, seed=seed + 1), 8.0, -3.0)
    ids = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed)) if with_ids else None
    expected = naive(*tensors, ids)
    dense = sigmoid_loss(*tensors, image_ids=ids)
    tiled = sigmoid_loss(*tensors, image_ids=ids, tile_size=tile, exchange="ring" if ring else "gather")
    assert tiled.logits_per_image is None
    assert dense.loss_i2t is None
    assert_close([dense.loss, tiled.loss], [expected, expected])
    reference = torch.autograd.grad(expected, tensors)
    for loss in (dense.loss, tiled.loss * 1.0):
        assert_close(list(torch.autograd.grad(loss, tensors)), list(reference))


def test_logits() -> None:
    images, texts = unit(4, 3), unit(4, 3, seed=1)
    output = sigmoid_loss(images, texts, 2.0, -1.0)
    assert_close(
        [output.logits_per_image, output.logits_per_text], [2 * images @ texts.t() - 1, 2 * texts @ images.t() - 1]
    )


@pytest.mark.parametrize("tile_size", [None, 2])
def test_an_empty_batch_raises(tile_size: int | None) -> None:
    with pytest.raises(ValueError, match="empty on all ranks"):
        sigmoid_loss(torch.ones(0, 4), torch.ones(0, 4), 1.0, 0.0, tile_size=tile_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_embeds": torch.zeros(3, 4)}, "text_embeds"),
        ({"image_ids": torch.arange(3)}, "image_ids"),
        ({"exchange": "star"}, "exchange"),
        ({"tile_size": 0}, "tile_size"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"image_embeds": torch.ones(4, 4), "text_embeds": torch.ones(4, 4), "logit_scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(logit_bias=0.0, **arguments)


def on_this_rank(sizes: list[int]) -> dict[str, dict[str, Any]]:
    rank, size = world()
    own = slice(offset_of(sizes), offset_of(sizes) + sizes[rank])
    results = {}
    for mode, options in MODES.items():
        for ids in (None, IDS):
            tensors = leaves(unit(8, 5, seed=1)[own], unit(8, 5, seed=2)[own], 6.0, -2.0)
            output = sigmoid_loss(*tensors, image_ids=None if ids is None else ids[own], **options)
            # A factor that differs between ranks must reach the texts of other ranks as well.
            (output.loss * (1 if size == 1 else rank + 1)).backward()
            logits = output.logits_per_image, output.logits_per_text
            results[mode, ids is None] = {
                "loss": output.loss.detach(),
                "grads": [tensor.grad for tensor in tensors],
                "logits": [None if value is None else value.detach() for value in logits],
            }
    return results


@pytest.mark.parametrize("sizes", [[5, 3], [3, 0, 5]])
def test_ranks_equal_one_process(sizes: list[int]) -> None:
    ranks = run_ranks(on_this_rank, len(sizes), sizes)
    size = len(sizes)
    factors = torch.cat([torch.full((rows,), rank + 1.0) for rank, rows in enumerate(sizes)]).double()
    for mode in MODES:
        for ids in (None, IDS):
            found = [rank[mode, ids is None] for rank in ranks]
            tensors = leaves(unit(8, 5, seed=1), unit(8, 5, seed=2), 6.0, -2.0)
            loss = naive(*tensors, ids)
            images, texts, scale, bias = tensors
            logits = scale * images @ texts.t() + bias
            positives = torch.eye(8).bool() if ids is None else ids[:, None] == ids
            weighted = (F.softplus(torch.where(positives, -logits, logits)).sum(1) * factors).sum() / 8
            expected = torch.autograd.grad(weighted, tensors)
            assert_close([sum(f["loss"] for f in found) / size], [loss])
            for position in (0, 1):
                assert_close([torch.cat([f["grads"][position] for f in found]) / size], [expected[position]])
            for position in (2, 3):
                assert_close([sum(f["grads"][position] for f in found) / size], [expected[position]])
            if mode == "gather":
                assert_close([torch.cat([f["logits"][0] for f in found])], [logits])
                assert_close([torch.cat([f["logits"][1] for f in found])], [logits.t()])
