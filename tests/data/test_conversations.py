"""Conversations: reading them, writing them by templates, what is learned of them, and batches."""

import io
import json
import tarfile

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_vlp.data import ErrorRateExceeded, RecordLimits
from hf_vlp.data.conversations import (
    ConversationCollator,
    ConversationDataset,
    ImageCountError,
    encode_conversation,
    load_conversations,
    make_template,
    pack_lengths,
    prompt_batch,
    template_names,
    to_messages,
)
from hf_vlp.data.conversations.prompts import answer_text, stop_ids
from hf_vlp.data.conversations.templates import rendered_parts
from hf_vlp.data.splits import NoSplitError

from .conversations import SPECIAL, TinyProcessor, byte_tokenizer, learned_texts, record

IGNORED = -100
LIMITS = RecordLimits(max_bad_rate=1.0)
WORDED = ("plain", "v0", "vicuna_v1", "llava_v1", "v1_mmtag", "llama_2", "mpt")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENTRIES = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for entry in message['content'] %}{% if entry['type'] == 'image' %}<image>{% else %}{{ entry['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- reading


def test_llava_turns_become_messages():
    messages, images = to_messages(
        [{"from": "human", "value": "What is\n<image>\nthis?"}, {"from": "gpt", "value": "A dog."}]
    )
    assert images == []
    assert messages == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is\n"},
                {"type": "image", "text": None},
                {"type": "text", "text": "\nthis?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ]


def test_chat_entries_may_hold_their_images():
    content = [
        {"type": "image", "path": "a.png"},
        {"type": "text", "text": "<image>?"},
        {"type": "image_url", "image_url": {"url": "b.png"}},
    ]
    messages, images = to_messages([{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}])
    assert images == ["a.png", "b.png"]
    assert [entry["type"] for entry in messages[0]["content"]] == ["image", "text", "image"]


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ("hello", "instead of a list"),
        ([], "instead of a list"),
        (["hello"], "turn 0"),
        ([{"from": "bot", "value": "hi"}], "'bot'"),
        ([{"from": "human", "value": "hi"}], "nothing to learn"),
        ([{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}], "turn 0"),
        ([{"from": "human", "value": "a"}, {"role": "system", "content": "b"}], "may speak only first"),
        ([{"role": "assistant", "content": [{"type": "video"}]}], "neither a text nor an image"),
        (
            [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>b"}],
            "assistant's, has an image",
        ),
        ([{"role": "system", "content": [{"type": "image"}]}], "turn 0, the system's, has an image"),
    ],
)
def test_what_is_no_conversation_is_refused(turns, what):
    with pytest.raises(ValueError, match=what):
        to_messages(turns)


def _write(folder, name="chat.json", broken=False):
    for number in range(2):
        Image.new("RGB", (3 + number, 4)).save(folder / f"{number}.png")
    said = [
        {
            "id": "one",
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
        },
        {
            "id": "two",
            "image": ["0.png", "1.png"],
            "conversations": [{"from": "human", "value": "<image><image>Q"}, {"from": "gpt", "value": "A"}],
        },
        {"id": "three", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    ]
    if broken:
        said.append({"id": "four", "conversations": [{"from": "x", "value": "Q"}]})
    path = folder / name
    path.write_text("\n".join(map(json.dumps, said)) if name.endswith("l") else json.dumps(said))
    return path


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_llava(tmp_path, name, streaming):
    rows = list(load_conversations(_write(tmp_path, name), streaming=streaming))
    assert [row["key"] for row in rows] == ["one", "two", "three"]
    assert [len(row["images"]) for row in rows] == [1, 2, 0]
    assert rows[0]["images"][0]["path"] == str(tmp_path / "0.png")
    assert all(row["problem"] is None for row in rows)


def test_parquet_tar_and_saved_folders_give_the_same_messages(tmp_path):
    import datasets

    rows = load_conversations(_write(tmp_path))
    plain = [row["messages"] for row in rows]
    chats = [[{"role": one["role"], "content": one["content"]} for one in messages] for messages in plain]
    typed = datasets.Dataset.from_list(
        [
            {"id": row["key"], "images": [image["path"] for image in row["images"]], "messages": chat}
            for row, chat in zip(rows, chats, strict=True)
        ]
    )
    typed.to_parquet(tmp_path / "train.parquet")
    typed.save_to_disk(tmp_path / "saved")
    for spec in (tmp_path / "train.parquet", tmp_path / "saved"):
        loaded = load_conversations(spec)
        assert [row["messages"] for row in loaded] == plain
        assert [[image["path"] for image in row["images"]] for row in loaded] == [
            [image["path"] for image in row["images"]] for row in rows
        ]
        assert [row["messages"] for row in load_conversations(spec, streaming=True)] == plain
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, conversation in enumerate(json.loads((tmp_path / "chat.json").read_text())):
            held = conversation.get("image", [])
            for place, image in enumerate([held] if isinstance(held, str) else held):
                archive.add(tmp_path / image, f"{number:03}.{place}.png")
            content = json.dumps({"conversations": conversation["conversations"]}).encode()
            info = tarfile.TarInfo(f"{number:03}.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    loaded = list(load_conversations(tmp_path / "train.tar", streaming=True))
    assert [row["messages"] for row in loaded] == plain
    assert [len(row["images"]) for row in loaded] == [1, 2, 0]
    assert loaded[0]["images"][0]["bytes"] == (tmp_path / "0.png").read_bytes()


def test_a_split_that_the_hub_does_not_have(monkeypatch):
    def without_split(*args, **options):
        raise ValueError("Unknown split \"test\". Should be one of ['train', 'dev'].")

    monkeypatch.setattr(datasets, "load_dataset", without_split)
    with pytest.raises(NoSplitError, match="org/name has no split 'test'; it has train, dev$"):
        load_conversations("org/name", "test")


def test_a_bad_record_keeps_its_place_and_is_counted(tmp_path):
    rows = load_conversations(_write(tmp_path, broken=True))
    batch = ConversationCollator(TinyProcessor(), limits=LIMITS)([dict(row) for row in rows])
    assert batch["input_ids"].shape[0] == 3
    assert batch["record_report"].bad == {"messages_wrong": 1}
    assert batch["record_report"].examples["messages_wrong"][0].key == "four"


def test_sources_that_cannot_be_read_say_why(tmp_path):
    path = _write(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_conversations(tmp_path / "none.json")
    with pytest.raises(ValueError, match="image_root"):
        load_conversations(path, image_root=tmp_path / "none")
    (tmp_path / "else").mkdir()
    with pytest.raises(ValueError, match="none of the first"):
        load_conversations(path, image_root=tmp_path / "else")
    with pytest.raises(ValueError, match="is no role"):
        load_conversations(path, columns={"talk": "x"})
    with pytest.raises(TypeError, match="only Shapes"):
        load_conversations(path, preset="simple")
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": "0.png", "text": "a dog"}]))
    with pytest.raises(ValueError, match="no column looks like conversations"):
        load_conversations(tmp_path / "pairs.json")
    with pytest.raises(ValueError, match="validation"):
        load_conversations(path, "validation")


# --- templates


@pytest.mark.parametrize("name", WORDED)
def test_exactly_the_answers_and_what_ends_them_are_learned(name):
    processor = TinyProcessor()
    collator = ConversationCollator(processor, template=name)
    batch = collator([record("<image>\nFirst?", "One.", "Second?", "Two two.", images=(5,))])
    learned = learned_texts(processor.tokenizer, batch["input_ids"][0], batch["labels"][0])
    expected = {
        "plain": ["One.\nTwo two.\n"],
        "v0": [" One.\n###", " Two two.\n###"],
        "llama_2": [" One. </s>", " Two two. </s>"],
        "mpt": ["One.<|im_end|>", "Two two.<|im_end|>"],
    }.get(name, [" One.</s>", " Two two.</s>"])
    assert learned == expected
    assert int((batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum()) == 5


@pytest.mark.parametrize("name", WORDED)
def test_a_prompt_is_the_beginning_of_what_is_learned(name):
    """What the model is asked to continue is, token for token, what stood before the answer in training."""
    processor = TinyProcessor()
    template = make_template(name, processor)
    whole = record("<image>\nFirst?", "One.", "Second?", "Two.", images=(2,))
    encoded = encode_conversation(template.render(whole["messages"]), template, processor)
    first = [place for place, label in enumerate(encoded.labels) if label != IGNORED][0]
    prompt = encode_conversation(template.prompt(whole["messages"][:1]), template, processor)
    assert prompt.input_ids == encoded.input_ids[:first]
    assert all(label == IGNORED for label in prompt.labels)


@pytest.mark.parametrize("source", [CHATML, ENTRIES, GENERATION])
def test_chat_templates(source):
    tokenizer = byte_tokenizer(adds_bos=False)
    tokenizer.chat_template = source
    processor = TinyProcessor(tokenizer)
    collator = ConversationCollator(processor, template="chat")
    batch = collator([record("<image>\nFirst?", "One.", "Second?", "Two.", images=(4,))])
    learned = learned_texts(tokenizer, batch["input_ids"][0], batch["labels"][0])
    assert learned == ["One.<|im_end|>", "Two.<|im_end|>"]
    assert collator.template.end_of_turn == "<|im_end|>"
    assert stop_ids(processor, collator.template) == tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    # One tokenisation of the whole text, as at inference.
    text = collator.template.render(record("Hi", "Ho")["messages"]).text
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    assert collator.encode(record("Hi", "Ho")).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_a_chat_template_that_rewrites_its_beginning_needs_marks():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    collator = ConversationCollator(TinyProcessor(tokenizer), template="chat")
    with pytest.raises(ValueError, match="generation"):
        collator.encode(record("Hi", "Ho", "Hi", "Ho"))
    tokenizer.chat_template = "{{ messages | length }}" + GENERATION
    collator = ConversationCollator(TinyProcessor(tokenizer), template="chat")
    encoded = collator.encode(record("Hi", "Ho", "Hi", "Ho"))
    assert (
        learned_texts(tokenizer, torch.tensor(encoded.input_ids), torch.tensor(encoded.labels)) == ["Ho<|im_end|>"] * 2
    )


def test_image_positions_and_systems():
    processor = TinyProcessor()
    said = record("one <image> two", "A", images=(1,))["messages"]

    def words(**options):
        return make_template("vicuna_v1", processor, system="S", **options).render(said).text

    assert words() == "S USER: <image>\none  two ASSISTANT: A</s>"
    assert words(image_position="last") == "S USER: one  two\n<image> ASSISTANT: A</s>"
    assert words(image_position="given") == "S USER: one <image> two ASSISTANT: A</s>"
    own = [{"role": "system", "content": [{"type": "text", "text": "own"}]}, *said]
    assert make_template("mpt", processor).render(own).text.startswith("<|im_start|>system\nown<|im_end|>")
    with pytest.raises(ValueError, match="image_position='middle'"):
        make_template("vicuna_v1", processor, image_position="middle")


def test_two_images_of_a_turn_are_two():
    template = make_template("vicuna_v1", TinyProcessor(), system="")
    rendered = template.render(record("<image><image>Compare.", "A", images=(1, 1))["messages"])
    assert rendered.text == "USER: <image>\n<image>\nCompare. ASSISTANT: A</s>"
    assert [rendered.text[start:end] for start, end in rendered.images] == ["<image>", "<image>"]
    assert rendered_parts(rendered)[-1] == ("learned", " A</s>")


def _sentencepiece_tokenizer(before_a_blank):
    """Letters and `▁`, which stands in front of any text, or of those only that do not begin with a blank."""
    known = [*SPECIAL, "▁", *sorted({*" ".join(map(chr, range(33, 127)))} - {" "}), "\n"]
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(known)}, merges=[]))
    if before_a_blank:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.mark.parametrize("before_a_blank", [True, False])
def test_a_blank_behind_an_image_is_two_of_sentencepiece(before_a_blank):
    processor = TinyProcessor(_sentencepiece_tokenizer(before_a_blank))
    for template, turns, behind, learned in (
        ("vicuna_v1", ("<image>", "no"), "▁ ▁ A S S I S T A N T : ▁ n o </s>", "▁ n o </s>"),
        ("vicuna_v1", ("<image>\nA", "no"), "▁ \n A ▁ A S S I S T A N T : ▁ n o </s>", "▁ n o </s>"),
        ("plain", ("<image>", " no"), "▁ ▁ n o \n", "▁ ▁ n o \n"),
        ("plain", ("<image>", "no"), "▁ n o \n", "▁ n o \n"),
    ):
        made = make_template(template, processor)
        encoded = encode_conversation(made.render(record(*turns)["messages"]), made, processor)
        tokens = processor.tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.placeholders[0] + 1 :])
        assert tokens == behind.split(" ")
        kept = [one for one in encoded.labels if one != IGNORED]
        assert processor.tokenizer.convert_ids_to_tokens(kept) == learned.split(" ")
        assert [end - start for start, end in encoded.units] == [1]


@pytest.mark.parametrize("before_a_text", [False, True])
def test_a_blank_behind_an_image_is_one_of_bytes(before_a_text):
    processor = TinyProcessor()
    processor.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=before_a_text)
    made = make_template("vicuna_v1", processor)
    encoded = encode_conversation(made.render(record("<image>", "no")["messages"]), made, processor)
    tokens = processor.tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.placeholders[0] + 1 :])
    assert tokens[:3] == ["Ġ", "A", "S"]


def test_what_a_template_needs_and_lacks_is_named():
    processor = TinyProcessor()
    with pytest.raises(ValueError, match="unknown template 'vicuna'; there are .*vicuna_v1"):
        make_template("vicuna", processor)
    with pytest.raises(ValueError, match="no chat template"):
        make_template("chat", processor)
    without = TinyProcessor(byte_tokenizer(special=("<unk>", "<s>", "</s>", "<pad>")))
    with pytest.raises(ValueError, match="has no token '<image>'"):
        make_template("vicuna_v1", without)
    without.image_token = None
    with pytest.raises(ValueError, match="has no image_token"):
        ConversationCollator(without)
    processor.tokenizer.chat_template = ENTRIES.replace("<image>", "<picture>")
    with pytest.raises(ValueError, match="writes no '<image>'"):
        make_template("chat", processor)
    with pytest.raises(TypeError, match="prepare_images"):
        ConversationCollator(byte_tokenizer())
    assert set(WORDED) <= set(template_names())


# --- batches


def test_placeholders_and_images_must_agree():
    collator = ConversationCollator(TinyProcessor())
    with pytest.raises(ImageCountError, match=r"test \[7\]: the conversation names 1 image but the record has 2"):
        collator([record("<image>Q", "A", images=(1, 1), key="7")])
    with pytest.raises(ImageCountError, match=r"test \[8\]: the conversation names 1 image but the record has 0"):
        collator([record("<image>Q", "A", key="8")])
    written = record("Q", "A", key="9")
    written["messages"][0]["content"][0]["text"] = "what does <image> mean?"
    with pytest.raises(ImageCountError, match=r"test \[9\]: 1 image tokens for 0 images"):
        collator([written])


def test_an_unreadable_image_leaves_its_conversation_out():
    rows = [record("<image>Q", "A", images=(2,)), record("<image>Q", "A", images=(2,), key="bad"), record("Q", "A")]
    rows[1]["images"] = [{"bytes": b"no image", "path": None}]
    batch = ConversationCollator(TinyProcessor(), limits=LIMITS)(rows)
    assert batch["record_report"].bad == {"image_not_an_image": 1}
    assert batch["input_ids"].shape[0] == 2 and batch["pixel_values"].shape[0] == 1
    with pytest.raises(ErrorRateExceeded):
        ConversationCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=0.0))(rows)


def test_padding_is_neither_seen_nor_learned():
    batch = ConversationCollator(TinyProcessor())([record("Q", "A"), record("<image>Longer?", "Answer.", images=(6,))])
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert bool((labels[length:] == IGNORED).all()) and bool((ids[length:] == 3).all())
    assert "sequence_ids" not in batch


def test_images_of_a_conversation_are_prepared_once():
    processor = TinyProcessor()
    ConversationCollator(processor)(
        [record("<image>Q", "A", *["Q", "A"] * 5, images=(2,)), record("<image>Q", "A", images=(3,))]
    )
    assert processor.calls == [2]


@settings(max_examples=60, deadline=None)
@given(
    longest=st.integers(1, 90),
    images=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    last=st.booleans(),
)
def test_truncation_never_cuts_through_an_image(longest, images, last):
    processor = _PROCESSOR
    marks = "<image>" * len(images)
    row = record(f"{marks}Q" if not last else f"Q{marks}", "An answer.", images=tuple(images))
    options = {"system": "", "image_position": "given"}
    collator = ConversationCollator(processor, template_options=options, max_length=longest, limits=LIMITS)
    whole = ConversationCollator(processor, template_options=options, limits=LIMITS)([row])
    batch = collator([row])
    if "input_ids" not in batch:
        assert batch["record_report"].bad == {"labels_missing": 1}
        assert bool((whole["labels"][0, :longest] == IGNORED).all())
        return
    ids = batch["input_ids"][0]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert len(ids) <= longest
    assert torch.equal(ids, whole["input_ids"][0, : len(ids)])
    # As many image tokens as the images that are there have features.
    there = batch.get("pixel_values", torch.zeros(0, 3, 2, 2))[:, 0, 0, 0]
    assert int((ids == image).sum()) == int(there.sum())
    assert there.tolist() == [float(width) for width in images[: len(there)]]


_PROCESSOR = TinyProcessor()


def test_a_conversation_without_anything_to_learn_is_counted_and_named():
    rows = [record("A long question " * 10, "A", key="cut"), record("Q", "A")]
    collator = ConversationCollator(TinyProcessor(), template_options={"system": ""}, max_length=60, limits=LIMITS)
    batch = collator(rows)
    assert batch["input_ids"].shape[0] == 1
    found = batch["record_report"].examples["labels_missing"][0]
    assert found.key == "cut" and "cut to 60" in found.detail


# --- packing


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(50, 120))
def test_rows_hold_every_sequence_once_and_little_padding(lengths, capacity):
    rows = pack_lengths(lengths, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    loads = [sum(lengths[number] for number in row) for row in rows]
    assert all(0 < load <= capacity for load in loads)
    # Rows of best fit, no two of which would fit into one, are on average more than half full.
    assert len(rows) <= 1 or 2 * sum(lengths) > capacity * len(rows)
    assert rows == pack_lengths(lengths, capacity)


def test_rows_are_about_as_long_as_each_other():
    lengths = [9, 8, 7, 6, 5, 4, 3, 2, 1]
    rows = pack_lengths(lengths, 17)
    assert sorted(sum(lengths[number] for number in row) for row in rows) == [14, 15, 16]
    assert pack_lengths([], 5) == []


def test_what_does_not_fit_into_a_row_is_refused():
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens"):
        pack_lengths([3, 9], 8)
    with pytest.raises(ValueError, match="pack_to=0"):
        ConversationCollator(TinyProcessor(), pack_to=0)


def _mixed(count=12):
    rows = []
    for number in range(count):
        images = (number % 4 + 1,) if number % 3 else ()
        turns = ["<image>Q" if images else "Q", "word " * (1 + (5 * number) % 7), "and?", "so"]
        rows.append(record(*turns, images=images, key=str(number)))
    return rows


def test_packed_rows_are_the_conversations_end_to_end():
    processor = TinyProcessor()
    options = {"template_options": {"system": "sys"}}
    padded = ConversationCollator(processor, **options)(_mixed())
    packed = ConversationCollator(processor, pack_to=200, **options)(_mixed())
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    single = {}
    for ids, labels, mask in zip(padded["input_ids"], padded["labels"], padded["attention_mask"], strict=True):
        length = int(mask.sum())
        single[tuple(ids[:length].tolist())] = labels[:length]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    widths = []
    for row in range(packed["input_ids"].shape[0]):
        for sequence in range(1, int(packed["sequence_ids"][row].max()) + 1):
            here = packed["sequence_ids"][row] == sequence
            ids = packed["input_ids"][row][here]
            assert torch.equal(packed["labels"][row][here], single.pop(tuple(ids.tolist())))
            assert torch.equal(packed["position_ids"][row][here], torch.arange(len(ids)))
            if count := int((ids == image).sum()):
                widths.append(count)
    assert not single
    # Pictures come in the order of their tokens.
    assert packed["pixel_values"][:, 0, 0, 0].tolist() == widths
    assert torch.equal(packed["attention_mask"], (packed["sequence_ids"] > 0).long())


def test_features_that_are_not_one_an_image_are_made_again_in_order():
    processor = TinyProcessor()
    prepare = processor.prepare_images

    def flat(images):
        features, counts = prepare(images)
        return {"patches": features["pixel_values"].repeat_interleave(torch.tensor(counts), dim=0)}, counts

    processor.prepare_images = flat
    packed = ConversationCollator(processor, pack_to=300)(_mixed())
    expected = torch.cat([torch.full((count,), float(count)) for count in _image_counts(processor, packed)])
    assert torch.equal(packed["patches"][:, 0, 0, 0], expected)


def _image_counts(processor, batch):
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    for row in range(batch["input_ids"].shape[0]):
        for sequence in range(1, int(batch["sequence_ids"][row].max()) + 1):
            count = int(((batch["sequence_ids"][row] == sequence) & (batch["input_ids"][row] == image)).sum())
            if count:
                yield count


# --- generation


def test_prompts_are_padded_on_the_left():
    processor = TinyProcessor()
    template = make_template("vicuna_v1", processor)
    rows = [record("<image>Q", "A", images=(4,)), record("A longer question?", "A")]
    batch = prompt_batch(processor, template, [(row["images"], row["messages"][:1]) for row in rows])
    assert batch["pixel_values"].shape[0] == 1
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        encoded = encode_conversation(template.render(row["messages"]), template, processor)
        counts = [image.width for image in row["images"]]
        assert ids[-length:].tolist() == encoded.expanded(counts)[0][:length]
    with pytest.raises(ValueError, match="ends with the user's"):
        prompt_batch(processor, template, [([], record("Q", "A")["messages"])])
    ids = processor.tokenizer(" red.</s> more", add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert answer_text(processor, template, ids) == "red."
    version_0 = make_template("v0", processor)
    ids = processor.tokenizer(" red.\n### Human: next", add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert answer_text(processor, version_0, ids) == "red."


def test_records_know_their_seed_and_epoch(tmp_path):
    dataset = ConversationDataset(load_conversations(_write(tmp_path)), seed=3)
    first = dataset[0]["seed"]
    dataset.set_epoch(1)
    assert dataset[0]["seed"] != first and dataset[-1]["key"] == "three"
    dataset.set_epoch(0)
    assert dataset[0]["seed"] == first
    with pytest.raises(IndexError):
        dataset[3]
    with pytest.raises(ValueError, match="images, messages"):
        ConversationDataset(load_conversations(_write(tmp_path)).remove_columns("images"))
