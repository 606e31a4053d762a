"""From conversations to a batch: pictures decoded, texts masked, lengths padded or packed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..collators import Batch, Record, RecordCollator, tokenizer_limit
from ..images import decode_image
from ..pairs import problem_of
from ..records import BadRecord, RecordReport
from .encoding import IGNORED, EncodedConversation, encode_conversation
from .messages import MessagesError, check_images, to_messages
from .packing import pack_lengths
from .templates import Template, make_template, tokenizer_of


class ConversationCollator(RecordCollator):
    """Conversations for a language model that sees.

    A batch holds the tensors of `processor.prepare_images` over all its pictures (`pixel_values`, …; none if it has no
    picture), and

    - `input_ids` (B, L) with as many image tokens as each picture has features, `attention_mask` (B, L), `labels`
      (B, L) with -100 everywhere but on the assistant's tokens and what ends its turns; padded on the right;
    - with `pack_to`, conversations laid end to end in rows of at most that many tokens: `sequence_ids` (B, L), 1, 2, …
      for the conversations of a row and 0 for padding, and `position_ids` (B, L), which begin at 0 in each. Pictures
      are in the order of their tokens.

    Conversations longer than `max_length` are cut at their end, never inside a picture. One that has nothing to learn
    left is left out and counted (`labels_missing`).

    Args:
        processor: has `image_token`, `tokenizer` and
            `prepare_images(list of PIL images) -> (features, image tokens of each)`; may have
            `complete_conversations(batch) -> batch`, which adds what its model needs besides.
        template: a name of `template_names()`, or a `Template`.
        template_options: `system`, `image_position`, … of a template given by name.
        max_length: most tokens of a conversation, images included; the tokenizer's own limit if left out.
        pack_to: tokens of a row; no packing if left out.
        options: `limits`, `transform`, `prepare`, `background` as in `ImageTextCollator`.

    Raises:
        ValueError: unknown template, a tokenizer without image token, one without chat template, lengths below 1.
        TypeError: the processor has no `prepare_images`.
    """

    gives_image_ids = False

    def __init__(
        self,
        processor: Any,
        *,
        template: str | Template = "vicuna_v1",
        template_options: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        pack_to: int | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(processor, "prepare_images"):
            raise TypeError(
                f"{type(processor).__name__} has no prepare_images(images); conversations need a processor of a model "
                f"that chats about images, such as hf_vlp's LlavaProcessor"
            )
        for name, value in (("max_length", max_length), ("pack_to", pack_to)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1 token")
        super().__init__(processor, max_length=max_length, **options)
        self.template = make_template(template, processor, **(template_options or {}))
        self.pack_to = pack_to
        lengths = [length for length in (max_length or tokenizer_limit(processor), pack_to) if length is not None]
        self.longest = min(lengths, default=None)
        tokenizer = tokenizer_of(processor)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_id = 0 if pad is None else pad

    def encode(self, record: Mapping[str, Any]) -> EncodedConversation:
        """Token ids and labels of a record, with one token an image.

        Raises:
            BadRecord: it has no conversation that can be read.
            ImageCountError: it names more or fewer images than it has.
        """
        where = f"{record.get('source', 'rows')} [{record.get('key', record.get('index', '?'))}]"
        try:
            messages, _ = to_messages(record.get("messages"))
        except MessagesError as error:
            raise BadRecord("messages_wrong", str(error)) from None
        check_images(messages, len(record.get("images") or ()), where)
        return encode_conversation(self.template.render(messages), self.template, self.processor, where=where)

    def _read(self, record: Record) -> tuple[list[Image.Image], EncodedConversation]:
        problem = problem_of(record)
        if problem is not None:
            raise problem
        encoded = self.encode(record)
        images = []
        transform = record.get("transform") or self.transform
        for number, held in enumerate(record.get("images") or ()):
            image = decode_image(held, self.limits, self.background)
            images.append(image if transform is None else transform(image, record.get("seed", 0) + number))
        return images, encoded

    def _encode(self, images: list[list[Image.Image]], texts: list[Any]) -> Mapping[str, Any]:
        flat = [image for listed in images for image in listed]
        if not flat:
            return {"features": {}, "counts": [[] for _ in images]}
        features, counts = self.processor.prepare_images(flat)
        if len(counts) != len(flat):
            raise ValueError(
                f"{type(self.processor).__name__}.prepare_images gave {len(counts)} numbers of image tokens for "
                f"{len(flat)} images"
            )
        numbers = iter(counts)
        return {"features": dict(features), "counts": [[int(next(numbers)) for _ in listed] for listed in images]}

    def _process(
        self, kept: list[Record], images: list[Any], texts: list[Any], report: RecordReport
    ) -> tuple[Batch, list[Record]]:
        read = {id(record): (listed, text) for record, listed, text in zip(kept, images, texts, strict=True)}
        prepared, kept = super()._process(kept, images, texts, report)
        conversations: list[_Conversation] = []
        usable, first = [], 0
        for record, counts in zip(kept, prepared["counts"], strict=True):
            listed, encoded = read[id(record)]
            ids, labels, left = encoded.expanded(counts, self.longest)
            # The first token is nobody's to predict, and in a row it would be its neighbour's.
            labels[:1] = [IGNORED] * len(labels[:1])
            if any(label != IGNORED for label in labels):
                usable.append(record)
                conversations.append(_Conversation(ids, labels, list(range(first, first + left)), listed[:left]))
            else:
                self._nothing_to_learn(record, encoded, sum(counts), report)
            first += len(counts)
        if not usable:
            return {}, []
        batch = self._batch(conversations, prepared["features"], first)
        self.keys = frozenset(batch)
        return batch, usable

    def _nothing_to_learn(
        self, record: Record, encoded: EncodedConversation, image_tokens: int, report: RecordReport
    ) -> None:
        total = len(encoded.input_ids) - len(encoded.placeholders) + image_tokens
        detail = (
            f"the {total} tokens, {image_tokens} of them of images, were cut to {self.longest}"
            if self.longest is not None and total > self.longest
            else "the template learns nothing of it"
        )
        source, key = str(record.get("source", "rows")), str(record.get("key", record.get("index", "?")))
        report.add_bad(BadRecord("labels_missing", detail), source, key, self.limits.max_examples)

    def _batch(self, conversations: "list[_Conversation]", features: Mapping[str, Any], images: int) -> Batch:
        if self.pack_to is None:
            rows = [[number] for number in range(len(conversations))]
        else:
            rows = pack_lengths([len(conversation.ids) for conversation in conversations], self.pack_to)
        width = max(sum(len(conversations[number].ids) for number in row) for row in rows)
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        sequence_ids = torch.zeros(shape, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        for row, numbers in enumerate(rows):
            start = 0
            for sequence, number in enumerate(numbers, start=1):
                conversation = conversations[number]
                span = slice(start, start + len(conversation.ids))
                input_ids[row, span] = torch.tensor(conversation.ids)
                labels[row, span] = torch.tensor(conversation.labels)
                sequence_ids[row, span] = sequence
                position_ids[row, span] = torch.arange(len(conversation.ids))
                start = span.stop
        order = [
            number for row in rows for conversation in row for number in conversations[conversation].image_numbers
        ]
        batch: Batch = self._images(conversations, rows, order, features, images)
        batch |= {"input_ids": input_ids, "attention_mask": (sequence_ids > 0).long(), "labels": labels}
        if self.pack_to is not None:
            batch |= {"sequence_ids": sequence_ids, "position_ids": position_ids}
        complete = getattr(self.processor, "complete_conversations", None)
        return batch if complete is None else complete(batch)

    def _images(
        self,
        conversations: "list[_Conversation]",
        rows: Sequence[Sequence[int]],
        order: list[int],
        features: Mapping[str, Any],
        images: int,
    ) -> Batch:
        """The features of the images that are left, in the order of their tokens."""
        if not order:
            return {}
        if order == list(range(images)):
            return dict(features)
        if all(isinstance(value, Tensor) and value.shape[:1] == (images,) for value in features.values()):
            chosen = torch.tensor(order)
            return {name: value[chosen] for name, value in features.items()}
        # Features that are not one entry an image can only be made anew.
        pictures = [image for row in rows for number in row for image in conversations[number].images]
        return dict(self.processor.prepare_images(pictures)[0])


class _Conversation:
    """What the collator keeps of a conversation until all are known."""

    def __init__(self, ids: list[int], labels: list[int], image_numbers: list[int], images: list[Image.Image]) -> None:
        self.ids, self.labels, self.image_numbers, self.images = ids, labels, image_numbers, images
