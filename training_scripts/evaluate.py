r"""Evaluates a saved model on any task of the package, from retrieval to dialog. The same as `hf-vlp evaluate`.

    python training_scripts/evaluate.py --task retrieval --model outputs/stage1/model --data shapes --rerank 16
    accelerate launch --num_processes 8 training_scripts/evaluate.py --task retrieval \
        --model path/to/clip --data path/to/coco_karpathy.json --image_root path/to/images --split test
    python training_scripts/evaluate.py --task captioning --model outputs/stage2/model --options num_beams=3
    python training_scripts/evaluate.py --task grounding --model outputs/albef/model --options layer=3
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from hf_vlp.evaluation.run import TASKS, run_evaluation
from hf_vlp.training import parse_arguments
from hf_vlp.training.arguments import option
from hf_vlp.training.data import parse_columns


@dataclass
class EvaluationArguments:
    """What is evaluated on what."""

    _argument_group_name: ClassVar[str] = "evaluation"

    model: str = option("", "Folder or Hub id of the model.")
    task: str = option("retrieval", "Task.", choices=list(TASKS))
    data: str = option("shapes", "Data, as for --train_data of the training scripts.")
    split: str = option("test", "Split of the data.")
    columns: list[str] = option(list, "Names of columns in the data, as image=IMG text=CAPTION.")
    image_root: str | None = option(None, "Folder that image paths in annotation files are relative to.")
    limit: int | None = option(None, "Use only the first rows.")
    batch_size: int = option(32, "Images at a time.")
    dtype: str = option("float32", "Type of the weights: float32, bfloat16, float16, or auto.")
    rerank: int | None = option(None, "Retrieval: candidates that the matching head puts in order again.")
    prompt: str | None = option(None, "Captioning: words that the caption goes on from.")
    options: list[str] = option(list, "Further options of the task, as NAME=VALUE.")
    output: str | None = option(None, "JSON file for the result.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = parse_arguments((EvaluationArguments,), argv, description=__doc__)
    if not args.model:
        raise SystemExit("evaluate.py: --model is missing")
    options: dict[str, Any] = {}
    for entry in args.options:
        name, separator, value = entry.partition("=")
        if not separator:
            raise SystemExit(f"evaluate.py: --options takes NAME=VALUE, not {entry!r}")
        options[name] = yaml.safe_load(value)
    options |= {name: getattr(args, name) for name in ("rerank", "prompt") if getattr(args, name) is not None}
    data_options = {"columns": parse_columns(args.columns), "image_root": args.image_root}
    return run_evaluation(
        args.task,
        args.model,
        args.data,
        split=args.split,
        batch_size=args.batch_size,
        dtype=args.dtype,
        limit=args.limit,
        output=args.output,
        data_options={name: value for name, value in data_options.items() if value is not None},
        show_table=True,
        **options,
    )


if __name__ == "__main__":
    main()
