"""What CogVLM's benchmarks share: a model, a batch, and the plain way of the code that lies beside the checkpoints.

That code writes the output of each expert into a tensor by a mask, for each matrix of each layer and in each step of
the generation. `MaskedCogVLM` computes so, on the same weights and in the same `generate` of transformers; with
`double=True` both experts compute all tokens and the mask chooses, as the simplest implementation would.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, LlamaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from hf_vlp.models.cogvlm.configuration_cogvlm import CogVLMConfig
from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration

IMAGE, PAD = 4, 0


def make_model(small: bool, layers: int) -> CogVLMForConditionalGeneration:
    """A CogVLM of a Llama of 512 (48) wide, with random weights. The image encoder is left at one layer."""
    width = 48 if small else 512
    text = LlamaConfig(
        vocab_size=500 if small else 8000, hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=width // (12 if small else 64), initializer_range=0.1,
        num_key_value_heads=width // (12 if small else 64), max_position_embeddings=4096, pad_token_id=PAD,
    )  # fmt: skip
    vision = {
        "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 56 if small else 224, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CogVLMForConditionalGeneration(
        CogVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.02)
    model.generation_config.eos_token_id = None
    return model


def make_batch(model: CogVLMForConditionalGeneration, batch: int, words: int) -> dict[str, Tensor]:
    """An image and then words in every row."""
    ids = torch.randint(5, model.config.text_config.vocab_size, (batch, 1 + model.config.num_image_tokens + words))
    ids[:, 1 : 1 + model.config.num_image_tokens] = IMAGE
    side = model.config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, side, side)}


class MaskedCogVLM:
    """The same network, routed by masks.

    Args:
        model: whose weights are used.
        double: both experts compute every token.
    """

    def __init__(self, model: CogVLMForConditionalGeneration, double: bool = False) -> None:
        self.model, self.double = model, double
        self.fused = []
        for expert, layer in zip(model.visual_experts, model.language_model.model.layers, strict=True):
            pairs = []
            for owner in (expert, layer.self_attn):
                pairs.append(torch.cat([getattr(owner, name).weight for name in ("q_proj", "k_proj", "v_proj")]))
            self.fused.append(pairs)

    def routed(self, x: Tensor, mask: Tensor, seen: Callable, read: Callable) -> Tensor:
        """Each token through the expert that the mask says."""
        if self.double:
            return torch.where(mask[..., None], seen(x), read(x))
        other = ~mask
        first, second = seen(x[mask]), read(x[other])
        mixed = torch.empty(*x.shape[:-1], second.shape[-1], dtype=x.dtype, device=x.device)
        mixed[mask], mixed[other] = first, second
        return mixed

    def layer(self, number: int, x: Tensor, mask: Tensor, rotary: tuple, cache: Cache) -> Tensor:
        """One layer; keys and values are put into the cache."""
        layer, expert = self.model.language_model.model.layers[number], self.model.visual_experts[number]
        attention, (seen, read) = layer.self_attn, self.fused[number]
        normed = layer.input_layernorm(x)
        mixed = self.routed(normed, mask, lambda t: F.linear(t, seen), lambda t: F.linear(t, read))
        heads = mixed.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        groups = attention.num_key_value_groups
        queries = heads.shape[1] * groups // (groups + 2)
        query, key, value = heads.split([queries, queries // groups, queries // groups], dim=1)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        key, value = cache.update(key, value, number)
        out = F.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), is_causal=query.shape[2] > 1
        )
        out = out.transpose(1, 2).flatten(2)
        x = x + self.routed(out, mask, expert.o_proj, attention.o_proj)
        normed = layer.post_attention_layernorm(x)
        return x + self.routed(normed, mask, lambda t: gated(expert, t), layer.mlp)

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Cache,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        image_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """A step of `generate`; rows without padding."""
        model, inner = self.model, self.model.language_model.model
        x = inner.embed_tokens(input_ids)
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        if image_embeds is not None:
            seen = token_type_ids == 1
            x = x.masked_scatter(seen[..., None], model.get_image_features(image_embeds=image_embeds))
            # The end of an image goes through the language model's matrices.
            mask[:, :-1] = seen[:, :-1] & seen[:, 1:]
        rotary = inner.rotary_emb(x, position_ids)
        for number in range(len(inner.layers)):
            x = self.layer(number, x, mask, rotary, past_key_values)
        logits = model.language_model.lm_head(inner.norm(x[:, -logits_to_keep:]))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def generate(self, **inputs: Any) -> Tensor:
        """The model's own `generate`, with this forward pass."""
        other = copy.copy(self.model)
        other.forward = self.forward
        return other.generate(**inputs)


def gated(expert: torch.nn.Module, x: Tensor) -> Tensor:
    """The expert's MLP."""
    return expert.down_proj(F.silu(expert.gate_proj(x)) * expert.up_proj(x))
