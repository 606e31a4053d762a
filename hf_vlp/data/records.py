"""Bad records: what makes one, how many a run accepts, and the account that is kept of them.

A record that cannot be used is left out of its batch, counted under a reason and named in the log. Nothing stands in
for it: no blank picture, no neighbour, no empty text.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

# Every reason a record is left out for, and what it means.
REASONS: dict[str, str] = {
    "image_missing": "there is no image, or no file at its path",
    "image_wrong_type": "the image is neither bytes, nor a path, nor a PIL image, nor an array",
    "image_empty": "the image file has zero bytes",
    "image_not_an_image": "the bytes are no image in a format that is read (text called .png, HTML, SVG, ...)",
    "image_truncated": "the image file ends before the image does",
    "image_corrupt": "the image file is damaged",
    "image_too_large": "the image has more pixels, or its file more bytes, than the limits allow",
    "image_aspect": "one side of the image is longer than the other by more than the limits allow",
    "text_missing": "there is no text",
    "text_not_string": "the text is not a string",
    "text_empty": "the text is empty or blank",
    "text_not_unicode": "the text holds characters that no encoding of Unicode can store",
    "answers_missing": "a question has no answer",
    "weights_wrong": "the weights are not one number for each answer, or a number is missing or negative",
    "label_missing": "there is no label",
    "label_outside": "the label is none of the task's classes",
    "image_count": "a statement comes with another number of images than two",
    "turns_missing": "a dialog has no turns",
    "turns_wrong": "the turns of a dialog are not a list of questions and answers",
    "candidates_missing": "a turn of a dialog has no candidate answers",
    "candidates_wrong": "the right answer is not exactly one of the candidates, or their numbers do not fit",
    "box_missing": "there is no box",
    "box_wrong": "a box is not four numbers, or has no area",
    "record_unparsable": "a line or member of the source could not be read as a record",
    "shard_broken": "a tar is damaged or ends before its end marker; the records behind that point are lost",
    "messages_wrong": "a conversation is not a list of turns by known roles, or holds no answer",
    "labels_missing": "nothing that the model is to learn is left of a conversation, for instance after truncation",
    "processor_failed": "the processor could not use the record",
}


class BadRecord(Exception):  # noqa: N818  a finding about one record, not a fault of the program
    """Raised while one record is read, with the reason it cannot be used.

    Args:
        reason: a key of `REASONS`.
        detail: what was found, for the log.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is not a reason of REASONS")
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class ErrorRateExceeded(RuntimeError):  # noqa: N818  named after what happened, as StopIteration is
    """More of the records are bad than `RecordLimits.max_bad_rate` allows. The message holds the account."""


@dataclass(frozen=True)
class RecordLimits:
    """What a usable record is, and how many unusable ones a run accepts.

    Attributes:
        max_bad_rate: share of bad records above which the run stops; 0 stops at the first one, 1 never stops.
        min_records: the rate is judged only after this many records (with `max_bad_rate=0`, at once).
        max_pixels: width times height, read from the file's header before anything is decoded.
        max_bytes: size of the image file.
        max_aspect_ratio: longer side over shorter side. Resizing the shorter side of a 1 x 60,000 picture to 224
            would make 3 billion values of it.
        max_examples: bad records of each reason that are named in the report and in the log.

    Raises:
        ValueError: a limit that makes no sense.
    """

    max_bad_rate: float = 0.05
    min_records: int = 200
    max_pixels: int = 50_000_000
    max_bytes: int = 256 * 2**20
    max_aspect_ratio: float = 100.0
    max_examples: int = 5

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_bad_rate <= 1.0:
            raise ValueError(f"max_bad_rate={self.max_bad_rate} is not a share between 0 and 1")
        for name in ("min_records", "max_pixels", "max_bytes", "max_aspect_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_examples < 0:
            raise ValueError(f"max_examples={self.max_examples} must not be negative")


@dataclass(frozen=True)
class BadExample:
    """One bad record by name."""

    source: str
    key: str
    detail: str


@dataclass
class RecordReport:
    """The account of a batch or of a run: how many records were seen and which were bad, by reason.

    Reports add up: `total.merge(batch["record_report"])`. They pickle, so they travel from worker processes inside
    the batch.

    Attributes:
        seen: records looked at, good and bad.
        bad: number of bad records by reason.
        examples: some of the bad records of each reason, by name.
        origin: process in which the records were counted; `RecordCollator.collect` uses it to count nothing twice.
    """

    seen: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[BadExample]] = field(default_factory=dict)
    origin: int = field(default_factory=os.getpid)

    @property
    def bad_total(self) -> int:
        """Bad records of all reasons."""
        return sum(self.bad.values())

    @property
    def good(self) -> int:
        """Records that were used."""
        return self.seen - self.bad_total

    @property
    def bad_rate(self) -> float:
        """Share of bad records among those seen; 0 when none was seen."""
        return self.bad_total / self.seen if self.seen else 0.0

    def add_good(self, count: int = 1) -> None:
        """Counts usable records."""
        self.seen += count

    def add_bad(self, error: BadRecord, source: str, key: str, max_examples: int = 5) -> None:
        """Counts one unusable record, and keeps its name unless `max_examples` of its reason are kept already."""
        self.seen += 1
        self.bad[error.reason] += 1
        kept = self.examples.setdefault(error.reason, [])
        if len(kept) < max_examples:
            kept.append(BadExample(source, key, error.detail))

    def merge(self, other: "RecordReport", max_examples: int = 5) -> None:
        """Adds another report's counts, and its examples as far as there is room."""
        self.seen += other.seen
        self.bad.update(other.bad)
        for reason, examples in other.examples.items():
            kept = self.examples.setdefault(reason, [])
            kept.extend(examples[: max(0, max_examples - len(kept))])

    def check(self, limits: RecordLimits, final: bool = False) -> None:
        """Raises if too many records are bad.

        Args:
            limits: the rate that is accepted.
            final: there are no more records to come, so judge even fewer than `limits.min_records`.

        Raises:
            ErrorRateExceeded: with the table of reasons and named examples.
        """
        enough = final or limits.max_bad_rate == 0 or self.seen >= limits.min_records
        if self.bad_total and enough and self.bad_rate > limits.max_bad_rate:
            raise ErrorRateExceeded(
                f"{self.bad_total} of {self.seen} records are bad ({self.bad_rate:.1%}), more than max_bad_rate="
                f"{limits.max_bad_rate:.1%}. Mend the data, or raise the limit (max_bad_rate, max_pixels, ...) if "
                f"this loss is acceptable.\n{self.table()}"
            )

    def table(self) -> str:
        """The account as lines of text: number, reason, meaning, named examples."""
        lines = [f"{self.seen} records seen, {self.good} used, {self.bad_total} left out"]
        for reason, count in self.bad.most_common():
            lines.append(f"{count:>8}  {reason}: {REASONS[reason]}")
            lines.extend(
                f"{'':>10}{example.source} [{example.key}] {example.detail}".rstrip()
                for example in self.examples.get(reason, ())
            )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, int]:
        """`{"records_seen": …, "records_bad": …, "records_bad_<reason>": …}` for a log."""
        counts = {f"records_bad_{reason}": count for reason, count in sorted(self.bad.items())}
        return {"records_seen": self.seen, "records_bad": self.bad_total, **counts}


class RecordAccount:
    """A running total that logs what is new in it and enforces the limits.

    Args:
        limits: what is accepted.
    """

    def __init__(self, limits: RecordLimits) -> None:
        self.limits = limits
        self.total = RecordReport()

    def add(self, report: RecordReport) -> None:
        """Adds a batch's report: names new bad records in the log, and raises above the accepted rate.

        Of each reason the first `limits.max_examples` records are named, after that only counts at 10, 100, 1,000, …

        Raises:
            ErrorRateExceeded: see `RecordReport.check`.
        """
        before = Counter(self.total.bad)
        self.total.merge(report, self.limits.max_examples)
        for reason, count in report.bad.items():
            room = max(0, self.limits.max_examples - before[reason])
            for example in report.examples.get(reason, [])[:room]:
                logger.warning(
                    "left out: %s [%s]: %s%s",
                    example.source,
                    example.key,
                    reason,
                    f" ({example.detail})" if example.detail else "",
                )
            total = before[reason] + count
            if _magnitude(total) > _magnitude(before[reason]) and total >= 10:
                logger.warning("left out so far for %s: %d of %d records", reason, total, self.total.seen)
        if report.bad:
            self.total.check(self.limits)


def _magnitude(count: int) -> int:
    return len(str(count)) if count else 0


def usable_text(value: Any) -> str:
    """The text of a record, without blanks around it.

    Raises:
        BadRecord: it is missing, not a string, blank, or cannot be stored as UTF-8.
    """
    if value is None:
        raise BadRecord("text_missing")
    if not isinstance(value, str):
        raise BadRecord("text_not_string", f"it is {_shown(value)}")
    text = value.strip()
    if not text:
        raise BadRecord("text_empty", repr(value) if len(value) < 20 else f"{len(value)} blank characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord("text_not_unicode", error.reason) from None
    return text


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def texts_of(value: Any) -> list[Any]:
    """The texts of a row as a list, whatever they are: a string is a list of one, no text an empty list."""
    if value is None:
        return []
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | dict):
        return list(value)
    return [value]
