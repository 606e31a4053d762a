"""What a set remembers of its making: the settings, which units are done, what came of each, and the sum of it.

All of it lies in `_capfilt` inside the set, a folder that `load_pairs` passes over. A unit is done when its JSON file
is there, which is renamed into place after the unit's data, so a kill at any point leaves whole units only.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hf_vlp.bootstrapping.sources import UnitName
from hf_vlp.bootstrapping.writing import TEMPORARY, write_json
from hf_vlp.data.records import BadExample, RecordReport

FOLDER = "_capfilt"
VERSION = 1
BINS = 20


class SettingsChanged(ValueError):  # noqa: N818  named after what happened
    """A set is to be continued with other settings than it was begun with. The message names them."""


class JobError(RuntimeError):
    """Another process of the job failed, or the set is not what its ledger says."""


@dataclass
class Counts:
    """What became of the texts of one origin.

    Attributes:
        seen: texts there were.
        kept: texts in the set.
        dropped: the others, by reason: `itm`, `itc`, `duplicate`, or a reason of `hf_vlp.data.records.REASONS`.
        histogram: number of texts by ITM probability (ITC cosine where ITM was not asked), `BINS` bins.
    """

    seen: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, other: "Counts") -> None:
        """Adds another account."""
        self.seen += other.seen
        self.kept += other.kept
        self.dropped.update(other.dropped)
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seen": self.seen,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "histogram": self.histogram,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Counts":
        """Back from JSON."""
        return cls(value["seen"], value["kept"], Counter(value["dropped"]), list(value["histogram"]))


@dataclass
class UnitEntry:
    """A done unit.

    Attributes:
        name: its place.
        last: nothing follows it in its shard.
        inputs: hash of the keys and texts that were read.
        report: its records, good and bad.
        texts: origin -> what became of the texts.
        images: rows in the set.
        files: path within the set -> size and SHA-256.
        seconds: it took; the only thing here that differs from run to run.
    """

    name: str
    last: bool
    inputs: str
    report: RecordReport
    texts: dict[str, Counts]
    images: int
    files: dict[str, dict[str, Any]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "last": self.last,
            "inputs": self.inputs,
            "records": report_dict(self.report),
            "texts": {origin: counts.as_dict() for origin, counts in sorted(self.texts.items())},
            "images": self.images,
            "files": self.files,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "UnitEntry":
        """Back from JSON."""
        texts = {origin: Counts.from_dict(counts) for origin, counts in value["texts"].items()}
        return cls(
            name=value["name"],
            last=value["last"],
            inputs=value["inputs"],
            report=report_from(value["records"]),
            texts=texts,
            images=value["images"],
            files=value["files"],
            seconds=value["seconds"],
        )


def report_dict(report: RecordReport) -> dict[str, Any]:
    """A record report for JSON."""
    return {
        "seen": report.seen,
        "bad": dict(sorted(report.bad.items())),
        "examples": {
            reason: [[one.source, one.key, one.detail] for one in examples]
            for reason, examples in sorted(report.examples.items())
        },
    }


def report_from(value: Mapping[str, Any]) -> RecordReport:
    """Back from JSON."""
    examples = {reason: [BadExample(*one) for one in found] for reason, found in value["examples"].items()}
    return RecordReport(value["seen"], Counter(value["bad"]), examples)


class Ledger:
    """The files of `_capfilt`.

    Args:
        output: folder of the set.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.units = self.folder / "units"
        self.texts = self.folder / "texts"
        self.gallery = self.folder / "gallery"
        self.entries: dict[str, UnitEntry] = {}

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Records the settings of a new set, or compares them with those of one that was begun.

        Raises:
            SettingsChanged: they differ.
            JobError: the folder holds something else than a set that this job began.
        """
        path = self.folder / "settings.json"
        wanted = json.loads(json.dumps({"version": VERSION, **settings}))
        if not path.is_file():
            present = [item.name for item in self.output.glob("*")] if self.output.is_dir() else []
            present = [name for name in present if name != FOLDER and not name.startswith(TEMPORARY)]
            if present:
                raise JobError(
                    f"{self.output} is not empty ({', '.join(sorted(present)[:3])}) and holds no set that this job "
                    f"began; give a new folder"
                )
            write_json(path, wanted)
            return
        differences = changed(json.loads(path.read_text()), wanted)
        if differences:
            raise SettingsChanged(
                f"{self.output} was begun with other settings: {'; '.join(differences)}. Continue with the first "
                f"ones, or give a new folder: a set is made in one way"
            )

    def refresh(self) -> list[UnitEntry]:
        """Reads the entries that have come since the last call, of any process."""
        fresh = []
        for path in self.units.glob("*.json") if self.units.is_dir() else ():
            if path.stem in self.entries or path.name.startswith(TEMPORARY):
                continue
            entry = UnitEntry.from_dict(json.loads(path.read_text()))
            if self._whole(entry):
                self.entries[path.stem] = entry
                fresh.append(entry)
        return fresh

    def _whole(self, entry: UnitEntry) -> bool:
        """Whether the unit's files are there, in their size; a unit whose files were lost is done again."""
        for name, expected in entry.files.items():
            path = self.output / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                return False
        return True

    def done(self, name: UnitName) -> bool:
        """Whether a unit is known to be done."""
        return str(name) in self.entries

    def finish_unit(self, entry: UnitEntry) -> None:
        """Declares a unit done. Its files must be in place."""
        write_json(self.units / f"{entry.name}.json", entry.as_dict())
        self.entries[entry.name] = entry

    def missing(self, sources: Iterable[Any], unit_size: int) -> Iterator[str]:
        """Names of units that are not done yet, as far as they are known; of an unfinished shard the next one."""
        for source in sources:
            count = source.unit_count(unit_size)
            if count is not None:
                names = (UnitName(source.origin, source.number, 0, chunk) for chunk in range(count))
                yield from (str(name) for name in names if not self.done(name))
                continue
            for shard in range(source.shards):
                chunk, last = 0, False
                while not last:
                    name = str(UnitName(source.origin, source.number, shard, chunk))
                    if name not in self.entries:
                        yield name
                        break
                    last = self.entries[name].last
                    chunk += 1

    def totals(self, max_examples: int = 5) -> "Totals":
        """The sum of all entries, with so many bad records of each reason by name."""
        totals = Totals(max_examples=max_examples)
        for name in sorted(self.entries):
            totals.add(self.entries[name])
        return totals

    def fail(self, run: str, rank: int, error: BaseException) -> None:
        """Leaves word for the other processes, which would wait for this one without end."""
        write_json(self.folder / f"failed-{run}-{rank}.json", f"{type(error).__name__}: {error}")

    def wait(self, sources: list[Any], unit_size: int, run: str, poll: float = 0.2) -> None:
        """Returns when every unit is done, whoever does it.

        Raises:
            JobError: another process of this run has failed.
        """
        while True:
            self.refresh()
            if next(self.missing(sources, unit_size), None) is None:
                return
            for path in self.folder.glob(f"failed-{run}-*.json"):
                raise JobError(f"process {path.stem.rpartition('-')[2]} failed: {json.loads(path.read_text())}")
            time.sleep(poll)

    def clean(self) -> None:
        """Removes what killed processes have left: parts of files, and word of failures."""
        for path in (*self.output.rglob(f"{TEMPORARY}*"), *self.folder.glob("failed-*.json")):
            path.unlink(missing_ok=True)


@dataclass
class Totals:
    """The sum of entries."""

    report: RecordReport = field(default_factory=RecordReport)
    texts: dict[str, Counts] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    files: int = 0
    max_examples: int = 5

    def add(self, entry: UnitEntry) -> None:
        """Adds a unit."""
        self.report.merge(entry.report, self.max_examples)
        for origin, counts in entry.texts.items():
            self.texts.setdefault(origin, Counts()).add(counts)
        self.images += entry.images
        self.seconds += entry.seconds
        self.files += len([name for name in entry.files if not name.startswith(FOLDER)])


def changed(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two settings, as `"name: before -> now"`."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys((*before, *now)):
            found += changed(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [part for i, (a, b) in enumerate(zip(before, now)) for part in changed(a, b, f"{name}[{i}]")]
    return [] if before == now else [f"{name} was {_shown(before)}, now {_shown(now)}"]


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 100 else shown[:97] + "..."


def read_texts(output: str | Path) -> list[dict[str, Any]]:
    """Every text that a job judged, kept or dropped, with its scores: rows of `writing.TEXT_FEATURES`, in order.

    Raises:
        FileNotFoundError: the folder holds no such set.
    """
    ledger = Ledger(Path(output))
    if not ledger.units.is_dir():
        raise FileNotFoundError(f"{output} holds no set written by capfilt")
    ledger.refresh()
    rows: list[dict[str, Any]] = []
    for name in sorted(ledger.entries):
        path = ledger.texts / f"{name}.parquet"
        if path.is_file():
            rows += pq.read_table(path).to_pylist()
    return rows
