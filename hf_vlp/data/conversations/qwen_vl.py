"""The conversation format of Qwen-VL: ChatML, with pictures numbered through the conversation."""

from collections.abc import Sequence
from typing import Any, ClassVar

from .messages import Message
from .templates import RenderedConversation, Template, Writer, register_template


@register_template
class QwenVLTemplate(Template):
    """`<|im_start|>user⏎Picture 1: <img>…</img>⏎…<|im_end|>⏎<|im_start|>assistant⏎…<|im_end|>⏎`.

    As in the authors' `finetune.py` the marks that begin and end a turn, and the line break behind them, are learned
    for every turn, the system's and the user's included; of the words only the assistant's. The name of a role, the
    line break behind it and the words are tokenised apart.

    Images stay where the messages have them; a line break that the words behind an image begin with is the template's
    own and not written twice.

    Args:
        number_pictures: write `Picture n: ` before each image and a line break behind it; without, the image alone.
        image_position: as of `Template`, but `"given"` by default.
        options: as of `Template`.
    """

    name = "qwen_vl"
    default_system = "You are a helpful assistant."
    image_marks: ClassVar[tuple[str, str]] = ("<img>", "</img>")

    def __init__(self, *, number_pictures: bool = True, image_position: str = "given", **options: Any) -> None:
        super().__init__(image_position=image_position, **options)
        self.number_pictures = number_pictures

    @property
    def end_of_turn(self) -> str:
        return "<|im_end|>"

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        writer = Writer()
        system, turns = self.turns(messages)
        if turns and turns[0]["role"] == "assistant":
            turns = turns[1:]
        self._turn(writer, "system", system, [])
        pictures = 0
        for message in turns:
            text, marks, pictures = self._words(message, pictures)
            self._turn(writer, message["role"], text, marks)
        return writer.done()

    def prompt(self, messages: Sequence[Message]) -> RenderedConversation:
        rendered = self.render(messages)
        head = "<|im_start|>assistant"
        start = len(rendered.text)
        breaks = [*rendered.breaks, start, start + len(head), start + len(head) + 1]
        return RenderedConversation(f"{rendered.text}{head}\n", [], rendered.images, breaks)

    def _turn(self, writer: Writer, role: str, text: str, marks: list[str]) -> None:
        writer.add("<|im_start|>", learned=True)
        writer.add(role).cut().add("\n").cut()
        if role == "assistant":
            writer.add(text, learned=True)
        else:
            writer.add_images(text, marks)
        writer.cut().add("<|im_end|>", learned=True).cut().add("\n", learned=True).cut()

    def _words(self, message: Message, pictures: int) -> tuple[str, list[str], int]:
        """The text of a turn with `Picture n: <img>…</img>⏎` for each image, the marked images, and the new count."""
        mark = self.image_token.join(self.image_marks)
        pieces: list[tuple[bool, str]] = []
        for entry in message["content"]:
            if entry["type"] == "image":
                pictures += 1
                pieces.append((True, f"Picture {pictures}: {mark}\n" if self.number_pictures else mark))
            else:
                text = entry["text"] or ""
                behind = self.number_pictures and bool(pieces) and pieces[-1][0]
                pieces.append((False, text.removeprefix("\n") if behind else text))
        count = sum(is_image for is_image, _ in pieces)
        if count and self.image_position != "given":
            words = "".join(piece for is_image, piece in pieces if not is_image).strip()
            shown = "".join(piece for is_image, piece in pieces if is_image)
            text = shown + words if self.image_position == "first" else f"{words}\n{shown}".removesuffix("\n")
        else:
            text = "".join(piece for _, piece in pieces)
        return text, [mark] * count, pictures


__all__ = ["QwenVLTemplate"]
