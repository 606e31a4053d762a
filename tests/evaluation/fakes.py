"""Models whose every answer is known beforehand, and rows for them."""

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hf_vlp.models.retrieval import ImageEmbeds


def numbered_image(number: int) -> Image.Image:
    """A picture whose colour says which one it is."""
    return Image.new("RGB", (2, 2), (number % 256, number // 256, 7))


def number_of(pixels: Tensor) -> Tensor:
    """(B, 3) colours back to numbers (B,)."""
    return (pixels[:, 0] + 256 * pixels[:, 1]).round().long()


def rows_for(owners: list[int]) -> list[dict]:
    """Rows of images 0..n-1 where caption j, `"t<j>"`, belongs to image `owners[j]`."""
    return [
        {
            "image": numbered_image(image),
            "text": [f"t{j}" for j, owner in enumerate(owners) if owner == image],
            "image_id": f"image {image}",
        }
        for image in range(max(owners) + 1)
    ]


class FakeProcessor:
    """Pictures become their colour; the text `"t17"` becomes the tokens `[1, 17 + 10]`, longer for larger numbers."""

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(model_max_length=64, pad_token_id=0, padding_side="right")

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if images is not None:
            inputs["pixel_values"] = torch.stack([torch.tensor(image.getpixel((0, 0))).float() for image in images])
        if text is not None:
            ids = [[1, int(one[1:]) + 10, *[2] * (int(one[1:]) % 4)] for one in text]
            inputs["input_ids"] = [one[: options.get("max_length")] for one in ids]
        return inputs


class FakeRetrievalModel(nn.Module):
    """Similarity and matching score of image i and text j are entries of two matrices.

    Args:
        similarity: (I, U) or (I, Q, U).
        matching: (I, U) or None for a model without a matching head.
    """

    def __init__(self, similarity: Tensor, matching: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scores, self.matching = similarity, matching
        self.supports_matching = matching is not None
        self.images_encoded: list[int] = []
        self.pairs_scored: list[tuple[int, int]] = []
        self.texts_encoded: list[int] = []
        self.largest_block = 0

    def embed_images(self, pixel_values: Tensor) -> ImageEmbeds:
        numbers = number_of(pixel_values)
        self.images_encoded += numbers.tolist()
        return ImageEmbeds(self.scores[numbers], numbers[:, None].float())

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert bool((attention_mask[:, :2] == 1).all())
        self.texts_encoded += (input_ids[:, 1] - 10).tolist()
        return nn.functional.one_hot(input_ids[:, 1] - 10, self.scores.shape[-1]).float()

    def similarity(self, images: ImageEmbeds | Tensor, text_itc: Tensor) -> Tensor:
        itc = images if isinstance(images, Tensor) else images.itc
        self.largest_block = max(self.largest_block, len(itc))
        scores = itc @ text_itc.T
        return scores.amax(dim=1) if scores.ndim == 3 else scores

    def matching_scores(
        self, images: ImageEmbeds, image_index: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        numbers = images.states[image_index, 0].long()
        texts = input_ids[:, 1] - 10
        self.pairs_scored += list(zip(numbers.tolist(), texts.tolist()))
        return self.matching[numbers, texts]


class FakeWriter(nn.Module):
    """Writes, for the picture with number i, the ids `answers[i]`, behind the prompt like a decoder-only model."""

    def __init__(self, answers: list[str], repeat_prompt: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers, self.repeat_prompt = answers, repeat_prompt
        self.calls: list[dict[str, Any]] = []
        encoder_decoder = not repeat_prompt
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(is_encoder_decoder=encoder_decoder))

    def generate(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        self.calls.append(options | {"images": len(pixel_values), "training": self.training})
        rows = [[ord(c) for c in self.answers[number]] for number in number_of(pixel_values).tolist()]
        longest = max(map(len, rows))
        written = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
        return torch.cat([input_ids, written], dim=1) if self.repeat_prompt else written


class FakeWriterProcessor:
    """One id a character; 0 pads. Remembers the prompts and the side on which they were padded."""

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(padding_side="right")
        self.prompts: list[str] = []
        self.sides: set[str] = set()

    def __call__(self, images: Any, text: Any = None, **options: Any) -> dict[str, Tensor]:
        pixels = torch.stack([torch.tensor(image.getpixel((0, 0))).float() for image in images])
        text = [""] * len(images) if text is None else text
        self.prompts += text
        self.sides.add(self.tokenizer.padding_side)
        rows = [[3, *map(ord, one)] for one in text]
        longest = max(map(len, rows))
        left = self.tokenizer.padding_side == "left"
        padded = [[0] * (longest - len(r)) + r if left else r + [0] * (longest - len(r)) for r in rows]
        ids = torch.tensor(padded)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": (ids != 0).long()}

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(one) for one in row if one > 3) for row in ids.tolist()]
