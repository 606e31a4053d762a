"""Rows with pictures: reading columns without the pictures, decoding, and what happens to a picture that is broken."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hf_vlp.data.images import decode_image
from hf_vlp.data.pairs import problem_of
from hf_vlp.data.records import BadRecord, ErrorRateExceeded, RecordLimits
from hf_vlp.evaluation.runtime import to_device

_LIMITS = RecordLimits()


def rows_of(rows: Any, limit: int | None = None) -> Any:
    """A sequence of rows: a map-style dataset as it is, an iterable one read to its end, or the first `limit` rows.

    Raises:
        ValueError: no rows.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give the number of rows to use, or None for all")
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        rows = list(islice(rows, limit))
    elif limit is not None and limit < len(rows):
        rows = rows.select(range(limit)) if hasattr(rows, "select") else [rows[index] for index in range(limit)]
    if not len(rows):
        raise ValueError("the data has no rows: check `--data` and `--split`")
    return rows


def column_names(rows: Any) -> list[str]:
    """Columns of a dataset, or the keys of the first row of a list."""
    return list(rows.column_names) if hasattr(rows, "column_names") else list(rows[0])


def column(rows: Any, name: str, *, required: bool = True) -> list[Any] | None:
    """One column, read without the others where the rows are a `datasets.Dataset`.

    Raises:
        ValueError: `required` and missing; the message lists the columns that there are.
    """
    names = column_names(rows)
    if name not in names:
        if required:
            raise ValueError(f"the data has no column {name!r}; it has {sorted(names)}. Rename the one that you mean")
        return None
    if hasattr(rows, "column_names"):
        return list(rows[name])
    return [row.get(name) for row in rows]


@dataclass(frozen=True)
class Failure:
    """What could not be used: its row, the reason (a key of `hf_vlp.data.records.REASONS`), and where it is from."""

    row: int
    reason: str
    detail: str
    where: str


class Skipped:
    """Pictures or texts that could not be used: how many, why, and which."""

    def __init__(self, failures: Sequence[Failure], total: int, what: str = "images"):
        self.failures, self.total, self.what = list(failures), total, what
        self.rows = [failure.row for failure in failures]

    def check(self, max_bad_rate: float) -> None:
        """Raises `ErrorRateExceeded` above the allowed rate, naming the first of them."""
        if self.failures and len(self.failures) > max_bad_rate * self.total:
            named = "; ".join(f"row {one.row} ({one.where}): {one.reason} {one.detail}" for one in self.failures[:5])
            raise ErrorRateExceeded(
                f"{len(self.failures)} of {self.total} {self.what} cannot be used, above "
                f"max_bad_rate={max_bad_rate}: {named}. Leaving some out changes the numbers: mend the data, or raise "
                "max_bad_rate to skip them"
            )
        if len(self.failures) >= self.total:
            raise ErrorRateExceeded(f"none of the {self.what} can be used")

    def summary(self) -> dict[str, Any]:
        """`skipped_images` (or `skipped_texts`) and, where there are any, the reasons with their counts."""
        summary: dict[str, Any] = {f"skipped_{self.what}": len(self.failures)}
        if self.failures:
            summary[f"skipped_{self.what}_reasons"] = dict(Counter(failure.reason for failure in self.failures))
        return summary


class ImageRows:
    """Decodes pictures of rows and makes model inputs of them, in worker processes if wanted."""

    def __init__(self, rows: Any, processor: Any, *, batch_size: int, workers: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1")
        self.rows, self.processor, self.batch_size, self.workers = rows, processor, batch_size, workers

    def batches(self, indices: Sequence[int], prompts: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Batches `{"positions": [...], "inputs": BatchFeature | None, "failures": [...]}` of the rows at `indices`.

        `positions` says which of `indices` have their picture in `inputs`, in order; `prompts`, one for each of
        `indices`, go to the processor as text.
        """
        yield from DataLoader(
            _Items(self, indices, prompts),
            batch_size=self.batch_size,
            shuffle=False,
            num_workers=self.workers,
            collate_fn=self._collate,
        )

    def _collate(self, items: Sequence["_Item"]) -> dict[str, Any]:
        good = [item for item in items if item.failure is None]
        inputs = None
        if good:
            inputs = self.processor(images=[item.picture for item in good], return_tensors="pt", **_text_of(good))
        return {
            "positions": [item.position for item in good],
            "inputs": inputs,
            "failures": [item.failure for item in items if item.failure is not None],
        }


def _text_of(items: Sequence["_Item"]) -> dict[str, Any]:
    if items[0].prompt is None:
        return {}
    return {"text": [item.prompt for item in items], "padding": True}


@dataclass
class _Item:
    position: int
    prompt: str | None
    picture: Image.Image | None
    failure: Failure | None = None


class _Items(Dataset):
    def __init__(self, source: ImageRows, indices: Sequence[int], prompts: Sequence[str] | None):
        self.source, self.indices, self.prompts = source, indices, prompts

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Item:
        index = self.indices[position]
        row = self.source.rows[index]
        prompt = None if self.prompts is None else self.prompts[position]
        try:
            problem = problem_of(row)
            if problem is not None:
                raise problem
            return _Item(position, prompt, decode_image(row.get("image"), _LIMITS))
        except BadRecord as error:
            return _Item(position, prompt, None, Failure(index, error.reason, error.detail, where(row)))


def where(row: dict[str, Any]) -> str:
    """Names a row by its source and key, as far as it has them."""
    image = row.get("image")
    path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
    return ", ".join(str(part) for part in (row.get("source"), row.get("key"), path) if part) or "no source given"


def embed_batches(model: nn.Module, source: ImageRows, indices: Sequence[int]) -> Iterator[tuple[Any, list[Failure]]]:
    """(embeddings of the readable images of a batch or None, failures of the batch), by the retrieval protocol."""
    parameter = next(model.parameters())
    for batch in source.batches(indices):
        embeds = None
        if batch["inputs"] is not None:
            pixels = to_device({"pixel_values": batch["inputs"]["pixel_values"]}, parameter.device, parameter.dtype)
            embeds = model.embed_images(**pixels)
        yield embeds, batch["failures"]
