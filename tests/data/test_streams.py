"""The order of a stream is a function of (seed, epoch); it can be left and re-entered at any record."""

from collections import Counter
from collections.abc import Iterator

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchStream

from hf_vlp.data import ImageTextCollator, PairIterableDataset, TrainTransform, load_pairs
from tests.data.fakes import TinyProcessor

ROWS = [
    {"image": f"{number}.png", "text": [f"{number}.{text}" for text in range(3)], "source": "set", "key": str(number)}
    for number in range(103)
]


def stream(shards: int = 4, **options) -> PairIterableDataset:
    rows = Dataset.from_list(ROWS).to_iterable_dataset(num_shards=shards)
    return PairIterableDataset(rows, **{"buffer_size": 10, **options})


def keys(records) -> list[int]:
    return [int(record["key"]) for record in records]


def test_every_row_comes_once_in_an_order_of_its_epoch() -> None:
    dataset = stream()
    orders = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        orders.append(keys(dataset))
        assert sorted(orders[-1]) == list(range(103))
    assert len(set(map(tuple, orders))) == 3
    dataset.set_epoch(1)
    assert keys(dataset) == orders[1] == keys(dataset)
    assert keys(stream(seed=1)) != orders[0]


def test_without_shuffling_the_order_is_the_sources() -> None:
    assert keys(stream(shuffle=False)) == list(range(103))


def test_texts_are_those_of_the_place_in_the_source() -> None:
    """Neither the shuffling nor the readers change what a record becomes in an epoch."""
    whole = {record["key"]: record["text"] for record in stream()}
    plain = {record["key"]: record["text"] for record in stream(shuffle=False)}
    parts = {record["key"]: record["text"] for rank in range(2) for record in stream(rank=rank, world_size=2)}
    assert whole == plain == parts
    seen = Counter()
    dataset = stream()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen.update(record["text"] for record in dataset)
    assert len(seen) == 309


def test_all_texts() -> None:
    records = list(stream(shuffle=False, all_texts=True))
    assert [record["text"] for record in records] == [text for row in ROWS for text in row["text"]]
    assert len({record["image_id"] for record in records}) == 103
    assert sorted(record["text"] for record in stream(all_texts=True)) == sorted(record["text"] for record in records)


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0), (2, 2)])
def test_readers_share_without_overlap(shards: int, world: int, workers: int) -> None:
    read = []
    for rank in range(world):
        loader = DataLoader(
            stream(shards, rank=rank, world_size=world), batch_size=None, num_workers=workers, collate_fn=lambda r: r
        )
        read += keys(loader)
    assert sorted(read) == list(range(103))


class Whole(TorchStream):
    """A dataset around the stream that shares it out among the workers itself."""

    def __init__(self, inner: PairIterableDataset) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[dict]:
        yield from self.inner


def test_a_wrapper_reads_the_whole_stream_in_each_worker() -> None:
    loader = DataLoader(Whole(stream()), batch_size=None, num_workers=2, collate_fn=lambda record: record)
    assert Counter(keys(loader)) == Counter(list(range(103)) * 2)


@settings(max_examples=40, deadline=None)
@given(
    stop=st.integers(0, 103),
    epoch=st.integers(0, 3),
    shards=st.sampled_from([1, 4]),
    all_texts=st.booleans(),
    rank=st.sampled_from([(0, 1), (1, 3)]),
)
def test_resuming_gives_the_rest(stop: int, epoch: int, shards: int, all_texts: bool, rank: tuple[int, int]) -> None:
    options = {"seed": 9, "all_texts": all_texts, "rank": rank[0], "world_size": rank[1]}
    dataset = stream(shards, **options)
    dataset.set_epoch(epoch)
    whole = [(record["key"], record["text"], record["seed"]) for record in dataset]
    dataset.set_epoch(epoch)
    position = dataset.state_dict()
    for number, _ in enumerate(dataset):
        if number == stop:
            break
        position = dataset.state_dict()
    stop = min(stop, len(whole))
    resumed = stream(shards, **options)
    resumed.load_state_dict(position)
    assert resumed.state_dict() == position
    assert [(record["key"], record["text"], record["seed"]) for record in resumed] == whole[stop:]
    # Once resumed, the epochs that follow are those of the unbroken run.
    resumed.set_epoch(epoch + 1)
    dataset.set_epoch(epoch + 1)
    assert keys(resumed) == keys(dataset)


def test_after_the_end_the_position_is_the_next_epochs_beginning() -> None:
    dataset = stream()
    list(dataset)
    resumed = stream()
    resumed.load_state_dict(dataset.state_dict())
    assert resumed.epoch == 1
    dataset.set_epoch(1)
    assert keys(resumed) == keys(dataset)


def test_resuming_reads_no_block_before_the_position() -> None:
    read = []

    def rows() -> Iterator[dict]:
        raise AssertionError

    class Watched(list):
        def skip(self, count: int) -> list:
            return Watched(self[count:])

        def __iter__(self) -> Iterator[dict]:
            for row in super().__iter__():
                read.append(row["key"])
                yield row

    dataset = PairIterableDataset(Watched(ROWS), buffer_size=10)
    for number, _ in enumerate(dataset):
        if number == 54:
            break
    position = dataset.state_dict()
    read.clear()
    resumed = PairIterableDataset(Watched(ROWS), buffer_size=10)
    resumed.load_state_dict(position)
    list(resumed)
    assert read == [row["key"] for row in ROWS[50:]]


def test_positions_of_another_run_are_refused() -> None:
    position = stream().state_dict()
    for options, named in (
        ({"seed": 3}, "seed=0.*seed=3"),
        ({"buffer_size": 11}, "buffer_size"),
        ({"world_size": 2}, "world_size"),
        ({"shuffle": False}, "shuffle"),
        ({"shards": 5}, "shards"),
    ):
        with pytest.raises(ValueError, match=named):
            stream(**options).load_state_dict(position)
    with pytest.raises(ValueError, match="entries"):
        stream().load_state_dict({"epoch": 0})
    other = stream(world_size=2, rank=1)
    other.load_state_dict(stream(world_size=2, rank=0).state_dict())
    with pytest.raises(ValueError, match="reader 0 of 2.*reader 1"):
        next(iter(other))


def test_wrong_arguments_are_named() -> None:
    for options, named in (({"buffer_size": 0}, "buffer_size"), ({"rank": 2, "world_size": 2}, "rank=2")):
        with pytest.raises(ValueError, match=named):
            stream(**options)
    with pytest.raises(ValueError, match="only once"):
        PairIterableDataset(iter(ROWS))


def test_shapes_stream_into_batches() -> None:
    rows = load_pairs("shapes", size=1500, streaming=True)
    dataset = PairIterableDataset(rows, transform=TrainTransform(8), buffer_size=64)
    collator = ImageTextCollator(TinyProcessor())
    seen = 0
    for batch in DataLoader(dataset, batch_size=100, num_workers=2, collate_fn=collator):
        seen += len(collator.collect(batch)["pixel_values"])
    assert seen == 1500 == collator.report.good
