"""The order of conversations: like lengths together, the same on any number of processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vlp.data.conversations import ConversationDataset, length_grouped_order
from hf_vlp.training.batching import GlobalBatchSampler, part_of

from .conversations import record


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=80),
    per_rank=st.integers(1, 4),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_an_order_is_a_permutation_whose_batches_do_not_depend_on_the_ranks(lengths, per_rank, world_size, epoch):
    batch_size = per_rank * world_size
    order = length_grouped_order(lengths, batch_size, epoch=epoch, world_size=world_size)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    alone = length_grouped_order(lengths, batch_size, epoch=epoch)
    for start in range(0, len(lengths), batch_size):
        assert sorted(order[start : start + batch_size]) == sorted(alone[start : start + batch_size])


def test_batches_hold_like_lengths_and_one_group():
    draws = np.random.default_rng(0)
    lengths, groups = draws.integers(1, 500, 2_000).tolist(), draws.integers(0, 2, 2_000).tolist()
    order = length_grouped_order(lengths, 16, groups=groups)

    def padding(numbers):
        batches = [[lengths[number] for number in numbers[start : start + 16]] for start in range(0, 2_000, 16)]
        return 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)

    assert padding(order) < 0.05 < 0.4 < padding(draws.permutation(2_000))
    mixed = sum(len({groups[number] for number in order[start : start + 16]}) > 1 for start in range(0, 2_000, 16))
    assert mixed <= 2
    assert not np.array_equal(order, length_grouped_order(lengths, 16, groups=groups, epoch=1))
    assert np.array_equal(order, length_grouped_order(lengths, 16, groups=groups))
    with pytest.raises(ValueError, match="3 groups for 2 lengths"):
        length_grouped_order([1, 2], 1, groups=[0, 0, 0])


def test_processes_get_like_loads():
    lengths = np.random.default_rng(1).integers(1, 1_000, 640).tolist()
    order = length_grouped_order(lengths, 32, world_size=4, window=1)
    for start in range(0, 640, 32):
        batch = order[start : start + 32]
        loads = [sum(lengths[number] for number in batch[part_of(32, rank, 4)]) for rank in range(4)]
        assert max(loads) / min(loads) < 1.15


def test_the_sampler_asks_the_dataset_for_its_order():
    rows = [record("Q", "word " * (1 + number % 7), images=(), key=str(number)) for number in range(40)]
    dataset = ConversationDataset(rows, group_by_length=True, seed=5)
    whole = GlobalBatchSampler(40, 8, dataset=dataset)
    parts = [GlobalBatchSampler(40, 4, rank=rank, world_size=2, dataset=dataset) for rank in range(2)]
    for epoch in range(2):
        for sampler in (whole, *parts):
            sampler.set_epoch(epoch)
        for batch, first, second in zip(whole, *parts, strict=True):
            assert sorted(batch) == sorted(first + second)
            assert len({number % 7 for number in batch}) <= 3
    assert ConversationDataset(rows).epoch_order(0, 8, 1) is None
