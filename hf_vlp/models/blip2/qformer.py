"""The passes of the Q-Former (BLIP-2, section 3.1 and figure 2) over the native `Blip2QFormerModel`.

The module and its parameter names are those of transformers; what is written here is the way through them. The four
passes of stage 1 and of its inference are

- `query_pass`: queries look at their image (ITC, image features; its self-attention keys and values serve ITG),
- `text_pass`: texts alone (ITC, text features),
- `joint_pass`: queries and text see each other (ITM, multimodal features; "bi-directional mask"),
- `generation_pass`: text sees the queries and its own past (ITG; "multimodal causal mask").

Three things are done once instead of once a pass: an image's cross-attention keys and values (`project_images`), which
the passes then index; the queries' self-attention keys and values, which ITG reads from the query pass, since queries
never see the generated text; and nothing at all is computed for padding, except inside the attention product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerLayer,
    Blip2QFormerModel,
    Blip2QFormerMultiHeadAttention,
    Blip2TextEmbeddings,
    eager_attention_forward,
)

from hf_vlp.nn.packing import PackedTexts, place_rows, take_rows

KeyValue = tuple[Tensor, Tensor]
"""Attention keys and values, each (S, heads, length, head size)."""


@dataclass(frozen=True)
class ImageKeys:
    """Cross-attention keys and values of I images, one entry a layer, `None` for layers without cross-attention."""

    layers: tuple[KeyValue | None, ...]
    count: int

    def expand(self, extra: "ImageKeys") -> "ImageKeys":
        """These images followed by those of `extra`."""
        layers = tuple(
            None if mine is None else (torch.cat([mine[0], other[0]]), torch.cat([mine[1], other[1]]))
            for mine, other in zip(self.layers, extra.layers, strict=True)
        )
        return ImageKeys(layers, self.count + extra.count)


@dataclass(frozen=True)
class QueryOutput:
    """What the query pass leaves behind.

    Attributes:
        states: (I, Q, hidden) output of the last layer.
        cache: self-attention keys and values of the queries, one entry a layer; empty unless asked for.
    """

    states: Tensor
    cache: tuple[KeyValue, ...] = ()


def heads_first(states: Tensor, attention: Blip2QFormerMultiHeadAttention) -> Tensor:
    """(S, length, hidden) to (S, heads, length, head size)."""
    return states.unflatten(-1, (attention.num_attention_heads, attention.attention_head_size)).transpose(1, 2)


def entrance(qformer: nn.Module) -> tuple[nn.LayerNorm, nn.Dropout]:
    """The LayerNorm and the dropout that queries and text pass first; InstructBLIP keeps them with its embeddings."""
    owner = getattr(qformer, "embeddings", qformer)
    return owner.layernorm, owner.dropout


def project_images(qformer: Blip2QFormerModel, image_embeds: Tensor) -> ImageKeys:
    """Projects the features of I images to the keys and values of every cross-attention layer.

    This is the larger half of a Q-Former's work (257 image tokens against 32 queries), and it does not depend on text.

    Args:
        image_embeds: (I, image tokens, encoder hidden), after the vision tower's trained LayerNorm.
    """
    image_embeds = image_embeds.to(entrance(qformer)[0].weight.dtype)
    layers: list[KeyValue | None] = []
    for layer in qformer.encoder.layer:
        if not layer.has_cross_attention:
            layers.append(None)
            continue
        attention = layer.crossattention.attention
        layers.append(
            (
                heads_first(attention.key(image_embeds), attention),
                heads_first(attention.value(image_embeds), attention),
            )
        )
    return ImageKeys(tuple(layers), image_embeds.shape[0])


class Pairing:
    """Which image each of S sequences looks at, and how their queries are laid beside that image's keys.

    Sequences of one image are put side by side as one longer block of queries, so that the keys and values are read in
    place and not copied for each sequence. Computed once a pass, used by each of its layers.
    """

    def __init__(self, image_index: Tensor | None, sequences: int, images: int) -> None:
        self.images = images
        self.sequences = sequences
        self.slots: Tensor | None = None
        self.copied: Tensor | None = None
        if image_index is None:
            if sequences != images:
                raise ValueError(f"{sequences} sequences but {images} images: pass image_index to say which is whose")
            self.width = 1
            return
        if image_index.shape != (sequences,):
            raise ValueError(f"image_index must have shape ({sequences},), one image a text, not {image_index.shape}")
        if images == 1:
            self.width = sequences
            return
        counts = torch.bincount(image_index, minlength=images)
        self.width = int(counts.max())
        if images * self.width > 4 * sequences:
            # One image is wanted far more often than the others: the blocks would be mostly empty.
            self.copied = image_index
            return
        order = torch.argsort(image_index, stable=True)
        rank = torch.arange(sequences, device=image_index.device) - (counts.cumsum(0) - counts)[image_index[order]]
        self.slots = torch.empty_like(image_index)
        self.slots[order] = image_index[order] * self.width + rank

    def attend(self, attention: Blip2QFormerMultiHeadAttention, queries: Tensor, keys: KeyValue) -> Tensor:
        """Cross-attention of `queries` (S, Q, hidden, already projected) with the images' keys: (S, Q, hidden)."""
        sequences, length, _ = queries.shape
        if self.copied is not None:
            key, value = (part.index_select(0, self.copied) for part in keys)
            return attend(attention, heads_first(queries, attention), key, value, None)
        if self.slots is not None:
            queries = place_rows(queries, self.slots, self.images * self.width)
        queries = queries.reshape(self.images, self.width * length, -1)
        output = attend(attention, heads_first(queries, attention), *keys, None)
        output = output.reshape(self.images * self.width, length, -1)
        return output if self.slots is None else take_rows(output, self.slots)


def attend(
    attention: Blip2QFormerMultiHeadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """One attention product through transformers' attention interface.

    Args:
        query: (S, heads, length, head size); `key` and `value` likewise with their own length.
        mask: (S, 1, 1 or length, key length) bool, True where a key may be seen; `None` where all may.

    Returns:
        (S, length, hidden).
    """
    implementation = attention.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        # The native Q-Former is kept in float32 and refuses the other kernels too.
        implementation = "sdpa"
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    if mask is not None and implementation == "eager":
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    dropout = attention.attention_dropout if attention.training else 0.0
    output, _ = function(attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling)
    return output.flatten(2)


class Layout:
    """Flat rows of S sequences: first the S x Q query rows, then the N text tokens, all without padding.

    Args:
        sequences: S.
        queries: Q, 0 for a pass without queries.
        texts: the text of each sequence; `None` for a pass without text.
        causal: text sees only its own past (and everything that is cached before it).
        cached: length of the keys that stand before the text and come from elsewhere.
    """

    def __init__(
        self, sequences: int, queries: int, texts: PackedTexts | None, *, causal: bool = False, cached: int = 0
    ) -> None:
        self.sequences = sequences
        self.queries = queries
        self.texts = texts
        self.query_rows = sequences * queries
        self.length = queries + (texts.longest if texts is not None else 0)
        self.slots: Tensor | None = None
        self.mask: Tensor | None = None
        if texts is None:
            return
        device = texts.input_ids.device
        starts = torch.arange(sequences, device=device) * self.length
        query_slots = (starts[:, None] + torch.arange(queries, device=device)).flatten()
        text_slots = starts[texts.rows] + queries + texts.positions
        full = len(texts.input_ids) == sequences * texts.longest
        if queries or not full:
            self.slots = torch.cat([query_slots, text_slots])
        if causal:
            own = torch.ones(texts.longest, texts.longest, dtype=torch.bool, device=device).tril()
            seen = own & texts.mask[:, None, :]
            before = seen.new_ones(sequences, texts.longest, cached)
            self.mask = torch.cat([before, seen], dim=-1)[:, None]
        elif not full:
            before = texts.mask.new_ones(sequences, queries)
            self.mask = torch.cat([before, texts.mask], dim=1)[:, None, None]

    def to_grid(self, rows: Tensor) -> Tensor:
        """(S*Q + N, hidden) to (S, Q + L, hidden)."""
        if self.slots is not None:
            rows = place_rows(rows, self.slots, self.sequences * self.length)
        return rows.view(self.sequences, self.length, -1)

    def from_grid(self, grid: Tensor) -> Tensor:
        """(S, Q + L, hidden) to (S*Q + N, hidden)."""
        rows = grid.reshape(self.sequences * self.length, -1)
        return rows if self.slots is None else take_rows(rows, self.slots)


Keep = Literal["all", "queries", "first"]


def _run_layer(
    layer: Blip2QFormerLayer,
    layout: Layout,
    pairing: Pairing | None,
    keep: Keep,
    with_cache: bool,
    hidden: Tensor,
    image_key: Tensor | None,
    image_value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
) -> tuple[Tensor, ...]:
    """One Q-Former layer on flat rows.

    `keep` other than "all" computes, after the keys and values, only the rows that are read afterwards: the queries,
    or each text's first token. For the last layer, whose other rows nobody looks at.
    """
    attention = layer.attention.attention
    key = heads_first(layout.to_grid(attention.key(hidden)), attention)
    value = heads_first(layout.to_grid(attention.value(hidden)), attention)
    own = (key, value)
    if past_key is not None:
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)

    query_rows = layout.query_rows
    if keep == "all":
        query = layout.to_grid(attention.query(hidden))
    elif keep == "queries":
        hidden = hidden[:query_rows]
        query = attention.query(hidden).view(layout.sequences, layout.queries, -1)
    else:
        hidden = take_rows(hidden, layout.texts.first)
        query = attention.query(hidden)[:, None]
    mixed = attend(attention, heads_first(query, attention), key, value, layout.mask)
    mixed = layout.from_grid(mixed) if keep == "all" else mixed.flatten(0, 1)
    states = layer.attention.output(mixed, hidden)

    parts = []
    if query_rows:
        queries = states[:query_rows]
        if layer.has_cross_attention:
            if image_key is None:
                raise ValueError("this Q-Former layer looks at an image, but no image was given to the pass")
            cross = layer.crossattention
            projected = cross.attention.query(queries).view(layout.sequences, layout.queries, -1)
            seen = pairing.attend(cross.attention, projected, (image_key, image_value))
            queries = cross.output(seen.flatten(0, 1), queries)
        parts.append(layer.feed_forward_chunk_query(queries))
    if states.shape[0] > query_rows:
        parts.append(layer.feed_forward_chunk(states[query_rows:]))
    states = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (states, *own) if with_cache else (states,)


def _run(
    qformer: Blip2QFormerModel,
    hidden: Tensor,
    layout: Layout,
    *,
    images: ImageKeys | None = None,
    pairing: Pairing | None = None,
    past: Sequence[KeyValue] | None = None,
    keep: Keep = "all",
    with_cache: bool = False,
) -> tuple[Tensor, tuple[KeyValue, ...]]:
    """All layers: the last one's kept rows and, if asked for, each one's self-attention keys and values."""
    layernorm, dropout = entrance(qformer)
    hidden = dropout(layernorm(hidden.to(layernorm.weight.dtype)))
    cache = []
    last = len(qformer.encoder.layer) - 1
    for index, layer in enumerate(qformer.encoder.layer):
        step: Callable[..., tuple[Tensor, ...]] = partial(
            _run_layer, layer, layout, pairing, keep if index == last else "all", with_cache
        )
        image = images.layers[index] if images is not None else None
        arguments = (hidden, *(image or (None, None)), *(past[index] if past is not None else (None, None)))
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            hidden, *own = layer._gradient_checkpointing_func(step, *arguments)
        else:
            hidden, *own = step(*arguments)
        if with_cache:
            cache.append(tuple(own))
    return hidden, tuple(cache)


def _query_rows(query_tokens: Tensor, sequences: int) -> Tensor:
    """Query tokens (1, Q, hidden) repeated for S sequences: (S*Q, hidden)."""
    return query_tokens.expand(sequences, -1, -1).reshape(-1, query_tokens.shape[-1])


def _text_rows(embeddings: Blip2TextEmbeddings, texts: PackedTexts) -> Tensor:
    """Word and position embeddings of packed texts: (N, hidden).

    Raises:
        ValueError: a text is longer than the position table.
    """
    limit = embeddings.position_embeddings.num_embeddings
    if texts.longest > limit:
        raise ValueError(
            f"a text has {texts.longest} tokens, but the Q-Former has {limit} text positions "
            "(qformer_config.max_position_embeddings); truncate with the processor's max_length"
        )
    return embeddings.word_embeddings(texts.input_ids) + embeddings.position_embeddings(texts.positions)


def query_pass(
    qformer: Blip2QFormerModel,
    query_tokens: Tensor,
    images: ImageKeys,
    *,
    image_index: Tensor | None = None,
    with_cache: bool = False,
) -> QueryOutput:
    """Queries look at their image; no text.

    Args:
        query_tokens: (1, Q, hidden).
        images: keys of I images.
        image_index: (S,) image of each sequence; `None` means one sequence an image, in order.
        with_cache: also return the queries' self-attention keys and values, which `generation_pass` reads.
    """
    sequences = images.count if image_index is None else image_index.shape[0]
    layout = Layout(sequences, query_tokens.shape[1], None)
    pairing = Pairing(image_index, sequences, images.count)
    hidden = _query_rows(query_tokens, sequences)
    states, cache = _run(qformer, hidden, layout, images=images, pairing=pairing, with_cache=with_cache)
    return QueryOutput(states.view(sequences, layout.queries, -1), cache)


def text_pass(
    qformer: Blip2QFormerModel, embeddings: Blip2TextEmbeddings, texts: PackedTexts, *, first_only: bool = False
) -> Tensor:
    """Texts alone, each token seeing its whole text.

    Returns:
        (N, hidden) output of every token, or (S, hidden) of each text's first token with `first_only`.
    """
    layout = Layout(len(texts), 0, texts)
    states, _ = _run(qformer, _text_rows(embeddings, texts), layout, keep="first" if first_only else "all")
    return states


def joint_pass(
    qformer: Blip2QFormerModel,
    embeddings: Blip2TextEmbeddings,
    query_tokens: Tensor,
    texts: PackedTexts,
    images: ImageKeys,
    *,
    image_index: Tensor | None = None,
    queries_only: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Queries and text see each other, queries look at their image.

    Args:
        texts: S texts.
        image_index: (S,) image of each text; `None` means text i belongs to image i.
        queries_only: leave out the text's side of the last layer, which image-text matching does not read.

    Returns:
        (S, Q, hidden) outputs of the queries, and (N, hidden) of the text tokens or `None`.
    """
    sequences = len(texts)
    layout = Layout(sequences, query_tokens.shape[1], texts)
    pairing = Pairing(image_index, sequences, images.count)
    text_rows = _text_rows(embeddings, texts)
    hidden = torch.cat([_query_rows(query_tokens, sequences).to(text_rows.dtype), text_rows])
    keep = "queries" if queries_only else "all"
    states, _ = _run(qformer, hidden, layout, images=images, pairing=pairing, keep=keep)
    queries = states[: layout.query_rows].view(sequences, layout.queries, -1)
    return queries, None if queries_only else states[layout.query_rows :]


def generation_pass(
    qformer: Blip2QFormerModel,
    embeddings: Blip2TextEmbeddings,
    texts: PackedTexts,
    query_cache: Sequence[KeyValue],
) -> Tensor:
    """Text sees the queries of its image (through their cached keys and values) and its own past.

    Args:
        texts: S texts, the first token being the one that starts generation ([DEC]).
        query_cache: from `query_pass(..., with_cache=True)`, one sequence a text.

    Returns:
        (N, hidden) output of every token.
    """
    layout = Layout(len(texts), 0, texts, causal=True, cached=query_cache[0][0].shape[2])
    states, _ = _run(qformer, _text_rows(embeddings, texts), layout, past=query_cache)
    return states


def decoding_step(
    qformer: Blip2QFormerModel,
    embeddings: Blip2TextEmbeddings,
    input_ids: Tensor,
    positions: Tensor,
    past: Sequence[KeyValue],
    mask: Tensor | None,
) -> tuple[Tensor, tuple[KeyValue, ...]]:
    """The next tokens of S texts, their past (queries included) being cached.

    Args:
        input_ids: (S, T) new tokens.
        positions: (S, T) their positions in the text.
        past: keys and values of the queries and of the earlier text, one entry a layer.
        mask: (S, 1, T, past + T) bool, True where a key may be seen; `None` where all may (T = 1, no padding).

    Returns:
        (S, T, hidden) outputs, and the new tokens' own keys and values, one entry a layer.
    """
    sequences, length = input_ids.shape
    layout = Layout(sequences, 0, None)
    layout.length, layout.mask = length, mask
    hidden = embeddings.word_embeddings(input_ids) + embeddings.position_embeddings(positions)
    states, cache = _run(qformer, hidden.flatten(0, 1), layout, past=past, with_cache=True)
    return states.view(sequences, length, -1), cache


def qformer_text_layers(qformer: Blip2QFormerModel) -> nn.ModuleList:
    """The layers, after checking that they have a text branch.

    Raises:
        ValueError: built with `use_qformer_text_input=False`, as stage-2 models are.
    """
    if not qformer.config.use_qformer_text_input:
        raise ValueError(
            "this Q-Former has no text branch (qformer_config.use_qformer_text_input is False), as in a stage-2 "
            "checkpoint; stage 1 and retrieval need one that was trained with text"
        )
    return qformer.encoder.layer
