"""Rows of conversations as records for training: what is random about each is fixed by (seed, epoch, index)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..hashing import record_seed
from ..pairs import ImageTransform
from ..streams import PairIterableDataset
from .lengths import conversation_lengths, length_grouped_order

_COLUMNS = ("images", "messages")


class ConversationDataset(Dataset):
    """A map-style dataset of the records of conversations.

    A record is the row with `source`, `key`, `index`, `seed` and `transform`.

    Args:
        rows: a `datasets.Dataset` from `load_conversations`, or any sequence of such rows.
        seed: of the augmentation.
        transform: augmentation `(PIL image, seed) -> PIL image` of the images.
        group_by_length: let batches hold conversations of like length, those with pictures apart from those without;
            for padded batches, since packed ones have no padding to save.
        image_tokens: tokens that a picture counts for in a length.

    Raises:
        ValueError: `rows` has no `images` or no `messages`.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        seed: int = 0,
        transform: ImageTransform | None = None,
        group_by_length: bool = False,
        image_tokens: int = 0,
    ) -> None:
        _check_columns(getattr(rows, "column_names", None))
        self.rows, self.seed, self.transform = rows, seed, transform
        # In shared memory, so that `set_epoch` in the main process reaches workers that live on between epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._lengths = conversation_lengths(rows, image_tokens=image_tokens) if group_by_length else None

    def epoch_order(self, epoch: int, global_batch_size: int, world_size: int) -> torch.Tensor | None:
        """The order in which an epoch reads the records; None leaves it to the loader.

        Args:
            global_batch_size: records of a batch over all processes.
            world_size: processes.
        """
        if self._lengths is None:
            return None
        lengths, groups = self._lengths
        order = length_grouped_order(
            lengths, global_batch_size, seed=self.seed, epoch=epoch, groups=groups, world_size=world_size
        )
        return torch.from_numpy(order)

    @property
    def epoch(self) -> int:
        """The epoch whose augmentation is drawn."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Chooses the augmentation of another epoch."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"record {index} of {length}")
        index = int(index) % length
        return conversation_record(self.rows[index], index, self.seed, self.epoch, self.transform)


class ConversationIterableDataset(PairIterableDataset):
    """The streaming twin of `ConversationDataset`; order, sharing out and resuming are those of `PairIterableDataset`.

    Args:
        rows: a `datasets.IterableDataset` from `load_conversations(..., streaming=True)`.
        options: of `PairIterableDataset` (`seed`, `transform`, `shuffle`, `buffer_size`, `rank`, `world_size`).
    """

    def __init__(self, rows: Any, **options: Any) -> None:
        _check_columns(list(getattr(rows, "features", None) or ()) or None)
        super().__init__(rows, **options)

    def _record(
        self, row: Mapping[str, Any], index: int, epoch: int, text_index: int | None, name: str
    ) -> dict[str, Any]:
        return conversation_record(row, index, self.seed, epoch, self.transform, key=name)

    def _count(self, row: Mapping[str, Any]) -> int:
        return 1


def conversation_record(
    row: Mapping[str, Any],
    index: int,
    seed: int,
    epoch: int,
    transform: ImageTransform | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """The record of a row in an epoch.

    Args:
        row: `images`, `messages`, and optionally `source`, `key`, `problem`, `kind`.
        key: name of the record if the row has none.
    """
    return {
        **row,
        "source": str(row.get("source") or "rows"),
        "key": str(row["key"] if row.get("key") is not None else key if key is not None else index),
        "index": index,
        "seed": record_seed(seed, epoch, index),
        "transform": transform,
    }


def _check_columns(columns: Sequence[str] | None) -> None:
    missing = [name for name in _COLUMNS if columns is not None and name not in columns]
    if missing:
        raise ValueError(
            f"rows need the columns {', '.join(_COLUMNS)} but have {columns}; load them by "
            f"hf_vlp.data.conversations.load_conversations"
        )
