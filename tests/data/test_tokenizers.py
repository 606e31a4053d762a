"""Tokenizers trained on one's own text: the same text gives the same vocabulary, and a saved folder opens anywhere."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_vlp.data import shapes_texts, train_bert_tokenizer, train_opt_tokenizer

TEXTS = list(shapes_texts(1500, questions=True))


@pytest.mark.parametrize("train", [train_bert_tokenizer, train_opt_tokenizer])
def test_a_saved_tokenizer_opens_as_it_was(train, tmp_path: Path) -> None:
    tokenizer = train(TEXTS, max_length=40)
    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.model_max_length == 40 and len(opened) == len(tokenizer)
    for text in (*TEXTS[:50], "Ünknown wörds, 中文 and 🙂"):
        assert opened(text).input_ids == tokenizer(text).input_ids
        assert opened.decode(opened(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)


def test_bert_tokenizer() -> None:
    tokenizer = train_bert_tokenizer(TEXTS)
    ids = tokenizer("A red Circle").input_ids
    assert (tokenizer.pad_token_id, ids[0], ids[-1]) == (0, tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.tokenize("a RED circle") == ["a", "red", "circle"]
    assert tokenizer.unk_token_id not in [one for text in TEXTS for one in tokenizer(text).input_ids]
    assert len(train_bert_tokenizer(TEXTS, vocab_size=150)) <= 150


def test_opt_tokenizer() -> None:
    tokenizer = train_opt_tokenizer(TEXTS)
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    for text in (*TEXTS[:50], "any bytes: \x00 \n é 中文 🙂"):
        start, *ids = tokenizer(text).input_ids
        assert start == tokenizer.bos_token_id and tokenizer.decode(ids) == text
    assert tokenizer("a red circle", add_special_tokens=False).input_ids == tokenizer("a red circle").input_ids[1:]
    assert len(tokenizer("a red circle").input_ids) == 4
    assert len(train_opt_tokenizer(TEXTS, vocab_size=300)) <= 300
    with pytest.raises(ValueError, match="vocab_size=100"):
        train_opt_tokenizer(TEXTS, vocab_size=100)


@pytest.mark.parametrize("train", [train_bert_tokenizer, train_opt_tokenizer])
def test_no_text_is_an_error(train) -> None:
    with pytest.raises(ValueError, match="no text"):
        train([])


@pytest.mark.slow
def test_the_vocabulary_is_that_of_any_process() -> None:
    """Rare words make for ties, which hash tables break differently in every process."""
    code = (
        "import hashlib, json, random\n"
        "from hf_vlp.data import train_bert_tokenizer, train_opt_tokenizer\n"
        "draws = random.Random(0)\n"
        "words = [''.join(draws.choices('abcdefghijklmnopqrstuvwxyzä', k=draws.randint(2, 9))) for _ in range(400)]\n"
        "texts = [' '.join(draws.sample(words, 8)) for _ in range(300)]\n"
        "for train in (train_bert_tokenizer, train_opt_tokenizer):\n"
        "    vocabulary = json.dumps(train(texts).get_vocab(), sort_keys=True)\n"
        "    print(len(vocabulary), hashlib.sha256(vocabulary.encode()).hexdigest())\n"
    )
    command = [sys.executable, "-c", code]
    runs = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(runs) == 1 and len(runs.pop().split()) == 4
