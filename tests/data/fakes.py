"""A processor of a few lines, for tests of what happens around it."""

import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class TinyProcessor:
    """Pictures to 8 x 8, words to numbers; refuses the word "poison" as a processor with a bug would."""

    def __init__(self, model_max_length: int = 16) -> None:
        self.tokenizer = SimpleNamespace(model_max_length=model_max_length)
        self.calls = 0

    def __call__(self, images: list, text: list, padding: str, truncation: bool, max_length: int, return_tensors: str):
        assert (padding, return_tensors) == ("longest", "pt")
        self.calls += 1
        if any("poison" in one for one in text):
            raise KeyError("poison")
        ids = [[1 + zlib.crc32(word.encode()) % 1000 for word in one.split()] for one in text]
        if truncation:
            ids = [one[:max_length] for one in ids]
        longest = max(map(len, ids))
        pixels = [np.asarray(image.resize((8, 8)), np.float32).transpose(2, 0, 1) for image in images]
        return {
            "input_ids": torch.tensor([one + [0] * (longest - len(one)) for one in ids]),
            "attention_mask": torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids]),
            "token_type_ids": torch.zeros(len(ids), longest, dtype=torch.int64),
            "pixel_values": torch.from_numpy(np.stack(pixels)),
        }

    def training_inputs(self, images: list, texts: list, prompt: str = "", max_length: int | None = None) -> Any:
        longest = max_length or self.tokenizer.model_max_length
        text = [f"{prompt} {one}".strip() for one in texts]
        batch = self(images, text, "longest", True, longest, "pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch
