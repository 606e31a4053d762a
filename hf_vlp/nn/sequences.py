"""Attention inside the sequences of a packed row: each token sees those before it in its own sequence, no others."""

from typing import Any

import torch
from torch import Tensor


def block_causal_mask(sequence_ids: Tensor) -> Tensor:
    """Which token may look at which in rows of packed sequences.

    Padding (id 0) looks at padding only, so that no row of the mask is empty and no softmax undefined.

    Args:
        sequence_ids: (B, L) the number of the sequence that each token belongs to.

    Returns:
        (B, 1, L, L) bool, True where query (third axis) sees key (fourth axis).
    """
    length = sequence_ids.shape[1]
    same = sequence_ids[:, None, :, None] == sequence_ids[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=sequence_ids.device).tril()
    return same & causal


def sequence_begins(sequence_ids: Tensor) -> Tensor:
    """(B, L) bool, True at the first token of each sequence; the padding of a row counts as one."""
    begins = torch.ones_like(sequence_ids, dtype=torch.bool)
    begins[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return begins


def sequence_positions(sequence_ids: Tensor) -> Tensor:
    """(B, L) position of each token in its own sequence, from 0."""
    places = torch.arange(sequence_ids.shape[1], device=sequence_ids.device).expand_as(sequence_ids)
    return places - (places * sequence_begins(sequence_ids)).cummax(dim=1).values


def attention_arguments(sequence_ids: Tensor, implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a language model of transformers is called with so that packed sequences do not see each other.

    Args:
        sequence_ids: (B, L) as in `ConversationCollator`: 1, 2, … in a row, 0 for padding.
        implementation: the model's `config._attn_implementation`.
        dtype: of the model's activations.

    Returns:
        `position_ids` and, for `"sdpa"`, a boolean mask (B, 1, L, L); for `"eager"` the same as numbers to add to the
        scores; for flash attention the bounds of the sequences (`cu_seq_lens_q`, …) over the flattened batch, with
        which no product is computed between sequences.

    Raises:
        ValueError: an attention that takes neither.
    """
    positions = sequence_positions(sequence_ids)
    if implementation == "sdpa":
        return {"attention_mask": block_causal_mask(sequence_ids), "position_ids": positions}
    if implementation == "eager":
        seen = block_causal_mask(sequence_ids)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return {"attention_mask": mask, "position_ids": positions}
    if "flash" in implementation:
        bounds, longest = sequence_bounds(sequence_ids)
        return {
            "attention_mask": None,
            "position_ids": positions,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    raise ValueError(
        f"packed sequences cannot be kept apart by attention {implementation!r}; load the language model with "
        f'attn_implementation="sdpa", "eager" or a flash attention'
    )


def sequence_bounds(sequence_ids: Tensor) -> tuple[Tensor, int]:
    """Bounds of the sequences in the flattened batch, padding being sequences of its own, and the longest's length.

    Returns:
        (S + 1,) int32 from 0 to B * L, and the number of tokens of the longest.
    """
    starts = sequence_begins(sequence_ids).flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([sequence_ids.numel()])]).to(torch.int32)
    return bounds, int(bounds.diff().max())
