"""Rows as records for training and evaluation: one text a record, with everything random about it fixed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .hashing import drawn_text, record_seed
from .records import BadRecord, texts_of

ImageTransform = Callable[[Image.Image, int], Image.Image]


class PairDataset(Dataset):
    """A map-style dataset of image-text records over rows.

    A record is a dict: `image` (not decoded), `text`, `image_id` (only if the rows have it, or `all_texts`), `source`,
    `key`, `index`, `text_index`, `seed`, `transform`. The collator decodes, augments and tokenises, in the worker.

    Args:
        rows: a `datasets.Dataset` from `load_pairs`, or any sequence of dicts with `image` and `text`.
        seed: seed of the drawn texts and of the augmentation.
        transform: augmentation `(PIL image, seed) -> PIL image` of this dataset's images, such as `TrainTransform`;
            it travels with the record, so that one collator serves training and evaluation.
        all_texts: make a record of every text of every row (for evaluation), instead of one drawn an epoch.

    Raises:
        ValueError: `rows` has no `image` or no `text` column.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        seed: int = 0,
        transform: ImageTransform | None = None,
        all_texts: bool = False,
    ) -> None:
        columns = getattr(rows, "column_names", None)
        if columns is not None and not {"image", "text"} <= set(columns):
            raise ValueError(
                f"rows need the columns 'image' and 'text' but have {columns}; load them by hf_vlp.data.load_pairs, "
                f"or rename the columns"
            )
        self.rows, self.seed, self.transform, self.all_texts = rows, seed, transform, all_texts
        # In shared memory, so that `set_epoch` in the main process reaches workers that live on between epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._row_of, self._text_of = _flat_positions(rows) if all_texts else (None, None)

    @property
    def epoch(self) -> int:
        """The epoch whose texts are drawn."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Chooses the texts and the augmentation of another epoch."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.rows) if self._row_of is None else len(self._row_of)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"record {index} of {length}")
        index = int(index) % length
        if self._row_of is None:
            return make_record(self.rows[index], index, self.seed, self.epoch, self.transform)
        row = int(self._row_of[index])
        record = make_record(
            self.rows[row], index, self.seed, self.epoch, self.transform, int(self._text_of[index]), key=str(row)
        )
        # Texts of one image are positives of each other, which only an id can tell.
        record.setdefault("image_id", str(row))
        return record


def make_record(
    row: Mapping[str, Any],
    index: int,
    seed: int,
    epoch: int,
    transform: ImageTransform | None = None,
    text_index: int | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """The record of a row in an epoch.

    Args:
        row: `image`, `text` (a string or a list), and optionally `image_id`, `source`, `key`, `problem`.
        index: number of the record, which names it where the row has no key of its own.
        seed, epoch: with `index`, what its text and its augmentation are drawn from.
        transform: augmentation of its image.
        text_index: the text to take instead of drawing one.
        key: name of the record if the row has none.

    Raises:
        ValueError: the row has no `image` or no `text`.
    """
    if "image" not in row or "text" not in row:
        raise ValueError(f"a row needs 'image' and 'text' but has {sorted(row)}; load rows by hf_vlp.data.load_pairs")
    texts = texts_of(row["text"])
    if text_index is None and texts:
        text_index = drawn_text(seed, epoch, index, len(texts))
    record = {
        "image": row["image"],
        "text": texts[text_index] if texts else None,
        "source": str(row.get("source") or "rows"),
        "key": str(row["key"] if row.get("key") is not None else key if key is not None else index),
        "index": index,
        "text_index": text_index,
        "seed": record_seed(seed, epoch, index),
        "transform": transform,
    }
    if row.get("image_id") is not None:
        record["image_id"] = row["image_id"]
    if row.get("problem"):
        record["problem"] = row["problem"]
    return record


def flatten_texts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[int]]:
    """Every text of every row, and the number of the row that each belongs to.

    Args:
        rows: rows with a `text` column; images are not touched if `rows` is a `datasets.Dataset`.
    """
    texts, positions = [], []
    for position, held in enumerate(_texts(rows)):
        for text in texts_of(held):
            texts.append(text)
            positions.append(position)
    return texts, positions


def _texts(rows: Sequence[Mapping[str, Any]]) -> Any:
    if hasattr(rows, "select_columns"):
        return (row["text"] for row in rows.select_columns(["text"]))
    return (row["text"] for row in rows)


def _flat_positions(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    # A row without any text keeps one record, which the collator will count as bad.
    counts = np.array([max(1, len(texts_of(held))) for held in _texts(rows)], dtype=np.int64)
    row_of = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return row_of, np.arange(len(row_of)) - starts[row_of]


def problem_of(record: Mapping[str, Any]) -> BadRecord | None:
    """The finding that a reader left in a record it could not read whole, written `"reason: detail"`."""
    if not record.get("problem"):
        return None
    reason, _, detail = record["problem"].partition(": ")
    return BadRecord(reason, detail)
