"""Draws belong to a record: they follow nucleus sampling, and nothing beside the record changes them."""

import pytest
import torch
from transformers import LogitsProcessorList

from hf_vlp.bootstrapping import SeededNucleus, sampling_seed
from tests.tiny import blip2


def drawn(scores: torch.Tensor, seeds: list[int], **options: float) -> list[int]:
    return SeededNucleus(seeds, **options)(None, scores).argmax(dim=-1).tolist()


def test_frequencies_are_those_of_the_nucleus():
    """Probabilities .4 .3 .2 .1 with top_p .75: the first three (.4 + .3 < .75), each over their sum of .9."""
    probabilities = torch.tensor([0.2, 0.4, 0.1, 0.3])
    count = 40_000
    counts = torch.bincount(
        torch.tensor(drawn(probabilities.log().expand(count, -1), list(range(count)), top_p=0.75)), minlength=4
    )
    expected = torch.tensor([0.2, 0.4, 0.0, 0.3]) / 0.9
    # Four standard deviations of the largest share.
    assert torch.allclose(counts / count, expected, atol=4 * (0.25 / count) ** 0.5)
    assert counts[2] == 0


def test_temperature_divides_the_logits():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, -1)
    counts = torch.bincount(torch.tensor(drawn(logits, list(range(20_000)), top_p=1.0, temperature=2.0)))
    assert torch.allclose(counts / 20_000, (logits[0] / 2).softmax(-1), atol=0.015)


def test_top_k_comes_before_top_p():
    """Of .4 .3 .2 .1 the first three make 4/9 3/9 2/9; a nucleus of .7 of that is the first two (4/9 < .7 < 7/9)."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20_000, -1)
    counts = torch.bincount(torch.tensor(drawn(logits, list(range(20_000)), top_p=0.7, top_k=3)), minlength=4)
    assert torch.allclose(counts / 20_000, torch.tensor([4.0, 3.0, 0.0, 0.0]) / 7, atol=0.015)
    counts = torch.bincount(torch.tensor(drawn(logits, list(range(20_000)), top_p=1.0, top_k=3)), minlength=4)
    assert torch.allclose(counts / 20_000, torch.tensor([4.0, 3.0, 2.0, 0.0]) / 9, atol=0.015)
    assert set(drawn(logits[:50], list(range(50)), top_p=1.0, top_k=1)) == {0}
    assert drawn(logits[:50], list(range(50)), top_p=0.85, top_k=40) == drawn(logits[:50], list(range(50)), top_p=0.85)


def test_a_tiny_nucleus_is_the_most_probable_token():
    scores = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert drawn(scores, list(range(50)), top_p=1e-9) == scores.argmax(-1).tolist()


def test_tokens_that_are_ruled_out_are_never_drawn():
    scores = torch.full((200, 5), float("-inf"))
    scores[:, 3] = 0.0
    assert set(drawn(scores, list(range(200)), top_p=1.0)) == {3}


def test_a_row_draws_the_same_in_any_company_and_at_any_place():
    scores = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    seeds = [11, 12, 13, 14, 15, 16]
    together = SeededNucleus(seeds)
    alone = [SeededNucleus([seed]) for seed in seeds]
    # More steps than numbers are drawn at a time.
    for step in range(150):
        moved = scores.roll(step, dims=1)
        joint = together(None, moved).argmax(-1).tolist()
        assert joint == [one(None, moved[row : row + 1]).argmax(-1).item() for row, one in enumerate(alone)]
    reverse = SeededNucleus(seeds[::-1])
    assert reverse(None, scores.flip(0)).argmax(-1).tolist() == drawn(scores, seeds)[::-1]


def test_seeds_differ_by_record_and_sample():
    names = [("web", 0, 0, place) for place in range(50)] + [("web", 0, 1, 0), ("web", 1, 0, 0)]
    seeds = [sampling_seed(0, name, sample) for name in names for sample in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(0, names[0]) != sampling_seed(1, names[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"top_p": 0.0}, "top_p=0.0"), ({"top_p": 1.5}, "top_p"), ({"top_k": -1}, "top_k"), ({"temperature": 0}, "beam")],
)
def test_wrong_values_are_refused(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        SeededNucleus([1], **options)


def test_beams_are_refused():
    model, processor = blip2.generation_model(), blip2.generation_processor()
    inputs = processor(images=blip2.images(2), return_tensors="pt")
    nucleus = LogitsProcessorList([SeededNucleus([1, 2])])
    with pytest.raises(ValueError, match="4 rows but 2 seeds"):
        model.generate(**inputs, num_beams=2, max_new_tokens=3, logits_processor=nucleus)
