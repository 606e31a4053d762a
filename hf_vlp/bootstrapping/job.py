"""The CapFilt job: reads sources in units, captions, filters, and writes the next pretraining set."""

import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from hf_vlp.bootstrapping.captioner import Captioner
from hf_vlp.bootstrapping.gallery import GalleryRecord, sample_size, sampled, thumbnail, write_gallery
from hf_vlp.bootstrapping.ledger import BINS, Counts, JobError, Ledger, SettingsChanged, UnitEntry
from hf_vlp.bootstrapping.progress import Progress
from hf_vlp.bootstrapping.sampling import sampling_seed
from hf_vlp.bootstrapping.sources import HUMAN, SYNTHETIC, WEB, Source, Unit, UnitName
from hf_vlp.bootstrapping.summary import write_summary
from hf_vlp.bootstrapping.text_filter import Score, TextFilter
from hf_vlp.bootstrapping.writing import TEXT_FEATURES, png_bytes, suffix, write_json, write_pairs, write_table
from hf_vlp.data.images import decode_image, stored_bytes
from hf_vlp.data.pairs import problem_of
from hf_vlp.data.records import BadRecord, RecordAccount, RecordLimits, RecordReport, texts_of, usable_text
from hf_vlp.evaluation.generation import prompts_end_together
from hf_vlp.evaluation.runtime import chunks, evaluating, gather_lists, world

logger = logging.getLogger(__name__)

# Batches whose texts are sorted by length together.
_WINDOW = 4


@dataclass(frozen=True)
class CapFiltSettings:
    """What decides the set, besides the sources and the models.

    Attributes:
        seed: of the sampled captions.
        unit_size: records of a unit of work, which is one file of the set.
        format: `"parquet"` or `"webdataset"`.
        gallery: records about which the gallery page is made; 0 for no page.

    Raises:
        ValueError: a value out of range.
    """

    seed: int = 0
    unit_size: int = 1000
    format: str = "parquet"
    gallery: int = 48

    def __post_init__(self) -> None:
        suffix(self.format)
        if self.unit_size < 1:
            raise ValueError(f"unit_size={self.unit_size}: at least one record")
        if self.gallery < 0:
            raise ValueError(f"gallery={self.gallery}: it must not be negative")


@dataclass(frozen=True)
class Pace:
    """How much is done at a time. Decides nothing about the set.

    Attributes:
        batch_size: images at a time.
        text_batch_size: texts that the filter compares at a time.
        workers: threads that decode and resize; 0 for none.

    Raises:
        ValueError: a value out of range.
    """

    batch_size: int = 32
    text_batch_size: int = 128
    workers: int = 2

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("text_batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least {least}")


def capfilt(
    output: str | Path,
    sources: Sequence[Source],
    *,
    captioner: Captioner | None = None,
    text_filter: TextFilter | None = None,
    settings: CapFiltSettings | None = None,
    limits: RecordLimits | None = None,
    batch_size: int = 32,
    text_batch_size: int = 128,
    workers: int = 2,
    log_seconds: float = 10.0,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Makes the next pretraining set: texts from the web and synthetic ones as far as the filter keeps them, and the
    human ones (section 3.3, figure 3).

    Call it on every process of `accelerate launch` with the same arguments; on several machines with an `output` that
    all of them see. Killed at any point and called again, it ends with the same files; called on a set that is ready,
    it returns at once. Every record of the sources is read into the set exactly once.

    Args:
        output: folder of the set, new or begun by the same job.
        sources: what is read; images of `"web"` sources are captioned and their texts judged, `"human"` ones are
            taken over.
        captioner: proposes a synthetic text for each image; None for none ("filter only").
        text_filter: judges web and synthetic texts; None keeps all of them ("captioner only").
        settings: what else decides the set; part of it, as are the models and the sources.
        limits: which records are usable; more bad ones than it allows stop the job.
        batch_size: images at a time. Not a setting: texts don't depend on it.
        text_batch_size: texts that the filter compares at a time.
        workers: threads that decode and resize; 0 for none.
        log_seconds: time between lines about the progress.
        say: where the first process says how it goes; None for the log.

    Returns:
        The summary, which is also `_capfilt/summary.json`.

    Raises:
        SettingsChanged: the folder was begun with other settings, models or data.
        ErrorRateExceeded: too many bad records.
        JobError: another process failed, the models differ between processes, or the folder holds something else.
        ValueError: no sources, or a value out of range.
    """
    job = _Job(
        Path(output),
        sources,
        captioner,
        text_filter,
        settings or CapFiltSettings(),
        limits or RecordLimits(),
        Pace(batch_size, text_batch_size, workers),
    )
    return job.run(log_seconds, say or logger.info)


@dataclass
class TextVerdict:
    """A text of a record and what became of it.

    Attributes:
        text, origin: the text, and `"web"`, `"synthetic"` or `"human"`.
        seed: it was sampled with; None if it was not.
        score: None where there was no filter, or nothing to ask it.
        reason: `""` for a text that is kept, else why not.
    """

    text: str
    origin: str
    seed: int | None = None
    score: Score | None = None
    reason: str = ""


@dataclass
class _Record:
    """A record of a unit whose image can be read."""

    row: Mapping[str, Any]
    place: int
    content: bytes
    picture: Image.Image | None
    texts: list[TextVerdict] = field(default_factory=list)
    thumbnail: str | None = None


@dataclass
class _Batch:
    records: list[_Record]
    captioner: dict[str, Any] | None
    filter: dict[str, Any] | None
    report: RecordReport


class _Job:
    def __init__(
        self,
        output: Path,
        sources: Sequence[Source],
        captioner: Captioner | None,
        text_filter: TextFilter | None,
        settings: CapFiltSettings,
        limits: RecordLimits,
        pace: Pace,
    ) -> None:
        if not sources:
            raise ValueError("there are no sources: give at least one of images and texts")
        self.output, self.settings, self.limits, self.pace = output, settings, limits, pace
        self.captioner, self.filter = captioner, text_filter
        self.sources = _numbered(sources)
        self.ledger = Ledger(output)
        # Fast tokenizers must not be used from two threads at once.
        self._processing = Lock()

    def recorded(self) -> dict[str, Any]:
        """All that decides the set, as it stands in `settings.json`."""
        sizes = {name: getattr(self.limits, name) for name in ("max_pixels", "max_bytes", "max_aspect_ratio")}
        return {
            "sources": [source.settings() for source in self.sources],
            "captioner": None if self.captioner is None else self.captioner.recorded(),
            "filter": None if self.filter is None else self.filter.recorded(),
            **asdict(self.settings),
            **sizes,
        }

    def run(self, log_seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
        rank, world_size = world()
        recorded = self.recorded()
        # One exchange at the start and none later: processes end at different times.
        everyone = gather_lists([(secrets.token_hex(4), recorded)])
        run = everyone[0][0]
        if any(other != everyone[0][1] for _, other in everyone):
            raise JobError("the processes were started with different models, data or settings")
        refused: BaseException | None = None
        if rank == 0:
            try:
                self.ledger.begin(recorded)
                self.ledger.refresh()
                self._check_inputs()
            except Exception as error:
                refused = error
        first = gather_lists([None if refused is None else str(refused)])[0]
        if refused is not None:
            raise refused
        if first is not None:
            raise JobError(f"the first process stopped: {first}")
        self.ledger.refresh()
        summary = self.ledger.folder / "summary.json"
        if next(self.ledger.missing(self.sources, self.settings.unit_size), None) is None and summary.is_file():
            return self._finish(rank, say, "nothing to do: the set is ready")
        try:
            self._work(rank, world_size, Progress(self.ledger, self.sources, log_seconds, say if rank == 0 else None))
            self.ledger.wait(self.sources, self.settings.unit_size, run)
        except BaseException as error:
            if not isinstance(error, JobError):
                self.ledger.fail(run, rank, error)
            raise
        return self._finish(rank, say, "done")

    def _work(self, rank: int, world_size: int, progress: Progress) -> None:
        account = RecordAccount(self.limits)
        account.total.merge(self.ledger.totals().report, self.limits.max_examples)
        account.total.check(self.limits)
        with ExitStack() as stack:
            for part in (self.captioner, self.filter):
                if part is not None:
                    stack.enter_context(evaluating(part.model))
            if self.captioner is not None:
                stack.enter_context(prompts_end_together(self.captioner.model, self.captioner.processor))
            pool = stack.enter_context(ThreadPoolExecutor(max(1, self.pace.workers)))
            for source in self.sources:
                for unit in source.units(self.settings.unit_size, rank, world_size, self.ledger.done):
                    entry = self._unit(source, unit, pool, progress)
                    self.ledger.finish_unit(entry)
                    # After the unit is safe: with a higher limit the job goes on behind it.
                    account.add(entry.report)
                    progress.unit(entry)

    def _unit(self, source: Source, unit: Unit, pool: ThreadPoolExecutor, progress: Progress) -> UnitEntry:
        started = time.perf_counter()
        name = str(unit.name)
        records: list[_Record] = []
        report = RecordReport()
        batches = self._prepared(source, unit, pool)
        while window := list(islice(batches, _WINDOW)):
            if source.origin != HUMAN:
                self._caption(unit.name, window)
                self._judge(window)
            for batch in window:
                report.merge(batch.report, self.limits.max_examples)
                for record in batch.records:
                    record.picture = None
                    records.append(record)
            progress.records(sum(batch.report.seen for batch in window))
        rows = [row for record in records if (row := self._row(unit.name, source, record)) is not None]
        return UnitEntry(
            name=name,
            last=unit.last,
            inputs=inputs_hash(unit.rows),
            report=report,
            texts=_counted(records),
            images=len(rows),
            files=self._write(name, source, records, rows),
            seconds=round(time.perf_counter() - started, 3),
        )

    def _prepared(self, source: Source, unit: Unit, pool: ThreadPoolExecutor) -> Iterator[_Batch]:
        """The batches of a unit in order, prepared ahead of time by the threads of the pool."""
        shown = sampled(unit.name, len(unit.rows), sample_size(self.settings.gallery, unit.name))
        parts = [
            (source, unit, shown, list(part)) for part in chunks(range(len(unit.rows)), self.pace.batch_size)
        ]  # fmt: skip
        if not self.pace.workers:
            yield from (self._prepare(*part) for part in parts)
            return
        waiting: deque[Future[_Batch]] = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(self._prepare, *part))
                if len(waiting) > 2 * self.pace.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _prepare(self, source: Source, unit: Unit, shown: frozenset[int], places: list[int]) -> _Batch:
        records: list[_Record] = []
        report = RecordReport()
        for place in places:
            row = unit.rows[place]
            try:
                record = self._read(source, row, unit.start + place)
            except BadRecord as error:
                report.add_bad(error, *_named(row, unit.start + place), self.limits.max_examples)
                continue
            if place in shown:
                record.thumbnail = thumbnail(record.picture)
            records.append(record)
        captioner = filtered = None
        if source.origin != HUMAN and records:
            records, captioner, filtered = self._inputs(records, report, unit.start)
        report.add_good(len(records))
        return _Batch(records, captioner, filtered, report)

    def _read(self, source: Source, row: Mapping[str, Any], place: int) -> _Record:
        problem = problem_of(row)
        if problem is not None and not (problem.reason.startswith("text_") and self._captions(source)):
            raise problem
        content = stored_bytes(row.get("image"), self.limits)
        picture = decode_image(row.get("image") if content is None else content, self.limits)
        record = _Record(row, place, png_bytes(picture) if content is None else content, picture)
        bad: BadRecord | None = None
        for value in texts_of(row.get("text")):
            try:
                record.texts.append(TextVerdict(usable_text(value), source.origin))
            except BadRecord as error:
                bad = bad or error
                record.texts.append(TextVerdict("", source.origin, reason=error.reason))
        _drop_duplicates(record.texts)
        if not any(not text.reason for text in record.texts) and not self._captions(source):
            raise bad or problem or BadRecord("text_missing")
        return record

    def _captions(self, source: Source) -> bool:
        return self.captioner is not None and source.origin != HUMAN

    def _inputs(
        self, records: list[_Record], report: RecordReport, start: int
    ) -> tuple[list[_Record], dict[str, Any] | None, dict[str, Any] | None]:
        """Inputs of both models. A record that a processor fails on is left out and counted."""
        try:
            return records, *self._model_inputs(records)
        except Exception:
            logger.debug("a processor failed on a batch; trying its records one by one", exc_info=True)
        usable = []
        for record in records:
            try:
                self._model_inputs([record])
                usable.append(record)
            except Exception as error:
                bad = BadRecord("processor_failed", f"{type(error).__name__}: {error}")
                report.add_bad(bad, *_named(record.row, record.place), self.limits.max_examples)
        return usable, *(self._model_inputs(usable) if usable else (None, None))

    def _model_inputs(self, records: list[_Record]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        pictures = [record.picture for record in records]
        with self._processing:
            captioner = None if self.captioner is None else self.captioner.inputs(pictures)
            filtered = None if self.filter is None else self.filter.inputs(pictures)
        return captioner, filtered

    def _caption(self, name: UnitName, window: Sequence[_Batch]) -> None:
        """Adds the synthetic texts."""
        if self.captioner is None:
            return
        sampling = self.captioner.settings.method == "nucleus"
        samples = range(self.captioner.settings.samples)
        for batch in window:
            if not batch.records:
                continue
            named = [(name.origin, name.source, name.shard, record.place) for record in batch.records]
            seeds = [[sampling_seed(self.settings.seed, own, sample) for sample in samples] for own in named]
            for record, texts, own in zip(batch.records, self.captioner(batch.captioner, seeds), seeds, strict=True):
                for text, seed in zip(texts, own, strict=True):
                    verdict = TextVerdict(text, SYNTHETIC, seed if sampling else None)
                    try:
                        usable_text(text)
                    except BadRecord as error:
                        verdict.text, verdict.reason = "", error.reason
                    record.texts.append(verdict)
                _drop_duplicates(record.texts)

    def _judge(self, window: Sequence[_Batch]) -> None:
        """Scores the texts of several batches together, sorted by length."""
        if self.filter is None:
            return
        batches = [batch for batch in window if batch.records]
        records = [record for batch in batches for record in batch.records]
        asked = [(number, text) for number, record in enumerate(records) for text in record.texts if not text.reason]
        if not asked:
            return
        scores = self.filter.scores(
            [self.filter.embed(batch.filter) for batch in batches],
            [number for number, _ in asked],
            [text.text for _, text in asked],
            self.pace.text_batch_size,
        )
        for (_, text), score in zip(asked, scores, strict=True):
            text.score, text.reason = score, self.filter.verdict(score)

    def _row(self, name: UnitName, source: Source, record: _Record) -> dict[str, Any] | None:
        """The row of the set, None if no text of the record is kept."""
        kept = [text for text in record.texts if not text.reason]
        if not kept:
            return None
        where, key = _named(record.row, record.place)
        own = record.row.get("image_id")
        place = f"{name.origin}-{name.source}-{name.shard}-{record.place}"
        judge = None if self.filter is None else self.filter.fingerprint
        writer = None if self.captioner is None else self.captioner.fingerprint
        return {
            "image": {"bytes": record.content, "path": None},
            "text": [text.text for text in kept],
            "image_id": place if own is None else self._image_id(source, own),
            "source": where,
            "key": key,
            "origin": [text.origin for text in kept],
            "itm": [text.score and text.score.itm for text in kept],
            "itc": [text.score and text.score.itc for text in kept],
            "sampling_seed": [text.seed for text in kept],
            "captioner": [writer if text.origin == SYNTHETIC else None for text in kept],
            "filter": [judge if text.score is not None else None for text in kept],
        }

    def _image_id(self, source: Source, own: Any) -> str:
        # Two data sets may both have an image 42.
        return str(own) if len(self.sources) == 1 else f"{source.origin}{source.number}:{own}"

    def _write(
        self, name: str, source: Source, records: list[_Record], rows: list[dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The files of a unit: the data, every text with its verdict, and records for the gallery."""
        files = {}
        if rows:
            path = self.output / f"train-{name}{suffix(self.settings.format)}"
            files[path] = write_pairs(path, rows, self.settings.format)
        if records:
            path = self.ledger.texts / f"{name}.parquet"
            files[path] = write_table(path, [row for record in records for row in _text_rows(record)], TEXT_FEATURES)
        shown = [
            GalleryRecord.of(name, record.place, _named(record.row, record.place)[1], record.thumbnail, record.texts)
            for record in records
            if record.thumbnail is not None
        ]
        if shown:
            write_json(self.ledger.gallery / f"{name}.json", [one.as_dict() for one in shown])
        return {
            path.relative_to(self.output).as_posix(): {"bytes": size, "sha256": digest}
            for path, (size, digest) in files.items()
        }

    def _check_inputs(self) -> None:
        """Compares the first done unit of each source with what is there to be read now.

        Raises:
            SettingsChanged: the source holds other records.
        """
        for source in self.sources:
            name = UnitName(source.origin, source.number, 0, 0)
            if not self.ledger.done(name):
                continue
            unit = next(source.units(self.settings.unit_size, 0, 1, lambda _: False), None)
            found = inputs_hash([] if unit is None else unit.rows)
            if found != self.ledger.entries[str(name)].inputs:
                where = source.description.get("data", f"{source.origin} source {source.number}")
                raise SettingsChanged(
                    f"{self.output} was begun from other data: the first records of {where} are not those that "
                    f"unit {name} was made of. Continue with the first data, or give a new folder"
                )

    def _finish(self, rank: int, say: Callable[[str], None], word: str) -> dict[str, Any]:
        """The summary, the page and the card; each process can make them, the first one does."""
        totals = self.ledger.totals(self.limits.max_examples)
        totals.report.check(self.limits, final=True)
        summary = write_summary(self.ledger, self.recorded(), totals, write=rank == 0)
        if rank == 0:
            if self.settings.gallery:
                write_gallery(self.output / "gallery.html", self.ledger, summary, self.settings.gallery)
            self.ledger.clean()
            say(f"{word}\n{summary['text']}")
        return summary


def _numbered(sources: Sequence[Source]) -> list[Source]:
    counts = {WEB: 0, HUMAN: 0}
    numbered = []
    for source in sources:
        numbered.append(Source(source.rows, source.origin, source.description, counts[source.origin]))
        counts[source.origin] += 1
    return numbered


def _named(row: Mapping[str, Any], place: int) -> tuple[str, str]:
    key = row.get("key")
    return str(row.get("source") or "rows"), str(place if key is None else key)


def inputs_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the keys and texts of rows; pictures are not read for it."""
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(repr((row.get("key"), texts_of(row.get("text")))).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _drop_duplicates(texts: list[TextVerdict]) -> None:
    """Of texts that differ in nothing but case and blanks the first one stays."""
    seen = set()
    for text in texts:
        if text.reason:
            continue
        plain = " ".join(text.text.casefold().split())
        if plain in seen:
            text.reason = "duplicate"
        seen.add(plain)


def _counted(records: Sequence[_Record]) -> dict[str, Counts]:
    counted: dict[str, Counts] = {}
    for record in records:
        for text in record.texts:
            counts = counted.setdefault(text.origin, Counts())
            counts.seen += 1
            if text.reason:
                counts.dropped[text.reason] += 1
            else:
                counts.kept += 1
            if text.score is not None:
                # Probabilities lie in [0, 1], cosines in [-1, 1].
                share = text.score.itm if text.score.itm is not None else (text.score.itc + 1) / 2
                if not math.isnan(share):
                    counts.histogram[min(BINS - 1, int(share * BINS))] += 1
    return counted


def _text_rows(record: _Record) -> Iterator[dict[str, Any]]:
    where, key = _named(record.row, record.place)
    own = record.row.get("image_id")
    for text in record.texts:
        yield {
            "source": where,
            "key": key,
            "image_id": None if own is None else str(own),
            "text": text.text,
            "origin": text.origin,
            "kept": not text.reason,
            "reason": text.reason,
            "itm": text.score and text.score.itm,
            "itc": text.score and text.score.itc,
            "sampling_seed": text.seed,
        }


__all__ = ["CapFiltSettings", "TextVerdict", "capfilt", "inputs_hash"]
