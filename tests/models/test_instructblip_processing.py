"""InstructBLIP's processor and its data: instructions cut on the left, answers on the right, mixtures of data sets."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from hf_vlp.data import InstructionCollator, InstructionDataset, InstructionSource
from hf_vlp.data.conversations import encode_conversation, load_conversations, make_template, prompt_batch, to_messages
from hf_vlp.data.instructions import TASK_FAMILIES, instruct, instruction_record, square_root_probabilities
from hf_vlp.data.records import BadRecord
from hf_vlp.models.instructblip.conversion_instructblip import (
    convert_checkpoint,
    from_original,
    model_from_original,
    save_original,
    to_original,
)
from hf_vlp.models.instructblip.modeling_instructblip import InstructBlipForConditionalGeneration
from hf_vlp.models.instructblip.processing_instructblip import InstructBlipProcessor, cut_left
from tests.tiny import instructblip as tiny
from tests.tiny.blip2 import QUERIES, bert_tokenizer, images, pixels

HEADS = {"vision_heads": 2, "qformer_heads": 4}


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_training_inputs_of_a_causal_language_model(kind: str) -> None:
    processor = tiny.processor(kind)
    made = processor.training_inputs(images(4), tiny.ANSWERS, prompt=list(tiny.INSTRUCTIONS))
    words, end = processor.tokenizer, processor.tokenizer.eos_token_id
    for row, (asked, answer) in enumerate(zip(tiny.INSTRUCTIONS, tiny.ANSWERS, strict=True)):
        expected = [processor.image_token_id] * QUERIES + words(asked)["input_ids"]
        # Tokens of words in the middle of a text, whatever the tokenizer makes of a text's first word.
        space = " " if asked else ""
        said = [*words(space + answer, add_special_tokens=False)["input_ids"], end]
        length = len(expected) + len(said)
        assert made["input_ids"][row, :length].tolist() == expected + said
        assert made["attention_mask"][row].tolist() == [1] * length + [0] * (made["input_ids"].shape[1] - length)
        assert made["labels"][row, : len(expected)].eq(-100).all() and made["labels"][row, length:].eq(-100).all()
        assert made["labels"][row, len(expected) : length].tolist() == said
    assert made["pixel_values"].shape == (4, 3, 16, 16)
    assert processor.stop_token_id == end


def test_training_inputs_of_an_encoder_decoder() -> None:
    processor = tiny.processor("t5")
    made = processor.training_inputs(None, tiny.ANSWERS, prompt=list(tiny.INSTRUCTIONS), max_length=3)
    assert made["labels"].shape[1] == 3
    assert made["labels"][1, 2] == processor.tokenizer.eos_token_id
    assert torch.equal(made["decoder_attention_mask"], (made["labels"] != -100).long())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_long_instructions_lose_their_beginning(kind: str) -> None:
    processor = tiny.processor(kind)
    text = "two green triangles and a large yellow star to the left"
    whole = processor.tokenizer(text)["input_ids"]
    cut = cut_left(processor.tokenizer, text, 6)
    assert len(cut) == 6
    assert cut == (whole[:1] + whole[-5:] if kind == "llama" else whole[-6:])
    asked = cut_left(processor.qformer_tokenizer, text, 5)
    bert = processor.qformer_tokenizer
    assert asked[0] == bert.cls_token_id and asked[-1] == bert.sep_token_id and len(asked) == 5
    assert asked[1:-1] == bert(text, add_special_tokens=False)["input_ids"][-3:]
    with pytest.raises(ValueError, match="leaves no room"):
        cut_left(bert, text, 2)


def test_long_prompts_lose_their_beginning_for_the_qformer_only() -> None:
    processor = tiny.processor()
    words = "what is in the picture near the red house and the old tree"
    free = processor(images=images(2), text=[words, "what"], return_tensors="pt")
    processor.qformer_tokenizer.model_max_length = 7
    made = processor(images=images(2), text=[words, "what"], return_tensors="pt")
    whole = free["qformer_input_ids"]
    assert made["qformer_input_ids"].shape == (2, 7)
    assert made["qformer_input_ids"][0].tolist() == [whole[0, 0].item(), *whole[0, -6:].tolist()]
    assert torch.equal(made["qformer_input_ids"][1], whole[1, :7])
    assert torch.equal(made["qformer_attention_mask"], free["qformer_attention_mask"][:, :7])
    assert torch.equal(made["input_ids"], free["input_ids"])
    alone = processor(images=images(1), text=words, return_tensors="pt")
    assert torch.equal(alone["qformer_input_ids"], made["qformer_input_ids"][:1])


def test_errors_and_images_alone() -> None:
    processor = tiny.processor()
    with pytest.raises(ValueError, match="2 instructions for 4 answers"):
        processor.training_inputs(None, tiny.ANSWERS, prompt=["a", "b"])
    with pytest.raises(ValueError, match="3 images for 4 answers"):
        processor.training_inputs(images(3), tiny.ANSWERS)
    alone = processor(images=images(2), return_tensors="pt")
    assert alone["input_ids"].shape == (2, QUERIES + 1)
    assert alone["qformer_input_ids"].tolist() == [processor.qformer_tokenizer("")["input_ids"]] * 2


def test_a_loaded_processor_pads_the_two_texts_on_their_own_sides(tmp_path: Path) -> None:
    tiny.processor().save_pretrained(tmp_path)
    again = InstructBlipProcessor.from_pretrained(tmp_path)
    made = again(images=images(2), text=["a dot", "what is to the left of the red cross?"], return_tensors="pt")
    assert made["qformer_attention_mask"][0].tolist() == sorted(
        made["qformer_attention_mask"][0].tolist(), reverse=True
    )
    text = made["attention_mask"][0, QUERIES:]
    assert text.tolist() == sorted(text.tolist()) and text[0] == 0


def test_processor_survives_saving(tmp_path: Path) -> None:
    processor = tiny.processor("t5")
    processor.save_pretrained(tmp_path)
    again = InstructBlipProcessor.from_pretrained(tmp_path)
    first = processor.training_inputs(images(2), tiny.ANSWERS[:2], prompt="what is it?")
    second = again.training_inputs(images(2), tiny.ANSWERS[:2], prompt="what is it?")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.tokenizer.padding_side == again.qformer_tokenizer.padding_side == "right"
    assert again.num_query_tokens == QUERIES


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_prompts_of_conversations_are_the_processors_own(kind: str) -> None:
    processor = tiny.processor(kind)
    template = make_template("instructblip", processor)
    turns = [
        [{"from": "human", "value": "<image>\nwhat color is the dot?"}, {"from": "gpt", "value": ""}],
        [
            {"from": "human", "value": "what is it? <image>"},
            {"from": "gpt", "value": "a large yellow star"},
            {"from": "human", "value": "and now"},
            {"from": "gpt", "value": ""},
        ],
    ]
    asked = [(images(1), to_messages(entry)[0][:-1]) for entry in turns]
    made = prompt_batch(processor, template, asked)
    texts = ["what color is the dot?", "what is it? a large yellow star. and now"]
    for row, text in enumerate(texts):
        own = processor(images=images(1), text=text, return_tensors="pt")
        mask = made["attention_mask"][row].bool()
        assert torch.equal(made["input_ids"][row][mask], own["input_ids"][0])
        mask = made["qformer_attention_mask"][row].bool()
        assert torch.equal(made["qformer_input_ids"][row][mask], own["qformer_input_ids"][0])
    with pytest.raises(ValueError, match="must not read the answers"):
        processor.complete_conversations({**made, "labels": made["input_ids"]})


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_answers_stand_behind_a_space(kind: str) -> None:
    processor = tiny.processor(kind)
    made = processor.training_inputs(None, ["a dot"], prompt="what is it?")
    ids = made["input_ids"][0, QUERIES:]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "what is it? a dot"
    # The template writes the same.
    messages = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a dot"}]
    template = make_template("instructblip", processor)
    rendered = encode_conversation(template.render(to_messages(messages)[0]), template, processor)
    assert rendered.expanded([QUERIES])[0] == made["input_ids"][0].tolist()
    assert rendered.expanded([QUERIES])[1] == made["labels"][0].tolist()
    # Without an instruction there is nothing that the space would part the answer from.
    alone = processor.training_inputs(None, ["a dot"])
    assert processor.tokenizer.decode(alone["input_ids"][0, QUERIES:], skip_special_tokens=True) == "a dot"
    bare = template.render(to_messages([{"from": "human", "value": "<image>"}, messages[1]])[0])
    assert encode_conversation(bare, template, processor).expanded([QUERIES])[0] == alone["input_ids"][0].tolist()


def test_sentencepiece_makes_the_space_itself() -> None:
    """Vicuna's tokenizer begins every text as if a space were there."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁a": 3, "▁dot": 4, "▁it": 5}
    words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = Metaspace(prepend_scheme="always")
    words.decoder = MetaspaceDecoder(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    processor = InstructBlipProcessor.for_language_model(tokenizer, bert_tokenizer(), QUERIES)
    assert processor.answer_space == ""
    made = processor.training_inputs(None, ["a dot"], prompt="it")
    assert made["input_ids"][0, QUERIES:].tolist() == [5, 3, 4, 2]


ROWS = {
    "captioning": {"image": None, "text": ["a dot", "a black dot"]},
    "text_captioning": {"image": None, "text": "a sign"},
    "classification": {"image": None, "text": "cat", "options": ["cat", "dog"]},
    "dialog": {"image": None, "caption": "a scene", "turns": [{"question": "who?", "answer": "a man"}] * 2},
    "conversation": {
        "images": [None],
        "messages": to_messages([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}])[0],
    },
}
QUESTION = {"image": None, "question": "what?", "answers": ["a", "b"], "weights": [1.0, 0.0]}


@pytest.mark.parametrize("family", TASK_FAMILIES)
def test_every_wording_of_every_family_is_filled_in(family: str) -> None:
    wordings = TASK_FAMILIES[family]
    assert len(TASK_FAMILIES) == 11 and len(set(wordings)) == len(wordings)
    # As many as in the paper; a conversation has its own words.
    assert 10 <= len(wordings) <= 15 or (family == "conversation" and wordings == ("{question}",))
    row = ROWS.get(family, QUESTION)
    seen = set()
    for seed in range(200):
        instruction, answer = instruct(row, family, seed)
        assert "{" not in instruction and instruction and answer
        seen.add(instruction)
        assert (instruction, answer) == instruct(row, family, seed)
        if family not in ROWS and family != "question_generation":
            assert answer == "a" and "what?" in instruction
    assert len(seen) >= len(wordings)
    with pytest.raises(BadRecord):
        instruct({"image": None}, family, 0)


def test_a_dialog_may_begin_with_nothing() -> None:
    turns = [{"question": "who?", "answer": "a man"}]
    made = {instruct({"image": None, "turns": turns}, "dialog", seed)[0] for seed in range(200)}
    assert made == {wording.format(question="who?") for wording in TASK_FAMILIES["vqa"]}


def test_options_stand_before_the_request_for_an_answer() -> None:
    made = {instruct({**QUESTION, "options": ["a", "b"]}, "vqa", seed)[0] for seed in range(300)}
    assert any(text.endswith("Short answer:") and "a, b" in text for text in made)
    assert all("a, b" in text for text in made)


def test_sources_are_drawn_by_the_square_roots_of_their_sizes() -> None:
    assert square_root_probabilities([100, 900, 2500]) == pytest.approx([1 / 9, 3 / 9, 5 / 9])
    assert square_root_probabilities([100, 100], [1.0, 3.0]) == pytest.approx([0.25, 0.75])
    sources = [
        InstructionSource("vqa", [{**QUESTION, "key": f"q{i}"} for i in range(100)]),
        InstructionSource("captioning", [{**ROWS["captioning"], "key": f"c{i}"} for i in range(900)]),
    ]
    data = InstructionDataset(sources, seed=3, length=4000)
    chosen, rows = data.plan(0)
    share = Counter(chosen.tolist())[0] / 4000
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    # Every row of a source is read before one is read again.
    counts = Counter(rows[chosen == 0].tolist())
    assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 100
    again = InstructionDataset(sources, seed=3, length=4000)
    assert [again[i]["key"] for i in range(50)] == [data[i]["key"] for i in range(50)]
    data.set_epoch(1)
    assert [again[i]["key"] for i in range(50)] != [data[i]["key"] for i in range(50)]
    with pytest.raises(ValueError, match="unknown family 'poems'"):
        InstructionSource("poems", [1])
    with pytest.raises(ValueError, match="is empty"):
        InstructionSource("vqa", [])


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_of_like_length(world_size: int) -> None:
    rows = load_conversations("shapes:row", "train", size=96, short=True)
    sources = [
        InstructionSource("conversation", rows),
        # No answer: nothing of it will be read.
        InstructionSource("vqa", [{**QUESTION, "answers": [], "key": f"q{i}"} for i in range(20)]),
    ]
    plain, grouped = (InstructionDataset(sources, seed=3, group_by_length=grouped) for grouped in (False, True))
    assert plain.epoch_order(0, 8, world_size) is None

    def padded(order: list[int]) -> int:
        records = [grouped[index] for index in order]
        lengths = [len(f"{one.get('instruction', '')} {one.get('answer', '')}".split()) for one in records]
        return sum(8 * max(lengths[start : start + 8]) for start in range(0, len(lengths) // 8 * 8, 8))

    for epoch in (0, 1):
        grouped.set_epoch(epoch)
        order = grouped.epoch_order(epoch, 8, world_size).tolist()
        assert sorted(order) == list(range(len(grouped)))
        assert padded(order) < 0.8 * padded(list(range(len(grouped))))
        # The members of a batch depend on neither the number of processes nor on what was read before.
        alone = InstructionDataset(sources, seed=3, group_by_length=True).epoch_order(epoch, 8, 1).tolist()
        assert [sorted(order[i : i + 8]) for i in range(0, 112, 8)] == [
            sorted(alone[i : i + 8]) for i in range(0, 112, 8)
        ]
    assert grouped.epoch_order(0, 8, world_size).tolist() != order


def test_collator_counts_what_it_cannot_use() -> None:
    rows = [
        {**QUESTION, "image": images(1)[0], "key": "good"},
        {**QUESTION, "image": {"bytes": b"no picture", "path": None}, "key": "bad image"},
        {"image": images(1)[0], "question": "why?", "answers": [], "key": "no answer"},
        {**ROWS["conversation"], "images": images(2), "key": "two images"},
    ]
    families = ["vqa", "vqa", "vqa", "conversation"]
    records = [instruction_record(row, family, 5) for row, family in zip(rows, families, strict=True)]
    from hf_vlp.data import RecordLimits

    collator = InstructionCollator(tiny.processor(), limits=RecordLimits(max_bad_rate=0.9))
    batch = collator(records)
    assert batch["pixel_values"].shape[0] == batch["qformer_input_ids"].shape[0] == 1
    found = batch["record_report"].bad
    assert found["answers_missing"] == 1 and found["image_count"] == 1 and sum(found.values()) == 3


@pytest.mark.parametrize(("kind", "name"), [("llama", "vicuna"), ("t5", "t5")])
def test_lavis_checkpoints_there_and_back(tmp_path: Path, kind: str, name: str) -> None:
    model = tiny.model(kind)
    path = tmp_path / "lavis.safetensors"
    save_original(model, path)
    original = to_original(model.state_dict(), language_model=name)
    prefix = "llm_" if kind == "llama" else "t5_"
    assert f"{prefix}proj.weight" in original and "Qformer.bert.embeddings.LayerNorm.weight" in original
    back = from_original(original)
    ours = {n: v for n, v in model.state_dict().items() if not n.endswith("position_ids")}
    assert back.keys() == ours.keys()
    for key, value in ours.items():
        if "self_attn.qkv.bias" not in key:
            assert torch.equal(back[key], value), key
    options = {"text_config": model.language_model.config, "image_token_id": model.config.image_token_id, **HEADS}
    again = model_from_original(original, **options)
    batch = {"pixel_values": pixels(4), **tiny.batch(kind)}
    if kind == "llama":  # LAVIS runs T5 with the exact GELU, see `exact_gelu`
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-4)
    convert_checkpoint(path, tmp_path / "out", **options)
    loaded = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(**batch).logits, again(**batch).logits)
    with pytest.raises(ValueError, match="without a counterpart"):
        from_original({**original, "something.else": torch.zeros(1)})
    with pytest.raises(ValueError, match="'vicuna' or 't5'"):
        to_original(model.state_dict(), language_model="opt")
