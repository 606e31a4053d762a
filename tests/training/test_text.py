"""Texts without pictures, as a language model is trained on them."""

import pytest

from hf_vlp.data import shapes_texts, train_opt_tokenizer
from hf_vlp.training.text import BREAK, STOP, TextCollator, TextDataset, text_lines


@pytest.fixture(scope="module")
def tokenizer():
    return train_opt_tokenizer(shapes_texts(300), 512)


def test_a_text_stands_between_begin_and_stop(tokenizer) -> None:
    batch = TextCollator(tokenizer)(["a red circle", "a red circle and a blue star"])
    stop = tokenizer(STOP, add_special_tokens=False)["input_ids"]
    assert len(stop) == 1
    for row, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
        ids = row[mask.bool()].tolist()
        assert ids[0] == tokenizer.bos_token_id and ids[-1:] == stop
        assert labels[mask.bool()].tolist() == ids and (labels[~mask.bool()] == -100).all()
    assert tokenizer.decode(batch["input_ids"][0][1:]).startswith("a red circle\n")


def test_a_tab_begins_anew(tokenizer) -> None:
    collate = TextCollator(tokenizer)
    whole, one, two = (
        collate([text])["input_ids"][0].tolist() for text in ("a red star\ta blue ring", "a red star", "a blue ring")
    )
    assert whole == one[:-1] + two
    assert TextCollator(tokenizer, max_length=3)(["a red star\ta blue ring"])["input_ids"].tolist() == [one[:3]]


def test_scenes_are_described_twice_around_the_separator() -> None:
    for text in shapes_texts(50, preset="row", sentences=2, separator=BREAK):
        first, second = text.split(BREAK)
        assert first == second


def test_lines_of_a_file(tmp_path, tokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a red star\ta star\n\n  a blue ring \n")
    data = TextDataset(text_lines(path))
    assert [data[index] for index in range(len(data))] == ["a red star\ta star", "a blue ring"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"text\.txt has no line of text"):
        text_lines(path)


def test_lines_of_a_json_file_may_break(tmp_path) -> None:
    path = tmp_path / "text.jsonl"
    # A line separator of Unicode is no end of a line here.
    path.write_text('{"text": "what is it?\\na star"}\n\n{"text": " a red\u2028ring\\ta ring "}\n', encoding="utf-8")
    assert text_lines(path)["text"] == ["what is it?\na star", "a red\u2028ring\ta ring"]


@pytest.mark.parametrize("line", ["a star", '["a star"]', '{"caption": "a star"}', '{"text": 3}'])
def test_a_line_without_text_is_named(tmp_path, line: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "a ring"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"text\.jsonl, line 2: not an object with a text"):
        text_lines(path)
