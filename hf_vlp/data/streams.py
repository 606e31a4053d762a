"""Rows that are read one after the other as records: shuffled, shared out, and resumable to the record."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from numpy.random import Generator, Philox
from torch.utils.data import IterableDataset, get_worker_info

from .hashing import stable_hash
from .pairs import ImageTransform, make_record
from .records import texts_of
from .tables import all_rows

_SHARD_BITS = 32


class PairIterableDataset(IterableDataset):
    """The streaming twin of `PairDataset`: the same records, in an order that is a function of (seed, epoch).

    Shards are read in an order drawn for the epoch, and records are shuffled inside blocks of `buffer_size`: a block
    is read, permuted, and given out. A position in the stream is therefore three numbers, and resuming there needs
    no stored buffer.

    A record's text and augmentation depend on (seed, epoch, shard, place in the shard), not on who reads it.

    Sharing out: rank r of `world_size` reads its part of the shards, or, if there are fewer shards than readers, every
    n-th record. Workers of a `DataLoader` that was given this dataset share the rank's part likewise. A dataset that
    wraps this one and does its own sharing reads the whole stream in each worker.

    Args:
        rows: a `datasets.IterableDataset` from `load_pairs(..., streaming=True)`, or any iterable of rows that can be
            read again (one shard).
        seed: seed of the order, the drawn texts and the augmentation.
        transform: augmentation `(PIL image, seed) -> PIL image`, as in `PairDataset`.
        all_texts: a record of every text, in order, instead of one drawn an epoch.
        shuffle: False gives the order of the source.
        buffer_size: records in a block; they are held undecoded.
        rank, world_size: of this process, if the stream is to be shared out over processes.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        seed: int = 0,
        transform: ImageTransform | None = None,
        all_texts: bool = False,
        shuffle: bool = True,
        buffer_size: int = 1_000,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if buffer_size < 1:
            raise ValueError(f"buffer_size={buffer_size}: at least one record")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not one of world_size={world_size} processes")
        if iter(rows) is rows:
            raise ValueError(
                "rows is an iterator, which can be read only once; give an iterable such as a datasets.IterableDataset"
            )
        self.rows, self.seed, self.transform = rows, seed, transform
        self.all_texts, self.shuffle, self.buffer_size = all_texts, shuffle, buffer_size
        self.rank, self.world_size = rank, world_size
        # In shared memory, so that `set_epoch` in the main process reaches workers that live on between epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._start: dict[str, int] | None = None
        self._state: dict[str, int] | None = None

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order, texts and augmentation of another epoch; a position set by `load_state_dict` for a
        different epoch is dropped."""
        self._epoch[0] = epoch
        self._state = None
        if self._start is not None and self._start["epoch"] != epoch:
            self._start = None

    def state_dict(self) -> dict[str, int]:
        """Where this process' iteration stands: after the last record that it gave out, and once all are given out,
        at the beginning of the next epoch.

        With workers each worker has its own position, which a loader that asks its workers for it can keep
        (torchdata's `StatefulDataLoader`); a plain `DataLoader` cannot.
        """
        if self._state is not None:
            return dict(self._state)
        return dict(self._start or self._position(self.epoch, 0, 0, 0, *self._reader()))

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration goes on where `state_dict` was taken, then reads on to the end of that epoch.

        Raises:
            ValueError: the state was taken with another seed, block size or number of readers, so that the order
                of the records would not be the same.
        """
        expected = self._position(0, 0, 0, 0, *self._reader())
        if set(state) != set(expected):
            raise ValueError(f"a stream's state has the entries {sorted(expected)}, not {sorted(state)}")
        for name in ("seed", "buffer_size", "shuffle", "shards", "world_size", "all_texts"):
            if state[name] != expected[name]:
                raise ValueError(
                    f"the state was taken with {name}={state[name]}, but the dataset has {name}={expected[name]}; "
                    f"resume with the settings of the first run"
                )
        self._epoch[0] = state["epoch"]
        self._start, self._state = dict(state), None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader, readers = self._reader()
        epoch = self.epoch
        start, self._start = self._start, None
        if start is None:
            start = self._position(epoch, 0, 0, 0, reader, readers)
        elif (start["reader"], start["readers"]) != (reader, readers):
            raise ValueError(
                f"the state was taken by reader {start['reader']} of {start['readers']}, this is reader {reader} of "
                f"{readers}; resume with the same number of processes and workers"
            )
        done = start["given"]
        for shard, offset, block in self._blocks(start["shard"], start["offset"], epoch, reader, readers):
            order: Iterable[int] = range(len(block))
            if self.shuffle:
                draws = Generator(Philox(key=stable_hash("block", self.seed, epoch, reader, readers, shard, offset)))
                order = draws.permutation(len(block)).tolist()
            for number, position in enumerate(order):
                if number < done:
                    continue
                # Before it is given out: the caller may stop for good on receiving the record.
                self._state = self._position(epoch, shard, offset, number + 1, reader, readers)
                index, text_index, row = block[position]
                name = f"{index >> _SHARD_BITS}:{index & ((1 << _SHARD_BITS) - 1)}"
                yield self._record(row, index, epoch, text_index, name)
            done = 0
        self._state = self._position(epoch + 1, 0, 0, 0, reader, readers)

    def _record(
        self, row: Mapping[str, Any], index: int, epoch: int, text_index: int | None, name: str
    ) -> dict[str, Any]:
        record = make_record(row, index, self.seed, epoch, self.transform, text_index, key=name)
        if self.all_texts:
            record.setdefault("image_id", name)
        return record

    def _count(self, row: Mapping[str, Any]) -> int:
        """How many records `all_texts` makes of a row."""
        return len(texts_of(row["text"]))

    def _blocks(
        self, shard: int, offset: int, epoch: int, reader: int, readers: int
    ) -> Iterator[tuple[int, int, list[tuple[int, int | None, Mapping[str, Any]]]]]:
        """Blocks of (index, text, row) from the given place on, each with the place at which it starts.

        A place is the number of shards of this reader that are done, and of records read of the next one. With
        `all_texts` a block is that many rows, whatever number of texts they have.
        """
        order, stride = self._plan(epoch, reader, readers)
        place, rows_held, block = (shard, offset), 0, []
        for turn in range(shard, len(order)):
            read = offset if turn == shard else 0
            for position, row in self._shard(order[turn], read):
                read = position + 1
                if stride > 1 and position % stride != reader:
                    continue
                index = (order[turn] << _SHARD_BITS) | position
                texts = range(max(1, self._count(row))) if self.all_texts else (None,)
                block.extend((index, text, row) for text in texts)
                rows_held += 1
                if rows_held == self.buffer_size:
                    yield (*place, block)
                    place, rows_held, block = (turn, read), 0, []
        if block:
            yield (*place, block)

    def _plan(self, epoch: int, reader: int, readers: int) -> tuple[list[int], int]:
        """The shards that a reader reads, in order, and the stride at which it takes their records."""
        shards = list(range(self._shards()))
        if self.shuffle:
            order = Generator(Philox(key=stable_hash("shards", self.seed, epoch))).permutation(len(shards))
            shards = order.tolist()
        if len(shards) >= readers:
            return shards[reader::readers], 1
        return shards, readers

    def _shards(self) -> int:
        return getattr(self.rows, "num_shards", 1)

    def _shard(self, number: int, skip: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(place in the shard, row) of the rows of a shard behind the first `skip`."""
        rows: Any = self.rows
        if self._shards() > 1:
            rows = rows.shard(num_shards=self._shards(), index=number)
        if skip and hasattr(rows, "skip"):
            return enumerate(all_rows(rows.skip(skip)), start=skip)
        return ((position, row) for position, row in enumerate(all_rows(rows)) if position >= skip)

    def _reader(self) -> tuple[int, int]:
        """This reader's number and how many there are: processes, times workers where they share this dataset."""
        worker = get_worker_info()
        if worker is None or worker.dataset is not self:
            return self.rank, self.world_size
        return self.rank * worker.num_workers + worker.id, self.world_size * worker.num_workers

    def _position(self, epoch: int, shard: int, offset: int, given: int, reader: int, readers: int) -> dict[str, int]:
        return {
            "epoch": epoch,
            "shard": shard,
            "offset": offset,
            "given": given,
            "reader": reader,
            "readers": readers,
            "seed": self.seed,
            "buffer_size": self.buffer_size,
            "shuffle": int(self.shuffle),
            "all_texts": int(self.all_texts),
            "shards": self._shards(),
            "world_size": self.world_size,
        }
