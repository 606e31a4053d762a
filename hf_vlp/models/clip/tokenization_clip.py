"""CLIP's tokenizer: text cleaning, the public vocabulary file, and training a vocabulary of one's own.

All functions give a plain `transformers.CLIPTokenizer`, so a saved folder opens without hf_vlp.
"""

import gzip
import html
import json
import re
from collections.abc import Iterable
from pathlib import Path

import ftfy
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"

# Sizes of the public vocabulary: bytes, bytes that end a word, merges, two special tokens.
PUBLIC_VOCAB_SIZE = 49408
BASE_SYMBOLS = 512


def clean_text(text: str) -> str:
    """The original's cleaning: mojibake repaired, HTML entities (twice) resolved, whitespace collapsed, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def _tokenizer(merges: list[tuple[str, str]], context_length: int) -> CLIPTokenizer:
    """Vocabulary in CLIP's order: bytes, bytes that end a word, merges, start, end (which must be the highest id)."""
    alphabet = list(bytes_to_unicode().values())
    symbols = [*alphabet, *(symbol + END_OF_WORD for symbol in alphabet), *("".join(pair) for pair in merges)]
    vocab = {symbol: index for index, symbol in enumerate([*symbols, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context_length)


def clip_tokenizer_from_bpe_file(path: str | Path, context_length: int = 77) -> CLIPTokenizer:
    """The public CLIP tokenizer from its vocabulary file `bpe_simple_vocab_16e6.txt.gz`.

    Args:
        path: the file, gzipped or not. It holds a header line and then one merge a line, more than CLIP uses.
        context_length: longest text in tokens, with start and end.

    Raises:
        ValueError: the file is not in that format or too short.
    """
    path = Path(path)
    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : PUBLIC_VOCAB_SIZE - BASE_SYMBOLS - 2 + 1]]
    if len(merges) != PUBLIC_VOCAB_SIZE - BASE_SYMBOLS - 2 or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: expected a header line and at least {PUBLIC_VOCAB_SIZE - BASE_SYMBOLS - 2} merges")
    return _tokenizer(merges, context_length)


def train_clip_tokenizer(texts: Iterable[str], vocab_size: int = 8192, context_length: int = 77) -> CLIPTokenizer:
    """Trains a byte-level BPE vocabulary in CLIP's format; any text can be encoded with it.

    Args:
        texts: training text, cleaned here as it is before use.
        vocab_size: upper limit, of which 514 are bytes and special tokens; little text gives fewer merges.
        context_length: longest text in tokens, with start and end.

    Returns:
        A tokenizer whose end token, also used for padding, has the highest id.

    Raises:
        ValueError: `vocab_size` is below 514.
    """
    wanted = vocab_size - BASE_SYMBOLS - 2
    if wanted < 0:
        raise ValueError(
            f"vocab_size must be at least {BASE_SYMBOLS + 2} (512 byte symbols, 2 special), not {vocab_size}"
        )
    template = CLIPTokenizer()
    backend = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        # The trainer counts the symbols, 512 of them, so this leaves room for all wanted merges.
        vocab_size=BASE_SYMBOLS + wanted,
        # Left to itself the trainer numbers the symbols that end a word in the order in which it meets them, which
        # changes from run to run, and with their numbers which of two equally frequent pairs is merged.
        special_tokens=[symbol + END_OF_WORD for symbol in alphabet],
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    backend.train_from_iterator((clean_text(text) for text in texts), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return _tokenizer(merges[:wanted], context_length)


def tokenize(
    tokenizer: CLIPTokenizer, texts: list[str], context_length: int = 77, *, pad_id: int = 0, truncate: bool = False
) -> Tensor:
    """The original's `tokenize`: cleaned texts to ids of fixed length.

    Args:
        tokenizer: of CLIP's format.
        texts: N strings.
        context_length: width of the result.
        pad_id: fills rows; the original uses 0, the tokenizer of transformers its end token.
        truncate: cuts longer texts, keeping the end token; otherwise they raise.

    Returns:
        `(N, context_length)` int64.

    Raises:
        ValueError: a text is too long and `truncate` is False.
    """
    result = torch.full((len(texts), context_length), pad_id, dtype=torch.int64)
    for row, text in zip(result, texts):
        ids = tokenizer(clean_text(text))["input_ids"]
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(f"{text!r} has {len(ids)} tokens, more than context_length={context_length}")
            ids = [*ids[: context_length - 1], tokenizer.eos_token_id]
        row[: len(ids)] = torch.tensor(ids)
    return result


__all__ = ["clean_text", "clip_tokenizer_from_bpe_file", "tokenize", "train_clip_tokenizer"]
