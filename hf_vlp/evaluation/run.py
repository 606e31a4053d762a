"""One entry for every evaluation: load by folder or Hub id, run, write JSON, give a dictionary."""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_vlp.evaluation.results import format_table, now, write_json
from hf_vlp.evaluation.runtime import default_device, is_main


@dataclass(frozen=True)
class Task:
    """An evaluation: its function, the role of the model that it needs, one line for `--help`, and what loads data."""

    function: str
    role: str
    summary: str
    rows: str = "hf_vlp.data:load_pairs"

    def load(self) -> Callable[..., dict[str, Any]]:
        """Imports the function."""
        return _imported(self.function)

    def load_rows(self) -> Callable[..., Any]:
        """Imports the function that turns the name of a data source into rows."""
        return _imported(self.rows)


def _imported(name: str) -> Any:
    """`module:attribute`, or `module:function(argument)` for a function whose first argument is given."""
    module, _, attribute = name.partition(":")
    attribute, _, argument = attribute.removesuffix(")").partition("(")
    found = getattr(import_module(module), attribute)
    return partial(found, argument) if argument else found


TASKS: dict[str, Task] = {
    "retrieval": Task(
        "hf_vlp.evaluation.retrieval:evaluate_retrieval",
        "retrieval",
        "image↔text Recall@1/5/10, optionally re-ranked by the matching head (--rerank 128)",
    ),
    "zero-shot": Task(
        "hf_vlp.evaluation.zero_shot:evaluate_zero_shot",
        "retrieval",
        "classification by class names: accuracy, top-5, each class",
        rows="hf_vlp.evaluation.labelled:load_labelled",
    ),
    "captioning": Task(
        "hf_vlp.evaluation.captioning:evaluate_captioning",
        "captioning",
        "generated captions by BLEU-1..4, ROUGE-L, CIDEr and CIDEr-D",
    ),
    "vqa": Task(
        "hf_vlp.evaluation.vqa:evaluate_vqa",
        "vqa",
        "generated or ranked answers (--answer_list) by VQA accuracy with the official normalisation",
        rows="hf_vlp.data:load_task(vqa)",
    ),
    "visual-reasoning": Task(
        "hf_vlp.evaluation.visual_reasoning:evaluate_visual_reasoning",
        "visual_reasoning",
        "statements about two images (NLVR2): accuracy and consistency",
        rows="hf_vlp.data:load_task(visual_reasoning)",
    ),
    "visual-entailment": Task(
        "hf_vlp.evaluation.visual_entailment:evaluate_visual_entailment",
        "visual_entailment",
        "entailment, neutral or contradiction (SNLI-VE): accuracy",
        rows="hf_vlp.data:load_task(visual_entailment)",
    ),
    "dialog": Task(
        "hf_vlp.evaluation.dialog:evaluate_dialog",
        "dialog",
        "candidate answers of dialogs (VisDial): R@1/5/10, MRR, mean rank, NDCG",
        rows="hf_vlp.data:load_task(dialog)",
    ),
    "grounding": Task(
        "hf_vlp.evaluation.grounding:evaluate_grounding",
        "retrieval",
        "maps of referring expressions: pointing game, accuracy of boxes",
        rows="hf_vlp.data:load_task(grounding)",
    ),
    "shapes-captions": Task(
        "hf_vlp.evaluation.shapes:evaluate_shapes_captions",
        "captioning",
        "captions of Shapes scenes: share of objects with the right colour and shape",
    ),
    "instructions": Task(
        "hf_vlp.evaluation.instructions:evaluate_instructions",
        "chat",
        "conversations answered turn by turn: share of exactly right answers",
        rows="hf_vlp.data.conversations:load_conversations",
    ),
}

# Arguments of the task functions that `run_evaluation` gives itself.
_GIVEN = ("model", "processor", "rows")


def task_named(name: str) -> Task:
    """The task; `_` and `-` are the same.

    Raises:
        ValueError: there is none of this name; the message lists those that there are.
    """
    key = name.replace("_", "-")
    if key not in TASKS:
        raise ValueError(f"there is no evaluation task {name!r}; there are {sorted(TASKS)}")
    return TASKS[key]


def task_options(task: str) -> dict[str, inspect.Parameter]:
    """The options of a task, by name: what `run_evaluation` takes as `task_options` and the CLI as flags.

    Raises:
        ValueError: unknown task.
    """
    parameters = inspect.signature(task_named(task).load()).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in _GIVEN}


def load_model_and_processor(model: str | Path, role: str, *, dtype: str | None = None, device: Any = None):
    """Our class for `role` and the processor, from a folder or Hub id, in eval mode on `device`.

    Args:
        model: folder with a `config.json`, or Hub id.
        role: of the catalogue (`"retrieval"`, `"captioning"`, …).
        dtype: `"float32"` (default), `"bfloat16"`, `"float16"` or `"auto"` (as the checkpoint was saved).
        device: by default the first accelerator, else the CPU; under `accelerate launch` the one of this process.

    Returns:
        (model, processor).

    Raises:
        ValueError: the architecture is not in the catalogue.
        KeyError: it has no such role; the message lists those that it has.
    """
    from hf_vlp.models.catalog import load_class

    network = load_class(model, role).from_pretrained(model, dtype=dtype or "float32")
    processor = load_class(model, "processor").from_pretrained(model)
    return network.to(device or default_device()).eval(), processor


def run_evaluation(
    task: str,
    model: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    batch_size: int = 32,
    device: Any = None,
    dtype: str | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    data_options: dict[str, Any] | None = None,
    show_table: bool = False,
    **task_options_given: Any,
) -> dict[str, Any]:
    """Evaluates a saved model on a data source: what `hf-vlp evaluate` and `training_scripts/evaluate.py` call.

    Runs on several processes when `accelerate launch` starts it so; every sample is evaluated once.

    Args:
        task: a key of `TASKS`.
        model: folder or Hub id of a model that has the task's role.
        data: whatever `hf_vlp.data.load_pairs` (for zero-shot `load_labelled`, for the other tasks `load_task`) reads:
            `"shapes"`, a folder, a file, a Hub id.
        split: of the data; by default `"test"`.
        batch_size: images at a time.
        device: see `load_model_and_processor`.
        dtype: see `load_model_and_processor`.
        limit: use only so many rows.
        output: JSON file for the result, written by the main process.
        data_options: passed to the function that loads the rows (`columns`, `image_root`, …).
        show_table: print the table on the main process.
        task_options_given: options of the task function (`rerank=128`, `prompt=…`); `task_options(task)` lists them.

    Returns:
        The result of the task function with `model`, `data`, `split`, `options`, `date` and `seconds` added.

    Raises:
        ValueError: unknown task, or an option that the task does not have; the messages list what there is.
    """
    named = task_named(task)
    accepted = task_options(task)
    unknown = sorted(set(task_options_given) - set(accepted))
    if unknown:
        raise ValueError(f"task {task!r} has no option {unknown}; it has {sorted(accepted)}")

    split = split or "test"
    rows = named.load_rows()(str(data), split=split, **(data_options or {}))
    network, processor = load_model_and_processor(model, named.role, dtype=dtype, device=device)
    started = time.perf_counter()
    result = named.load()(network, processor, rows, batch_size=batch_size, limit=limit, **task_options_given)
    result |= {
        "model": str(model),
        "data": str(data),
        "split": split,
        "options": {"batch_size": batch_size, "dtype": dtype or "float32", "limit": limit, **task_options_given},
        "date": now(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if is_main():
        if output is not None:
            write_json(result, output)
        if show_table:
            print(format_table(result))
    return result
