r"""Fine-tuning for image-text retrieval; all texts of an image are its positives (ALBEF, arXiv 2107.07651, section 5).

Takes every architecture with the role: ALBEF, BLIP (arXiv 2201.12086), BLIP-2, the CLIP family.

    python training_scripts/finetune_retrieval.py --config training_scripts/finetune_retrieval_cpu.yaml \
        --model_name_or_path outputs/albef/model --output_dir outputs/albef-retrieval
On COCO, ALBEF's setting (8 A100, 5 epochs at 384 px):
    accelerate launch --num_processes 8 training_scripts/finetune_retrieval.py \
        --config training_scripts/finetune_retrieval_paper.yaml --model_name_or_path path/to/pretrained \
        --train_data path/to/dataset_coco.json --image_root path/to/images --output_dir outputs/retrieval
BLIP's setting is training_scripts/finetune_retrieval_blip_paper.yaml.

Reports Recall@1/5/10 in both directions, by contrast alone (_itc) and re-ranked by matching (_itm).
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import set_seed

from hf_vlp.data import ImageTextCollator
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, parse_arguments
from hf_vlp.training.arguments import option, run_settings
from hf_vlp.training.data import main_process_first, pair_dataset
from hf_vlp.training.evaluators import RetrievalEvaluator
from hf_vlp.training.launch import say
from hf_vlp.training.momentum import MomentumArguments, ObjectiveArguments
from hf_vlp.training.tasks import TaskModelArguments, apply_task_stage, image_size_of, load_for_task


@dataclass
class RetrievalArguments:
    """The evaluation."""

    _argument_group_name: ClassVar[str] = "retrieval"

    rerank: int = option(16, "Candidates that the matching head, if any, puts in order again; 0 for contrast alone.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, task, objectives, momentum, args = parse_arguments(
        (
            DataArguments,
            TaskModelArguments,
            RetrievalArguments,
            ObjectiveArguments,
            MomentumArguments,
            VLPTrainingArguments,
        ),
        argv,
        description=__doc__,
    )
    model_args.required("finetune_retrieval.py")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(), data.eval_rows()

    # 2. Processor and model
    model, processor = load_for_task(
        model_args,
        "finetune_retrieval",
        script="finetune_retrieval.py",
        momentum=momentum,
        rows=rows,
        args=args,
        settings=objectives.settings(),
    )
    say(apply_task_stage(model, args.stage))

    # 3. Datasets and collator
    train = pair_dataset(rows, seed=args.seed, transform=data.transform(image_size_of(model)))
    evaluation = pair_dataset(eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = ImageTextCollator(processor, max_length=data.max_length, limits=data.limits)

    # 4. Trainer
    rerank = task.rerank if model.inference_model.supports_matching else None
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=RetrievalEvaluator(processor, eval_rows, args.per_device_eval_batch_size, rerank=rerank or None)
        if eval_rows is not None
        else None,
        settings={
            "data": run_settings(data),
            "model_arguments": run_settings(model_args),
            "objectives": run_settings(objectives),
            "momentum": run_settings(momentum),
        },
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


if __name__ == "__main__":
    main()
