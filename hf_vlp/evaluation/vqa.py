"""Visual question answering: generated or ranked answers by the official VQA accuracy, and exact match."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_vlp.data.readers import load_json
from hf_vlp.evaluation.generation import common_result, generate_texts, produce_texts
from hf_vlp.evaluation.images import column, rows_of
from hf_vlp.evaluation.results import write_json
from hf_vlp.evaluation.runtime import is_main
from hf_vlp.evaluation.vqa_scores import FEWEST_ANSWERS, exact_match, mean_by, question_accuracy

# BLIP-2's prompts for zero-shot VQA: with "Short answer:" for FlanT5, "Answer:" for OPT.
DEFAULT_PROMPT = "Question: {} Answer:"


def answers_of(value: Any) -> list[str]:
    """The human answers of a row: a string, a list of strings, or VQA's list of `{"answer": …}`; None is no answer."""
    if isinstance(value, str):
        return [value]
    given = [one["answer"] if isinstance(one, dict) else one for one in value or []]
    return [str(one) for one in given if one is not None]


def evaluate_vqa(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 16,
    prompt: str | None = None,
    answer_list: str | Path | Sequence[str] | None = None,
    top_k: int = 128,
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
    """Answers every question, by generating or by choosing from a list, and scores the answers.

    Args:
        model: of the role `vqa`, on the device it is to run on.
        processor: of the model.
        rows: `image`, `question`, and for scoring `answers`; optional `question_id`, `question_type`, `answer_type`.
        batch_size: questions at a time.
        prompt: what the model is given; `{}` is where the question goes. By default the question alone for a model
            that was trained to answer (one with `rank_answers`), BLIP-2's prompt for others.
        answer_list: answers to choose from, or a JSON file with a list of them: the model ranks them (`rank_answers`)
            and generates nothing.
        top_k: answers that are ranked in full, those with the likeliest first token.
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
        ValueError: no rows, a missing column, a prompt without `{}`, unreadable images above the rate, no answers
            and no `answers_file` either, or a list of answers for a model that cannot rank.
    """
    rows = rows_of(rows, limit)
    questions = column(rows, question_column)
    for row, question in enumerate(questions):
        if not isinstance(question, str):
            raise ValueError(f"row {row}: the question is {question!r}, not a text; drop the row")
    ranks = hasattr(model, "rank_answers")
    if answer_list is not None and not ranks:
        raise ValueError(f"{type(model).__name__} cannot rank answers: leave answer_list out, and it generates them")
    if prompt is None:
        prompt = "{}" if ranks else DEFAULT_PROMPT
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
    prompts = [prompt.replace("{}", question) for question in questions]
    shared = {
        "batch_size": batch_size,
        "workers": workers,
        "description": "answering",
        "show_progress": show_progress,
    }
    if answer_list is not None:
        rank = answer_ranker(model, processor, answers_from(answer_list), top_k)
        generated, skipped = produce_texts(model, processor, rows, range(len(questions)), rank, prompts, **shared)
    else:
        generated, skipped = generate_texts(
            model, processor, rows, range(len(questions)), prompts, **shared, **(options | (generation or {}))
        )
    skipped.check(max_bad_rate)
    if answers_file is not None and is_main():
        write_json([{"question_id": _number(ids[row]), "answer": answer} for row, answer in generated], answers_file)

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


def answers_from(answer_list: str | Path | Sequence[str]) -> list[str]:
    """The answers of a list, or of a JSON file with one.

    Raises:
        ValueError: no list of different strings.
    """
    where = "answer_list"
    answers: Any = answer_list
    if isinstance(answer_list, str | Path):
        where = str(answer_list)
        answers = load_json(Path(answer_list))
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        raise ValueError(f"{where} is not a list of answers")
    answers = list(answers)
    if not all(isinstance(answer, str) and answer.strip() for answer in answers) or len(set(answers)) < len(answers):
        raise ValueError(f"{where} must hold different texts, none of them empty")
    return answers


def answer_ranker(
    model: nn.Module, processor: Any, answers: Sequence[str], top_k: int = 128
) -> Callable[[dict[str, Any]], list[str]]:
    """A function from inputs to the answers that `model.rank_answers` puts first.

    Args:
        model: `rank_answers(pixel_values, input_ids, attention_mask, candidate_ids=, candidate_attention_mask=,
            top_k=)` gives an output with `answer_index` (N, k).
        processor: `encode_answers(answers)` gives `labels` and `labels_attention_mask`.
        answers: to choose from.
        top_k: at most all of them.
    """
    encoded = processor.encode_answers(answers, return_tensors="pt")
    device = next(model.parameters()).device
    ids, mask = encoded["labels"].to(device), encoded["labels_attention_mask"].to(device)

    def rank(inputs: dict[str, Any]) -> list[str]:
        given = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        output = model.rank_answers(
            **given, candidate_ids=ids, candidate_attention_mask=mask, top_k=min(top_k, len(answers))
        )
        return [answers[best] for best in output.answer_index[:, 0].tolist()]

    return rank


def _number(value: Any) -> Any:
    """The official evaluation compares numbers of questions with numbers."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


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
