import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vlp.evaluation.vqa_scores import exact_match, mean_by, normalize_answer, question_accuracy, vqa_accuracy

GOLDEN = json.loads(Path(__file__).with_name("golden_vqa.json").read_text())


@pytest.mark.parametrize("answer", sorted(GOLDEN["normalized"]))
def test_normalisation_of_the_official_code(answer: str):
    assert normalize_answer(answer) == GOLDEN["normalized"][answer]


def test_accuracies_of_the_official_code():
    questions = GOLDEN["questions"]
    result = vqa_accuracy(
        [question["prediction"] for question in questions],
        [question["answers"] for question in questions],
        question_types=[question["question_type"] for question in questions],
        answer_types=[question["answer_type"] for question in questions],
    )
    # The official code rounds percents, here to 12 digits.
    assert result["per_question"] == pytest.approx([q["accuracy"] for q in questions], abs=1e-12)
    assert result["accuracy"] == pytest.approx(GOLDEN["accuracy"], abs=1e-12)
    assert result["per_question_type"] == pytest.approx(GOLDEN["per_question_type"], abs=1e-12)
    assert result["per_answer_type"] == pytest.approx(GOLDEN["per_answer_type"], abs=1e-12)


@pytest.mark.parametrize(("right", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_table_of_ten_answers(right: int, expected: float):
    answers = ["red"] * right + [f"other {index}" for index in range(10 - right)]
    assert question_accuracy("red", answers) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=12), st.sampled_from("abcd"))
def test_leaving_one_out_by_brute_force(answers: list[str], prediction: str):
    ways = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        ways.append(min(1.0, others.count(prediction) / 3))
    expected = sum(ways) / len(ways)
    # "a" is an article and becomes nothing on both sides unless all agree; b and c stay.
    assert question_accuracy(prediction, answers) == pytest.approx(expected)


def test_agreement_is_compared_as_written():
    assert question_accuracy("Yes.", ["yes"] * 10) == 0.0
    assert question_accuracy("Yes.", ["yes"] * 10, normalize="always") == 1.0
    assert question_accuracy(" yes\n", ["yes"] * 10) == 1.0


def test_at_most_32_full_stops_are_removed():
    assert normalize_answer("." * 40) == "." * 8


def test_exact_match_takes_the_most_frequent_answer():
    assert exact_match("Two.", ["2", "two", "3"]) == 1.0
    assert exact_match("3", ["2", "two", "3"]) == 0.0
    assert exact_match("3", ["2", "3"]) == 1.0
    with pytest.raises(ValueError, match="no answers"):
        exact_match("3", [])


def test_too_few_answers_are_refused_and_named():
    with pytest.raises(ValueError, match=r"answers\[1\]: 1 answers.*use exact match"):
        vqa_accuracy(["a", "b"], [["a"] * 10, ["b"]])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="2 predictions but 1 answers"):
        vqa_accuracy(["a", "b"], [["a"] * 10])
    with pytest.raises(ValueError, match="1 predictions but 2 answer_types"):
        vqa_accuracy(["a"], [["a"] * 10], answer_types=["x", "y"])
    with pytest.raises(ValueError, match="no predictions"):
        vqa_accuracy([], [])
    with pytest.raises(ValueError, match="'official' or 'always'"):
        question_accuracy("a", ["a"] * 10, normalize="never")


def test_groups_of_none_are_left_out():
    assert mean_by(["b", "a", None, "b"], [1.0, 0.0, 1.0, 0.0]) == {"a": 0.0, "b": 0.5}
