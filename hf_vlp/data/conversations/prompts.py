"""Conversations up to the assistant's next answer, as a batch to generate from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from .encoding import encode_conversation
from .messages import Message, check_images
from .templates import Template, tokenizer_of


def prompt_batch(
    processor: Any,
    template: Template,
    conversations: Sequence[tuple[Sequence[Image.Image], Sequence[Message]]],
    *,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The inputs of `generate` for conversations that end with a question: padded on the left.

    Args:
        processor: as of `ConversationCollator`.
        template: from `make_template`.
        conversations: pictures and messages of each.
        names: what each is called in errors.

    Returns:
        `input_ids` and `attention_mask` (B, L), and what `processor.prepare_images` makes of the pictures.

    Raises:
        ValueError: no conversation, or one that ends with the assistant's turn.
        ImageCountError: a conversation names more or fewer images than it has.
    """
    if not conversations:
        raise ValueError("there is no conversation to go on with")
    names = names or [f"conversation {number}" for number in range(len(conversations))]
    pictures = [picture for held, _ in conversations for picture in held]
    batch: dict[str, Any] = {}
    counts: list[int] = []
    if pictures:
        features, counts = processor.prepare_images(pictures)
        batch.update(features)
    left = iter(counts)
    rows: list[list[int]] = []
    for name, (held, messages) in zip(names, conversations, strict=True):
        if messages[-1]["role"] != "user":
            raise ValueError(f"{name}: the last turn is the {messages[-1]['role']}'s; a prompt ends with the user's")
        check_images(messages, len(held), name)
        encoded = encode_conversation(template.prompt(messages), template, processor, where=name)
        rows.append(encoded.expanded([next(left) for _ in held])[0])
    tokenizer = tokenizer_of(processor)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    width = max(map(len, rows))
    batch["input_ids"] = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    batch["attention_mask"] = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    complete = getattr(processor, "complete_conversations", None)
    return batch if complete is None else complete(batch)


def stop_ids(processor: Any, template: Template) -> list[int]:
    """Tokens at which an answer is over: the end of a sequence, and what ends a turn of the template if that is one
    token."""
    tokenizer = tokenizer_of(processor)
    ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if template.end_of_turn:
        pieces = tokenizer(template.end_of_turn, add_special_tokens=False).input_ids
        if len(pieces) == 1 and pieces[0] not in ids:
            ids.append(pieces[0])
    return ids


def answer_text(processor: Any, template: Template, ids: Any) -> str:
    """The words of a generated answer, without what ends the turn and all behind it.

    Args:
        ids: generated tokens, without the prompt.
    """
    tokenizer = tokenizer_of(processor)
    stops = set(stop_ids(processor, template))
    kept = []
    for number in ids.tolist():
        if number in stops:
            break
        kept.append(number)
    text = tokenizer.decode(kept, skip_special_tokens=True)
    end = template.end_of_turn.strip()
    return (text.split(end)[0] if end else text).strip()


def replaced_answers(messages: Sequence[Message], answers: Mapping[int, str]) -> list[Message]:
    """Messages in which the assistant's turns say something else.

    Args:
        answers: number of the assistant's turn, from 0 -> what it says.
    """
    made, turn = [], 0
    for message in messages:
        if message["role"] == "assistant":
            if turn in answers:
                message = {"role": "assistant", "content": [{"type": "text", "text": answers[turn]}]}
            turn += 1
        made.append(message)
    return made
