"""Qwen-VL's processor: places of images, boxes there and back, conversations; original checkpoints and tokenizers."""

import base64
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_vlp.data.conversations import encode_conversation, make_template, prompt_batch
from hf_vlp.models.qwen_vl.conversion_qwen_vl import (
    SPECIAL_TOKENS,
    convert_checkpoint,
    from_original,
    read_original,
    save_original,
    to_original,
    tokenizer_from_original,
)
from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
from hf_vlp.models.qwen_vl.processing_qwen_vl import (
    BoxError,
    QwenVLProcessor,
    box_text,
    draw_regions,
    image_span,
    parse_regions,
)
from tests.tiny import qwen_vl as tiny
from tests.tiny.blip2 import images

# Boxes


def test_boxes_there_and_back() -> None:
    width, height = 640, 480
    text = box_text((0, 24, 320, 480), width, height, "the cat")
    assert text == "<ref>the cat</ref><box>(0,50),(500,999)</box>"
    (region,) = parse_regions(f"here is {text}.")
    assert region.label == "the cat" and region.box == (0, 50, 500, 999)
    assert region.span == (8, 8 + len(text))
    assert region.in_pixels(width, height) == pytest.approx((0, 24, 320, 480), abs=0.7)
    for x in range(0, width, 37):
        box = (x, 3, width, 471)
        (found,) = parse_regions(box_text(box, width, height))
        assert found.label is None
        for ours, theirs, size in zip(found.in_pixels(width, height), box, (width, height) * 2, strict=True):
            assert abs(ours - theirs) <= size / 1000


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 641, 5), (5, 0, 4, 5), (0, 9, 5, 8), (0, 0, 5)])
def test_a_box_outside_of_its_image_is_an_error(box: tuple[float, ...]) -> None:
    with pytest.raises(BoxError, match="box"):
        box_text(box, 640, 480, "a dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<box>(1,2),(3,1000)</box>", "outside of the image"),
        ("<box>(-1,2),(3,4)</box>", "outside of the image"),
        ("<box>(1,2)</box>", "has 1 points"),
        ("<quad>(1,2),(3,4)</quad>", "has 2 points"),
        ("<box>(5,2),(3,4)</box>", "top left corner first"),
        ("<ref>x</ref><box>nowhere</box>", "has 0 points"),
    ],
)
def test_malformed_regions(text: str, message: str) -> None:
    with pytest.raises(BoxError, match=message):
        parse_regions(text)
    assert parse_regions(f"{text} <box>(1,2),(3,4)</box>", strict=False)[-1].box == (1, 2, 3, 4)


def test_quads_and_several_regions_are_drawn() -> None:
    text = "<ref>a</ref><quad>(0,0),(900,0),(900,900),(0,900)</quad> and <box>(100,100),(500,500)</box>"
    first, second = parse_regions(text)
    assert first.label == "a" and first.box == (0, 0, 900, 900) and second.label is None
    image = Image.new("RGB", (100, 100), "white")
    drawn = draw_regions(image, text, width=1)
    assert drawn.getpixel((50, 0)) == (255, 0, 0) and drawn.getpixel((10, 30)) == (255, 0, 0)
    assert drawn.getpixel((70, 70)) == (255, 255, 255) and image.getpixel((50, 0)) == (255, 255, 255)


# Inputs


def test_every_image_gets_its_places() -> None:
    processor = tiny.processor()
    made = processor(images=images(2), text="a <img>x/y.png</img> b <img></img>", return_tensors="pt")
    ids = made["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 2 * tiny.QUERIES
    assert made["pixel_values"].shape == (2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    alone = processor(images=images(2), return_tensors="pt")
    assert torch.equal(alone["input_ids"][0], alone["input_ids"][1])
    before = processor(images=images(2), text=["one", "two"], return_tensors="pt")
    marked = processor(images=images(2), text=["<img></img>one", "<img></img>two"], return_tensors="pt")
    assert torch.equal(before["input_ids"], marked["input_ids"])
    with pytest.raises(ValueError, match="have 1 <img></img>, but 2 images"):
        processor(images=images(2), text="<img></img>")
    with pytest.raises(ValueError, match="cuts through an image"):
        processor(images=images(1), text="<img></img> words", truncation=True, max_length=4, return_tensors="pt")
    with pytest.raises(ValueError, match="give images, text"):
        processor()


def test_captions_of_the_first_stage() -> None:
    processor = tiny.processor()
    made = processor.training_inputs(images(2), ["a dot", "two green triangles"], prompt="Caption:")
    words = processor.tokenizer
    for row, text in enumerate([" a dot", " two green triangles"]):
        said = [*words(text, add_special_tokens=False)["input_ids"], words.eos_token_id]
        supervised = made["labels"][row] != -100
        assert made["labels"][row][supervised].tolist() == said
        assert made["input_ids"][row][supervised].tolist() == said
    model = tiny.model()
    assert model(**made).loss.isfinite()
    with pytest.raises(ValueError, match="1 images, 2 captions"):
        processor.training_inputs(images(1), ["a", "b"])


def test_chat_template_and_training_template_write_the_same() -> None:
    processor = tiny.processor()
    template = make_template("qwen_vl", processor)
    turns = tiny.messages(("compare", 2), "they differ", ("and this", 1), "a dot")
    told = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    picture, words = {"type": "image"}, {"type": "text", "text": "\nwhat is it?\n"}
    around = [{"role": "user", "content": [words, picture, words, picture]}, turns[1]]
    for messages in (turns, turns[:2], told + turns, around):
        text = processor.apply_chat_template(messages, tokenize=False)
        assert text == template.render(messages).text
        prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        assert prompt == template.prompt(messages[:-1]).text
    made = prompt_batch(processor, template, [(images(2), turns[:1])])
    prompt = processor.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    assert torch.equal(made["input_ids"], processor(images=images(2), text=prompt, return_tensors="pt")["input_ids"])


def test_labels_of_a_conversation() -> None:
    processor = tiny.processor()
    template = make_template("qwen_vl", processor)
    encoded = encode_conversation(template.render(tiny.messages(("what?", 1), "a dot")), template, processor)
    words = processor.tokenizer
    learnt = words.decode([label for label in encoded.labels if label != -100])
    # As in the original: the marks of all turns, and the words of the assistant's.
    assert learnt == "<|im_start|><|im_end|>\n<|im_start|><|im_end|>\n<|im_start|>a dot<|im_end|>\n"


def test_answers_are_read_with_their_boxes() -> None:
    processor = tiny.processor()
    text = "<ref>a dot</ref><box>(1,2),(3,4)</box>"
    ids = processor.tokenizer(f"{text}<|im_end|>\n<|im_start|>user", add_special_tokens=False)["input_ids"]
    assert parse_regions(processor.decode_answer(ids))[0].label.strip() == "a dot"
    assert processor.stop_token_ids[0] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_processor_survives_saving(tmp_path: Path) -> None:
    processor = tiny.processor()
    processor.save_pretrained(tmp_path)
    again = QwenVLProcessor.from_pretrained(tmp_path)
    first = processor(images=images(1), text="<img></img> what?", return_tensors="pt")
    second = again(images=images(1), text="<img></img> what?", return_tensors="pt")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.num_query_tokens == tiny.QUERIES and again.tokenizer.padding_side == "left"
    assert again.chat_template == processor.chat_template


# The original


def rank_file(path: Path) -> Path:
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"he", b"in", b" c", b" ca", b" cat"]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def test_tokenizer_of_a_rank_file(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_original(rank_file(tmp_path / "qwen.tiktoken"))
    assert tokenizer("the cat", add_special_tokens=False)["input_ids"] == [257, 263]
    assert tokenizer("<|im_start|>in").input_ids == [264 + 1, 260]
    for text in ("naïve 日本 😀\r\n\n  x", "IT'S 12 cats!", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 264 + len(SPECIAL_TOKENS)
    with pytest.raises(ValueError, match="ranks are not 0, 1, 2"):
        bad = tmp_path / "bad.tiktoken"
        bad.write_text((tmp_path / "qwen.tiktoken").read_text() + f"{base64.b64encode(b'zz').decode()} 900\n")
        tokenizer_from_original(bad)


def original_config() -> dict:
    return {
        "vocab_size": 264 + len(SPECIAL_TOKENS), "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "kv_channels": 8, "intermediate_size": 80, "layer_norm_epsilon": 1e-6, "seq_length": 512,
        "visual": {
            "image_size": 24, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 2.5, "n_queries": 4,
            "output_dim": 24, "image_start_id": 264 + SPECIAL_TOKENS.index("<img>"),
        },
    }  # fmt: skip


def test_image_span_is_the_normalised_path() -> None:
    span = image_span("cafe\u0301.jpg", 12, 900)
    assert span == [*"café.jpg".encode(), 900, 900, 900]
    with pytest.raises(ValueError, match="has 12 bytes, an image has room for 11"):
        image_span("a" * 12, 11, 900)


def test_original_folder_there_and_back(tmp_path: Path) -> None:
    from hf_vlp.models.qwen_vl.conversion_qwen_vl import config_from_original

    torch.manual_seed(0)
    source = tiny.wake(QwenVLForConditionalGeneration(config_from_original(original_config()))).eval()
    source.resampler.position_table.normal_()
    folder = tmp_path / "original"
    folder.mkdir()
    rank_file(folder / "qwen.tiktoken")
    (folder / "config.json").write_text(json.dumps(original_config()))
    save_original(source, folder / "model.safetensors")
    state, _ = read_original(folder)
    assert "transformer.visual.attn_pool.attn.in_proj_weight" in state and "transformer.h.1.mlp.w2.weight" in state
    model = convert_checkpoint(folder, tmp_path / "ours")
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    loaded = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "ours")
    processor = QwenVLProcessor.from_pretrained(tmp_path / "ours")
    assert processor.image_start_token_id == loaded.config.image_start_token_id
    made = processor(images=images(1), text="<img></img>the cat", return_tensors="pt")
    torch.testing.assert_close(loaded(**made).logits, source(**made).logits)
    assert loaded.config.seq_length == 512
    assert loaded.get_input_embeddings().padding_idx is None
    assert loaded.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    # The visual part alone, without its prefix.
    visual = {name.removeprefix("transformer.visual."): v for name, v in state.items() if ".visual." in name}
    ours = from_original(visual, 2)
    assert all(torch.equal(ours[name], source.state_dict()[name]) for name in ours)
    assert to_original(ours, 2, prefix="").keys() == visual.keys()
    with pytest.raises(ValueError, match="without a counterpart"):
        from_original({**state, "transformer.nose": torch.zeros(1)}, 2)
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        read_original(tmp_path)
    save_file({"transformer.wte.weight": state["transformer.wte.weight"]}, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        convert_checkpoint(folder, tmp_path / "other")
