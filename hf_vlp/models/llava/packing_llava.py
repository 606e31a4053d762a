"""Several conversations in one row: positions that start anew, labels that do not cross a border."""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_vlp.nn.sequences import attention_arguments, sequence_begins, sequence_positions

_CHECKED = "_hf_vlp_keeps_packed_rows_apart"


def packed_positions(sequence_ids: Tensor, position_ids: Tensor | None, language_model: PreTrainedModel) -> Tensor:
    """Positions (B, L) that start at 0 in each conversation and are 0 at padding.

    Where transformers reads the borders of packed rows off positions that do not go on by one, each token of padding
    is a sequence of its own, seen by none.

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
    positions = sequence_positions(sequence_ids).masked_fill(sequence_ids == 0, 0)
    if position_ids is not None:
        real = sequence_ids != 0
        if position_ids.shape != positions.shape or bool((position_ids != positions)[real].any()):
            raise ValueError(
                "position_ids of a packed row must count from 0 in each conversation of sequence_ids; leave them out, "
                "and they are counted"
            )
    return positions


def packed_mask(sequence_ids: Tensor, language_model: PreTrainedModel, dtype: torch.dtype) -> Tensor | None:
    """The block-diagonal causal mask (B, 1, L, L) of packed rows, or None where transformers makes it itself.

    It does so from positions that start anew, in the form that an attention implementation (variable-length flash,
    flex) or a layer (sliding window) wants, if the language model lets it; `check_borders` finds out.

    Args:
        sequence_ids: (B, L) 1, 2, … for the conversations, 0 at padding.
        dtype: of the hidden states; eager attention adds the mask to its scores.
    """
    config = language_model.config
    sliding = getattr(config, "sliding_window", None) or any(
        kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()
    )
    if sliding or config._attn_implementation not in ("sdpa", "eager"):
        check_borders(language_model)
        return None
    return attention_arguments(sequence_ids, config._attn_implementation, dtype)["attention_mask"]


def check_borders(language_model: PreTrainedModel) -> None:
    """Refuses a language model that looks over the borders of packed rows; looks once a model and implementation.

    Raises:
        ValueError: the second of two packed tokens depends on the first.
    """
    implementation = language_model.config._attn_implementation
    if getattr(language_model, _CHECKED, None) == implementation:
        return
    was_training = language_model.training
    language_model.eval()
    embeds = language_model.get_input_embeddings()
    rows = torch.tensor([[0, 1], [2, 1]], device=next(language_model.parameters()).device)
    with torch.no_grad():
        first, second = (
            language_model(
                inputs_embeds=embeds(row[None]),
                position_ids=torch.zeros_like(row)[None],
                attention_mask=None,
                use_cache=False,
            ).last_hidden_state[0, 1]
            for row in rows
        )
    language_model.train(was_training)
    if not torch.allclose(first, second, atol=1e-3, rtol=1e-3):
        raise ValueError(
            f"{type(language_model).__name__} with attention {implementation!r} does not keep packed conversations "
            "apart; use attn_implementation='sdpa', or leave out --pack_to"
        )
    object.__setattr__(language_model, _CHECKED, implementation)


def supervised_labels(labels: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """Labels without those of first tokens, which the end of another conversation would have to predict."""
    if sequence_ids is None:
        return labels
    return labels.masked_fill(sequence_begins(sequence_ids), -100)


def flattened(language_model: PreTrainedModel) -> bool:
    """Whether packed rows are read as one long row, as variable-length flash attention wants it."""
    return "flash" in (language_model.config._attn_implementation or "")


__all__ = ["check_borders", "flattened", "packed_mask", "packed_positions", "supervised_labels"]
