r"""Pretraining of ALBEF (arXiv 2107.07651, section 3): ITC, ITM and MLM with momentum distillation.

On the built-in Shapes, on two CPU cores, in some minutes:
    python training_scripts/albef.py --config training_scripts/albef_cpu.yaml --output_dir outputs/albef
From a ViT and a BERT, the paper's setting (8 A100, 30 epochs):
    accelerate launch --num_processes 8 training_scripts/albef.py --config training_scripts/albef_paper.yaml \
        --vision_model facebook/deit-base-patch16-224 --text_model google-bert/bert-base-uncased \
        --train_data path/to/pairs --output_dir outputs/albef
Ablations: --objectives itc itm leaves MLM out, --negatives random, --distill false.
Before NLVR2, one epoch of text assignment (section 5):
    python training_scripts/albef.py --text_assignment --model_name_or_path outputs/albef/model \
        --train_data path/to/pairs --num_train_epochs 1 --output_dir outputs/albef-assigned

A model that knows nothing has ITC = ln of batch and queue together, ITM = 0.637, MLM = ln of the vocabulary.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

from transformers import AutoTokenizer, set_seed

from hf_vlp.data import ImageTextCollator
from hf_vlp.models.albef.finetuning_albef import AlbefForTextAssignment
from hf_vlp.models.albef.pretraining_albef import AlbefForPreTraining
from hf_vlp.models.albef.processing_albef import AlbefProcessor
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.arguments import option, run_settings, say_unused
from hf_vlp.training.data import main_process_first, pair_dataset, texts_of_rows, whole_batches
from hf_vlp.training.evaluators import RetrievalEvaluator
from hf_vlp.training.launch import say
from hf_vlp.training.momentum import MomentumArguments, ObjectiveArguments
from hf_vlp.training.presets import SIZES, albef_config, new_bert_tokenizer
from hf_vlp.training.tasks import check_paths, fit_processor, image_size_of

# What a folder to go on from brings along.
OF_A_MODEL = (
    "vision_model", "text_model", "size", "patch_size", "fusion_layer", "projection_dim", "dropout", "tokenizer",
    "vocab_size",
)  # fmt: skip


@dataclass
class ModelArguments:
    """The towers."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "ALBEF folder or Hub id to go on from, twin and queue included.")
    vision_model: str | None = option(None, "Folder or Hub id of a ViT to start from; with --text_model.")
    text_model: str | None = option(None, "Folder or Hub id of a BERT to start from; with --vision_model.")
    size: str = option("tiny", "Size from scratch; base is ViT-B/16 with BERT-base.", choices=list(SIZES))
    image_size: int | None = option(None, "Side of the images in pixels; position embeddings are interpolated to it.")
    patch_size: int | None = option(None, "Side of a patch in pixels, from scratch.")
    fusion_layer: int | None = option(None, "First text layer that looks at the image; left out: half of the layers.")
    projection_dim: int = option(256, "Width of the contrastive features of a new model.")
    dropout: float = option(0.1, "Dropout of the text layers from scratch; a short run learns faster without.")
    tokenizer: str | None = option(None, "BERT tokenizer; left out: that of --text_model, or trained on the texts.")
    vocab_size: int = option(8192, "Vocabulary of a trained tokenizer, at most.")
    max_words: int | None = option(None, "Words after which a caption is cut; the original: 30.")
    mlm_probability: float | None = option(None, "Share of the words that are masked; the paper: 0.15.")
    text_assignment: bool = option(False, "Pretrain the model for pairs of images instead, by text assignment.")
    rerank: int = option(16, "Candidates that ITM puts in order again in the evaluation; 0 for ITC alone.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, objectives, momentum, args = parse_arguments(
        (DataArguments, ModelArguments, ObjectiveArguments, MomentumArguments, VLPTrainingArguments),
        argv,
        description=__doc__,
    )
    folder = model_args.model_name_or_path
    if bool(model_args.vision_model) != bool(model_args.text_model):
        raise SystemExit("albef.py: --vision_model and --text_model go together; leave both out to start from scratch")
    if model_args.text_assignment and not folder:
        raise SystemExit("albef.py: --text_assignment starts from a pretrained model: --model_name_or_path is missing")
    check_paths("albef.py", model_args, "model_name_or_path", "vision_model", "text_model", "tokenizer")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        rows, eval_rows = data.train_rows(), data.eval_rows()

    # 2. Processor and model
    settings = {} if model_args.text_assignment else momentum.settings(rows, args) | objectives.settings()
    if model_args.mlm_probability is not None:
        settings["mlm_probability"] = model_args.mlm_probability
    if folder:
        say_unused(model_args, OF_A_MODEL, "--model_name_or_path brings its own")
        processor = AlbefProcessor.from_pretrained(folder)
        if model_args.text_assignment:
            for group in (momentum, objectives):
                say_unused(group, [entry.name for entry in fields(group)], "text assignment has one term and no twin")
            say_unused(model_args, ("mlm_probability",), "text assignment masks nothing")
            # It draws two other images of the batch, and a last batch may have none.
            args.dataloader_drop_last, eval_rows = True, whole_batches(eval_rows, args)
            model = AlbefForTextAssignment.from_retrieval(folder, image_size=model_args.image_size)
        else:
            model = AlbefForPreTraining.from_pretrained(folder, image_size=model_args.image_size, **settings)
    else:
        named = model_args.tokenizer or model_args.text_model
        tokenizer = (
            AutoTokenizer.from_pretrained(named)
            if named
            else new_bert_tokenizer(texts_of_rows(rows), model_args.vocab_size)
        )
        sizes = {
            "image_size": model_args.image_size,
            "fusion_layer": model_args.fusion_layer,
            "projection_dim": model_args.projection_dim,
        }
        if model_args.vision_model:
            say_unused(
                model_args, ("size", "patch_size", "dropout"), "--vision_model and --text_model bring their own"
            )
            towers = model_args.vision_model, model_args.text_model
            model = AlbefForPreTraining.from_vision_text_pretrained(*towers, tokenizer=tokenizer, **sizes, **settings)
        else:
            shape = {"patch_size": model_args.patch_size, "dropout": model_args.dropout}
            model = AlbefForPreTraining(albef_config(model_args.size, tokenizer, **sizes, **shape), **settings)
        processor = AlbefProcessor.for_image_size(tokenizer, image_size_of(model))
    fit_processor(processor, image_size_of(model), model_args.max_words)
    say(apply_stage(model, args.stage or "pretrain"))

    # 3. Datasets and collator
    train = pair_dataset(rows, seed=args.seed, transform=data.transform(image_size_of(model)))
    evaluation = pair_dataset(eval_rows, seed=args.seed) if eval_rows is not None else None
    collator = ImageTextCollator(processor, max_length=data.max_length, limits=data.limits)

    # 4. Trainer
    rerank = model_args.rerank if "itm" in objectives.chosen("mlm") else None
    scored = eval_rows is not None and not model_args.text_assignment
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        evaluation,
        processing_class=processor,
        evaluator=RetrievalEvaluator(processor, eval_rows, args.per_device_eval_batch_size, rerank=rerank or None)
        if scored
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
