"""The passes of BLIP's text model (MED, section 3.1 and figure 2 of the paper) over the native `BlipTextModel`.

The modules and their parameter names are those of transformers; what is written here is the way through them:

- `text_pass`: texts alone (unimodal encoder, [CLS]; ITC),
- `image_pass`: texts that look at images (image-grounded encoder, [ENC]), texts that look at images and at their own
  past (image-grounded decoder, [DEC]), or both in one run,
- `decoding_step`: the next tokens of texts whose past is cached.

An image's cross-attention keys and values are projected once a layer, however many texts look at it, and for encoder
and decoder together where these are tied; padding is computed only inside attention products; the last layer computes
only the tokens that are asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip.modeling_blip_text import (
    BlipTextAttention,
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextModel,
    BlipTextSelfAttention,
)

from hf_vlp.models.albef.modeling_albef_packing import (
    CrossLayout,
    LayerLayout,
    PackedTexts,
    TokenRows,
    attend,
    eager_attention,
    kept_counts,
    text_layout,
    token_index,
)
from hf_vlp.models.blip.vision_blip import Kernel, checkpointed

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (I, K, heads, head size)."""


@dataclass(frozen=True)
class ImageKeys:
    """Cross-attention keys and values of I images (or question states), one entry a layer.

    Attributes:
        layers: keys and values.
        mask: (I, K) bool, True where they may be looked at; None: everywhere.
    """

    layers: tuple[KeyValue, ...]
    mask: Tensor | None = None

    def __len__(self) -> int:
        return self.layers[0][0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0][0].dtype


def project_images(stack: BlipTextModel, image_states: Tensor, mask: Tensor | None = None) -> ImageKeys:
    """Projects image tokens (I, K, width) to the keys and values of every layer."""
    layers = tuple(_project(layer.crossattention.self, image_states) for layer in stack.encoder.layer)
    return ImageKeys(layers, None if mask is None else mask.bool())


def _project(attention: BlipTextSelfAttention, states: Tensor) -> KeyValue:
    shape = (*states.shape[:-1], attention.num_attention_heads, attention.attention_head_size)
    return attention.key(states).view(shape), attention.value(states).view(shape)


def _kernel(attention: BlipTextSelfAttention, causal: bool = False) -> Kernel:
    scaling = attention.attention_head_size**-0.5
    return Kernel(attention.config, attention.dropout, scaling, attention.training, causal)


def _heads(attention: BlipTextSelfAttention, states: Tensor) -> Tensor:
    return states.view(*states.shape[:-1], attention.num_attention_heads, attention.attention_head_size)


def _self_attention(block: BlipTextAttention, hidden: Tensor, layout: LayerLayout, causal: bool) -> Tensor:
    """Self-attention with output projection and norm over packed tokens: (T, D) to (T', D)."""
    own = block.self
    asked = hidden if layout.keep is None else hidden.index_select(0, layout.keep)
    query = _heads(own, own.query(asked))
    key, value = (layout.keys.pad(_heads(own, part(hidden))) for part in (own.key, own.value))
    mixed = attend(_kernel(own, causal), query, layout.queries, key, value, layout.key_mask, layout.weights, "self")
    asked = block.output(mixed, asked)
    return asked if layout.expand is None else asked.index_select(0, layout.expand)


def _cross_attention(
    block: BlipTextAttention, hidden: Tensor, key_value: KeyValue, layout: CrossLayout, weights: Any = None
) -> Tensor:
    own = block.self
    key, value = key_value
    if layout.images is not None:
        key, value = key.index_select(0, layout.images), value.index_select(0, layout.images)
    query = _heads(own, own.query(hidden))
    mixed = attend(_kernel(own), query, layout.rows, key, value, layout.key_mask, weights, "cross")
    return block.output(mixed, hidden)


def embed(stack: BlipTextModel, texts: PackedTexts) -> Tensor:
    """(T, D) embeddings of the tokens.

    Raises:
        ValueError: a text is longer than the position embeddings.
    """
    embeddings = stack.embeddings
    limit = embeddings.position_embeddings.num_embeddings
    longest = texts.rows.width
    if longest > limit:
        raise ValueError(
            f"a text has {longest} tokens, but the model has {limit} positions: truncate "
            "(processor(..., truncation=True, max_length=...))"
        )
    hidden = embeddings.word_embeddings(texts.input_ids) + embeddings.position_embeddings(texts.position_ids)
    return embeddings.dropout(embeddings.LayerNorm(hidden))


def with_first(texts: PackedTexts, token_id: int) -> PackedTexts:
    """The texts with another first token: [ENC] or [DEC] in the place of [CLS]."""
    first = texts.first.to(texts.input_ids.device)
    return replace(texts, input_ids=texts.input_ids.index_fill(0, first, token_id))


def without_last(texts: PackedTexts) -> tuple[PackedTexts, Tensor]:
    """The texts less their last tokens, which a decoder only predicts, and the token that follows each of the rest.

    Returns:
        Texts of T - N tokens, and (T - N,) next tokens.
    """
    row = torch.repeat_interleave(torch.arange(len(texts)), texts.counts)
    stays = torch.ones(len(row), dtype=torch.bool)
    stays[texts.counts.cumsum(0) - 1] = False
    at = stays.nonzero().flatten().to(texts.input_ids.device)
    counts = texts.counts - 1
    rows = TokenRows.from_counts(counts, texts.input_ids.device)
    shorter = PackedTexts(texts.input_ids[at], texts.position_ids[at], rows, counts, rows.mask)
    return shorter, texts.input_ids[at + 1]


@dataclass(frozen=True)
class Branch:
    """Texts on their way through one stack; branches that run together share all of a layer but self-attention.

    Attributes:
        stack: whose self-attention they use.
        texts: the distinct texts.
        image_index: (P,) CPU, image of each row.
        source: (P,) CPU, text of each row; None: row i is text i.
        keep: CPU indices, among the rows' tokens, of those that the last layer computes; None: all. Not for a causal
            branch.
        causal: each token sees only its past.
    """

    stack: BlipTextModel
    texts: PackedTexts
    image_index: Tensor
    source: Tensor | None = None
    keep: Tensor | None = None
    causal: bool = False

    def layouts(self, depth: int) -> tuple[list[LayerLayout], Tensor, Tensor]:
        """Self-attention's layouts of all layers, and the rows' token counts in all layers but the last, and in it.

        The first self-attention does not depend on the image, so it runs once a text.
        """
        texts, device = self.texts, self.texts.input_ids.device
        rows, expand = texts, None
        if self.source is not None and not torch.equal(self.source, torch.arange(len(texts))):
            expand = token_index(texts.counts, self.source)
            rows = texts.select(self.source)
        found = []
        for layer in range(depth):
            inputs, copies = (texts, expand) if layer == 0 else (rows, None)
            layout = text_layout(inputs)
            if layer == depth - 1 and self.keep is not None:
                if copies is not None:
                    copies = copies[self.keep]
                else:
                    layout = text_layout(inputs, self.keep)
            found.append(replace(layout, expand=None if copies is None else copies.to(device)))
        last = rows.counts if self.keep is None else kept_counts(rows.counts, self.keep)
        return found, rows.counts, last


def text_pass(
    stack: BlipTextModel, texts: PackedTexts, keep: Tensor | None = None, trace: list[Tensor] | None = None
) -> Tensor:
    """Texts alone, each token seeing its whole text.

    Args:
        keep: CPU indices of the tokens whose states are wanted, in order; None: all.
        trace: gets the states after each layer.

    Returns:
        (T, D) or (len(keep), D).
    """
    hidden = embed(stack, texts)
    for i, layer in enumerate(stack.encoder.layer):
        layout = text_layout(texts, keep if i == len(stack.encoder.layer) - 1 else None)

        def step(hidden: Tensor, layer: BlipTextLayer = layer, layout: LayerLayout = layout) -> Tensor:
            return layer.feed_forward_chunk(_self_attention(layer.attention, hidden, layout, False))

        hidden = checkpointed(layer, step, hidden)
        if trace is not None:
            trace.append(hidden)
    return hidden


def _image_layer(
    layers: Sequence[BlipTextLayer],
    layouts: Sequence[LayerLayout],
    causal: Sequence[bool],
    cross: CrossLayout,
    key: Tensor | None,
    value: Tensor | None,
    image_states: Tensor | None,
    *hidden: Tensor,
) -> tuple[Tensor, ...]:
    mixed = [
        _self_attention(layer.attention, states, layout, flag)
        for layer, states, layout, flag in zip(layers, hidden, layouts, causal, strict=True)
    ]
    shared = layers[0]
    key_value = _project(shared.crossattention.self, image_states) if key is None else (key, value)
    joined = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
    joined = _cross_attention(shared.crossattention, joined, key_value, cross)
    return shared.feed_forward_chunk(joined).split([len(part) for part in mixed])


def image_pass(
    branches: Sequence[Branch],
    image_states: Tensor | None = None,
    image_keys: ImageKeys | None = None,
    image_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Texts that look at images; one run for all branches, whose stacks share cross-attention and feed-forward.

    Args:
        branches: who looks at what.
        image_states: (I, K, width) projected in each layer, or
        image_keys: projected already, of the first branch's stack.
        image_mask: (I, K), non-zero where `image_states` may be looked at; None: everywhere.

    Returns:
        Of each branch (T, D), the rows' tokens of the last layer.
    """
    if (image_states is None) == (image_keys is None):
        raise ValueError("pass either image_states or image_keys")
    number = len(image_states) if image_keys is None else len(image_keys)
    mask = image_mask if image_keys is None else image_keys.mask
    stacks = [branch.stack.encoder.layer for branch in branches]
    depth = len(stacks[0])
    laid = [branch.layouts(depth) for branch in branches]
    index = torch.cat([branch.image_index for branch in branches])
    device = branches[0].texts.input_ids.device
    inner = CrossLayout.build(torch.cat([counts for _, counts, _ in laid]), index, number, device, mask)
    outer = inner
    if any(branch.keep is not None for branch in branches):
        outer = CrossLayout.build(torch.cat([counts for _, _, counts in laid]), index, number, device, mask)
    hidden = tuple(embed(branch.stack, branch.texts) for branch in branches)
    causal = [branch.causal for branch in branches]
    for i in range(depth):
        step = partial(
            _image_layer,
            [stack[i] for stack in stacks],
            [layouts[i] for layouts, _, _ in laid],
            causal,
            outer if i == depth - 1 else inner,
        )
        key, value = (None, None) if image_keys is None else image_keys.layers[i]
        hidden = checkpointed(stacks[0][i], step, key, value, image_states, *hidden)
    return hidden


def fuse(
    stack: BlipTextModel,
    texts: PackedTexts,
    image_index: Tensor,
    image_states: Tensor | None = None,
    image_keys: ImageKeys | None = None,
    *,
    source: Tensor | None = None,
    keep: Tensor | None = None,
    causal: bool = False,
    image_mask: Tensor | None = None,
) -> Tensor:
    """`image_pass` of a single branch."""
    branch = Branch(stack, texts, image_index, source, keep, causal)
    return image_pass([branch], image_states, image_keys, image_mask)[0]


def grid(packed: Tensor, texts: PackedTexts, length: int) -> Tensor:
    """(T, D) to (N, length, D), zero where there is no token."""
    padded = texts.rows.pad(packed)
    return torch.nn.functional.pad(padded, (0, 0, 0, length - padded.shape[1]))


def decoding_step(
    decoder: BlipTextLMHeadModel,
    input_ids: Tensor,
    images: ImageKeys,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """States (S, L, D) of tokens (S, L) that follow those in the cache.

    Args:
        decoder: the image-grounded decoder.
        input_ids: (S, L); the sequences of one image stand side by side, S is a multiple of the number of images.
        images: keys and values, which the sequences of an image share.
        attention_mask: (S, past + L), non-zero at tokens; None: all are.
        cache: of self-attention; extended.
    """
    stack = decoder.bert
    number, length = input_ids.shape
    past = 0 if cache is None else cache.get_seq_length()
    total = past + length
    if number % len(images):
        raise ValueError(f"{number} sequences cannot be shared out evenly among {len(images)} images")
    positions = torch.arange(past, total, device=input_ids.device)
    embeddings = stack.embeddings
    if total > embeddings.position_embeddings.num_embeddings:
        raise ValueError(
            f"{total} tokens, but the model has {embeddings.position_embeddings.num_embeddings} positions: lower "
            "max_new_tokens"
        )
    hidden = embeddings.word_embeddings(input_ids) + embeddings.position_embeddings(positions)
    hidden = embeddings.dropout(embeddings.LayerNorm(hidden))
    mask = None
    if attention_mask is not None and not bool(attention_mask.all()):
        mask = attention_mask.bool()[:, None, None, :total]
    if length > 1:
        triangle = torch.ones(length, total, dtype=torch.bool, device=input_ids.device).tril(past)
        mask = triangle[None, None] if mask is None else mask & triangle
    seen = None if images.mask is None else images.mask[:, None, None, :]
    for i, layer in enumerate(stack.encoder.layer):
        own = layer.attention.self
        query, key, value = (_heads(own, part(hidden)).transpose(1, 2) for part in (own.query, own.key, own.value))
        if cache is not None:
            key, value = cache.update(key, value, i)
        hidden = layer.attention.output(_product(own, query, key, value, mask), hidden)
        cross = layer.crossattention.self
        query = _heads(cross, cross.query(hidden).view(len(images), -1, cross.all_head_size)).transpose(1, 2)
        key, value = (part.transpose(1, 2) for part in images.layers[i])
        mixed = _product(cross, query, key, value, seen).view(number, length, -1)
        hidden = layer.feed_forward_chunk(layer.crossattention.output(mixed, hidden))
    return hidden


def _product(
    attention: BlipTextSelfAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    implementation = attention.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        # A step of generation is a few rows with a mask of its own; the other kernels take none.
        implementation = "sdpa"
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    kernel = _kernel(attention)
    dropout = attention.dropout.p if attention.training else 0.0
    output, _ = function(kernel, query, key, value, mask, dropout=dropout, scaling=kernel.scaling, is_causal=False)
    return output.flatten(2)
