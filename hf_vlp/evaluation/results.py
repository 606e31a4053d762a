"""What an evaluation gives out: a plain dictionary, JSON, a table, and entries for a model page on the Hub."""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

# Task -> (the Hub's task identifier, its name).
HUB_TASKS = {
    "retrieval": ("image-text-retrieval", "Image-text retrieval"),
    "zero-shot": ("zero-shot-image-classification", "Zero-shot image classification"),
    "captioning": ("image-to-text", "Image captioning"),
    "shapes-captions": ("image-to-text", "Image captioning"),
    "vqa": ("visual-question-answering", "Visual question answering"),
    "visual-reasoning": ("visual-reasoning", "Natural language visual reasoning"),
    "visual-entailment": ("visual-entailment", "Visual entailment"),
    "dialog": ("visual-dialog", "Visual dialog"),
    "grounding": ("visual-grounding", "Visual grounding"),
    "instructions": ("image-text-to-text", "Instruction following"),
}

_DIRECTIONS = {"i2t": "image→text", "t2i": "text→image", None: "both"}
_KINDS = {"itc": "ITC", "itm": "ITM re-ranked"}
_RECALL = re.compile(r"(?:(i2t|t2i)_)?(?:r(\d+)|(mean))_(itc|itm)(?:_(\d+)_folds)?")
_NAMES = {
    "cider": "CIDEr",
    "cider_d": "CIDEr-D",
    "rouge_l": "ROUGE-L",
    "vqa_accuracy": "VQA accuracy",
    "exact_match": "exact match",
    "mrr": "MRR",
    "ndcg": "NDCG",
    "map_box_mean_iou": "mean IoU of the map's box",
    **{f"recall_at_{k}": f"R@{k}" for k in (1, 5, 10)},
} | {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 10)}
# Metrics that are no shares: papers do not multiply them by 100.
_COUNTS = ("spurious_per_scene", "mean_rank")


def metric_title(name: str) -> str:
    """`"t2i_r1_itm"` → `"text→image R@1 (ITM re-ranked)"`; other names are spelled with blanks."""
    if name in _NAMES:
        return _NAMES[name]
    match = _RECALL.fullmatch(name)
    if not match:
        return name.replace("_", " ")
    direction, depth, _, kind, folds = match.groups()
    title = f"R@{depth}" if depth else "mean recall"
    title = f"{_DIRECTIONS[direction]} {title}" if direction else title
    return f"{title} ({_KINDS[kind]}{f', mean of {folds} folds' if folds else ''})"


def shown_value(name: str, value: float) -> str:
    """As papers print it: shares, and CIDEr, times 100."""
    return f"{value:.2f}" if name in _COUNTS else f"{100 * value:.2f}"


def format_table(result: dict[str, Any]) -> str:
    """A table of a result for the terminal, with values times 100 as papers print them."""
    split = f" ({result['split']})" if result.get("split") else ""
    lines = [f"{result['task']}: {result.get('model', 'model')} on {result.get('data', 'data')}{split}"]
    recalls: dict[tuple[str, ...], dict[str, str]] = {}
    rows: list[tuple[str, ...]] = []
    for name, value in result["metrics"].items():
        match = _RECALL.fullmatch(name)
        if match:
            direction, depth, _, kind, folds = match.groups()
            row = (_DIRECTIONS[direction], _KINDS[kind], f"{folds} folds" if folds else "")
            recalls.setdefault(row, {})[f"R@{depth}" if depth else "mean"] = shown_value(name, value)
        else:
            rows.append((metric_title(name), shown_value(name, value)))
    if recalls:
        columns = list(dict.fromkeys(column for values in recalls.values() for column in values))
        rows.append(("", "", "", *columns))
        rows += [(*row, *(values.get(column, "") for column in columns)) for row, values in recalls.items()]
    lines += _aligned(rows, 3 if recalls else 1)
    for name, values in result.items():
        if isinstance(values, dict) and name not in ("metrics", "samples", "options", "details") and values:
            lines.append(f"  {name.replace('_', ' ')}")
            lines += _aligned([(f"  {group}", shown_value("", value)) for group, value in values.items()], 1)
    counts = {name: value for name, value in result.get("samples", {}).items() if value not in (0, {})}
    if counts:
        lines.append("  (" + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items()) + ")")
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, ...]], words: int) -> list[str]:
    """Lines with columns of equal width, the first `words` to the left and numbers to the right."""
    widths = [max(map(len, column), default=0) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if position < words else cell.rjust(max(width, 6))
            for position, (cell, width) in enumerate(zip(row, widths))
            if width
        )
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def write_json(data: Any, path: str | Path) -> Path:
    """Writes JSON so that a reader never sees half a file."""
    return write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: str | Path) -> Path:
    """Writes a text so that a reader never sees half a file: to a sibling first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def to_eval_results(
    result: dict[str, Any], *, dataset_name: str | None = None, dataset_type: str | None = None
) -> list[EvalResult]:
    """The metrics of a result as `model-index` data of a model card (`huggingface_hub.EvalResult`).

    Args:
        result: of an evaluation function or of `run_evaluation`.
        dataset_name: how people call the data; by default `result["data"]`.
        dataset_type: its Hub id; by default `result["data"]`.

    Raises:
        ValueError: the task is unknown, or the result does not say on which data it was taken.
    """
    task_type, task_name = _hub_task(result)
    data = result.get("data")
    dataset_name, dataset_type = dataset_name or _data_name(data), dataset_type or _data_name(data)
    if not dataset_name or not dataset_type:
        raise ValueError("the result has no 'data': give dataset_name and dataset_type")
    return [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=dataset_type,
            dataset_name=dataset_name,
            dataset_split=result.get("split"),
            metric_type=name,
            metric_name=metric_title(name),
            metric_value=round(value, 6) if isinstance(value, float) else value,
        )
        for name, value in result["metrics"].items()
    ]


def to_eval_result_entries(
    result: dict[str, Any],
    *,
    dataset_id: str,
    task_ids: dict[str, str] | None = None,
    date: str | None = None,
    notes: str | None = None,
    **source: str,
) -> list[EvalResultEntry]:
    """The metrics of a result as entries of `.eval_results/*.yaml` (`huggingface_hub.EvalResultEntry`).

    `huggingface_hub.eval_result_entries_to_yaml` turns them into what the file holds.

    Args:
        result: of an evaluation function or of `run_evaluation`.
        dataset_id: Hub id of the data; the format knows no local data.
        task_ids: metric → task of the benchmark, for the metrics to report; by default every metric under its own
            name.
        date: ISO 8601; by default when the result was taken.
        notes: how it was taken.
        source: `source_url`, `source_name`, `source_user`, `source_org`.

    Raises:
        ValueError: unknown task, or a metric that the result lacks; the message lists those it has.
    """
    _hub_task(result)
    metrics = result["metrics"]
    task_ids = task_ids or {name: name for name in metrics}
    missing = [name for name in task_ids if name not in metrics]
    if missing:
        raise ValueError(f"the result has no metric {missing}; it has {sorted(metrics)}")
    return [
        EvalResultEntry(
            dataset_id=dataset_id,
            task_id=task,
            value=metrics[name],
            date=date or result.get("date"),
            notes=notes,
            **source,
        )
        for name, task in task_ids.items()
    ]


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _data_name(data: str | None) -> str | None:
    """A local folder is called by its last part: a model card has no use for paths of the machine it was made on."""
    if data and Path(data).exists():
        return Path(data).resolve().name
    return data


def _hub_task(result: dict[str, Any]) -> tuple[str, str]:
    if result.get("task") not in HUB_TASKS:
        raise ValueError(f"task {result.get('task')!r} is not known; known are {sorted(HUB_TASKS)}")
    return HUB_TASKS[result["task"]]
