import json

import pytest

from hf_vlp.evaluation import evaluate_vqa, vqa_accuracy
from tests.evaluation.fakes import FakeWriter, FakeWriterProcessor, numbered_image
from tests.evaluation.task_fakes import Ranker, TaskProcessor
from tests.tiny import blip2

WRITTEN = ["Red.", "two", "yes"]
ANSWERS = [["red"] * 9 + ["dark red"], ["2"] * 2 + ["two", "3"] * 4, ["no"] * 10]


def rows() -> list[dict]:
    return [
        {
            "image": numbered_image(i),
            "question": f"what is in picture {i}?",
            "answers": answers,
            "question_id": 7000 + i,
            "question_type": ["what", "how many", "what"][i],
            "answer_type": ["other", "number", None][i],
        }
        for i, answers in enumerate(ANSWERS)
    ]


def evaluate(data: list[dict], **options) -> dict:
    return evaluate_vqa(FakeWriter(WRITTEN), FakeWriterProcessor(), data, show_progress=False, **options)


def test_answers_are_scored_by_type_and_written_for_submission(tmp_path):
    file = tmp_path / "answers.json"
    result = evaluate(rows(), answers_file=file, details=True)
    expected = vqa_accuracy(WRITTEN, ANSWERS)
    assert result["metrics"] == {"exact_match": 2 / 3, "vqa_accuracy": expected["accuracy"]}
    first, second, third = expected["per_question"]
    assert result["per_question_type"] == pytest.approx({"what": (first + third) / 2, "how many": second})
    assert result["per_answer_type"] == pytest.approx({"other": first, "number": second})
    assert json.loads(file.read_text()) == [
        {"question_id": 7000 + i, "answer": answer} for i, answer in enumerate(WRITTEN)
    ]
    assert result["details"][1]["answer"] == "two"
    assert result["details"][1]["vqa_accuracy"] == second


def test_the_questions_are_put_into_the_prompt():
    model, processor = FakeWriter(WRITTEN), FakeWriterProcessor()
    evaluate_vqa(model, processor, rows(), prompt="Q: {} A:", batch_size=2, show_progress=False)
    assert processor.prompts == [f"Q: what is in picture {i}? A:" for i in range(3)]
    assert model.calls[0]["length_penalty"] == -1.0
    assert [call["images"] for call in model.calls] == [2, 1]
    with pytest.raises(ValueError, match="has no '{}'"):
        evaluate(rows(), prompt="Question:")


def test_single_answers_are_matched_exactly():
    data = [row | {"answers": answer} for row, answer in zip(rows(), ["red", "3", "no"])]
    assert evaluate(data)["metrics"] == {"exact_match": 1 / 3}


def test_an_answer_that_is_missing_is_not_the_word_none():
    data = rows()
    data[0]["answers"] = [*ANSWERS[0], None]
    data[1]["answers"] = [{"answer": answer} for answer in (*ANSWERS[1], None)]
    assert evaluate(data)["metrics"] == evaluate(rows())["metrics"]
    nothing = evaluate_vqa(FakeWriter(["none"] * 3), FakeWriterProcessor(), data, show_progress=False)
    assert nothing["metrics"]["exact_match"] == 0
    data[2]["answers"] = [None] * 10
    with pytest.raises(ValueError, match="1 questions have no answers .row 2"):
        evaluate(data)


def test_the_answers_of_the_official_file():
    data = [
        row | {"answers": [{"answer": a, "answer_id": k, "answer_confidence": "yes"} for k, a in enumerate(given)]}
        for row, given in zip(rows(), ANSWERS)
    ]
    assert evaluate(data) == evaluate(rows())


def test_a_test_split_without_answers_only_writes(tmp_path):
    data = [{name: value for name, value in row.items() if name != "answers"} for row in rows()]
    with pytest.raises(ValueError, match="no 'answers' to score with"):
        evaluate(data)
    result = evaluate(data, answers_file=tmp_path / "answers.json")
    assert result["metrics"] == {}
    assert "per_answer_type" not in result
    assert len(json.loads((tmp_path / "answers.json").read_text())) == 3


def test_bad_data_is_named():
    data = rows()
    data[1]["answers"] = []
    with pytest.raises(ValueError, match=r"1 questions have no answers \(row 1"):
        evaluate(data)
    with pytest.raises(ValueError, match="no column 'query'.*'question'"):
        evaluate(rows(), question_column="query")
    data = rows()
    data[1]["question"] = None
    with pytest.raises(ValueError, match="row 1: the question is None, not a text"):
        evaluate(data)


@pytest.mark.parametrize("kind", sorted(blip2.LANGUAGE_MODELS))
def test_batches_do_not_change_the_answers_of_blip2(kind: str):
    model, processor = blip2.generation_model(kind), blip2.generation_processor(kind)
    questions = ["what color is the dot?", "a red circle?", "is the star yellow or small?", "two?"]
    data = [
        {"image": image, "question": question, "answers": ["dot"]}
        for image, question in zip(blip2.images(4), questions)
    ]
    batched, single = (
        evaluate_vqa(
            model, processor, data, batch_size=size, num_beams=2, max_new_tokens=5, details=True, show_progress=False
        )
        for size in (4, 1)
    )
    assert batched["details"] == single["details"]


def test_answers_are_chosen_from_a_list(tmp_path):
    answers = ["no", "red", "3"]
    model, processor = Ranker([1, 2, 0]), TaskProcessor()
    file = tmp_path / "submission.json"
    data = [row | {"question_id": str(row["question_id"])} for row in rows()]
    options = {"batch_size": 2, "show_progress": False, "answers_file": file}
    result = evaluate_vqa(model, processor, data, answer_list=answers, **options)
    assert result["metrics"] == {"exact_match": 2 / 3, "vqa_accuracy": 1.0}
    # The question alone is read, and numbers of questions are numbers.
    assert processor.texts[-1] == "what is in picture 2?" and model.top_k == [3, 3]
    assert json.loads(file.read_text())[2] == {"question_id": 7002, "answer": "no"}
    listed = tmp_path / "answers.json"
    listed.write_text(json.dumps(answers))
    assert evaluate_vqa(model, processor, data, answer_list=listed, top_k=2, **options)["metrics"] == result["metrics"]
    assert model.top_k[2:] == [2, 2]


def test_lists_that_no_answer_can_be_chosen_from(tmp_path):
    for wrong, message in (([], "is not a list"), (["a", "a"], "must hold different texts"), ([""], "none of them")):
        with pytest.raises(ValueError, match=message):
            evaluate_vqa(Ranker([0] * 3), TaskProcessor(), rows(), answer_list=wrong, show_progress=False)
    with pytest.raises(ValueError, match="FakeWriter cannot rank answers"):
        evaluate(rows(), answer_list=["a"])
