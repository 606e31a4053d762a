"""The pipelines with models that encode a question and decode an answer, and with ALBEF's and BLIP's retrieval."""

from pathlib import Path

import pytest
import torch
from transformers import Pipeline, pipeline

import hf_vlp  # noqa: F401
from hf_vlp.hub.saving import complete_folder
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval
from hf_vlp.models.albef.modeling_albef_tasks import AlbefForQuestionAnswering
from hf_vlp.models.albef.processing_albef import AlbefProcessor
from hf_vlp.pipelines.zero_shot_image_classification import ProtocolZeroShotPipeline
from tests.hub import tiny
from tests.tiny import albef

PICTURES = [tiny.image("red"), tiny.image("blue", (40, 18)), tiny.image("green")]
QUESTIONS = ["what colour is it ?", "what is left of the big circle ?", "red"]
ANSWERS = ["red", "big blue circle", "left of it", "green square"]


def processor() -> AlbefProcessor:
    return AlbefProcessor.for_image_size(tiny.tokenizer("bert"), albef.IMAGE_SIZE)


def answering_model() -> AlbefForQuestionAnswering:
    torch.manual_seed(0)
    model = albef.spread_weights(AlbefForQuestionAnswering(albef.albef_config()))
    tokenizer = tiny.tokenizer("bert")
    decoder = model.config.decoder_config
    decoder.bos_token_id, decoder.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    decoder.pad_token_id = tokenizer.pad_token_id
    return model.eval()


@pytest.fixture(scope="module")
def answerer() -> Pipeline:
    return pipeline("image-question-answering", model=answering_model(), processor=processor())


def test_generated_answers_are_the_models(answerer: Pipeline) -> None:
    alone = [answerer(picture, question=text) for picture, text in zip(PICTURES, QUESTIONS, strict=True)]
    # Questions of different lengths share a batch, because padding changes nothing.
    assert answerer(PICTURES, question=QUESTIONS, batch_size=3) == alone
    inputs = processor()(images=PICTURES[:1], text=QUESTIONS[:1], return_tensors="pt")
    ids = answerer.model.generate(**inputs, num_beams=3, max_new_tokens=10)
    expected = processor().tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert alone[0] == [{"answer": expected}]


def test_an_answer_that_repeats_the_question_stays_whole(answerer: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = processor()(text=["red"], return_tensors="pt")["input_ids"]
    monkeypatch.setattr(type(answerer.model), "generate", lambda self, **inputs: ids)
    assert answerer(PICTURES[0], question="red") == [{"answer": "red"}]


def test_answers_from_a_list(answerer: Pipeline) -> None:
    best = answerer(PICTURES, question=QUESTIONS, answer_list=ANSWERS, batch_size=2)
    every = answerer(PICTURES, question=QUESTIONS, answer_list=ANSWERS, num_answers=4)
    inputs = processor()(images=PICTURES, text=QUESTIONS, padding=True, return_tensors="pt")
    encoded = processor().encode_answers(ANSWERS)
    ranked = answerer.model.rank_answers(
        **inputs,
        candidate_ids=encoded["labels"],
        candidate_attention_mask=encoded["labels_attention_mask"],
        top_k=4,
    )
    for row, (one, all_of_them) in enumerate(zip(best, every, strict=True)):
        order = [ANSWERS[index] for index in ranked.answer_index[row].tolist()]
        assert [entry["answer"] for entry in all_of_them] == order and one[0]["answer"] == order[0]
        assert [entry["score"] for entry in all_of_them] == pytest.approx(ranked.probabilities[row].tolist(), abs=1e-5)
        assert sum(entry["score"] for entry in all_of_them) == pytest.approx(1)


def test_lists_that_no_answer_can_be_chosen_from(answerer: Pipeline) -> None:
    with pytest.raises(ValueError, match="different answers"):
        answerer(PICTURES[0], question="red", answer_list=["a", "a"])
    with pytest.raises(ValueError, match="num_answers=3, but answer_list has 2"):
        answerer(PICTURES[0], question="red", answer_list=["a", "b"], num_answers=3)
    with pytest.raises(ValueError, match="pass both"):
        answerer(PICTURES[0], question="red", num_answers=3)
    blip2, own = tiny.blip2("opt")
    with pytest.raises(ValueError, match="Blip2ForConditionalGeneration cannot choose from answer_list"):
        pipeline("vqa", model=blip2, processor=own)(PICTURES[0], question="red", answer_list=["a"])


@pytest.fixture(scope="module")
def retrieval() -> Path:
    torch.manual_seed(0)
    return albef.spread_weights(AlbefForImageTextRetrieval(albef.albef_config())).eval()


def test_classes_are_read_as_the_processor_writes_them(retrieval: AlbefForImageTextRetrieval) -> None:
    classify = pipeline("zero-shot-image-classification", model=retrieval, processor=processor())
    assert type(classify) is ProtocolZeroShotPipeline
    labels = ["Red-Circle!", "green square"]
    results = classify(PICTURES, candidate_labels=labels, hypothesis_template="a {}.", batch_size=1)
    inputs = processor()(images=PICTURES, text=["a red circle", "a green square"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = retrieval(**inputs).logits_per_image.softmax(dim=-1)
    for row, result in enumerate(results):
        scores = {entry["label"]: entry["score"] for entry in result}
        assert [scores[label] for label in labels] == pytest.approx(expected[row].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="needs candidate_labels"):
        classify(PICTURES[0], candidate_labels=[])


def test_pairs_are_scored_by_the_matching_head(retrieval: AlbefForImageTextRetrieval) -> None:
    match = pipeline("image-text-matching", model=retrieval, processor=processor())
    texts = ["a red circle", "blue"]
    results = match(PICTURES[0], text=texts)
    inputs = processor()(images=[PICTURES[0]] * 2, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = retrieval(**inputs, matching=True)
    expected = output.itm_logits.softmax(dim=-1)[:, 1].tolist()
    assert [result["score"] for result in results] == pytest.approx(expected, abs=1e-5)
    similar = (output.image_embeds * output.text_embeds).sum(dim=-1).tolist()
    assert [result["similarity"] for result in results] == pytest.approx(similar, abs=1e-5)


def test_a_model_that_writes_nothing_captions_nothing(retrieval: AlbefForImageTextRetrieval) -> None:
    with pytest.raises(ValueError, match="needs a model with `generate`; AlbefForImageTextRetrieval has none"):
        pipeline("image-to-text", model=retrieval, processor=processor())


def test_clip_is_used_as_before() -> None:
    model, own = tiny.clip()
    ours = pipeline("zero-shot-image-classification", model=model, processor=own)
    labels = ["red", "blue circle"]
    inputs = own(images=PICTURES[0], text=[f"a {label}" for label in labels], padding=True, return_tensors="pt")
    expected = model(**inputs).logits_per_image.softmax(dim=-1)[0].tolist()
    scores = {entry["label"]: entry["score"] for entry in ours(PICTURES[0], candidate_labels=labels,
                                                               hypothesis_template="a {}")}  # fmt: skip
    assert [scores[label] for label in labels] == pytest.approx(expected, abs=1e-5)


def test_saved_folders_open_by_name(retrieval: AlbefForImageTextRetrieval, tmp_path: Path) -> None:
    for name, model in (("vqa", answering_model()), ("retrieval", retrieval)):
        model.save_pretrained(tmp_path / name)
        processor().save_pretrained(tmp_path / name)
        complete_folder(tmp_path / name)
    answer = pipeline("vqa", model=str(tmp_path / "vqa"))
    assert type(answer.model) is AlbefForQuestionAnswering
    assert answer(PICTURES[0], question="red", answer_list=ANSWERS)[0]["answer"] in ANSWERS
    assert (tmp_path / "vqa" / "image_question_answering.py").is_file()
    assert "custom_pipelines" in (tmp_path / "vqa" / "config.json").read_text()
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "retrieval"))
    assert type(classify.model) is AlbefForImageTextRetrieval
