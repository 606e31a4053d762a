"""Scores are the model's own, whatever batch they come from; verdicts follow from them and the thresholds."""

import pytest
import torch
from transformers import BertTokenizer

from hf_vlp.bootstrapping import TextFilter
from hf_vlp.bootstrapping.text_filter import FilterSettings, Score
from hf_vlp.evaluation.runtime import evaluating
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval
from hf_vlp.models.albef.processing_albef import AlbefProcessor
from hf_vlp.models.blip.modeling_blip import BlipForImageTextRetrieval
from hf_vlp.models.blip2.processing_blip_2 import default_image_processor
from hf_vlp.models.clip.modeling_clip import CLIPModel
from tests.bootstrapping.blip import blip_model, blip_processor
from tests.tiny import albef, blip2, clip


def albef_filter(settings: FilterSettings) -> TextFilter:
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    for word in sorted({word for text in blip2.TEXTS for word in text.split()}):
        vocab[word] = len(vocab)
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=24)
    model = albef.spread_weights(AlbefForImageTextRetrieval(albef.albef_config()))
    return TextFilter(model, AlbefProcessor(default_image_processor(albef.IMAGE_SIZE), tokenizer), settings)


def blip_filter(settings: FilterSettings) -> TextFilter:
    return TextFilter(blip_model(BlipForImageTextRetrieval), blip_processor(), settings)


def blip2_filter(settings: FilterSettings) -> TextFilter:
    return TextFilter(blip2.retrieval_model(), blip2.retrieval_processor(), settings)


@pytest.fixture(scope="module", params=[albef_filter, blip_filter, blip2_filter])
def judge(request: pytest.FixtureRequest) -> TextFilter:
    return request.param(FilterSettings(0.5, 0.1))


def test_scores_are_the_models(judge: TextFilter):
    images, texts = blip2.images(3), list(blip2.TEXTS)
    image_of = [2, 0, 0, 1]
    with evaluating(judge.model):
        batches = [judge.embed(judge.inputs(images[:2])), judge.embed(judge.inputs(images[2:]))]
        found = judge.scores(batches, image_of, texts, batch_size=2)
        embeds = judge.embed(judge.inputs(images))
        for text, image, score in zip(texts, image_of, found, strict=True):
            encoded = judge.processor(text=[text], return_tensors="pt")
            pair = encoded["input_ids"], encoded["attention_mask"]
            itm = judge.model.matching_probabilities(embeds, torch.tensor([image]), *pair)
            itc = judge.model.similarity(embeds, judge.model.embed_texts(*pair))[image]
            assert score.itm == pytest.approx(itm.item(), abs=2e-5)
            assert score.itc == pytest.approx(itc.item(), abs=2e-5)
    assert len({score.itm for score in found}) > 1


def test_the_batch_does_not_change_scores(judge: TextFilter):
    images, texts = blip2.images(4), list(blip2.TEXTS)
    with evaluating(judge.model):
        embeds = [judge.embed(judge.inputs(images))]
        assert judge.scores(embeds, range(4), texts, 1) == judge.scores(embeds, range(4), texts, 4)
        assert judge.scores(embeds, [], [], 4) == []


def test_verdicts():
    judge = blip2_filter(FilterSettings(0.5, 0.1))
    assert judge.verdict(Score(0.5, 0.1)) == ""
    assert judge.verdict(Score(0.49999, 0.9)) == "itm"
    assert judge.verdict(Score(0.9, 0.09)) == "itc"
    assert judge.verdict(Score(float("nan"), 0.9)) == "itm"
    assert judge.verdict(Score(0.9, float("nan"))) == "itc"


def test_only_what_is_asked_is_computed():
    judge = blip2_filter(FilterSettings(None, 0.0))
    with evaluating(judge.model):
        (score,) = judge.scores([judge.embed(judge.inputs(blip2.images(1)))], [0], [blip2.TEXTS[0]], 8)
    assert score.itm is None
    assert -1 <= score.itc <= 1


def test_a_model_without_matching_head_needs_a_cosine():
    model = CLIPModel(clip.clip_config())
    with pytest.raises(ValueError, match=r"no matching head.*itc_threshold"):
        TextFilter(model, blip2.retrieval_processor())
    assert TextFilter(model, blip2.retrieval_processor(), FilterSettings(None, 0.2)).settings.itm_threshold is None


@pytest.mark.parametrize(
    ("thresholds", "words"), [((None, None), "no threshold"), ((1.5, None), "1.5"), ((None, -2.0), "cosine")]
)
def test_wrong_thresholds_are_refused(thresholds: tuple, words: str):
    with pytest.raises(ValueError, match=words):
        FilterSettings(*thresholds)
