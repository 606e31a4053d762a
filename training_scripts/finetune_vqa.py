r"""Fine-tuning for visual question answering with an answer decoder (ALBEF, arXiv 2107.07651, section 5).

Takes every architecture with the role: ALBEF, BLIP (arXiv 2201.12086).

    python training_scripts/finetune_vqa.py --config training_scripts/finetune_vqa_cpu.yaml \
        --model_name_or_path outputs/albef/model --output_dir outputs/albef-vqa
On VQAv2, ALBEF's setting (8 A100, 8 epochs at 384 px):
    accelerate launch --num_processes 8 training_scripts/finetune_vqa.py \
        --config training_scripts/finetune_vqa_paper.yaml --model_name_or_path path/to/pretrained \
        --train_data path/to/vqav2 --image_root path/to/images --answer_list answer_list.json --output_dir outputs/vqa
BLIP's setting is training_scripts/finetune_vqa_blip_paper.yaml.

Reports VQA accuracy and exact match, with answers ranked over a closed list or generated.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import set_seed

from hf_vlp.data.tasks import VQACollator, task_records
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, parse_arguments
from hf_vlp.training.arguments import option, run_settings
from hf_vlp.training.data import main_process_first
from hf_vlp.training.evaluators import TaskEvaluator
from hf_vlp.training.launch import say
from hf_vlp.training.momentum import MomentumArguments
from hf_vlp.training.tasks import TaskModelArguments, answer_options, apply_task_stage, image_size_of, load_for_task


@dataclass
class AnsweringArguments:
    """Answers."""

    _argument_group_name: ClassVar[str] = "answers"
    not_settings: ClassVar[frozenset[str]] = frozenset({"answering", "answer_list", "answer_count", "rank"})

    max_answer_length: int | None = option(None, "Most tokens of an answer that is learnt.")
    answering: str = option(
        "rank", "Evaluation: answers ranked over a list, or generated.", choices=["rank", "generate"]
    )
    answer_list: str | None = option(
        None, "JSON list of the answers to rank; left out: the most frequent ones of the training data."
    )
    answer_count: int = option(3128, "Answers taken from the training data; ALBEF's list has 3,128.")
    rank: int = option(128, "Answers that are scored in full, those whose first token is likeliest.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, task, momentum, args = parse_arguments(
        (DataArguments, TaskModelArguments, AnsweringArguments, MomentumArguments, VLPTrainingArguments),
        argv,
        description=__doc__,
    )
    model_args.required("finetune_vqa.py")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(task="vqa"), data.eval_rows(task="vqa")

    # 2. Processor and model
    model, processor = load_for_task(
        model_args, "finetune_vqa", script="finetune_vqa.py", momentum=momentum, rows=rows, args=args
    )
    say(apply_task_stage(model, args.stage))

    # 3. Datasets and collator
    train = task_records("vqa", rows, seed=args.seed, transform=data.transform(image_size_of(model)))
    evaluation = task_records("vqa", eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = VQACollator(
        processor, max_answer_length=task.max_answer_length, max_length=data.max_length, limits=data.limits
    )

    # 4. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=TaskEvaluator(
            "vqa", processor, eval_rows, args.per_device_eval_batch_size, answer_options(task, rows)
        )
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
