"""Momentum distillation."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_vlp.objectives.contrastive import contrastive_loss
from hf_vlp.objectives.distillation import distillation_loss, distilled_targets
from hf_vlp.objectives.distributed import offset_of, world
from tests.distributed import run_ranks


def test_targets_mix_teacher_and_matching() -> None:
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], requires_grad=True)
    targets = distilled_targets(teacher, torch.arange(2), 0.4)
    assert torch.allclose(targets, torch.tensor([[0.6 + 0.3, 0.1], [0.2, 0.8]]))
    assert not targets.requires_grad
    assert torch.equal(distilled_targets(teacher, torch.eye(2), 0.4), targets)
    assert torch.equal(distilled_targets(teacher, torch.arange(2), 0.0), torch.eye(2))
    images, texts = torch.eye(2), torch.eye(2)
    loss = contrastive_loss(images, texts, 2.0, soft_targets=(targets, targets)).loss_i2t
    assert torch.allclose(loss, -(targets * (2 * torch.eye(2)).log_softmax(1)).sum(1).mean())


def test_loss_is_the_mixture_of_two_cross_entropies() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    labels = torch.tensor([1, -100, 3, 0, -100])
    kept = labels != -100
    hard = F.cross_entropy(logits[kept], labels[kept])
    soft = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1)[kept].mean()
    for alpha in (0.0, 0.4, 1.0):
        loss = distillation_loss(logits, teacher, labels, alpha)
        assert torch.allclose(loss, (1 - alpha) * hard + alpha * soft)
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="alpha"):
        distilled_targets(torch.zeros(2, 2), torch.eye(2), 1.5)
    with pytest.raises(ValueError, match="teacher_logits"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 0.5)


def on_this_rank(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 6, 7, generator=generator)
    labels = torch.tensor([1, -100, 3, 0, -100, 6])
    own = slice(offset_of(sizes), offset_of(sizes) + sizes[world()[0]])
    mine = logits[own].clone().requires_grad_()
    loss = distillation_loss(mine, teacher[own], labels[own], 0.4)
    loss.backward()
    return loss.detach(), mine.grad


def test_ranks_equal_one_process() -> None:
    sizes = [2, 0, 4]
    ranks, (loss, grad) = run_ranks(on_this_rank, 3, sizes), on_this_rank([6])
    assert torch.allclose(sum(value for value, _ in ranks) / 3, loss)
    assert torch.allclose(torch.cat([g for _, g in ranks]) / 3, grad)
