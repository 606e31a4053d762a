"""ALBEF's processor: cleaning, [CLS] without [SEP], answers, images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertTokenizer

from hf_vlp.models.albef.processing_albef import AlbefProcessor, clean_caption
from tests.tiny import albef as tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s", "person", "left"]


@pytest.fixture
def processor() -> AlbefProcessor:
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=20)
    return AlbefProcessor.for_image_size(tokenizer, 32)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A red-circle!", "a red circle"),
        ("  <person>   on the  left/right (of a 'thing').\n", "person on the left right of a thing"),
        ('Who\'s "there"?; #1 ~ *: ok', "whos there 1 ok"),
        ("...", ""),
    ],
)
def test_captions_are_cleaned(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


def test_captions_are_cut_after_so_many_words() -> None:
    assert clean_caption("a b c d", 2) == "a b"


def test_texts_have_cls_and_no_sep(processor: AlbefProcessor) -> None:
    batch = processor(text=["A red circles.", "a"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 8], [2, 5, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert processor.tokenizer("a red")["input_ids"] == [2, 5, 6]
    cut = processor(text=["a red circles"], truncation=True, max_length=3)
    assert cut["input_ids"] == [[2, 5, 6]]
    wide = processor(text=["a"], padding="max_length", max_length=4)
    assert wide["input_ids"] == [[2, 5, 0, 0]]
    assert processor(text="a red")["input_ids"] == [2, 5, 6]


def test_sep_when_asked_for() -> None:
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    processor = AlbefProcessor.for_image_size(tokenizer, 32, add_sep=True)
    assert processor(text=["a red circles"], truncation=True, max_length=4)["input_ids"] == [[2, 5, 6, 3]]
    assert processor.tokenizer is tokenizer


def test_answers_start_with_cls_and_end_with_sep(processor: AlbefProcessor) -> None:
    answers = processor.encode_answers(["red", "a red circles"], max_length=4)
    assert answers["labels"].tolist() == [[2, 6, 3, 0], [2, 5, 6, 3]]
    assert answers["labels_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert processor.decode_answers(answers["labels"]) == ["red", "a red"]


def test_images_become_normalised_squares(processor: AlbefProcessor) -> None:
    image = Image.fromarray(np.full((20, 50, 3), 255, dtype=np.uint8))
    pixels = processor(images=[image, image.convert("L")], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    white = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(pixels[0, :, 5, 5], white, atol=1e-5, rtol=1e-5)
    assert torch.equal(pixels[0], pixels[1])


def test_saved_processor_does_the_same(processor: AlbefProcessor, tmp_path: Path) -> None:
    processor.max_words = 2
    processor.save_pretrained(tmp_path)
    again = AlbefProcessor.from_pretrained(tmp_path)
    texts = ["a red circles", "A <person>!"]
    assert again(text=texts)["input_ids"] == processor(text=texts)["input_ids"] == [[2, 5, 6], [2, 5, 9]]
    assert AutoTokenizer.from_pretrained(tmp_path)("a red")["input_ids"] == [2, 5, 6]
    assert again.tokenizer.model_max_length == 20
    image = Image.new("RGB", (40, 40), "red")
    pixels = [one(images=image, return_tensors="pt")["pixel_values"] for one in (processor, again)]
    assert torch.equal(*pixels)


def test_nothing_is_an_error(processor: AlbefProcessor) -> None:
    with pytest.raises(ValueError, match="images, text, or both"):
        processor()


def test_config_takes_the_tokenizers_ids(processor: AlbefProcessor) -> None:
    config = tiny.albef_config().with_decoder()
    config.use_tokenizer(processor.tokenizer)
    text = config.text_config
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id, text.mask_token_id) == (0, 2, 3, 4)
    assert config.decoder_config.eos_token_id == 3
    config.text_config.vocab_size = 5
    with pytest.raises(ValueError, match="has 11 tokens, the text tower 5"):
        config.use_tokenizer(processor.tokenizer)
    processor.tokenizer.mask_token = None
    with pytest.raises(ValueError, match="has no \\['mask_token'\\]"):
        config.use_tokenizer(processor.tokenizer)
