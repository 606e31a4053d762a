"""VisDial: candidate answers put in order. R@k, MRR, mean rank and NDCG, as the official evaluation defines them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_vlp.data.tasks import DialogCollator, TaskDataset
from hf_vlp.data.tasks.collators import candidates_of
from hf_vlp.evaluation.images import column, rows_of
from hf_vlp.evaluation.recall import check_not_nan
from hf_vlp.evaluation.results import write_json
from hf_vlp.evaluation.runtime import is_main
from hf_vlp.evaluation.task_batches import score_records

DEPTHS = (1, 5, 10)


def right_rank(scores: Tensor, right: int) -> int:
    """Place of the right candidate, 1 for the first. Candidates that score as high as it come before it.

    Args:
        scores: (C,) higher is better.
        right: position of the right candidate.
    """
    check_not_nan(scores)
    return 1 + int((scores >= scores[right]).sum()) - 1


def order_of(scores: Tensor) -> list[int]:
    """Place of every candidate, 1 to C; of equal ones the first in the list comes first."""
    places = torch.empty(len(scores), dtype=torch.long)
    places[scores.argsort(descending=True, stable=True)] = torch.arange(1, len(scores) + 1)
    return places.tolist()


def sparse_metrics(ranks: Sequence[int]) -> dict[str, float]:
    """`recall_at_1`, `_5`, `_10`, `mrr` (mean of 1 / rank) and `mean_rank` of the right answers' places.

    Raises:
        ValueError: no ranks.
    """
    if not ranks:
        raise ValueError("no ranks: the metrics of dialogs need at least one turn")
    metrics = {f"recall_at_{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in DEPTHS}
    metrics["mrr"] = sum(1 / rank for rank in ranks) / len(ranks)
    return metrics | {"mean_rank": sum(ranks) / len(ranks)}


def ndcg(scores: Sequence[float] | Tensor, relevance: Sequence[float] | Tensor) -> float | None:
    """Normalised discounted cumulative gain of one turn: DCG@k of the order by score over that of the best order.

    k is the number of candidates with any relevance, and DCG@k the sum over the first k places of the relevance
    divided by log2(place + 1), as the official code of VisDial has it. Of candidates with equal scores the less
    relevant come first, so that equal scores for all are not worth more than chance.

    Returns:
        A number in [0, 1], or None where no candidate is relevant (the official code divides by zero there).

    Raises:
        ValueError: numbers that do not fit, or a relevance that is negative or not a number.
    """
    scored = torch.as_tensor(scores, dtype=torch.float64)
    wanted = torch.as_tensor(relevance, dtype=torch.float64)
    if scored.shape != wanted.shape or scored.ndim != 1:
        raise ValueError(f"{scored.numel()} scores for {wanted.numel()} relevances: give one for each candidate")
    check_not_nan(scored)
    if not bool((wanted >= 0).all()):
        raise ValueError("a relevance is negative or not a number")
    k = int((wanted != 0).sum())
    if k == 0:
        return None
    by_relevance = wanted.argsort(stable=True)
    order = by_relevance[scored[by_relevance].argsort(descending=True, stable=True)]
    discounts = torch.log2(torch.arange(k, dtype=torch.float64) + 2)
    gain = (wanted[order[:k]] / discounts).sum()
    return float(gain / (wanted.sort(descending=True).values[:k] / discounts).sum())


def dialog_metrics(
    scores: Sequence[Sequence[float] | Tensor],
    right: Sequence[int],
    relevance: Sequence[Sequence[float] | None] | None = None,
) -> dict[str, float]:
    """`sparse_metrics` over turns, and `ndcg` over those that have relevances.

    Args:
        scores: of the candidates of each turn.
        right: position of the right candidate of each.
        relevance: of the candidates of each turn, None where nobody judged it.
    """
    if len(scores) != len(right):
        raise ValueError(f"{len(scores)} turns with scores, {len(right)} with a right answer")
    tensors = [torch.as_tensor(one, dtype=torch.float64) for one in scores]
    metrics = sparse_metrics([right_rank(one, position) for one, position in zip(tensors, right)])
    judged = [
        value
        for one, wanted in zip(tensors, relevance or ())
        if wanted is not None and len(wanted) and (value := ndcg(one, wanted)) is not None
    ]
    if judged:
        metrics["ndcg"] = sum(judged) / len(judged)
    return metrics


def evaluate_dialog(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    ranks_file: str | Path | None = None,
    max_bad_rate: float = 0.0,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Scores the candidates of every turn of every dialog.

    Args:
        model: of the role `dialog`: `candidate_scores(pixel_values, input_ids, attention_mask, candidate_ids,
            candidate_attention_mask, candidates_per_dialog)` gives (C,), higher is better.
        processor: of the model.
        rows: `image`, `caption`, `turns` [{`question`, `answer`, `candidates`, `relevance`?}]; optional `image_id`.
        batch_size: turns at a time, each with all its candidates.
        max_length: most tokens of caption, history and question; older turns are left out above it.
        ranks_file: JSON in the submission format of VisDial, `[{"image_id", "round_id", "ranks"}]`.
        max_bad_rate: share of turns that may be unusable; they are left out and counted.
        limit: use only so many dialogs.
        workers: processes that decode images.
        details: add question, answer, rank and best candidate of every turn.
        show_progress: progress bars on the main process.

    Returns:
        `metrics`: `recall_at_1`, `_5`, `_10`, `mrr` in [0, 1], `mean_rank` from 1, and `ndcg` over the turns with
        relevances; and `samples`.

    Raises:
        ValueError: no rows, a missing column, dialogs without candidates.
    """
    rows = rows_of(rows, limit)
    column(rows, "turns")
    records = TaskDataset(rows, "dialog", all_turns=True)

    def score(batch: dict[str, Any]) -> list[list[float]]:
        batch.pop("labels")
        scores = model.candidate_scores(**batch).float().cpu()
        return [one.tolist() for one in scores.split(batch["candidates_per_dialog"].tolist())]

    scored, skipped = score_records(
        model,
        records,
        DialogCollator,
        processor,
        score,
        batch_size=batch_size,
        workers=workers,
        description="turns",
        show_progress=show_progress,
        max_length=max_length,
    )
    skipped.what = "turns"
    skipped.check(max_bad_rate)
    # Without the images, which have been decoded once already.
    light = rows.remove_columns("image") if hasattr(rows, "remove_columns") else rows
    places = [(light[records.row_of(position)], records.turn_of(position)) for position, _ in scored]
    turns = [row["turns"][number] for row, number in places]
    listed = [candidates_of(turn) for turn in turns]
    right = [position for _, position in listed]
    relevance = [turn.get("relevance") or None for turn in turns]
    for turn, (candidates, _), judged in zip(turns, listed, relevance):
        if judged is not None and len(judged) != len(candidates):
            raise ValueError(
                f"question {turn['question']!r} has {len(judged)} relevances for {len(candidates)} candidates"
            )
    scores = [torch.tensor(values) for _, values in scored]
    metrics = dialog_metrics(scores, right, relevance)
    if ranks_file is not None and is_main():
        written = [
            {"image_id": _number(row.get("image_id")), "round_id": number + 1, "ranks": order_of(one)}
            for (row, number), one in zip(places, scores)
        ]
        write_json(written, ranks_file)
    judged_turns = sum(one is not None for one in relevance)
    result: dict[str, Any] = {
        "task": "dialog",
        "metrics": metrics,
        "samples": {"dialogs": len(rows), "turns": len(scored), "judged_turns": judged_turns, **skipped.summary()},
    }
    if details:
        result["details"] = [
            {
                "question": turn["question"],
                "answer": turn["answer"],
                "rank": right_rank(one, position),
                "best": candidates[int(one.argmax())],
            }
            for turn, (candidates, position), one in zip(turns, listed, scores)
        ]
    return result


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value
