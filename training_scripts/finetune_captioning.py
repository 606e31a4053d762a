r"""Fine-tuning for image captioning (BLIP, arXiv 2201.12086, section 5.2: the prompt "a picture of" is not learnt).

Takes every architecture with the role: BLIP, BLIP-2.

    python training_scripts/finetune_captioning.py --config training_scripts/finetune_captioning_cpu.yaml \
        --model_name_or_path outputs/blip/model --output_dir outputs/blip-captioning
On COCO, BLIP's setting (8 A100, 5 epochs at 384 px):
    accelerate launch --num_processes 8 training_scripts/finetune_captioning.py \
        --config training_scripts/finetune_captioning_paper.yaml --model_name_or_path path/to/pretrained \
        --train_data path/to/dataset_coco.json --image_root path/to/images --output_dir outputs/captioning

Reports BLEU, ROUGE-L, CIDEr and CIDEr-D. A model that knows nothing has a loss of ln of the vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import set_seed

from hf_vlp.data import CaptioningCollator
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, parse_arguments
from hf_vlp.training.arguments import option, run_settings
from hf_vlp.training.data import main_process_first, pair_dataset
from hf_vlp.training.evaluators import CaptioningEvaluator
from hf_vlp.training.launch import say
from hf_vlp.training.tasks import TaskModelArguments, apply_task_stage, image_size_of, load_for_task


@dataclass
class CaptioningArguments:
    """Prompt and generation."""

    _argument_group_name: ClassVar[str] = "captioning"
    not_settings: ClassVar[frozenset[str]] = frozenset({"num_beams", "max_new_tokens"})

    prompt: str = option("", "Words in front of every caption that are read but not learnt; BLIP: 'a picture of'.")
    label_smoothing: float | None = option(None, "Of the targets, where the model has it; BLIP: 0.1.")
    num_beams: int = option(3, "Beams of the evaluation.")
    max_new_tokens: int = option(30, "Longest caption of the evaluation, in tokens.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, task, args = parse_arguments(
        (DataArguments, TaskModelArguments, CaptioningArguments, VLPTrainingArguments), argv, description=__doc__
    )
    model_args.required("finetune_captioning.py")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(task="captioning"), data.eval_rows(task="captioning")

    # 2. Processor and model
    model, processor = load_for_task(
        model_args,
        "finetune_captioning",
        script="finetune_captioning.py",
        settings={"label_smoothing": task.label_smoothing},
    )
    say(apply_task_stage(model, args.stage))

    # 3. Datasets and collator
    train = pair_dataset(rows, seed=args.seed, transform=data.transform(image_size_of(model)))
    evaluation = pair_dataset(eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = CaptioningCollator(processor, prompt=task.prompt, max_length=data.max_length, limits=data.limits)

    # 4. Trainer
    generation = {"prompt": task.prompt, "num_beams": task.num_beams, "max_new_tokens": task.max_new_tokens}
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=CaptioningEvaluator(processor, eval_rows, args.per_device_eval_batch_size, generation)
        if eval_rows is not None
        else None,
        settings={
            "data": run_settings(data),
            "model_arguments": run_settings(model_args),
            "task": run_settings(task),
        },
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


if __name__ == "__main__":
    main()
