import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vlp.evaluation.ptb_tokenizer import DROPPED, tokenize_caption, tokenize_captions

GOLDEN = json.loads(Path(__file__).with_name("golden_tokens.json").read_text())["captions"]
IMAGES = json.loads(Path(__file__).with_name("golden_captions.json").read_text())["images"]
PIECES = [
    "a",
    "Dog",
    "it's",
    "can't",
    "U.S.",
    "1/2",
    "5",
    "'",
    '"',
    ".",
    ",",
    "-",
    "(",
    " ",
    "/",
    "&",
    "é",
    "!",
    "st.",
]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["caption"][:30])
def test_tokens_of_corenlp(case: dict[str, str]):
    assert tokenize_caption(case["caption"]) == case["tokens"]


def test_tokens_of_the_scored_captions():
    for image in IMAGES:
        assert tokenize_caption(image["prediction"]) == image["prediction_tokens"]
        assert tokenize_captions(image["references"]) == image["reference_tokens"]


def test_a_line_break_is_a_blank():
    assert tokenize_caption("a red\ncircle") == tokenize_caption("a red circle") == "a red circle"


@pytest.mark.parametrize("caption", ["", " ", "...", '"', "- -- .", "'"])
def test_nothing_is_left_of_marks_alone(caption: str):
    assert tokenize_caption(caption) == ""


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=20).map("".join)))
def test_any_text_gives_lower_case_tokens_without_dropped_marks(caption: str):
    tokens = tokenize_caption(caption)
    assert tokens == tokens.strip(" ")
    assert "  " not in tokens
    assert tokens == tokens.lower()
    assert not DROPPED.intersection(tokens.split(" "))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["red", "circle", "isn't", "black-and-white", "3.5", "o'clock"]), min_size=1))
def test_words_are_tokenised_one_by_one(words: list[str]):
    assert tokenize_caption(" ".join(words)) == " ".join(tokenize_captions(words))


@pytest.mark.parametrize("unit", ["a", "a-", "a.", "1,", "<a ", "'", "a'", "n't", "a@", "x/", "(", "www.", "&", "é"])
def test_long_junk_takes_no_longer_than_its_length_warrants(unit: str):
    start = time.perf_counter()
    tokenize_caption(unit * (4000 // len(unit)))
    assert time.perf_counter() - start < 5


def test_what_is_no_string_is_named():
    with pytest.raises(TypeError, match=r"captions\[1\] is NoneType"):
        tokenize_captions(["a", None])
