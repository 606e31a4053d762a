"""Tiny LLaVAs: towers of 2-3 layers, language models of 1-2, a word tokenizer, pictures of noise."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_vlp.models.llava.initialization_llava import new_processor
from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

WORDS = [
    "USER:",
    "ASSISTANT:",
    "what",
    "is",
    "this",
    "?",
    "a",
    "red",
    "blue",
    "green",
    "square",
    "circle",
    "one",
    "two",
    "three",
    "how",
    "many",
    "shapes",
    "are",
    "there",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words and characters, with a beginning, an end and a padding token; no image token."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    tokens = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *WORDS, *characters])
    model = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=256,
    )


def vision_tower(width: int = 32, layers: int = 3, image_size: int = 16, patch_size: int = 8) -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
        )
    )


def language_model(vocab_size: int, width: int = 24, **options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )
    )


_SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA: dict[str, Any] = {**_SIZES, "intermediate_size": 32, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "mistral": {**_LLAMA, "sliding_window": 6},
    "opt": {**_SIZES, "ffn_dim": 32, "word_embed_proj_dim": 24, "max_position_embeddings": 128, "dropout": 0.0},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def any_language_model(family: str, vocab_size: int) -> PreTrainedModel:
    """A causal language model of one of `FAMILIES`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=0, **FAMILIES[family]
    )
    return AutoModelForCausalLM.from_config(config)


def llava(
    *, tiles: bool = False, seed: int = 0, connector: str = "mlp", lm: PreTrainedModel | None = None, **options: Any
) -> tuple[LlavaForConditionalGeneration | LlavaNextForConditionalGeneration, Any]:
    """A new model in eval mode and its processor; `options` of the processor."""
    torch.manual_seed(seed)
    tower, words = vision_tower(), tokenizer()
    lm = lm or language_model(len(words))
    processor = new_processor(words, tower, tiles=tiles, **options)
    cls = LlavaNextForConditionalGeneration if tiles else LlavaForConditionalGeneration
    return cls.from_vision_language_pretrained(tower, lm, processor, connector=connector).eval(), processor


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Noise of the given (width, height)."""
    draws = np.random.default_rng(seed)
    return [Image.fromarray(draws.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def batch(processor: Any, *, seed: int = 0, supervised: int = 2) -> dict[str, torch.Tensor]:
    """A right-padded batch: text alone, one picture, two pictures; the last `supervised` tokens of each are learnt."""
    texts = ["how many shapes are there ? two", "<image> what is this ? a red square", "<image> <image> three circle"]
    images = pictures((20, 13), (16, 16), (9, 30), seed=seed)
    side = processor.tokenizer.padding_side
    processor.tokenizer.padding_side = "right"
    inputs = dict(processor(images=images, text=texts, return_tensors="pt", padding=True))
    processor.tokenizer.padding_side = side
    inputs.pop("token_type_ids", None)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, mask in enumerate(inputs["attention_mask"]):
        length = int(mask.sum())
        labels[row, length - supervised : length] = inputs["input_ids"][row, length - supervised : length]
    return {**inputs, "labels": labels}
