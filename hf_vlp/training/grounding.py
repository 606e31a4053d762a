"""Captions and referring expressions as conversations, with boxes in the text: what grounding models learn from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_vlp.data.conversations.datasets import conversation_record
from hf_vlp.data.hashing import drawn_text, stable_hash
from hf_vlp.data.images import decode_image
from hf_vlp.data.pairs import ImageTransform
from hf_vlp.data.records import BadRecord, RecordLimits, texts_of

WriteBoxes = Callable[[Sequence[Sequence[float]], tuple[int, int]], str]


class _Conversations(Dataset):
    """Records of conversations over other rows; drawn by (seed, epoch, index)."""

    def __init__(self, rows: Any, columns: Sequence[str], seed: int) -> None:
        names = getattr(rows, "column_names", None)
        missing = [name for name in columns if names is not None and name not in names]
        if missing:
            raise ValueError(f"rows need the columns {', '.join(columns)} but have {names}")
        self.rows, self.seed = rows, seed
        # Shared, so that workers that live on between epochs see the new one.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the draws of another epoch."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.rows)


class CaptionConversations(_Conversations):
    """Pairs as conversations: nothing is asked, and the answer is one of the texts.

    Args:
        rows: of `load_pairs`.
        prompt: what is asked instead of nothing.
        seed: of the drawn texts and of the augmentation.
        transform: augmentation of the images.
    """

    def __init__(self, rows: Any, *, prompt: str = "", seed: int = 0, transform: ImageTransform | None = None) -> None:
        super().__init__(rows, ("image", "text"), seed)
        self.prompt, self.transform = prompt, transform

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, epoch = self.rows[int(index)], int(self._epoch[0])
        texts = texts_of(row["text"])
        text = texts[drawn_text(self.seed, epoch, int(index), len(texts))] if texts else None
        record = _exchange(row, row["image"], self.prompt, text)
        if not (isinstance(text, str) and text.strip()):
            record["problem"] = "text_missing: the row has no text"
        return conversation_record(record, int(index), self.seed, epoch, self.transform)


class GroundingConversations(_Conversations):
    """Referring expressions as conversations: where is what the text says, or what is in the box.

    Images are not augmented, as boxes would have to follow.

    Args:
        rows: of `load_task("grounding", ...)`: `image`, `text`, `boxes` in pixels.
        write: (boxes, (width, height)) to text; it raises for a box that is not inside the image.
        locate: question for the boxes of a text, with `{}` for the text.
        describe: question for the text of boxes, with `{}` for the boxes; None: never asked.
        share_described: of the questions that ask for the text.
        seed: of the draws.
    """

    def __init__(
        self,
        rows: Any,
        *,
        write: WriteBoxes,
        locate: str,
        describe: str | None = None,
        share_described: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(rows, ("image", "text", "boxes"), seed)
        self.write, self.locate, self.describe, self.share_described = write, locate, describe, share_described

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, epoch = int(index), int(self._epoch[0])
        row = self.rows[index]
        image, problem, boxes = row["image"], row.get("problem"), ""
        try:
            image = decode_image(image, RecordLimits())
        except BadRecord as error:
            problem = f"{error.reason}: {error.detail}"
        else:
            try:
                boxes = self.write(row["boxes"], image.size)
            except ValueError as error:
                raise ValueError(f"{row.get('source', 'rows')} [{row.get('key', index)}]: {error}") from error
        draw = stable_hash("grounding", self.seed, epoch, index) % 10_000
        if self.describe is not None and draw < 10_000 * self.share_described:
            record = _exchange(row, image, self.describe.format(boxes), row["text"])
        else:
            record = _exchange(row, image, self.locate.format(row["text"]), boxes)
        record["problem"] = problem
        return conversation_record(record, index, self.seed, epoch)


class MixedDataset(Dataset):
    """Several map-style datasets one after another, each with its own epoch.

    Args:
        parts: the datasets.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.rows = _JoinedRows([part.rows for part in self.parts])

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on."""
        for part in self.parts:
            part.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, place = _place(self.parts, int(index))
        # Records of two parts must not have one name, from which a batch's order may be drawn.
        return {**self.parts[part][place], "index": int(index)}


class _JoinedRows:
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part, place = _place(self.parts, int(index))
        return self.parts[part][place]


def _place(parts: Sequence[Any], index: int) -> tuple[int, int]:
    for number, part in enumerate(parts):
        if index < len(part):
            return number, index
        index -= len(part)
    raise IndexError(index)


def _exchange(row: Mapping[str, Any], image: Any, question: str, answer: str | None) -> dict[str, Any]:
    asked: list[dict[str, Any]] = [{"type": "image", "text": None}]
    if question:
        asked.append({"type": "text", "text": question})
    return {
        "images": [image],
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer or ""}]},
        ],
        "source": row.get("source"),
        "key": row.get("key"),
        "problem": row.get("problem"),
    }
