"""Tiny CogVLM models, tokenizers and batches."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_vlp.models.cogvlm.configuration_cogvlm import CogVLMConfig
from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration

VOCAB_SIZE = 259
PAD, BOS, EOS = 0, 1, 2
IMAGE = 300
IMAGE_SIZE = 16


def text_config(model_type: str = "llama", **changes: Any) -> Any:
    """Grouped-query attention, heads whose width is not width / heads."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    }
    return AutoConfig.for_model(model_type, **(settings | changes))


def language_model(model_type: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(text_config(model_type, **changes)).eval()


def vision_config(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "initializer_range": 0.15,
        **changes,
    }


def model(
    version: int = 2, seed: int = 0, model_type: str = "llama", **changes: Any
) -> CogVLMForConditionalGeneration:
    """A random model; every parameter differs, so that a swap of two shows."""
    settings: dict[str, Any] = {"vision_config": vision_config(), "text_config": text_config(model_type)}
    settings |= {"downsample": version, "visual_expert_qkv_bias": version == 2, "image_token_id": IMAGE}
    config = CogVLMConfig(**(settings | changes))
    torch.manual_seed(seed)
    made = CogVLMForConditionalGeneration(config)
    spread_weights(made, seed)
    return made.eval()


def spread_weights(module: torch.nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Weights large enough for outputs to differ between inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)


def images(number: int, seed: int = 0) -> Tensor:
    """(number, 3, IMAGE_SIZE, IMAGE_SIZE)."""
    return torch.randn(number, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def rows(made: CogVLMForConditionalGeneration, layouts: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    """A batch of rows: a positive number is so many words, a 0 an image; labels on the last word of each row.

    `rows(model, [[2, 0, 3], [4]])`: two words, an image, three words; and four words.
    """
    generator = torch.Generator().manual_seed(len(layouts))
    count = made.config.num_image_tokens
    texts = []
    for layout in layouts:
        ids = [BOS]
        for part in layout:
            words = torch.randint(3, VOCAB_SIZE, (part,), generator=generator).tolist()
            ids += words if part else [IMAGE] * count
        texts.append(ids)
    longest = max(map(len, texts))
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for ids in texts:
        fill = longest - len(ids)
        mask, labels = [1] * len(ids), [-100] * (len(ids) - 1) + [ids[-1] if ids[-1] != IMAGE else -100]
        for name, values, pad in (("input_ids", ids, PAD), ("attention_mask", mask, 0), ("labels", labels, -100)):
            batch[name].append([pad] * fill + values if left else values + [pad] * fill)
    tensors = {name: torch.tensor(values) for name, values in batch.items()}
    number = sum(part == 0 for layout in layouts for part in layout)
    return tensors | ({"pixel_values": images(number)} if number else {})


def byte_tokenizer(extra: dict[str, int] | None = None, padding_side: str = "left") -> PreTrainedTokenizerFast:
    """Bytes + 3, begin 1, end 2, padding 0; further special tokens at given ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = _bytes_of_letters()
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {letter: byte_of[letter] + 3 for letter in letters}
    vocabulary |= extra or {}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(extra or ()),
        padding_side=padding_side,
    )


def _bytes_of_letters() -> dict[str, int]:
    """The letters that stand for bytes: printable ones for themselves, others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
