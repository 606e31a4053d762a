r"""Stage 1 of BLIP-2 (arXiv 2301.12597, section 3.1): a Q-Former learns from a frozen image encoder by ITC, ITM, ITG.

On the built-in Shapes, on two CPU cores, after training_scripts/clip.py --model_type eva_clip:
    python training_scripts/blip2_stage1.py --config training_scripts/blip2_stage1_cpu.yaml \
        --vision_model outputs/clip/model --output_dir outputs/stage1
The paper's setting (16 A100 40G, under 6 days):
    accelerate launch --num_processes 16 training_scripts/blip2_stage1.py \
        --config training_scripts/blip2_stage1_paper.yaml --vision_model path/to/eva_clip_g \
        --qformer bert-base-uncased --train_data path/to/pairs --output_dir outputs/stage1

A model that knows nothing has ITC = ln of the batch over all processes, ITM = 0.637, ITG = ln of the vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import AutoTokenizer, set_seed

from hf_vlp.data import ImageTextCollator
from hf_vlp.models.blip2.modeling_blip_2 import is_generation
from hf_vlp.models.blip2.pretraining_blip_2 import Blip2ForPreTraining
from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.arguments import option, run_settings, say_unused
from hf_vlp.training.data import main_process_first, pair_dataset, texts_of_rows
from hf_vlp.training.evaluators import RetrievalEvaluator
from hf_vlp.training.feature_cache import use_cache
from hf_vlp.training.launch import say
from hf_vlp.training.presets import SIZES, new_bert_tokenizer, qformer_config

# What a BLIP-2 with a language model brings along, and what a stage-1 folder does.
IMAGE_SIDE = (
    "vision_model",
    "drop_last_layers",
    "image_size",
    "qformer_size",
    "qformer_layers",
    "qformer_dropout",
    "num_query_tokens",
    "cross_attention_frequency",
    "image_text_hidden_size",
)
FROM_SCRATCH = (*IMAGE_SIDE, "qformer", "tokenizer", "vocab_size")


@dataclass
class ModelArguments:
    """The frozen image encoder and the Q-Former."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(
        None,
        "Stage-1 folder or Hub id to go on from; or a BLIP-2 with a language model, as of `hf-vlp new`, whose image "
        "encoder and Q-Former are taken: the Q-Former's text side is then that of --qformer, or new.",
    )
    vision_model: str | None = option(None, "Folder or Hub id of the image encoder: EVA-CLIP, BLIP-2, CLIP, ViT.")
    drop_last_layers: int | None = option(None, "Blocks of the image encoder to leave out; 1 for EVA-CLIP.")
    image_size: int | None = option(None, "Side of the images in pixels, if not the image encoder's own.")
    qformer: str = option("scratch", "Folder or Hub id of the BERT that the Q-Former starts from, or 'scratch'.")
    qformer_size: str = option("tiny", "Size of a Q-Former from scratch; base is BERT-base.", choices=list(SIZES))
    qformer_layers: int | None = option(None, "Layers of a Q-Former from scratch, if not those of its size.")
    qformer_dropout: float = option(0.1, "Dropout of a Q-Former from scratch; a short run learns faster without.")
    tokenizer: str | None = option(None, "BERT tokenizer; left out: that of --qformer, or trained on the texts.")
    vocab_size: int = option(8192, "Vocabulary of a trained tokenizer, at most.")
    num_query_tokens: int = option(32, "Queries.")
    cross_attention_frequency: int = option(2, "Every how many layers the queries look at the image.")
    image_text_hidden_size: int = option(256, "Width of the contrastive features.")
    gather_keys: str = option(
        "exact", "Gradient through the compared features; LAVIS: detached.", choices=["exact", "detached"]
    )
    rerank: int = option(16, "Candidates that ITM puts in order again in the evaluation; 0 for ITC alone.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, args = parse_arguments(
        (DataArguments, ModelArguments, VLPTrainingArguments), argv, description=__doc__
    )
    if not (model_args.vision_model or model_args.model_name_or_path):
        raise SystemExit("blip2_stage1.py: --vision_model is missing (or --model_name_or_path to go on)")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(), data.eval_rows()

    # 2. Processor and model
    source = model_args.model_name_or_path
    generates = source is not None and is_generation(source)
    if source and not generates:
        say_unused(model_args, FROM_SCRATCH, "--model_name_or_path brings its own")
        processor = Blip2Processor.from_pretrained(source)
        model = Blip2ForPreTraining.from_pretrained(source, gather_keys=model_args.gather_keys)
    else:
        bert = model_args.qformer if model_args.qformer != "scratch" else None
        named = model_args.tokenizer or bert
        tokenizer = (
            AutoTokenizer.from_pretrained(named)
            if named
            else new_bert_tokenizer(texts_of_rows(rows), model_args.vocab_size)
        )
        if generates:
            say_unused(model_args, IMAGE_SIDE, "--model_name_or_path brings its own")
            say(f"stage 1 starts from the image encoder and the Q-Former of {source}; text side: {bert or 'new'}")
            images = Blip2Processor.from_pretrained(source).image_processor
            processor = Blip2Processor.for_retrieval(tokenizer, image_processor=images)
            model = Blip2ForPreTraining.from_generation_pretrained(
                source, bert, tokenizer=tokenizer, gather_keys=model_args.gather_keys
            )
        else:
            sizes = {"layers": model_args.qformer_layers, "dropout": model_args.qformer_dropout}
            model = Blip2ForPreTraining.from_vision_qformer_pretrained(
                model_args.vision_model,
                bert or qformer_config(model_args.qformer_size, **sizes),
                tokenizer=tokenizer,
                num_query_tokens=model_args.num_query_tokens,
                cross_attention_frequency=model_args.cross_attention_frequency,
                image_text_hidden_size=model_args.image_text_hidden_size,
                image_size=model_args.image_size,
                drop_last_layers=model_args.drop_last_layers,
                gather_keys=model_args.gather_keys,
            )
            processor = Blip2Processor.for_retrieval(tokenizer, image_size=model.config.vision_config.image_size)
    say(apply_stage(model, args.stage or "stage1"))

    # 3. Datasets and collator
    train = pair_dataset(rows, seed=args.seed, transform=data.transform(model.config.vision_config.image_size))
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
        evaluator=RetrievalEvaluator(
            processor,
            eval_rows,
            args.per_device_eval_batch_size,
            rerank=model_args.rerank or None,
            max_length=data.max_length,
        )
        if eval_rows is not None
        else None,
        settings={"data": run_settings(data), "model_arguments": run_settings(model_args)},
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


if __name__ == "__main__":
    main()
