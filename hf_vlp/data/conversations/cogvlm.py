"""The conversation formats of CogVLM: chat, short answers, and the text alone."""

from collections.abc import Sequence
from typing import Any, ClassVar

from .messages import Message
from .templates import RenderedConversation, Template, Writer, register_template


class _CogVLMTemplate(Template):
    """`Question: … Answer: …⏎Question: … Answer:…</s>`, the images in front of everything.

    A question without words, in a conversation of one turn, is left out with the words around it: what is learned then
    is the caption. The last answer is tokenised by itself and ends with the end token, as in the released code.

    # Differs from the original: it learns the last answer only; here the earlier ones are learned too, without the
    # line break behind them, since an answer is to end with the end token.

    Args:
        answer_space: what stands between a question and the last answer: the processor's.
        options: as of `Template`.
    """

    words: ClassVar[str] = "Answer:"
    # The begin token is written, so that the text is whole.
    adds_bos = False

    def __init__(self, *, answer_space: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.answer_space = answer_space

    @classmethod
    def for_processor(cls, processor: Any, **options: Any) -> "_CogVLMTemplate":
        return super().for_processor(processor, **{"answer_space": getattr(processor, "answer_space", ""), **options})

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        writer = Writer()
        system, turns = self.turns(messages)
        if turns and turns[0]["role"] == "assistant":
            turns = turns[1:]
        writer.add(self.bos_token)
        images = sum(entry["type"] == "image" for turn in turns for entry in turn["content"])
        writer.add_images(self.image_token * images, [self.image_token] * images)
        asked = [turn for turn in turns if turn["role"] == "user"]
        bare = len(asked) == 1 and not _words(asked[0])
        writer.add(f"{system}\n" if system else "")
        for number, turn in enumerate(turns):
            text, last = _words(turn), number == len(turns) - 1
            if turn["role"] == "user":
                writer.add("" if bare else f"Question: {text} {self.words}")
            elif last:
                writer.cut().add(f"{'' if bare else self.answer_space}{text}{self.eos_token}", learned=True)
            else:
                writer.add(f" {text}", learned=True).add("\n")
        return writer.done()


@register_template
class CogVLMChatTemplate(_CogVLMTemplate):
    """The format of conversations, captions and grounding."""

    name = "cogvlm_chat"


@register_template
class CogVLMVQATemplate(_CogVLMTemplate):
    """The format of questions with short answers."""

    name = "cogvlm_vqa"
    words = "Short answer:"


def _words(turn: Message) -> str:
    return " ".join(entry["text"].strip() for entry in turn["content"] if entry["type"] == "text" and entry["text"])
