"""Several conversations in one row: positions that start anew, labels that do not cross a border."""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel


def packed_positions(sequence_ids: Tensor, position_ids: Tensor | None, language_model: PreTrainedModel) -> Tensor:
    """Positions (B, L) that start at 0 in each conversation and are 0 at padding.

    transformers reads the borders of packed rows off positions that do not go on by one, so padding, at 0 each, is a
    sequence of its own for every token and is seen by none.

    Args:
        sequence_ids: (B, L) 1, 2, … for the conversations, 0 at padding.
        position_ids: (B, L) the same as a collator counted it, or None.
        language_model: reads the row.

    Raises:
        ValueError: the language model takes no positions, or `position_ids` do not start anew with each conversation.
    """
    if "position_ids" not in inspect.signature(language_model.forward).parameters:
        raise ValueError(
            f"{type(language_model).__name__} takes no position_ids and cannot read packed rows; train it on padded "
            "batches (leave out --pack_to)"
        )
    index = torch.arange(sequence_ids.shape[1], device=sequence_ids.device).expand_as(sequence_ids)
    first = torch.ones_like(sequence_ids, dtype=torch.bool)
    first[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    start = index.masked_fill(~first, 0).cummax(dim=1).values
    positions = (index - start).masked_fill(sequence_ids == 0, 0)
    if position_ids is not None:
        real = sequence_ids != 0
        if position_ids.shape != positions.shape or bool((position_ids != positions)[real].any()):
            raise ValueError(
                "position_ids of a packed row must count from 0 in each conversation of sequence_ids; leave them out, "
                "and they are counted"
            )
    return positions


def supervised_labels(labels: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """Labels without those of first tokens, which the end of another conversation would have to predict."""
    if sequence_ids is None:
        return labels
    first = torch.ones_like(sequence_ids, dtype=torch.bool)
    first[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return labels.masked_fill(first, -100)


def flattened(language_model: PreTrainedModel) -> bool:
    """Whether packed rows are read as one long row, as variable-length flash attention wants it."""
    return "flash" in (language_model.config._attn_implementation or "")


__all__ = ["flattened", "packed_positions", "supervised_labels"]
