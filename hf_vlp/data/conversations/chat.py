"""The chat template that came with a processor or tokenizer, with what the assistant says found in what it writes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .messages import Message
from .templates import (
    RenderedConversation,
    Span,
    Template,
    image_token_of,
    register_template,
    tokenizer_of,
)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "hf vlp probe"


@register_template
class ChatTemplate(Template):
    """The processor's or tokenizer's own chat template (Jinja).

    What is learned are the blocks `{% generation %}` of the template where it has them. Otherwise it is what a turn of
    the assistant adds behind the prompt for it: the conversation is written up to each such turn with and without it,
    as text, and both must be beginnings of the whole. Blanks behind the token that ends a turn are not learned.

    Messages go in with contents as lists of entries if the template reads such lists, else as strings in which the
    image token stands for an image.

    Args:
        chat_template: Jinja source.
        image_token: as in `Template`.
        variables: further names for the template, such as `bos_token`.
        image_position, system: as in `Template`; `"given"` by default.

    Raises:
        ValueError: the template cannot write an image.
    """

    name = "chat"
    cuts_at_images = False

    def __init__(
        self,
        chat_template: str,
        *,
        image_token: str = "<image>",
        bos_token: str = "",
        eos_token: str = "",
        system: str | None = None,
        image_position: str = "given",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            image_token=image_token,
            bos_token=bos_token,
            eos_token=eos_token,
            system=system,
            image_position=image_position,
        )
        self.chat_template = chat_template
        self.variables = {"bos_token": bos_token, "eos_token": eos_token, **(variables or {})}
        self.marks_generation = _GENERATION.search(chat_template) is not None
        self.takes_entries = self._reads_entries()

    @classmethod
    def for_processor(cls, processor: Any, **options: Any) -> "ChatTemplate":
        """The chat template of a processor, or of its tokenizer if it has none.

        Raises:
            ValueError: neither has one, or there is no image token.
        """
        tokenizer = tokenizer_of(processor)
        source = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if isinstance(source, Mapping):
            source = source.get("default")
        if not source:
            raise ValueError(
                f"{type(tokenizer).__name__} has no chat template, as language models that were never tuned on chats "
                f"have none; choose a template by name, such as vicuna_v1, or set tokenizer.chat_template"
            )
        tokens = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        return cls(
            source,
            **{
                "image_token": image_token_of(processor),
                "bos_token": tokenizer.bos_token or "",
                "eos_token": tokenizer.eos_token or "",
                "variables": tokens,
                **options,
            },
        )

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        text, blocks = self._write(messages)
        spans = [_trimmed(text, start, end) for start, end in (blocks or self._found(messages, text))]
        return RenderedConversation(text, [span for span in spans if span[0] < span[1]], self._image_spans(text))

    def prompt(self, messages: Sequence[Message]) -> RenderedConversation:
        text = self._write(messages, add_generation_prompt=True)[0]
        return RenderedConversation(text, [], self._image_spans(text))

    @property
    def end_of_turn(self) -> str:
        asked = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}
        rendered = self.render([asked, said])
        start, end = rendered.supervised[-1]
        return rendered.text[start:end].partition(_PROBE)[2].strip() or self.eos_token

    def _write(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, blocks = render_jinja_template(
            conversations=[self._conversation(messages)],
            chat_template=self.chat_template,
            return_assistant_tokens_mask=self.marks_generation,
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )
        return texts[0], [tuple(block) for block in blocks[0]] if self.marks_generation else []

    def _conversation(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        system, turns = self.turns(messages)
        written: list[dict[str, Any]] = []
        # A message without words stays: it stands in for what the template says of itself.
        if system or len(turns) < len(messages):
            content: Any = [{"type": "text", "text": system}] if self.takes_entries else system
            written.append({"role": "system", "content": content})
        for message in turns:
            content = self._entries(message) if self.takes_entries else self.content(message)[0]
            written.append({"role": message["role"], "content": content})
        return written

    def _entries(self, message: Message) -> list[dict[str, Any]]:
        entries = [
            {"type": "image"} if entry["type"] == "image" else {"type": "text", "text": entry["text"] or ""}
            for entry in message["content"]
        ]
        if self.image_position == "given":
            return entries
        images = [entry for entry in entries if entry["type"] == "image"]
        others = [entry for entry in entries if entry["type"] != "image"]
        return images + others if self.image_position == "first" else others + images

    def _reads_entries(self) -> bool:
        """Whether the template writes the words and the image of a content that is a list."""
        probe = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        self.takes_entries = True
        try:
            text = self._write([{"role": "user", "content": probe}], add_generation_prompt=True)[0]
        except Exception:
            return False
        if _PROBE not in text or "'type'" in text or '"type"' in text:
            return False
        if self.image_token not in text:
            # Some templates write an image under a name of their own.
            raise ValueError(
                f"the chat template writes no {self.image_token!r} for an image, so its prompts and the processor's "
                f"image token do not fit; it writes {text!r}"
            )
        return True

    def _image_spans(self, text: str) -> list[Span]:
        token = re.escape(self.image_token)
        return [found.span() for found in re.finditer(token, text)]

    def _found(self, messages: Sequence[Message], text: str) -> list[Span]:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._write(messages[:number], add_generation_prompt=True)[0] if number else ""
            after = self._write(messages[: number + 1])[0]
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                raise ValueError(
                    f"turn {number}: the chat template writes the beginning of a conversation differently when there "
                    f"is more of it, so its answers cannot be found; put {{% generation %}} and {{% endgeneration %}} "
                    f"around the assistant's words in the template, or choose one by name"
                )
            spans.append((len(before), len(after)))
        return spans


def _trimmed(text: str, start: int, end: int) -> Span:
    """Without blanks at its end, unless the turn ends with nothing else."""
    said = text[start:end]
    shorter = said.rstrip()
    # "</s>" or "<|im_end|>" in front of the blanks ends the turn; a bare line break does so itself.
    return (start, start + len(shorter)) if shorter.endswith((">", "]", "}")) else (start, end)
