"""From a rendered conversation to token ids and labels, and from image tokens to as many as an image has features."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .messages import ImageCountError
from .templates import RenderedConversation, Span, Template, tokenizer_of

IGNORED = -100


@dataclass
class EncodedConversation:
    """Token ids of a conversation with one image token an image.

    Attributes:
        input_ids: L ids.
        labels: L ids, -100 where nothing is learned.
        placeholders: place of each image token, in order.
        units: [start, end) of the tokens that belong to each image: the image token and the marks around it.
    """

    input_ids: list[int]
    labels: list[int]
    placeholders: list[int]
    units: list[Span]

    @property
    def supervised(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels)

    def expanded(self, counts: Sequence[int], max_length: int | None = None) -> tuple[list[int], list[int], int]:
        """The conversation with as many image tokens as there are image features.

        Args:
            counts: image tokens of each image.
            max_length: most tokens; a longer conversation is cut at its end, and an image that does not fit whole is
                left out with everything behind it.

        Returns:
            Token ids, labels, and how many of the images are still there.
        """
        ids: list[int] = []
        labels: list[int] = []
        done = kept = 0
        for place, (start, end), count in zip(self.placeholders, self.units, counts, strict=True):
            ids += self.input_ids[done:start]
            labels += self.labels[done:start]
            unit = self.input_ids[start:place] + [self.input_ids[place]] * count + self.input_ids[place + 1 : end]
            if max_length is not None and len(ids) + len(unit) > max_length:
                return ids[:max_length], labels[:max_length], kept
            ids += unit
            labels += [IGNORED] * len(unit)
            done, kept = end, kept + 1
        ids += self.input_ids[done:]
        labels += self.labels[done:]
        return ids[:max_length], labels[:max_length], kept


def encode_conversation(
    rendered: RenderedConversation, template: Template, processor: Any, *, where: str = "the conversation"
) -> EncodedConversation:
    """Token ids and labels of a rendered conversation.

    A token is learned if it begins inside a learned span of the text.

    Args:
        rendered: what `template.render` made.
        template: says whether the first token of a text (<s>) is added and texts are cut at images.
        processor: has `tokenizer`, a fast one or another that gives offsets.
        where: the record, for errors.

    Raises:
        ImageCountError: a text says the image token although there is no image, or the other way round.
        ValueError: the tokenizer gives no offsets.
    """
    tokenizer = tokenizer_of(processor)
    image_id = tokenizer.convert_tokens_to_ids(template.image_token)
    text, token = rendered.text, template.image_token
    marks = [text.index(token, start, end) for start, end in rendered.images]
    behind_images = {mark + len(token) for mark in marks} if template.cuts_at_images else set()
    cuts = {0, len(text), *rendered.breaks}
    if template.cuts_at_images:
        cuts |= {*marks, *behind_images}
    starts = sorted(cuts)
    pieces = [(start, text[start:end]) for start, end in zip(starts, starts[1:])]
    # SentencePiece puts its blank before any text, so LLaVA's ids of " ASSISTANT:" behind an image begin with two.
    # Tokenizers that put none before a blank are given that one.
    blank = {start for start, piece in pieces if start in behind_images and piece.startswith(" ")}
    if blank and not _takes_blank_for_its_own(tokenizer):
        blank = set()
    texts = [" " * (start in blank) + piece for start, piece in pieces if piece != token]
    tokenized = iter(_tokenized(tokenizer, texts))
    ids = leading_ids(tokenizer) if template.adds_bos and not _begins_with_bos(tokenizer, text) else []
    offsets = [-1] * len(ids)
    for start, piece in pieces:
        if piece == token:
            ids.append(image_id)
            offsets.append(start)
            continue
        piece_ids, piece_offsets = next(tokenized)
        ids += piece_ids
        offsets += [start + max(0, offset - (start in blank)) for offset in piece_offsets]
    placeholders = [place for place, number in enumerate(ids) if number == image_id]
    if len(placeholders) != len(marks):
        raise ImageCountError(
            f"{where}: {len(placeholders)} image tokens for {len(marks)} images; a text of the conversation holds "
            f"{token!r}, the token that stands for an image"
        )
    units = []
    for place, (start, end) in zip(placeholders, rendered.images):
        first = last = place
        while first > 0 and offsets[first - 1] >= start:
            first -= 1
        while last + 1 < len(ids) and offsets[last + 1] < end:
            last += 1
        units.append((first, last + 1))
    labels = [number if _inside(rendered.supervised, offset) else IGNORED for number, offset in zip(ids, offsets)]
    return EncodedConversation(ids, labels, placeholders, units)


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: <s> or nothing."""
    ids = tokenizer("").input_ids
    bos = tokenizer.bos_token_id
    return list(ids[: ids.index(bos) + 1]) if bos is not None and bos in ids else []


def _begins_with_bos(tokenizer: Any, text: str) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _takes_blank_for_its_own(tokenizer: Any) -> bool:
    """Whether this is a SentencePiece that puts its blank in front of a text only if the text begins with none."""
    alone, behind = tokenizer(["a", " a"], add_special_tokens=False).input_ids
    return alone == behind and tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")


def _tokenized(tokenizer: Any, pieces: list[str]) -> list[tuple[list[int], list[int]]]:
    """Ids of each piece and the character at which each token begins."""
    if not pieces:
        return []
    try:
        encoded = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
    except NotImplementedError:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters its tokens stand for; use the fast tokenizer "
            f"(AutoTokenizer.from_pretrained(..., use_fast=True))"
        ) from None
    return [
        (list(ids), [start for start, _ in offsets])
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"])
    ]


def _inside(spans: Sequence[Span], offset: int) -> bool:
    place = bisect_right(spans, (offset, float("inf"))) - 1
    return place >= 0 and spans[place][0] <= offset < spans[place][1]
