r"""The three training stages of Qwen-VL (arXiv 2308.12966, section 3 and figure 3).

--stage pretrain    captions at 224 px: ViT and resampler learn, the language model is frozen
--stage multitask   everything learns, at 448 px: captions, questions, boxes, text, in sequences packed to 2048 tokens
--stage sft         dialogues; the ViT is frozen

On the built-in Shapes, on two CPU cores, with a ViT of training_scripts/clip.py and a small language model:
    python training_scripts/qwen_vl.py --stage pretrain --config training_scripts/qwen_vl_pretrain_cpu.yaml \
        --vision_model outputs/clip/model --language_model outputs/lm/model --output_dir outputs/qwen1
    python training_scripts/qwen_vl.py --stage sft --config training_scripts/qwen_vl_sft_cpu.yaml \
        --model_name_or_path outputs/qwen1/model --output_dir outputs/qwen3
The paper's settings are in qwen_vl_pretrain_paper.yaml, qwen_vl_multitask_paper.yaml and qwen_vl_sft_paper.yaml:
    accelerate launch --config_file training_scripts/accelerate_configs/fsdp2_8.yaml training_scripts/qwen_vl.py \
        --stage multitask --config training_scripts/qwen_vl_multitask_paper.yaml \
        --model_name_or_path outputs/qwen1/model --train_data mixture.jsonl --image_root path/to/images \
        --output_dir outputs/qwen2

Stages multitask and sft read conversations (LLaVA's JSON or chat messages); boxes stand in their texts as
`hf_vlp.models.qwen_vl.processing_qwen_vl.box_text` writes them. --lora_r 64 trains adapters instead of the language
model (sft).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoTokenizer, set_seed

from hf_vlp.data import CaptioningCollator
from hf_vlp.data.conversations import ConversationCollator
from hf_vlp.models.qwen_vl.initialization_qwen_vl import from_vision_language_pretrained
from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
from hf_vlp.models.qwen_vl.processing_qwen_vl import QwenVLProcessor
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.arguments import option, run_settings, say_unused
from hf_vlp.training.data import main_process_first, pair_dataset
from hf_vlp.training.evaluators import CaptioningEvaluator, TaskEvaluator
from hf_vlp.training.instructions import ConversationBatches, conversation_dataset, conversation_rows
from hf_vlp.training.launch import say
from hf_vlp.training.lora import LoraArguments, add_lora, language_model_options

OF_A_NEW_MODEL = ("vision_model", "language_model", "num_query_tokens", "resampler_heads")


@dataclass
class ModelArguments:
    """Where the weights come from."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "Qwen-VL folder or Hub id: of an earlier stage.")
    vision_model: str | None = option(None, "CLIP ViT (folder or Hub id) to start stage pretrain from.")
    language_model: str | None = option(None, "Causal language model (folder or Hub id) to start from.")
    image_size: int | None = option(None, "Side of the images in pixels; by default the model's.")
    num_query_tokens: int = option(256, "What an image becomes; a square number. Only for a new model.")
    prompt: str = option("", "Stage pretrain: words in front of every caption that are read but not learnt.")
    resampler_heads: int | None = option(None, "Heads of a new resampler; one for each 128 of its width if left out.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, conversations, model_args, lora, args = parse_arguments(
        (DataArguments, ConversationBatches, ModelArguments, LoraArguments, VLPTrainingArguments),
        argv,
        description=__doc__,
    )
    stage = args.stage or "pretrain"
    start = model_args.model_name_or_path
    if not start and not (model_args.vision_model and model_args.language_model):
        raise SystemExit("qwen_vl.py: --vision_model and --language_model are missing (or --model_name_or_path)")
    if not start and stage != "pretrain":
        raise SystemExit(f"qwen_vl.py: stage {stage} goes on from an earlier one: --model_name_or_path is missing")
    if stage == "pretrain" and (conversations.pack_to is not None or conversations.group_by_length):
        raise SystemExit("qwen_vl.py: --pack_to and --group_by_length are for conversations; pretrain reads captions")
    set_seed(args.seed)

    # 1. Data
    captions = stage == "pretrain"
    with main_process_first(args):
        if captions:
            rows, eval_rows = data.train_rows(), data.eval_rows()
        else:
            rows = conversation_rows(data, conversations, train=True)
            eval_rows = conversation_rows(data, conversations, train=False)

    # 2. Processor and model
    if start:
        say_unused(model_args, OF_A_NEW_MODEL, "--model_name_or_path brings its own")
        processor = QwenVLProcessor.from_pretrained(start)
        model = QwenVLForConditionalGeneration.from_pretrained(
            start, **({"dtype": "float32"} | language_model_options(lora))
        )
        if model_args.image_size is not None:
            use_image_size(model, processor, model_args.image_size)
    else:
        model, processor = from_vision_language_pretrained(
            model_args.vision_model,
            model_args.language_model,
            AutoTokenizer.from_pretrained(model_args.language_model),
            image_size=model_args.image_size,
            num_query_tokens=model_args.num_query_tokens,
            resampler_heads=model_args.resampler_heads,
            **language_model_options(lora),
        )
    say(apply_stage(model, stage))
    adapted = add_lora(model, lora)
    if adapted:
        say(f"  LoRA of rank {lora.lora_r} on {len(adapted)} layers of the language model, e.g. {adapted[0]}")

    # 3. Datasets and collator
    transform = data.transform(model.config.vision_config.image_size)
    evaluator: Any = None
    if captions:
        train = pair_dataset(rows, seed=args.seed, transform=transform)
        collator: Any = CaptioningCollator(
            processor, prompt=model_args.prompt, max_length=data.max_length, limits=data.limits
        )
        if eval_rows is not None:
            options = {"prompt": model_args.prompt}
            evaluator = CaptioningEvaluator(processor, eval_rows, args.per_device_eval_batch_size, options)
    else:
        grouped = processor if conversations.group_by_length else None
        train = conversation_dataset(rows, seed=args.seed, transform=transform, group_for=grouped)
        collator = ConversationCollator(
            processor,
            template="qwen_vl",
            max_length=data.max_length,
            pack_to=conversations.pack_to,
            limits=data.limits,
        )
        if eval_rows is not None:
            options = {"template": "qwen_vl"}
            evaluator = TaskEvaluator("instructions", processor, eval_rows, args.per_device_eval_batch_size, options)

    # 4. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        processing_class=processor,
        evaluator=evaluator,
        settings={
            "data": run_settings(data),
            "conversations": run_settings(conversations),
            "model_arguments": run_settings(model_args),
            "lora": run_settings(lora),
        },
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


def use_image_size(model: QwenVLForConditionalGeneration, processor: QwenVLProcessor, size: int) -> None:
    """Another resolution: the network takes any, as its positions are interpolated; only the defaults change."""
    model.config.vision_config.image_size = size
    processor.image_processor.size = {"height": size, "width": size}


if __name__ == "__main__":
    main()
