import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vlp.evaluation import evaluate_dialog
from hf_vlp.evaluation.dialog import dialog_metrics, ndcg, order_of, right_rank, sparse_metrics
from tests.evaluation.fakes import numbered_image
from tests.evaluation.task_fakes import Scorer, TaskProcessor


def test_ndcg_by_hand():
    # Relevances 0, 1, 0.5, 0 have k = 2. Ordered c, a, b, d the first two gain 0.5 / log2(2) + 0; the best order gains
    # 1 / log2(2) + 0.5 / log2(3).
    relevance = [0.0, 1.0, 0.5, 0.0]
    best = 1 + 0.5 / math.log2(3)
    assert ndcg([2.0, 1.0, 3.0, 0.0], relevance) == pytest.approx(0.5 / best)
    # b, c, …: the best order.
    assert ndcg([0.0, 3.0, 2.0, 1.0], relevance) == pytest.approx(1.0)
    # c, b, …: both, the other way round.
    assert ndcg([0.0, 2.0, 3.0, 1.0], relevance) == pytest.approx((0.5 + 1 / math.log2(3)) / best)
    # The relevant ones last: nothing among the first two.
    assert ndcg([3.0, 1.0, 0.0, 2.0], relevance) == 0.0
    # Equal scores: the irrelevant ones come first.
    assert ndcg([1.0] * 4, relevance) == 0.0
    assert ndcg([1.0] * 3, [0.0, 0.3, 0.6]) == pytest.approx((0 + 0.3 / math.log2(3)) / (0.6 + 0.3 / math.log2(3)))
    assert ndcg([1.0, 2.0], [0.0, 0.0]) is None
    for wrong, message in (([1.0], "2 scores for 1"), ([-1.0, 1.0], "negative"), ([math.nan, 1.0], "not a number")):
        with pytest.raises(ValueError, match=message):
            ndcg([1.0, 2.0], wrong)
    with pytest.raises(ValueError, match="NaN"):
        ndcg([math.nan, 2.0], [0.0, 1.0])


def by_the_official_recipe(scores: list[float], relevance: list[float]) -> float:
    """With lists and sorts, for scores without ties."""
    k = sum(value != 0 for value in relevance)
    ranking = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
    best = sorted(relevance, reverse=True)[:k]
    dcg = sum(relevance[i] / math.log2(place + 2) for place, i in enumerate(ranking))
    return dcg / sum(value / math.log2(place + 2) for place, value in enumerate(best))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_ndcg_equals_the_official_recipe(data):
    count = data.draw(st.integers(1, 12))
    scores = [float(place) for place in data.draw(st.permutations(range(count)))]
    relevance = data.draw(st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=count, max_size=count))
    if any(relevance):
        assert ndcg(scores, relevance) == pytest.approx(by_the_official_recipe(scores, relevance))


def test_places():
    scores = torch.tensor([0.3, 0.9, 0.3, 0.1])
    assert right_rank(scores, 1) == 1 and right_rank(scores, 3) == 4
    # A wrong candidate with the same score comes first.
    assert right_rank(scores, 0) == right_rank(scores, 2) == 3
    assert order_of(scores) == [2, 1, 3, 4]
    assert sparse_metrics([1, 2, 10, 11]) == {
        "recall_at_1": 0.25,
        "recall_at_5": 0.5,
        "recall_at_10": 0.75,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11) / 4),
        "mean_rank": 6.0,
    }
    with pytest.raises(ValueError, match="NaN"):
        right_rank(torch.tensor([math.nan, 1.0]), 1)
    with pytest.raises(ValueError, match="no ranks"):
        sparse_metrics([])


CANDIDATES = ["red", "blue", "two"]


def rows() -> list[dict]:
    turns = [
        {"question": "what color", "answer": "blue", "candidates": CANDIDATES, "relevance": [0.0, 1.0, 0.0]},
        {"question": "how many", "answer": "two", "candidates": CANDIDATES, "relevance": None},
    ]
    return [
        {"image": numbered_image(0), "caption": "things", "turns": turns, "image_id": "55"},
        {"image": numbered_image(1), "caption": "more", "turns": turns[:1], "image_id": "56"},
    ]


SCORES = [[0.1, 0.9, 0.5], [0.9, 0.4, 0.6]]


def evaluate(data: list[dict], **options) -> dict:
    return evaluate_dialog(Scorer(SCORES), TaskProcessor(), data, batch_size=2, show_progress=False, **options)


def test_every_turn_is_scored(tmp_path: Path):
    file = tmp_path / "ranks.json"
    result = evaluate(rows(), ranks_file=file, details=True)
    expected = dialog_metrics([SCORES[0], SCORES[0], SCORES[1]], [1, 2, 1], [[0, 1, 0], None, [0, 1, 0]])
    assert result["metrics"] == expected
    assert expected["mean_rank"] == 2.0 and expected["recall_at_1"] == 1 / 3 and expected["ndcg"] == 0.5
    assert result["samples"] == {"dialogs": 2, "turns": 3, "judged_turns": 2, "skipped_turns": 0}
    assert json.loads(file.read_text()) == [
        {"image_id": 55, "round_id": 1, "ranks": [3, 1, 2]},
        {"image_id": 55, "round_id": 2, "ranks": [3, 1, 2]},
        {"image_id": 56, "round_id": 1, "ranks": [1, 3, 2]},
    ]
    assert result["details"][2] == {"question": "what color", "answer": "blue", "rank": 3, "best": "red"}


def test_turns_that_cannot_be_used_are_left_out():
    data = rows()
    data[1]["turns"] = [{**data[1]["turns"][0], "answer": "green"}]
    result = evaluate(data, max_bad_rate=0.5)
    assert result["samples"]["skipped_turns_reasons"] == {"candidates_wrong": 1} and result["samples"]["turns"] == 2
    with pytest.raises(ValueError, match="dialog without candidates"):
        evaluate([{**row, "turns": [{"question": "q", "answer": "a"}]} for row in rows()])
    data = rows()
    data[0]["turns"] = [{**data[0]["turns"][0], "relevance": [1.0]}]
    with pytest.raises(ValueError, match="1 relevances for 3 candidates"):
        evaluate(data)
