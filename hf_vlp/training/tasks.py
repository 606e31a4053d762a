"""What the fine-tuning scripts share: the model and the processor of a task, from any architecture that has it."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from hf_vlp.training.arguments import option
from hf_vlp.training.freezing import StageReport, apply_stage
from hf_vlp.training.momentum import MomentumArguments, accepted_settings, given


@dataclass
class TaskModelArguments:
    """The model to fine-tune."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(
        None, "Folder or Hub id to start from: a pretrained model, or one that was fine-tuned for the task already."
    )
    image_size: int | None = option(None, "Side of the images in pixels; position embeddings are interpolated to it.")
    max_words: int | None = option(None, "Words after which a text is cut, where the processor counts words.")

    def required(self, script: str) -> str:
        """`model_name_or_path`.

        Raises:
            SystemExit: it is missing, or a path where nothing is.
        """
        if not self.model_name_or_path:
            raise SystemExit(f"{script}: --model_name_or_path is missing: a pretrained model to fine-tune")
        check_paths(script, self, "model_name_or_path")
        return self.model_name_or_path


def check_paths(script: str, arguments: Any, *names: str) -> None:
    """Finds out before the Hub is asked for a folder that is not there.

    Args:
        script: for the message.
        arguments: a dataclass of arguments.
        names: of its fields, each a folder or Hub id.

    Raises:
        SystemExit: one can only be a path, as a Hub id has one slash at most, and nothing is there.
    """
    for name in names:
        given = getattr(arguments, name) or ""
        is_path = given.startswith((".", "~", "/")) or given.count("/") > 1 or Path(given).is_absolute()
        if is_path and not Path(given).exists():
            raise SystemExit(f"{script}: --{name} {given}: there is no such folder")


def load_for_task(
    arguments: TaskModelArguments,
    role: str,
    *,
    script: str,
    momentum: MomentumArguments | None = None,
    rows: Any = None,
    args: Any = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Any]:
    """The training class of a task and the processor, of whatever architecture the folder holds.

    Args:
        arguments: which folder, which image size.
        role: `"finetune_<task>"` of the catalogue.
        script: name of the script, for the message.
        momentum: arguments of the momentum twin; what was left out and the class does not know is dropped.
        rows: of the training data, for the length of an epoch.
        args: of the run.
        settings: further keyword arguments of the class that were asked for.

    Raises:
        SystemExit: no model is named.
        KeyError: the architecture has no such task; the message lists what it has.
        ValueError: the class has no such setting.
    """
    from hf_vlp.models.catalog import architecture_of

    folder = arguments.required(script)
    architecture = architecture_of(folder)
    kind = architecture.load(role)
    asked = given(momentum) if momentum is not None else {}
    settings = {name: value for name, value in (settings or {}).items() if value is not None}
    known = getattr(getattr(kind, "settings_class", None), "__dataclass_fields__", {})
    wanted = momentum.settings(rows, args) if momentum is not None and "alpha_warmup_steps" in known else dict(asked)
    chosen = accepted_settings(kind, {**wanted, **settings}, required={**asked, **settings})
    if arguments.image_size is not None:
        chosen["image_size"] = arguments.image_size
    model = kind.from_pretrained(folder, **chosen)
    if arguments.image_size is not None and image_size_of(model) != arguments.image_size:
        raise ValueError(
            f"--image_size {arguments.image_size}: {kind.__name__} stays at the {image_size_of(model)} pixels of "
            f"{folder}; leave it out"
        )
    processor = architecture.load("processor").from_pretrained(folder)
    fit_processor(processor, arguments.image_size, arguments.max_words)
    return model, processor


def fit_processor(processor: Any, image_size: int | None, max_words: int | None = None) -> None:
    """Sets the side of the images and the longest text in words.

    Raises:
        ValueError: the processor has no such setting.
    """
    if image_size is not None:
        size = processor.image_processor.size
        if not {"height", "width"} <= set(dict(size)):
            raise ValueError(
                f"--image_size: {type(processor.image_processor).__name__} does not resize to a height and a width "
                f"but to {dict(size)}; leave it out"
            )
        processor.image_processor.size = {"height": image_size, "width": image_size}
    if max_words is not None:
        if not hasattr(processor, "max_words"):
            raise ValueError(f"--max_words: {type(processor).__name__} does not count words; use --max_length")
        processor.max_words = max_words


def image_size_of(model: nn.Module) -> int:
    """Side of the images that a model takes, in pixels."""
    return model.config.vision_config.image_size


def apply_task_stage(model: nn.Module, stage: str = "") -> StageReport:
    """`apply_stage` for fine-tuning: the stage `"finetune"`, or the first one where there is none of that name."""
    stages = getattr(model, "stages", {})
    return apply_stage(model, stage or ("finetune" if "finetune" in stages else next(iter(stages))))


def most_frequent_answers(rows: Any, count: int) -> list[str]:
    """The answers that most rows of a question-answering set have, the most frequent first.

    Args:
        rows: with `answers`, lists of strings.
        count: how many at most.

    Raises:
        ValueError: no row has an answer.
    """
    found: Counter[str] = Counter()
    column = rows.select_columns(["answers"]) if hasattr(rows, "select_columns") else rows
    for row in column:
        listed = [row["answers"]] if isinstance(row["answers"], str) else row["answers"] or []
        found.update({answer.strip() for answer in listed if isinstance(answer, str) and answer.strip()})
    if not found:
        raise ValueError("no row of the training data has an answer; name a file by --answer_list")
    # Ties by the alphabet, so that every process ranks the same list.
    return sorted(found, key=lambda answer: (-found[answer], answer))[:count]


def read_answers(path: str | Path) -> list[str]:
    """A closed list of answers from a JSON file.

    Raises:
        ValueError: the file holds no list of texts.
    """
    listed = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(listed, list) or not listed or not all(isinstance(answer, str) for answer in listed):
        raise ValueError(f'{path} must hold a JSON list of answers, as ["yes", "no", …]')
    return listed


def answer_options(task: Any, rows: Any) -> dict[str, Any]:
    """How the answers are found in the evaluation, as options of `hf_vlp.evaluation.evaluate_vqa`.

    Args:
        task: with `answering`, `answer_list`, `answer_count` and `rank`.
        rows: of the training data, whose answers are ranked where no list is given.
    """
    if task.answering == "generate":
        return {"prompt": "{}"}
    listed = read_answers(task.answer_list) if task.answer_list else most_frequent_answers(rows, task.answer_count)
    return {"answer_list": listed, "top_k": min(task.rank, len(listed))}
