"""Which records make up which batch: a function of (seed, epoch, number of records) alone.

The batch of a step is defined over all ranks; each rank takes a contiguous part of it, in rank order. So N ranks with
batch `b` see, step by step, the records of one process with batch `N * b`, and a resumed run those of an unbroken one.
Nothing here draws from the global random generators.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from hf_vlp.data.hashing import stable_hash

STREAM_POSITION = "stream_position"


def part_of(count: int, rank: int, world_size: int) -> slice:
    """The rows of a batch of `count` that `rank` takes: contiguous, in rank order, sizes at most one apart."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


class GlobalBatchSampler(Sampler[list[int]]):
    """This rank's part of each global batch of a map-style dataset.

    Args:
        length: number of records.
        batch_size: records a rank and step.
        rank, world_size: of this process.
        shuffle: draw the order anew in each epoch; else the order of the dataset.
        seed: of the order.
        drop_last: leave out a last batch that is smaller than the others. A last batch with fewer records than there
            are ranks is always left out, since a rank without a record has nothing to compute.
        dataset: told of each new epoch through its `set_epoch`, if it has one; asked for its own order by
            `epoch_order(epoch, global_batch_size, world_size)`, if it has that.

    Raises:
        ValueError: a number is not positive, or the records do not make up one batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        dataset: Any = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, not {batch_size}")
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.dataset = dataset
        self.epoch = 0
        if len(self) == 0:
            raise ValueError(
                f"{length} records do not fill one batch of {self.global_batch_size} "
                f"({batch_size} a process, {world_size} processes"
                + (", --dataloader_drop_last" if drop_last else "")
                + "); lower --per_device_train_batch_size or give more data"
            )

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    @property
    def batch_sampler(self) -> "GlobalBatchSampler":
        """Itself: `Trainer` looks for the sampler to tell of a new epoch one level below a loader's batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Fixes the order of the records and tells the dataset of the epoch."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.global_batch_size)
        return full + int(not self.drop_last and rest >= self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for step in range(len(self)):
            batch = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
            yield batch[part_of(len(batch), self.rank, self.world_size)].tolist()

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        # A dataset may know better which of its records go together, for instance those of like length.
        if hasattr(self.dataset, "epoch_order"):
            order = self.dataset.epoch_order(self.epoch, self.global_batch_size, self.world_size)
            if order is not None:
                return order
        generator = torch.Generator().manual_seed(stable_hash(self.seed, "order", self.epoch))
        return torch.randperm(self.length, generator=generator)


@dataclass
class StreamBatch:
    """Rows of a rank's part of a global batch, and where the stream stands behind the whole batch."""

    rows: list[Any]
    position: dict[str, Any]


class StreamCollator:
    """Collates a `StreamBatch` and sends its position along under `STREAM_POSITION`."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, batch: StreamBatch) -> dict[str, Any]:
        return {**self.collator(batch.rows), STREAM_POSITION: batch.position}


class GlobalStream(IterableDataset):
    """This rank's part of each global batch of a streamed dataset.

    Every rank (and every worker) reads the whole stream and keeps its part, which costs reading (not decoding: that
    happens in the collator) but keeps N ranks equal to one process. A batch ends with its epoch; a last batch with
    fewer rows than ranks is left out.

    Args:
        dataset: iterable of rows. `set_epoch` is called on it when it has it; with `state_dict` and `load_state_dict`
            a resumed run goes on where it stopped without reading what it has read.
        batch_size: rows a rank and step.
        rank, world_size: of this process.
        drop_last: leave out a last batch that is smaller than the others.
        endless: begin the next epoch when one is over.
        start: position from which to go on, from an earlier `StreamBatch`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        endless: bool = False,
        start: dict[str, Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.endless = endless
        self.start = start or {"batches": 0, "epoch": 0, "batches_of_epoch": 0, "stream": None}

    def __iter__(self) -> Iterator[StreamBatch]:
        worker = torch.utils.data.get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        first = count = self.start["batches"]
        for epoch in itertools.count(self.start["epoch"]):
            of_epoch = 0
            for rows, position in self._batches_of_epoch(epoch):
                of_epoch += 1
                # A loader asks its workers in turn, so batch `first + i` is for worker `i` modulo their number.
                if (count - first) % workers == own:
                    part = rows[part_of(len(rows), self.rank, self.world_size)]
                    yield StreamBatch(part, {**position, "batches": count + 1})
                count += 1
            if not self.endless:
                return
            if of_epoch == 0 and epoch > self.start["epoch"]:
                raise ValueError(
                    f"the stream has fewer than {self.world_size} rows an epoch"
                    + (f", or not the {self.batch_size * self.world_size} of a batch" if self.drop_last else "")
                    + "; lower --per_device_train_batch_size or give more data"
                )

    def _batches_of_epoch(self, epoch: int) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        """Global batches of an epoch, each with the position behind it."""
        resumed = epoch == self.start["epoch"]
        skip = self.start["batches_of_epoch"] if resumed else 0
        if resumed and self.start["stream"] is not None:
            self.dataset.load_state_dict(self.start["stream"])
        elif hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        done = skip if resumed and self.start["stream"] is not None else 0
        size = self.batch_size * self.world_size
        batch: list[Any] = []
        for row in self.dataset:
            batch.append(row)
            if len(batch) == size:
                done += 1
                if done > skip:
                    yield batch, self._position(epoch, done)
                batch = []
        if len(batch) >= self.world_size and not self.drop_last and done >= skip:
            yield batch, {"epoch": epoch + 1, "batches_of_epoch": 0, "stream": None}

    def _position(self, epoch: int, done: int) -> dict[str, Any]:
        state = self.dataset.state_dict() if hasattr(self.dataset, "load_state_dict") else None
        return {"epoch": epoch, "batches_of_epoch": done, "stream": state}


def streams(dataset: Any) -> bool:
    """Whether a dataset is read one row after the other instead of by index."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")


def data_loader(
    dataset: Dataset | IterableDataset,
    collator: Any,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    stream_start: dict[str, Any] | None = None,
    **options: Any,
) -> DataLoader:
    """A loader of this rank's parts of the global batches; `options` go to `DataLoader`.

    A stream is endless if `shuffle` (training), and starts at `stream_start`.

    The loader has its own generator, so that making an iterator (which draws a seed for the workers) leaves the global
    generators alone.
    """
    options["generator"] = torch.Generator().manual_seed(stable_hash(seed, "workers"))
    if streams(dataset):
        stream = GlobalStream(
            dataset,
            batch_size,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            endless=shuffle,
            start=stream_start,
        )
        return DataLoader(stream, batch_size=None, collate_fn=StreamCollator(collator), **options)
    sampler = GlobalBatchSampler(
        len(dataset),
        batch_size,
        rank=rank,
        world_size=world_size,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
        dataset=dataset,
    )
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, **options)
