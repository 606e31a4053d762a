"""Task metrics during training, as callables for `VLPTrainer(evaluator=…)`."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_vlp.models.pretraining import PreTrainingMixin


@dataclass
class RetrievalEvaluator:
    """Recall@1/5/10 of the model as it stands, see `hf_vlp.evaluation.evaluate_retrieval`.

    Attributes:
        processor: of the model.
        rows: images with their texts.
        batch_size: images at a time.
        rerank: candidates that the matching head puts in order again; None for the similarity alone.
        max_length: tokens of a text, as in training.
    """

    processor: Any
    rows: Any
    batch_size: int = 64
    rerank: int | None = None
    max_length: int | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        from hf_vlp.evaluation import evaluate_retrieval

        inference = model.inference_model if isinstance(model, PreTrainingMixin) else model
        result = evaluate_retrieval(
            inference,
            self.processor,
            self.rows,
            batch_size=self.batch_size,
            rerank=self.rerank,
            max_length=self.max_length,
            # The run's own limit has judged the training data; an evaluation only reports.
            max_bad_rate=1.0,
            show_progress=False,
        )
        return result["metrics"]


@dataclass
class CaptioningEvaluator:
    """Caption scores of the model as it stands, see `hf_vlp.evaluation.evaluate_captioning`.

    Attributes:
        processor: of the model.
        rows: images with their texts.
        batch_size: images at a time.
        options: for `evaluate_captioning` (prompt, generation arguments).
    """

    processor: Any
    rows: Any
    batch_size: int = 32
    options: dict[str, Any] | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        from hf_vlp.evaluation import evaluate_captioning

        inference = model.inference_model if isinstance(model, PreTrainingMixin) else model
        result = evaluate_captioning(
            inference,
            self.processor,
            self.rows,
            batch_size=self.batch_size,
            show_progress=False,
            **(self.options or {}),
        )
        return {name: value for name, value in result["metrics"].items() if isinstance(value, int | float)}


@dataclass
class TaskEvaluator:
    """The metrics of a task of `hf_vlp.evaluation.run` for the model as it stands.

    Attributes:
        task: name in `hf_vlp.evaluation.run.TASKS`.
        processor: of the model.
        rows: as the task takes them.
        batch_size: records at a time.
        options: of the task's function.
    """

    task: str
    processor: Any
    rows: Any
    batch_size: int = 32
    options: dict[str, Any] | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        from hf_vlp.evaluation.run import task_named

        inference = model.inference_model if isinstance(model, PreTrainingMixin) else model
        result = task_named(self.task).load()(
            inference,
            self.processor,
            self.rows,
            batch_size=self.batch_size,
            show_progress=False,
            **{"max_bad_rate": 1.0, **(self.options or {})},
        )
        return {name: value for name, value in result["metrics"].items() if isinstance(value, int | float)}
