r"""Stage 1 of LLaVA (arXiv 2304.08485, section 4.2): a new projector learns to show pictures to a language model.

Vision tower and language model are frozen. The data are image-text pairs, written plainly: the picture, the caption.

On the built-in Shapes, on two CPU cores, after training_scripts/clip.py and training_scripts/language_model.py:
    python training_scripts/llava_stage1.py --config training_scripts/llava_stage1_cpu.yaml \
        --vision_model outputs/clip/model --language_model outputs/lm/model --output_dir outputs/llava1
LLaVA 1.5's setting (8 A100, 558k pairs, under 6 hours):
    accelerate launch --config_file training_scripts/accelerate_configs/deepspeed_zero2_8.yaml \
        training_scripts/llava_stage1.py --config training_scripts/llava_stage1_paper.yaml \
        --vision_model openai/clip-vit-large-patch14-336 --language_model lmsys/vicuna-7b-v1.5 \
        --train_data path/to/pairs --output_dir outputs/llava1

--connector linear and --aspect crop give LLaVA 1, --tiles LLaVA-NeXT. A folder of `hf-vlp new` goes in with
--model_name_or_path. Next is training_scripts/llava_stage2.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoImageProcessor, AutoTokenizer, set_seed

from hf_vlp.data.conversations import ConversationCollator
from hf_vlp.models.catalog import load_class
from hf_vlp.models.llava.initialization_llava import load_vision_tower, new_processor
from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.arguments import option, run_settings, say_unused
from hf_vlp.training.data import main_process_first
from hf_vlp.training.grounding import CaptionConversations
from hf_vlp.training.launch import say

OF_A_NEW_MODEL = (
    "vision_model", "language_model", "connector", "vision_feature_layer", "vision_features", "tiles", "max_tiles",
    "aspect",
)  # fmt: skip


@dataclass
class ModelArguments:
    """The parts, or a folder that has them."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "LLaVA folder or Hub id to go on from, e.g. of `hf-vlp new`.")
    vision_model: str | None = option(None, "Folder or Hub id of a vision transformer, or of a CLIP or SigLIP.")
    language_model: str | None = option(None, "Folder or Hub id of a causal language model.")
    connector: str = option("mlp", "mlp: two layers (1.5, NeXT); linear: one (1).", choices=["mlp", "linear"])
    vision_feature_layer: int = option(-2, "Hidden state of the tower that is shown; -1 is its last layer's.")
    vision_features: str = option(
        "patch", "patch: the patches' features; cls_patch: the class token's too.", choices=["patch", "cls_patch"]
    )
    tiles: bool = option(False, "Cut pictures into tiles (LLaVA-NeXT).")
    max_tiles: int = option(4, "Most tiles of a picture, with --tiles.")
    aspect: str = option(
        "pad", "pad: fill pictures up to a square (1.5); crop: cut the middle out (1).", choices=["pad", "crop"]
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, args = parse_arguments(
        (DataArguments, ModelArguments, VLPTrainingArguments), argv, description=__doc__
    )
    if not model_args.model_name_or_path and not (model_args.vision_model and model_args.language_model):
        raise SystemExit(
            "llava_stage1.py: --vision_model and --language_model are missing (or --model_name_or_path to go on)"
        )
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(), data.eval_rows()

    # 2. Processor and model
    model, processor = load_parts(model_args)
    say(apply_stage(model, args.stage or "stage1"))

    # 3. Datasets and collator
    train = CaptionConversations(rows, seed=args.seed, transform=data.transform(model.config.vision_config.image_size))
    evaluation = CaptionConversations(eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = ConversationCollator(processor, template="plain", max_length=data.max_length, limits=data.limits)

    # 4. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        settings={"data": run_settings(data), "model_arguments": run_settings(model_args)},
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


def load_parts(arguments: ModelArguments) -> tuple[Any, Any]:
    """The model in float32 and its processor, from a folder or from the parts."""
    if arguments.model_name_or_path:
        folder = arguments.model_name_or_path
        say_unused(arguments, OF_A_NEW_MODEL, "--model_name_or_path brings its own")
        model = load_class(folder, "model").from_pretrained(folder, dtype="float32")
        return model, load_class(folder, "processor").from_pretrained(folder)
    tower = load_vision_tower(arguments.vision_model, dtype="float32")
    processor = new_processor(
        AutoTokenizer.from_pretrained(arguments.language_model),
        tower,
        tiles=arguments.tiles,
        image_processor=AutoImageProcessor.from_pretrained(arguments.vision_model),
        features=arguments.vision_features,
        **({"max_tiles": arguments.max_tiles} if arguments.tiles else {"aspect": arguments.aspect}),
    )
    kind = LlavaNextForConditionalGeneration if arguments.tiles else LlavaForConditionalGeneration
    model = kind.from_vision_language_pretrained(
        tower,
        arguments.language_model,
        processor,
        connector=arguments.connector,
        vision_feature_layer=arguments.vision_feature_layer,
        dtype="float32",
    )
    return model, processor


if __name__ == "__main__":
    main()
