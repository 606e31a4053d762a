"""CLIP's tokenizer, image processor and processor."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, CLIPTokenizer

from hf_vlp.models.clip.image_processing_clip import CLIPImageProcessorPil, center_crop, resized_size
from hf_vlp.models.clip.processing_clip import CLIPProcessor
from hf_vlp.models.clip.prompts_clip import TEMPLATES
from hf_vlp.models.clip.tokenization_clip import (
    clean_text,
    clip_tokenizer_from_bpe_file,
    tokenize,
    train_clip_tokenizer,
)
from tests.tiny import clip as tiny


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    return tiny.processor()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A  Photo\tof\n a CAT ", "a photo of a cat"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("itâ€™s schÃ¶n", "it's schön"),
        ("ﬁne", "fine"),
        ("", ""),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


def test_trained_tokenizer_has_clips_layout() -> None:
    tokenizer = train_clip_tokenizer(tiny.TEXTS, 560)
    assert type(tokenizer) is CLIPTokenizer and 514 < len(tokenizer) <= 560
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens([0, 256, 512]) == ["!", "!</w>", tokenizer.convert_ids_to_tokens(512)]
    ids = tokenizer("a red circle")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]


@pytest.mark.parametrize("text", ["zebra", "日本語 текст", "😀!?", "½ ² ™", "it's we'll", "a" * 30])
def test_no_text_is_unknown_to_a_trained_tokenizer(text: str) -> None:
    """An unknown symbol would become the end token, which the text tower pools."""
    tokenizer = train_clip_tokenizer(["nothing of the kind"], 530)
    ids = tokenizer(clean_text(text), add_special_tokens=False)["input_ids"]
    assert ids and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == clean_text(text).replace(" ", "")


def test_training_is_deterministic_and_merges_what_is_frequent() -> None:
    first, second = (train_clip_tokenizer(tiny.TEXTS * 5, 600) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first("a red circle above a blue square")["input_ids"]) == 9
    with pytest.raises(ValueError, match="at least 514"):
        train_clip_tokenizer(tiny.TEXTS, 513)
    assert len(train_clip_tokenizer([], 514)) == 514


def test_public_vocabulary_file(tmp_path: Path) -> None:
    """A file of the public format, with invented merges: which lines are used, in which order of ids."""
    merges = [f"{chr(97 + i % 26)} {chr(97 + i // 26 % 26)}{'x' * (i // 676)}</w>" for i in range(48894)]
    lines = ['"header', *merges, *("late merge" for _ in range(10))]
    for name, data in (("bpe.txt", "\n".join(lines).encode()), ("bpe.gz", gzip.compress("\n".join(lines).encode()))):
        (tmp_path / name).write_bytes(data)
        tokenizer = clip_tokenizer_from_bpe_file(tmp_path / name)
        assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
        assert tokenizer("!", add_special_tokens=False)["input_ids"] == [256]
        assert tokenizer.convert_tokens_to_ids(merges[0].replace(" ", "")) == 512
    (tmp_path / "short").write_text("\n".join(lines[:100]))
    with pytest.raises(ValueError, match="short: expected a header line"):
        clip_tokenizer_from_bpe_file(tmp_path / "short")


def test_tokenize_pads_and_cuts_as_the_original(processor: CLIPProcessor) -> None:
    tokenizer = processor.tokenizer
    ids = tokenize(tokenizer, ["a RED&nbsp;circle", ""], 8)
    words = tokenizer("a red circle")["input_ids"]
    assert ids[0].tolist() == words + [0] * (8 - len(words))
    assert ids[1].tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id] + [0] * 6
    long = "circle " * 20
    assert tokenize(tokenizer, [long], 8, truncate=True)[0, -1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="more than context_length=8"):
        tokenize(tokenizer, [long], 8)


def test_special_tokens_in_a_text_are_special_whatever_their_case(processor: CLIPProcessor) -> None:
    ids = processor(text="<|StartOfText|> x <|ENDOFTEXT|>")["input_ids"]
    tokenizer = processor.tokenizer
    assert ids[1] == tokenizer.bos_token_id and ids[-2] == tokenizer.eos_token_id


@pytest.mark.parametrize(("size", "expected"), [((57, 41), (44, 32)), ((35, 84), (32, 76)), ((20, 20), (32, 32))])
def test_longer_side_is_truncated(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, 32) == expected


@pytest.mark.parametrize(("width", "left"), [(33, 0), (35, 2), (37, 2), (36, 2), (39, 4)])
def test_half_pixels_go_to_the_even_offset(width: int, left: int) -> None:
    pixels = np.tile(np.arange(width, dtype=np.uint8), (32, 1))
    assert np.array(center_crop(Image.fromarray(pixels), 32, 32))[0, 0] == left


def test_crop_of_a_smaller_image_is_centred_on_black() -> None:
    cropped = np.array(center_crop(Image.new("L", (3, 4), 9), 8, 8))
    assert cropped.shape == (8, 8) and cropped.sum() == 9 * 12
    rows, columns = np.nonzero(cropped)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 5, 2, 4)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_every_mode_becomes_three_channels(mode: str, processor: CLIPProcessor) -> None:
    image = Image.new("L", (50, 37), 100).convert(mode) if mode != "I;16" else Image.new("I;16", (50, 37), 100)
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 32, 32) and pixel_values.isfinite().all()


def test_alpha_weighs_colours_before_it_is_dropped(processor: CLIPProcessor) -> None:
    """Transparent red beside opaque blue: resizing first must not let the invisible red bleed."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, ::2] = (255, 0, 0, 0)
    pixels[:, 1::2] = (0, 0, 255, 255)
    values = processor(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    red = values[0] * 0.26862954 + 0.48145466
    assert red.max() < 0.05
    plain = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert (plain(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"][0][0] * 0.27 + 0.48).max() > 0.3


def test_arrays_equal_pil_images(processor: CLIPProcessor) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 51, 3), dtype=np.uint8)
    expected = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=pixels, return_tensors="pt")["pixel_values"], expected)
    floats = processor(images=pixels.astype(np.float32), return_tensors="pt")["pixel_values"]
    assert floats.shape == expected.shape


def test_settings_of_the_call_are_honoured(processor: CLIPProcessor) -> None:
    image = Image.new("RGB", (48, 40), "red")
    call = processor.image_processor
    assert call(images=image, do_center_crop=False, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 38)
    assert call(images=image, do_resize=False, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    square = call(images=image, size={"height": 16, "width": 24}, do_center_crop=False, return_tensors="pt")
    assert square["pixel_values"].shape == (1, 3, 16, 24)
    raw = call(images=image, do_normalize=False, do_rescale=False, return_tensors="pt")["pixel_values"]
    assert raw[0, :, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match="shortest_edge"):
        call(images=image, size={"shortest_edge": 16, "longest_edge": 20}, return_tensors="pt")


def test_processor_cleans_text(processor: CLIPProcessor) -> None:
    dirty, clean = "A &amp;  RED\ncircle", "a & red circle"
    assert processor(text=dirty)["input_ids"] == processor.tokenizer(clean)["input_ids"]
    batch = processor(text=[dirty, "two"], images=tiny.images(2), padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert len(batch["input_ids"]) == len(batch["pixel_values"]) == 2


def test_saved_folder_is_native(processor: CLIPProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    assert "hf_vlp" not in "".join(path.read_text() for path in tmp_path.iterdir())
    plain = AutoProcessor.from_pretrained(tmp_path)
    assert type(plain) is transformers.CLIPProcessor
    arguments = {"text": list(tiny.TEXTS), "images": tiny.images(), "padding": True, "return_tensors": "pt"}
    ours, theirs = processor(**arguments), plain(**arguments)
    assert ours.keys() == theirs.keys()
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(ours[name], theirs[name])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])


def test_native_folder_gives_the_exact_processor(tmp_path: Path) -> None:
    native = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 48}, crop_size={"height": 40, "width": 44}, image_mean=[0.1, 0.2, 0.3]
        ),
        train_clip_tokenizer(tiny.TEXTS, 520),
    )
    native.save_pretrained(tmp_path)
    ours = CLIPProcessor.from_pretrained(tmp_path)
    assert type(ours.image_processor) is CLIPImageProcessorPil
    assert ours.image_processor.to_dict() == native.image_processor.to_dict()
    assert ours(images=tiny.images(1), return_tensors="pt")["pixel_values"].shape == (1, 3, 40, 44)
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").read_text() == (
        tmp_path / "processor_config.json"
    ).read_text()


def test_from_texts() -> None:
    processor = CLIPProcessor.from_texts(tiny.TEXTS, image_size=24, vocab_size=520, context_length=8)
    assert len(processor.tokenizer) <= 520 and processor.tokenizer.model_max_length == 8
    batch = processor(text="circle " * 30, images=tiny.images(1), truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (1, 8) and batch["pixel_values"].shape == (1, 3, 24, 24)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_have_one_place_for_the_class(name: str) -> None:
    assert len(set(TEMPLATES[name])) == len(TEMPLATES[name])
    assert all(template.count("{}") == 1 for template in TEMPLATES[name])
