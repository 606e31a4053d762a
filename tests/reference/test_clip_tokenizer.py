"""CLIP's tokenizer against the original code, with the public vocabulary file.

The file is part of the distribution `open_clip_torch`, from which nothing is imported.
"""

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from hf_vlp.models.clip.tokenization_clip import clean_text, clip_tokenizer_from_bpe_file, tokenize
from tests.reference.cases import Case, reference

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    try:
        found = [Path(file.locate()) for file in files("open_clip_torch") or [] if file.name == VOCABULARY]
    except PackageNotFoundError:
        found = []
    if not found:
        message = f"{VOCABULARY} not found; `pip install --no-deps open_clip_torch` brings it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return clip_tokenizer_from_bpe_file(found[0])


@reference("clip/tokenizer")
def test_tokenizer(case: Case, tokenizer: CLIPTokenizer) -> None:
    texts, length = case.config["texts"], case.config["context_length"]
    case.compare("input_ids", tokenize(tokenizer, texts, length, pad_id=0, truncate=True))
    untruncated = [tokenizer(clean_text(text), add_special_tokens=False)["input_ids"] for text in texts]
    for index, ids in enumerate(untruncated):
        case.compare(f"untruncated/{index}", torch.tensor(ids, dtype=torch.int64))
    case.compare("untruncated_length", torch.tensor([len(ids) for ids in untruncated]))


@reference("clip/tokenizer", complete=False)
def test_padding_differs_only_behind_the_end(case: Case, tokenizer: CLIPTokenizer) -> None:
    texts, length = case.config["texts"], case.config["context_length"]
    cleaned = [clean_text(text) for text in texts]
    ours = tokenizer(cleaned, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    expected = case.outputs["input_ids"]
    visible = ours["attention_mask"].bool()
    assert torch.equal(ours["input_ids"][visible], expected[visible])
    assert (ours["input_ids"][~visible] == tokenizer.eos_token_id).all()
    assert (expected[~visible] == 0).all()


@reference("clip/tokenizer", complete=False)
def test_without_truncation_long_texts_raise(case: Case, tokenizer: CLIPTokenizer) -> None:
    lengths = case.outputs["untruncated_length"] + 2
    text, longest = case.config["texts"][int(lengths.argmax())], int(lengths.max())
    assert tokenize(tokenizer, [text], longest).shape == (1, longest)
    with pytest.raises(ValueError, match=f"has {longest} tokens, more than context_length={longest - 1}"):
        tokenize(tokenizer, [text], longest - 1)
