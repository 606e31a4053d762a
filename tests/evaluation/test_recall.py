import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vlp.evaluation.recall import ranks_from_scores, recall_at, recalls, top_k


@st.composite
def scored_queries(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with many ties, and at least one right candidate a query."""
    queries, candidates = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    size = queries * candidates
    scores = draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    right = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    positives = torch.tensor(right).view(queries, candidates)
    for query in range(queries):
        positives[query, draw(st.integers(0, candidates - 1))] = True
    return torch.tensor(scores).float().view(queries, candidates), positives


@settings(deadline=None)
@given(scored_queries())
def test_ranks_by_the_worst_order_that_ties_allow(case: tuple[torch.Tensor, torch.Tensor]):
    scores, positives = case
    for query, rank in enumerate(ranks_from_scores(scores, positives).tolist()):
        # Sort by score, and among equal scores put the wrong candidates first; wrong ones before the best right one
        # are its rank, since captions of the same image do not displace each other.
        order = sorted(range(scores.shape[1]), key=lambda c: (-scores[query, c].item(), bool(positives[query, c])))
        assert rank == next(place for place, candidate in enumerate(order) if positives[query, candidate])


@settings(deadline=None)
@given(scored_queries(), st.integers(1, 8))
def test_top_k_is_a_stable_sort(case: tuple[torch.Tensor, torch.Tensor], k: int):
    scores, _ = case
    k = min(k, scores.shape[1])
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    assert torch.equal(top_k(scores, k), expected)


def test_equal_scores_recall_nothing():
    ranks = ranks_from_scores(torch.zeros(3, 20), torch.eye(3, 20, dtype=torch.bool))
    assert ranks.tolist() == [19, 19, 19]
    assert recalls(ranks) == {"r1": 0.0, "r5": 0.0, "r10": 0.0, "mean": 0.0}


def test_recalls_by_hand():
    ranks = torch.tensor([0, 3, 7, 40])
    assert recalls(ranks) == pytest.approx({"r1": 0.25, "r5": 0.5, "r10": 0.75, "mean": 0.5})
    assert recall_at(ranks, 41) == 1.0


def test_not_a_number_is_refused():
    # NaN is not greater than anything: without the check it would push everything else to the first place.
    scores = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        ranks_from_scores(scores, torch.tensor([[True, False]]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="query 1 has no right candidate"):
        ranks_from_scores(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="must both be"):
        ranks_from_scores(torch.zeros(2, 2), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="k=0"):
        recall_at(torch.tensor([1]), 0)
    with pytest.raises(ValueError, match="no ranks"):
        recall_at(torch.tensor([]), 1)
