"""Ten thousand records of which most are hostile: none lost uncounted, no crash, no hang."""

from collections import Counter
from typing import Any

import pytest
from torch.utils.data import DataLoader

from hf_vlp.data import ErrorRateExceeded, ImageTextCollator, PairDataset, RecordLimits
from tests.data.fakes import TinyProcessor
from tests.data.hostile import encoded, picture, unusable_images, unusable_texts, usable_images

COUNT = 10_000


def hostile_rows() -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows in a fixed mixture, and how many there are of each reason (`"good"` for the usable ones)."""
    good_image = encoded(picture(), "JPEG")
    kinds: list[tuple[Any, Any, str]] = [(image, "a red circle", "good") for image in usable_images().values()]
    kinds += [(image, "a red circle", reason) for image, reason in unusable_images().values()]
    kinds += [(good_image, text, reason) for text, reason in unusable_texts().values()]
    kinds += [(good_image, "poison", "processor_failed")]
    rows, expected = [], Counter()
    for number in range(COUNT):
        # Stepping by a prime through the kinds mixes them within every batch.
        image, text, reason = kinds[number * 31 % len(kinds)]
        rows.append({"image": image, "text": text, "image_id": number, "source": "hostile", "key": str(number)})
        expected[reason] += 1
    assert len(kinds) == len({number * 31 % len(kinds) for number in range(len(kinds))})
    return rows, expected


@pytest.mark.parametrize("workers", [0, 2])
def test_none_is_lost_uncounted(workers: int) -> None:
    rows, expected = hostile_rows()
    collator = ImageTextCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=1))
    good = 0
    ids = set()
    loader = DataLoader(
        PairDataset(rows), batch_size=100, num_workers=workers, collate_fn=collator, timeout=60 * bool(workers)
    )
    for batch in loader:
        batch = collator.collect(batch)
        good += len(batch["pixel_values"])
        ids.update(batch["image_ids"].tolist())
    assert good == len(ids) == expected.pop("good")
    assert collator.report.seen == COUNT
    assert collator.report.bad == expected
    assert good + sum(expected.values()) == COUNT
    for reason in expected:
        assert collator.report.examples[reason]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_default_limits_stop_such_a_run(workers: int) -> None:
    rows, _ = hostile_rows()
    collator = ImageTextCollator(TinyProcessor())
    with pytest.raises(ErrorRateExceeded, match="image_truncated"):
        for batch in DataLoader(PairDataset(rows), batch_size=100, num_workers=workers, collate_fn=collator):
            collator.collect(batch)
