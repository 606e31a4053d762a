"""Units cover every row once, whoever reads them, and are the same for any number of processes."""

import pytest
from datasets import Dataset, IterableDataset

from hf_vlp.bootstrapping import Source
from hf_vlp.data import load_pairs


def numbered(start: int, stop: int):
    for number in range(start, stop):
        yield {"key": str(number), "text": [f"text {number}"]}


def ranges(bounds: list[tuple[int, int]]):
    for start, stop in bounds:
        yield from numbered(start, stop)


def sharded(*bounds: tuple[int, int]) -> IterableDataset:
    return IterableDataset.from_generator(ranges, gen_kwargs={"bounds": list(bounds)})


SOURCES = {
    "list": lambda: list(numbered(0, 23)),
    "indexed": lambda: Dataset.from_list(list(numbered(0, 23))),
    "stream": lambda: sharded((0, 23)),
    "shards": lambda: sharded((0, 9), (9, 10), (10, 18), (18, 23)),
    "full": lambda: sharded((0, 10), (10, 20)),
    "empty shard": lambda: sharded((0, 7), (7, 7), (7, 14)),
    "empty": lambda: [],
}


def never(name: object) -> bool:
    return False


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_each_row_is_read_once_in_the_same_unit(kind: str, world_size: int):
    alone = {str(unit.name): unit for unit in Source(SOURCES[kind]()).units(5, 0, 1, never)}
    shared: dict = {}
    for rank in range(world_size):
        for unit in Source(SOURCES[kind]()).units(5, rank, world_size, never):
            assert str(unit.name) not in shared
            shared[str(unit.name)] = unit
    assert shared == alone
    keys = sorted(int(row["key"]) for unit in shared.values() for row in unit.rows)
    assert keys == list(range(len(list(SOURCES[kind]()))))
    # The last unit of every shard says so, and only that one.
    ends = [unit.name.shard for unit in shared.values() if unit.last]
    assert sorted(ends) == sorted({unit.name.shard for unit in shared.values()})


@pytest.mark.parametrize("kind", ["list", "stream", "shards", "full"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_done_is_not_given_again(kind: str, world_size: int):
    units = list(Source(SOURCES[kind]()).units(4, 0, 1, never))
    done = {str(unit.name) for unit in units[::2]} | {str(units[0].name), str(units[1].name)}
    left = []
    for rank in range(world_size):
        left += Source(SOURCES[kind]()).units(4, rank, world_size, lambda name: str(name) in done)
    assert sorted(str(unit.name) for unit in left) == sorted(str(u.name) for u in units if str(u.name) not in done)
    by_name = {str(unit.name): unit for unit in units}
    assert all(unit == by_name[str(unit.name)] for unit in left)


def test_a_stream_and_a_table_of_one_shard_have_the_same_units():
    table = list(Source(load_pairs("shapes", size=17)).units(5, 0, 1, never))
    stream = list(Source(load_pairs("shapes", size=17, streaming=True)).units(5, 0, 1, never))
    assert [(u.name, u.start, u.last) for u in table] == [(u.name, u.start, u.last) for u in stream]
    assert [row["text"] for unit in table for row in unit.rows] == [r["text"] for u in stream for r in u.rows]


def test_what_is_no_source():
    with pytest.raises(ValueError, match="'web' or 'human'"):
        Source([], "synthetic")
    with pytest.raises(TypeError, match="generator"):
        Source(numbered(0, 3))
