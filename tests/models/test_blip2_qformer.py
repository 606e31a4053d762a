"""The passes of the Q-Former: equal to the native forward, whatever is cached, indexed, packed or left out."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_vlp.models.blip2.qformer import (
    Pairing,
    decoding_step,
    generation_pass,
    joint_pass,
    project_images,
    query_pass,
    text_pass,
)
from hf_vlp.nn.packing import PackedTexts, place_rows, take_rows
from tests.tiny.blip2 import TEXTS, pixels, retrieval_model, text_batch

SHAPES: list[dict[str, Any]] = [
    {},
    {"num_hidden_layers": 1, "cross_attention_frequency": 1},
    {"num_hidden_layers": 5, "cross_attention_frequency": 3, "num_attention_heads": 2, "hidden_size": 24},
    {"num_hidden_layers": 4, "cross_attention_frequency": 1, "intermediate_size": 20},
]


def native_like(ours: Any) -> transformers.Blip2ForImageTextRetrieval:
    native = transformers.Blip2ForImageTextRetrieval(ours.config).eval()
    native.load_state_dict(ours.state_dict())
    return native


def close(ours: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_passes_equal_the_native_forward(changes: dict[str, Any], implementation: str) -> None:
    ours = retrieval_model(seed=3, **changes)
    native = native_like(ours)
    ours.set_attn_implementation(implementation)
    batch = text_batch()
    features = ours.image_features(pixels())
    images = project_images(ours.qformer, features)
    tokens = ours.query_tokens.expand(4, -1, -1)

    expected = native.qformer(query_embeds=tokens, encoder_hidden_states=features).last_hidden_state
    close(query_pass(ours.qformer, ours.query_tokens, images).states, expected)

    texts = ours.texts(**batch)
    expected = native.qformer(
        query_embeds=native.embeddings(batch["input_ids"]), query_length=0, attention_mask=batch["attention_mask"]
    ).last_hidden_state
    states = text_pass(ours.qformer, ours.embeddings, texts)
    close(states, expected[batch["attention_mask"].bool()])
    close(text_pass(ours.qformer, ours.embeddings, texts, first_only=True), expected[:, 0])

    index = torch.tensor([2, 2, 0, 3])
    mask = torch.cat([torch.ones(4, tokens.shape[1], dtype=torch.long), batch["attention_mask"]], dim=1)
    expected = native.qformer(
        query_embeds=native.embeddings(batch["input_ids"], query_embeds=tokens),
        query_length=tokens.shape[1],
        attention_mask=mask,
        encoder_hidden_states=features[index],
    ).last_hidden_state
    queries, text = joint_pass(
        ours.qformer, ours.embeddings, ours.query_tokens, texts, images, image_index=index, queries_only=False
    )
    close(queries, expected[:, : tokens.shape[1]])
    close(text, expected[:, tokens.shape[1] :][batch["attention_mask"].bool()])
    alone, nothing = joint_pass(
        ours.qformer, ours.embeddings, ours.query_tokens, texts, images, image_index=index, queries_only=True
    )
    close(alone, queries)
    assert nothing is None


def test_generation_pass_equals_token_by_token() -> None:
    model = retrieval_model(seed=5)
    images = project_images(model.qformer, model.image_features(pixels()))
    cache = query_pass(model.qformer, model.query_tokens, images, with_cache=True).cache
    texts = model.texts(**text_batch())
    whole = texts.pad(generation_pass(model.qformer, model.embeddings, texts, cache))
    ids = texts.pad(texts.input_ids)
    past = list(cache)
    for position in range(int(texts.lengths.min())):
        places = torch.full((4, 1), position)
        states, new = decoding_step(
            model.qformer, model.embeddings, ids[:, position : position + 1], places, past, None
        )
        close(states[:, 0], whole[:, position])
        past = [
            (torch.cat([key, k], dim=2), torch.cat([value, v], dim=2))
            for (key, value), (k, v) in zip(past, new, strict=True)
        ]


def test_queries_do_not_see_the_text_that_is_generated() -> None:
    """The cached query pass is right because a later token changes nothing before it."""
    model = retrieval_model(seed=6)
    images = project_images(model.qformer, model.image_features(pixels()))
    cache = query_pass(model.qformer, model.query_tokens, images, with_cache=True).cache
    batch = text_batch()
    first = generation_pass(model.qformer, model.embeddings, model.texts(**batch), cache)
    texts = model.texts(**batch)
    changed = PackedTexts(
        torch.where(texts.positions == 3, 7, texts.input_ids),
        texts.positions,
        texts.rows,
        texts.lengths,
        texts.longest,
    )
    second = generation_pass(model.qformer, model.embeddings, changed, cache)
    assert torch.equal(first[texts.positions < 3], second[texts.positions < 3])
    assert not torch.allclose(first[texts.positions == 3], second[texts.positions == 3])


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [3, 3, 3, 3], [0, 0, 1, 1], [2, 0, 2, 1], [1]])
def test_pairing_equals_copied_keys(index: list[int]) -> None:
    model = retrieval_model(seed=7)
    texts = model.texts(**text_batch(tuple(TEXTS[i % 4] for i in range(len(index)))))
    features = model.image_features(pixels())
    image_index = torch.tensor(index)
    shared, _ = joint_pass(
        model.qformer,
        model.embeddings,
        model.query_tokens,
        texts,
        project_images(model.qformer, features),
        image_index=image_index,
    )
    copied, _ = joint_pass(
        model.qformer,
        model.embeddings,
        model.query_tokens,
        texts,
        project_images(model.qformer, features[image_index]),
    )
    close(shared, copied)


def test_pairing_falls_back_to_copies_when_blocks_would_be_empty() -> None:
    pairing = Pairing(torch.tensor([0, 0, 0, 0, 0, 0, 1]), 7, 40)
    assert pairing.copied is not None
    model = retrieval_model(seed=8)
    features = model.image_features(pixels(12))
    texts = model.texts(**text_batch(TEXTS[:1] * 5))
    index = torch.tensor([4, 4, 4, 4, 4])
    images = project_images(model.qformer, features)
    assert Pairing(index, 5, 12).copied is not None
    queries, _ = joint_pass(model.qformer, model.embeddings, model.query_tokens, texts, images, image_index=index)
    close(queries, queries[:1].expand_as(queries))


def test_pairing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 sequences but 2 images"):
        Pairing(None, 3, 2)
    with pytest.raises(ValueError, match="image_index must have shape"):
        Pairing(torch.tensor([0, 1]), 3, 2)


def test_padding_side_and_length_change_nothing() -> None:
    model = retrieval_model(seed=9)
    batch = text_batch()
    expected = model.embed_texts(**batch)
    wide = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    close(model.embed_texts(**wide), expected)
    texts = model.texts(**batch)
    ids, mask = texts.pad_left(0)
    close(model.embed_texts(ids, mask), expected)
    images = model.embed_images(pixels())
    index = torch.arange(4)
    close(model.matching_scores(images, index, ids, mask), model.matching_scores(images, index, **batch))
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        close(model.embed_texts(**one)[0], expected[row])


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = retrieval_model(seed=10).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        images = project_images(model.qformer, model.image_features(pixels()))
        output = query_pass(model.qformer, model.query_tokens, images, with_cache=True)
        texts = model.texts(**text_batch())
        written = generation_pass(model.qformer, model.embeddings, texts, output.cache)
        joint, _ = joint_pass(model.qformer, model.embeddings, model.query_tokens, texts, images)
        (output.states.sum() + (written * written).sum() + (joint * joint).sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        close(gradients[1][name], expected, 1e-4)


def test_dropout_acts_in_training_only() -> None:
    model = retrieval_model(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    texts = model.texts(**text_batch())
    first, second = (text_pass(model.qformer, model.embeddings, texts) for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (text_pass(model.qformer, model.embeddings, texts) for _ in range(2))
    assert not torch.allclose(first, second)


def test_text_longer_than_the_position_table() -> None:
    model = retrieval_model()
    with pytest.raises(ValueError, match="41 tokens, but the Q-Former has 40 text positions"):
        model.embed_texts(torch.full((1, 41), 5), torch.ones(1, 41))


def test_packing() -> None:
    ids = torch.tensor([[3, 5, 6, 4, 0], [0, 0, 3, 7, 4], [3, 4, 0, 0, 0]])
    texts = PackedTexts.from_padded(ids, (ids != 0).long())
    assert texts.input_ids.tolist() == [3, 5, 6, 4, 3, 7, 4, 3, 4]
    assert texts.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert (texts.longest, texts.lengths.tolist(), texts.first.tolist()) == (4, [4, 3, 2], [0, 4, 7])
    assert texts.pad(texts.input_ids).tolist() == [[3, 5, 6, 4], [3, 7, 4, 0], [3, 4, 0, 0]]
    assert texts.select(torch.tensor([2, 0])).input_ids.tolist() == [3, 4, 3, 5, 6, 4]
    written = texts.with_first(9).without_last()
    assert written.input_ids.tolist() == [9, 5, 6, 9, 7, 9]
    assert texts.next_tokens().tolist() == [5, 6, 4, 7, 4, 4]
    left, mask = written.pad_left(0)
    assert left.tolist() == [[9, 5, 6], [0, 9, 7], [0, 0, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_packing_refuses_empty_texts_and_other_masks() -> None:
    ids = torch.tensor([[3, 4], [0, 0]])
    with pytest.raises(ValueError, match=r"texts \[1\] of the batch have no token"):
        PackedTexts.from_padded(ids, torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        PackedTexts.from_padded(ids, torch.ones(2, 3))


def test_place_and_take_are_differentiable_twice() -> None:
    index = torch.tensor([4, 0, 2])
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: place_rows(x, index, 6), rows)
    assert torch.autograd.gradgradcheck(lambda x: place_rows(x, index, 6) ** 2, rows)
    more = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, index), more)
    assert torch.equal(take_rows(place_rows(rows, index, 6), index), rows)
