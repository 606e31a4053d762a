"""Momentum distillation (ALBEF, arXiv 2107.07651, section 3.4): what the momentum twin finds plausible takes part in
the target, so that a caption that also fits another image is not punished in full.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import global_mean
from .precision import full_precision, without_autocast


def distilled_targets(teacher_logits: Tensor, hard_targets: Tensor, alpha: float) -> Tensor:
    """Targets `alpha * softmax(teacher) + (1 - alpha) * hard` for `contrastive_loss(soft_targets=...)` (equation 6).

    Args:
        teacher_logits: `(B, C)`, similarities by the momentum twin. No gradient is taken.
        hard_targets: `(B, C)` rows that sum to one, or `(B,)` indices of the matching columns.
        alpha: share of the teacher, in [0, 1].

    Returns:
        `(B, C)` rows that sum to one.
    """
    _check_alpha(alpha)
    teacher = full_precision(teacher_logits.detach()).softmax(dim=-1)
    if hard_targets.dim() == 1:
        hard_targets = F.one_hot(hard_targets, teacher.shape[-1])
    return torch.lerp(hard_targets.to(teacher), teacher, alpha)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """`(1 - alpha)` of the cross-entropy with the labels plus `alpha` of that with the teacher (equation 7), mean over
    the supervised positions of all ranks.

    Args:
        logits: `(S, V)`.
        teacher_logits: `(S, V)` of the momentum twin. No gradient is taken.
        labels: `(S,)` ids; positions of -100 do not count, neither for the teacher.
        alpha: share of the teacher, in [0, 1].
    """
    _check_alpha(alpha)
    if logits.shape != teacher_logits.shape or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"`logits` and `teacher_logits` must be (positions, vocabulary) and `labels` (positions,), got "
            f"{tuple(logits.shape)}, {tuple(teacher_logits.shape)} and {tuple(labels.shape)}"
        )
    supervised = labels != -100
    with without_autocast(logits.device):
        logits = full_precision(logits[supervised])
        teacher = full_precision(teacher_logits[supervised].detach()).softmax(dim=-1)
        hard = F.cross_entropy(logits, labels[supervised], reduction="sum")
        soft = F.cross_entropy(logits, teacher, reduction="sum")
        return global_mean((1 - alpha) * hard + alpha * soft, supervised.sum())


def _check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha}")
