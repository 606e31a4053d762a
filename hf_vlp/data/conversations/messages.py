"""One form for conversations, whatever form a file has them in: the chat messages of transformers.

A message is `{"role": "system"|"user"|"assistant", "content": [{"type": "text", "text": …} | {"type": "image"}]}`. The
n-th image entry of a conversation stands for the n-th of its images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

# Where LLaVA's data says that the picture goes.
IMAGE_MARK = "<image>"

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_INLINE = ("image", "path", "url", "image_url", "base64")


class MessagesError(ValueError):
    """What a record calls its conversation is none. The message says where."""


class ImageCountError(ValueError):
    """A conversation names more or fewer images than it has."""


def to_messages(turns: Any) -> tuple[list[Message], list[Any]]:
    """Messages of a conversation in LLaVA's form or in the chat form.

    - LLaVA: `[{"from": "human"|"gpt"|"system", "value": "…<image>…"}, …]`; each `<image>` becomes an image entry.
    - Chat: `[{"role": …, "content": "…" or [{"type": "text", "text": …}, {"type": "image"}, …]}, …]`; an image entry
      may hold its image (`image`, `path` or `url`). `<image>` in a content that is a string is an image as well, in a
      text entry it is the text that it says.

    Returns:
        The messages, and the images that entries held, in order.

    Raises:
        MessagesError: not a list of turns, an unknown role, a content of another kind, an image in a turn that is not
            the user's, or no turn of the assistant.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise MessagesError(f"the conversation is {_shown(turns)} instead of a list of turns")
    messages: list[Message] = []
    images: list[Any] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise MessagesError(f"turn {number} is {_shown(turn)} instead of an object with from and value")
        name = turn.get("role", turn.get("from"))
        role = _ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise MessagesError(f"turn {number} is by {name!r}, who is none of {', '.join(sorted(_ROLES))}")
        if role == "system" and number:
            raise MessagesError(f"turn {number} is by the system, which may speak only first")
        content = turn["content"] if "content" in turn else turn.get("value")
        entries = _entries(content, number)
        if role != "user" and any(entry["type"] == "image" for entry in entries):
            raise MessagesError(
                f"turn {number}, the {role}'s, has an image; models here answer in words, so images "
                "stand in turns of the user (human)"
            )
        for entry in entries:
            held = entry.pop("held", None)
            if held is not None:
                images.append(held)
        messages.append({"role": role, "content": entries})
    if all(message["role"] != "assistant" for message in messages):
        raise MessagesError("no turn is by the assistant (gpt), so there is nothing to learn")
    return messages, images


def count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many images the messages name."""
    return sum(entry["type"] == "image" for message in messages for entry in message["content"])


def check_images(messages: Sequence[Mapping[str, Any]], images: int, where: str) -> None:
    """Compares the images that messages name with those there are.

    Args:
        images: how many there are.
        where: the record, for the error.

    Raises:
        ImageCountError: another number.
    """
    named = count_images(messages)
    if named != images:
        raise ImageCountError(
            f"{where}: the conversation names {named} image{'s' * (named != 1)} but the record has {images}; write "
            f"{IMAGE_MARK} (or an entry of type image) once for each image"
        )


def text_of(message: Mapping[str, Any]) -> str:
    """The texts of a message one after the other, without its images."""
    return "".join(entry["text"] or "" for entry in message["content"] if entry["type"] == "text")


def _entries(content: Any, number: int) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return _split_at_marks(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise MessagesError(f"turn {number} says {_shown(content)}, which is neither a text nor a list of entries")
    entries = []
    for entry in content:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if kind == "text" and isinstance(entry.get("text"), str):
            entries.append({"type": "text", "text": entry["text"]})
        elif kind in ("image", "image_url"):
            held = next((entry[name] for name in _INLINE if entry.get(name) is not None), None)
            if isinstance(held, Mapping) and set(held) == {"url"}:
                held = held["url"]
            entries.append({"type": "image", "text": None, "held": held})
        else:
            raise MessagesError(f"turn {number} holds {_shown(entry)}, which is neither a text nor an image entry")
    return entries


def _split_at_marks(text: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            entries.append({"type": "image", "text": None})
        if piece:
            entries.append({"type": "text", "text": piece})
    return entries or [{"type": "text", "text": ""}]


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
