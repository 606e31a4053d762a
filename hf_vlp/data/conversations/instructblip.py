"""How InstructBLIP is asked: the image, then one instruction, which holds what was said before."""

from collections.abc import Sequence
from typing import Any

from .messages import Message, text_of
from .templates import RenderedConversation, Template, Writer, register_template, tokenizer_of


def as_instruction(messages: Sequence[Message]) -> str:
    """What was said so far as one instruction: questions as they are, answers with a full stop behind them."""
    said = []
    for message in messages:
        words = text_of(message).strip()
        said.append(f"{words}." if message["role"] == "assistant" and not words.endswith(".") else words)
    return " ".join(filter(None, said))


@register_template
class InstructBlipTemplate(Template):
    """`<image><s>instruction` and the answer: the text of `InstructBlipProcessor.training_inputs`.

    Only the last answer is learned; earlier turns are part of the instruction. For training use `InstructionCollator`,
    which lets the Q-Former read the instruction of each answer; this template is for generation.

    Args:
        encoder_decoder: the instruction ends with the end token, and answers go to a decoder of their own.
        answer_space: what stands between an instruction and its answer.
        options: as of `Template`.
    """

    name = "instructblip"
    adds_bos = False

    def __init__(self, *, encoder_decoder: bool = False, answer_space: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.encoder_decoder, self.answer_space = encoder_decoder, answer_space

    @classmethod
    def for_processor(cls, processor: Any, **options: Any) -> "InstructBlipTemplate":
        tokenizer = tokenizer_of(processor)
        ids = tokenizer("").input_ids
        begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        settings = {
            "encoder_decoder": bool(getattr(processor, "is_encoder_decoder", False)),
            "answer_space": getattr(processor, "answer_space", ""),
            "bos_token": tokenizer.bos_token if begins else "",
        }
        return super().for_processor(processor, **{**settings, **options})

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        _, turns = self.turns(messages)
        places = [place for place, message in enumerate(turns) if message["role"] == "assistant"]
        asked, answer = turns[: places[-1]], text_of(turns[places[-1]]).strip()
        space = self.answer_space if as_instruction(asked) else ""
        return self._asked(asked).cut().add(f"{space}{answer}{self.eos_token}", learned=True).done()

    def prompt(self, messages: Sequence[Message]) -> RenderedConversation:
        return self._asked(self.turns(messages)[1]).done()

    def _asked(self, turns: Sequence[Message]) -> Writer:
        count = sum(entry["type"] == "image" for message in turns for entry in message["content"])
        writer = Writer().add_images(self.image_token * count, [self.image_token] * count)
        end = self.eos_token if self.encoder_decoder else ""
        return writer.add(f"{self.bos_token}{as_instruction(turns)}{end}")


__all__ = ["InstructBlipTemplate", "as_instruction"]
