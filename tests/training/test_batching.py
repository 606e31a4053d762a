import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from hf_vlp.data import PairIterableDataset
from hf_vlp.training.batching import (
    STREAM_POSITION,
    GlobalBatchSampler,
    GlobalStream,
    StreamCollator,
    data_loader,
    part_of,
)


def joined(length, batch_size, world_size, epoch=0, **options):
    """The batches of all ranks, put together step by step."""
    samplers = [
        GlobalBatchSampler(length, batch_size, rank=rank, world_size=world_size, seed=5, **options)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    assert len({len(sampler) for sampler in samplers}) == 1
    steps = list(zip(*samplers, strict=True))
    assert all(len(sampler) == len(steps) for sampler in samplers)
    return [[index for part in step for index in part] for step in steps]


@pytest.mark.parametrize("length", [24, 25, 29, 31])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(length, world_size):
    one = GlobalBatchSampler(length, 4 * world_size, seed=5)
    for epoch in range(3):
        one.set_epoch(epoch)
        expected = [batch for batch in one if len(batch) >= world_size]
        assert joined(length, 4, world_size, epoch) == expected


def test_parts_are_contiguous_and_even():
    for count in range(20):
        for world_size in range(1, 5):
            parts = [part_of(count, rank, world_size) for rank in range(world_size)]
            sizes = [part.stop - part.start for part in parts]
            assert [i for part in parts for i in range(count)[part]] == list(range(count))
            assert max(sizes) - min(sizes) <= 1


def test_each_epoch_has_every_record_once_in_another_order():
    sampler = GlobalBatchSampler(23, 4, seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append([index for batch in sampler for index in batch])
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    sampler.set_epoch(1)
    assert [index for batch in sampler for index in batch] == orders[1]


def test_drop_last_and_order():
    assert [len(batch) for batch in GlobalBatchSampler(10, 4, drop_last=True)] == [4, 4]
    assert list(GlobalBatchSampler(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_a_tail_smaller_than_the_ranks_is_left_out():
    assert joined(13, 2, 3, shuffle=False) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = data_loader(
        list(range(10)), torch.tensor, batch_size=3, rank=0, world_size=1, shuffle=True, seed=0, drop_last=False
    )
    assert sorted(torch.cat(list(loader)).tolist()) == list(range(10))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (3, {"world_size": 4}, "3 records do not fill one batch"),
        (7, {"drop_last": True}, "dataloader_drop_last"),
        (0, {}, "0 records"),
    ],
)
def test_fewer_records_than_a_batch(length, options, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(length, 8, **options)


def test_batch_size_below_one():
    with pytest.raises(ValueError, match="at least 1"):
        GlobalBatchSampler(8, 0)


class Rows(IterableDataset):
    """A finite stream without a position of its own."""

    def __init__(self, count):
        self.count = count
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return ((self.epoch, index) for index in range(self.count))


def take(stream, count, workers=0):
    loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=StreamCollator(_as_dict))
    found = []
    for batch in loader:
        found.append((batch["rows"], batch[STREAM_POSITION]))
        if len(found) == count:
            break
    return found


def _as_dict(rows):
    return {"rows": rows}


def test_stream_gives_the_batches_of_one_process_to_ranks():
    one = [rows for rows, _ in take(GlobalStream(Rows(11), 4), 99)]
    assert [len(batch) for batch in one] == [4, 4, 3]
    ranks = [[rows for rows, _ in take(GlobalStream(Rows(11), 2, rank=r, world_size=2), 99)] for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one


def test_endless_stream_goes_on_with_the_next_epoch():
    batches = [rows for rows, _ in take(GlobalStream(Rows(5), 2, endless=True), 5)]
    assert batches == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)], [(1, 0), (1, 1)], [(1, 2), (1, 3)]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_stream_goes_on_from_any_position(workers, stop):
    def rows():
        return PairIterableDataset(
            [{"image": b"", "text": ["a", "b"], "key": str(i)} for i in range(9)], buffer_size=4
        )

    def names(batches):
        return [[(row["key"], row["text"]) for row in batch] for batch, _ in batches]

    whole = take(GlobalStream(rows(), 2, endless=True), 12)
    position = take(GlobalStream(rows(), 2, endless=True), stop)[-1][1]
    rest = take(GlobalStream(rows(), 2, endless=True, start=position), 12 - stop, workers)
    assert names(rest) == names(whole[stop:])


def test_stream_without_a_position_of_its_own_is_read_again():
    whole = [rows for rows, _ in take(GlobalStream(Rows(5), 2, endless=True), 8)]
    position = take(GlobalStream(Rows(5), 2, endless=True), 4)[-1][1]
    assert [rows for rows, _ in take(GlobalStream(Rows(5), 2, endless=True, start=position), 4)] == whole[4:]


def test_endless_stream_that_is_too_short_raises():
    with pytest.raises(ValueError, match="fewer than 4 rows"):
        take(GlobalStream(Rows(3), 1, world_size=4, endless=True), 1)
