"""Tiny random BLIP models and batches, made in memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BlipConfig, ViTConfig, ViTModel

from tests.tiny.albef import images, spread_weights

IMAGE_SIZE = 32
VOCAB_SIZE = 100
PAD, CLS, SEP = 0, 2, 3
DEC, ENC = VOCAB_SIZE - 2, VOCAB_SIZE - 1
FIRST_WORD = 5


def blip_config(*, vision_width: int = 32, layers: int = 3, **text: Any) -> BlipConfig:
    """Text hidden size 32, ViT with 2 blocks of 16-pixel patches, no dropout."""
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": PAD,
        "bos_token_id": DEC,
        "enc_token_id": ENC,
        "sep_token_id": SEP,
        "eos_token_id": SEP,
    }
    return BlipConfig(vision_config=vision, text_config={**fields, **text}, image_text_hidden_size=24)


def texts(lengths: list[int], seed: int = 0, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts [CLS] words [SEP] of the given lengths, padded on the right: ids and mask."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(FIRST_WORD, DEC, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = CLS, SEP
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return ids, mask.long()


def towers(folder: Path) -> tuple[str, str]:
    """Folders of a tiny ViT and of a tiny BERT with its prediction head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vit = ViTConfig(**sizes, num_hidden_layers=2, image_size=IMAGE_SIZE, patch_size=16, layer_norm_eps=1e-6)
    bert = BertConfig(**sizes, num_hidden_layers=3, vocab_size=VOCAB_SIZE - 2, max_position_embeddings=24)
    ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "vit")
    BertForMaskedLM(bert).save_pretrained(folder / "bert")
    return str(folder / "vit"), str(folder / "bert")


__all__ = ["blip_config", "images", "spread_weights", "texts", "towers"]
