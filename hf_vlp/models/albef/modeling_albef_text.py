"""ALBEF's text side: one BERT stack split into text encoder and fusion encoder, and the answer decoder.

Linear layers treat every token alike, so texts are laid end to end without their padding and only the attention
products go back to a grid. An image's cross-attention keys and values are projected once a layer; the texts that look
at it, however many, are named by an index. Embeddings, feed-forwards and layer norms are those of transformers' BERT,
so a BERT checkpoint fits by name.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.models.bert.modeling_bert import (
    BertCrossAttention,
    BertEmbeddings,
    BertIntermediate,
    BertLMPredictionHead,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)

from .configuration_albef import AlbefTextConfig
from .modeling_albef_packing import LayerLayout, PackedTexts, TokenRows, attend, fusion_layouts, text_layout


class AlbefSelfAttention(BertSelfAttention):
    """BERT's self-attention over packed tokens."""

    def forward(self, hidden_states: Tensor, layout: LayerLayout, past_key_values: Cache | None = None) -> Tensor:
        """(T, D) to (queries, D)."""
        shape = (-1, self.num_attention_heads, self.attention_head_size)
        asked = hidden_states if layout.keep is None else hidden_states.index_select(0, layout.keep)
        query = self.query(asked).view(shape)
        key = layout.keys.pad(self.key(hidden_states).view(shape))
        value = layout.keys.pad(self.value(hidden_states).view(shape))
        if past_key_values is not None:
            key, value = past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
            key, value = key.transpose(1, 2), value.transpose(1, 2)
        return attend(self, query, layout.queries, key, value, layout.key_mask, layout.weights, "self")


class AlbefCrossAttention(BertCrossAttention):
    """BERT's cross-attention, whose keys and values have another width and are projected once an image.

    Args:
        config: the text tower's.
        layer_idx: place in the stack.
        own_keys: False for the second layer of a pair of twins, which uses the first one's projections.
    """

    def __init__(self, config: AlbefTextConfig, layer_idx: int, own_keys: bool = True) -> None:
        super().__init__(config, is_causal=False, layer_idx=layer_idx)
        self.key = nn.Linear(config.encoder_width, self.all_head_size) if own_keys else None
        self.value = nn.Linear(config.encoder_width, self.all_head_size) if own_keys else None

    def project(self, image_states: Tensor) -> tuple[Tensor, Tensor]:
        """(I, K, width) to keys and values (I, K, H, d)."""
        shape = (*image_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        return self.key(image_states).view(shape), self.value(image_states).view(shape)

    def forward(self, hidden_states: Tensor, key_values: tuple[Tensor, Tensor], layout: LayerLayout) -> Tensor:
        """(T, D) to (T, D)."""
        cross = layout.cross
        query = self.query(hidden_states).view(-1, self.num_attention_heads, self.attention_head_size)
        key, value = key_values
        if cross.images is not None:
            key, value = key.index_select(0, cross.images), value.index_select(0, cross.images)
        return attend(self, query, cross.rows, key, value, cross.key_mask, layout.weights, "cross")


class AlbefAttention(nn.Module):
    """An attention with its output projection and norm, under BERT's names."""

    def __init__(self, config: AlbefTextConfig, attention: nn.Module) -> None:
        super().__init__()
        self.self = attention
        self.output = BertSelfOutput(config)


class AlbefTextLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention in fusion layers, feed-forward; each with its post-norm."""

    def __init__(self, config: AlbefTextConfig, layer_idx: int, fusion: bool, own_keys: bool = True) -> None:
        super().__init__()
        self.attention = AlbefAttention(config, AlbefSelfAttention(config, config.is_decoder, layer_idx))
        if fusion:
            self.crossattention = AlbefAttention(config, AlbefCrossAttention(config, layer_idx, own_keys))
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        image_states: Tensor | None,
        key_values: tuple[Tensor, Tensor] | None,
        layout: LayerLayout,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """One layer over packed tokens.

        Args:
            hidden_states: (T, D).
            image_states: (I, K, width), projected here once an image.
            key_values: the projections instead, (I, K, H, d) each.
            layout: what to compute.
            past_key_values: cache of the self-attention, in generation.
        """
        attended = self.attention.self(hidden_states, layout, past_key_values)
        if layout.keep is not None:
            hidden_states = hidden_states.index_select(0, layout.keep)
        hidden_states = self.attention.output(attended, hidden_states)
        if layout.expand is not None:
            hidden_states = hidden_states.index_select(0, layout.expand)
        if layout.cross is not None:
            if key_values is None:
                key_values = self.crossattention.self.project(image_states)
            attended = self.crossattention.self(hidden_states, key_values, layout)
            hidden_states = self.crossattention.output(attended, hidden_states)
        return self.output(self.intermediate(hidden_states), hidden_states)


class AlbefTwinLayer(GradientCheckpointingLayer):
    """Two complete layers that look at the first and the second of a pair of images through the same keys and values.

    Section 5 of the paper (NLVR2).
    """

    def __init__(self, config: AlbefTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.first = AlbefTextLayer(config, layer_idx, fusion=True)
        self.second = AlbefTextLayer(config, layer_idx + 1, fusion=True, own_keys=False)

    def forward(
        self,
        hidden_states: Tensor,
        image_states: Tensor | None,
        key_values: tuple[Tensor, Tensor] | None,
        layouts: tuple[LayerLayout, LayerLayout],
    ) -> Tensor:
        """Both layers; arguments as for `AlbefTextLayer`, with a layout for each."""
        if key_values is None:
            key_values = self.first.crossattention.self.project(image_states)
        hidden_states = self.first(hidden_states, None, key_values, layouts[0])
        return self.second(hidden_states, None, key_values, layouts[1])


class AlbefTextPreTrainedModel(PreTrainedModel):
    """Initialisation and capabilities of the text side."""

    config: AlbefTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["AlbefTextLayer", "AlbefTwinLayer", "BertEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialise_text_buffers(module)


def initialise_text_buffers(module: nn.Module) -> None:
    """Sets what BERT's modules keep outside the checkpoint, after a model was made without memory."""
    if isinstance(module, BertEmbeddings):
        init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
        init.zeros_(module.token_type_ids)
    elif isinstance(module, BertLMPredictionHead):
        init.zeros_(module.bias)


class AlbefTextEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: AlbefTextConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [AlbefTextLayer(config, i, fusion=False) for i in range(config.fusion_layer)]
        for i in range(config.num_hidden_layers - config.fusion_layer):
            if config.images_per_text == 2:
                layers.append(AlbefTwinLayer(config, config.fusion_layer + 2 * i))
            else:
                layers.append(AlbefTextLayer(config, config.fusion_layer + i, fusion=True))
        self.layer = nn.ModuleList(layers)


class AlbefTextModel(AlbefTextPreTrainedModel):
    """BERT split at `config.fusion_layer`: text encoder below, fusion encoder above.

    `encode` and `fuse` work on packed texts and are what the other models call; `forward` takes and returns padded
    batches.
    """

    def __init__(self, config: AlbefTextConfig) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = AlbefTextEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def embed(self, texts: PackedTexts) -> Tensor:
        """(T, D) embeddings of the tokens.

        Raises:
            ValueError: a text is longer than the position embeddings.
        """
        if len(texts) and texts.position_ids.numel():
            longest = texts.rows.width
            if longest > self.config.max_position_embeddings:
                raise ValueError(
                    f"a text has {longest} tokens, but the model has {self.config.max_position_embeddings} positions: "
                    "truncate (processor(..., truncation=True, max_length=...))"
                )
        return self.embeddings(input_ids=texts.input_ids[None], position_ids=texts.position_ids[None])[0]

    def encode(self, texts: PackedTexts, keep: Tensor | None = None, trace: list[Any] | None = None) -> Tensor:
        """States of the text encoder.

        Args:
            texts: packed texts.
            keep: CPU indices of the tokens whose states are wanted, in order; None: all.
            trace: gets the states before each layer and, in layouts, its attention weights.

        Returns:
            (T, D) or (len(keep), D).
        """
        hidden_states = self.embed(texts)
        for i in range(self.config.fusion_layer):
            last = i == self.config.fusion_layer - 1
            layout = text_layout(texts, keep if last else None)
            if trace is not None:
                layout = replace(layout, weights={})
                trace.append((hidden_states, layout))
            hidden_states = self.encoder.layer[i](hidden_states, None, None, layout)
        if keep is not None and self.config.fusion_layer == 0:
            hidden_states = hidden_states.index_select(0, keep.to(hidden_states.device))
        return hidden_states

    def project_images(self, image_states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each fusion layer (each pair of twins) for images (I, K, width): (I, K, H, d) each."""
        projected = []
        for layer in self.encoder.layer[self.config.fusion_layer :]:
            owner = layer.first if isinstance(layer, AlbefTwinLayer) else layer
            projected.append(owner.crossattention.self.project(image_states))
        return projected

    def fuse(
        self,
        hidden_states: Tensor,
        layouts: list[LayerLayout],
        image_states: Tensor | None = None,
        key_values: list[tuple[Tensor, Tensor]] | None = None,
        trace: list[Any] | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Runs the fusion encoder.

        Args:
            hidden_states: (T, D) states of the text encoder.
            layouts: from `fusion_layouts`.
            image_states: (I, K, width); each layer projects them once an image.
            key_values: from `project_images`, instead.
            trace: as in `encode`.
            past_key_values: cache of self-attention, in generation.
        """
        if (image_states is None) == (key_values is None):
            raise ValueError("pass either image_states or key_values")
        if trace is not None:
            layouts = [replace(layout, weights={}) for layout in layouts]
        for i, layer in enumerate(self.encoder.layer[self.config.fusion_layer :]):
            projected = None if key_values is None else key_values[i]
            if isinstance(layer, AlbefTwinLayer):
                pair = (layouts[2 * i], layouts[2 * i + 1])
                if trace is not None:
                    trace.append((hidden_states, pair))
                hidden_states = layer(hidden_states, image_states, projected, pair)
            else:
                if trace is not None:
                    trace.append((hidden_states, layouts[i]))
                hidden_states = layer(hidden_states, image_states, projected, layouts[i], past_key_values)
        return hidden_states

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        mode: str = "multi_modal",
        inputs_embeds: Tensor | None = None,
        keep_padding: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple:
        """Runs text encoder, fusion encoder or both on a padded batch.

        Args:
            input_ids: (N, L).
            attention_mask: (N, L), non-zero at tokens.
            encoder_hidden_states: (N, K, encoder_width) image tokens; for pairs (2N, K, encoder_width), all first
                images before all second ones. Not needed in mode `"text"`.
            encoder_attention_mask: (N, K) or (2N, K), non-zero where they may be looked at.
            mode: `"text"` (layers below `fusion_layer`), `"fusion"` (those from it on) or `"multi_modal"` (all).
            inputs_embeds: (N, L, D) states of the text encoder, in mode `"fusion"`.
            keep_padding: compute padded positions too, as the original does; otherwise their states are zero.
            output_hidden_states: also return the embeddings and the states after each layer.
            output_attentions: also return attention probabilities.

        Returns:
            `last_hidden_state` (N, L, D); `hidden_states`, `attentions` (N, heads, L, L) and `cross_attentions`
            (N, heads, L, K) tuples when asked for.
        """
        if mode not in ("text", "fusion", "multi_modal"):
            raise ValueError(f"mode is {mode!r}; choose 'text', 'fusion' or 'multi_modal'")
        if mode != "text" and encoder_hidden_states is None:
            raise ValueError(f"mode {mode!r} looks at images: pass encoder_hidden_states")
        if mode == "fusion":
            if inputs_embeds is None:
                raise ValueError("mode 'fusion' starts from text states: pass them as inputs_embeds")
            input_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
        if input_ids is None:
            raise ValueError("pass input_ids")
        length = input_ids.shape[1]
        traced = output_hidden_states or output_attentions
        keep_padding = keep_padding or traced
        texts = PackedTexts.from_padded(input_ids, attention_mask, keep_padding=keep_padding)
        trace: list[Any] | None = [] if traced else None
        if mode == "fusion":
            packed = inputs_embeds.flatten(0, 1)
            if not keep_padding and attention_mask is not None:
                packed = packed.index_select(0, attention_mask.flatten().bool().nonzero().flatten())
        else:
            packed = self.encode(texts, trace=trace)
        if mode != "text":
            number = len(texts)
            expected = number * self.config.images_per_text
            if encoder_hidden_states.shape[0] != expected:
                raise ValueError(
                    f"{number} texts look at {self.config.images_per_text} image(s) each, so encoder_hidden_states "
                    f"must hold {expected} images, but it holds {encoder_hidden_states.shape[0]}"
                )
            index = torch.arange(expected).view(self.config.images_per_text, number)
            layouts = fusion_layouts(
                texts, self.config.num_fusion_layers, index, expected, image_mask=encoder_attention_mask
            )
            packed = self.fuse(packed, layouts, encoder_hidden_states, trace=trace)
        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.grid(packed, texts, length))
        if output_hidden_states:
            states = [self.grid(hidden, texts, length) for hidden, _ in trace]
            output.hidden_states = (*states, output.last_hidden_state)
        if output_attentions:
            flat = [one for _, layout in trace for one in (layout if isinstance(layout, tuple) else (layout,))]
            output.attentions = tuple(layout.weights["self"] for layout in flat)
            output.cross_attentions = tuple(layout.weights["cross"] for layout in flat if layout.cross is not None)
        return output if return_dict else output.to_tuple()

    @staticmethod
    def grid(packed: Tensor, texts: PackedTexts, length: int) -> Tensor:
        """(T, D) to (N, length, D), zero where there is no token."""
        grid = texts.rows.pad(packed)
        return F.pad(grid, (0, 0, 0, length - grid.shape[1]))


class AlbefTextDecoder(AlbefTextPreTrainedModel, GenerationMixin):
    """BERT as a causal decoder over the question encoder's states, with BERT's prediction head tied to its embeddings.

    Section 5 of the paper (VQA). `forward` and `generate` are those of a decoder of transformers;
    `token_losses` is the packed form for training and ranking.
    """

    _tied_weights_keys = {
        "lm_head.decoder.weight": "text_model.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def __init__(self, config: AlbefTextConfig) -> None:
        super().__init__(config)
        if not config.is_decoder or config.fusion_layer:
            raise ValueError(
                "a decoder needs is_decoder=True and fusion_layer=0 in its config; AlbefConfig.with_decoder() makes it"
            )
        self.text_model = AlbefTextModel(config)
        self.lm_head = BertLMPredictionHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings
        self.lm_head.bias = new_embeddings.bias

    def hidden(
        self,
        texts: PackedTexts,
        encoder_states: Tensor,
        encoder_mask: Tensor | None,
        encoder_index: Tensor,
        key_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """(T, D) last states of packed answers, answer i of which looks at `encoder_states[encoder_index[i]]`.

        Args:
            texts: packed answers, starting with the start token.
            encoder_states: (Q, K, D) states of the questions.
            encoder_mask: (Q, K), non-zero at their tokens.
            encoder_index: (N,) CPU.
            key_values: `text_model.project_images(encoder_states)`, when it is used more than once.
        """
        layouts = fusion_layouts(
            texts,
            self.config.num_fusion_layers,
            encoder_index,
            encoder_states.shape[0],
            image_mask=encoder_mask,
        )
        states = None if key_values is not None else encoder_states
        return self.text_model.fuse(self.text_model.embed(texts), layouts, states, key_values)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions | tuple:
        """Logits of the next tokens.

        Args:
            input_ids: (N, L), the tokens that follow those in the cache.
            attention_mask: (N, cached + L), non-zero at tokens.
            encoder_hidden_states: (N, K, D).
            encoder_attention_mask: (N, K), non-zero at tokens.
            past_key_values: cache of earlier calls.
            use_cache: return one.
            logits_to_keep: number of last positions to compute logits for; 0: all.

        Returns:
            `logits` (N, L or logits_to_keep, vocabulary).
        """
        if encoder_hidden_states is None:
            raise ValueError("the answer decoder looks at the question's states: pass encoder_hidden_states")
        number, length = input_ids.shape
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        device = input_ids.device
        counts = torch.full((number,), length)
        rows = TokenRows.from_counts(counts, device)
        key_mask = None if attention_mask is None else attention_mask.bool()
        positions = torch.arange(past, past + length, device=device).expand(number, length)
        texts = PackedTexts(input_ids.flatten(), positions.flatten(), rows, counts, key_mask)
        layouts = fusion_layouts(
            texts,
            self.config.num_fusion_layers,
            torch.arange(number),
            number,
            image_mask=encoder_attention_mask,
        )
        self_cache, key_values = None, None
        if past_key_values is not None:
            self_cache = past_key_values.self_attention_cache
            key_values = self._cached_keys(past_key_values, encoder_hidden_states)
        states = encoder_hidden_states if key_values is None else None
        hidden = self.text_model.fuse(
            self.text_model.embed(texts), layouts, states, key_values, past_key_values=self_cache
        ).view(number, length, -1)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        output = CausalLMOutputWithCrossAttentions(logits=logits, past_key_values=past_key_values)
        return output if return_dict else output.to_tuple()

    def _cached_keys(self, cache: EncoderDecoderCache, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the question, projected in the first step of a generation only."""
        cross = cache.cross_attention_cache
        if not cache.is_updated.get(0):
            for i, (key, value) in enumerate(self.text_model.project_images(states)):
                cross.update(key.transpose(1, 2), value.transpose(1, 2), i)
                cache.is_updated[i] = True
        layers = range(self.config.num_fusion_layers)
        return [(cross.layers[i].keys.transpose(1, 2), cross.layers[i].values.transpose(1, 2)) for i in layers]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cuts what the cache already holds."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if use_cache and not isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = EncoderDecoderCache(past_key_values or DynamicCache(), DynamicCache())
        return {
            "input_ids": input_ids[:, past:],
            "past_key_values": past_key_values if use_cache else None,
            "attention_mask": attention_mask,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }


__all__ = ["AlbefTextDecoder", "AlbefTextModel", "AlbefTextPreTrainedModel", "PackedTexts"]
