"""How a conversation is written for a language model, and which characters of it the model learns to write.

A template writes messages as one text and says which characters are the assistant's: the answers, each with what ends
its turn. The mask of the labels follows from these characters through the offsets of the tokenizer (`encoding`), so
nothing is ever tokenised twice to find out how long it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .messages import Message, text_of

Span = tuple[int, int]

SYSTEM_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
SYSTEM_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
SYSTEM_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
SYSTEM_MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
SYSTEM_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
IMAGE_POSITIONS = ("first", "last", "given")


class RenderedConversation(NamedTuple):
    """A conversation as text.

    Attributes:
        text: the whole text; each image is one image token of the processor in it.
        supervised: [start, end) of the characters that the model learns to write, in order.
        images: [start, end) of each image with the marks that belong to it; truncation keeps or drops it whole.
        breaks: characters at which the text is cut before it is tokenised, so that no token reaches across.
    """

    text: str
    supervised: list[Span]
    images: list[Span]
    breaks: list[int] = []  # noqa: RUF012  never changed


@dataclass
class Writer:
    """Collects a text piece by piece with its supervised and image spans."""

    text: str = ""
    supervised: list[Span] = field(default_factory=list)
    images: list[Span] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)

    def add(self, piece: str, *, learned: bool = False) -> "Writer":
        """Appends a piece that is learned, or only read."""
        start = len(self.text)
        self.text += piece
        if learned and piece:
            if self.supervised and self.supervised[-1][1] == start:
                start = self.supervised.pop()[0]
            self.supervised.append((start, len(self.text)))
        return self

    def add_images(self, piece: str, marks: Sequence[str]) -> "Writer":
        """Appends a piece that is read only and in which each of `marks`, in order, is an image."""
        start, at = len(self.text), 0
        self.text += piece
        for mark in marks:
            at = piece.index(mark, at)
            self.images.append((start + at, start + at + len(mark)))
            at += len(mark)
        return self

    def cut(self) -> "Writer":
        """Lets no token reach across this place."""
        self.breaks.append(len(self.text))
        return self

    def done(self) -> RenderedConversation:
        return RenderedConversation(self.text, self.supervised, self.images, self.breaks)


class Template:
    """Base of all templates. A subclass writes `render`.

    Args:
        image_token: the processor's token that stands for an image.
        bos_token, eos_token: as text, of the tokenizer.
        system: words of the system in place of the template's own; those of a conversation's own system message come
            before both.
        image_position: `"first"` puts the images of a turn in front of its text and `"last"` behind it, with a line
            break between; `"given"` leaves them where the messages have them.

    Raises:
        ValueError: unknown image position.
    """

    name: ClassVar[str] = ""
    default_system: ClassVar[str] = ""
    # Put around each image token, and never separated from it.
    image_marks: ClassVar[tuple[str, str]] = ("", "")
    # Whether the tokenizer's own first token (<s>) is put in front.
    adds_bos: ClassVar[bool] = True
    # Whether the texts before and behind an image are tokenised apart, as LLaVA does.
    cuts_at_images: ClassVar[bool] = True

    def __init__(
        self,
        *,
        image_token: str = "<image>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        system: str | None = None,
        image_position: str = "first",
    ) -> None:
        if image_position not in IMAGE_POSITIONS:
            raise ValueError(f"image_position={image_position!r} is none of {', '.join(IMAGE_POSITIONS)}")
        self.image_token, self.bos_token, self.eos_token = image_token, bos_token, eos_token
        self.system = self.default_system if system is None else system
        self.image_position = image_position

    @property
    def end_of_turn(self) -> str:
        """What follows an answer."""
        return self.eos_token

    @classmethod
    def for_processor(cls, processor: Any, **options: Any) -> "Template":
        """The template with the special tokens of a processor.

        Raises:
            ValueError: the processor or its tokenizer has no image token, or no end-of-sequence token.
        """
        tokenizer = tokenizer_of(processor)
        if not tokenizer.eos_token:
            raise ValueError(
                f"{type(tokenizer).__name__} has no eos_token, with which an answer of template {cls.name!r} ends; "
                f"set tokenizer.eos_token"
            )
        tokens = {
            "image_token": image_token_of(processor),
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token,
        }
        return cls(**{**tokens, **options})

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        """The text of a conversation, with what is learned of it.

        Args:
            messages: as `to_messages` makes them.
        """
        raise NotImplementedError

    def prompt(self, messages: Sequence[Message]) -> RenderedConversation:
        """The text of a conversation up to where the assistant's next answer begins, for generation. Nothing in it is
        learned.

        Args:
            messages: a conversation whose last turn is the user's.
        """
        rendered = self.render([*messages, {"role": "assistant", "content": [{"type": "text", "text": _HERE}]}])
        end = rendered.text.rindex(_HERE)
        # Tokenizers of the sentencepiece kind join the blank to the answer's first word.
        text = rendered.text[:end].rstrip(" ")
        images = [span for span in rendered.images if span[1] <= len(text)]
        return RenderedConversation(text, [], images, [place for place in rendered.breaks if place <= len(text)])

    def turns(self, messages: Sequence[Message]) -> tuple[str, list[Message]]:
        """The system's words, and the messages without the system's. A conversation's own system message stands in
        for the template's."""
        if messages and messages[0]["role"] == "system":
            return text_of(messages[0]), list(messages[1:])
        return self.system, list(messages)

    def content(self, message: Message) -> tuple[str, list[str]]:
        """What a message says, with an image token for each image, and the marked image tokens in it."""
        mark = self.image_token.join(self.image_marks)
        count = sum(entry["type"] == "image" for entry in message["content"])
        if not count:
            return text_of(message), []
        if self.image_position == "given":
            pieces = [mark if entry["type"] == "image" else entry["text"] or "" for entry in message["content"]]
            return "".join(pieces), [mark] * count
        text, images = text_of(message).strip(), "\n".join([mark] * count)
        ordered = [images, text] if self.image_position == "first" else [text, images]
        return "\n".join(piece for piece in ordered if piece), [mark] * count


_HERE = "\x00HERE\x00"

_REGISTRY: dict[str, type[Template]] = {}


def register_template(template: type[Template]) -> type[Template]:
    """Class decorator: makes a template known under its `name`.

    Raises:
        ValueError: it has no name, or another class has the same.
    """
    if not template.name:
        raise ValueError(f"{template.__name__} has no name")
    known = _REGISTRY.get(template.name)
    if known is not None and known.__qualname__ != template.__qualname__:
        raise ValueError(f"there is a template {template.name!r} already: {known.__qualname__}")
    _REGISTRY[template.name] = template
    return template


def template_names() -> list[str]:
    """Names that `make_template` knows."""
    return list(template_classes())


def template_classes() -> dict[str, type[Template]]:
    """The templates by their names."""
    from . import chat, cogvlm, instructblip, qwen_vl  # noqa: F401  register themselves

    return {name: _REGISTRY[name] for name in sorted(_REGISTRY)}


def make_template(template: "str | Template", processor: Any, **options: Any) -> Template:
    """A template by name, with the special tokens of a processor.

    Args:
        template: a name of `template_names()`; a `Template` is given back as it is.
        processor: has `image_token` and `tokenizer`.
        options: `system`, `image_position`, ….

    Raises:
        ValueError: unknown template; a tokenizer without image token; for `"chat"`, one without chat template.
    """
    if isinstance(template, Template):
        if options:
            raise ValueError(f"{', '.join(options)}: give options with a template's name, or to the template itself")
        return template
    names = template_names()
    if template not in names:
        raise ValueError(f"unknown template {template!r}; there are {', '.join(names)}")
    return _REGISTRY[template].for_processor(processor, **options)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def image_token_of(processor: Any) -> str:
    """The image token of a processor.

    Raises:
        ValueError: it has none, or its tokenizer does not know it as one token.
    """
    tokenizer = tokenizer_of(processor)
    token = getattr(processor, "image_token", None)
    if not token:
        raise ValueError(
            f"{type(processor).__name__} has no image_token; add one to its tokenizer: "
            f'tokenizer.add_special_tokens({{"additional_special_tokens": ["<image>"]}}), resize the model\'s '
            f'embeddings, and set processor.image_token = "<image>"'
        )
    number = tokenizer.convert_tokens_to_ids(str(token))
    if number is None or (number == tokenizer.unk_token_id and str(token) != tokenizer.unk_token):
        raise ValueError(
            f"the tokenizer has no token {str(token)!r}, which the processor puts where an image goes; add it: "
            f'tokenizer.add_special_tokens({{"additional_special_tokens": [{str(token)!r}]}}) and resize the '
            f"model's embeddings"
        )
    return str(token)


def _from_user(turns: list[Message]) -> list[Message]:
    """Without a first turn that is not the user's.

    In LLaVA's data such turns are rests of longer conversations.
    """
    return turns[1:] if turns and turns[0]["role"] == "assistant" else turns


@register_template
class PlainTemplate(Template):
    """`<image>caption⏎`: stage 1 of LLaVA. The user's words are left out; caption and line break are learned."""

    name = "plain"

    @property
    def end_of_turn(self) -> str:
        return "\n"

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        writer = Writer()
        _, turns = self.turns(messages)
        for message in turns:
            if message["role"] == "user":
                marks = self.content(message)[1]
                writer.add_images("".join(marks), marks)
            else:
                writer.add(self.content(message)[0] + "\n", learned=True)
        return writer.done()


class _ColonTemplate(Template):
    """`system USER: … ASSISTANT: …</s>USER: …`: what is learned of a turn is ` …</s>`."""

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        writer = Writer()
        system, turns = self.turns(messages)
        writer.add(f"{system} " if system else "")
        for message in _from_user(turns):
            text, marks = self.content(message)
            if message["role"] == "user":
                writer.add_images(f"USER: {text} ", marks)
            else:
                writer.add("ASSISTANT:").add(f" {text}{self.eos_token}", learned=True)
        return writer.done()


@register_template
class VicunaTemplate(_ColonTemplate):
    """The template of Vicuna 1.1 and LLaVA 1.5."""

    name = "vicuna_v1"
    default_system = SYSTEM_VICUNA


@register_template
class LlavaV1Template(_ColonTemplate):
    """Vicuna's, with a human in the system's words."""

    name = "llava_v1"
    default_system = SYSTEM_HUMAN


@register_template
class MmtagTemplate(_ColonTemplate):
    """Vicuna's, with `<Image>` and `</Image>` around each picture."""

    name = "v1_mmtag"
    default_system = SYSTEM_MMTAG
    image_marks = ("<Image>", "</Image>")


@register_template
class Version0Template(Template):
    """`### Human: …⏎### Assistant: …⏎### `: LLaVA's first. Learned are an answer and the `⏎###` that ends its turn.

    # Differs from the original: it also has in the loss the `###` in front of a first question, the words
    # `### Assistant:` before each answer, and, because its counting drifts by a token a turn, the ends of questions.
    """

    name = "v0"
    default_system = SYSTEM_HUMAN

    @property
    def end_of_turn(self) -> str:
        return "###"

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        writer = Writer()
        system, turns = self.turns(messages)
        writer.add(f"{system}\n\n")
        answered = False
        for message in turns:
            text, marks = self.content(message)
            writer.add("###", learned=answered).add(" ")
            answered = message["role"] == "assistant"
            if answered:
                writer.add("Assistant:").add(f" {text}\n", learned=True)
            else:
                writer.add_images(f"Human: {text}\n", marks)
        return writer.add("###", learned=answered).add(" ").done()


@register_template
class Llama2Template(Template):
    """`[INST] <<SYS>>⏎system⏎<</SYS>>⏎⏎… [/INST] … </s><s>[INST] …`: what is learned of a turn is ` … </s>`."""

    name = "llama_2"
    default_system = SYSTEM_LLAMA_2

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        writer = Writer()
        system, turns = self.turns(messages)
        for number, message in enumerate(_from_user(turns)):
            text, marks = self.content(message)
            if message["role"] == "assistant":
                writer.add(f" {text} {self.eos_token}", learned=True)
                continue
            if number:
                writer.add(self.bos_token)
            elif system:
                text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
            writer.add_images(f"[INST] {text} [/INST]", marks)
        return writer.done()


@register_template
class MptTemplate(Template):
    """`<|im_start|>user⏎…<|im_end|><|im_start|>assistant⏎…<|im_end|>`: learned are an answer and its `<|im_end|>`.

    # Differs from the original: since January 2024 it leaves out every conversation of this template, because it
    # does not count `<|im_end|>`; the masks here are those of the code before.
    """

    name = "mpt"
    default_system = SYSTEM_MPT

    @property
    def end_of_turn(self) -> str:
        return "<|im_end|>"

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        writer = Writer()
        system, turns = self.turns(messages)
        if system:
            writer.add(f"<|im_start|>system\n{system}<|im_end|>")
        for message in _from_user(turns):
            text, marks = self.content(message)
            writer.add(f"<|im_start|>{message['role']}\n")
            if message["role"] == "assistant":
                writer.add(f"{text}<|im_end|>", learned=True)
            else:
                writer.add_images(f"{text}<|im_end|>", marks)
        return writer.done()


def rendered_parts(rendered: RenderedConversation) -> list[tuple[str, str]]:
    """The text in pieces that are `"read"`, `"learned"` or `"image"`, for showing it."""
    kinds = ["read"] * len(rendered.text)
    for name, spans in (("learned", rendered.supervised), ("image", rendered.images)):
        for start, end in spans:
            kinds[start:end] = [name] * (end - start)
    parts: list[tuple[str, str]] = []
    for character, kind in zip(rendered.text, kinds):
        if parts and parts[-1][0] == kind:
            parts[-1] = (kind, parts[-1][1] + character)
        else:
            parts.append((kind, character))
    return parts
