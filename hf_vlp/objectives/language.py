"""Language modelling (LM, and ITG of BLIP-2) and masked language modelling (MLM)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from .distributed import exchange_integers, world
from .precision import full_precision, without_autocast

IGNORED = -100


class AllLabelsIgnoredError(ValueError):
    """No position of the joined batch is supervised: the loss would be nan or 0, and the step would train nothing."""


class PaddingInLabelsError(ValueError):
    """Labels that name the padding token: the model would be taught to write padding."""


def language_modeling_loss(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    shift: bool = True,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    pad_token_id: int | None = None,
) -> Tensor:
    """Cross-entropy of the next (or the masked) token, mean over the supervised positions of all ranks.

    The head sees the supervised positions only: no logits are made where the label is -100.

    Args:
        hidden: `(B, L, D)` last hidden states.
        head: from `(S, D)` to `(S, V)` logits; it works on each position for itself.
        labels: `(B, L)` token ids, -100 where nothing is to be learnt.
        shift: whether position t predicts label t + 1 (causal models); False for MLM and encoder-decoder models.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        chunk_size: how many positions have logits at a time: `chunk_size * V` numbers instead of `S * V`. For a plain
            `nn.Linear` the gradient of a chunk is taken at once, at no cost; for any other head the chunk is computed
            again in the backward, for 4/3 of the head's multiplications. None: all positions at once.
        pad_token_id: raise if it is among the labels. Leave it out where the padding token is also the end token.

    Returns:
        Scalar; on N ranks see `distributed.global_mean`. Each rank calls the head equally often, also with fewer or
        no supervised positions, so that a head whose weights are spread over ranks does not hang.

    Raises:
        AllLabelsIgnoredError: no label on any rank. All ranks raise.
        PaddingInLabelsError: `pad_token_id` is among the labels of some rank. All ranks raise.
        ValueError: shapes that don't fit, or a label that the head has no logit for.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"`hidden` must be (batch, length, width) and `labels` (batch, length), got {tuple(hidden.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    if shift:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    supervised = labels != IGNORED
    rows, targets = hidden[supervised], labels[supervised]  # (S, D), (S,)
    count = len(targets)
    padding = (targets == (IGNORED if pad_token_id is None else pad_token_id)).sum()
    low, high, padded = torch.stack([targets.min(), targets.max(), padding]).tolist() if count else (0, 0, 0)
    everyone = exchange_integers([count, padded, low], labels.device)
    total = sum(counts for counts, _, _ in everyone)
    if total == 0:
        raise AllLabelsIgnoredError(
            f"all labels of this batch are {IGNORED}: nothing would be learnt. Check "
            "that the captions are not empty and not masked, and that `max_length` leaves room after the prompt"
        )
    if any(paddings for _, paddings, _ in everyone):
        found = {rank: paddings for rank, (_, paddings, _) in enumerate(everyone) if paddings}
        raise PaddingInLabelsError(
            f"`labels` name the padding token {pad_token_id} (number of positions by rank: {found}): set these labels "
            f"to {IGNORED}, as the collators of this package do, or pass no `pad_token_id` if it is a token to learn"
        )
    if any(lowest < 0 for _, _, lowest in everyone):
        raise ValueError(f"`labels` must be token ids or {IGNORED}, got {min(lowest for _, _, lowest in everyone)}")

    def chunk_loss(states: Tensor, wanted: Tensor) -> Tensor:
        logits = head(states)
        if high >= logits.shape[-1]:
            raise ValueError(
                f"`labels` name the token {high}, but the head has {logits.shape[-1]} logits: the tokenizer and the "
                "model don't fit; resize the token embeddings"
            )
        with without_autocast(logits.device):
            return F.cross_entropy(full_precision(logits), wanted, label_smoothing=label_smoothing, reduction="sum")

    if chunk_size is None:
        loss = chunk_loss(rows, targets)
    elif _is_plain_linear(head):
        if high >= head.out_features:
            chunk_loss(rows[:1], targets[:1])  # raises
        loss = _ChunkedLinear.apply(rows, head.weight, head.bias, targets, label_smoothing, chunk_size)
    else:
        chunks = -(-max(counts for counts, _, _ in everyone) // chunk_size)
        loss = None
        for chunk in range(chunks):
            piece = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
            part = checkpoint(chunk_loss, rows[piece], targets[piece], use_reentrant=False)
            loss = part if loss is None else loss + part
    return loss * (world()[1] / total)


def _is_plain_linear(head: Callable[[Tensor], Tensor]) -> bool:
    """Whether `head(x)` is no more than `x @ weight.T + bias`, with all of the weight at hand."""
    return (
        type(head) is nn.Linear
        and type(head.weight) in (Tensor, nn.Parameter)
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and "forward" not in head.__dict__
    )


class _ChunkedLinear(torch.autograd.Function):
    """Sum of the cross-entropies of `rows @ weight.T + bias`. The gradient of a chunk's logits is known as soon as the
    logits are, so the forward already turns it into those of the inputs, and no chunk is computed twice.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
        chunk_size: int,
    ) -> Tensor:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        want_rows, want_weight, want_bias = ctx.needs_input_grad[:3]
        cast_weight = weight.to(dtype)
        rows_grad = torch.empty_like(rows) if want_rows else None
        weight_grad = torch.zeros_like(weight) if want_weight else None
        bias_grad = torch.zeros_like(bias) if want_bias else None
        loss = full_precision(rows.new_zeros(()))
        with without_autocast(rows.device):
            for start in range(0, len(rows), chunk_size):
                piece = slice(start, start + chunk_size)
                states, wanted = rows[piece].to(dtype), targets[piece, None]
                logits = full_precision(F.linear(states, cast_weight, None if bias is None else bias.to(dtype)))
                log_sum = logits.logsumexp(dim=1, keepdim=True)
                loss += (log_sum - (1 - label_smoothing) * logits.gather(1, wanted)).sum()
                if label_smoothing:
                    loss -= label_smoothing * logits.mean(dim=1).sum()
                if not (want_rows or want_weight or want_bias):
                    continue
                grad = logits.sub_(log_sum).exp_()
                if label_smoothing:
                    grad -= label_smoothing / grad.shape[1]
                grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, label_smoothing - 1))
                if bias_grad is not None:
                    bias_grad += grad.sum(dim=0)
                grad = grad.to(dtype)
                if rows_grad is not None:
                    rows_grad[piece] = grad @ cast_weight
                if weight_grad is not None and weight_grad.dtype == dtype:
                    weight_grad.addmm_(grad.t(), states)
                elif weight_grad is not None:
                    weight_grad += grad.t() @ states
        ctx.save_for_backward(rows_grad, weight_grad, bias_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *(None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors),
            None,
            None,
            None,
        )


class MaskedTokens(NamedTuple):
    """Input of masked language modelling.

    Attributes:
        input_ids: `(B, L)` with some tokens replaced.
        labels: `(B, L)` the original token at the chosen positions, -100 elsewhere.
    """

    input_ids: Tensor
    labels: Tensor


def mask_tokens(
    input_ids: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_mask: Tensor,
    probability: float = 0.15,
    generator: torch.Generator | None = None,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    word_ids: Tensor | None = None,
    at_least_one: bool = False,
) -> MaskedTokens:
    """BERT's masking (arXiv 1810.04805, section 3.1): of the chosen 15%, 80% become [MASK], 10% a random token, 10%
    stay.

    Args:
        input_ids: `(B, L)`, not changed.
        mask_token_id: id of [MASK].
        vocab_size: random tokens are drawn from `[0, vocab_size)`.
        special_mask: `(B, L)` bool, true where a token must never be chosen ([CLS], [SEP], padding).
        probability: of a token (with `word_ids`, of a word) to be chosen.
        generator: source of randomness. None: the default generator of the CPU.
        mask_share: share of the chosen that become [MASK].
        random_share: share of the chosen that become a random token.
        word_ids: `(B, L)` integers, equal for the tokens of one word of a row, negative for tokens that belong to
            none; words are then chosen as wholes.
        at_least_one: whether each row with a token that may be chosen gets at least one (as in BERT's own data).
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"`probability` must be in [0, 1], got {probability}")
    if min(mask_share, random_share) < 0 or mask_share + random_share > 1:
        raise ValueError(f"`mask_share` {mask_share} and `random_share` {random_share} must add up to at most 1")
    for name, tensor in (("special_mask", special_mask), ("word_ids", word_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"`{name}` must be {tuple(input_ids.shape)}, got {tuple(tensor.shape)}")
    source = torch.device("cpu") if generator is None else generator.device
    shape = tuple(input_ids.shape)
    choice, fate = torch.rand(2, *shape, generator=generator, device=source).to(input_ids.device)
    random_tokens = torch.randint(vocab_size, shape, generator=generator, device=source).to(input_ids)

    free = ~special_mask.bool()
    if word_ids is not None:
        free &= word_ids >= 0
        choice = _first_of_word(choice, word_ids, free)
    chosen = free & (choice < probability)
    if at_least_one:
        lowest = choice.masked_fill(~free, 2.0).amin(dim=1, keepdim=True)
        chosen |= free & (choice == lowest) & ~chosen.any(dim=1, keepdim=True)
    labels = input_ids.masked_fill(~chosen, IGNORED)
    masked = torch.where(chosen & (fate < mask_share), mask_token_id, input_ids)
    masked = torch.where(chosen & (fate >= mask_share) & (fate < mask_share + random_share), random_tokens, masked)
    return MaskedTokens(masked, labels)


def _first_of_word(choice: Tensor, word_ids: Tensor, free: Tensor) -> Tensor:
    """The random number of each word's first free token, for all of its tokens."""
    same = (word_ids[:, :, None] == word_ids[:, None, :]) & free[:, None, :]  # (B, L, L)
    first = same.int().argmax(dim=2)
    return choice.gather(1, first)
