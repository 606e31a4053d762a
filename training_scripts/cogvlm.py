r"""CogVLM (arXiv 2311.03079, sections 2.2 and 2.3): visual experts in a language model that stays frozen. All stages.

--stage stage1   captions; the experts and the adapter learn
--stage stage2   captions and referring expressions, with boxes in the text
--stage sft      conversations; the image encoder learns too, at a tenth of the rate

On the built-in Shapes, on two CPU cores (a small language model and a small image encoder, see docs/cogvlm.md):
    python training_scripts/language_model.py --config training_scripts/language_model_told_cpu.yaml \
        --output_dir outputs/lm
    python training_scripts/cogvlm.py --config training_scripts/cogvlm_cpu.yaml \
        --language_model outputs/lm/model --output_dir outputs/cogvlm1
    python training_scripts/cogvlm.py --config training_scripts/cogvlm_sft_cpu.yaml \
        --model_name_or_path outputs/cogvlm1/model --output_dir outputs/cogvlm2
The paper's setting:
    accelerate launch training_scripts/cogvlm.py --config training_scripts/cogvlm_paper.yaml --stage stage1 \
        --language_model lmsys/vicuna-7b-v1.5 --vision_model path/to/cogvlm --train_data path/to/pairs \
        --output_dir outputs/cogvlm1

The language model's weights never change, so its answers to text alone are those that it always gave. --lora_r 8 puts
adapters into --lora_part: visual_experts (they then learn instead of the whole experts) or language_model.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoTokenizer, set_seed

from hf_vlp.data.conversations import ConversationCollator
from hf_vlp.models.cogvlm.configuration_cogvlm import CogVLMVisionConfig
from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration
from hf_vlp.models.cogvlm.processing_cogvlm import GROUNDING_PROMPTS, CogVLMProcessor, format_boxes
from hf_vlp.models.loading import load_backbone
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.arguments import option, run_settings, say_unused
from hf_vlp.training.data import main_process_first
from hf_vlp.training.evaluators import CaptioningEvaluator, TaskEvaluator
from hf_vlp.training.grounding import CaptionConversations, GroundingConversations, MixedDataset
from hf_vlp.training.instructions import ConversationArguments, conversation_dataset, conversation_rows
from hf_vlp.training.launch import say
from hf_vlp.training.lora import LoraArguments, add_lora

OF_A_NEW_ENCODER = ("patch_size", "vision_hidden_size", "vision_layers", "vision_heads", "vision_intermediate_size")


@dataclass
class ModelArguments:
    """The parts, or the folder of an earlier stage."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "CogVLM folder or Hub id to go on from.")
    language_model: str | None = option(None, "Folder or Hub id of a Llama-type language model to give experts to.")
    vision_model: str | None = option(None, "CogVLM folder or Hub id whose image encoder and adapter are taken over.")
    image_size: int | None = option(None, "Side of the images in pixels; position embeddings are interpolated to it.")
    downsample: int = option(1, "Side of the square of patches that becomes one feature: 1, or 2 as in CogVLM2.")
    patch_size: int = option(14, "Patches of a new image encoder, in pixels.")
    vision_hidden_size: int = option(1792, "Width of a new image encoder.")
    vision_layers: int = option(63, "Layers of a new image encoder.")
    vision_heads: int = option(16, "Heads of a new image encoder.")
    vision_intermediate_size: int = option(15360, "Inner width of a new image encoder.")
    visual_expert_qkv_bias: bool = option(False, "Biases in the experts' query, key and value, as in CogVLM2.")
    train_vision: bool = option(False, "Let the image encoder learn in every stage (a new one has to).")


@dataclass
class RecipeArguments:
    """What a stage reads."""

    _argument_group_name: ClassVar[str] = "recipe"

    grounding_data: str = option("shapes", "stage2: referring expressions with boxes, as of load_task('grounding').")
    describe_share: float = option(0.5, "stage2: share of the expressions that are asked for, given the box.")
    lora_part: str = option("visual_experts", "Where adapters go.", choices=["visual_experts", "language_model"])


@dataclass
class FormatArguments(ConversationArguments):
    """How conversations are written and batched."""

    template: str = option(
        "cogvlm_chat", "Format of conversations and, later, of prompts.", choices=["cogvlm_chat", "cogvlm_vqa"]
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, recipe, conversations, lora, args = parse_arguments(
        (DataArguments, ModelArguments, RecipeArguments, FormatArguments, LoraArguments, VLPTrainingArguments),
        argv,
        description=__doc__,
    )
    stage = args.stage or "stage1"
    if not (model_args.model_name_or_path or model_args.language_model):
        raise SystemExit("cogvlm.py: --language_model is missing (or --model_name_or_path to go on)")
    if stage not in CogVLMForConditionalGeneration.stages:
        raise SystemExit(f"cogvlm.py: --stage may be one of {sorted(CogVLMForConditionalGeneration.stages)}")
    if data.streaming and stage != "sft":
        raise SystemExit("cogvlm.py: --streaming is for --stage sft; captions and boxes are read by an index")
    if conversations.group_by_length and stage != "sft":
        raise SystemExit("cogvlm.py: --group_by_length is for --stage sft; captions are of like length")
    set_seed(args.seed)

    # 1. Processor and model
    model, processor = load_parts(model_args, conversations.template.removeprefix("cogvlm_"))
    table = dict(model.stages[stage]) | ({"vision_model": True} if model_args.train_vision else {})
    say(apply_stage(model, stage, table=table))
    # Where adapters go, and where the export looks for them.
    model.language_model_path = recipe.lora_part
    adapted = add_lora(model, lora, path=recipe.lora_part)
    if adapted:
        say(f"  LoRA of rank {lora.lora_r} on {len(adapted)} layers of {recipe.lora_part}, e.g. {adapted[0]}")

    # 2. Data
    with main_process_first(args):
        train, evaluation, eval_rows = datasets_of(stage, data, recipe, conversations, model, processor, args.seed)
    collator = ConversationCollator(
        processor,
        template=conversations.template,
        max_length=data.max_length,
        pack_to=conversations.pack_to,
        limits=data.limits,
    )
    evaluator: Any = None
    if eval_rows is not None and stage == "sft":
        options = {"template": conversations.template}
        evaluator = TaskEvaluator("instructions", processor, eval_rows, args.per_device_eval_batch_size, options)
    elif eval_rows is not None:
        evaluator = CaptioningEvaluator(processor, eval_rows, args.per_device_eval_batch_size)

    # 3. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=evaluator,
        settings={
            "data": run_settings(data),
            "model_arguments": run_settings(model_args),
            "recipe": run_settings(recipe),
            "conversations": run_settings(conversations),
            "lora": run_settings(lora),
        },
    )

    # 4. Train, evaluate, export
    trainer.train()
    return trainer.finish()


def load_parts(arguments: ModelArguments, template: str) -> tuple[CogVLMForConditionalGeneration, CogVLMProcessor]:
    """The model in float32 and its processor, from an earlier stage's folder or from the parts.

    Args:
        template: the processor's format of questions.
    """
    if arguments.model_name_or_path:
        unused = ("language_model", "vision_model", "downsample", "visual_expert_qkv_bias", *OF_A_NEW_ENCODER)
        say_unused(arguments, unused, "--model_name_or_path brings its own")
        model: Any = load_backbone(CogVLMForConditionalGeneration, arguments.model_name_or_path, dtype="float32")
        known = CogVLMProcessor.from_pretrained(arguments.model_name_or_path)
        tokenizer, space = known.tokenizer, known.answer_space
    else:
        seen: Any = None
        if arguments.vision_model:
            say_unused(arguments, ("downsample", *OF_A_NEW_ENCODER), "--vision_model brings its own")
            seen = load_backbone(CogVLMForConditionalGeneration, arguments.vision_model, dtype="float32")
            vision: Any = seen.config.vision_config
        else:
            vision = CogVLMVisionConfig(
                hidden_size=arguments.vision_hidden_size,
                intermediate_size=arguments.vision_intermediate_size,
                num_hidden_layers=arguments.vision_layers,
                num_attention_heads=arguments.vision_heads,
                patch_size=arguments.patch_size,
                image_size=arguments.image_size or 224,
                initializer_range=max(0.02, arguments.vision_hidden_size**-0.5),  # 0.02 is too little if narrow.
            )
        model = CogVLMForConditionalGeneration.from_language_pretrained(
            arguments.language_model,
            vision_config=vision,
            downsample=seen.config.downsample if seen else arguments.downsample,
            visual_expert_qkv_bias=arguments.visual_expert_qkv_bias,
        )
        if seen is not None:
            model.vision_model.load_state_dict(seen.vision_model.state_dict())
            widths = [(one.text_config.hidden_size, one.projector_hidden_size) for one in (seen.config, model.config)]
            if widths[0] == widths[1]:
                model.projector.load_state_dict(seen.projector.state_dict())
        tokenizer, space = AutoTokenizer.from_pretrained(arguments.language_model), None
    if arguments.image_size:
        model.resize_images(arguments.image_size)
    processor = CogVLMProcessor.for_model(tokenizer, model.config, template=template, answer_space=space)
    model.config.image_token_id = processor.image_token_id
    return model, processor


def datasets_of(
    stage: str,
    data: DataArguments,
    recipe: RecipeArguments,
    conversations: ConversationArguments,
    model: CogVLMForConditionalGeneration,
    processor: CogVLMProcessor,
    seed: int,
) -> tuple[Any, Any, Any]:
    """Training and evaluation records of a stage, and the rows that the evaluator reads."""
    transform = data.transform(model.config.vision_config.image_size)
    if stage == "sft":
        rows = conversation_rows(data, conversations, train=True)
        eval_rows = conversation_rows(data, conversations, train=False)
        grouped = processor if conversations.group_by_length else None
        train = conversation_dataset(rows, seed=seed, transform=transform, group_for=grouped)
        return train, None if eval_rows is None else conversation_dataset(eval_rows, seed=seed), eval_rows
    rows, eval_rows = data.train_rows(), data.eval_rows()
    captions = CaptionConversations(rows, seed=seed, transform=transform)
    evaluation = None if eval_rows is None else CaptionConversations(eval_rows, seed=seed)
    if stage == "stage1":
        return captions, evaluation, eval_rows
    prompts = {"locate": GROUNDING_PROMPTS["locate"], "describe": GROUNDING_PROMPTS["describe"]}
    phrases = data.more_rows(recipe.grounding_data, "grounding", seed)
    grounding = GroundingConversations(
        phrases, write=format_boxes, share_described=recipe.describe_share, seed=seed, **prompts
    )
    return MixedDataset([captions, grounding]), evaluation, eval_rows


if __name__ == "__main__":
    main()
