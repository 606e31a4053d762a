"""BLIP's task models that transformers has no class for (Li et al. 2022, arXiv 2201.12086, section 5).

Reasoning over two images (NLVR2), and question answering where image and text widths differ (the released ViT-L
models). Image tower, text layers and their names are those of transformers' `blip`. This file travels with the
checkpoints, and needs nothing but transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextModel, BlipVisionModel, GenerationMixin
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.blip.modeling_blip import BlipPreTrainedModel
from transformers.models.blip.modeling_blip_text import (
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextSelfAttention,
)
from transformers.utils import ModelOutput

from .configuration_blip_tasks import BlipTasksConfig


def _attention(module: BlipTextSelfAttention, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """(N, L, D) queries over (N, K, width) states; `mask` (N, K) bool, True where they may look."""

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (module.num_attention_heads, module.attention_head_size)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        heads(module.query(queries)),
        heads(module.key(keys)),
        heads(module.value(keys)),
        attn_mask=None if mask is None else mask[:, None, None, :],
        dropout_p=module.dropout.p if module.training else 0.0,
    )
    return mixed.transpose(1, 2).flatten(2)


class BlipTwinOutput(nn.Module):
    """Projects what two cross-attentions found, joins it, and adds it to the text.

    Args:
        config: of the text model.
        merge: join by a linear layer rather than by the mean.
    """

    def __init__(self, config: Any, merge: bool) -> None:
        super().__init__()
        self.dense0 = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.merge_layer = nn.Linear(2 * config.hidden_size, config.hidden_size) if merge else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, first: Tensor, second: Tensor, hidden: Tensor) -> Tensor:
        """All (N, L, D)."""
        first, second = self.dense0(first), self.dense1(second)
        if self.merge_layer is None:
            joined = (first + second) / 2
        else:
            joined = self.merge_layer(torch.cat([first, second], dim=-1))
        return self.LayerNorm(self.dropout(joined) + hidden)


class BlipTwinCrossAttention(nn.Module):
    """Two cross-attentions from the same text states, `self0` to the first image and `self1` to the second."""

    def __init__(self, config: Any, layer: int, merge: bool) -> None:
        super().__init__()
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True, layer_idx=layer)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True, layer_idx=layer)
        self.output = BlipTwinOutput(config, merge)

    def forward(self, hidden: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(N, L, D) text states that look at images (N, K, width) and (N, K, width)."""
        seen = _attention(self.self0, hidden, first, None), _attention(self.self1, hidden, second, None)
        return self.output(*seen, hidden)


class BlipTwinTextModel(BlipTextModel):
    """The text encoder that looks at two images in every layer.

    Args:
        config: `text_config`, with `merge_from`.
    """

    def __init__(self, config: Any, merge_from: int) -> None:
        super().__init__(config, add_pooling_layer=False)
        for i, layer in enumerate(self.encoder.layer):
            layer.crossattention = BlipTwinCrossAttention(config, i, merge=i >= merge_from)
        self.post_init()

    def twin_layer(self, layer: BlipTextLayer, hidden: Tensor, mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """One layer on (N, L, D)."""
        own = layer.attention
        hidden = own.output(_attention(own.self, hidden, hidden, mask), hidden)
        return layer.feed_forward_chunk(layer.crossattention(hidden, first, second))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, first: Tensor, second: Tensor) -> Tensor:
        """(N, L) texts and image tokens (N, K, width) twice to (N, L, D)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.embeddings(input_ids=input_ids)
        mask = attention_mask.bool()
        for layer in self.encoder.layer:
            if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
                hidden = layer._gradient_checkpointing_func(self.twin_layer, layer, hidden, mask, first, second)
            else:
                hidden = self.twin_layer(layer, hidden, mask, first, second)
        return hidden


class BlipTasksPreTrainedModel(BlipPreTrainedModel):
    """Loading and initialisation of the task models."""

    config: BlipTasksConfig
    config_class = BlipTasksConfig
    base_model_prefix = ""

    def first_token(self) -> int:
        """Id of [ENC], which comes first in texts that look at images."""
        own = getattr(self.config.text_config, "enc_token_id", None)
        return self.config.text_config.bos_token_id + 1 if own is None else own

    def with_enc(self, input_ids: Tensor) -> Tensor:
        """(N, L) with [ENC] first."""
        return torch.cat([torch.full_like(input_ids[:, :1], self.first_token()), input_ids[:, 1:]], dim=1)


class BlipTasksForVisualReasoning(BlipTasksPreTrainedModel):
    """Is the statement true of the two images (NLVR2)? Figure 5b of the paper."""

    _auto_class = "AutoModel"

    def __init__(self, config: BlipTasksConfig) -> None:
        super().__init__(config)
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTwinTextModel(config.text_config, config.merge_from)
        hidden = config.text_config.hidden_size
        self.classifier = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, config.num_labels))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, H, W) to all tokens (I, K, width)."""
        return self.vision_model(pixel_values).last_hidden_state

    def encode_image_pairs(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 2, 3, H, W) to the tokens (N, K, width) of the first and of the second images.

        Raises:
            ValueError: not two images a text.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                "a statement is about exactly two images: pixel_values must be (texts, 2, 3, height, width), "
                f"but has shape {tuple(pixel_values.shape)}"
            )
        first, second = self.encode_images(pixel_values.transpose(0, 1).flatten(0, 1)).chunk(2)
        return first, second

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Classifies statement i about its two images.

        Args:
            pixel_values: (N, 2, 3, H, W).
            input_ids: (N, L); the first token is replaced by [ENC].
            attention_mask: (N, L).
            labels: (N,) 1 = true; gives the mean cross-entropy as `loss`.
            return_dict: return a `SequenceClassifierOutput` rather than a tuple.

        Raises:
            ValueError: shapes do not fit, or a label is out of range.
        """
        first, second = self.encode_image_pairs(pixel_values)
        if len(first) != len(input_ids):
            raise ValueError(f"there are {len(first)} pairs of images for {len(input_ids)} statements")
        states = self.text_encoder(self.with_enc(input_ids), attention_mask, first, second)
        logits = self.classifier(states[:, 0])
        loss = None
        if labels is not None:
            check_labels(labels, *logits.shape)
            loss = F.cross_entropy(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict else output.to_tuple()


def check_labels(labels: Tensor, number: int, classes: int) -> None:
    """Raises `ValueError` unless there is a label in 0..classes-1 for each of `number` rows."""
    if labels.shape != (number,):
        raise ValueError(f"labels must hold one class for each of {number} texts, but has shape {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, but reach from {low} to {high}: check the label map")


class BlipTasksForQuestionAnswering(BlipTasksPreTrainedModel, GenerationMixin):
    """Question answering with an answer decoder of the text's width, whatever that of the images."""

    _auto_class = "AutoModel"
    _tied_weights_keys = {
        "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
        "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    }

    def __init__(self, config: BlipTasksConfig) -> None:
        super().__init__(config)
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        decoder = type(config.text_config).from_dict(config.text_config.to_dict())
        decoder.encoder_hidden_size = config.text_config.hidden_size
        self.text_decoder = BlipTextLMHeadModel(decoder)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **generate_kwargs: Any
    ) -> Tensor:
        """Free answers to questions (N, L) about images (N, 3, H, W); see `GenerationMixin.generate`."""
        states = self.vision_model(pixel_values).last_hidden_state
        questions = self.text_encoder(
            input_ids=self.with_enc(input_ids), attention_mask=attention_mask, encoder_hidden_states=states
        ).last_hidden_state
        text = self.config.text_config
        generate_kwargs.setdefault("eos_token_id", text.sep_token_id)
        generate_kwargs.setdefault("pad_token_id", text.pad_token_id)
        start = torch.full((len(questions), 1), text.bos_token_id, device=questions.device)
        return self.text_decoder.generate(input_ids=start, encoder_hidden_states=questions, **generate_kwargs)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        decoder_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> ModelOutput:
        """Logits of answers (N, La) that start with [DEC]; arguments as of transformers' class."""
        if decoder_input_ids is None:
            raise ValueError("pass decoder_input_ids, or call generate()")
        states = self.vision_model(pixel_values).last_hidden_state
        questions = self.text_encoder(
            input_ids=self.with_enc(input_ids), attention_mask=attention_mask, encoder_hidden_states=states
        ).last_hidden_state
        return self.text_decoder(input_ids=decoder_input_ids, encoder_hidden_states=questions)


__all__ = [
    "BlipTasksForQuestionAnswering",
    "BlipTasksForVisualReasoning",
]
