"""The order and the choice of conversations: like lengths together, mixtures of data sets, drawn wordings."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vlp.data.conversations import (
    FAMILIES,
    BalancedMixture,
    ConversationCollator,
    ConversationDataset,
    InstructionDataset,
    instruction_messages,
    length_grouped_order,
)
from hf_vlp.training.batching import GlobalBatchSampler, part_of

from .conversations import TinyProcessor, picture, record


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=80),
    per_rank=st.integers(1, 4),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_an_order_is_a_permutation_whose_batches_do_not_depend_on_the_ranks(lengths, per_rank, world_size, epoch):
    batch_size = per_rank * world_size
    order = length_grouped_order(lengths, batch_size, epoch=epoch, world_size=world_size)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    alone = length_grouped_order(lengths, batch_size, epoch=epoch)
    for start in range(0, len(lengths), batch_size):
        assert sorted(order[start : start + batch_size]) == sorted(alone[start : start + batch_size])


def test_batches_hold_like_lengths_and_one_group():
    draws = np.random.default_rng(0)
    lengths, groups = draws.integers(1, 500, 2_000).tolist(), draws.integers(0, 2, 2_000).tolist()
    order = length_grouped_order(lengths, 16, groups=groups)

    def padding(numbers):
        batches = [[lengths[number] for number in numbers[start : start + 16]] for start in range(0, 2_000, 16)]
        return 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)

    assert padding(order) < 0.05 < 0.4 < padding(draws.permutation(2_000))
    mixed = sum(len({groups[number] for number in order[start : start + 16]}) > 1 for start in range(0, 2_000, 16))
    assert mixed <= 2
    assert not np.array_equal(order, length_grouped_order(lengths, 16, groups=groups, epoch=1))
    assert np.array_equal(order, length_grouped_order(lengths, 16, groups=groups))
    with pytest.raises(ValueError, match="3 groups for 2 lengths"):
        length_grouped_order([1, 2], 1, groups=[0, 0, 0])


def test_processes_get_like_loads():
    lengths = np.random.default_rng(1).integers(1, 1_000, 640).tolist()
    order = length_grouped_order(lengths, 32, world_size=4, window=1)
    for start in range(0, 640, 32):
        batch = order[start : start + 32]
        loads = [sum(lengths[number] for number in batch[part_of(32, rank, 4)]) for rank in range(4)]
        assert max(loads) / min(loads) < 1.15


def test_the_sampler_asks_the_dataset_for_its_order():
    rows = [record("Q", "word " * (1 + number % 7), images=(), key=str(number)) for number in range(40)]
    dataset = ConversationDataset(rows, group_by_length=True, seed=5)
    whole = GlobalBatchSampler(40, 8, dataset=dataset)
    parts = [GlobalBatchSampler(40, 4, rank=rank, world_size=2, dataset=dataset) for rank in range(2)]
    for epoch in range(2):
        for sampler in (whole, *parts):
            sampler.set_epoch(epoch)
        for batch, first, second in zip(whole, *parts, strict=True):
            assert sorted(batch) == sorted(first + second)
            assert len({number % 7 for number in batch}) <= 3
    assert ConversationDataset(rows).epoch_order(0, 8, 1) is None


ROWS = {
    "captioning": {"text": ["a dog", "a brown dog"]},
    "scene_text_captioning": {"text": "a sign that says stop"},
    "question_answering": {"question": "what is it?", "answers": ["dog", "cat"], "weights": [1.0, 0.0]},
    "knowledge_question_answering": {"question": "who made it?", "answers": ["nobody"]},
    "scene_text_question_answering": {"question": "what does it say?", "answers": "stop"},
    "question_generation": {"question": "what is it?", "answers": ["dog"]},
    "conversational_question_answering": {"history": "is it big? no.", "question": "is it old?", "answers": ["yes"]},
    "visual_reasoning": {"question": "is the dog left of the cat?", "answers": ["yes"]},
    "classification": {"label": "beagle"},
    "video_question_answering": {"question": "what is done?", "answers": ["running"]},
    "instructions": {"question": "tell me about it.", "answers": ["it is a dog"]},
}


def test_eleven_families_with_ten_wordings():
    assert set(ROWS) == set(FAMILIES) and len(FAMILIES) == 11
    for name, family in FAMILIES.items():
        assert len(set(family.wordings)) == len(family.wordings)
        assert len(family.wordings) >= 10 or name == "instructions"


@pytest.mark.parametrize("name", sorted(ROWS))
def test_each_wording_is_drawn_and_filled_in(name):
    family, said = FAMILIES[name], Counter()
    for index in range(400):
        messages = instruction_messages(name, ROWS[name], seed=0, epoch=0, index=index)
        assert messages == instruction_messages(name, ROWS[name], seed=0, epoch=0, index=index)
        words = messages[0]["content"][1]["text"]
        assert "{" not in words
        said[words] += 1
        for field in family.fields:
            value = ROWS[name].get(field, "dog")
            assert (value if isinstance(value, str) else value[0]) in words
    assert len(said) == len(family.wordings)
    assert max(said.values()) < 3 * 400 / len(family.wordings) or len(said) == 1


def test_what_an_instruction_lacks_is_named():
    with pytest.raises(ValueError, match="no family 'vqa'"):
        instruction_messages("vqa", {}, seed=0, epoch=0, index=0)
    with pytest.raises(ValueError, match="needs 'question'"):
        InstructionDataset([{"image": None, "answers": ["a"]}], "question_answering")
    made = instruction_messages("question_answering", {"question": "{x}?", "answers": ["a"]}, seed=0, epoch=0, index=0)
    assert "{x}?" in made[0]["content"][1]["text"]


def test_weights_of_answers_are_probabilities():
    row = {"question": "?", "answers": ["often", "rarely", "never"], "weights": [0.75, 0.25, 0.0]}
    drawn = Counter(
        instruction_messages("question_answering", row, seed=1, epoch=0, index=index)[1]["content"][0]["text"]
        for index in range(2_000)
    )
    assert drawn["never"] == 0 and 0.7 < drawn["often"] / 2_000 < 0.8


def _sets():
    sizes = {"captioning": 400, "question_answering": 100, "classification": 4}
    return [
        InstructionDataset(
            [{"image": picture(2), **ROWS[name], "key": f"{name} {number}"} for number in range(size)], name
        )
        for name, size in sizes.items()
    ]


def test_shares_are_those_of_the_square_roots():
    mixture = BalancedMixture(_sets(), size=3_200)
    assert mixture.shares == pytest.approx([20 / 32, 10 / 32, 2 / 32])
    drawn = Counter(mixture[index]["kind"] for index in range(0, 3_200))
    for name, share in zip(("captioning", "question_answering", "classification"), mixture.shares, strict=True):
        assert abs(drawn[name] / 3_200 - share) < 4 * (share * (1 - share) / 3_200) ** 0.5
    assert BalancedMixture(_sets(), power=1).shares == pytest.approx([400 / 504, 100 / 504, 4 / 504])
    assert BalancedMixture(_sets(), power=0, weights=[1, 0, 1]).shares == pytest.approx([0.5, 0, 0.5])
    assert len(BalancedMixture(_sets())) == 504


def test_a_data_set_is_read_through_before_it_is_read_again():
    mixture = BalancedMixture(_sets(), size=150, seed=3)
    read = Counter()
    for epoch in range(4):
        mixture.set_epoch(epoch)
        records = [mixture[index] for index in range(150)]
        assert [one["key"] for one in records] == [mixture[index]["key"] for index in range(150)]
        read.update(one["key"] for one in records)
    for name in ("captioning", "question_answering", "classification"):
        counts = [count for key, count in read.items() if key.startswith(name)]
        whole = {"captioning": 400, "question_answering": 100, "classification": 4}[name]
        # Every record as often as any other, up to one reading that is under way.
        assert max(counts) - (min(counts) if len(counts) == whole else 0) <= 1
    fresh = BalancedMixture(_sets(), size=150, seed=3)
    fresh.set_epoch(3)
    assert fresh[7]["key"] == mixture[7]["key"] and fresh[7]["messages"] == mixture[7]["messages"]
    with pytest.raises(ValueError, match="a record in each"):
        BalancedMixture([[]])
    with pytest.raises(ValueError, match="one for each"):
        BalancedMixture(_sets(), weights=[1.0])


def test_a_mixture_makes_batches():
    batch = ConversationCollator(TinyProcessor(), pack_to=512)(
        [BalancedMixture(_sets())[index] for index in range(12)]
    )
    assert batch["record_report"].bad_total == 0 and batch["pixel_values"].shape[0] == 12
