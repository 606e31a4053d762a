"""What is retrieved from what: images, captions and who belongs to whom; and the captions' tokens and embeddings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_vlp.data.pairs import problem_of
from hf_vlp.data.records import BadRecord, texts_of, usable_text
from hf_vlp.evaluation.images import Failure, column, where
from hf_vlp.evaluation.runtime import batches_by_length, chunks, gather_lists, progress, shard


@dataclass
class Gallery:
    """Images and captions.

    Attributes:
        rows: for each image, the row that holds its picture.
        image_ids: for each image; the row where the data has none.
        texts: the different texts, each once.
        text_of: (T,) for each caption, its position in `texts`.
        image_of: (T,) for each caption, its image; ascending.
    """

    rows: list[int]
    image_ids: list[Any]
    texts: list[str]
    text_of: Tensor
    image_of: Tensor

    @classmethod
    def from_rows(cls, rows: Any) -> tuple["Gallery", list[Failure]]:
        """Reads captions and image ids, not the pictures; rows with the same `image_id` are one image.

        Args:
            rows: with a `text` column (a string or a list of strings) and perhaps `image_id`.

        Returns:
            The gallery of the images that have a usable caption, and a failure for each caption that is not usable
            and for each image that has none at all.

        Raises:
            ValueError: there is no `text` column.
        """
        ids = column(rows, "image_id", required=False)
        problems = column(rows, "problem", required=False)
        first_row: dict[Any, int] = {}
        captions: dict[Any, list[str]] = {}
        failures = []
        for row, value in enumerate(column(rows, "text")):
            key = ("row", row) if ids is None or ids[row] is None else ids[row]
            first_row.setdefault(key, row)
            own = captions.setdefault(key, [])
            given = texts_of(value)
            if not given:
                problem = problem_of({"problem": problems[row]}) if problems else None
                failures.append(_failure(rows, row, problem or BadRecord("text_missing")))
            for text in given:
                try:
                    own.append(usable_text(text))
                except BadRecord as error:
                    failures.append(_failure(rows, row, error))
        captions = {key: own for key, own in captions.items() if own}
        every = [text for own in captions.values() for text in own]
        position = {text: index for index, text in enumerate(dict.fromkeys(every))}
        gallery = cls(
            rows=[first_row[key] for key in captions],
            image_ids=[first_row[key] if isinstance(key, tuple) else key for key in captions],
            texts=list(position),
            text_of=torch.tensor([position[text] for text in every], dtype=torch.long),
            image_of=torch.tensor(
                [image for image, own in enumerate(captions.values()) for _ in own], dtype=torch.long
            ),
        )
        return gallery, failures

    def captions(self) -> list[list[str]]:
        """The captions of each image."""
        captions: list[list[str]] = [[] for _ in self.rows]
        for image, text in zip(self.image_of.tolist(), self.text_of.tolist()):
            captions[image].append(self.texts[text])
        return captions

    def without(self, rows: Iterable[int]) -> "Gallery":
        """The gallery without the images of some rows and without their captions."""
        gone = set(rows)
        kept = [image for image, row in enumerate(self.rows) if row not in gone]
        if len(kept) == len(self.rows):
            return self
        number = torch.full((len(self.rows),), -1)
        number[kept] = torch.arange(len(kept))
        captions = number[self.image_of] >= 0
        used, text_of = torch.unique(self.text_of[captions], return_inverse=True)
        return Gallery(
            rows=[self.rows[image] for image in kept],
            image_ids=[self.image_ids[image] for image in kept],
            texts=[self.texts[text] for text in used.tolist()],
            text_of=text_of,
            image_of=number[self.image_of[captions]],
        )


def _failure(rows: Any, row: int, error: BadRecord) -> Failure:
    return Failure(row, error.reason, error.detail, where(rows[row]))


@dataclass
class Tokens:
    """Token ids of texts, without padding.

    Attributes:
        ids: of each text.
        truncated: how many of the texts were cut.
        pad_token_id: what `padded` fills up with.
    """

    ids: list[list[int]]
    truncated: int
    pad_token_id: int

    def __post_init__(self) -> None:
        self.lengths = torch.tensor([len(one) for one in self.ids])

    def padded(self, texts: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (n, longest) of some of the texts, padded on the right."""
        longest = max(len(self.ids[text]) for text in texts)
        ids = torch.full((len(texts), longest), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(self.ids[text])] = torch.tensor(self.ids[text])
            mask[row, : len(self.ids[text])] = 1
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def longest_text(model: nn.Module, processor: Any) -> int:
    """How many tokens both the tokenizer and the text tower allow."""
    config = getattr(model, "config", None)
    tower = getattr(config, "qformer_config", None) or getattr(config, "text_config", None)
    limits = [processor.tokenizer.model_max_length, getattr(tower, "max_position_embeddings", None)]
    return min(int(limit) for limit in limits if limit is not None)


def tokenize(processor: Any, texts: Sequence[str], max_length: int, batch_size: int = 1024) -> Tokens:
    """Token ids of texts through the processor, cut at `max_length`."""
    ids: list[list[int]] = []
    truncated = 0
    for batch in chunks(texts, batch_size):
        # One token more than allowed shows which texts are longer.
        encoded = processor(text=list(batch), truncation=True, max_length=max_length + 1)["input_ids"]
        longer = [position for position, one in enumerate(encoded) if len(one) > max_length]
        if longer:
            cut = processor(text=[batch[p] for p in longer], truncation=True, max_length=max_length)["input_ids"]
            for position, one in zip(longer, cut):
                encoded[position] = one
        ids += [list(one) for one in encoded]
        truncated += len(longer)
    pad = processor.tokenizer.pad_token_id
    return Tokens(ids, truncated, 0 if pad is None else pad)


def embed_texts(
    model: nn.Module, tokens: Tokens, batch_size: int, device: torch.device, *, show_progress: bool = True
) -> Tensor:
    """Embeddings (texts, D) in float32 on the CPU; each process embeds its part, all get all."""
    own = shard(len(tokens.ids))
    batches = list(batches_by_length([len(tokens.ids[text]) for text in own], batch_size))
    order: list[int] = []
    parts: list[Tensor] = []
    for batch in progress(batches, "texts", show=show_progress):
        order += batch
        parts.append(model.embed_texts(**tokens.padded([own[position] for position in batch], device)).float().cpu())
    joined = None
    if parts:
        joined = torch.cat(parts)
        joined = torch.empty_like(joined).index_copy_(0, torch.tensor(order), joined)
    return torch.cat([part for part in gather_lists([joined]) if part is not None])
