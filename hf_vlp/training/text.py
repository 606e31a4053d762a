"""Texts alone, for training the small language model that stage 2 of BLIP-2 then keeps frozen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as Rows
from torch.utils.data import Dataset

from hf_vlp.data.hashing import drawn_text
from hf_vlp.data.readers import JsonLinesFile, RawRecord
from hf_vlp.data.records import texts_of

# What ends a caption for OPT in stage 2, so the language model should have seen it as an end.
STOP = "\n"
# Parts a text into pieces that follow each other, each behind a begin token of its own.
BREAK = "\t"


def text_lines(path: str | Path) -> Rows:
    """The texts of a file as rows with a `text` column: its lines, or, if it is called .jsonl, what its lines have
    under "text", which may hold line breaks. Empty ones are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no text, or a line of it is not {"text": "…"}; the message names file and line.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        lines = [_text_of(path, record) for record in JsonLinesFile(path)]
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{path} has no line of text")
    return Rows.from_dict({"text": texts})


def _text_of(path: Path, record: RawRecord) -> str:
    text = (record.fields or {}).get("text")
    if not isinstance(text, str):
        raise ValueError(f'{path}, {record.key}: not an object with a text, such as {{"text": "a red star"}}')
    return text


class TextDataset(Dataset):
    """One text a row and epoch, drawn by (seed, epoch, index); images are not touched.

    Args:
        rows: with a `text` column (a string or a list).
        seed: of the draws.

    Raises:
        ValueError: a row has no text.
    """

    def __init__(self, rows: Any, *, seed: int = 0) -> None:
        self.rows = rows.select_columns(["text"]) if hasattr(rows, "select_columns") else rows
        self.seed = seed
        # Shared, so that workers that live on between epochs see the new one.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draws other texts."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        texts = [text for text in texts_of(self.rows[int(index)]["text"]) if isinstance(text, str) and text.strip()]
        if not texts:
            raise ValueError(f"row {index} has no text to train a language model on")
        return texts[drawn_text(self.seed, int(self._epoch[0]), int(index), len(texts))].strip()


class TextCollator:
    """A batch for a causal language model: `input_ids`, `attention_mask`, `labels` (-100 at padding).

    A text is preceded by the tokenizer's begin token and followed by the token that ends a caption in stage 2, a
    newline where the vocabulary has one, else the end token. A tab inside it stands for another begin token: what
    follows starts anew but can be read off what came before, as a caption in stage 2 is from the queries before its
    begin token.

    Args:
        tokenizer: of the language model, with a padding token.
        max_length: most tokens of a text.
    """

    def __init__(self, tokenizer: Any, *, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        stop = tokenizer(STOP, add_special_tokens=False)["input_ids"]
        self.stop = stop[0] if len(stop) == 1 else tokenizer.eos_token_id

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        rows = []
        for text in texts:
            pieces = [self.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split(BREAK)]
            ids = [token for piece in pieces for token in (*start, *piece)]
            rows.append([*ids, self.stop][: self.max_length])
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows])
        return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
