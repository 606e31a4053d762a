"""Batches of the tasks, and what each collator leaves out."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_vlp.data import (
    DialogCollator,
    ErrorRateExceeded,
    RecordLimits,
    VisualEntailmentCollator,
    VisualReasoningCollator,
    VQACollator,
    load_task,
    task_records,
)
from hf_vlp.data.collators import REPORT_KEY
from tests.data.fakes import TinyProcessor
from tests.data.hostile import encoded, picture

LENIENT = RecordLimits(max_bad_rate=1)
IMAGE = encoded(picture(), "PNG")
PAIR = {"pixel_values", "input_ids", "attention_mask"}


class AnsweringProcessor(TinyProcessor):
    """With answers, and with texts alone."""

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        if options.get("return_tensors") is None:
            return {"input_ids": [one.split() for one in text]}
        batch = super().__call__(images or [Image.new("RGB", (8, 8))] * len(text), text, **options)
        return batch if images else {name: batch[name] for name in ("input_ids", "attention_mask")}

    def encode_answers(self, answers: list[str], *, max_length: int | None = None, return_tensors: str = "pt") -> Any:
        batch = self(text=answers, padding="longest", truncation=max_length is not None, max_length=max_length,
                     return_tensors=return_tensors)  # fmt: skip
        return {"labels": batch["input_ids"], "labels_attention_mask": batch["attention_mask"]}


def record(**values: Any) -> dict:
    return {"image": IMAGE, "source": "set", "key": "7", "seed": 0, **values}


def left_out(batch: dict) -> dict:
    return dict(batch[REPORT_KEY].bad)


def test_answers_stand_one_after_another_with_the_share_of_people() -> None:
    collator = VQACollator(AnsweringProcessor(), limits=LENIENT)
    batch = collator(
        [
            record(question="what color is it", answers=["red"] * 7 + [" red ", "dark red", None]),
            record(question="how many", answers=["2", "two"], weights=[0.25, 2.0], image_id="x"),
            record(question="is it", answers=[]),
            record(question="is it", answers=[" ", None]),
            record(question="is it", answers=["yes"], weights=[1.0, 1.0]),
            record(question="is it", answers=["yes"], weights=[float("nan")]),
            record(question=" ", answers=["yes"]),
            record(question="is it", answers=["yes"], image=b""),
        ]
    )
    assert set(batch) == PAIR | {
        "labels", "labels_attention_mask", "answers_per_question", "answer_weights", REPORT_KEY,
    }  # fmt: skip
    assert batch["input_ids"].shape == (2, 4) and batch["labels"].shape == (4, 2)
    assert batch["answers_per_question"].tolist() == [2, 2]
    assert batch["answer_weights"].tolist() == pytest.approx([8 / 9, 1 / 9, 0.25, 2.0])
    assert batch["labels_attention_mask"].sum(1).tolist() == [1, 2, 1, 1]
    assert left_out(batch) == {"answers_missing": 2, "weights_wrong": 2, "text_empty": 1, "image_empty": 1}


def test_a_processor_without_answers_is_refused() -> None:
    with pytest.raises(TypeError, match="no encode_answers"):
        VQACollator(TinyProcessor())


class Stamped:
    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (seed % 256, image.width, 0))


def test_two_images_a_statement() -> None:
    good = {"image_0": IMAGE, "image_1": encoded(Image.new("RGB", (9, 9)), "PNG"), "text": "both are red"}
    collator = VisualReasoningCollator(AnsweringProcessor(), limits=LENIENT)
    batch = collator(
        [
            {**good, "label": 1, "transform": Stamped(), "seed": 5},
            {**good, "label": "False"},
            {**good, "label": True, "image_0": None, "image_1": None, "images": [good["image_0"], good["image_1"]]},
            {**good, "label": 2},
            {**good, "label": None},
            {**good, "label": 1, "image_2": IMAGE},
            {"images": [IMAGE] * 3, "text": "x", "label": 0},
            {**good, "label": 1, "image_1": b"<html>"},
            {**good, "label": 1, "text": ["a", "b"]},
        ]
    )
    assert set(batch) == PAIR | {"labels", REPORT_KEY}
    assert batch["pixel_values"].shape == (3, 2, 3, 8, 8)
    assert batch["labels"].tolist() == [1, 0, 1]
    # The second image differs from the first, each with a seed of its own.
    stamps = batch["pixel_values"][0, :, :2, 0, 0]
    assert stamps[0, 0] != stamps[1, 0] and stamps[1, 1] == 9
    assert torch.equal(batch["pixel_values"][1], batch["pixel_values"][2])
    assert left_out(batch) == {
        "label_outside": 1,
        "label_missing": 1,
        "image_count": 2,
        "image_not_an_image": 1,
        "text_not_string": 1,
    }
    examples = batch[REPORT_KEY].examples
    assert "two images, not 3" in examples["image_count"][1].detail
    assert "2 is none of 0 to 1" in examples["label_outside"][0].detail


def test_hypotheses_with_labels() -> None:
    collator = VisualEntailmentCollator(AnsweringProcessor(), limits=LENIENT)
    batch = collator(
        [
            record(text="a dog", label=2, image_id="5"),
            record(text=["a cat"], label="neutral"),
            record(text="x", label=3),
            record(text="x", label=-1),
            record(text="x", label="maybe"),
            record(text="x"),
            record(text="x", label=1, problem="record_unparsable: x"),
        ]
    )
    assert set(batch) == PAIR | {"labels", REPORT_KEY} and batch["labels"].tolist() == [2, 1]
    assert left_out(batch) == {"label_outside": 3, "label_missing": 1, "record_unparsable": 1}
    two = VisualEntailmentCollator(AnsweringProcessor(), labels=("no", "yes"), limits=LENIENT)
    assert two([record(text="x", label="yes"), record(text="x", label=2)])["labels"].tolist() == [1]


TURNS = [
    {"question": "what animal", "answer": "a dog", "candidates": ["a cat", "a dog", "a cow"]},
    {"question": "is it big", "answer": "no", "candidates": ["no", "yes"]},
]


def test_candidates_stand_one_after_another() -> None:
    collator = DialogCollator(AnsweringProcessor(40), limits=LENIENT)
    batch = collator(
        [
            record(caption="in a park", turns=TURNS, turn_index=0),
            record(caption="in a park", turns=TURNS),
            record(caption="c", turns=[]),
            record(caption="c", turns=[{**TURNS[0], "candidates": None}]),
            record(caption="c", turns=[{**TURNS[0], "answer": "a pig"}]),
            record(caption=None, turns=TURNS),
            record(caption="c", turns=[{**TURNS[0], "answer": None}, TURNS[1]], turn_index=1),
        ]
    )
    assert set(batch) == PAIR | {
        "candidate_ids", "candidate_attention_mask", "candidates_per_dialog", "labels", REPORT_KEY,
    }  # fmt: skip
    # "in a park. what animal?" and "in a park. what animal? a dog. is it big?"
    assert batch["attention_mask"].sum(1).tolist() == [5, 10]
    assert batch["candidates_per_dialog"].tolist() == [3, 2]
    assert batch["labels"].tolist() == [0, 1, 0, 1, 0]
    assert batch["candidate_attention_mask"].sum(1).tolist() == [2, 2, 2, 1, 1]
    assert left_out(batch) == {
        "turns_missing": 1,
        "candidates_missing": 1,
        "candidates_wrong": 1,
        "text_missing": 1,
        "turns_wrong": 1,
    }
    (example,) = batch[REPORT_KEY].examples["turns_wrong"]
    assert example.detail == "turn 0, which later ones follow: text_missing"


def test_wrong_candidates_are_drawn_by_the_records_seed() -> None:
    collator = DialogCollator(AnsweringProcessor(40), negatives=1)
    drawn = set()
    for seed in range(20):
        batches = [collator([record(caption="c", turns=TURNS, turn_index=0, seed=seed)]) for _ in range(2)]
        assert torch.equal(batches[0]["candidate_ids"], batches[1]["candidate_ids"])
        assert batches[0]["labels"].tolist() == [1, 0]
        drawn.add(tuple(batches[0]["candidate_ids"][1].tolist()))
    assert len(drawn) == 2
    with pytest.raises(ValueError, match="negatives=0"):
        DialogCollator(AnsweringProcessor(), negatives=0)


def test_a_long_history_loses_its_oldest_turns() -> None:
    turns = [{"question": f"q{i}", "answer": f"a{i}", "candidates": [f"a{i}", "no"]} for i in range(9)]
    ids = {}
    for limit in (40, 8):
        collator = DialogCollator(AnsweringProcessor(), max_length=limit)
        ids[limit] = collator([record(caption="c", turns=turns)])["input_ids"][0].tolist()
    # Caption, eight turns of two, question; then caption, the last three turns, question.
    assert len(ids[40]) == 18 and len(ids[8]) == 8
    assert ids[8] == [ids[40][0], *ids[40][-7:]]
    limited = AnsweringProcessor(40)
    limited.max_words = 6
    assert DialogCollator(limited)([record(caption="c", turns=turns)])["input_ids"].shape[1] == 6


@pytest.mark.parametrize(
    ("task", "collator"),
    [
        ("vqa", VQACollator),
        ("visual_reasoning", VisualReasoningCollator),
        ("visual_entailment", VisualEntailmentCollator),
        ("dialog", DialogCollator),
    ],
)
def test_workers_change_nothing(task: str, collator: type) -> None:
    records = task_records(task, load_task(task, "shapes", size=12), seed=2)
    batches = []
    for workers in (0, 2):
        made = collator(AnsweringProcessor(64))
        loader = DataLoader(records, batch_size=5, num_workers=workers, collate_fn=made)
        batches.append([made.collect(batch) for batch in loader])
        assert made.report.good == 12
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_too_many_bad_labels_stop_the_run() -> None:
    collator = VisualEntailmentCollator(AnsweringProcessor(), limits=RecordLimits(max_bad_rate=0.1, min_records=4))
    with pytest.raises(ErrorRateExceeded, match="label_outside.*the label is none of the task's classes"):
        collator([record(text="x", label=7)] * 4)
