r"""Fine-tuning for statements about two images, NLVR2 (ALBEF, arXiv 2107.07651, section 5).

Takes every architecture with the role: ALBEF (best after training_scripts/albef.py --text_assignment), BLIP.

    python training_scripts/finetune_nlvr2.py --config training_scripts/finetune_nlvr2_cpu.yaml \
        --model_name_or_path outputs/albef/model --output_dir outputs/albef-nlvr2
On NLVR2, ALBEF's setting (8 A100, 10 epochs at 384 px):
    accelerate launch --num_processes 8 training_scripts/finetune_nlvr2.py \
        --config training_scripts/finetune_nlvr2_paper.yaml --model_name_or_path path/to/pretrained \
        --train_data path/to/nlvr2 --image_root path/to/images --output_dir outputs/nlvr2
BLIP's setting is training_scripts/finetune_nlvr2_blip_paper.yaml.

Reports accuracy, and consistency: the share of sentences that are judged rightly on all their pairs of images. A
model that knows nothing has a loss of ln 2 = 0.693.
"""

from transformers import set_seed

from hf_vlp.data.tasks import VisualReasoningCollator, task_records
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
    model_args.required("finetune_nlvr2.py")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(task="visual_reasoning"), data.eval_rows(task="visual_reasoning")

    # 2. Processor and model
    model, processor = load_for_task(
        model_args, "finetune_visual_reasoning", script="finetune_nlvr2.py", momentum=momentum, rows=rows, args=args
    )
    say(apply_task_stage(model, args.stage))

    # 3. Datasets and collator
    train = task_records("visual_reasoning", rows, seed=args.seed, transform=data.transform(image_size_of(model)))
    evaluation = task_records("visual_reasoning", eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = VisualReasoningCollator(processor, max_length=data.max_length, limits=data.limits)

    # 4. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=TaskEvaluator("visual-reasoning", processor, eval_rows, args.per_device_eval_batch_size)
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
