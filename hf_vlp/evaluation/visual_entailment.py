"""SNLI-VE: does an image entail a text, contradict it, or leave it open? Accuracy."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_vlp.data.columns import ENTAILMENT
from hf_vlp.data.rows import label_number
from hf_vlp.data.tasks import TaskDataset, VisualEntailmentCollator
from hf_vlp.evaluation.images import column, rows_of
from hf_vlp.evaluation.task_batches import argmax, labels_given, score_records
from hf_vlp.evaluation.vqa_scores import mean_by


def label_accuracy(
    predictions: Sequence[int], labels: Sequence[int], names: Sequence[str] = ENTAILMENT.labels
) -> dict[str, Any]:
    """`accuracy` over all, and `per_label` over those of each class that occurs.

    Raises:
        ValueError: no predictions, numbers that do not fit, or a number that is no class.
    """
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels: give as many, at least one")
    for what, values in (("prediction", predictions), ("label", labels)):
        wrong = [value for value in values if not 0 <= value < len(names)]
        if wrong:
            raise ValueError(f"{what} {wrong[0]} is none of 0 to {len(names) - 1} ({', '.join(names)})")
    right = [prediction == label for prediction, label in zip(predictions, labels)]
    per_label = {}
    for number, name in enumerate(names):
        own = [one for one, label in zip(right, labels) if label == number]
        if own:
            per_label[name] = sum(own) / len(own)
    return {"accuracy": sum(right) / len(right), "per_label": per_label}


def evaluate_visual_entailment(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    max_bad_rate: float = 0.0,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Classifies every pair of an image and a hypothesis.

    Args:
        model: of the role `visual_entailment`: `forward(pixel_values, input_ids, attention_mask).logits`. Its classes
            are those of `config.id2label` where that names contradiction, neutral and entailment, in this order
            otherwise.
        processor: of the model.
        rows: `image`, `text`, `label` (0 contradiction, 1 neutral, 2 entailment, or the names); optional
            `hypothesis_type`.
        batch_size: pairs at a time.
        max_length: most tokens of a hypothesis.
        max_bad_rate: share of records that may be unusable; they are left out and counted.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add text, label and prediction of every pair.
        show_progress: progress bars on the main process.

    Returns:
        `metrics` in [0, 1]: `accuracy`; `per_label`, and `per_hypothesis_type` where the data has types; `samples`.

    Raises:
        ValueError: no rows, a missing column, no labels.
    """
    rows = rows_of(rows, limit)
    labels = column(rows, "label")
    if not labels_given(labels):
        raise ValueError("the data has no labels to score with: name another split")
    names = ENTAILMENT.labels
    order = _order(model)
    records = TaskDataset(rows, "visual_entailment")

    def score(batch: dict[str, Any]) -> list[int]:
        batch.pop("labels")
        return [order[number] for number in argmax(model(**batch).logits)]

    scored, skipped = score_records(
        model,
        records,
        VisualEntailmentCollator,
        processor,
        score,
        batch_size=batch_size,
        workers=workers,
        description="hypotheses",
        show_progress=show_progress,
        max_length=max_length,
    )
    skipped.check(max_bad_rate)
    wanted = [int(label_number(labels[row], names)[0]) for row, _ in scored]  # type: ignore[arg-type]
    predictions = [prediction for _, prediction in scored]
    scores = label_accuracy(predictions, wanted, names)
    result: dict[str, Any] = {
        "task": "visual-entailment",
        "metrics": {"accuracy": scores["accuracy"]},
        "per_label": scores["per_label"],
        "samples": {"pairs": len(scored), **skipped.summary()},
    }
    types = column(rows, "hypothesis_type", required=False)
    if types is not None:
        right = [float(one == other) for one, other in zip(predictions, wanted)]
        result["per_hypothesis_type"] = mean_by([types[row] for row, _ in scored], right)
    if details:
        texts = column(rows, "text")
        result["details"] = [
            {"text": texts[row], "label": names[label], "prediction": names[prediction]}
            for (row, prediction), label in zip(scored, wanted)
        ]
    return result


def _order(model: nn.Module) -> list[int]:
    """Our number of each of the model's classes.

    Raises:
        ValueError: the model has another number of classes, or names that are not those of the task.
    """
    names = list(ENTAILMENT.labels)
    own = {int(number): str(name).lower() for number, name in (getattr(model.config, "id2label", None) or {}).items()}
    if not own or all(name.startswith("label_") for name in own.values()):
        return list(range(len(names)))
    if sorted(own.values()) != sorted(names):
        raise ValueError(f"the model's classes are {list(own.values())}, those of entailment {names}")
    return [names.index(own[number]) for number in range(len(names))]
