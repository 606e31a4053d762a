"""BLIP-2's processor: both forms, labels of every kind of language model, prompts, and the folder in plain use."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor, add_decoder_token, image_token_id
from tests.tiny.blip2 import (
    IMAGE_SIZE,
    LANGUAGE_MODELS,
    QUERIES,
    TEXTS,
    bert_tokenizer,
    generation_processor,
    images,
    llama_tokenizer,
    opt_tokenizer,
    retrieval_processor,
    t5_tokenizer,
)

KINDS = list(LANGUAGE_MODELS)


def test_what_the_tokenizers_imply() -> None:
    opt, llama, t5 = (generation_processor(kind) for kind in KINDS)
    assert not opt.is_encoder_decoder
    assert opt.stop_token_id == opt.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    assert not llama.is_encoder_decoder
    assert llama.stop_token_id == llama.tokenizer.eos_token_id
    assert llama.tokenizer.pad_token == llama.tokenizer.eos_token
    assert t5.is_encoder_decoder
    assert t5.stop_token_id == t5.tokenizer.eos_token_id
    assert [p.tokenizer.padding_side for p in (opt, llama, t5)] == ["left", "left", "right"]
    stated = Blip2Processor.for_language_model(llama_tokenizer(), QUERIES, encoder_decoder=True, stop_token="dot")
    assert stated.is_encoder_decoder
    assert stated.stop_token_id == stated.tokenizer("dot", add_special_tokens=False)["input_ids"][0]


def test_stop_tokens_that_do_not_exist() -> None:
    tokenizer = llama_tokenizer()
    with pytest.raises(ValueError, match="no token for the stop token ''"):
        _ = Blip2Processor.for_language_model(tokenizer, QUERIES, stop_token="").stop_token_id
    processor = Blip2Processor.for_language_model(llama_tokenizer(), QUERIES, encoder_decoder=False)
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="give the processor a stop_token"):
        _ = processor.stop_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_images_alone_are_all_that_generate_needs(kind: str) -> None:
    processor = generation_processor(kind)
    empty = processor.tokenizer("")["input_ids"]
    for given, count in ((images(3), 3), (images(1)[0], 1), (np.zeros((2, 3, 20, 20), dtype=np.uint8), 2)):
        batch = processor(given, return_tensors="pt")
        assert batch["input_ids"].tolist() == [[processor.image_token_id] * QUERIES + empty] * count
        assert (batch["attention_mask"] == 1).all()
        assert batch["pixel_values"].shape == (count, 3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("prompt", ["", "a photo of", "a photo of "])
def test_labels_of_causal_language_models(kind: str, prompt: str) -> None:
    processor = generation_processor(kind)
    tokenizer = processor.tokenizer
    batch = processor.training_inputs(images(), TEXTS, prompt=prompt)
    for row, text in enumerate(TEXTS):
        whole = f"{prompt.strip()} {text}".strip()
        ids = [*tokenizer(whole)["input_ids"], processor.stop_token_id]
        masked = len(tokenizer(prompt.strip())["input_ids"]) if prompt else 0
        length = QUERIES + len(ids)
        assert batch["input_ids"][row, :length].tolist() == [processor.image_token_id] * QUERIES + ids
        assert batch["labels"][row, :length].tolist() == [-100] * (QUERIES + masked) + ids[masked:]
        assert (batch["labels"][row, length:] == -100).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
    # Training is padded on the right whatever side generation pads.
    assert tokenizer.padding_side == "left"


def test_labels_of_encoder_decoders() -> None:
    processor = generation_processor("t5")
    batch = processor.training_inputs(images(), TEXTS, prompt=["a", "two", "a photo of", ""])
    for row, (text, prompt) in enumerate(zip(TEXTS, ["a", "two", "a photo of", ""], strict=True)):
        ids = processor.tokenizer(text)["input_ids"]
        assert ids[-1] == processor.tokenizer.eos_token_id
        assert batch["labels"][row][batch["labels"][row] != -100].tolist() == ids
        assert batch["decoder_attention_mask"][row].sum() == len(ids)
        asked = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert asked == [processor.image_token_id] * QUERIES + processor.tokenizer(prompt)["input_ids"]


def test_encoder_decoders_keep_the_end_of_what_is_cut() -> None:
    """As LAVIS, which cuts question and answer at the same `max_txt_len`."""
    processor = generation_processor("t5")
    tokenizer, longest = processor.tokenizer, 4
    prompts = ["a", "two of the dots", "what is this in the photo", ""]
    batch = processor.training_inputs(None, TEXTS, prompt=prompts, max_length=longest)

    def cut(text: str) -> list[int]:
        ids = tokenizer(text)["input_ids"]
        return ids if len(ids) <= longest else [*ids[: longest - 1], tokenizer.eos_token_id]

    assert any(len(tokenizer(text)["input_ids"]) > longest for text in TEXTS)
    assert any(len(tokenizer(prompt)["input_ids"]) > longest for prompt in prompts)
    for row, (text, prompt) in enumerate(zip(TEXTS, prompts, strict=True)):
        assert batch["labels"][row][batch["labels"][row] != -100].tolist() == cut(text)
        assert batch["decoder_attention_mask"][row].sum() == len(cut(text))
        asked = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert asked == [processor.image_token_id] * QUERIES + cut(prompt)


def test_labels_where_prompt_and_text_share_a_token() -> None:
    """A tokenizer that merges the end of the prompt with what follows: the border is found by characters."""
    processor = generation_processor("opt")
    tokenizer = processor.tokenizer
    whole = tokenizer("a photo of the circle", return_offsets_mapping=True)

    class Merging:
        """Reads a prompt that stands alone as other tokens than the same prompt in front of a text."""

        is_fast = True

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            ids = dict(tokenizer(text, **options))
            if text == "a photo of":
                ids["input_ids"] = [*ids["input_ids"][:-1], 7]
            return ids

    processor.tokenizer = Merging()
    ids, masked = processor._prompted("a photo of", "the circle")
    assert ids == whole["input_ids"]
    offsets = whole["offset_mapping"]
    assert all(start < len("a photo of") for start, end in offsets[:masked] if end > start)
    assert offsets[masked][0] >= len("a photo of")
    Merging.is_fast = False
    with pytest.raises(ValueError, match="use the fast tokenizer"):
        processor._prompted("a photo of", "the circle")


def test_truncation_says_so_and_loses_the_stop_token(caplog: pytest.LogCaptureFixture) -> None:
    transformers.utils.logging.warning_once.cache_clear()
    processor = generation_processor("opt")
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            batch = processor.training_inputs(images(), TEXTS, max_length=8)
    finally:
        transformers.utils.logging.disable_propagation()
    assert batch["input_ids"].shape[1] <= QUERIES + 8
    long = [i for i, text in enumerate(TEXTS) if len(processor.tokenizer(text)["input_ids"]) + 1 > 8]
    assert long
    for row in long:
        assert processor.stop_token_id not in batch["labels"][row].tolist()
    assert f"{len(long)} of 4 captions are longer than max_length=8" in caplog.text


def test_training_inputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="this processor is for stage 1"):
        retrieval_processor().training_inputs(images(), TEXTS)
    processor = generation_processor()
    with pytest.raises(ValueError, match="2 prompts for 4 texts"):
        processor.training_inputs(images(), TEXTS, prompt=["a", "b"])
    with pytest.raises(ValueError, match="3 images for 4 texts"):
        processor.training_inputs(images(3), TEXTS)
    assert "pixel_values" not in processor.training_inputs(None, TEXTS)
    with pytest.raises(ValueError, match="give images, text, or both"):
        retrieval_processor()()


def test_question_and_conversation_prompts() -> None:
    assert Blip2Processor.question("what color is it?") == "Question: what color is it? Answer:"
    history = [("what is this?", "a dot."), ("how large?", "small")]
    assert Blip2Processor.question(" why? ", history) == (
        "Question: what is this? Answer: a dot. Question: how large? Answer: small. Question: why? Answer:"
    )


def test_stage_1_form() -> None:
    processor = retrieval_processor()
    tokenizer = processor.tokenizer
    assert tokenizer.bos_token == "[DEC]"
    assert tokenizer.bos_token_id == len(bert_tokenizer())
    # No image token, for which the Q-Former would have no embedding.
    assert len(tokenizer) == len(bert_tokenizer()) + 1
    batch = processor(images(), list(TEXTS), return_tensors="pt", truncation=True, max_length=6)
    assert batch["input_ids"].shape == (4, 6)
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    assert "token_type_ids" not in batch
    assert processor(images(), return_tensors="pt").keys() == {"pixel_values"}
    assert processor(text="a dot")["input_ids"] == [tokenizer("a dot")["input_ids"]]
    again = add_decoder_token(tokenizer)
    assert again.bos_token_id == len(bert_tokenizer())
    with pytest.raises(ValueError, match="has no cls_token, sep_token"):
        add_decoder_token(opt_tokenizer())


def test_image_token_is_added_once() -> None:
    tokenizer = t5_tokenizer()
    first = image_token_id(tokenizer)
    assert image_token_id(tokenizer) == first == len(tokenizer) - 1
    assert Blip2Processor.for_language_model(tokenizer, QUERIES).image_token_id == first


@pytest.mark.parametrize("kind", [*KINDS, "retrieval"])
def test_folder_opens_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    ours = retrieval_processor() if kind == "retrieval" else generation_processor(kind)
    text = ["a red circle", "two"]
    expected = ours(images(2), text, return_tensors="pt", padding=True)
    # A call leaves its padding and truncation in a fast tokenizer; they must not be saved.
    ours(text=text, return_tensors="pt", padding="max_length", truncation=True, max_length=30)
    ours.save_pretrained(tmp_path)
    native = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(native) is transformers.Blip2Processor
    found = native(images(2), text, return_tensors="pt", padding=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = Blip2Processor.from_pretrained(tmp_path)
    assert again.num_query_tokens == ours.num_query_tokens
    if kind != "retrieval":
        assert (again.stop_token_id, again.is_encoder_decoder) == (ours.stop_token_id, ours.is_encoder_decoder)
        assert torch.equal(
            again(images(2), return_tensors="pt")["input_ids"], ours(images(2), return_tensors="pt")["input_ids"]
        )
        assert native.tokenizer.padding_side == ours.tokenizer.padding_side


def test_settings_of_a_processor_are_kept(tmp_path: Path) -> None:
    processor = Blip2Processor.for_language_model(
        llama_tokenizer(), QUERIES, image_size=24, encoder_decoder=False, stop_token="dot"
    )
    processor.save_pretrained(tmp_path)
    again = Blip2Processor.from_pretrained(tmp_path)
    assert (again.encoder_decoder, again.stop_token) == (False, "dot")
    assert again.stop_token_id == processor.stop_token_id
    assert again(Image.new("RGB", (9, 9)), return_tensors="pt")["pixel_values"].shape[-2:] == (24, 24)
