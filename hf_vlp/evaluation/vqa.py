"""Visual question answering: generated answers by the official VQA accuracy, and exact match."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_vlp.evaluation.generation import common_result, generate_texts
from hf_vlp.evaluation.images import column, rows_of
from hf_vlp.evaluation.results import write_json
from hf_vlp.evaluation.runtime import is_main
from hf_vlp.evaluation.vqa_scores import FEWEST_ANSWERS, exact_match, mean_by, question_accuracy

# BLIP-2's prompts for zero-shot VQA: with "Short answer:" for FlanT5, "Answer:" for OPT.
DEFAULT_PROMPT = "Question: {} Answer:"


def answers_of(value: Any) -> list[str]:
    """The human answers of a row: a string, a list of strings, or VQA's list of `{"answer": …}`."""
    if isinstance(value, str):
        return [value]
    return [one["answer"] if isinstance(one, dict) else str(one) for one in value or []]


def evaluate_vqa(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 16,
    prompt: str = DEFAULT_PROMPT,
    num_beams: int = 5,
    max_new_tokens: int = 10,
    length_penalty: float = -1.0,
    generation: dict[str, Any] | None = None,
    normalize: str = "official",
    question_column: str = "question",
    answers_column: str = "answers",
    answers_file: str | Path | None = None,
    max_bad_rate: float = 0.0,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Answers every question and scores the answers.

    Args:
        model: of the role `vqa`, on the device it is to run on.
        processor: of the model.
        rows: `image`, `question`, and for scoring `answers`; optional `question_id`, `question_type`, `answer_type`.
        batch_size: questions at a time.
        prompt: what the model is given; `{}` is where the question goes.
        num_beams, max_new_tokens, length_penalty: of beam search; a negative penalty asks for short answers, as
            BLIP-2's evaluation does.
        generation: further arguments of `generate`.
        normalize: see `hf_vlp.evaluation.vqa_scores.question_accuracy`.
        question_column, answers_column: names of the columns.
        answers_file: JSON in the submission format of VQA, `[{"question_id": …, "answer": …}]`.
        max_bad_rate: share of questions whose image may be unreadable; they are left out and counted.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add question, answer, human answers and score of every question.
        show_progress: progress bars on the main process.

    Returns:
        `metrics` in [0, 1]: `vqa_accuracy` where every question has at least four human answers, `exact_match` where
        there are any, neither on a test split without answers; by type under `per_question_type` and
        `per_answer_type` where the data has types; and `samples`.

    Raises:
        ValueError: no rows, a missing column, a prompt without `{}`, unreadable images above the rate, or no answers
            and no `answers_file` either.
    """
    rows = rows_of(rows, limit)
    questions = column(rows, question_column)
    for row, question in enumerate(questions):
        if not isinstance(question, str):
            raise ValueError(f"row {row}: the question is {question!r}, not a text; drop the row")
    if "{}" not in prompt:
        raise ValueError(f"prompt={prompt!r} has no '{{}}' for the question to go to")
    given = column(rows, answers_column, required=False)
    answers = None if given is None else [answers_of(value) for value in given]
    if answers is not None and not any(answers):
        answers = None
    if answers is None and answers_file is None:
        raise ValueError(
            f"the data has no {answers_column!r} to score with: name the column by answers_column, or give an "
            "answers_file to write a submission"
        )
    ids = column(rows, "question_id", required=False) or list(range(len(questions)))
    options: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    if num_beams > 1:
        options["length_penalty"] = length_penalty
    generated, skipped = generate_texts(
        model,
        processor,
        rows,
        range(len(questions)),
        [prompt.replace("{}", question) for question in questions],
        batch_size=batch_size,
        workers=workers,
        description="answering",
        show_progress=show_progress,
        **(options | (generation or {})),
    )
    skipped.check(max_bad_rate)
    if answers_file is not None and is_main():
        write_json([{"question_id": ids[row], "answer": answer} for row, answer in generated], answers_file)

    scores = {} if answers is None else score_answers(generated, answers, normalize)
    metrics = {name: sum(values) / len(values) for name, values in scores.items()}
    result = common_result("vqa", metrics, skipped, questions=len(generated))
    main = scores.get("vqa_accuracy", scores.get("exact_match"))
    for name in ("question_type", "answer_type"):
        types = column(rows, name, required=False)
        if types is not None and main is not None:
            result[f"per_{name}"] = mean_by([types[row] for row, _ in generated], main)
    if details:
        result["details"] = [
            {
                "question_id": ids[row],
                "question": questions[row],
                "answer": answer,
                "answers": None if answers is None else answers[row],
                **{name: values[position] for name, values in scores.items()},
            }
            for position, (row, answer) in enumerate(generated)
        ]
    return result


def score_answers(
    generated: Sequence[tuple[int, str]], answers: Sequence[Sequence[str]], normalize: str = "official"
) -> dict[str, list[float]]:
    """Scores of each answer under `exact_match`, and `vqa_accuracy` where all questions have enough human answers.

    Args:
        generated: (row, answer).
        answers: human answers of every row.

    Raises:
        ValueError: a question without answers; it names the row.
    """
    empty = [row for row, _ in generated if not answers[row]]
    if empty:
        raise ValueError(f"{len(empty)} questions have no answers (row {empty[0]}, …): drop them, or score none")
    scores = {"exact_match": [exact_match(answer, answers[row]) for row, answer in generated]}
    if all(len(answers[row]) >= FEWEST_ANSWERS for row, _ in generated):
        scores["vqa_accuracy"] = [
            question_accuracy(answer, answers[row], normalize=normalize) for row, answer in generated
        ]
    return scores
