r"""Contrastive pretraining of image and text towers (CLIP, arXiv 2103.00020; ALIGN, arXiv 2102.05918).

On the built-in Shapes, on two CPU cores, in a few minutes:
    python training_scripts/clip.py --config training_scripts/clip_cpu.yaml --output_dir outputs/clip
On your own pairs:
    python training_scripts/clip.py --config training_scripts/clip_cpu.yaml --train_data path/to/data
The paper's ViT-B/32 (256 GPUs, 12 days; here on 8 GPUs, with the batch made up by gradient caching):
    accelerate launch --num_processes 8 training_scripts/clip.py --config training_scripts/clip_vit_b32_paper.yaml \
        --train_data path/to/pairs --output_dir outputs/clip-b32
A new text tower for an image tower that stays as it is (LiT, arXiv 2111.07991):
    python training_scripts/clip.py --vision_model openai/clip-vit-base-patch32 --stage locked_image \
        --train_data path/to/pairs --output_dir outputs/lit

The loss of a model that knows nothing is the logarithm of the batch over all processes (10.4 at 32,768).
"""

from dataclasses import dataclass
from typing import ClassVar, get_args

from transformers import AutoTokenizer, set_seed

from hf_vlp.data import ImageTextCollator
from hf_vlp.models.catalog import load_class
from hf_vlp.models.clip.pretraining_clip import CLIPForPreTraining
from hf_vlp.objectives.contrastive import GatherKeys
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.arguments import option, run_settings, say_unused
from hf_vlp.training.data import main_process_first, pair_dataset, texts_of_rows
from hf_vlp.training.evaluators import RetrievalEvaluator
from hf_vlp.training.feature_cache import use_cache
from hf_vlp.training.launch import say
from hf_vlp.training.presets import (
    SIZES,
    clip_family_config,
    clip_from_towers,
    default_image_size,
    new_clip_processor,
)

FROM_SCRATCH = ("model_type", "size", "image_size", "patch_size", "tokenizer", "vocab_size", "context_length")


@dataclass
class ModelArguments:
    """The dual encoder and its loss."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "Folder or Hub id to start from; left out: from scratch.")
    vision_model: str | None = option(None, "Folder or Hub id of a CLIP whose image tower is to start from.")
    text_model: str | None = option(None, "With --vision_model, the same for the text tower; left out: a new one.")
    model_type: str = option("clip", "Kind of model.", choices=["clip", "clip_resnet", "eva_clip", "align"])
    size: str = option("tiny", "Size of a model from scratch; base is ViT-B or RN50.", choices=list(SIZES))
    image_size: int | None = option(None, "Side of the images in pixels, from scratch.")
    patch_size: int | None = option(None, "Side of a patch in pixels, from scratch.")
    tokenizer: str | None = option(None, "Folder or Hub id of a tokenizer; left out: trained on the training texts.")
    vocab_size: int = option(8192, "Vocabulary of a trained tokenizer, at most.")
    context_length: int = option(77, "Longest text of a trained tokenizer, in tokens.")
    loss: str = option("softmax", "CLIP's softmax or SigLIP's sigmoid loss.", choices=["softmax", "sigmoid"])
    label_smoothing: float | None = option(None, "Of the softmax targets; left out: 0.1 for ALIGN, else 0.")
    gather_keys: str = option(
        "exact",
        "Softmax: the gradient through the features that an anchor is compared with; exact is that of one process.",
        choices=list(get_args(GatherKeys)),
    )
    tile_size: int | None = option(None, "Rows of the similarity matrix computed at a time, for very large batches.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, args = parse_arguments(
        (DataArguments, ModelArguments, VLPTrainingArguments), argv, description=__doc__
    )
    from_scratch = not (model_args.model_name_or_path or model_args.vision_model)
    if from_scratch and (args.stage == "locked_image" or model_args.text_model):
        raise SystemExit(
            "clip.py: --vision_model is missing: --stage locked_image keeps an image tower that was trained before, "
            "and --text_model goes with one"
        )
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(), data.eval_rows()

    # 2. Processor and model
    losses = {
        "loss": model_args.loss,
        "label_smoothing": model_args.label_smoothing,
        "gather_keys": model_args.gather_keys,
        "tile_size": model_args.tile_size,
    }
    if model_args.model_name_or_path:
        say_unused(model_args, (*FROM_SCRATCH, "vision_model", "text_model"), "--model_name_or_path brings its own")
        processor = load_class(model_args.model_name_or_path, "processor").from_pretrained(
            model_args.model_name_or_path
        )
        model = CLIPForPreTraining.from_pretrained(model_args.model_name_or_path, **losses)
    elif model_args.vision_model:
        say_unused(model_args, ("model_type", "image_size", "patch_size"), "--vision_model brings its own")
        towers, processor = clip_from_towers(
            model_args.vision_model,
            model_args.text_model,
            size=model_args.size,
            tokenizer=model_args.tokenizer,
            texts=texts_of_rows(rows),
            vocab_size=model_args.vocab_size,
            context_length=model_args.context_length,
        )
        model = CLIPForPreTraining.from_inference_model(towers, **losses)
    else:
        image_size = model_args.image_size or default_image_size(model_args.size)
        tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer) if model_args.tokenizer else None
        processor = new_clip_processor(
            model_args.model_type,
            image_size,
            tokenizer=tokenizer,
            texts=texts_of_rows(rows),
            vocab_size=model_args.vocab_size,
            context_length=model_args.context_length,
        )
        config = clip_family_config(
            model_args.model_type,
            model_args.size,
            processor.tokenizer,
            image_size=image_size,
            patch_size=model_args.patch_size,
        )
        model = CLIPForPreTraining(config, **losses)
    model.check_processor(processor)
    say(apply_stage(model, args.stage or "pretrain"))

    # 3. Datasets and collator
    train = pair_dataset(rows, seed=args.seed, transform=data.transform(model.model.config.vision_config.image_size))
    evaluation = pair_dataset(eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = ImageTextCollator(processor, max_length=data.max_length, limits=data.limits)
    collator = use_cache(model, collator, [train, evaluation], data.feature_cache, dtype=data.feature_dtype, args=args)

    # 4. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=RetrievalEvaluator(processor, eval_rows, args.per_device_eval_batch_size, max_length=data.max_length)
        if eval_rows is not None
        else None,
        settings={"data": run_settings(data), "model_arguments": run_settings(model_args)},
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


if __name__ == "__main__":
    main()
