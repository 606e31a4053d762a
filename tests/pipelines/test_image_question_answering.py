"""`pipeline("image-question-answering")`, under its own name and the two that transformers 5 removed."""

import pytest
from transformers import Pipeline, pipeline

import hf_vlp  # noqa: F401
from hf_vlp.pipelines import ImageQuestionAnsweringPipeline
from tests.hub import tiny
from tests.pipelines.architectures import OTHERS

PICTURES = [tiny.image("red"), tiny.image("blue"), tiny.image("green")]
QUESTIONS = ["what colour is it ?", "what is left of the circle ?", "is it a square ?"]


@pytest.fixture(scope="module")
def answerer() -> Pipeline:
    model, processor = tiny.blip2("opt")
    return pipeline("image-question-answering", model=model, processor=processor)


@pytest.mark.parametrize("name", ["visual-question-answering", "vqa"])
def test_removed_names_are_back(name: str) -> None:
    model, processor = tiny.blip2("opt")
    assert type(pipeline(name, model=model, processor=processor)) is ImageQuestionAnsweringPipeline


def test_the_question_stands_in_the_prompt_of_the_paper(answerer: Pipeline) -> None:
    model, processor = tiny.blip2("opt")
    captioner = pipeline("image-to-text", model=model, processor=processor)
    prompt = "Question: what colour is it ? Answer:"
    expected = captioner(PICTURES[0], text=prompt, num_beams=5, length_penalty=-1.0)[0]["generated_text"]
    assert answerer(PICTURES[0], question=QUESTIONS[0]) == [{"answer": expected}]
    other = answerer(PICTURES[0], question="what colour is it ?", prompt_template="Question: {question} Answer:")
    assert other == [{"answer": expected}]


def test_forms_of_input(answerer: Pipeline) -> None:
    alone = [answerer(picture, question=text) for picture, text in zip(PICTURES, QUESTIONS, strict=True)]
    assert answerer(PICTURES, question=QUESTIONS, batch_size=3) == alone
    rows = [{"image": picture, "question": text} for picture, text in zip(PICTURES, QUESTIONS, strict=True)]
    assert answerer(rows, batch_size=2) == alone
    assert answerer(rows[0]) == alone[0]
    one = answerer(PICTURES, question=QUESTIONS[0])
    assert one[0] == alone[0]
    assert [len(result) for result in one] == [1, 1, 1]


def test_chat_models_take_the_bare_question() -> None:
    parts = OTHERS["llava"]()
    answers = pipeline("image-question-answering", **parts, num_beams=1)(PICTURES[0], question=QUESTIONS[0])
    captions = pipeline("image-to-text", **parts, max_new_tokens=10)(PICTURES[0], text=QUESTIONS[0])
    assert answers[0]["answer"] == captions[0]["generated_text"]


def test_failures(answerer: Pipeline) -> None:
    with pytest.raises(ValueError, match="needs a question"):
        answerer(PICTURES[0])
    with pytest.raises(ValueError, match="needs a question"):
        answerer([{"image": PICTURES[0], "question": " "}])
    with pytest.raises(ValueError, match="must hold '{question}'"):
        answerer(PICTURES[0], question="what ?", prompt_template="Q:")
    with pytest.raises(ValueError, match="3 image.* but 2 prompt"):
        answerer(PICTURES, question=QUESTIONS[:2])
