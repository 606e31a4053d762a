"""Tiny random ALBEF models and batches, made in memory."""

from typing import Any

import torch
from torch import Tensor

from hf_vlp.models.albef.configuration_albef import AlbefConfig

IMAGE_SIZE = 32
VOCAB_SIZE = 100
PAD, CLS, SEP, MASK = 0, 2, 3, 4
FIRST_WORD = 5


def albef_config(*, fusion_layer: int = 2, layers: int = 4, images_per_text: int = 1, **changes: Any) -> AlbefConfig:
    """Hidden size 32, ViT with 2 blocks of 16-pixel patches, no dropout."""
    vision = {
        "model_type": "vit",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": PAD,
        "bos_token_id": CLS,
        "eos_token_id": SEP,
        "mask_token_id": MASK,
        "fusion_layer": fusion_layer,
        "images_per_text": images_per_text,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return AlbefConfig(vision_config=vision, text_config=text, **({"projection_dim": 24} | changes))


def images(number: int, seed: int = 0, size: int = IMAGE_SIZE) -> Tensor:
    """(number, 3, size, size)."""
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def texts(lengths: list[int], seed: int = 0, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts [CLS] words [SEP] of the given lengths, padded on the right: ids and mask."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(FIRST_WORD, VOCAB_SIZE, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = CLS, SEP
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return ids, mask.long()


def spread_weights(model: torch.nn.Module, seed: int = 0, std: float = 0.15) -> torch.nn.Module:
    """Makes the weights of a random model large enough for its outputs to differ between inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
