"""NLVR2: is a statement true of two images? Accuracy and consistency, as the official evaluation counts them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_vlp.data.columns import STATEMENTS
from hf_vlp.data.rows import label_number
from hf_vlp.data.tasks import TaskDataset, VisualReasoningCollator
from hf_vlp.evaluation.images import column, rows_of
from hf_vlp.evaluation.results import write_text
from hf_vlp.evaluation.runtime import is_main
from hf_vlp.evaluation.task_batches import Unlabelled, argmax, labels_given, score_records
from hf_vlp.evaluation.vqa_scores import mean_by


def consistency(right: Sequence[bool], groups: Sequence[Any]) -> float:
    """Share of groups (statements with all their pairs of images) in which every prediction is right.

    Args:
        right: of each prediction.
        groups: which statement it is about; in NLVR2 the identifier without its third part.

    Raises:
        ValueError: no predictions, or numbers that do not fit.
    """
    if len(right) != len(groups) or not right:
        raise ValueError(f"{len(right)} predictions for {len(groups)} groups: give one group for each, at least one")
    whole: dict[Any, bool] = {}
    for one, group in zip(right, groups):
        whole[group] = whole.get(group, True) and bool(one)
    return sum(whole.values()) / len(whole)


def evaluate_visual_reasoning(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    predictions_file: str | Path | None = None,
    max_bad_rate: float = 0.0,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Judges every statement.

    Args:
        model: of the role `visual_reasoning`: `forward(pixel_values, input_ids, attention_mask).logits`, class 1 is
            true.
        processor: of the model.
        rows: `image_0`, `image_1`, `text`, `label`; optional `sentence_id`, `identifier`, `statement_type`.
        batch_size: statements at a time.
        max_length: most tokens of a statement.
        predictions_file: lines `identifier,True` as the official evaluation reads them.
        max_bad_rate: share of records that may be unusable; they are left out and counted.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add identifier, text, label, prediction and probability of every statement.
        show_progress: progress bars on the main process.

    Returns:
        `metrics` in [0, 1]: `accuracy`, and `consistency` where the data says which rows share a statement;
        `per_statement_type` where it has types; and `samples`.

    Raises:
        ValueError: no rows, a missing column, or neither labels nor a `predictions_file`.
    """
    rows = rows_of(rows, limit)
    labels = column(rows, "label", required=False)
    labelled = labels_given(labels)
    if not labelled and predictions_file is None:
        raise ValueError("the data has no labels to score with: give a predictions_file to write what the model says")
    column(rows, "text")
    records: Any = TaskDataset(rows if labelled else Unlabelled(rows), "visual_reasoning")

    def score(batch: dict[str, Any]) -> list[tuple[int, float]]:
        batch.pop("labels")
        logits = model(**batch).logits
        return list(zip(argmax(logits), logits.float().softmax(dim=1)[:, 1].tolist()))

    scored, skipped = score_records(
        model,
        records,
        VisualReasoningCollator,
        processor,
        score,
        batch_size=batch_size,
        workers=workers,
        description="statements",
        show_progress=show_progress,
        max_length=max_length,
    )
    skipped.check(max_bad_rate)
    identifiers = column(rows, "identifier", required=False) or column(rows, "key", required=False)
    identifiers = identifiers or [str(number) for number in range(len(rows))]
    if predictions_file is not None and is_main():
        lines = [f"{identifiers[row]},{bool(prediction)}" for row, (prediction, _) in scored]
        write_text("\n".join(lines) + "\n", predictions_file)

    result: dict[str, Any] = {
        "task": "visual-reasoning",
        "metrics": {},
        "samples": {"statements": len(scored), **skipped.summary()},
    }
    right: list[bool] = []
    if labelled:
        right = [prediction == label_number(labels[row], STATEMENTS.labels)[0] for row, (prediction, _) in scored]
        result["metrics"]["accuracy"] = sum(right) / len(right)
        groups = column(rows, "sentence_id", required=False)
        if groups is not None and any(group is not None for group in groups):
            result["metrics"]["consistency"] = consistency(right, [groups[row] for row, _ in scored])
        types = column(rows, "statement_type", required=False)
        if types is not None:
            result["per_statement_type"] = mean_by([types[row] for row, _ in scored], [float(one) for one in right])
    if details:
        texts = column(rows, "text")
        result["details"] = [
            {
                "identifier": identifiers[row],
                "text": texts[row],
                "label": labels[row] if labelled else None,
                "prediction": prediction,
                "probability": probability,
            }
            for row, (prediction, probability) in scored
        ]
    return result
