"""CogVLM's texts: prompts and label masks by template, images in their places, boxes in text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from hf_vlp.data import train_opt_tokenizer
from hf_vlp.data.conversations import ConversationCollator, make_template, prompt_batch
from hf_vlp.models.cogvlm.processing_cogvlm import (
    BoxError,
    CogVLMProcessor,
    conversation_prompt,
    draw_boxes,
    format_boxes,
    parse_boxes,
)
from tests.tiny import cogvlm as tiny

RED = Image.new("RGB", (20, 12), "red")


def make(**options) -> CogVLMProcessor:
    return CogVLMProcessor.for_model(tiny.byte_tokenizer(), tiny.model(2).config, **options)


def said(processor: CogVLMProcessor, ids: list[int]) -> str:
    """Text of ids, a run of image tokens as one mark."""
    text, last = "", None
    for one in ids:
        if not (one == last == processor.image_token_id):
            text += {1: "<s>", 2: "</s>", processor.image_token_id: "<image>"}.get(one) or chr(one - 3)
        last = one
    return text


def learned(processor: CogVLMProcessor, labels: list[int]) -> str:
    return said(processor, [one for one in labels if one != -100])


def conversation(*turns: str, images: int = 1) -> dict:
    messages = []
    for number, text in enumerate(turns):
        content = [{"type": "image"}] * images if number == 0 else []
        content = [*content, *([{"type": "text", "text": text}] if text else [])]
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return {"images": [RED] * images, "messages": messages, "source": "test", "key": "0"}


@pytest.mark.parametrize(
    ("template", "turns", "text", "answers"),
    [
        ("cogvlm_chat", ("how?", "so"), "<s><image>Question: how? Answer:so</s>", "so</s>"),
        ("cogvlm_vqa", ("how?", "so"), "<s><image>Question: how? Short answer:so</s>", "so</s>"),
        ("cogvlm_chat", ("", "a hat"), "<s><image>a hat</s>", "a hat</s>"),
        (
            "cogvlm_chat",
            ("a?", "b", "c?", "d"),
            "<s><image>Question: a? Answer: b\nQuestion: c? Answer:d</s>",
            " bd</s>",
        ),
    ],
)
def test_templates(template: str, turns: tuple[str, ...], text: str, answers: str) -> None:
    processor = make()
    batch = ConversationCollator(processor, template=template)([conversation(*turns)])
    assert said(processor, batch["input_ids"][0].tolist()) == text
    assert learned(processor, batch["labels"][0].tolist()) == answers
    assert torch.equal(batch["token_type_ids"], (batch["input_ids"] == processor.image_token_id).long())
    assert batch["token_type_ids"].sum() == 6


@pytest.mark.parametrize("template", ["chat", "vqa"])
def test_last_turns_are_the_released_code_s(template: str) -> None:
    processor = make(template=template)
    batch = ConversationCollator(processor, template=f"cogvlm_{template}")([conversation("a?", "b", "c?", "d")])
    row = processor.conversation("c?", history=[("a?", "b")], answer="d")
    assert batch["input_ids"][0].tolist() == row["input_ids"]
    assert batch["labels"][0].tolist()[-2:] == row["labels"][-2:]
    prompt = make_template(f"cogvlm_{template}", processor).prompt(conversation("c?")["messages"])
    assert prompt.text == "<s><image>" + conversation_prompt("c?", template=template)


def test_new_experts_answer_behind_a_space(tmp_path: Path) -> None:
    """What a language model with byte-level BPE has read; the released code writes "Answer:red"."""
    config = tiny.model(2).config
    CogVLMProcessor.for_model(train_opt_tokenizer(["a red dot"] * 4, 280), config, answer_space=None).save_pretrained(
        tmp_path
    )
    processor = CogVLMProcessor.from_pretrained(tmp_path)
    assert processor.answer_space == " "
    row = processor.conversation("what is it?", answer="a red dot")
    words = processor.tokenizer
    assert words.decode(row["input_ids"]).endswith("Question: what is it? Answer: a red dot</s>")
    assert words.decode([one for one in row["labels"] if one != -100]) == " a red dot</s>"
    batch = ConversationCollator(processor, template="cogvlm_chat")([conversation("what is it?", "a red dot")])
    assert batch["input_ids"][0].tolist() == row["input_ids"]
    assert batch["labels"][0].tolist() == row["labels"]
    # There is no question in front of a caption.
    caption = processor.training_inputs(None, ["a red dot"])["labels"][0]
    assert words.decode(caption[caption != -100]) == "a red dot</s>"


def test_no_space_where_the_tokenizer_makes_one() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert CogVLMProcessor.for_model(tokenizer, tiny.model(2).config, answer_space=None).answer_space == ""
    assert CogVLMProcessor.for_model(tokenizer, tiny.model(2).config).answer_space == ""


def test_prompts_of_a_batch() -> None:
    processor = make()
    batch = processor([RED, RED], ["how many?", "is it?"], history=[[("a?", "b")], []])
    assert said(processor, batch["input_ids"][0].tolist()).endswith(
        "<s><image>Question: a? Answer: b\nQuestion: how many? Answer:"
    )
    assert batch["attention_mask"][1, 0] == 0
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    caption = processor(RED)
    assert said(processor, caption["input_ids"][0].tolist()) == "<s><image>"
    placed = processor([RED, RED], ["left <image>right <image>which?"])
    assert said(processor, placed["input_ids"][0].tolist()) == "<s>left <image>right <image>which?"
    assert said(processor, processor(text="plain")["input_ids"][0].tolist()) == "<s>plain"


def test_chat_template_is_the_format() -> None:
    processor = make()
    messages = conversation("a?", "b", "c?")["messages"]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<image>Question: a? Answer: b\nQuestion: c? Answer:"
    ids = processor([RED], [text])["input_ids"][0].tolist()
    assert ids == processor([RED], ["c?"], history=[[("a?", "b")]])["input_ids"][0].tolist()
    with pytest.raises(Exception, match="user and assistant only"):
        processor.apply_chat_template([{"role": "system", "content": "be nice"}])


def said_by(role: str, *content: str) -> dict[str, Any]:
    """A message; "<image>" is a picture."""
    entries = [{"type": "image"} if one == "<image>" else {"type": "text", "text": one} for one in content]
    return {"role": role, "content": entries}


@pytest.mark.parametrize("template", ["chat", "vqa"])
@pytest.mark.parametrize(
    "asked",
    [
        [said_by("user", "what is this? ", "<image>", " and that?")],
        [said_by("user", "a?"), said_by("assistant", " b"), said_by("user", "<image>", "<image>", "c?")],
        [said_by("user", "<image>")],
        [said_by("user", "<image>"), said_by("assistant", "a hat"), said_by("user", "sure?")],
    ],
    ids=["words around a picture", "pictures in a later turn", "a picture alone", "a picture, then words"],
)
def test_a_prompt_is_that_of_training(template: str, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    make(template=template).save_pretrained(tmp_path)
    processor = CogVLMProcessor.from_pretrained(tmp_path)
    pictures = [RED] * sum(part["type"] == "image" for turn in asked for part in turn["content"])
    expected = prompt_batch(processor, make_template(f"cogvlm_{template}", processor), [(pictures, asked)])
    strings = [{**turn, "content": "".join(part.get("text", "<image>") for part in turn["content"])} for turn in asked]
    for messages in (asked, strings):
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert torch.equal(processor(pictures, text)["input_ids"], expected["input_ids"])


def test_training_inputs() -> None:
    processor = make()
    batch = processor.training_inputs([RED, RED], ["a hat", "it"], prompt="")
    assert said(processor, batch["input_ids"][0].tolist()) == "<s><image>a hat</s>"
    assert learned(processor, batch["labels"][1].tolist()) == "it</s>"
    assert batch["labels"][1, -1] == -100 and batch["attention_mask"][1, -1] == 0
    cut = processor.training_inputs([RED], ["a long caption"], max_length=11)
    assert said(processor, cut["input_ids"][0].tolist()) == "<s><image>a l</s>"
    with pytest.raises(ValueError, match="leaves no room"):
        processor.training_inputs([RED], ["a"], max_length=8)


def test_an_image_token_beyond_the_vocabulary() -> None:
    processor = make()
    assert processor.image_token_id >= len(tiny.byte_tokenizer())
    again = CogVLMProcessor.for_model(processor.tokenizer, tiny.model(2).config)
    assert again.image_token_id == processor.image_token_id


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(), "give images, text, or both"),
        (lambda p: p([RED, RED], ["a"]), "2 images came for 1 texts"),
        (lambda p: p([RED], ["<image> and <image>"]), "places for 2 images"),
        (lambda p: p([RED], ["a"], template="poem"), "CogVLM knows"),
        (lambda p: p([RED], ["a"], history=[[("b", "c")]], template="base"), "no place for a history"),
        (lambda p: p([RED], ["a"], history=[[], []]), "1 texts, but histories of 2"),
        (lambda p: p([RED], ["a" * 40], truncation=True, max_length=20), "it is not cut"),
        (lambda p: CogVLMProcessor(p.image_processor, tiny.byte_tokenizer()), "no image token '<image>'"),
    ],
)
def test_what_does_not_fit_is_said(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make())


def test_boxes_there_and_back() -> None:
    text = format_boxes([(0, 0, 100, 50), (25, 10, 50, 50)], (200, 50))
    assert text == "[[000,000,500,999;125,200,250,999]]"
    (found,) = parse_boxes(f"the red hat {text}.", (200, 50))
    assert found.phrase == "the red hat"
    for box, expected in zip(found.boxes, [(0, 0, 100, 50), (25, 10, 50, 50)], strict=True):
        assert box == pytest.approx(expected, abs=0.2)
    first, second = parse_boxes("A cat [[900,100,200,300]] sits; a mat[[000,000,999,999]] lies. [[1,2,3,4]] [[12]]")
    assert (first.phrase, second.phrase) == ("A cat", "a mat")
    assert first.boxes[0] == (0.2, 0.1, 0.9, 0.3)
    assert parse_boxes("nothing here") == []


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, 0, 21, 5), (0, 0, 5, 13), (5, 0, 5, 5), (6, 0, 5, 5), (0, float("nan"), 5, 5), (1, 2, 3)],
)
def test_boxes_outside_the_image_are_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(BoxError):
        format_boxes([box], RED.size)
    with pytest.raises(BoxError, match="no box"):
        format_boxes([], RED.size)


def test_boxes_are_drawn() -> None:
    image = Image.new("RGB", (100, 100))
    picture = draw_boxes(image, "hat [[100,100,500,500]]", width=2)
    assert picture.getpixel((10, 30)) == (255, 0, 0) and picture.getpixel((80, 80)) == (0, 0, 0)
    assert image.getpixel((10, 30)) == (0, 0, 0)
