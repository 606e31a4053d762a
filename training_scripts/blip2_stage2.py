r"""Stage 2 of BLIP-2 (arXiv 2301.12597, section 3.2): the Q-Former speaks to a frozen language model.

On the built-in Shapes, on two CPU cores, after stage 1 and training_scripts/language_model.py:
    python training_scripts/blip2_stage2.py --config training_scripts/blip2_stage2_cpu.yaml \
        --stage1 outputs/stage1/model --language_model outputs/opt/model --output_dir outputs/stage2
The paper's setting (16 A100 40G, under 3 days):
    accelerate launch --num_processes 16 training_scripts/blip2_stage2.py \
        --config training_scripts/blip2_stage2_paper.yaml --stage1 outputs/stage1/model \
        --language_model facebook/opt-2.7b --train_data path/to/pairs --output_dir outputs/stage2

A model that knows nothing has a loss of ln of the vocabulary (10.8 for OPT); a language model that does not see the
image stays near the entropy of the captions. --lora_r 8 trains adapters in the language model as well.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import AutoTokenizer, set_seed

from hf_vlp.data import CaptioningCollator
from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForConditionalGeneration, stage1_model
from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor
from hf_vlp.models.catalog import load_class
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.arguments import option, run_settings, say_unused
from hf_vlp.training.data import main_process_first, pair_dataset
from hf_vlp.training.evaluators import CaptioningEvaluator
from hf_vlp.training.feature_cache import use_cache
from hf_vlp.training.launch import say
from hf_vlp.training.lora import LoraArguments, add_lora, language_model_options


@dataclass
class ModelArguments:
    """Stage 1, and the language model behind it."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "Stage-2 folder or Hub id to go on from (native BLIP-2).")
    stage1: str | None = option(None, "Stage-1 folder or Hub id to start from.")
    language_model: str | None = option(None, "Folder or Hub id of a causal or encoder-decoder language model.")
    prompt: str = option("", "Words in front of every caption that are read but not learnt.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, lora, args = parse_arguments(
        (DataArguments, ModelArguments, LoraArguments, VLPTrainingArguments), argv, description=__doc__
    )
    if not model_args.model_name_or_path and not (model_args.stage1 and model_args.language_model):
        raise SystemExit(
            "blip2_stage2.py: --stage1 and --language_model are missing (or --model_name_or_path to go on)"
        )
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(), data.eval_rows()

    # 2. Processor and model
    if model_args.model_name_or_path:
        say_unused(model_args, ("stage1", "language_model"), "--model_name_or_path brings its own")
        processor = Blip2Processor.from_pretrained(model_args.model_name_or_path)
        model = load_class(model_args.model_name_or_path, "captioning").from_pretrained(
            model_args.model_name_or_path, **({"dtype": "float32"} | language_model_options(lora))
        )
    else:
        stage1 = stage1_model(model_args.stage1)
        processor = Blip2Processor.for_language_model(
            AutoTokenizer.from_pretrained(model_args.language_model),
            stage1.config.num_query_tokens,
            image_processor=Blip2Processor.from_pretrained(model_args.stage1).image_processor,
        )
        model = Blip2ForConditionalGeneration.from_stage1(
            stage1, model_args.language_model, processor, **language_model_options(lora)
        )
    say(apply_stage(model, args.stage or "stage2"))
    adapted = add_lora(model, lora)
    if adapted:
        say(f"  LoRA of rank {lora.lora_r} on {len(adapted)} layers of the language model, e.g. {adapted[0]}")

    # 3. Datasets and collator
    train = pair_dataset(rows, seed=args.seed, transform=data.transform(model.config.vision_config.image_size))
    evaluation = pair_dataset(eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = CaptioningCollator(processor, prompt=model_args.prompt, max_length=data.max_length, limits=data.limits)
    collator = use_cache(model, collator, [train, evaluation], data.feature_cache, dtype=data.feature_dtype, args=args)

    # 4. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=CaptioningEvaluator(
            processor, eval_rows, args.per_device_eval_batch_size, {"prompt": model_args.prompt}
        )
        if eval_rows is not None
        else None,
        settings={
            "data": run_settings(data),
            "model_arguments": run_settings(model_args),
            "lora": run_settings(lora),
        },
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


if __name__ == "__main__":
    main()
