"""One function from the name of a data set and a task to rows."""

import os
from collections.abc import Mapping
from typing import Any

from ..columns import DIALOGS, ENTAILMENT, GROUNDING, PAIRS, QUESTIONS, STATEMENTS, Schema
from ..sources import Rows, load_rows

# Task -> schema of its rows.
TASKS: dict[str, Schema] = {
    "retrieval": PAIRS,
    "captioning": PAIRS,
    "vqa": QUESTIONS,
    "visual_reasoning": STATEMENTS,
    "visual_entailment": ENTAILMENT,
    "dialog": DIALOGS,
    "grounding": GROUNDING,
}


def load_task(
    task: str,
    spec: str | os.PathLike[str],
    split: str = "train",
    *,
    image_root: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    seed: int = 0,
    **shapes_options: Any,
) -> Rows:
    """Rows of a task."""
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    return load_rows(spec, split, TASKS[task], streaming, columns, image_root, seed, shapes_options)
