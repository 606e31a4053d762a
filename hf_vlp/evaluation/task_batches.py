"""Batches of a task's records over processes: each record is scored once, and what is left out is named by its row."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hf_vlp.data.collators import REPORT_KEY, RecordCollator
from hf_vlp.data.records import RecordLimits
from hf_vlp.evaluation.images import Failure, Skipped, where
from hf_vlp.evaluation.runtime import evaluating, gather_lists, progress, shard, to_device

# Everything is counted and named here; `Skipped` judges it.
_ALL = RecordLimits(max_bad_rate=1.0, max_examples=1_000_000_000)
POSITIONS = "positions"


def score_records(
    model: nn.Module,
    records: Dataset,
    collator: type[RecordCollator],
    processor: Any,
    score: Callable[[dict[str, Any]], Iterable[Any]],
    *,
    batch_size: int,
    workers: int = 0,
    description: str = "scoring",
    show_progress: bool = True,
    **collator_options: Any,
) -> tuple[list[tuple[int, Any]], Skipped]:
    """(position in `records`, what `score` says of it) in order, and what was left out. The same on all processes.

    Args:
        model: put into eval mode meanwhile; batches go to its device and dtype.
        records: map-style, such as `hf_vlp.data.TaskDataset`.
        collator: class of the collator.
        score: a batch of tensors to one value a record, on the CPU and picklable.
        collator_options: of the collator.

    Raises:
        ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1")
    own = shard(len(records))
    collate = collator(processor, limits=_ALL, prepare=_with_positions, **collator_options)
    loader = DataLoader(
        _Numbered(records, own), batch_size=batch_size, num_workers=workers, collate_fn=collate, shuffle=False
    )
    parameter = next(model.parameters())
    scored: list[tuple[int, Any]] = []
    failures: list[Failure] = []
    with evaluating(model):
        total = -(-len(own) // batch_size)
        for batch in progress(loader, description, total=total, show=show_progress):
            report = batch.pop(REPORT_KEY)
            for reason, examples in report.examples.items():
                for example in examples:
                    position = int(example.key)
                    named = where(records[position])
                    failures.append(Failure(position, reason, example.detail, named))
            positions = batch.pop(POSITIONS, [])
            if positions:
                values = list(score(to_device(batch, parameter.device, parameter.dtype)))
                scored += zip(positions, values, strict=True)
    failures.sort(key=lambda failure: failure.row)
    return gather_lists(scored), Skipped(gather_lists(failures), len(records), "records")


def _with_positions(batch: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    return {**batch, POSITIONS: [int(record["key"]) for record in records]}


class _Numbered(Dataset):
    """Records whose key is their position, by which a report names them."""

    def __init__(self, records: Any, positions: Sequence[int]) -> None:
        self.records, self.positions = records, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = self.positions[index]
        return {**self.records[position], "key": str(position)}


class Unlabelled(Dataset):
    """Rows without labels, with a label that nothing reads: a test split for which only predictions are written."""

    def __init__(self, rows: Any, label: int = 0) -> None:
        self.rows, self.label = rows, label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "label": self.label}


def labels_given(labels: Sequence[Any] | None) -> bool:
    """Whether the data says what is right at all."""
    return labels is not None and any(label is not None for label in labels)


def argmax(logits: torch.Tensor) -> list[int]:
    """Most likely class of each row, of equal ones the first.

    Raises:
        ValueError: a logit is NaN.
    """
    if torch.isnan(logits).any():
        raise ValueError("logits are NaN: the model's outputs are not finite (in half precision, try bfloat16)")
    return logits.float().cpu().argmax(dim=1).tolist()
