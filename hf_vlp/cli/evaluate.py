"""`hf-vlp evaluate`: one line for each evaluation of `hf_vlp.evaluation`."""

import argparse
import inspect
import json
import re
import types
import typing
from typing import Any

from hf_vlp.cli.errors import UsageError
from hf_vlp.cli.main import parser

# The names of `hf_vlp.evaluation.run.TASKS`, repeated so that `--help` need not import it.
TASKS = (
    "retrieval",
    "zero-shot",
    "captioning",
    "vqa",
    "visual-reasoning",
    "visual-entailment",
    "dialog",
    "grounding",
    "shapes-captions",
    "instructions",
)

# Task -> the file that goes with the one of --data.
_COMPANIONS = {
    "vqa": "answers of the questions, where they are not beside them ('none': only the questions)",
    "dialog": "dense annotations of the dialogs, where they are not beside them",
    "grounding": "instances that the refs of RefCOCO name, where they are not beside them",
}

_EXAMPLES = """\
  hf-vlp evaluate retrieval --model outputs/stage1/model --data pairs.parquet --split test --rerank 128
  hf-vlp evaluate captioning --model outputs/blip2 --data captions_val2014.json --image_root val2014 --output r.json
  hf-vlp evaluate vqa --model org/blip2-opt --data questions.json --image_root images --limit 500
  hf-vlp evaluate retrieval --help     # with the options of that task"""


def main(argv: list[str]) -> int:
    task = argv[0] if argv and not argv[0].startswith("-") else None
    if task is not None and task.replace("_", "-") not in TASKS:
        raise UsageError(f"there is no evaluation {task!r}; there are: {', '.join(TASKS)}")
    command = parser("evaluate", "Measures a model on a data source.", _EXAMPLES)
    command.add_argument("task", choices=TASKS, type=lambda name: name.replace("_", "-"), metavar="TASK",
                         help=f"one of: {', '.join(TASKS)}")  # fmt: skip
    command.add_argument("--model", required=True, metavar="MODEL", help="folder or Hub id")
    command.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="'shapes', a folder, a file (parquet, JSON, CSV, tar) or a Hub id",
    )
    command.add_argument("--split", help="split of the data ('test' where there is one)")
    command.add_argument("--image_root", metavar="FOLDER", help="where the images of an annotation file lie")
    command.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="column names, as in image=picture text=caption",
    )
    command.add_argument("--batch_size", type=int, default=32, help="images at a time (%(default)s)")
    command.add_argument("--limit", type=int, help="use only so many rows")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "auto"), help="of the model (float32)")
    command.add_argument("--device", help="where to run; the first accelerator, or the CPU, if left out")
    command.add_argument("--output", metavar="FILE", help="write the result as JSON")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    own: dict[str, str] = {}
    if task is not None:
        group = command.add_argument_group(f"options of {task}")
        own = add_options(group, task.replace("_", "-"))
        if task in _COMPANIONS:
            group.add_argument("--annotations", metavar="FILE", help=_COMPANIONS[task])
        if task == "grounding":
            group.add_argument(
                "--box_format",
                choices=("xyxy", "xywh"),
                help="what the four numbers of a box mean in plain data: corners, or corner and size (xyxy)",
            )
    options = command.parse_args(argv)

    from hf_vlp.evaluation import run_evaluation

    data_options: dict[str, Any] = {}
    if options.image_root:
        data_options["image_root"] = options.image_root
    if options.columns:
        data_options["columns"] = read_columns(options.columns)
    for name in ("annotations", "box_format"):
        if getattr(options, name, None) is not None:
            data_options[name] = getattr(options, name)
    given = {name: getattr(options, name) for name in own if getattr(options, name, argparse.SUPPRESS) is not None}
    result = run_evaluation(
        options.task,
        options.model,
        options.data,
        split=options.split,
        batch_size=options.batch_size,
        limit=options.limit,
        dtype=options.dtype,
        device=options.device,
        output=options.output,
        data_options=data_options,
        show_table=not options.json,
        **given,
    )
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


def read_columns(pairs: list[str]) -> dict[str, str]:
    """`["image=picture"]` -> `{"image": "picture"}`.

    Raises:
        UsageError: an entry is not of that form.
    """
    columns = {}
    for pair in pairs:
        name, sign, column = pair.partition("=")
        if not (name and sign and column):
            raise UsageError(f"--columns takes NAME=COLUMN, got {pair!r}")
        columns[name] = column
    return columns


def add_options(group: Any, task: str) -> dict[str, str]:
    """Adds a flag for every option of a task's function that the command line can express; gives their names."""
    from hf_vlp.evaluation import task_options

    added = {}
    parameters = task_options(task)
    hints, texts = _types(task), _descriptions(task)
    for name, parameter in parameters.items():
        if name in ("batch_size", "limit") or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        kind, many = _kind(hints.get(name, parameter.annotation))
        if kind is None:
            continue
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        shown = " ".join(filter(None, (texts.get(name), None if default is None else f"(by default {default})")))
        shown = shown.replace("%", "%%")
        if kind is bool:
            group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=shown)
        elif many:
            group.add_argument(f"--{name}", type=kind, nargs="+", default=None, help=shown, metavar=kind.__name__)
        else:
            group.add_argument(f"--{name}", type=kind, default=None, help=shown, metavar=kind.__name__)
        added[name] = name
    return added


def _descriptions(task: str) -> dict[str, str]:
    """Parameter -> what the docstring of the task's function says of it."""
    from hf_vlp.evaluation.run import task_named

    lines = (inspect.getdoc(task_named(task).load()) or "").splitlines()
    texts: dict[str, list[str]] = {}
    inside = False
    name = ""
    for line in lines:
        if line.startswith("Args:"):
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and (found := re.match(r"    (\w+)(?: \([^)]*\))?: (.*)", line)):
            name = found[1]
            texts[name] = [found[2]]
        elif inside and name and line.startswith("        "):
            texts[name].append(line.strip())
    return {name: " ".join(parts).replace("`", "").rstrip(".") for name, parts in texts.items()}


def _types(task: str) -> dict[str, Any]:
    from hf_vlp.evaluation.run import task_named

    try:
        return typing.get_type_hints(task_named(task).load())
    except NameError:  # a name that only a type checker imports
        return {}


def _kind(annotation: Any) -> tuple[type | None, bool]:
    """`(int, False)` of `int | None`, `(int, True)` of `list[int]`; `(None, False)` of what a word can't be."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            kind, many = _kind(part)
            if kind is not None and part is not type(None):
                return kind, many
        return None, False
    if typing.get_origin(annotation) in (list, tuple) or getattr(typing.get_origin(annotation), "__name__", "") in (
        "Sequence",
        "Iterable",
    ):
        kind, many = _kind(typing.get_args(annotation)[0])
        return (None, False) if many else (kind, kind is not None)
    return (annotation, False) if annotation in (int, float, str, bool) else (None, False)
