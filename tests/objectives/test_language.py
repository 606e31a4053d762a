"""LM and MLM: closed forms, supervised positions only, chunks, ranks, masking."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_vlp.objectives.distributed import offset_of, world
from hf_vlp.objectives.language import (
    AllLabelsIgnoredError,
    PaddingInLabelsError,
    language_modeling_loss,
    mask_tokens,
)
from tests.distributed import run_ranks

VOCABULARY = 11


class Head(nn.Module):
    """A head that remembers how many positions it was given."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, VOCABULARY)
        self.double()
        self.seen: list[int] = []

    def forward(self, states: Tensor) -> Tensor:
        self.seen.append(len(states))
        return self.decoder(self.norm(states))


def batch(seed: int = 0, rows: int = 3, length: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    return hidden, labels


def plain(hidden: Tensor, head: Head, labels: Tensor, shift: bool, label_smoothing: float) -> Tensor:
    logits = head(hidden)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(
        logits.reshape(-1, VOCABULARY), labels.reshape(-1), ignore_index=-100, label_smoothing=label_smoothing
    )


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_equals_the_loss_over_all_logits(shift: bool, label_smoothing: float, chunk_size: int | None) -> None:
    hidden, labels = batch()
    head = Head()
    sides = []
    for compute in (
        lambda x: language_modeling_loss(
            x, head, labels, shift=shift, label_smoothing=label_smoothing, chunk_size=chunk_size
        ),
        lambda x: plain(x, head, labels, shift, label_smoothing),
    ):
        x = hidden.clone().requires_grad_()
        loss = compute(x)
        sides.append([loss, *torch.autograd.grad(loss, [x, *head.parameters()])])
    for ours, expected in zip(*sides):
        assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_the_head_sees_supervised_positions_only() -> None:
    hidden, labels = batch()
    head = Head()
    language_modeling_loss(hidden, head, labels)
    assert head.seen == [int((labels[:, 1:] != -100).sum())]
    head.seen.clear()
    language_modeling_loss(hidden.requires_grad_(), head, labels, chunk_size=2).backward()
    assert max(head.seen) <= 2
    # Garbage where nothing is supervised does not matter.
    hidden = hidden.detach()
    clean = language_modeling_loss(hidden, head, labels, shift=False)
    hidden[labels == -100] = torch.nan
    assert torch.equal(language_modeling_loss(hidden, head, labels, shift=False), clean)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_linear_head_in_chunks(label_smoothing: float, bias: bool, frozen: bool) -> None:
    hidden, labels = batch()
    head = nn.Linear(6, VOCABULARY, bias=bias).double().requires_grad_(not frozen)
    sides = []
    for chunk_size in (None, 2):
        x = hidden.clone().requires_grad_()
        loss = language_modeling_loss(x, head, labels, label_smoothing=label_smoothing, chunk_size=chunk_size)
        wanted = [x, *(parameter for parameter in head.parameters() if not frozen)]
        # Twice, as a second backward through the same graph must give the same.
        for _ in range(2):
            sides.append([loss, *torch.autograd.grad(loss * 3, wanted, retain_graph=True)])
    for side in sides[1:]:
        for ours, expected in zip(side, sides[0], strict=True):
            assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(
            language_modeling_loss(hidden, head, labels, label_smoothing=label_smoothing, chunk_size=2), sides[0][0]
        )


def test_a_linear_head_in_chunks_under_autocast() -> None:
    hidden, labels = batch()
    grads = []
    for chunk_size in (None, 2):
        torch.manual_seed(0)
        head, x = nn.Linear(6, VOCABULARY), hidden.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = language_modeling_loss(x, head, labels, chunk_size=chunk_size)
        loss.backward()
        assert x.grad.dtype == head.weight.grad.dtype == head.bias.grad.dtype == torch.float32
        grads.append([x.grad, head.weight.grad, head.bias.grad])
    for ours, expected in zip(grads[1], grads[0]):
        assert (ours - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_hooked_linear_head_is_called() -> None:
    hidden, labels = batch()
    head, calls = nn.Linear(6, VOCABULARY).double(), []
    head.register_forward_hook(lambda *_: calls.append(1))
    language_modeling_loss(hidden, head, labels, chunk_size=2)
    assert calls


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator makes, backward included."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(("chunk_size", "rows"), [(None, 40), (8, 8)])
def test_no_more_logits_than_a_chunk_are_held(chunk_size: int | None, rows: int) -> None:
    vocabulary = 5000
    hidden = torch.randn(4, 30, 4, requires_grad=True)
    labels = torch.full((4, 30), -100)
    labels[:, -10:] = 3
    decoder = nn.Linear(4, vocabulary)
    with LargestTensor() as largest:
        language_modeling_loss(hidden, decoder, labels, chunk_size=chunk_size, label_smoothing=0.1).backward()
    assert largest.elements == rows * vocabulary


def test_a_uniform_head_costs_the_logarithm_of_the_vocabulary() -> None:
    hidden, labels = batch()
    for smoothing in (0.0, 0.3):
        loss = language_modeling_loss(hidden, lambda x: x.new_zeros(len(x), 7000), labels, label_smoothing=smoothing)
        assert loss.item() == pytest.approx(math.log(7000), abs=1e-5)


def test_label_smoothing_by_hand() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0]]])
    loss = language_modeling_loss(logits, lambda x: x, torch.tensor([[0]]), shift=False, label_smoothing=0.3)
    log_sum = math.log(math.exp(2) + 2)
    assert loss.item() == pytest.approx(log_sum - 0.7 * 2 - 0.3 * 2 / 3, abs=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_half_precision_logits_are_reduced_in_full(chunk_size: int | None) -> None:
    hidden, labels = batch()
    decoder = nn.Linear(6, VOCABULARY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = language_modeling_loss(hidden.float(), decoder, labels, chunk_size=chunk_size)
        logits = decoder(hidden.float())
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY).float(), labels[:, 1:].reshape(-1))
    assert torch.allclose(loss, expected, atol=1e-6)


def test_silent_errors_raise() -> None:
    hidden, labels = batch()
    head = Head()
    with pytest.raises(AllLabelsIgnoredError, match="all labels of this batch are -100"):
        language_modeling_loss(hidden, head, torch.full_like(labels, -100))
    only_first = torch.full_like(labels, -100)
    only_first[:, 0] = 3
    with pytest.raises(AllLabelsIgnoredError):
        language_modeling_loss(hidden, head, only_first)
    padded = torch.full_like(labels, -100)
    padded[0] = torch.tensor([3, 4, 7, 7, 7])
    with pytest.raises(PaddingInLabelsError, match="padding token 7 .*{0: 3}"):
        language_modeling_loss(hidden, head, padded, pad_token_id=7)
    assert language_modeling_loss(hidden, head, padded).isfinite()
    labels[0, 2] = VOCABULARY
    for chunk_size in (None, 2):
        with pytest.raises(ValueError, match=f"token {VOCABULARY}, but the head has {VOCABULARY} logits"):
            language_modeling_loss(hidden, head, labels, chunk_size=chunk_size)
    labels[0, 2] = -1
    with pytest.raises(ValueError, match="got -1"):
        language_modeling_loss(hidden, head, labels)
    with pytest.raises(ValueError, match="labels"):
        language_modeling_loss(hidden, head, labels[:, 1:])
    with pytest.raises(ValueError, match="chunk_size"):
        language_modeling_loss(hidden, head, labels, chunk_size=0)


def on_this_rank(sizes: list[int]) -> dict[str, Any]:
    rank, _ = world()
    own = slice(offset_of(sizes), offset_of(sizes) + sizes[rank])
    hidden, labels = batch(rows=6)
    labels[:2] = -100  # the first rank has rows, but nothing to learn
    results: dict[str, Any] = {}
    for chunk_size in (None, 2):
        head = Head()
        x = hidden[own].clone().requires_grad_()
        loss = language_modeling_loss(x, head, labels[own], label_smoothing=0.1, chunk_size=chunk_size)
        calls = len(head.seen)
        loss.backward()
        results[str(chunk_size)] = loss.detach(), x.grad, [p.grad for p in head.parameters()], calls
    raised = []
    for wrong, pad in ((torch.full_like(labels, -100), None), (labels.where(labels == -100, 5), 5)):
        try:
            language_modeling_loss(hidden[own], Head(), wrong[own], pad_token_id=pad)
        except (AllLabelsIgnoredError, PaddingInLabelsError) as error:
            raised.append(type(error).__name__)
    return {**results, "raised": raised}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[2, 4], [2, 0, 4]])
def test_ranks_equal_one_process(sizes: list[int]) -> None:
    ranks, single = run_ranks(on_this_rank, len(sizes), sizes), on_this_rank([6])
    size = len(sizes)
    for chunk_size in ("None", "2"):
        loss, grad, weights, _ = single[chunk_size]
        found = [rank[chunk_size] for rank in ranks]
        assert torch.allclose(sum(f[0] for f in found) / size, loss, rtol=1e-12)
        assert torch.allclose(torch.cat([f[1] for f in found]) / size, grad, rtol=1e-12, atol=1e-14)
        for position, expected in enumerate(weights):
            assert torch.allclose(sum(f[2][position] for f in found) / size, expected, rtol=1e-12, atol=1e-14)
        assert len({f[3] for f in found}) == 1  # a sharded head must be called equally often
    for rank in ranks:
        assert rank["raised"] == ["AllLabelsIgnoredError", "PaddingInLabelsError"]


def tokens(rows: int = 400, length: int = 30) -> tuple[Tensor, Tensor]:
    ids = torch.randint(10, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    special = torch.zeros(rows, length, dtype=torch.bool)
    special[:, 0] = special[:, 20:] = True
    return ids, special


def test_masking_has_the_shares_of_bert() -> None:
    ids, special = tokens()
    before = ids.clone()
    masked = mask_tokens(
        ids, mask_token_id=5, vocab_size=1000, special_mask=special, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(ids, before)
    chosen = masked.labels != -100
    assert not chosen[special].any()
    assert torch.equal(masked.labels[chosen], ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])
    count = chosen.sum().item()
    assert count / (~special).sum().item() == pytest.approx(0.15, abs=0.015)
    became = masked.input_ids[chosen]
    assert (became == 5).sum().item() / count == pytest.approx(0.8, abs=0.04)
    assert (became == ids[chosen]).sum().item() / count == pytest.approx(0.1, abs=0.03)
    replaced = became[(became != 5) & (became != ids[chosen])]
    assert len(replaced) / count == pytest.approx(0.1, abs=0.03)
    assert replaced.max() < 1000


@settings(max_examples=25, deadline=None)
@given(
    probability=st.floats(0, 1),
    mask_share=st.floats(0, 1),
    seed=st.integers(0, 1000),
    at_least_one=st.booleans(),
    whole_words=st.booleans(),
)
def test_masking_properties(
    probability: float, mask_share: float, seed: int, at_least_one: bool, whole_words: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 50, (6, 12), generator=generator)
    special = torch.rand(6, 12, generator=generator) < 0.3
    special[0] = True
    words = torch.arange(12).expand(6, 12) // 3 if whole_words else None
    arguments: dict[str, Any] = {
        "mask_token_id": 5,
        "vocab_size": 50,
        "special_mask": special,
        "probability": probability,
        "mask_share": mask_share,
        "random_share": (1 - mask_share) / 2,
        "word_ids": words,
        "at_least_one": at_least_one,
    }
    one, two = (mask_tokens(ids, generator=torch.Generator().manual_seed(seed), **arguments) for _ in range(2))
    assert torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(one.labels, two.labels)
    chosen = one.labels != -100
    assert not (chosen & special).any()
    if at_least_one:
        assert torch.equal(chosen.any(1), (~special).any(1))
    if probability == 1:
        assert torch.equal(chosen, ~special)
    if whole_words:
        for word in range(4):
            inside, free = chosen[:, 3 * word : 3 * word + 3], ~special[:, 3 * word : 3 * word + 3]
            assert torch.equal(inside.any(1)[:, None] & free, inside)


def test_tokens_outside_words_are_never_chosen() -> None:
    ids, special = tokens(4, 30)
    words = torch.full_like(ids, -1)
    words[:, 5] = 0
    masked = mask_tokens(ids, mask_token_id=5, vocab_size=1000, special_mask=special, probability=1.0, word_ids=words)
    assert (masked.labels != -100).nonzero()[:, 1].tolist() == [5] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 1.5}, "probability"),
        ({"mask_share": 0.8, "random_share": 0.3}, "random_share"),
        ({"special_mask": torch.zeros(2, 3)}, "special_mask"),
        ({"word_ids": torch.zeros(2, 3)}, "word_ids"),
    ],
)
def test_bad_masking_arguments_are_named(change: dict[str, Any], message: str) -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    arguments = {"mask_token_id": 5, "vocab_size": 9, "special_mask": torch.zeros(2, 4), **change}
    with pytest.raises(ValueError, match=message):
        mask_tokens(ids, **arguments)
