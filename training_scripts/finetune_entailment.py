r"""Fine-tuning for visual entailment, SNLI-VE (ALBEF, arXiv 2107.07651, section 5).

Does the image entail the text, contradict it, or leave it open? Takes every architecture with the role.

    python training_scripts/finetune_entailment.py --config training_scripts/finetune_entailment_cpu.yaml \
        --model_name_or_path outputs/albef/model --output_dir outputs/albef-entailment
On SNLI-VE, ALBEF's setting (8 A100, 5 epochs at 384 px):
    accelerate launch --num_processes 8 training_scripts/finetune_entailment.py \
        --config training_scripts/finetune_entailment_paper.yaml --model_name_or_path path/to/pretrained \
        --train_data path/to/snli_ve --image_root path/to/images --output_dir outputs/entailment

Reports accuracy, also of each class. A model that knows nothing has a loss of ln 3 = 1.099.
"""

from transformers import set_seed

from hf_vlp.data.tasks import VisualEntailmentCollator, task_records
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, parse_arguments
from hf_vlp.training.arguments import run_settings
from hf_vlp.training.data import main_process_first
from hf_vlp.training.evaluators import TaskEvaluator
from hf_vlp.training.launch import say
from hf_vlp.training.momentum import MomentumArguments
from hf_vlp.training.tasks import TaskModelArguments, apply_task_stage, image_size_of, load_for_task


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, momentum, args = parse_arguments(
        (DataArguments, TaskModelArguments, MomentumArguments, VLPTrainingArguments),
        argv,
        description=__doc__,
    )
    model_args.required("finetune_entailment.py")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(task="visual_entailment"), data.eval_rows(task="visual_entailment")

    # 2. Processor and model
    model, processor = load_for_task(
        model_args,
        "finetune_visual_entailment",
        script="finetune_entailment.py",
        momentum=momentum,
        rows=rows,
        args=args,
    )
    say(apply_task_stage(model, args.stage))

    # 3. Datasets and collator
    train = task_records("visual_entailment", rows, seed=args.seed, transform=data.transform(image_size_of(model)))
    evaluation = task_records("visual_entailment", eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = VisualEntailmentCollator(processor, max_length=data.max_length, limits=data.limits)

    # 4. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=TaskEvaluator("visual-entailment", processor, eval_rows, args.per_device_eval_batch_size)
        if eval_rows is not None
        else None,
        settings={
            "data": run_settings(data),
            "model_arguments": run_settings(model_args),
            "momentum": run_settings(momentum),
        },
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


if __name__ == "__main__":
    main()
