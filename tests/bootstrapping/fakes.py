"""A captioner and a matcher that cost nothing: what they say is a fixed function of the picture and of the text."""

import time
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hf_vlp.models.retrieval import ImageEmbeds

_LETTERS = " abcdefghijklmnopqrstuvwxyz"
_FIRST = 4


def picture(number: int) -> Image.Image:
    """Pictures that differ by number."""
    return Image.new("RGB", (12, 10), (37 * number % 256, 91 * number % 256, 11 * number % 256))


def rows(count: int) -> list[dict[str, Any]]:
    """Pictures with one to three texts each."""
    return [
        {
            "image": picture(number),
            "text": [f"text {number} {'of many words ' * (number % 4)}{part}" for part in range(1 + number % 3)],
            "image_id": f"image{number}",
            "source": "fakes",
            "key": f"key{number}",
        }
        for number in range(count)
    ]


class FakeProcessor:
    """The colour of a picture as its pixels; one id a character. Fails on pictures one pixel wide."""

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(padding_side="right", model_max_length=200, pad_token_id=0)

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> dict[str, Any]:
        if images is None:
            return {"input_ids": [[1, *map(ord, one)][: options["max_length"]] for one in text]}
        if any(image.width == 1 for image in images):
            raise ValueError("height and width must be > 1")
        return {"pixel_values": torch.stack([torch.tensor(image.getpixel((0, 0))).float() for image in images]) / 255}

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
        return ["".join(_LETTERS[one - _FIRST] for one in row if one >= _FIRST) for row in ids.tolist()]


class FakeWriter(nn.Module):
    """Says letters whose scores follow from the picture and the letters before; 2 ends a text."""

    def __init__(self, seconds: float = 0.0, salt: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 1.0 + salt))
        self.seconds = seconds
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(is_encoder_decoder=True))
        self.batches: list[int] = []

    def generate(self, pixel_values: Tensor, **options: Any) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(len(pixel_values))
        time.sleep(self.seconds)
        copies = options.get("num_return_sequences", 1)
        colour = pixel_values.repeat_interleave(copies, dim=0).double() @ torch.tensor([1.0, 2.0, 3.0]).double()
        ids = torch.full((len(colour), 1), 1)
        ended = torch.zeros(len(colour), dtype=torch.bool)
        letters = torch.arange(_FIRST + len(_LETTERS)).double()
        for step in range(options["max_new_tokens"]):
            scores = 2 * torch.sin(letters * (1 + colour[:, None]) + ids[:, -1:] + step) * self.weight.double()
            scores[:, :2] = float("-inf")
            scores[:, 2] -= 1
            for change in options.get("logits_processor", ()):
                scores = change(ids, scores)
            token = torch.where(ended, torch.zeros(1, dtype=torch.long), scores.argmax(dim=-1))
            ended |= token == 2
            ids = torch.cat([ids, token[:, None]], dim=1)
            if bool(ended.all()):
                break
        return ids


class FakeJudge(nn.Module):
    """A probability and a cosine that follow from the picture's colour and the text's length."""

    supports_matching = True

    def __init__(self, seconds: float = 0.0, salt: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 1.0 + salt))
        self.seconds = seconds
        self.texts_scored = 0

    def embed_images(self, pixel_values: Tensor) -> ImageEmbeds:
        time.sleep(self.seconds)
        return ImageEmbeds(nn.functional.normalize(pixel_values + 0.1, dim=-1), pixel_values)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = attention_mask.sum(dim=1).float()
        return nn.functional.normalize(torch.stack([lengths, 20 - lengths, lengths % 5], dim=1), dim=-1)

    def similarity(self, images: ImageEmbeds | Tensor, text_itc: Tensor) -> Tensor:
        return (images if isinstance(images, Tensor) else images.itc) @ text_itc.T

    def matching_probabilities(
        self, images: ImageEmbeds, image_index: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        self.texts_scored += len(image_index)
        colour = images.states[image_index].double().sum(dim=1)
        return torch.sigmoid(4 * torch.sin(9 * colour + attention_mask.sum(dim=1)) * self.weight.double())
