"""LLaVA's processors: native counts and folders, prompts, placeholders that do not match."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoProcessor, CLIPVisionConfig

from hf_vlp.data.conversations import (
    ChatTemplate,
    ConversationCollator,
    make_template,
    prompt_batch,
    template_names,
)
from hf_vlp.models.llava.anyres_llava import TileError
from hf_vlp.models.llava.processing_llava import (
    CHAT_TEMPLATES,
    ImageTokenMissingError,
    LlavaNextProcessor,
    LlavaProcessor,
    chat_template_of,
    use_template,
)
from tests.tiny import llava as tiny

TILES = pytest.mark.parametrize("tiles", [False, True], ids=["llava", "llava_next"])
SIZES = ((20, 13), (16, 16), (9, 30), (64, 16), (40, 41))
QUESTION = {"role": "user", "content": [{"type": "text", "text": "what is this?"}, {"type": "image"}]}


@TILES
def test_the_counts_are_those_of_the_model(tiles: bool) -> None:
    model, processor = tiny.llava(tiles=tiles)
    images = tiny.pictures(*SIZES)
    features, counts = processor.prepare_images(images)
    with torch.no_grad():
        assert counts == [len(one) for one in model.image_features(**features)]
    ids = processor(images=images, text=["<image>"] * len(images), return_tensors="pt")["input_ids"]
    assert (ids == model.config.image_token_id).sum(dim=1).tolist() == counts


@TILES
def test_a_native_folder(tiles: bool, tmp_path: Path) -> None:
    _, processor = tiny.llava(tiles=tiles)
    processor.save_pretrained(tmp_path)
    native = AutoProcessor.from_pretrained(tmp_path)
    assert type(native) is (transformers.LlavaNextProcessor if tiles else transformers.LlavaProcessor)
    assert native.tokenizer.padding_side == "left"
    again = type(processor).from_pretrained(tmp_path)
    images = tiny.pictures(*SIZES)
    text = ["what ? <image>"] * len(images)
    expected = processor(images=images, text=text, return_tensors="pt", padding=True)
    for other in (native, again):
        found = other(images=images, text=text, return_tensors="pt", padding=True)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert native.apply_chat_template([QUESTION], add_generation_prompt=True) == processor.apply_chat_template(
        [QUESTION], add_generation_prompt=True
    )


def test_a_picture_alone() -> None:
    _, processor = tiny.llava()
    inputs = processor(images=tiny.pictures((9, 9), (8, 20)), return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 4)
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)


def test_placeholders_that_do_not_match() -> None:
    _, processor = tiny.llava()
    with pytest.raises(ValueError, match="1 pictures for 2 <image>"):
        processor(images=tiny.pictures((9, 9)), text="<image> and <image>")
    with pytest.raises(ValueError, match="0 pictures for 1 <image>"):
        processor(text="what is <image>")


def test_a_tokenizer_without_an_image_token() -> None:
    _, processor = tiny.llava()
    with pytest.raises(ImageTokenMissingError, match="for_language_model"):
        LlavaProcessor(processor.image_processor, tiny.tokenizer(), patch_size=8)


def test_grids_over_the_maximum() -> None:
    config = CLIPVisionConfig(image_size=16, patch_size=8)
    with pytest.raises(TileError, match="over the maximum of 2"):
        LlavaNextProcessor.for_language_model(tiny.tokenizer(), config, image_grid_pinpoints=[[32, 32]], max_tiles=2)
    with pytest.raises(TileError, match="at least 2"):
        LlavaNextProcessor.for_language_model(tiny.tokenizer(), config, max_tiles=1)


def said(role: str, *content: str) -> dict[str, Any]:
    """A message; "<image>" is a picture."""
    entries = [{"type": "image"} if one == "<image>" else {"type": "text", "text": one} for one in content]
    return {"role": role, "content": entries}


def places(spans: list[tuple[int, int]]) -> list[int]:
    return [place for start, end in spans for place in range(start, end)]


ANSWER = said("assistant", "a square")
CONVERSATIONS = {
    "picture behind": [QUESTION],
    "picture in front": [said("user", "<image>", "\nwhat is this? ")],
    "two pictures": [said("user", "<image>", "one", "<image>", " and two?")],
    "no picture": [said("user", " what is this? ")],
    "a picture alone": [said("user", "<image>")],
    "turns": [QUESTION, ANSWER, said("user", "how many?"), said("assistant", "two"), said("user", "sure?")],
    "system": [said("system", "Be short."), QUESTION, ANSWER, said("user", "<image>", "this?")],
    "no words of the system": [said("system", ""), QUESTION],
    "an answer without a question": [ANSWER, QUESTION],
}


def test_each_template_of_training_has_its_prompt() -> None:
    others = {"chat", "cogvlm_chat", "cogvlm_vqa", "instructblip", "qwen_vl"}
    assert set(CHAT_TEMPLATES) == set(template_names()) - others


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_the_prompt_is_the_training_text_up_to_the_answer(name: str, conversation: str) -> None:
    processor = use_template(tiny.llava()[1], name)
    asked = CONVERSATIONS[conversation]
    # The template reads messages as the collator makes them, the processor those of its users.
    template = make_template(name, processor)
    trained = template.prompt(asked).text
    assert processor.apply_chat_template(asked, add_generation_prompt=True) == trained
    whole = template.render([*asked, ANSWER])
    assert processor.apply_chat_template([*asked, ANSWER]) == whole.text
    marked = ChatTemplate.for_processor(processor).render([*asked, ANSWER])
    # Of two answers in a row one writes two spans, the other one.
    assert places(marked.supervised) == places(whole.supervised)
    in_strings = [{**one, "content": "".join(part.get("text", "<image>") for part in one["content"])} for one in asked]
    assert processor.apply_chat_template(in_strings, add_generation_prompt=True) == trained


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_the_ids_of_the_prompt_are_those_of_training(name: str, tmp_path: Path) -> None:
    processor = use_template(tiny.llava()[1], name)
    processor.save_pretrained(tmp_path)
    images = tiny.pictures((20, 13), (16, 16))
    asked = [said("user", "<image>", "what is this?"), ANSWER, said("user", "<image>", "how many?")]
    expected = prompt_batch(processor, make_template(name, processor), [(images, asked)])
    native = AutoProcessor.from_pretrained(tmp_path)
    text = native.apply_chat_template(asked, add_generation_prompt=True)
    found = native(images=images, text=text, return_tensors="pt")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_a_template_that_was_given_is_not_the_language_models_own(tmp_path: Path) -> None:
    # A tokenizer without a template gets Vicuna's, and a saved folder does not tell the two apart.
    tiny.llava()[1].save_pretrained(tmp_path)
    saved = LlavaProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="came without a chat template: this processor's is 'vicuna_v1'"):
        use_template(saved, "chat")
    saved.chat_template = saved.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        use_template(saved, "chat")
    saved.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert use_template(saved, "chat").chat_template.endswith("{{ message['content'] }}{% endfor %}")


def test_templates_of_other_models_are_refused() -> None:
    _, processor = tiny.llava()
    with pytest.raises(ValueError, match=r"unknown template 'qwen_vl'; LLaVA has llama_2, .*CHAT_TEMPLATES"):
        use_template(processor, "qwen_vl")


def test_chat_templates() -> None:
    words = tiny.tokenizer()
    assert chat_template_of(words) == CHAT_TEMPLATES["vicuna_v1"]
    with pytest.raises(ValueError, match="no chat template"):
        chat_template_of(words, "chat")
    with pytest.raises(ValueError, match="unknown template 'nonsense'"):
        chat_template_of(words, "nonsense")
    words.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    _, processor = tiny.llava()
    processor.tokenizer.chat_template = words.chat_template
    use_template(processor, "chat")
    assert processor.apply_chat_template([QUESTION]) == "[<image>\nwhat is this?]"
    assert processor.apply_chat_template([{"role": "user", "content": "hi"}]) == "[hi]"
    use_template(processor, "vicuna_v1")
    assert processor.chat_template == CHAT_TEMPLATES["vicuna_v1"]


@TILES
@pytest.mark.parametrize("pack_to", [None, 120])
def test_batches_of_conversations_fit_the_model(tiles: bool, pack_to: int | None) -> None:
    from tests.training.llava_runs import conversations

    model, processor = tiny.llava(tiles=tiles)
    rows: list[dict[str, Any]] = conversations(6)
    batch = ConversationCollator(processor, pack_to=pack_to)(rows)
    batch.pop("record_report")
    plain = ConversationCollator(processor)(rows)
    plain.pop("record_report")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**plain).loss)
