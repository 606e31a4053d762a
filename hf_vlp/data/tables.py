"""Between rows and the datasets of the `datasets` library."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import fsspec.asyn
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, IterableDataset
from datasets.table import InMemoryTable
from torch.utils.data import get_worker_info

_CHUNK = 2_000
_READ_ROWS = 16


def in_memory(rows: Iterable[Mapping[str, Any]], features: Features) -> Dataset:
    """A dataset of rows that fit `features` as they are (images as `{"bytes": …, "path": …}`).

    Args:
        rows: read once, a few thousand at a time.
        features: the columns; keys of a row that are not among them are left out.
    """
    schema = features.arrow_schema
    rows = iter(rows)
    batches = []
    while chunk := list(islice(rows, _CHUNK)):
        batches.append(pa.RecordBatch.from_pylist(chunk, schema=schema))
    return Dataset(InMemoryTable(pa.Table.from_batches(batches, schema=schema)), info=DatasetInfo(features=features))


def all_rows(rows: Any) -> Iterator[dict[str, Any]]:
    """The rows of an iterable, all of them in a worker as well.

    `datasets.IterableDataset.__iter__` gives a worker its share only, by rules of its own; `iter` knows no workers.
    """
    if not isinstance(rows, IterableDataset):
        yield from rows
        return
    if get_worker_info() is not None:
        # A lock that was held in the parent process when the worker was forked would never be let go.
        fsspec.asyn.reset_lock()
    for batch in rows.iter(batch_size=_READ_ROWS):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))
