r"""Trains a small causal language model on the texts of image-text pairs, where none is at hand.

On the built-in Shapes, on two CPU cores, in a few minutes:
    python training_scripts/language_model.py --config training_scripts/language_model_cpu.yaml \
        --output_dir outputs/opt
One for LLaVA, InstructBLIP and CogVLM, which reads of scenes in words and answers questions about them, in about half
an hour:
    python training_scripts/language_model.py --config training_scripts/language_model_told_cpu.yaml \
        --output_dir outputs/lm

BLIP-2 takes a language model that was trained on text at large; this one knows nothing but the captions' language. The
loss starts at ln of the vocabulary and ends near the entropy of the captions.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    set_seed,
)

from hf_vlp.data.tokenizers import train_opt_tokenizer
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, parse_arguments
from hf_vlp.training.arguments import option, run_settings
from hf_vlp.training.data import main_process_first, texts_of_rows
from hf_vlp.training.text import BREAK, TextCollator, TextDataset, text_lines
from hf_vlp.training.told import told_texts


@dataclass
class ModelArguments:
    """The language model."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "Folder or Hub id to go on from; left out: from scratch.")
    text_file: str | None = option(
        None,
        "Text to train on in place of the pairs' texts: one a line, or JSON lines with a `text` (.jsonl); a tab where "
        "it begins anew.",
    )
    told_scenes: int | None = option(
        None, "Train on as many scenes of Shapes told in words, with questions and answers, in place of pairs' texts."
    )
    model_type: str = option("opt", "Kind of model, from scratch; CogVLM needs a llama.", choices=["opt", "llama"])
    hidden_size: int = option(128, "Width, from scratch.")
    num_hidden_layers: int = option(4, "Layers, from scratch.")
    num_attention_heads: int = option(4, "Heads, from scratch.")
    max_position_embeddings: int = option(256, "Longest sequence in tokens, the image's queries included.")
    vocab_size: int = option(2048, "Vocabulary of a trained tokenizer, at most.")
    dropout: float = option(0.0, "Dropout, from scratch.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, model_args, args = parse_arguments(
        (DataArguments, ModelArguments, VLPTrainingArguments), argv, description=__doc__
    )
    if model_args.text_file and model_args.told_scenes:
        raise SystemExit("language_model.py: --text_file and --told_scenes are two texts; give one of them")
    # There is no image that a loss could miss.
    args.sanity = False
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        if model_args.text_file:
            rows, eval_rows = text_lines(model_args.text_file), None
        elif model_args.told_scenes:
            texts = list(told_texts(model_args.told_scenes, data.shapes_preset))
            rows, eval_rows = Dataset.from_dict({"text": texts}), None
        else:
            rows, eval_rows = data.train_rows(), data.eval_rows()

    # 2. Tokenizer and model
    if model_args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype="float32")
    else:
        tokenizer = train_opt_tokenizer(
            (piece for text in texts_of_rows(rows) for piece in text.split(BREAK)),
            model_args.vocab_size,
            max_length=model_args.max_position_embeddings,
        )
        model = new_model(model_args, tokenizer)

    collator = TextCollator(tokenizer, max_length=data.max_length)
    if model.config.model_type == "llama":
        # CogVLM's answers end with the end token, and its language model never learns again.
        collator.stop = tokenizer.eos_token_id

    # 3. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        TextDataset(rows, seed=args.seed),
        TextDataset(eval_rows, seed=args.seed) if eval_rows is not None else None,
        processing_class=tokenizer,
        settings={"data": run_settings(data), "model_arguments": run_settings(model_args)},
    )

    # 4. Train, evaluate, save
    trainer.train()
    return trainer.finish()


def new_model(arguments: ModelArguments, tokenizer: Any) -> PreTrainedModel:
    """A language model with random weights for a tokenizer."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.num_hidden_layers,
        "num_attention_heads": arguments.num_attention_heads,
        "max_position_embeddings": arguments.max_position_embeddings,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    if arguments.model_type == "llama":
        inner = 8 * arguments.hidden_size // 3
        return LlamaForCausalLM(LlamaConfig(intermediate_size=inner, attention_dropout=arguments.dropout, **shared))
    width = arguments.hidden_size
    config = OPTConfig(word_embed_proj_dim=width, ffn_dim=4 * width, dropout=arguments.dropout, **shared)
    return OPTForCausalLM(config)


if __name__ == "__main__":
    main()
