"""Batches of the usable records; accounts of the others, from any number of workers."""

import math
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil, CLIPProcessor

from hf_vlp.data import (
    CaptioningCollator,
    ErrorRateExceeded,
    ImageTextCollator,
    PairDataset,
    RecordLimits,
    TrainTransform,
    image_id_hash,
    load_pairs,
)
from hf_vlp.data.collators import REPORT_KEY
from tests.data.fakes import TinyProcessor
from tests.data.hostile import encoded, picture

GOOD = {"image": encoded(picture(), "PNG"), "text": "a red circle"}
LENIENT = RecordLimits(max_bad_rate=1)


def record(**changes) -> dict:
    return {**GOOD, "source": "set", "key": "7", "seed": 0, **changes}


def test_a_batch_has_the_promised_entries() -> None:
    collator = ImageTextCollator(TinyProcessor())
    batch = collator([record(image_id=5), record(text="a", image_id="x")])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "image_ids", REPORT_KEY}
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].shape == (2, 3)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["image_ids"].dtype == torch.int64
    assert batch["image_ids"].tolist() == [image_id_hash(5), image_id_hash("x")]


def test_image_ids_only_where_all_have_one() -> None:
    assert "image_ids" not in ImageTextCollator(TinyProcessor())([record(image_id=5), record()])


def test_texts_are_cut_at_the_tokenizers_limit_or_at_max_length() -> None:
    long = record(text="word " * 40)
    assert ImageTextCollator(TinyProcessor())([long])["input_ids"].shape == (1, 16)
    assert ImageTextCollator(TinyProcessor(), max_length=5)([long])["input_ids"].shape == (1, 5)
    assert ImageTextCollator(TinyProcessor(int(1e30)))([long])["input_ids"].shape == (1, 40)


def test_bad_records_leave_the_batch_and_are_counted() -> None:
    collator = ImageTextCollator(TinyProcessor(), limits=LENIENT)
    batch = collator(
        [record(), record(image=b""), record(text=" "), record(text=3), record(problem="shard_broken: x")]
    )
    assert len(batch["input_ids"]) == 1
    report = batch[REPORT_KEY]
    assert report.bad == {"image_empty": 1, "text_empty": 1, "text_not_string": 1, "shard_broken": 1}
    assert (report.seen, report.good) == (5, 1)
    assert report.examples["image_empty"][0].source == "set" and report.examples["image_empty"][0].key == "7"


def test_a_batch_without_a_good_record_is_its_account() -> None:
    batch = ImageTextCollator(TinyProcessor(), limits=LENIENT)([record(image=b""), record(text="")])
    assert set(batch) == {REPORT_KEY} and batch[REPORT_KEY].good == 0


def test_the_rate_stops_the_run() -> None:
    collator = ImageTextCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=0.2, min_records=10))
    for _ in range(2):
        collator([record()] * 4 + [record(text="")])
    with pytest.raises(ErrorRateExceeded, match="text_empty"):
        collator([record()] * 4 + [record(text="")] * 2)


def test_a_record_that_the_processor_refuses_spoils_only_itself() -> None:
    collator = ImageTextCollator(TinyProcessor(), limits=LENIENT)
    batch = collator([record(), record(text="poison"), record(text="b")])
    assert len(batch["input_ids"]) == 2
    assert batch[REPORT_KEY].bad == {"processor_failed": 1}
    assert "poison" in batch[REPORT_KEY].examples["processor_failed"][0].detail


def test_a_processor_that_refuses_everything_is_not_the_records_fault() -> None:
    collator = ImageTextCollator(TinyProcessor(), limits=LENIENT)
    for size in (1, 3):
        with pytest.raises(KeyError, match="poison"):
            collator([record(text="poison")] * size)


def test_good_batches_cost_one_call_of_the_processor() -> None:
    processor = TinyProcessor()
    ImageTextCollator(processor, limits=LENIENT)([record()] * 8 + [record(text="")])
    assert processor.calls == 1


def test_prepare_has_the_last_word() -> None:
    def prepare(batch: dict, records: list[dict]) -> dict:
        return {**batch, "keys": [one["key"] for one in records]}

    batch = ImageTextCollator(TinyProcessor(), prepare=prepare, limits=LENIENT)(
        [record(key="a"), record(text=""), record(key="b")]
    )
    assert batch["keys"] == ["a", "b"]


def test_captioning_takes_what_the_processor_makes() -> None:
    batch = CaptioningCollator(TinyProcessor(), prompt="a photo of", max_length=5)([record(), record(text="x")])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "labels", REPORT_KEY}
    assert batch["input_ids"].shape == (2, 5)
    assert (batch["labels"][1] == -100).tolist() == [False] * 4 + [True]
    with pytest.raises(TypeError, match="training_inputs"):
        CaptioningCollator(object())


class Stamped:
    """A transform that writes the seed into the picture."""

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (seed % 256, 0, 0))


def test_a_records_own_transform_wins() -> None:
    collator = ImageTextCollator(TinyProcessor(), transform=lambda image, seed: Image.new("RGB", (8, 8)))
    batch = collator([record(), record(transform=Stamped(), seed=513)])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing_but_the_time(workers: int) -> None:
    rows = load_pairs("shapes", size=40)
    dataset = PairDataset(rows, seed=3, transform=TrainTransform(8, scale=(0.3, 1.0), flip=0.5, color_jitter=0.3))
    dataset.set_epoch(1)
    expected = ImageTextCollator(TinyProcessor())([dataset[index] for index in range(40)])
    loader = DataLoader(dataset, batch_size=10, num_workers=workers, collate_fn=ImageTextCollator(TinyProcessor()))
    pixels = torch.cat([batch["pixel_values"] for batch in loader])
    assert torch.equal(pixels, expected["pixel_values"])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_record_is_counted_once(workers: int) -> None:
    records = [record(key=str(number), text="" if number % 4 == 0 else "a") for number in range(100)]
    collator = ImageTextCollator(TinyProcessor(), limits=LENIENT)
    good = 0
    for batch in DataLoader(records, batch_size=7, num_workers=workers, collate_fn=collator):
        batch = collator.collect(batch)
        assert REPORT_KEY not in batch
        good += len(batch.get("input_ids", ()))
    assert good == 75
    assert (collator.report.seen, collator.report.good) == (100, 75)
    assert collator.report.bad == {"text_empty": 25}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rate_stops_the_run_from_any_process(workers: int) -> None:
    records = [record(text="" if number % 2 else "a") for number in range(200)]
    collator = ImageTextCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=0.4, min_records=20))
    with pytest.raises(ErrorRateExceeded, match="text_empty"):
        for batch in DataLoader(records, batch_size=5, num_workers=workers, collate_fn=collator):
            collator.collect(batch)


def test_the_rate_is_that_of_all_workers_together() -> None:
    # Each worker alone sees too few records to judge.
    records = [record(text="") for _ in range(16)]
    collator = ImageTextCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=0.4, min_records=12))
    with pytest.raises(ErrorRateExceeded):
        for batch in DataLoader(records, batch_size=4, num_workers=2, collate_fn=collator):
            collator.collect(batch)


class Fatal(Dataset):
    """Kills the worker that reads record 5."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return record()


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="worker"):
        list(DataLoader(Fatal(), batch_size=4, num_workers=2, collate_fn=ImageTextCollator(TinyProcessor())))
    assert time.monotonic() - started < 60


def test_a_real_processor() -> None:
    from hf_vlp.data import flatten_texts, train_bert_tokenizer

    rows = load_pairs("shapes", size=12)
    tokenizer = train_bert_tokenizer(flatten_texts(rows)[0], max_length=12)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    batch = ImageTextCollator(CLIPProcessor(images, tokenizer))([PairDataset(rows)[index] for index in range(12)])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "image_ids", REPORT_KEY}
    assert batch["pixel_values"].shape == (12, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].shape[1] <= 12
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]


def test_the_crop_stays_inside_and_has_the_drawn_area() -> None:
    transform = TrainTransform(16, scale=(0.2, 0.5))
    for width, height in ((64, 64), (10, 200), (1, 1), (300, 3)):
        for seed in range(50):
            left, top, right, bottom = transform._crop(width, height, np.random.Generator(np.random.Philox(key=seed)))
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            if width == height == 64:
                assert 0.2 * 64**2 - 64 <= (right - left) * (bottom - top) <= 0.5 * 64**2 + 64
                assert math.log(3 / 4) - 0.1 <= math.log((right - left) / (bottom - top)) <= math.log(4 / 3) + 0.1


def test_augmentation_is_a_function_of_the_seed() -> None:
    transform = TrainTransform(16, scale=(0.2, 1), flip=0.5, color_jitter=0.4)
    image = picture()
    state = np.random.get_state()[1].copy()
    made = [transform(image, seed).tobytes() for seed in (1, 2, 1)]
    assert made[0] == made[2] != made[1]
    assert (np.random.get_state()[1] == state).all()
    assert TrainTransform(48, scale=(1, 1), ratio=(1, 1))(image, 5).tobytes() == image.tobytes()
    for seed in range(8):
        flipped = TrainTransform(48, scale=(1, 1), ratio=(1, 1), flip=1.0)(image, seed)
        assert flipped.tobytes() == image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"size": 8, "scale": (0, 1)}, {"size": 8, "flip": 2}, {"size": 8, "ratio": (2, 1)}]
)
def test_transforms_that_make_no_sense(wrong: dict) -> None:
    with pytest.raises(ValueError, match="|".join(wrong)):
        TrainTransform(**wrong)
