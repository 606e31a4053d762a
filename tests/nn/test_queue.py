"""The feature queue: wrap-around, checkpoints, ranks, and its use by the contrastive loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_vlp.nn.queue import NO_ID, FeatureQueue
from hf_vlp.objectives.contrastive import contrastive_loss
from hf_vlp.objectives.distributed import offset_of, world
from tests.distributed import run_ranks


def pairs(start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Recognisable features: row k of the stream holds k."""
    number = torch.arange(start, start + count)
    return number[:, None].float().expand(count, 2), -number[:, None].float().expand(count, 2), number + 1000


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 7), batches=st.lists(st.integers(0, 16), max_size=6))
def test_holds_the_latest_pairs_whatever_the_batches(size: int, batches: list[int]) -> None:
    queue = FeatureQueue(size, 2, with_ids=True)
    total = 0
    for count in batches:
        queue.enqueue(*pairs(total, count))
        total += count
    latest = list(range(max(0, total - size), total))
    assert len(queue) == len(latest)
    assert sorted(queue.image_embeds[:, 0].tolist()) == latest
    assert torch.equal(queue.text_embeds, -queue.image_embeds)
    assert torch.equal(queue.image_ids, queue.image_embeds[:, 0].long() + 1000)
    assert queue.position.item() == total % size
    # The next one to go is the oldest.
    if total >= size:
        assert queue.images[queue.position, 0].item() == latest[0]


def test_random_start() -> None:
    one, same = (FeatureQueue(50, 8, with_ids=True, start="random", seed=3) for _ in range(2))
    assert len(one) == 50
    assert torch.equal(one.image_embeds, same.image_embeds)
    assert not torch.equal(one.image_embeds, one.text_embeds)
    assert torch.allclose(one.text_embeds.norm(dim=-1), torch.ones(50))
    assert (one.image_ids == NO_ID).all()
    one.enqueue(torch.ones(3, 8), torch.ones(3, 8), torch.arange(3))
    assert (one.images[:3] == 1).all()
    assert torch.equal(one.images[3:], same.images[3:])
    one.reset()
    assert torch.equal(one.image_embeds, same.image_embeds)


def test_a_checkpoint_holds_the_whole_state() -> None:
    queue = FeatureQueue(5, 2, with_ids=True)
    queue.enqueue(*pairs(0, 7))
    assert set(queue.state_dict()) == {"images", "texts", "ids", "position", "filled"}
    resumed = FeatureQueue(5, 2, with_ids=True)
    resumed.load_state_dict(queue.state_dict())
    for each in (queue, resumed):
        each.enqueue(*pairs(7, 2))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_the_queue_may_be_written_before_the_backward() -> None:
    queue = FeatureQueue(4, 3)
    queue.enqueue(F.normalize(torch.randn(4, 3), dim=-1), F.normalize(torch.randn(4, 3), dim=-1))
    for tile_size in (None, 2):
        images, texts = (F.normalize(torch.randn(3, 3), dim=-1).requires_grad_() for _ in range(2))
        expected = torch.autograd.grad(
            contrastive_loss(images, texts, 2.0, queue=queue, tile_size=tile_size).loss, images
        )[0]
        loss = contrastive_loss(images, texts, 2.0, queue=queue, tile_size=tile_size).loss
        queue.enqueue(images, texts)
        assert torch.equal(torch.autograd.grad(loss, images)[0], expected)


def test_query_features() -> None:
    queue = FeatureQueue(4, 3, queries=2)
    queue.enqueue(torch.ones(3, 2, 3), torch.ones(3, 3))
    assert queue.image_embeds.shape == (3, 2, 3)
    assert queue.image_ids is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 4), torch.ones(2, 3), torch.arange(2)), "the queue holds images"),
        ((torch.ones(2, 3), torch.ones(1, 3), torch.arange(2)), "one row a pair"),
        ((torch.ones(2, 3), torch.ones(2, 3)), "give `image_ids`"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureQueue(4, 3, with_ids=True).enqueue(*arguments)
    with pytest.raises(ValueError, match="keeps none"):
        FeatureQueue(4, 3).enqueue(torch.ones(2, 3), torch.ones(2, 3), torch.arange(2))
    with pytest.raises(ValueError, match="size"):
        FeatureQueue(0, 3)
    with pytest.raises(ValueError, match="start"):
        FeatureQueue(3, 3, start="full")


def on_this_rank(sizes: list[int]) -> dict[str, Any]:
    queue = FeatureQueue(6, 2, with_ids=True)
    for step in range(3):
        images, texts, ids = pairs(8 * step, 8)
        own = slice(offset_of(sizes), offset_of(sizes) + sizes[world()[0]])
        queue.enqueue(images[own], texts[own], ids[own])
    return queue.state_dict()


def test_ranks_hold_the_queue_of_one_process() -> None:
    sizes = [3, 0, 5]
    single = on_this_rank([8])
    for state in run_ranks(on_this_rank, 3, sizes):
        for name, value in single.items():
            assert torch.equal(state[name], value)
