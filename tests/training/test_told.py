"""Scenes told in words: true answers, in the formats in which the recipes write about pictures."""

import re

import pytest

from hf_vlp.data.conversations.instructblip import as_instruction
from hf_vlp.data.conversations.messages import text_of
from hf_vlp.data.shapes.captions import score_caption
from hf_vlp.models.cogvlm.processing_cogvlm import conversation_prompt
from hf_vlp.training.text import BREAK
from hf_vlp.training.told import in_words, pieces_of, told_conversations, told_texts

SCENES = 36


@pytest.fixture(scope="module")
def told() -> list[tuple[str, list]]:
    return list(told_conversations(SCENES, "row", 3))


def turns_of(messages: list) -> list[tuple[str, str]]:
    said = [" ".join(text_of(message).split()) for message in messages]
    return list(zip(said[::2], said[1::2], strict=True))


def test_what_is_told_is_true(told: list[tuple[str, list]]) -> None:
    seen = {"color": 0, "count": 0, "description": 0}
    for said, messages in told:
        things = [tuple(thing.split()[1:]) for thing in said.split(" and ")]
        for question, answer in turns_of(messages):
            color = re.match(r"what color is the (\w+)\?", question)
            if color:
                assert (answer, color[1]) in things
                seen["color"] += 1
            elif question.startswith("how many objects are there"):
                assert answer == str(len(things))
                seen["count"] += 1
            elif question == "describe the image.":
                assert score_caption(answer, [{"color": color, "shape": shape} for color, shape in things]).exact
                seen["description"] += 1
    assert min(seen.values()) > 3


def test_every_question_is_in_a_piece(told: list[tuple[str, list]]) -> None:
    for number, (_, messages) in enumerate(told):
        for turns in (messages, messages * 2):
            pieces = pieces_of(turns, number)
            assert [turn for piece in pieces for turn in piece] == turns_of(turns)
            assert all(pieces)


def test_texts_are_the_recipes_formats(told: list[tuple[str, list]]) -> None:
    texts = iter(told_texts(SCENES, "row", 3))
    for number, (said, messages) in enumerate(told):
        text, turns = next(texts), turns_of(messages)
        if number % 3 == 0:
            words = text_of(in_words(messages, said)[0])
            assert said in words and all(one["text"] in words for one in messages[0]["content"] if one["text"])
            assert f"USER: {words} ASSISTANT: {turns[0][1]}{BREAK}" in text
            assert ("A chat between" in text) == (number % 12 == 0)
            assert "<image>" not in text
            assert next(texts) == f"{said}{BREAK}{said}"
        elif number % 3 == 1:
            parts, start = text.split(BREAK), 0
            assert parts[0] == said
            # As the model will be asked when it sees: what was said before is part of the instruction.
            for piece, part in zip(pieces_of(messages, number // 3), parts[1:], strict=True):
                own = messages[2 * start : 2 * (start + len(piece))]
                assert part == f"{' '.join(as_instruction(own[:-1]).split())} {piece[-1][1]}"
                start += len(piece)
        else:
            question, answer = turns[0]
            assert text.split(BREAK)[0] == f"{said} {conversation_prompt(question)} {answer}"
    assert next(texts, None) is None


def test_same_seed_same_texts() -> None:
    first = list(told_texts(9, "row", 5))
    assert list(told_texts(9, "row", 5)) == first != list(told_texts(9, "row", 6))
    # More scenes begin with the same ones.
    assert list(told_texts(12, "row", 5))[: len(first)] == first
