"""Instructions out of annotated data: ways of asking for each kind of task, drawn anew in each epoch.

InstructBLIP (Dai et al. 2023, section 2.1, appendix C) turns data sets of eleven kinds of tasks into instructions by
ten to fifteen wordings a kind, and asks for a short answer where the data set's answers are short. The wordings here
are our own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from ..hashing import stable_hash
from .messages import Message


@dataclass(frozen=True)
class Family:
    """A kind of task.

    Attributes:
        wordings: what the user says; `{name}` is filled in from the row.
        fields: names that a row must have for them.
        answer: name of the row's entry that is to be said; a list of answers gives one of them.
    """

    wordings: tuple[str, ...]
    fields: tuple[str, ...]
    answer: str


_CAPTION = (
    "Say briefly what this picture shows.",
    "Give a short caption for the picture.",
    "What does this picture show? Answer in one short sentence.",
    "Write one brief sentence about the picture.",
    "Sum up the picture in a few words.",
    "A short caption of the picture:",
    "Tell me in short what can be seen here.",
    "Put the content of the picture into one short sentence.",
    "In brief, what is going on in the picture?",
    "Name in a short phrase what the picture is of.",
    "Describe the picture in no more than a sentence.",
)
_SCENE_TEXT_CAPTION = (
    "Say briefly what this picture shows, with the words that can be read in it.",
    "Give a short caption that takes up the text in the picture.",
    "Read the text in the picture and write a brief caption with it.",
    "In one short sentence, what does the picture show and what does the text in it say?",
    "A short caption that quotes the visible text:",
    "Describe the picture briefly; use what is written in it.",
    "Look for writing in the picture and describe it in a short sentence.",
    "Sum up the picture in a few words, lettering included.",
    "What is written here, and on what? Answer in a short sentence.",
    "Write one brief sentence about the picture and its text.",
)
_ANSWER = (
    "{question}",
    "Question: {question}",
    "{question} Answer in one word or a short phrase.",
    "Look at the picture and answer in short: {question}",
    "Question: {question} Short answer:",
    "Answer briefly. {question}",
    "Using the picture, give a short answer to this: {question}",
    "{question} The short answer is",
    "From what the picture shows: {question} Keep the answer short.",
    "Here is a question about the picture: {question} Say the answer in a few words.",
)
_KNOWLEDGE = (
    "{question}",
    "{question} Answer in short, from the picture and from what you know.",
    "Question: {question} Short answer:",
    "The picture alone may not tell: {question} Give a brief answer.",
    "With common knowledge and the picture, answer briefly: {question}",
    "{question} A few words are enough.",
    "Think of what is generally known and answer in short. {question}",
    "Using the picture and your knowledge, what is the short answer to: {question}",
    "Question: {question} Brief answer:",
    "Answer this with a word or two: {question}",
)
_READING = (
    "{question}",
    "Read the text in the picture and answer in short: {question}",
    "{question} The answer is written in the picture; give it briefly.",
    "Question about the writing in the picture: {question} Short answer:",
    "By the text that can be read here, {question}",
    "Answer briefly with the help of the visible words. {question}",
    "Look for the text that tells: {question} Keep it short.",
    "Question: {question} Read, then answer in a few words.",
    "From the lettering in the picture: {question}",
    "What does the text say about this: {question} Short answer:",
)
_QUESTION = (
    "Make up a question about the picture whose answer is: {answer}.",
    "Ask something about the picture that is to be answered by {answer}.",
    "The answer is {answer}. What was the question about the picture?",
    "Which question about this picture would {answer} be the answer to?",
    "Write a question for the picture with the answer {answer}.",
    "Given the picture and the answer {answer}, say the question.",
    "Find a question that the picture answers with {answer}.",
    "Someone looked at the picture and answered {answer}. What had they been asked?",
    "Turn it round: the picture, the answer {answer}, and the question is",
    "Think of a question on this picture that {answer} answers.",
)
_DIALOG = (
    "So far: {history} Now: {question}",
    "This was said about the picture: {history} Answer briefly: {question}",
    "{history} {question}",
    "Go on with this dialog about the picture. {history} Question: {question} Short answer:",
    "Earlier questions and answers: {history} The next question is: {question}",
    "With what was said before ({history}), answer in short: {question}",
    "A dialog about the picture: {history} {question} Keep the answer short.",
    "You have heard: {history} {question}",
    "Read the dialog and answer its last question in a few words. {history} {question}",
    "Dialog: {history} Question: {question} Answer:",
)
_REASONING = (
    "{question}",
    "{question} Think it through with the picture, then answer in short.",
    "What does the picture let one conclude? {question} Short answer:",
    "Work it out from the picture: {question}",
    "Question: {question} Put together what you see and answer briefly.",
    "Compare, count and relate what is shown. {question}",
    "{question} The answer follows from the picture; give it in a word or two.",
    "Reason about the picture and answer in short: {question}",
    "By looking closely: {question} Brief answer:",
    "Which answer follows from the picture? {question}",
)
_CLASSIFICATION = (
    "What is shown here? Name it in a word or two.",
    "Which class does the picture belong to?",
    "Name what the picture is of.",
    "What kind of thing is this? Answer in short.",
    "Give the category of the picture.",
    "In a word, what is it?",
    "Label the picture.",
    "The short name of what can be seen:",
    "Which name fits the picture best?",
    "Identify what is in the picture, briefly.",
)
_VIDEO = tuple(wording.replace("picture", "video") for wording in _ANSWER)
_INSTRUCTION = ("{question}",)

FAMILIES: dict[str, Family] = {
    "captioning": Family(_CAPTION, (), "text"),
    "scene_text_captioning": Family(_SCENE_TEXT_CAPTION, (), "text"),
    "question_answering": Family(_ANSWER, ("question",), "answers"),
    "knowledge_question_answering": Family(_KNOWLEDGE, ("question",), "answers"),
    "scene_text_question_answering": Family(_READING, ("question",), "answers"),
    "question_generation": Family(_QUESTION, ("answer",), "question"),
    "conversational_question_answering": Family(_DIALOG, ("history", "question"), "answers"),
    "visual_reasoning": Family(_REASONING, ("question",), "answers"),
    "classification": Family(_CLASSIFICATION, (), "label"),
    "video_question_answering": Family(_VIDEO, ("question",), "answers"),
    # Data that comes as instructions is taken as it is.
    "instructions": Family(_INSTRUCTION, ("question",), "answers"),
}


def family_named(name: str) -> Family:
    """The family of a name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name not in FAMILIES:
        raise ValueError(f"there is no family {name!r} of instructions; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def instruction_messages(family: str, row: Mapping[str, Any], *, seed: int, epoch: int, index: int) -> list[Message]:
    """A row of annotated data as one instruction and what is to be said to it.

    The wording and, where there are several answers, the answer are drawn by (seed, epoch, index).

    Args:
        family: a name of `FAMILIES`.
        row: the family's `fields` and its `answer`, which may be a list; for `question_generation`, `answer` may
            stand in `answers`.

    Raises:
        ValueError: unknown family, or a row without what the family needs.
    """
    kind = family_named(family)
    values = {name: _drawn(row, name, seed, epoch, index) for name in kind.fields}
    answer = _drawn(row, kind.answer, seed, epoch, index)
    missing = [name for name, value in {**values, kind.answer: answer}.items() if not value]
    if missing:
        raise ValueError(f"family {family!r} needs {missing[0]!r}, but the row has {sorted(row)}")
    wording = kind.wordings[stable_hash("wording", seed, epoch, index) % len(kind.wordings)]
    said = "".join(literal + (values[name] if name else "") for literal, name, _, _ in Formatter().parse(wording))
    return [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": said}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _drawn(row: Mapping[str, Any], name: str, seed: int, epoch: int, index: int) -> str:
    value = row.get(name)
    if value is None and name == "answer":
        value = row.get("answers")
    if value is None and name == "answers":
        value = row.get("answer")
    if isinstance(value, Sequence) and not isinstance(value, str):
        texts = [text for text in value if isinstance(text, str) and text.strip()]
        weights = row.get("weights") if name in ("answer", "answers") else None
        value = texts[_pick(len(texts), weights, seed, epoch, index)] if texts else None
    return value.strip() if isinstance(value, str) else ""


def _pick(count: int, weights: Sequence[float] | None, seed: int, epoch: int, index: int) -> int:
    """One of `count`, by their weights if there are as many."""
    lot = stable_hash("answer", seed, epoch, index)
    if not weights or len(weights) != count or sum(weights) <= 0:
        return lot % count
    left = (lot / (1 << 63)) * sum(weights)
    for number, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return number
    return count - 1
