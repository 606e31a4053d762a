"""Accounts of bad records add up, stop a run at the right moment, and name what they counted."""

import logging
import pickle

import pytest

from hf_vlp.data import BadRecord, ErrorRateExceeded, RecordLimits, RecordReport
from hf_vlp.data.records import REASONS, RecordAccount, usable_text
from tests.data.hostile import unusable_texts


def report(good: int, *reasons: str) -> RecordReport:
    made = RecordReport()
    made.add_good(good)
    for number, reason in enumerate(reasons):
        made.add_bad(BadRecord(reason, f"detail {number}"), "set.tar", f"{number:04}")
    return made


def test_reports_add_up() -> None:
    total = RecordReport()
    for part in (report(3, "text_empty", "image_empty"), report(2), report(0, "text_empty")):
        total.merge(pickle.loads(pickle.dumps(part)))
    assert (total.seen, total.good, total.bad_total) == (8, 5, 3)
    assert total.bad == {"text_empty": 2, "image_empty": 1}
    assert total.bad_rate == 3 / 8
    assert total.as_dict() == {
        "records_seen": 8,
        "records_bad": 3,
        "records_bad_image_empty": 1,
        "records_bad_text_empty": 2,
    }


def test_the_rate_is_judged_from_min_records_on() -> None:
    limits = RecordLimits(max_bad_rate=0.1, min_records=20)
    account = RecordAccount(limits)
    account.add(report(9, *["text_empty"] * 10))
    with pytest.raises(ErrorRateExceeded):
        account.add(report(0, "text_empty"))


def test_exactly_the_accepted_rate_is_accepted() -> None:
    limits = RecordLimits(max_bad_rate=0.1, min_records=10)
    account = RecordAccount(limits)
    account.add(report(9, "text_empty"))
    with pytest.raises(ErrorRateExceeded):
        account.add(report(0, "text_empty"))


def test_zero_stops_at_the_first_and_one_never() -> None:
    with pytest.raises(ErrorRateExceeded):
        RecordAccount(RecordLimits(max_bad_rate=0)).add(report(1, "text_empty"))
    RecordAccount(RecordLimits(max_bad_rate=1, min_records=1)).add(report(0, *["text_empty"] * 50))


def test_the_last_word_judges_few_records_too() -> None:
    few = report(1, "text_empty")
    few.check(RecordLimits())
    with pytest.raises(ErrorRateExceeded):
        few.check(RecordLimits(), final=True)


def test_the_error_names_reasons_and_records() -> None:
    with pytest.raises(ErrorRateExceeded) as caught:
        RecordAccount(RecordLimits(max_bad_rate=0)).add(report(5, "image_truncated", "text_empty"))
    message = str(caught.value)
    for expected in ("2 of 7", "max_bad_rate", "image_truncated", REASONS["image_truncated"], "set.tar [0000]"):
        assert expected in message
    # What a DataLoader does to bring it over from a worker.
    assert str(ErrorRateExceeded(message)) == message


def test_the_log_names_the_first_and_counts_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    account = RecordAccount(RecordLimits(max_bad_rate=1, max_examples=2))
    with caplog.at_level(logging.WARNING, logger="hf_vlp.data.records"):
        for _ in range(1000):
            account.add(report(0, "text_empty"))
    lines = [record.getMessage() for record in caplog.records]
    assert sum("set.tar [0000]: text_empty" in line for line in lines) == 2
    assert [line.split(": ")[1] for line in lines[2:]] == [
        "10 of 10 records",
        "100 of 100 records",
        "1000 of 1000 records",
    ]
    assert account.total.bad == {"text_empty": 1000}
    assert len(account.total.examples["text_empty"]) == 2


@pytest.mark.parametrize(
    "wrong",
    [{"max_bad_rate": 1.5}, {"max_bad_rate": -0.1}, {"min_records": 0}, {"max_pixels": 0}, {"max_examples": -1}],
)
def test_limits_that_make_no_sense(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RecordLimits(**wrong)


def test_reasons_are_a_fixed_list() -> None:
    with pytest.raises(ValueError, match="REASONS"):
        BadRecord("bad_luck")


@pytest.mark.parametrize("name", [name for name in unusable_texts() if name not in ("no_texts", "only_none")])
def test_unusable_texts_give_their_reason(name: str) -> None:
    value, reason = unusable_texts()[name]
    with pytest.raises(BadRecord) as caught:
        usable_text(value)
    assert caught.value.reason == reason


def test_usable_texts_lose_only_the_blanks_around_them() -> None:
    assert usable_text("  a  red circle \n") == "a  red circle"
    assert usable_text("红色的圆") == "红色的圆"
