"""Rows in memory as a `datasets.Dataset`, without a detour over the disk."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features
from datasets.table import InMemoryTable

_CHUNK = 2_000


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
