"""BLIP's processor: tokens, captions to learn, answers, the native folder; and the benchmarks at a tiny size."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_vlp.models.blip.backbone_blip import use_tokenizer
from hf_vlp.models.blip.processing_blip import BlipProcessor, add_blip_tokens, clean_caption
from tests.tiny.blip import blip_config

WORDS = ["a", "picture", "of", "cat", "dog", "red", "what", "colour", "yes"]


def processor(**options: object) -> BlipProcessor:
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    fast = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    fast.normalizer, fast.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **names)
    return BlipProcessor.for_image_size(tokenizer, 32, **options)


def picture() -> Image.Image:
    return Image.new("RGB", (40, 20), (200, 30, 30))


def test_dec_and_enc_stand_behind_the_vocabulary():
    tokenizer = processor().tokenizer
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(WORDS) + 5, len(WORDS) + 6]
    before = len(tokenizer)
    assert len(add_blip_tokens(tokenizer)) == before
    config = blip_config()
    use_tokenizer(config, tokenizer)
    assert config.text_config.bos_token_id == before - 2 and config.text_config.enc_token_id == before - 1
    with pytest.raises(ValueError, match="the text model 8"):
        use_tokenizer(blip_config(vocab_size=8), tokenizer)


def test_texts_are_cleaned_as_in_the_original():
    assert clean_caption("A (Red)  Cat.\n") == "a red cat"
    assert clean_caption("it's a cat, yes!", max_words=3) == "it's a cat,"
    batch = processor()(text=["A cat.", "A red dog!"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == [2, 5, 8, 3, 0]
    assert batch["attention_mask"].sum(1).tolist() == [4, 5]


def test_the_prompt_is_not_learnt():
    made = processor()
    batch = made.training_inputs([picture(), picture()], ["a cat", "a red dog"], prompt="a picture of ")
    dec = made.tokenizer.convert_tokens_to_ids("[DEC]")
    assert batch["input_ids"][0].tolist() == [dec, 5, 6, 7, 5, 8, 3, 0]
    assert batch["labels"][0].tolist() == [-100] * 4 + [5, 8, 3, -100]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    cut = made.training_inputs([picture()], ["a red dog"], prompt="a picture of", max_length=6)
    assert cut["labels"].tolist() == [[-100] * 4 + [5, 10]]
    with pytest.raises(ValueError, match="no room"):
        made.training_inputs([picture()], ["a"], prompt="a picture of", max_length=4)


def test_answers_start_with_dec_and_end_with_sep():
    made = processor()
    answers = made.encode_answers(["yes", "red cat"])
    dec = made.tokenizer.convert_tokens_to_ids("[DEC]")
    assert answers["labels"].tolist() == [[dec, 13, 3, 0], [dec, 10, 8, 3]]
    assert made.encode_answers(["a red cat"], max_length=3)["labels"].tolist() == [[dec, 5, 3]]
    assert made.decode_answers(answers["labels"]) == ["yes", "red cat"]
    with pytest.raises(ValueError, match="images, text"):
        made()


def test_the_folder_is_native(tmp_path: Path):
    made = processor(max_words=12)
    made.save_pretrained(tmp_path)
    native = transformers.BlipProcessor.from_pretrained(tmp_path)
    assert type(native) is transformers.BlipProcessor
    torch.testing.assert_close(
        native(images=picture(), return_tensors="pt")["pixel_values"],
        made(images=picture(), return_tensors="pt")["pixel_values"],
    )
    back = BlipProcessor.from_pretrained(tmp_path)
    assert back.max_words == 12
    assert back(text=["a cat"])["input_ids"] == made(text=["a cat"])["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("blip_step", "--small --repeats 0 --batch 3"),
        ("blip_reranking", "--small --images 3 --texts 8 --top 4"),
        ("blip_captioning", "--small --repeats 0 --batch 2"),
    ],
)
def test_benchmarks_find_both_sides_equal(monkeypatch: pytest.MonkeyPatch, name: str, options: str):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    sys.modules.pop(name, None)
    report = importlib.import_module(name).main(options.split())
    if name == "blip_captioning":
        assert all(value["equal"] for value in report.values() if isinstance(value, dict))
        assert report["beam 3"]["ratios"]["GFLOP an image"] < 1
    else:
        assert report["difference"] < 1e-3
        ratios = report["ratios"]
        assert ratios["text models" if name == "blip_step" else "GFLOP a pair"] < 0.5
