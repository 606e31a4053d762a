"""Scenes of Shapes told in words, with questions and answers: for a language model that is to see pictures later.

A language model that has read questions and answers alone has learned to guess, and while it is frozen nothing in
front of them can tell it what to say. One that has read them behind a scene in words has learned to look things up in
what stands before, and a projector, a Q-Former or visual experts then only have to say what there is.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_vlp.data import ShapesConfig, ShapesWorld
from hf_vlp.data.conversations import load_conversations
from hf_vlp.data.conversations.messages import text_of
from hf_vlp.data.conversations.templates import VicunaTemplate
from hf_vlp.data.shapes.instructions import KINDS

from .text import BREAK

# Questions about a scene. Many teach a language model fastest to look things up.
TURNS = 6
# Of the scenes: others than those of the pictures, whose seed is 0.
SEED = 1000


def told_texts(count: int, preset: str = "default", seed: int = SEED, turns: int = TURNS) -> Iterator[str]:
    """Texts about `count` training scenes, written as each recipe will write them about pictures: a third each as
    LLaVA (Vicuna's format, the scene in place of the picture; the system's words, the longest part and always the
    same, in every fourth only), InstructBLIP (the scene, then instructions behind a begin token, as behind the
    queries; what was said before is part of the instruction) and CogVLM do (the scene in front of everything). Every
    third scene is told a second time as well, behind a begin token, as captions stand behind an image.

    Args:
        count: scenes.
        preset: of `ShapesConfig`.
        seed: of the scenes and questions.
        turns: questions about a scene, fewer if no more can be asked.

    Yields:
        Texts in which a tab is a begin token (`hf_vlp.training.text.BREAK`), so that it can stand for the end token of
        an answer too where both are one, as in OPT's tokenizer.
    """
    vicuna = [VicunaTemplate(eos_token=BREAK, image_token="", system=words) for words in (None, "", "", "")]
    for number, (said, messages) in enumerate(told_conversations(count, preset, seed, turns)):
        pieces = pieces_of(messages, number // 3)
        if number % 3 == 0:
            yield vicuna[number // 3 % 4].render(in_words(messages, said)).text
            yield f"{said}{BREAK}{said}"
        elif number % 3 == 1:
            asked = (". ".join(f"{question} {answer}" for question, answer in piece) for piece in pieces)
            yield BREAK.join([said, *asked])
        else:
            asked = (
                "\n".join(f"Question: {question} Answer: {answer}" for question, answer in piece) for piece in pieces
            )
            yield f"{said} {BREAK.join(asked)}"


def told_conversations(
    count: int, preset: str = "default", seed: int = SEED, turns: int = TURNS
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Scenes in words, and the messages of conversations about pictures of them."""
    world = ShapesWorld(ShapesConfig.preset(preset), "train", seed)
    # Short answers are asked for where no description is, so every other conversation has none.
    brief = [kind for kind in KINDS if kind != "description"]
    options = {"seed": seed, "short": True, "min_turns": turns, "max_turns": turns}
    both = [
        load_conversations(f"shapes:{preset}", "train", size=count, kinds=kinds, **options) for kinds in (KINDS, brief)
    ]
    for index in range(count):
        yield world.captions(index, world.scene(index))[0], both[index % 2][index]["messages"]


def in_words(messages: Sequence[Mapping[str, Any]], said: str) -> list[dict[str, Any]]:
    """A conversation with words in place of its picture."""
    words = {"type": "text", "text": said}
    return [
        {**turn, "content": [words if one["type"] == "image" else one for one in turn["content"]]} for turn in messages
    ]


def pieces_of(messages: Sequence[Any], number: int) -> list[list[tuple[str, str]]]:
    """Questions and answers in turns of one, and now and then of more, behind one another: most answers end a text."""
    said = [" ".join(text_of(message).split()) for message in messages]
    turns = list(zip(said[::2], said[1::2], strict=True))
    sizes = (1, 1, 1, 3) if number % 3 == 0 else (1, 1, 1, 1, 2)
    pieces = []
    for size in sizes:
        pieces.append(turns[:size])
        turns = turns[size:]
    return [*(piece for piece in pieces if piece), *([turns] if turns else [])]


__all__ = ["SEED", "TURNS", "in_words", "pieces_of", "told_conversations", "told_texts"]
