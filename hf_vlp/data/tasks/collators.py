"""From records of a task to a batch. What a record lacks is found here, counted and named, like a broken image."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..collators import Record, RecordCollator, tokenizer_limit
from ..columns import ENTAILMENT, STATEMENTS
from ..hashing import stable_hash
from ..pairs import problem_of
from ..records import BadRecord, usable_text
from ..rows import label_number
from .dialogs import fitted_text, history_of


class _TaskCollator(RecordCollator):
    """What the collators of tasks share: a text and something to learn beside it."""

    gives_image_ids = False

    def _read(self, record: Record) -> tuple[Any, Any]:
        problem = problem_of(record)
        if problem is not None:
            raise problem
        # Texts first: they cost less to look at than pictures.
        text = self._text(record)
        return self._images(record), text

    def _images(self, record: Record) -> Any:
        return self._picture(record)

    def _text(self, record: Record) -> Any:
        raise NotImplementedError

    def _inputs(self, images: list[Image.Image], texts: list[str]) -> dict[str, Any]:
        longest = self.max_length or tokenizer_limit(self.processor)
        made = self.processor(
            images=images,
            text=texts,
            padding="longest",
            truncation=longest is not None,
            max_length=longest,
            return_tensors="pt",
        )
        return {name: made[name] for name in ("pixel_values", "input_ids", "attention_mask")}


class VQACollator(_TaskCollator):
    """Questions with their answers, weighted.

    A batch holds `pixel_values` (B, 3, H, W) float, `input_ids` and `attention_mask` (B, L) of the questions, `labels`
    and `labels_attention_mask` (A, La) of all answers one after another, `answers_per_question` (B,),
    `answer_weights` (A,) float, and `record_report`.

    A record has `question` and `answers`; with `weights`, one for each answer, the answers are taken as they are.
    Without, equal answers become one, and an answer weighs the share of people who gave it (ALBEF, section 5).

    Args:
        processor: called as by `ImageTextCollator`; and `encode_answers(answers, max_length=…)` gives `labels` and
            `labels_attention_mask`.
        max_answer_length: most tokens of an answer, special ones included.
        max_length, limits, transform, prepare, background: as in `ImageTextCollator`.

    Raises:
        TypeError: the processor has no `encode_answers`.
    """

    keys = frozenset(
        {
            "pixel_values",
            "input_ids",
            "attention_mask",
            "labels",
            "labels_attention_mask",
            "answers_per_question",
            "answer_weights",
        }
    )

    def __init__(self, processor: Any, *, max_answer_length: int | None = None, **options: Any) -> None:
        if not hasattr(processor, "encode_answers"):
            raise TypeError(
                f"{type(processor).__name__} has no encode_answers(answers, max_length); answering questions needs "
                f"the processor of a model that decodes answers, such as ALBEF's or BLIP's"
            )
        super().__init__(processor, **options)
        self.max_answer_length = max_answer_length

    def _text(self, record: Record) -> tuple[str, list[str], list[float]]:
        return usable_text(record.get("question")), *weighted_answers(record.get("answers"), record.get("weights"))

    def _encode(self, images: list[Image.Image], texts: list[tuple[str, list[str], list[float]]]) -> Mapping[str, Any]:
        batch = self._inputs(images, [question for question, _, _ in texts])
        answers = [answer for _, given, _ in texts for answer in given]
        encoded = self.processor.encode_answers(answers, max_length=self.max_answer_length, return_tensors="pt")
        batch["labels"] = encoded["labels"]
        batch["labels_attention_mask"] = encoded["labels_attention_mask"]
        batch["answers_per_question"] = torch.tensor([len(given) for _, given, _ in texts])
        batch["answer_weights"] = torch.tensor([weight for _, _, weights in texts for weight in weights])
        return batch


class VisualReasoningCollator(_TaskCollator):
    """Statements about two images (NLVR2).

    A batch holds `pixel_values` (B, 2, 3, H, W) float, `input_ids`, `attention_mask` (B, L), `labels` (B,) 1 = true,
    and `record_report`. Each of the two images is augmented with a seed of its own.

    Args:
        processor, max_length, limits, transform, prepare, background: as in `ImageTextCollator`.
    """

    keys = frozenset({"pixel_values", "input_ids", "attention_mask", "labels"})

    def _text(self, record: Record) -> tuple[str, int]:
        extra = [name for name in record if name.startswith("image_") and name[6:].isdecimal() and int(name[6:]) > 1]
        listed = record.get("images")
        number = len(listed) if listed is not None else 2 + sum(record[name] is not None for name in extra)
        if number != 2:
            raise BadRecord("image_count", f"a statement is about two images, not {number}")
        return usable_text(_single(record.get("text"))), _label(record, STATEMENTS.labels)

    def _images(self, record: Record) -> tuple[Image.Image, Image.Image]:
        if record.get("images") is not None:
            record = {**record, "image_0": record["images"][0], "image_1": record["images"][1]}
        seed = record.get("seed", 0)
        first = self._picture(record, "image_0", stable_hash("image", 0, seed))
        return first, self._picture(record, "image_1", stable_hash("image", 1, seed))

    def _encode(
        self, images: list[tuple[Image.Image, Image.Image]], texts: list[tuple[str, int]]
    ) -> Mapping[str, Any]:
        batch = self._inputs([image for pair in images for image in pair], [text for text, _ in texts])
        batch["pixel_values"] = batch["pixel_values"].unflatten(0, (len(images), 2))
        batch["labels"] = torch.tensor([label for _, label in texts])
        return batch


class VisualEntailmentCollator(_TaskCollator):
    """Images with hypotheses (SNLI-VE).

    A batch holds `pixel_values` (B, 3, H, W) float, `input_ids`, `attention_mask` (B, L), `labels` (B,), and
    `record_report`.

    Args:
        labels: names of the classes in the order of the model's outputs.
        processor, max_length, limits, transform, prepare, background: as in `ImageTextCollator`.
    """

    keys = frozenset({"pixel_values", "input_ids", "attention_mask", "labels"})

    def __init__(self, processor: Any, *, labels: Sequence[str] = ENTAILMENT.labels, **options: Any) -> None:
        super().__init__(processor, **options)
        self.labels = tuple(labels)

    def _text(self, record: Record) -> tuple[str, int]:
        return usable_text(_single(record.get("text"))), _label(record, self.labels)

    def _encode(self, images: list[Image.Image], texts: list[tuple[str, int]]) -> Mapping[str, Any]:
        batch = self._inputs(images, [text for text, _ in texts])
        batch["labels"] = torch.tensor([label for _, label in texts])
        return batch


class DialogCollator(_TaskCollator):
    """One turn each of dialogs with candidate answers (VisDial).

    A batch holds `pixel_values` (B, 3, H, W) float, `input_ids`, `attention_mask` (B, L) of caption, history and
    question, `candidate_ids`, `candidate_attention_mask` (C, Lc) of all candidates one after another,
    `candidates_per_dialog` (B,), `labels` (C,) 1 = the right answer, and `record_report`.

    A record has `caption`, `turns` and `turn_index` (the last turn if left out). Of a history that is too long for
    `max_length`, or for the tokenizer's limit with the longest candidate behind it, the oldest turns are left out.

    Args:
        negatives: wrong candidates that are drawn by the record's seed, for training; None takes all candidates in
            their order, as evaluation does.
        max_candidate_length: most tokens of a candidate.
        processor, max_length, limits, transform, prepare, background: as in `ImageTextCollator`.

    Raises:
        ValueError: `negatives` below 1.
    """

    keys = frozenset(
        {
            "pixel_values",
            "input_ids",
            "attention_mask",
            "candidate_ids",
            "candidate_attention_mask",
            "candidates_per_dialog",
            "labels",
        }
    )

    def __init__(
        self, processor: Any, *, negatives: int | None = None, max_candidate_length: int | None = None, **options: Any
    ) -> None:
        if negatives is not None and negatives < 1:
            raise ValueError(f"negatives={negatives}: at least one wrong candidate, or None for all")
        super().__init__(processor, **options)
        self.negatives, self.max_candidate_length = negatives, max_candidate_length

    def _text(self, record: Record) -> tuple[str, list[str], int]:
        turns = record.get("turns")
        if not turns:
            raise BadRecord("turns_missing")
        number = record.get("turn_index")
        number = len(turns) - 1 if number is None else number
        question = usable_text(turns[number].get("question"))
        caption = usable_text(_single(record.get("caption")))
        history = history_of(turns, number)
        candidates, right = candidates_of(turns[number])
        if self.negatives is not None:
            wrong = [position for position in range(len(candidates)) if position != right]
            seed = record.get("seed", 0)
            wrong = sorted(wrong, key=lambda position: stable_hash("candidate", seed, position))[: self.negatives]
            # The right answer first: nothing reads the order, and the labels say which it is.
            candidates, right = [candidates[right], *(candidates[position] for position in wrong)], 0
        limit = self.max_length or self._room_beside(candidates)
        return fitted_text(caption, history, question, partial(self._fits, limit=limit)), candidates, right

    def _room_beside(self, candidates: list[str]) -> int | None:
        """Tokens of caption, history and question when a candidate is read behind them."""
        limit = tokenizer_limit(self.processor)
        if limit is None:
            return None
        longest = max(len(ids) for ids in self.processor(text=candidates, return_tensors=None)["input_ids"])
        return limit - min(longest, self.max_candidate_length or longest)

    def _fits(self, text: str, limit: int | None) -> bool:
        """Whether neither the tokenizer nor the processor would cut a text."""
        words = getattr(self.processor, "max_words", None)
        if words is not None and len(text.replace("-", " ").replace("/", " ").split()) > words:
            return False
        return limit is None or len(self.processor(text=[text], return_tensors=None)["input_ids"][0]) <= limit

    def _encode(self, images: list[Image.Image], texts: list[tuple[str, list[str], int]]) -> Mapping[str, Any]:
        batch = self._inputs(images, [text for text, _, _ in texts])
        candidates = [candidate for _, listed, _ in texts for candidate in listed]
        longest = self.max_candidate_length or tokenizer_limit(self.processor)
        encoded = self.processor(
            text=candidates,
            padding="longest",
            truncation=longest is not None,
            max_length=longest,
            return_tensors="pt",
        )
        batch["candidate_ids"] = encoded["input_ids"]
        batch["candidate_attention_mask"] = encoded["attention_mask"]
        batch["candidates_per_dialog"] = torch.tensor([len(listed) for _, listed, _ in texts])
        batch["labels"] = torch.tensor(
            [int(position == right) for _, listed, right in texts for position in range(len(listed))]
        )
        return batch


def weighted_answers(answers: Any, weights: Any = None) -> tuple[list[str], list[float]]:
    """Answers to learn and how much each weighs.

    Args:
        answers: strings; those that are None or blank do not count.
        weights: one for each, or None for the share of people who gave the answer.

    Raises:
        BadRecord: no answer, or weights that do not fit.
    """
    if isinstance(answers, str):
        answers = [answers]
    listed = list(answers or ())
    if weights is not None and list(weights):
        weights = list(weights)
        wrong = [one for one in weights if one is None or not math.isfinite(one) or one < 0]
        if len(weights) != len(listed) or wrong or not any(weights):
            raise BadRecord("weights_wrong", f"{len(weights)} weights for {len(listed)} answers: {weights}"[:80])
        return [usable_text(answer) for answer in listed], [float(one) for one in weights]
    given = [answer.strip() for answer in listed if isinstance(answer, str) and answer.strip()]
    if not given:
        raise BadRecord("answers_missing", "is it a test split?" if not listed else f"{len(listed)} blank ones")
    different = list(dict.fromkeys(usable_text(answer) for answer in given))
    return different, [given.count(answer) / len(given) for answer in different]


def candidates_of(turn: Mapping[str, Any]) -> tuple[list[str], int]:
    """The candidate answers of a turn and the position of the right one (of equal ones, the first).

    Raises:
        BadRecord: there are no candidates, or the answer is not among them.
    """
    candidates = list(turn.get("candidates") or ())
    if not candidates:
        raise BadRecord("candidates_missing", f"question {str(turn.get('question'))[:40]!r}")
    answer = usable_text(turn.get("answer"))
    listed = [usable_text(candidate) for candidate in candidates]
    if answer not in listed:
        raise BadRecord("candidates_wrong", f"the answer {answer[:40]!r} is none of the {len(listed)} candidates")
    return listed, listed.index(answer)


def _label(record: Record, names: tuple[str, ...]) -> int:
    value = record.get("label")
    if value is None:
        raise BadRecord("label_missing")
    number, problem = label_number(value, names)
    if number is None:
        raise BadRecord("label_outside", str(problem).partition(": ")[2])
    return number


def _single(text: Any) -> Any:
    """A text that stands alone in a list."""
    return text[0] if isinstance(text, list | tuple) and len(text) == 1 else text
