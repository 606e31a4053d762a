"""Ranks and Recall@k with one rule for ties: they count against.

The rank of a query is the number of wrong candidates that score at least as high as its best right one. A model that
gives every candidate the same score thus recalls nothing, whatever the order of the data, and a result never depends
on how a sort breaks ties.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks_from_scores(scores: Tensor, positives: Tensor) -> Tensor:
    """Rank of the best right candidate of each query, 0 for the first place.

    Args:
        scores: (Q, C), higher is better.
        positives: (Q, C) bool, True where a candidate is right.

    Returns:
        (Q,) int64.

    Raises:
        ValueError: shapes differ, a score is NaN (it would compare as lower than nothing and rank first), or a query
            has no right candidate.
    """
    if scores.shape != positives.shape or scores.ndim != 2:
        raise ValueError(
            f"scores {tuple(scores.shape)} and positives {tuple(positives.shape)} must both be (queries, candidates)"
        )
    check_not_nan(scores)
    without = (~positives.any(dim=1)).nonzero().flatten()
    if len(without):
        raise ValueError(f"query {int(without[0])} has no right candidate ({len(without)} such queries)")
    best = scores.masked_fill(~positives, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~positives).sum(dim=1)


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of queries whose best right candidate is among the first `k`, in [0, 1].

    Raises:
        ValueError: no ranks, or `k` below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: Recall@k needs k of at least 1")
    if not len(ranks):
        raise ValueError("no ranks: Recall@k needs at least one query")
    return (ranks < k).double().mean().item()


def recalls(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """`{"r1": …, "r5": …, "r10": …, "mean": mean of these}`."""
    values = {f"r{k}": recall_at(ranks, k) for k in ks}
    return values | {"mean": sum(values.values()) / len(values)}


def top_k(scores: Tensor, k: int) -> Tensor:
    """Columns of the `k` greatest scores of each row, in ascending column order; of equal scores, the first columns.

    `torch.topk` leaves open which of several equal scores it returns; this selection is the same on every device.

    Args:
        scores: (Q, C) without NaN.
        k: at most C.

    Returns:
        (Q, k) int64.
    """
    last = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > last, scores == last
    room = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= room))
    return chosen.nonzero()[:, 1].view(len(scores), k)


def check_not_nan(scores: Tensor) -> None:
    """Raises `ValueError` when a score is NaN."""
    if torch.isnan(scores).any():
        bad = int(torch.isnan(scores).sum())
        raise ValueError(
            f"{bad} of {scores.numel()} scores are NaN: the model's outputs are not finite (in half precision, "
            "try bfloat16 or float32)"
        )
