r"""Stage 2 of LLaVA (arXiv 2304.08485, section 4.2; 2310.03744): conversations about pictures.

--stage stage2          projector and language model learn
--stage stage2_vision   the vision tower too (give it a rate of its own, see below)
--stage stage2_lora     projector and adapters; chosen by --lora_r

On the built-in Shapes, on two CPU cores, after training_scripts/llava_stage1.py:
    python training_scripts/llava_stage2.py --config training_scripts/llava_stage2_cpu.yaml \
        --model_name_or_path outputs/llava1/model --output_dir outputs/llava2
LLaVA 1.5's setting (8 A100, 665k conversations, about 20 hours); --lora_r 128 fits on far less:
    accelerate launch --config_file training_scripts/accelerate_configs/deepspeed_zero3_8.yaml \
        training_scripts/llava_stage2.py --config training_scripts/llava_stage2_paper.yaml \
        --model_name_or_path outputs/llava1/model --train_data llava_v1_5_mix665k.json --image_root path/to/images \
        --output_dir outputs/llava2

--part_learning_rates model.multi_modal_projector=2e-5 model.vision_tower=2e-6 gives parts their own rates.
--language_model_bits 4 with --lora_r is QLoRA. With adapters, <output_dir>/adapters holds them and the projector
alone (`hf-vlp merge` makes a native folder of it); <output_dir>/model is merged already.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import set_seed

from hf_vlp.data.conversations import ConversationCollator
from hf_vlp.models.catalog import load_class
from hf_vlp.models.llava.processing_llava import use_template
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.adapters import save_adapters
from hf_vlp.training.arguments import option, run_settings
from hf_vlp.training.data import main_process_first
from hf_vlp.training.evaluators import TaskEvaluator
from hf_vlp.training.instructions import (
    ConversationArguments,
    conversation_dataset,
    conversation_rows,
    stop_at_turns,
)
from hf_vlp.training.launch import say
from hf_vlp.training.lora import LoraArguments, add_lora, language_model_options


@dataclass
class ModelArguments:
    """What stage 1 left."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(
        None, "LLaVA folder or Hub id: of stage 1, of `hf-vlp new` to leave stage 1 out, or of an earlier stage 2."
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, conversations, model_args, lora, args = parse_arguments(
        (DataArguments, ConversationArguments, ModelArguments, LoraArguments, VLPTrainingArguments),
        argv,
        description=__doc__,
    )
    start = model_args.model_name_or_path
    if not start:
        raise SystemExit("llava_stage2.py: --model_name_or_path is missing: the folder that llava_stage1.py left")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows = conversation_rows(data, conversations, train=True)
        eval_rows = conversation_rows(data, conversations, train=False)

    # 2. Processor and model
    processor = use_template(load_class(start, "processor").from_pretrained(start), conversations.template)
    model = load_class(start, "model").from_pretrained(start, **{"dtype": "float32", **precision(lora)})
    stop_at_turns(model, processor, conversations.template)
    say(apply_stage(model, args.stage or ("stage2_lora" if lora.lora_r else "stage2")))
    adapted = add_lora(model, lora)
    if adapted:
        say(f"  LoRA of rank {lora.lora_r} on {len(adapted)} layers of the language model, e.g. {adapted[0]}")

    # 3. Datasets and collator
    train = conversation_dataset(
        rows,
        seed=args.seed,
        transform=data.transform(model.config.vision_config.image_size),
        group_for=processor if conversations.group_by_length else None,
    )
    evaluation = conversation_dataset(eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = ConversationCollator(
        processor,
        template=conversations.template,
        max_length=data.max_length,
        pack_to=conversations.pack_to,
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
        evaluator=TaskEvaluator(
            "instructions",
            processor,
            eval_rows,
            args.per_device_eval_batch_size,
            {"template": conversations.template},
        )
        if eval_rows is not None
        else None,
        settings={
            "data": run_settings(data),
            "conversations": run_settings(conversations),
            "model_arguments": run_settings(model_args),
            "lora": run_settings(lora),
        },
    )

    # 5. Train, evaluate, export
    trainer.train()
    if adapted and args.should_save:
        folder = save_adapters(model, Path(args.output_dir) / "adapters", base=start)
        processor.save_pretrained(folder)
        say(f"Adapters and projector are in {folder}")
    return trainer.finish()


def precision(lora: LoraArguments) -> dict[str, Any]:
    """How the weights are loaded: QLoRA quantizes the language model's layers, not tower, projector and head."""
    options = language_model_options(lora)
    if "quantization_config" in options:
        options["quantization_config"].llm_int8_skip_modules = ["vision_tower", "multi_modal_projector", "lm_head"]
    return options


if __name__ == "__main__":
    main()
