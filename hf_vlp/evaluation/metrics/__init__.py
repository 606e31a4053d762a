"""The metrics as modules of the `evaluate` library, loaded from the package's own files without network.

    from hf_vlp.evaluation.metrics import load_metric
    load_metric("cider").compute(predictions=["a red circle"], references=[["a red circle", "a red disc"]])

`evaluate.load(metric_path("cider"))` is the same.
"""

from pathlib import Path
from typing import Any

METRICS = (
    "bleu",
    "rouge_l",
    "cider",
    "cider_d",
    "vqa_accuracy",
    "recall_at_k",
    "nlvr2",
    "visual_entailment",
    "visdial",
    "box_accuracy",
)


def metric_path(name: str) -> str:
    """The file that `evaluate.load` takes.

    Raises:
        ValueError: there is no such metric; the message lists those that there are.
    """
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; there are {list(METRICS)}")
    # The file is not called as a metric of the Hub is, so that the module caches of `evaluate` keep them apart.
    return str(Path(__file__).with_name(f"vlp_{name}.py"))


def load_metric(name: str, **options: Any) -> Any:
    """The `evaluate.EvaluationModule`; `options` go to `evaluate.load` (`num_process`, `process_id`, `cache_dir`, …).

    Raises:
        ValueError: unknown name.
    """
    import evaluate

    return evaluate.load(metric_path(name), **options)
