"""Tiny random models, processors and batches of the CLIP family, made in memory."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, PreTrainedConfig

from hf_vlp.models.clip.processing_clip import CLIPProcessor
from hf_vlp.models.clip.tokenization_clip import train_clip_tokenizer

IMAGE_SIZE = 32
VOCAB_SIZE = 100
START, END = VOCAB_SIZE - 2, VOCAB_SIZE - 1
TEXTS = (
    "a red circle above a blue square",
    "two green triangles",
    "a large yellow star to the left of a small red cross",
    "nothing but a black dot",
)


def text_config(**changes: Any) -> dict[str, Any]:
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    return config | changes


def vision_config(**changes: Any) -> dict[str, Any]:
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 16,
    }
    return config | changes


def clip_config(**changes: Any) -> CLIPConfig:
    return CLIPConfig(text_config=text_config(), vision_config=vision_config(), **({"projection_dim": 24} | changes))


def eva_clip_config(**changes: Any) -> PreTrainedConfig:
    from hf_vlp.models.eva_clip.configuration_eva_clip import EvaCLIPConfig

    return EvaCLIPConfig(
        text_config=text_config(), vision_config=vision_config(), **({"projection_dim": 24} | changes)
    )


def clip_resnet_config(**changes: Any) -> PreTrainedConfig:
    from hf_vlp.models.clip_resnet.configuration_clip_resnet import CLIPResNetConfig

    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": IMAGE_SIZE}
    return CLIPResNetConfig(text_config=text_config(), vision_config=vision, **({"projection_dim": 24} | changes))


def align_config(**changes: Any) -> PreTrainedConfig:
    from transformers import AlignConfig

    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "vocab_size": VOCAB_SIZE,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {
        "image_size": IMAGE_SIZE,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.2,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "strides": [2, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 6],
        "hidden_dim": 16,
        "drop_connect_rate": 0.0,
    }
    return AlignConfig(text_config=text, vision_config=vision, **({"projection_dim": 8} | changes))


CONFIGS = {
    "clip": clip_config,
    "eva_clip": eva_clip_config,
    "clip_resnet": clip_resnet_config,
    "align": align_config,
}


def config_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    return CONFIGS[model_type](**changes)


def batch(pairs: int = 4, length: int = 12, seed: int = 0, longest: int | None = None) -> dict[str, Tensor]:
    """Random pixels, and texts of 1 to `longest` words (default: up to the length) in front of the padding."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, (longest or length - 2) + 1, (pairs,), generator=generator)
    input_ids = torch.full((pairs, length), END)
    attention_mask = torch.zeros(pairs, length, dtype=torch.int64)
    for row, count in enumerate(words.tolist()):
        input_ids[row, 0] = START
        input_ids[row, 1 : count + 1] = torch.randint(0, START, (count,), generator=generator)
        attention_mask[row, : count + 2] = 1
    pixel_values = torch.randn(pairs, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}


def images(count: int = 4, size: int = 40) -> list[Image.Image]:
    """Plain images of different colours."""
    return [
        Image.new("RGB", (size, size + index), (60 * index % 256, 200, 255 - 50 * index)) for index in range(count)
    ]


def processor() -> CLIPProcessor:
    """A processor whose tokenizer was trained on `TEXTS`; configs must take their vocabulary from it."""
    return CLIPProcessor.for_image_size(train_clip_tokenizer(TEXTS, 600, context_length=16), IMAGE_SIZE)


def text_config_of(processor: CLIPProcessor, **changes: Any) -> dict[str, Any]:
    """A tiny text config that fits the processor's tokenizer."""
    tokenizer = processor.tokenizer
    return text_config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
