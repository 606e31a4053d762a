"""Texts without padding: which token belongs to which text, and which texts look at which image.

Linear layers treat every token alike, so the tokens of all texts lie end to end and only the attention products go to
a grid: one row a text for self-attention, one row an image (or part of its texts) for cross-attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class TokenRows:
    """Places of T tokens, laid end to end, on a grid of N rows.

    Attributes:
        cells: (T,) cell of each token in the flattened grid.
        counts: (N,) number of tokens of each row.
        width: cells of a row.
        full: cells are 0, 1, 2, …: packing and unpacking are views.
    """

    cells: Tensor
    counts: Tensor
    width: int
    full: bool

    @classmethod
    def from_counts(cls, counts: Tensor, device: torch.device) -> "TokenRows":
        """Rows of the given lengths, aligned to the left. `counts` (N,) lies on the CPU."""
        width = int(counts.max()) if len(counts) else 0
        total = int(counts.sum())
        starts = counts.cumsum(0) - counts
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        cells = torch.arange(total) - starts[rows] + rows * width
        return cls(cells.to(device), counts.to(device), width, total == len(counts) * width)

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def mask(self) -> Tensor | None:
        """(N, width) bool, True where the grid has a token; None when every cell has one."""
        if self.full:
            return None
        filled = torch.zeros(len(self) * self.width, dtype=torch.bool, device=self.cells.device)
        return filled.index_fill_(0, self.cells, True).view(len(self), self.width)

    def pad(self, values: Tensor) -> Tensor:
        """(T, ...) to (N, width, ...), zero in empty cells."""
        if not self.full:
            grid = values.new_zeros((len(self) * self.width, *values.shape[1:]))
            values = grid.index_copy(0, self.cells, values)
        return values.view(len(self), self.width, *values.shape[1:])

    def unpad(self, grid: Tensor) -> Tensor:
        """(N, width, ...) to (T, ...)."""
        values = grid.flatten(0, 1)
        return values if self.full else values.index_select(0, self.cells)


def token_index(counts: Tensor, rows: Tensor) -> Tensor:
    """CPU indices of the tokens of the texts `rows` (P,), one after another, among texts of lengths `counts` (N,)."""
    starts = counts.cumsum(0) - counts
    chosen = counts[rows]
    shift = starts[rows] - (chosen.cumsum(0) - chosen)
    return torch.arange(int(chosen.sum())) + torch.repeat_interleave(shift, chosen)


@dataclass(frozen=True)
class PackedTexts:
    """N texts laid end to end.

    Attributes:
        input_ids: (T,) tokens.
        position_ids: (T,) columns that they had in the padded batch.
        rows: where the tokens are on a left-aligned grid.
        counts: (N,) lengths on the CPU, from which layouts are built without waiting for the device.
        key_mask: (N, width) bool, True where self-attention may look; None: everywhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: TokenRows
    counts: Tensor
    key_mask: Tensor | None

    @classmethod
    def from_padded(
        cls, input_ids: Tensor, attention_mask: Tensor | None = None, *, keep_padding: bool = False
    ) -> "PackedTexts":
        """Drops the padding of `input_ids` (N, L).

        Args:
            input_ids: (N, L) token ids.
            attention_mask: (N, L), non-zero at tokens; None: all are tokens.
            keep_padding: padding is computed as the original computes it (nothing looks at it): outputs then have
                the shape of the inputs.

        Raises:
            ValueError: the shapes differ, or a text does not start with a token in column 0 (its [CLS]).
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be (texts, length), but has shape {tuple(input_ids.shape)}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}; "
                "pass the mask that the processor returned with these input_ids"
            )
        mask = attention_mask.bool().cpu()
        number, length = mask.shape
        if not mask[:, :1].all() or not length:
            wrong = (~mask[:, 0]).nonzero().flatten().tolist() if length else list(range(number))
            raise ValueError(
                f"texts {wrong} of the batch have no token in column 0, where the model reads [CLS]: pad on the right "
                "(tokenizer.padding_side = 'right') and drop records without text"
            )
        device = input_ids.device
        positions = torch.arange(length).expand(number, length)
        if keep_padding:
            counts = torch.full((number,), length)
            rows = TokenRows.from_counts(counts, device)
            key_mask = None if mask.all() else mask.to(device)
            return cls(input_ids.flatten(), positions.flatten().to(device), rows, counts, key_mask)
        counts = mask.sum(dim=1)
        rows = TokenRows.from_counts(counts, device)
        flat = mask.flatten().nonzero().flatten()
        tokens = input_ids.flatten().index_select(0, flat.to(device))
        return cls(tokens, positions.flatten()[flat].to(device), rows, counts, rows.mask)

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def first(self) -> Tensor:
        """(N,) CPU indices of the texts' first tokens."""
        return self.counts.cumsum(0) - self.counts

    def tokens_of(self, index: Tensor) -> Tensor:
        """CPU indices of the tokens of the texts `index` (P,) on the CPU, one text after another."""
        return token_index(self.counts, index)

    def select(self, index: Tensor) -> "PackedTexts":
        """The texts `index` (P,) on the CPU, in that order; a text may be named several times."""
        tokens = self.tokens_of(index).to(self.input_ids.device)
        counts = self.counts[index]
        rows = TokenRows.from_counts(counts, self.input_ids.device)
        if self.key_mask is None or self.rows.full:
            key_mask = None if self.key_mask is None else self.key_mask[index.to(self.key_mask.device)]
        else:
            key_mask = rows.mask
        return PackedTexts(self.input_ids[tokens], self.position_ids[tokens], rows, counts, key_mask)

    @classmethod
    def of_counts(cls, counts: Tensor, device: torch.device) -> "PackedTexts":
        """Texts of which only the lengths (N,) are known, and whose states come from elsewhere."""
        rows = TokenRows.from_counts(counts, device)
        nothing = torch.zeros(int(counts.sum()), dtype=torch.long, device=device)
        return cls(nothing, nothing, rows, counts, rows.mask)

    @classmethod
    def join(cls, *batches: "PackedTexts") -> "PackedTexts":
        """Several batches as one, all without padding."""
        counts = torch.cat([batch.counts for batch in batches])
        rows = TokenRows.from_counts(counts, batches[0].input_ids.device)
        return cls(
            torch.cat([batch.input_ids for batch in batches]),
            torch.cat([batch.position_ids for batch in batches]),
            rows,
            counts,
            rows.mask,
        )


@dataclass(frozen=True)
class CrossLayout:
    """Which tokens look at which image.

    Texts that look at the same image share a slot, a row of the grid of queries, so that its keys and values are not
    copied for each of them.

    Attributes:
        rows: the tokens on the grid of slots.
        images: (S,) image of each slot; None: slot i is image i.
        key_mask: (S, K) bool, True where image tokens may be looked at; None: everywhere.
    """

    rows: TokenRows
    images: Tensor | None
    key_mask: Tensor | None

    @classmethod
    def build(
        cls, counts: Tensor, image_index: Tensor, num_images: int, device: torch.device, key_mask: Tensor | None = None
    ) -> "CrossLayout":
        """Lays out rows of `counts` (N,) tokens that look at images `image_index` (N,), both on the CPU."""
        number = len(counts)
        used = torch.bincount(image_index, minlength=num_images)
        # Slots of the mean number of texts an image bound the empty cells that one much sought-after image causes.
        per_slot = max(1, -(-number // max(1, int((used > 0).sum()))))
        order = torch.argsort(image_index, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(number) - (used.cumsum(0) - used)[image_index[order]]
        slots_of = -(-used // per_slot)
        slot = (slots_of.cumsum(0) - slots_of)[image_index] + rank // per_slot
        num_slots = int(slots_of.sum())
        # A row starts in its slot after the tokens of the rows that came there before it.
        by_slot = torch.argsort(slot, stable=True)
        ends = counts[by_slot].cumsum(0)
        tokens = torch.zeros(num_slots, dtype=torch.long).index_add_(0, slot, counts)
        start = torch.empty_like(slot)
        start[by_slot] = ends - counts[by_slot] - (tokens.cumsum(0) - tokens)[slot[by_slot]]
        width = int(tokens.max()) if num_slots else 0
        total = int(counts.sum())
        row = torch.repeat_interleave(torch.arange(number), counts)
        within = torch.arange(total) - (counts.cumsum(0) - counts)[row]
        cells = slot[row] * width + start[row] + within
        full = total == num_slots * width and bool((cells == torch.arange(total)).all())
        images = torch.repeat_interleave(torch.arange(num_images), slots_of)
        identity = torch.equal(images, torch.arange(num_images))
        images = images.to(device)
        if key_mask is not None:
            key_mask = key_mask.bool().index_select(0, images)
        rows = TokenRows(cells.to(device), tokens.to(device), width, full)
        return cls(rows, None if identity else images, key_mask)


@dataclass(frozen=True)
class LayerLayout:
    """What one layer computes.

    Attributes:
        keys: the tokens that come in, which self-attention looks at.
        queries: the tokens that self-attention computes.
        key_mask: (N, width of keys) bool or None, see `PackedTexts`.
        keep: (tokens of `queries`,) their indices among those of `keys`; None: all.
        expand: (T',) copies tokens of self-attention's output, for several images a text; None: one each.
        cross: layout of cross-attention; None: the layer has none.
        weights: filled with the attention probabilities `"self"` (N, heads, queries, keys) and `"cross"`
            (slots, heads, queries, image tokens) when not None; attention then runs in the eager form.
    """

    keys: TokenRows
    queries: TokenRows
    key_mask: Tensor | None = None
    keep: Tensor | None = None
    expand: Tensor | None = None
    cross: CrossLayout | None = None
    weights: dict[str, Tensor] | None = field(default=None, compare=False)


def text_layout(texts: PackedTexts, keep: Tensor | None = None) -> LayerLayout:
    """Layout of a layer without cross-attention.

    Args:
        texts: what comes in.
        keep: (T',) CPU indices of the tokens to compute, in order; None: all.
    """
    if keep is None:
        return LayerLayout(texts.rows, texts.rows, texts.key_mask)
    device = texts.input_ids.device
    queries = TokenRows.from_counts(kept_counts(texts.counts, keep), device)
    return LayerLayout(texts.rows, queries, texts.key_mask, keep.to(device))


def kept_counts(counts: Tensor, keep: Tensor) -> Tensor:
    """How many of the tokens `keep` each text has; texts of lengths `counts` (N,), all on the CPU."""
    row = torch.searchsorted(counts.cumsum(0), keep, right=True)
    return torch.bincount(row, minlength=len(counts))


def fusion_layouts(
    texts: PackedTexts,
    num_layers: int,
    image_index: Tensor,
    num_images: int,
    *,
    source: Tensor | None = None,
    keep: Tensor | None = None,
    image_mask: Tensor | None = None,
) -> list[LayerLayout]:
    """Layouts of the fusion layers for P rows, each a text that looks at an image.

    The first layer's self-attention does not depend on the image, so it runs once a text; the last layer computes
    only the tokens that are asked for.

    Args:
        texts: the U texts whose states come in.
        num_layers: number of fusion layers.
        image_index: (P,) CPU, the image of each row. Of shape (2, P) for twin layers: even layers look at the first,
            odd ones at the second.
        num_images: number of images that there are keys and values of.
        source: (P,) CPU, the text of each row; None: row i is text i.
        keep: (T',) CPU indices, among the rows' tokens, of those that the last layer computes, in order; None: all.
        image_mask: (num_images, K), non-zero where image tokens may be looked at; None: everywhere.
    """
    device = texts.input_ids.device
    expand = None
    rows = texts
    if source is not None and not torch.equal(source, torch.arange(len(texts))):
        expand = token_index(texts.counts, source)
        rows = texts.select(source)
    index = image_index if image_index.ndim == 2 else image_index[None]

    def cross(counts: Tensor, layer: int) -> CrossLayout:
        return CrossLayout.build(counts, index[layer % len(index)], num_images, device, image_mask)

    crosses = [cross(rows.counts, layer) for layer in range(min(num_layers, len(index)))]
    layouts = []
    for layer in range(num_layers):
        inputs, copies = (texts, expand) if layer == 0 else (rows, None)
        if layer < num_layers - 1 or keep is None:
            copies = None if copies is None else copies.to(device)
            looks = crosses[layer % len(index)]
            layouts.append(LayerLayout(inputs.rows, inputs.rows, inputs.key_mask, None, copies, looks))
            continue
        looks = cross(kept_counts(rows.counts, keep), layer)
        if copies is not None:
            copies = copies[keep].to(device)
            layouts.append(LayerLayout(inputs.rows, inputs.rows, inputs.key_mask, None, copies, looks))
        else:
            layouts.append(replace(text_layout(inputs, keep), cross=looks))
    return layouts


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out. `attention_mask` is bool, True where a query may look. Returns (B, Q, H, d), weights."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1), dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def _boundaries(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).int()


def attend(
    module: nn.Module,
    query: Tensor,
    queries: TokenRows,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    weights: dict[str, Tensor] | None = None,
    name: str = "self",
) -> Tensor:
    """Attention of packed queries through the attention interface of transformers.

    Args:
        module: has `config`, `scaling`, `dropout` and `is_causal`.
        query: (T, H, d).
        queries: places of the T queries on a grid of R rows.
        key: (R, K, H, d).
        value: (R, K, H, d).
        key_mask: (R, K) bool, True where queries may look; None: everywhere.
        weights: probabilities are put here under `name` when not None.

    Returns:
        (T, H·d).
    """
    if not query.shape[0]:
        return query.flatten(1)
    implementation = module.config._attn_implementation
    dropout = module.dropout.p if module.training else 0.0
    if weights is None and implementation is not None and "flash" in implementation:
        return _attend_unpadded(module, query, queries, key, value, key_mask, dropout).flatten(1)
    interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    if weights is not None:
        interface = eager_attention
    grid = queries.pad(query)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    causal = module.is_causal and grid.shape[1] > 1
    if causal:
        width, length = grid.shape[1], key.shape[1]
        triangle = torch.ones(width, length, dtype=torch.bool, device=key.device).tril(length - width)
        mask = triangle if mask is None else mask & triangle
    output, probabilities = interface(
        module,
        grid.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask,
        dropout=dropout,
        scaling=module.scaling,
        is_causal=False,
    )
    if weights is not None:
        weights[name] = probabilities
    return queries.unpad(output).flatten(1)


def _attend_unpadded(
    module: nn.Module,
    query: Tensor,
    queries: TokenRows,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """The same for flash attention, which takes rows of any length laid end to end."""
    order = None if queries.full else queries.cells.argsort()
    if order is not None:
        query = query.index_select(0, order)
    length = key.shape[1]
    key_counts = torch.full((key.shape[0],), length, device=key.device) if key_mask is None else key_mask.sum(dim=1)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    if key_mask is not None:
        seen = key_mask.flatten().nonzero().flatten()
        key, value = key.index_select(0, seen), value.index_select(0, seen)
    output, _ = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation](
        module,
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        None,
        dropout=dropout,
        scaling=module.scaling,
        is_causal=module.is_causal,
        cu_seq_lens_q=_boundaries(queries.counts),
        cu_seq_lens_k=_boundaries(key_counts),
        max_length_q=queries.width,
        max_length_k=length,
    )
    output = output[0]
    return output if order is None else torch.empty_like(output).index_copy(0, order, output)
