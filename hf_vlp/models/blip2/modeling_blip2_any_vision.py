"""BLIP-2 (arXiv 2301.12597) on any vision model of transformers, such as CLIP ViT-L.

The Q-Former, the language model and the way from one to the other are transformers' own BLIP-2; only the vision tower
is another. This file travels with the checkpoints, and needs nothing but transformers.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip_2.modeling_blip_2 import Blip2PreTrainedModel, Blip2TextEmbeddings

from .configuration_blip2_any_vision import Blip2AnyVisionConfig


class Blip2AnyVisionTower(nn.Module):
    """A vision model of transformers and the LayerNorm that BLIP-2 trains behind it.

    Args:
        config: of the whole model.
    """

    def __init__(self, config: Blip2AnyVisionConfig) -> None:
        super().__init__()
        self.config = config.vision_config
        self.vision_output = config.vision_output
        self.tower = AutoModel.from_config(config.vision_config)
        self.post_layernorm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.vision_layer_norm_eps)
        if self.vision_output == "last_layer":
            self._last_layer()

    def _last_layer(self) -> nn.Module:
        depth = self.config.num_hidden_layers
        for module in self.tower.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module[-1]
        raise ValueError(
            f"{type(self.tower).__name__} has no stack of {depth} blocks; set vision_output='last_hidden_state'"
        )

    def states(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, 3, H, W) images to (B, tokens, hidden) states, before the trained LayerNorm."""
        # Some towers take any size as it comes.
        knows = "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters
        arguments = {"interpolate_pos_encoding": True} if interpolate_pos_encoding and knows else {}
        pixel_values = pixel_values.to(next(self.tower.parameters()).dtype)
        if self.vision_output == "last_hidden_state":
            return self.tower(pixel_values, **arguments).last_hidden_state
        # What comes out of the tower may have passed its final norm; the last block's output is taken where it is
        # made.
        seen: list[Any] = []
        handle = self._last_layer().register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            self.tower(pixel_values, **arguments)
        finally:
            handle.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Image features after the trained LayerNorm, as the native tower gives them."""
        states = self.post_layernorm(self.states(pixel_values, interpolate_pos_encoding))
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.post_layernorm(states[:, 0]))


def _init_query_tokens(model: Blip2PreTrainedModel, config: Blip2AnyVisionConfig) -> None:
    model.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))


class Blip2AnyVisionForImageTextRetrieval(Blip2ForImageTextRetrieval):
    """Retrieval and matching (stage 1); use as `Blip2ForImageTextRetrieval` of transformers."""

    config_class = Blip2AnyVisionConfig
    config: Blip2AnyVisionConfig
    _auto_class = "AutoModel"

    def __init__(self, config: Blip2AnyVisionConfig) -> None:
        # The parent's constructor can build EVA-ViT only; the one above it builds nothing.
        Blip2PreTrainedModel.__init__(self, config)
        self.vision_model = Blip2AnyVisionTower(config)
        _init_query_tokens(self, config)
        hidden = config.qformer_config.hidden_size
        self.embeddings = Blip2TextEmbeddings(config.qformer_config)
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.vision_projection = nn.Linear(hidden, config.image_text_hidden_size)
        self.text_projection = nn.Linear(hidden, config.image_text_hidden_size)
        self.itm_head = nn.Linear(hidden, 2)
        self.post_init()


class Blip2AnyVisionForConditionalGeneration(Blip2ForConditionalGeneration):
    """Text from images (stage 2); use as `Blip2ForConditionalGeneration` of transformers."""

    config_class = Blip2AnyVisionConfig
    config: Blip2AnyVisionConfig
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: Blip2AnyVisionConfig) -> None:
        Blip2PreTrainedModel.__init__(self, config)
        self.vision_model = Blip2AnyVisionTower(config)
        _init_query_tokens(self, config)
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        auto = AutoModelForCausalLM if config.use_decoder_only_language_model else AutoModelForSeq2SeqLM
        self.language_model = auto.from_config(config.text_config)
        self.post_init()


__all__ = [
    "Blip2AnyVisionForConditionalGeneration",
    "Blip2AnyVisionForImageTextRetrieval",
    "Blip2AnyVisionTower",
]
