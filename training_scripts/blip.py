r"""Pretraining of BLIP (arXiv 2201.12086, section 3): ITC, ITM and LM on one MED, with momentum distillation.

On the built-in Shapes, on two CPU cores, in some minutes:
    python training_scripts/blip.py --config training_scripts/blip_cpu.yaml --output_dir outputs/blip
From a ViT and a BERT, the paper's setting (2 nodes of 16 GPUs, 20 epochs):
    accelerate launch --num_processes 32 training_scripts/blip.py --config training_scripts/blip_paper.yaml \
        --vision_model google/vit-base-patch16-224-in21k --text_model google-bert/bert-base-uncased \
        --train_data path/to/pairs --output_dir outputs/blip
Bootstrapped data: training_scripts/finetune_captioning.py and finetune_retrieval.py on clean pairs, then capfilt.py.
Ablations: --objectives itc itm leaves LM out, --negatives random, --distill false.

A model that knows nothing has ITC = ln of batch and queue together, ITM = 0.637, LM = ln of the vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import AutoTokenizer, set_seed

from hf_vlp.data import ImageTextCollator
from hf_vlp.models.blip.pretraining_blip import BlipForPreTraining
from hf_vlp.models.blip.processing_blip import BlipProcessor, add_blip_tokens
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.arguments import option, run_settings, say_unused
from hf_vlp.training.data import main_process_first, pair_dataset, texts_of_rows
from hf_vlp.training.evaluators import RetrievalEvaluator
from hf_vlp.training.launch import say
from hf_vlp.training.momentum import MomentumArguments, ObjectiveArguments
from hf_vlp.training.presets import SIZES, blip_config, new_bert_tokenizer
from hf_vlp.training.tasks import check_paths, fit_processor, image_size_of

# What a folder to go on from brings along.
OF_A_MODEL = (
    "vision_model",
    "text_model",
    "size",
    "patch_size",
    "projection_dim",
    "dropout",
    "tokenizer",
    "vocab_size",
)


@dataclass
class ModelArguments:
    """The towers."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(
        None, "BLIP folder or Hub id to go on from; with twin and queue if it has them."
    )
    vision_model: str | None = option(None, "Folder or Hub id of a ViT to start from; with --text_model.")
    text_model: str | None = option(None, "Folder or Hub id of a BERT to start from; with --vision_model.")
    size: str = option("tiny", "Size from scratch; base is ViT-B/16 with BERT-base.", choices=list(SIZES))
    image_size: int | None = option(None, "Side of the images in pixels; position embeddings are interpolated to it.")
    patch_size: int | None = option(None, "Side of a patch in pixels, from scratch.")
    projection_dim: int = option(256, "Width of the contrastive features of a new model.")
    dropout: float = option(0.1, "Dropout of the text layers from scratch; a short run learns faster without.")
    tokenizer: str | None = option(None, "BERT tokenizer; left out: that of --text_model, or trained on the texts.")
    vocab_size: int = option(8192, "Vocabulary of a trained tokenizer, at most.")
    max_words: int | None = option(None, "Words after which a caption is cut, where the processor counts words.")
    rerank: int = option(16, "Candidates that ITM puts in order again in the evaluation; 0 for ITC alone.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, objectives, momentum, args = parse_arguments(
        (DataArguments, ModelArguments, ObjectiveArguments, MomentumArguments, VLPTrainingArguments),
        argv,
        description=__doc__,
    )
    folder = model_args.model_name_or_path
    if bool(model_args.vision_model) != bool(model_args.text_model):
        raise SystemExit("blip.py: --vision_model and --text_model go together; leave both out to start from scratch")
    check_paths("blip.py", model_args, "model_name_or_path", "vision_model", "text_model", "tokenizer")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(), data.eval_rows()

    # 2. Processor and model
    # The original's alpha rises over two epochs.
    settings = momentum.settings(rows, args, epochs=2) | objectives.settings()
    if folder:
        say_unused(model_args, OF_A_MODEL, "--model_name_or_path brings its own")
        processor = BlipProcessor.from_pretrained(folder)
        sizes = {} if model_args.image_size is None else {"image_size": model_args.image_size}
        model = BlipForPreTraining.from_pretrained(folder, **sizes, **settings)
    else:
        named = model_args.tokenizer or model_args.text_model
        tokenizer = (
            AutoTokenizer.from_pretrained(named)
            if named
            else new_bert_tokenizer(texts_of_rows(rows), model_args.vocab_size)
        )
        tokenizer = add_blip_tokens(tokenizer)
        if model_args.vision_model:
            say_unused(
                model_args, ("size", "patch_size", "dropout"), "--vision_model and --text_model bring their own"
            )
            model = BlipForPreTraining.from_vision_text_pretrained(
                model_args.vision_model,
                model_args.text_model,
                tokenizer=tokenizer,
                image_size=model_args.image_size,
                image_text_hidden_size=model_args.projection_dim,
                **settings,
            )
        else:
            shape = {
                "image_size": model_args.image_size,
                "patch_size": model_args.patch_size,
                "projection_dim": model_args.projection_dim,
                "dropout": model_args.dropout,
            }
            model = BlipForPreTraining(blip_config(model_args.size, tokenizer, **shape), **settings)
        processor = BlipProcessor.for_image_size(tokenizer, image_size_of(model))
    fit_processor(processor, image_size_of(model), model_args.max_words)
    say(apply_stage(model, args.stage or "pretrain"))

    # 3. Datasets and collator
    train = pair_dataset(rows, seed=args.seed, transform=data.transform(image_size_of(model)))
    evaluation = pair_dataset(eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = ImageTextCollator(processor, max_length=data.max_length, limits=data.limits)

    # 4. Trainer
    rerank = model_args.rerank if "itm" in objectives.chosen("lm") else None
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
