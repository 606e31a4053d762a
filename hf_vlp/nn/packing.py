"""Texts of a batch without their padding.

Linear layers and feed-forwards treat every token alike, so they can run on the tokens of all texts laid end to end;
only attention needs to know which token belongs to which text, and goes back to a padded grid for that one product.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Place(torch.autograd.Function):
    """Writes row i of `rows` to row `index[i]` of a zero tensor of `size` rows. `index` has no repeats.

    The gradient of a plain `index_select` is an accumulation, which is slow and, on GPUs, not reproducible; without
    repeats it is the opposite move, and this pair of functions says so.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        placed = rows.new_zeros((size, *rows.shape[1:]))
        placed[index] = rows
        return placed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _Take.apply(gradient, index), None, None


class _Take(torch.autograd.Function):
    """The inverse of `_Place`: rows `index` of `rows`. `index` has no repeats."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = rows.shape[0]
        return rows[index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _Place.apply(gradient, index, ctx.size), None


def place_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Zero tensor of shape (`size`, ...) whose rows `index` (N,), all different, are `rows` (N, ...)."""
    return _Place.apply(rows, index, size)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (N,), all different, of `rows` (M, ...): (N, ...)."""
    return _Take.apply(rows, index)


@dataclass(frozen=True)
class PackedTexts:
    """The tokens of S texts laid end to end, N in all, the longest text having L.

    Attributes:
        input_ids: (N,) the tokens, text after text.
        positions: (N,) position of each token in its own text, from 0, wherever the padding was.
        rows: (N,) the text that each token belongs to.
        lengths: (S,) number of tokens of each text.
        longest: L.
    """

    input_ids: Tensor
    positions: Tensor
    rows: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor | None = None) -> "PackedTexts":
        """Drops the padding of `input_ids` (S, length), on whichever side it is.

        Args:
            input_ids: (S, length) token ids.
            attention_mask: (S, length), non-zero where there is a token; without it every position is one.

        Raises:
            ValueError: the shapes differ, or a text has no token at all.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}; "
                "pass the mask that the processor returned with these input_ids"
            )
        mask = attention_mask != 0
        lengths = mask.sum(dim=1)
        if lengths.numel() and int(lengths.min()) == 0:
            empty = (lengths == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"texts {empty} of the batch have no token (their attention_mask is all zero); "
                "drop these records or give them a text"
            )
        rows, columns = mask.nonzero(as_tuple=True)
        positions = (mask.cumsum(dim=1) - 1)[rows, columns]
        longest = int(lengths.max()) if lengths.numel() else 0
        return cls(input_ids[rows, columns], positions, rows, lengths, longest)

    def __len__(self) -> int:
        return self.lengths.shape[0]

    @property
    def slots(self) -> Tensor:
        """(N,) where each token sits in the flattened (S, L) grid, texts aligned to the left."""
        return self.rows * self.longest + self.positions

    @property
    def first(self) -> Tensor:
        """(S,) index of each text's first token among the N."""
        return self.lengths.cumsum(dim=0) - self.lengths

    @property
    def mask(self) -> Tensor:
        """(S, L) bool, True where the left-aligned grid has a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    def pad(self, values: Tensor) -> Tensor:
        """Token values (N, ...) on the left-aligned grid (S, L, ...), zero where there is no token."""
        grid = place_rows(values, self.slots, len(self) * self.longest)
        return grid.view(len(self), self.longest, *values.shape[1:])

    def pad_left(self, pad_token_id: int) -> tuple[Tensor, Tensor]:
        """Ids (S, L) and mask (S, L) with the texts aligned to the right."""
        grid = torch.full((len(self), self.longest), pad_token_id, device=self.input_ids.device)
        columns = self.positions + (self.longest - self.lengths)[self.rows]
        grid[self.rows, columns] = self.input_ids
        return grid, self.mask.flip(1).long()

    def select(self, index: Tensor) -> "PackedTexts":
        """The texts `index` (P,), in that order; a text may be named several times."""
        return PackedTexts.from_padded(self.pad(self.input_ids)[index], self.mask[index])

    def with_first(self, token_id: int) -> "PackedTexts":
        """The same texts with their first token replaced, as [DEC] replaces [CLS] before text is generated."""
        input_ids = self.input_ids.masked_fill(self.positions == 0, token_id)
        return PackedTexts(input_ids, self.positions, self.rows, self.lengths, self.longest)

    def without_last(self) -> "PackedTexts":
        """The texts less their last token: the inputs of next-token prediction, which ends by predicting it."""
        keep = self.positions < self.lengths[self.rows] - 1
        lengths = self.lengths - 1
        return PackedTexts(self.input_ids[keep], self.positions[keep], self.rows[keep], lengths, self.longest - 1)

    def next_tokens(self) -> Tensor:
        """(N - S,) the token that follows each token of `without_last()`."""
        return self.input_ids[self.positions > 0]
