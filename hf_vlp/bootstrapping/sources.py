"""What a job reads, cut into units of work that are named by their place and so are the same in every run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datasets import IterableDataset

from hf_vlp.data import load_pairs
from hf_vlp.data.tables import all_rows

WEB, SYNTHETIC, HUMAN = "web", "synthetic", "human"


@dataclass(frozen=True)
class UnitName:
    """The place of a unit: `chunk` of `shard` of source number `source` of an origin."""

    origin: str
    source: int
    shard: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.origin}-{self.source:02d}-{self.shard:05d}-{self.chunk:06d}"


@dataclass
class Unit:
    """Consecutive rows of a source; `last` where it is known that the shard ends with them."""

    name: UnitName
    rows: list[Mapping[str, Any]]
    start: int
    last: bool


@dataclass
class Source:
    """Rows with `image` and `text`, and what is known of the texts.

    Attributes:
        rows: of `load_pairs`, or any sequence of such rows.
        origin: `"web"`: texts are filtered and images captioned; `"human"`: taken over as they are.
        description: what the source is, as recorded in the set's settings (a restart must name the same).
        number: which source of its origin it is; set by the job.
    """

    rows: Any
    origin: str = WEB
    description: dict[str, Any] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        if self.origin not in (WEB, HUMAN):
            raise ValueError(f"origin={self.origin!r}: a source is {WEB!r} or {HUMAN!r}")
        if not self.is_stream and not (hasattr(self.rows, "__len__") and hasattr(self.rows, "__getitem__")):
            raise TypeError(
                f"rows of type {type(self.rows).__name__} can neither be indexed nor are they a stream that can be "
                "cut into shards; give a datasets.Dataset, a datasets.IterableDataset or a list of rows"
            )

    @property
    def is_stream(self) -> bool:
        """Whether the rows are read in order and their number is not known."""
        return isinstance(self.rows, IterableDataset)

    @property
    def shards(self) -> int:
        """Parts that can be read on their own; a source that can be indexed is one."""
        return self.rows.num_shards if self.is_stream else 1

    def settings(self) -> dict[str, Any]:
        """The description with what is known of the size."""
        size = {"shards": self.shards} if self.is_stream else {"rows": len(self.rows)}
        return {"origin": self.origin, **self.description, **size}

    def unit_count(self, unit_size: int) -> int | None:
        """How many units there are; None for a stream."""
        return None if self.is_stream else -(-len(self.rows) // unit_size)

    def units(self, unit_size: int, rank: int, world_size: int, done: Any) -> Iterator[Unit]:
        """The units that belong to a process and are not done, in order; each unit belongs to one process.

        Args:
            unit_size: rows of a unit.
            rank, world_size: of the process.
            done: `done(UnitName)` says whether a unit need not be read.

        A stream with at least as many shards as processes is shared out by shards, so that each process reads its own
        only; any other source by units. What a unit is does not depend on either.
        """
        if not self.is_stream:
            for chunk in range(rank, -(-len(self.rows) // unit_size), world_size):
                name = UnitName(self.origin, self.number, 0, chunk)
                if not done(name):
                    start = chunk * unit_size
                    stop = min(start + unit_size, len(self.rows))
                    yield Unit(name, _indexed(self.rows, start, stop), start, stop == len(self.rows))
            return
        by_shard = self.shards >= world_size
        for shard in range(self.shards):
            if by_shard and shard % world_size != rank:
                continue
            yield from self._shard_units(
                shard, unit_size, 0 if by_shard else rank, 1 if by_shard else world_size, done
            )

    def _shard_units(self, shard: int, unit_size: int, rank: int, world_size: int, done: Any) -> Iterator[Unit]:
        rows = self.rows.shard(num_shards=self.shards, index=shard) if self.shards > 1 else self.rows
        first = 0
        while done(UnitName(self.origin, self.number, shard, first)):
            first += 1
        reader = all_rows(rows.skip(first * unit_size) if first else rows)
        chunk = first
        # One row ahead, so that a unit knows whether it is the last one.
        ahead = list(islice(reader, 1))
        while ahead:
            held = ahead + list(islice(reader, unit_size - 1))
            ahead = list(islice(reader, 1))
            name = UnitName(self.origin, self.number, shard, chunk)
            if chunk % world_size == rank and not done(name):
                yield Unit(name, held, chunk * unit_size, not ahead)
            chunk += 1
        if chunk == first == 0 and rank == 0:
            # An empty shard is done as an empty unit; otherwise nobody could tell it from one that was not read.
            yield Unit(UnitName(self.origin, self.number, shard, 0), [], 0, True)


def _indexed(rows: Any, start: int, stop: int) -> list[Mapping[str, Any]]:
    if hasattr(rows, "select"):
        return list(rows.select(range(start, stop)))
    return [rows[index] for index in range(start, stop)]


def open_source(
    spec: str,
    origin: str = WEB,
    split: str = "train",
    *,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    image_root: str | None = None,
    **options: Any,
) -> Source:
    """A source of a job by name; arguments and errors as of `hf_vlp.data.load_pairs`."""
    rows = load_pairs(spec, split, streaming=streaming, columns=columns, image_root=image_root, **options)
    described = {"data": str(spec), "split": split, "streaming": streaming, "columns": dict(columns or {})}
    return Source(rows, origin, {**described, "image_root": image_root, "options": dict(options)})
