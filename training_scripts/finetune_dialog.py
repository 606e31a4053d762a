r"""Fine-tuning for visual dialog, VisDial: candidate answers are matched with caption, history and question.

BLIP, arXiv 2201.12086, section 5.5. Takes every architecture with the role.

    python training_scripts/finetune_dialog.py --config training_scripts/finetune_dialog_cpu.yaml \
        --model_name_or_path outputs/blip/model --output_dir outputs/blip-dialog
On VisDial 1.0:
    accelerate launch --num_processes 8 training_scripts/finetune_dialog.py \
        --config training_scripts/finetune_dialog_paper.yaml --model_name_or_path path/to/pretrained \
        --train_data path/to/visdial --image_root path/to/images --output_dir outputs/dialog

Reports R@1/5/10, mean reciprocal rank, mean rank and, where relevances are known, NDCG.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import set_seed

from hf_vlp.data.tasks import DialogCollator, task_records
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, parse_arguments
from hf_vlp.training.arguments import option, run_settings
from hf_vlp.training.data import main_process_first
from hf_vlp.training.evaluators import TaskEvaluator
from hf_vlp.training.launch import say
from hf_vlp.training.momentum import MomentumArguments
from hf_vlp.training.tasks import TaskModelArguments, apply_task_stage, image_size_of, load_for_task


@dataclass
class DialogArguments:
    """Candidate answers."""

    _argument_group_name: ClassVar[str] = "dialog"

    negatives: int | None = option(None, "Wrong candidates a question in training, drawn each time; left out: all.")
    max_candidate_length: int | None = option(None, "Most tokens of a candidate.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, task, momentum, args = parse_arguments(
        (DataArguments, TaskModelArguments, DialogArguments, MomentumArguments, VLPTrainingArguments),
        argv,
        description=__doc__,
    )
    model_args.required("finetune_dialog.py")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(task="dialog"), data.eval_rows(task="dialog")

    # 2. Processor and model
    model, processor = load_for_task(
        model_args, "finetune_dialog", script="finetune_dialog.py", momentum=momentum, rows=rows, args=args
    )
    say(apply_task_stage(model, args.stage))

    # 3. Datasets and collator
    train = task_records("dialog", rows, seed=args.seed, transform=data.transform(image_size_of(model)))
    evaluation = task_records("dialog", eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = DialogCollator(
        processor,
        negatives=task.negatives,
        max_candidate_length=task.max_candidate_length,
        max_length=data.max_length,
        limits=data.limits,
    )

    # 4. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=TaskEvaluator("dialog", processor, eval_rows, args.per_device_eval_batch_size)
        if eval_rows is not None
        else None,
        settings={
            "data": run_settings(data),
            "model_arguments": run_settings(model_args),
            "task": run_settings(task),
            "momentum": run_settings(momentum),
        },
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


if __name__ == "__main__":
    main()
