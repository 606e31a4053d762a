"""The pipelines with BLIP's own classes, opened from folders in the native format."""

from pathlib import Path

import pytest
import torch
from transformers import BlipConfig, pipeline

import hf_vlp  # noqa: F401
from hf_vlp.data import load_task
from hf_vlp.evaluation import evaluate_dialog
from hf_vlp.models.blip.backbone_blip import use_tokenizer
from hf_vlp.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)
from hf_vlp.models.blip.processing_blip import BlipProcessor
from hf_vlp.models.blip.tasks_blip import BlipForVisualDialog
from tests.hub import tiny
from tests.tiny import albef

PICTURES = [tiny.image("red"), tiny.image("blue", (40, 18))]
ANSWERS = ["red", "big blue circle", "green square"]


def processor() -> BlipProcessor:
    return BlipProcessor.for_image_size(tiny.tokenizer("bert"), tiny.IMAGE_SIZE)


def config() -> BlipConfig:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **small,
        "vocab_size": len(processor().tokenizer),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 64,
    }
    vision = {**small, "image_size": tiny.IMAGE_SIZE, "patch_size": 8}
    made = BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=24)
    use_tokenizer(made, processor().tokenizer)
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blip")
    for kind in (BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering):
        torch.manual_seed(0)
        model = albef.spread_weights(kind(config()))
        model.tie_weights()
        model.save_pretrained(root / kind.__name__)
        processor().save_pretrained(root / kind.__name__)
    return root


def test_answers_come_from_the_question_encoder(root: Path) -> None:
    answer = pipeline("image-question-answering", model=str(root / "BlipForQuestionAnswering"))
    assert type(answer.model) is BlipForQuestionAnswering
    questions = ["what colour is it ?", "what is left of it ?"]
    alone = [answer(picture, question=text) for picture, text in zip(PICTURES, questions, strict=True)]
    assert answer(PICTURES, question=questions, batch_size=2) == alone
    ranked = answer(PICTURES, question=questions, answer_list=ANSWERS, num_answers=3)
    encoded = processor().encode_answers(ANSWERS)
    inputs = processor()(images=PICTURES, text=questions, padding=True, return_tensors="pt")
    expected = answer.model.rank_answers(
        **inputs,
        candidate_ids=encoded["labels"],
        candidate_attention_mask=encoded["labels_attention_mask"],
        top_k=3,
    )
    for row, entries in enumerate(ranked):
        assert [entry["answer"] for entry in entries] == [ANSWERS[i] for i in expected.answer_index[row].tolist()]


def test_retrieval_folders_classify_and_match(root: Path) -> None:
    folder = str(root / "BlipForImageTextRetrieval")
    classify = pipeline("zero-shot-image-classification", model=folder)
    assert type(classify.model) is BlipForImageTextRetrieval and type(classify.processor) is BlipProcessor
    labels = ["red circle", "blue"]
    result = {entry["label"]: entry["score"] for entry in classify(PICTURES[0], candidate_labels=labels)}
    texts = [f"This is a photo of {label}." for label in labels]
    inputs = processor()(images=PICTURES[:1], text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        cosines = classify.model(**inputs, use_itm_head=False).itm_score[0]
    assert [result[label] for label in labels] == pytest.approx((cosines / 0.07).softmax(0).tolist(), abs=1e-3)
    match = pipeline("image-text-matching", model=folder)
    assert type(match.model) is BlipForImageTextRetrieval
    scores = match(PICTURES[0], text=labels)
    own = processor()(images=PICTURES[:1], text=labels, padding=True, return_tensors="pt")
    with torch.no_grad():
        images = match.model.embed_images(own["pixel_values"])
        index = torch.zeros(2, dtype=torch.long)
        expected = match.model.matching_probabilities(images, index, own["input_ids"], own["attention_mask"])
    assert [entry["score"] for entry in scores] == pytest.approx(expected.tolist(), abs=1e-5)


def test_captions(root: Path) -> None:
    write = pipeline("image-to-text", model=str(root / "BlipForConditionalGeneration"))
    alone = [write(picture, max_new_tokens=5) for picture in PICTURES]
    assert write(PICTURES, max_new_tokens=5, batch_size=2) == alone
    assert all(isinstance(entry[0]["generated_text"], str) for entry in alone)


def test_dialogs_are_evaluated(root: Path) -> None:
    model = BlipForVisualDialog.from_pretrained(root / "BlipForImageTextRetrieval")
    rows = load_task("dialog", "shapes", "test", size=4, turns=2, candidates=4)
    results = [
        evaluate_dialog(model, processor(), rows, batch_size=size, show_progress=False)["metrics"] for size in (1, 8)
    ]
    assert results[0] == pytest.approx(results[1])
    assert set(results[0]) == {"recall_at_1", "recall_at_5", "recall_at_10", "mrr", "mean_rank", "ndcg"}
