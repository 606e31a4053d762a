"""Captions of real (tiny) models: independent of the batch, by beam as the evaluation makes them."""

import pytest
import torch

from hf_vlp.bootstrapping import Captioner, sampling_seed
from hf_vlp.bootstrapping.captioner import CaptionSettings
from hf_vlp.evaluation.generation import generate_texts, prompts_end_together
from hf_vlp.evaluation.runtime import evaluating
from tests.bootstrapping.blip import blip_model, blip_processor
from tests.tiny import blip2

COUNT = 5
KINDS = ("opt", "llama", "t5", "blip")


def captions(captioner: Captioner, batch_size: int, samples: int = 1) -> list[list[str]]:
    images = blip2.images(COUNT)
    seeds = [[sampling_seed(3, ("web", 0, 0, place), sample) for sample in range(samples)] for place in range(COUNT)]
    found = []
    with evaluating(captioner.model), prompts_end_together(captioner.model, captioner.processor):
        for start in range(0, COUNT, batch_size):
            part = slice(start, start + batch_size)
            found += captioner(captioner.inputs(images[part]), seeds[part])
    return found


@pytest.fixture(scope="module", params=KINDS)
def captioner(request: pytest.FixtureRequest) -> Captioner:
    settings = CaptionSettings(max_new_tokens=9)
    if request.param == "blip":
        return Captioner(blip_model(), blip_processor(), settings)
    return Captioner(blip2.generation_model(request.param), blip2.generation_processor(request.param), settings)


def test_the_batch_does_not_change_sampled_texts(captioner: Captioner):
    together = captions(captioner, COUNT)
    assert len({texts[0] for texts in together}) > 1
    assert captions(captioner, 1) == together
    assert captions(captioner, 2) == together


def test_several_samples_begin_with_the_one(captioner: Captioner):
    several = captions(captioner.with_settings(samples=3), 2, samples=3)
    assert [texts[:1] for texts in several] == captions(captioner, COUNT)
    assert any(len(set(texts)) > 1 for texts in several)


def test_the_prompt_is_not_part_of_the_caption(captioner: Captioner):
    prompted = captioner.with_settings(prompt="a photo of")
    texts = captions(prompted, COUNT)
    assert captions(prompted, 2) == texts
    assert texts != captions(captioner, COUNT)
    assert not any(text.startswith("a photo of") for own in texts for text in own)


def test_a_prompt_is_recognised_as_the_processor_reads_it():
    spelled, plain = (
        Captioner(blip_model(), blip_processor(), CaptionSettings(max_new_tokens=9, prompt=prompt))
        for prompt in ("A Photo of:", "a photo of")
    )
    texts = captions(spelled, COUNT)
    assert texts == captions(plain, COUNT)
    assert not any("a photo of" in text for own in texts for text in own)


def test_beams_are_those_of_the_evaluation(captioner: Captioner):
    rows = [{"image": image} for image in blip2.images(COUNT)]
    expected, _ = generate_texts(
        captioner.model, captioner.processor, rows, range(COUNT), num_beams=3, max_new_tokens=9, show_progress=False
    )
    beam = captioner.with_settings(method="beam", num_beams=3)
    assert [own[0] for own in captions(beam, COUNT)] == [text for _, text in expected]


def test_the_random_state_of_the_program_stays(captioner: Captioner):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    captions(captioner, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprints_name_what_is_computed():
    processor = blip2.generation_processor()
    first = Captioner(blip2.generation_model(), processor)
    assert Captioner(blip2.generation_model(), blip2.generation_processor()).fingerprint == first.fingerprint
    changed = blip2.generation_model()
    with torch.no_grad():
        changed.language_projection.bias[0] += 1e-6
    assert Captioner(changed, processor).fingerprint != first.fingerprint
    assert Captioner(blip2.generation_model().bfloat16(), processor).fingerprint != first.fingerprint
    other = blip2.generation_processor()
    other.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert Captioner(blip2.generation_model(), other).fingerprint != first.fingerprint
    processor(images=blip2.images(2), text=["a", "a red circle"], return_tensors="pt", padding=True)
    assert Captioner(blip2.generation_model(), processor).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "greedy"}, "one of"),
        ({"method": "beam", "samples": 2}, "samples=2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_new_tokens": 40}, "min_new_tokens=40"),
        ({"top_p": 2.0}, "top_p=2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, words: str):
    with pytest.raises(ValueError, match=words):
        CaptionSettings(**settings)


def test_recorded_settings_leave_out_what_is_not_used(captioner: Captioner):
    assert "num_beams" not in captioner.recorded()
    assert captioner.recorded() == captioner.with_settings(num_beams=7).recorded()
    beam = captioner.with_settings(method="beam")
    assert beam.recorded() == beam.with_settings(top_p=0.5).recorded()
    assert beam.recorded() != captioner.recorded()
