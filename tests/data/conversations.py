"""A processor of pictures and words for tests of conversations: pictures to numbers, words to tokens with offsets."""

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(adds_bos: bool = True, special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [one for one in special if one not in SPECIAL[:4]]})
    return tokenizer


class TinyProcessor(SimpleNamespace):
    """Pictures to (3, 2, 2); a picture w pixels wide has w image tokens."""

    def __init__(self, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(tokenizer=tokenizer or byte_tokenizer(), image_token="<image>", calls=[], **options)

    def prepare_images(self, images: list) -> tuple[dict[str, torch.Tensor], list[int]]:
        self.calls.append(len(images))
        pixels = torch.stack([torch.full((3, 2, 2), float(image.width)) for image in images])
        return {"pixel_values": pixels}, [image.width for image in images]


def picture(width: int = 3) -> Image.Image:
    """A picture that counts for `width` tokens."""
    return Image.new("RGB", (width, 4), (width, 2 * width, 9))


def record(*turns: str, images: tuple[int, ...] = (), key: str = "0", **more: Any) -> dict[str, Any]:
    """A record of turns of user and assistant, the user's first; `<image>` in a turn is a picture."""
    from hf_vlp.data.conversations import to_messages

    spoken = [{"from": ("human", "gpt")[place % 2], "value": said} for place, said in enumerate(turns)]
    held = [picture(width) for width in images]
    return {"images": held, "messages": to_messages(spoken)[0], "source": "test", "key": key, **more}


def learned_texts(tokenizer: Any, ids: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """The learned stretches of one row, in words."""
    texts, held = [], []
    for number, label in zip([*ids.tolist(), 0], [*labels.tolist(), -100], strict=True):
        if label != -100:
            held.append(number)
        elif held:
            texts.append(tokenizer.decode(held))
            held = []
    return texts
