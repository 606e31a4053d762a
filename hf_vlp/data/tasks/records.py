"""Rows of a task as records for training and evaluation, with everything random about a record fixed."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..hashing import drawn_text, record_seed
from ..pairs import ImageTransform, PairDataset
from ..streams import PairIterableDataset
from .sources import TASKS

# What a record of a task is trained on, and the column that holds what is to be learned.
COLUMNS: dict[str, tuple[str, ...]] = {
    "vqa": ("image", "question", "answers"),
    "visual_reasoning": ("image_0", "image_1", "text", "label"),
    "visual_entailment": ("image", "text", "label"),
    "dialog": ("image", "caption", "turns"),
    "grounding": ("image", "text", "boxes"),
}
_PROBED_ROWS = 20


def task_records(
    task: str, rows: Any, *, seed: int = 0, transform: ImageTransform | None = None, all_turns: bool = False
) -> Dataset:
    """The dataset of records of rows from `load_task`: map-style for map-style rows, a stream for a stream.

    Args:
        task: of `load_task`. Retrieval and captioning give `PairDataset` or `PairIterableDataset`.
        rows: see above.
        seed: of the drawn texts and turns, and of the augmentation.
        transform: augmentation `(PIL image, seed) -> PIL image`.
        all_turns: a record of every turn (retrieval, captioning: of every text) instead of one drawn an epoch.

    Raises:
        ValueError: unknown task, missing columns, or rows without anything to learn.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    streamed = not hasattr(rows, "__len__")
    if task in COLUMNS:
        kind: Any = TaskIterableDataset if streamed else TaskDataset
        return kind(rows, task, seed=seed, transform=transform, all_turns=all_turns)
    pairs: Any = PairIterableDataset if streamed else PairDataset
    return pairs(rows, seed=seed, transform=transform, all_texts=all_turns)


class TaskDataset(Dataset):
    """A map-style dataset of the records of a task.

    A record is the row with `source`, `key`, `index`, `seed`, `transform`, and for dialogs `turn_index`: the turn that
    is asked, drawn by (seed, epoch, index) so that a round of epochs reads each turn once.

    Args:
        rows: a `datasets.Dataset` from `load_task`, or any sequence of such rows.
        task: `"vqa"`, `"visual_reasoning"`, `"visual_entailment"`, `"dialog"` or `"grounding"`.
        seed, transform, all_turns: as in `task_records`.

    Raises:
        ValueError: another task, missing columns, or nothing to learn in the first rows.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        task: str,
        *,
        seed: int = 0,
        transform: ImageTransform | None = None,
        all_turns: bool = False,
    ) -> None:
        check_columns(task, getattr(rows, "column_names", None))
        probed = min(_PROBED_ROWS, len(rows))
        check_targets(task, (rows[index] for index in range(probed)))
        self.rows, self.task, self.seed, self.transform = rows, task, seed, transform
        self.all_turns = all_turns and task == "dialog"
        # In shared memory, so that `set_epoch` in the main process reaches workers that live on between epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        if self.all_turns:
            turns = rows.select_columns(["turns"]) if hasattr(rows, "select_columns") else rows
            counts = np.array([max(1, len(row["turns"] or ())) for row in turns], dtype=np.int64)
            self._row_of = np.repeat(np.arange(len(counts)), counts)
            self._turn_of = np.arange(len(self._row_of)) - (np.cumsum(counts) - counts)[self._row_of]

    @property
    def epoch(self) -> int:
        """The epoch whose turns are drawn."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Chooses the turns and the augmentation of another epoch."""
        self._epoch[0] = epoch

    def row_of(self, index: int) -> int:
        """The row that record `index` is made of."""
        return int(self._row_of[index]) if self.all_turns else index

    def turn_of(self, index: int) -> int:
        """The turn of record `index`; only with `all_turns`."""
        return int(self._turn_of[index])

    def __len__(self) -> int:
        return len(self._row_of) if self.all_turns else len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"record {index} of {length}")
        index = int(index) % length
        if not self.all_turns:
            return task_record(self.task, self.rows[index], index, self.seed, self.epoch, self.transform)
        row, turn = self.row_of(index), self.turn_of(index)
        return task_record(self.task, self.rows[row], index, self.seed, self.epoch, self.transform, turn, key=str(row))


class TaskIterableDataset(PairIterableDataset):
    """The streaming twin of `TaskDataset`; order, sharing out and resuming are those of `PairIterableDataset`.

    Args:
        rows: a `datasets.IterableDataset` from `load_task(..., streaming=True)`.
        task, all_turns: as in `TaskDataset`.
        options: of `PairIterableDataset` (`seed`, `transform`, `shuffle`, `buffer_size`, `rank`, `world_size`).
    """

    def __init__(self, rows: Any, task: str, *, all_turns: bool = False, **options: Any) -> None:
        super().__init__(rows, all_texts=all_turns and task == "dialog", **options)
        check_columns(task, list(getattr(rows, "features", None) or ()) or None)
        check_targets(task, islice(iter(rows), _PROBED_ROWS))
        self.task = task

    def _record(
        self, row: Mapping[str, Any], index: int, epoch: int, text_index: int | None, name: str
    ) -> dict[str, Any]:
        return task_record(self.task, row, index, self.seed, epoch, self.transform, text_index, key=name)

    def _count(self, row: Mapping[str, Any]) -> int:
        return len(row["turns"] or ())


def task_record(
    task: str,
    row: Mapping[str, Any],
    index: int,
    seed: int,
    epoch: int,
    transform: ImageTransform | None = None,
    turn: int | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """The record of a row in an epoch.

    Args:
        turn: of a dialog, instead of drawing one.
        key: name of the record if the row has none.
    """
    record = {
        **row,
        "source": str(row.get("source") or "rows"),
        "key": str(row["key"] if row.get("key") is not None else key if key is not None else index),
        "index": index,
        "seed": record_seed(seed, epoch, index),
        "transform": transform,
    }
    if task == "dialog":
        turns = row.get("turns") or ()
        if turn is None and turns:
            turn = drawn_text(seed, epoch, index, len(turns))
        record["turn_index"] = turn
        record["key"] = f"{record['key']}, turn {turn}"
    return record


def check_columns(task: str, columns: Sequence[str] | None) -> None:
    """Raises `ValueError` unless rows with these columns can be records of the task."""
    if task not in COLUMNS:
        raise ValueError(f"task={task!r}: records of this kind are made for {', '.join(COLUMNS)}")
    missing = [name for name in COLUMNS[task] if columns is not None and name not in columns]
    if missing:
        raise ValueError(
            f"{task} needs the columns {', '.join(COLUMNS[task])}, but the rows lack {', '.join(missing)} and have "
            f"{', '.join(columns or ())}; load them by hf_vlp.data.load_task({task!r}, …), naming columns if needed"
        )


def check_targets(task: str, rows: Any) -> None:
    """Raises `ValueError` if none of the rows has what the task is learned from."""
    probed = list(rows)
    # A finding is counted when its record's turn comes.
    readable = [row for row in probed if not row.get("problem")]
    if not readable:
        return
    where = readable[0].get("source") or "the data"
    target = COLUMNS[task][-1]
    if not any(row.get(target) is not None and row[target] != [] for row in readable):
        raise ValueError(
            f"{where}: none of the first {len(readable)} rows has {target}; is it a test split without them? Name "
            f"another split or source for training"
        )
    if task == "dialog":
        turns = [turn for row in readable for turn in row["turns"] or ()]
        if not any(turn.get("candidates") for turn in turns):
            raise ValueError(
                f"{where}: a dialog without candidates: no turn of the first {len(readable)} rows lists the answers "
                f"to choose from; add `candidates` to each turn, the right answer among them"
            )
