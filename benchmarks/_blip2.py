"""What the BLIP-2 benchmarks share: the retrieval model at its published size, and random captions."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2Config

IMAGE_TOKENS, IMAGE_WIDTH = 257, 1408
VOCABULARY = 30523  # BERT's and [DEC]
PAD, CLS, SEP = 0, 101, 102
SHORTEST, LONGEST = 8, 20
TEXT_LENGTH = 32  # to which the original pads


def stage1_config(small: bool = False, **qformer: Any) -> Blip2Config:
    """Q-Former of base size with 32 queries. The vision tower, which the benchmarks do not run, has no layer."""
    vision = {"hidden_size": IMAGE_WIDTH, "num_hidden_layers": 0, "initializer_range": 0.02}
    text: dict[str, Any] = {"vocab_size": VOCABULARY, "use_qformer_text_input": True}
    if small:
        vision |= {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
        text |= {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
        text |= {"vocab_size": 600}
    return Blip2Config(vision_config=vision, qformer_config=text | qformer)


def captions(count: int, padded: int | None, vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """`count` captions of 8 to 20 tokens, [CLS] and [SEP] included, one of them of 20, padded to `padded` tokens or to
    the longest.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator)
    lengths[0] = LONGEST
    input_ids = torch.randint(SEP + 1, vocabulary - 1, (count, padded or LONGEST), generator=generator)
    position = torch.arange(input_ids.shape[1])
    mask = position < lengths[:, None]
    input_ids[:, 0] = CLS
    input_ids[position == lengths[:, None] - 1] = SEP
    input_ids[~mask] = PAD
    return {"input_ids": input_ids, "attention_mask": mask.long()}


def set_attention(model: nn.Module, implementation: str) -> None:
    """Sets the attention of every part; FLOPs are counted with "eager", whose products the counter sees on every "
    "device."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = implementation
