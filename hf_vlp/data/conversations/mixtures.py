"""Several data sets as one: balanced by the square root of their sizes, and annotated data as instructions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch.utils.data import Dataset

from ..hashing import stable_hash
from ..pairs import ImageTransform
from .datasets import conversation_record
from .families import family_named, instruction_messages


class InstructionDataset(Dataset):
    """Annotated rows as records of conversations of one turn, worded by a family of tasks.

    Args:
        rows: with `image` and what the family needs (`text`, `question`, `answers`, …), as `load_pairs` and
            `load_task` give them.
        family: a name of `FAMILIES`.
        seed: of the wordings, the drawn answers and the augmentation.
        transform: augmentation `(PIL image, seed) -> PIL image` of the images.

    Raises:
        ValueError: unknown family, or a first row without what it needs.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], family: str, *, seed: int = 0, transform: ImageTransform | None = None
    ) -> None:
        family_named(family)
        self.rows, self.family, self.seed, self.transform = rows, family, seed, transform
        # In shared memory, so that `set_epoch` in the main process reaches workers that live on between epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        if len(rows):
            instruction_messages(family, rows[0], seed=seed, epoch=0, index=0)

    @property
    def epoch(self) -> int:
        """The epoch whose wordings are drawn."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Chooses the wordings, answers and augmentation of another epoch."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.drawn(int(index) % len(self), self.epoch)

    def drawn(self, index: int, epoch: int) -> dict[str, Any]:
        """Record `index` as it is in `epoch`."""
        row = self.rows[index]
        made: dict[str, Any] = {"images": [row["image"]], "messages": [], "kind": self.family}
        made |= {name: row.get(name) for name in ("source", "key", "problem")}
        if not made["problem"]:
            try:
                made["messages"] = instruction_messages(self.family, row, seed=self.seed, epoch=epoch, index=index)
            except ValueError as error:
                made["problem"] = f"messages_wrong: {error}"
        return conversation_record(made, index, self.seed, epoch, self.transform)


class BalancedMixture(Dataset):
    """Several data sets as one, each drawn with a probability in proportion to a power of its size.

    InstructBLIP (section 2.4) takes the square root: large data sets are not read to the exclusion of small ones,
    and small ones not learned by heart. An epoch has `size` records; which data set each is from is drawn by
    (seed, epoch), and each data set is read through in a shuffled order before it is read again, over epochs as well.
    A data set with `drawn(index, epoch)`, such as `InstructionDataset`, gets the number of the reading as its epoch.

    Args:
        datasets: map-style data sets of records.
        power: 0.5 for the square root, 1 for the sizes themselves, 0 for equal shares.
        weights: factors of the shares, for data sets that are to be read more or less often than that.
        size: records of an epoch; the sum of the sizes if left out.
        seed: of the draws.

    Raises:
        ValueError: no data set, an empty one, or numbers out of range.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        *,
        power: float = 0.5,
        weights: Sequence[float] | None = None,
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        if not datasets or any(len(one) == 0 for one in datasets):
            raise ValueError("a mixture needs at least one data set, and a record in each")
        if power < 0:
            raise ValueError(f"power={power} must not be negative")
        factors = [1.0] * len(datasets) if weights is None else list(weights)
        if len(factors) != len(datasets) or min(factors) < 0 or sum(factors) <= 0:
            raise ValueError(
                f"weights={weights}: one for each of {len(datasets)} data sets, none negative, some not 0"
            )
        self.datasets, self.seed = list(datasets), seed
        shares = np.array([len(one) ** power * factor for one, factor in zip(datasets, factors, strict=True)])
        self.shares: list[float] = (shares / shares.sum()).tolist()
        self.size = sum(len(one) for one in datasets) if size is None else size
        if self.size < 1:
            raise ValueError(f"size={size}: at least one record an epoch")
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        # What was worked out last: sources and places of an epoch, the order of a reading of each data set.
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def epoch(self) -> int:
        """The epoch that is drawn."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Draws another epoch."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, place = self.place(int(index) % self.size)
        dataset = self.datasets[source]
        turn, position = divmod(place, len(dataset))
        record = int(self._order(source, turn)[position])
        if hasattr(dataset, "drawn"):
            return dataset.drawn(record, turn)
        return dataset[record]

    def place(self, index: int) -> tuple[int, int]:
        """The data set of a record of this epoch, and how many of that data set come before it since the start."""
        sources, places = self._plan(self.epoch)
        return int(sources[index]), int(places[index])

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._plans:
            before = np.zeros(len(self.datasets), dtype=np.int64)
            for earlier in range(epoch):
                before += np.bincount(self._sources(earlier), minlength=len(self.datasets))
            sources = self._sources(epoch)
            places = np.empty(self.size, dtype=np.int64)
            for source in range(len(self.datasets)):
                held = np.flatnonzero(sources == source)
                places[held] = before[source] + np.arange(len(held))
            self._plans = {epoch: (sources, places)}
        return self._plans[epoch]

    def _sources(self, epoch: int) -> np.ndarray:
        """The data set of each record of an epoch."""
        draws = Generator(Philox(key=stable_hash("mixture", self.seed, epoch)))
        return draws.choice(len(self.datasets), size=self.size, p=self.shares)

    def _order(self, source: int, turn: int) -> np.ndarray:
        """The order in which a data set is read for the time number `turn`."""
        held = self._orders.get(source)
        if held is None or held[0] != turn:
            draws = Generator(Philox(key=stable_hash("mixture order", self.seed, source, turn)))
            self._orders[source] = held = (turn, draws.permutation(len(self.datasets[source])))
        return held[1]
