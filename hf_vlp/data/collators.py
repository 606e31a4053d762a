"""From records to a batch: decodes, augments, runs the processor, leaves out what cannot be used."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from .hashing import image_id_hash
from .images import decode_image
from .pairs import ImageTransform, problem_of
from .records import BadRecord, RecordAccount, RecordLimits, RecordReport, usable_text

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Batch = dict[str, Any]
REPORT_KEY = "record_report"
_NO_LENGTH = 1_000_000


class RecordCollator:
    """What the collators share: the usable records of a list, and the account of the others.

    `collect` is to be called on every batch in the process that trains. Without it the limits hold in each worker
    for itself; with it they hold for the run, and `report` is complete.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        limits: RecordLimits | None = None,
        transform: ImageTransform | None = None,
        prepare: Callable[[Batch, list[Record]], Batch] | None = None,
        background: tuple[int, int, int] | None = None,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.limits = limits or RecordLimits()
        self.transform, self.prepare, self.background = transform, prepare, background
        self._account = RecordAccount(self.limits)

    @property
    def report(self) -> RecordReport:
        """The account so far: everything that this process has collated or collected."""
        return self._account.total

    def __call__(self, records: Sequence[Record]) -> Batch:
        """Makes a batch of the usable records.

        Returns:
            The tensors of the class' description and, under `"record_report"`, the account of this batch; only the
            account if no record is usable.

        Raises:
            ErrorRateExceeded: more bad records in this process than `limits` allow.
        """
        report = RecordReport()
        kept, images, texts = [], [], []
        for record in records:
            try:
                image, text = self._read(record)
            except BadRecord as error:
                report.add_bad(error, *_name(record), self.limits.max_examples)
                continue
            kept.append(record)
            images.append(image)
            texts.append(text)
        batch: Batch = {}
        if kept:
            batch, kept = self._process(kept, images, texts, report)
        report.add_good(len(kept))
        if kept:
            batch = {name: value for name, value in batch.items() if name in self.keys}
            if self.gives_image_ids and all("image_id" in record for record in kept):
                ids = [image_id_hash(record["image_id"]) for record in kept]
                batch["image_ids"] = torch.tensor(ids, dtype=torch.int64)
            if self.prepare is not None:
                batch = self.prepare(batch, kept)
        batch[REPORT_KEY] = report
        self._account.add(report)
        return batch

    def collect(self, batch: Batch) -> Batch:
        """Takes the account out of a batch and adds it to `report`, unless it was counted in this process already.

        Returns:
            The same dict, without `"record_report"`; empty if no record was usable.

        Raises:
            ErrorRateExceeded: more bad records, over all workers, than `limits` allow.
        """
        report = batch.pop(REPORT_KEY, None)
        if report is not None and report.origin != os.getpid():
            self._account.add(report)
        return batch

    keys: frozenset[str] = frozenset()
    gives_image_ids = True

    def _encode(self, images: list[Any], texts: list[Any]) -> Mapping[str, Any]:
        raise NotImplementedError

    def _read(self, record: Record) -> tuple[Any, Any]:
        problem = problem_of(record)
        if problem is not None:
            raise problem
        text = usable_text(record.get("text"))
        return self._picture(record), text

    def _picture(self, record: Record, role: str = "image", seed: int | None = None) -> Image.Image:
        """The decoded picture of a record, changed by its augmentation."""
        image = decode_image(record.get(role), self.limits, self.background)
        transform = record.get("transform") or self.transform
        if transform is not None:
            image = transform(image, record.get("seed", 0) if seed is None else seed)
        return image

    def _process(
        self, kept: list[Record], images: list[Any], texts: list[Any], report: RecordReport
    ) -> tuple[Batch, list[Record]]:
        try:
            return dict(self._encode(images, texts)), kept
        except Exception as failure:
            # One record can spoil the batch for the others: find out which, each on its own.
            usable = []
            for position, record in enumerate(kept):
                try:
                    self._encode(images[position : position + 1], texts[position : position + 1])
                except Exception as error:
                    if len(kept) == 1:
                        raise
                    report.add_bad(
                        BadRecord("processor_failed", f"{type(error).__name__}: {error}"),
                        *_name(record),
                        self.limits.max_examples,
                    )
                else:
                    usable.append(position)
            # No record works, or each works alone: then it is not the records.
            if not usable or len(usable) == len(kept):
                raise failure
        encoded = self._encode([images[position] for position in usable], [texts[position] for position in usable])
        return dict(encoded), [kept[position] for position in usable]


class ImageTextCollator(RecordCollator):
    """Pairs for contrastive, matching and captioning objectives of one text encoder.

    A batch holds `pixel_values` (B, 3, H, W) float, `input_ids` (B, L) and `attention_mask` (B, L) int64 padded to the
    longest text of the batch, `image_ids` (B,) int64 if every record has an `image_id`, and `record_report`.

    Args:
        processor: called as `processor(images=…, text=…, padding="longest", truncation=…, return_tensors="pt")`.
        max_length: most tokens of a text; the tokenizer's own limit if left out.
        limits: which records are usable and how many may not be.
        transform: augmentation `(PIL image, seed) -> PIL image` of records that bring none of their own.
        prepare: called last with the batch and its records, returns the batch (to add or replace entries).
        background: colour behind transparent pixels; None ignores transparency, see `decode_image`.
    """

    keys = frozenset({"pixel_values", "input_ids", "attention_mask"})

    def _encode(self, images: list[Image.Image], texts: list[str]) -> Mapping[str, Any]:
        longest = self.max_length or tokenizer_limit(self.processor)
        return self.processor(
            images=images,
            text=texts,
            padding="longest",
            truncation=longest is not None,
            max_length=longest,
            return_tensors="pt",
        )


class CaptioningCollator(RecordCollator):
    """Pairs for a language model that says the text given the image.

    A batch holds what `processor.training_inputs` makes: `pixel_values`, `input_ids` with the image tokens in front,
    `attention_mask`, `labels` (-100 on image, prompt and padding), and `image_ids`, `record_report` as above.

    Args:
        processor: has `training_inputs(images, texts, prompt, max_length)`.
        prompt: words in front of every text that are read but not learned.
        max_length, limits, transform, prepare, background: as in `ImageTextCollator`.

    Raises:
        TypeError: the processor has no `training_inputs`.
    """

    keys = frozenset(
        {"pixel_values", "input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask"}
    )

    def __init__(self, processor: Any, *, prompt: str = "", max_length: int | None = None, **options: Any) -> None:
        if not hasattr(processor, "training_inputs"):
            raise TypeError(
                f"{type(processor).__name__} has no training_inputs(images, texts, prompt, max_length); captioning "
                f"needs a processor of a generative model, such as hf_vlp's Blip2Processor"
            )
        super().__init__(processor, max_length=max_length, **options)
        self.prompt = prompt

    def _encode(self, images: list[Image.Image], texts: list[str]) -> Mapping[str, Any]:
        return self.processor.training_inputs(images, texts, prompt=self.prompt, max_length=self.max_length)


def _name(record: Record) -> tuple[str, str]:
    return str(record.get("source", "rows")), str(record.get("key", record.get("index", "?")))


def tokenizer_limit(processor: Any) -> int | None:
    limit = getattr(getattr(processor, "tokenizer", None), "model_max_length", None)
    return limit if limit is not None and limit < _NO_LENGTH else None
