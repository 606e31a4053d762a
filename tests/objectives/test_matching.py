"""ITM: hard negatives that are never true pairs, the same on N ranks as on one process, and the loss."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_vlp.objectives.distributed import offset_of, world
from hf_vlp.objectives.matching import HardNegatives, NoNegativesError, _draw, hard_negatives, matching_loss
from tests.distributed import run_ranks

IDS = torch.tensor([4, 4, 9, 1, 9, 9, 2, 4])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 9),
    distinct=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 50.0, 1e4]),
    epsilon=st.sampled_from([0.0, 1e-4]),
    over_positives=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_never_a_true_pair(
    count: int, distinct: int, scale: float, epsilon: float, over_positives: bool, seed: int
) -> None:
    generator = seeded(seed)
    ids = torch.randint(distinct, (count,), generator=generator)
    similarities = torch.randn(2, count, count, generator=generator) * scale
    arguments: dict[str, Any] = {
        "image_ids": ids,
        "generator": generator,
        "epsilon": epsilon,
        "softmax_over_positives": over_positives,
    }
    if len(ids.unique()) == 1:
        with pytest.raises(NoNegativesError, match="all of one image"):
            hard_negatives(*similarities, **arguments)
        return
    drawn = hard_negatives(*similarities, **arguments)
    assert (ids[drawn.image_index] != ids).all()
    assert (ids[drawn.text_index] != ids).all()
    true = ids[:, None] == ids
    for weights in (drawn.weights_i2t, drawn.weights_t2i):
        assert (weights[true] == 0).all()
        assert (weights >= 0).all()


def test_weights_are_the_softmax_over_the_others() -> None:
    similarities = torch.tensor([[9.0, 1.0, 2.0], [0.0, 9.0, 0.0], [3.0, 1.0, 9.0]])
    drawn = hard_negatives(similarities, similarities.t())
    e = math.exp(1.0)
    assert torch.allclose(drawn.weights_i2t[0], torch.tensor([0.0, 1 / (1 + e), e / (1 + e)]))
    assert torch.allclose(drawn.weights_i2t[1], torch.tensor([0.5, 0.0, 0.5]))
    assert torch.allclose(drawn.weights_t2i[0], torch.tensor([0.0, 1 / (1 + e**3), e**3 / (1 + e**3)]))
    # ALBEF's form: the true pair takes part in the softmax.
    albef = hard_negatives(similarities, similarities.t(), epsilon=1e-4, softmax_over_positives=True)
    expected = (similarities.softmax(1) + 1e-4).fill_diagonal_(0)
    assert torch.allclose(albef.weights_i2t, expected)


def test_draws_follow_the_weights() -> None:
    row = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    square = torch.full((2000, 2000), -math.inf)
    square[:, :4] = row
    square[:4] = 0.0
    found = hard_negatives(square, square, generator=seeded(0))
    for index in (found.image_index, found.text_index):
        shares = torch.bincount(index[4:], minlength=4)[:4] / 1996
        assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.04)


def test_two_pairs_have_one_choice() -> None:
    drawn = hard_negatives(torch.tensor([[0.0, -1e9], [-1e9, 0.0]]), torch.zeros(2, 2))
    assert drawn.image_index.tolist() == drawn.text_index.tolist() == [1, 0]


def test_no_random_number_reaches_a_weight_of_zero() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(3, 5)
    extremes = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert _draw(weights, extremes).tolist() == [1, 3, 3]
    assert _draw(weights * 3e-39, extremes).tolist() == [1, 3, 3]


def test_the_generator_decides() -> None:
    similarities = torch.randn(2, 50, 50, generator=seeded(1))
    one, same, other = (hard_negatives(*similarities, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.image_index, same.image_index)
    assert torch.equal(one.text_index, same.text_index)
    assert not torch.equal(one.image_index, other.image_index)
    assert not torch.equal(one.image_index, one.text_index)
    torch.manual_seed(5)
    default = hard_negatives(*similarities)
    torch.manual_seed(5)
    assert torch.equal(default.image_index, hard_negatives(*similarities).image_index)


def test_no_gradient_is_taken() -> None:
    similarities = torch.randn(2, 4, 4, requires_grad=True)
    assert not hard_negatives(*similarities).weights_i2t.requires_grad


def test_given_indices_are_used_and_checked() -> None:
    similarities = torch.zeros(4, 4)
    ids = torch.tensor([0, 0, 1, 2])
    given_index = torch.tensor([2, 3, 0, 1])
    drawn = hard_negatives(similarities, similarities, image_ids=ids, image_index=given_index)
    assert torch.equal(drawn.image_index, given_index)
    assert (ids[drawn.text_index] != ids).all()
    for bad, message in (
        (torch.tensor([1, 3, 0, 1]), "text_index.*true pairs"),
        (torch.tensor([2, 3, 0, 4]), "text_index.*point into the 4 pairs"),
        (torch.tensor([2, 3, 0]), r"text_index.*\(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            hard_negatives(similarities, similarities, image_ids=ids, text_index=bad)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_batch_without_negatives_raises(count: int) -> None:
    similarities = torch.zeros(count, count)
    ids = None if count < 2 else torch.full((count,), 7)
    with pytest.raises(NoNegativesError, match="larger batches"):
        hard_negatives(similarities, similarities, image_ids=ids)


def test_a_true_pair_that_wins_by_far_changes_no_odds() -> None:
    similarities = torch.tensor([[900.0, 1.0, 2.0], [3.0, 900.0, 3.0], [5.0, 4.0, 900.0]])
    over = hard_negatives(similarities, similarities.t(), softmax_over_positives=True)
    without = hard_negatives(similarities, similarities.t())
    assert torch.equal(over.weights_i2t, without.weights_i2t)
    assert torch.equal(over.weights_t2i, without.weights_t2i)


def test_similarities_that_are_no_numbers_raise() -> None:
    similarities = torch.eye(4)
    similarities[2, 1] = torch.nan
    with pytest.raises(ValueError, match="no weight.*not finite"):
        hard_negatives(similarities, similarities, softmax_over_positives=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sim_t2i": torch.zeros(3, 4)}, "one shape"),
        ({"sim_i2t": torch.zeros(2, 4), "sim_t2i": torch.zeros(2, 4)}, "offset"),
        ({"sim_i2t": torch.zeros(2, 4), "sim_t2i": torch.zeros(2, 4), "offset": 3}, "offset"),
        ({"image_ids": torch.arange(3)}, "image_ids"),
        ({"gathered_ids": torch.arange(5)}, "gathered_ids"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hard_negatives(**{"sim_i2t": torch.zeros(4, 4), "sim_t2i": torch.zeros(4, 4), **change})


def test_matching_loss() -> None:
    # Chance of one match in three: the best constant answer costs the entropy of (1/3, 2/3).
    logits = torch.tensor([[math.log(2.0), 0.0]]).expand(9, 2)
    labels = torch.tensor([1] * 3 + [0] * 6)
    chance = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
    assert chance == pytest.approx(0.637, abs=1e-3)
    assert matching_loss(logits, labels).item() == pytest.approx(chance, abs=1e-6)
    labels[:3] = -100
    assert matching_loss(logits, labels).item() == pytest.approx(-math.log(2 / 3), abs=1e-6)
    with pytest.raises(ValueError, match="labels"):
        matching_loss(logits, labels[:4])


def similarities_and_pairs() -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(0)
    return (
        torch.randn(2, 8, 8, generator=generator) * 2,
        torch.randn(10, 2, generator=generator),
        torch.randint(2, (10,), generator=generator),
    )


def on_this_rank(sizes: list[int], pairs: list[int]) -> dict[str, Any]:
    similarities, logits, labels = similarities_and_pairs()
    rank, _ = world()
    own = slice(offset_of(sizes), offset_of(sizes) + sizes[rank])
    i2t, t2i = similarities[0][own], similarities[1].t()[own]
    plain = hard_negatives(i2t, t2i, generator=seeded(1))
    with_ids = hard_negatives(i2t, t2i, image_ids=IDS[own], generator=seeded(1))
    told = hard_negatives(i2t, t2i, offset=offset_of(sizes), image_ids=IDS[own], gathered_ids=IDS, generator=seeded(1))
    local = hard_negatives(i2t[:, own], t2i[:, own], generator=seeded(1)) if min(sizes) > 1 else None
    try:
        hard_negatives(i2t, t2i, image_ids=IDS[own] * 0)
        raised = ""
    except NoNegativesError as error:
        raised = str(error)
    own_pairs = slice(offset_of(pairs), offset_of(pairs) + pairs[rank])
    own_logits = logits[own_pairs].clone().requires_grad_()
    loss = matching_loss(own_logits, labels[own_pairs])
    loss.backward()
    return {
        "plain": tuple(plain),
        "with_ids": tuple(with_ids),
        "told": tuple(told),
        "local": None if local is None else (local.image_index, local.text_index),
        "raised": raised,
        "loss": loss.detach(),
        "grad": own_logits.grad,
    }


@pytest.mark.parametrize(("sizes", "pairs"), [([5, 3], [10, 0]), ([3, 0, 5], [2, 1, 7])])
def test_ranks_equal_one_process(sizes: list[int], pairs: list[int]) -> None:
    ranks = run_ranks(on_this_rank, len(sizes), sizes, pairs)
    single = on_this_rank([8], [10])
    for name in ("plain", "with_ids", "told"):
        joined = HardNegatives(*(torch.cat(parts) for parts in zip(*(rank[name] for rank in ranks))))
        for ours, expected in zip(joined, single[name]):
            assert torch.equal(ours, expected)
    assert all("all of one image" in rank["raised"] for rank in ranks)
    for rank, rows in zip(ranks, sizes):
        if rank["local"] is not None:
            for index in rank["local"]:
                assert (index < rows).all()
                assert (index != torch.arange(rows)).all()
    assert torch.allclose(sum(rank["loss"] for rank in ranks) / len(sizes), single["loss"])
    assert torch.allclose(torch.cat([rank["grad"] for rank in ranks]) / len(sizes), single["grad"])
    _, logits, labels = similarities_and_pairs()
    assert torch.allclose(single["loss"], F.cross_entropy(logits, labels))
