"""Tiny random Qwen-VL models, a tokenizer and batches, made in memory."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from hf_vlp.models.qwen_vl.configuration_qwen_vl import QwenVLConfig
from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
from hf_vlp.models.qwen_vl.processing_qwen_vl import QwenVLProcessor
from tests.tiny.blip2 import llama_tokenizer, wake

IMAGE_SIZE = 24
QUERIES = 4


def tokenizer() -> PreTrainedTokenizerFast:
    return llama_tokenizer()


def processor(**changes: Any) -> QwenVLProcessor:
    return QwenVLProcessor.for_image_size(tokenizer(), IMAGE_SIZE, num_query_tokens=QUERIES, **changes)


def language_config(kind: str = "qwen2", **changes: Any) -> PreTrainedConfig:
    settings = {
        "vocab_size": len(processor().tokenizer),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    return {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind](**(settings | changes))


def config(kind: str = "qwen2", vision: dict[str, Any] | None = None, **changes: Any) -> QwenVLConfig:
    made = processor()
    tower = {
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "num_positions": 16,
        "num_query_tokens": QUERIES,
        "output_dim": 24,
        "resampler_heads": 2,
        "initializer_range": 0.2,
    }
    return QwenVLConfig(
        vision_config=tower | (vision or {}),
        text_config=language_config(kind).to_dict(),
        image_start_token_id=made.image_start_token_id,
        image_end_token_id=made.image_end_token_id,
        image_token_id=made.image_token_id,
        **changes,
    )


def model(kind: str = "qwen2", seed: int = 0, **changes: Any) -> QwenVLForConditionalGeneration:
    torch.manual_seed(seed)
    made = QwenVLForConditionalGeneration(config(kind, **changes))
    table = made.resampler.position_table.clone()
    wake(made)
    made.resampler.position_table.copy_(table)
    made.generation_config.eos_token_id = processor().stop_token_ids
    made.generation_config.pad_token_id = 2
    return made.eval()


def pixels(count: int, seed: int = 1, size: int = IMAGE_SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def messages(*turns: str | tuple[str, int]) -> list[dict[str, Any]]:
    """Turns of user and assistant in alternation; a user's turn may be (text, number of images before it)."""
    made = []
    for number, turn in enumerate(turns):
        text, images = turn if isinstance(turn, tuple) else (turn, 0)
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        made.append({"role": "assistant" if number % 2 else "user", "content": content})
    return made
