"""Captions by the Q-Former itself, after stage 1: its image-grounded text head as a small language model."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_vlp.models.blip2.qformer import KeyValue, decoding_step


class Blip2QFormerCaptioner(PreTrainedModel, GenerationMixin):
    """A causal language model around the Q-Former, whose past always begins with the queries of an image.

    Queries never see the text, so their self-attention keys and values are computed once an image and stand in front
    of the cached text at every step. Not a checkpoint of its own: made by `Blip2ForPreTraining.generate`.

    Args:
        model: the stage-1 model (`Blip2ForPreTraining`), whose modules are shared.
    """

    config: Blip2QFormerConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, model: PreTrainedModel) -> None:
        config = copy.deepcopy(model.config.qformer_config)
        config.is_decoder = True
        super().__init__(config)
        self.model = model
        generation = self.generation_config
        generation.bos_token_id = generation.decoder_start_token_id = model.settings.decoder_start_token_id
        generation.eos_token_id = model.settings.eos_token_id
        generation.pad_token_id = model.config.qformer_config.pad_token_id

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        query_keys: Tensor | None = None,
        query_values: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next tokens.

        Args:
            input_ids: (S, T) new tokens.
            attention_mask: (S, past + T), 0 at left padding.
            query_keys: (S, layers, heads, Q, head size) self-attention keys of the queries; `query_values` likewise.
            past_key_values: the earlier text.
        """
        retrieval = self.model.retrieval
        layers = len(retrieval.qformer.encoder.layer)
        past_key_values = DynamicCache() if past_key_values is None else past_key_values
        sequences, length = input_ids.shape
        before = past_key_values.get_seq_length()
        past: list[KeyValue] = []
        for index in range(layers):
            key, value = query_keys[:, index], query_values[:, index]
            if before:
                text = past_key_values.layers[index]
                key, value = torch.cat([key, text.keys], dim=2), torch.cat([value, text.values], dim=2)
            past.append((key, value))
        if attention_mask is None:
            attention_mask = input_ids.new_ones(sequences, before + length)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        mask = self._mask(attention_mask, length, query_keys.shape[3])
        states, new = decoding_step(retrieval.qformer, retrieval.embeddings, input_ids, positions, past, mask)
        logits = self.model.token_logits(states)
        if use_cache is False:
            return CausalLMOutputWithPast(logits=logits)
        for index, (key, value) in enumerate(new):
            past_key_values.update(key, value, index)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    @staticmethod
    def _mask(attention_mask: Tensor, length: int, queries: int) -> Tensor | None:
        """(S, 1, T, Q + past + T) bool: queries always, text that is not padding and not in the future."""
        sequences, total = attention_mask.shape
        seen = attention_mask.bool()[:, None, :]
        if length == 1 and bool(seen.all()):
            return None
        earlier = torch.ones(length, total, dtype=torch.bool, device=seen.device).tril(total - length)
        return torch.cat([seen.new_ones(sequences, length, queries), seen & earlier], dim=-1)[:, None]


__all__ = ["Blip2QFormerCaptioner"]
