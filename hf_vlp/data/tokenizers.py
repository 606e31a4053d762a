"""Small tokenizers trained on one's own text, of the kinds that BERT and OPT/GPT-2 models take.

All run without a network and give plain transformers tokenizers, so that a saved folder opens without hf_vlp. The
same text gives the same vocabulary.
"""

import json
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer

_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_OPT_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def train_bert_tokenizer(
    texts: Iterable[str], vocab_size: int = 2_000, *, max_length: int = 512, min_frequency: int = 2
) -> BertTokenizer:
    """A lower-casing WordPiece tokenizer with BERT's special tokens, [PAD] = 0.

    Args:
        texts: sentences to learn from.
        vocab_size: most tokens, special ones included.
        max_length: `model_max_length` of the result.
        min_frequency: times a pair of pieces must occur to be joined.

    Raises:
        ValueError: there is no text.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word
        for text in _some(texts)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    )
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    alphabet = sorted(counts, key=lambda character: (-counts[character], character))[: max(100, vocab_size // 4)]
    followers = {character for word in words for character in word[1:]} & set(alphabet)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        # The trainer would number the pieces inside words in the order in which it meets them, which changes from run
        # to run, and with their numbers which of two equally frequent pairs is joined.
        special_tokens=[*_BERT_SPECIAL, *sorted(alphabet), *(f"##{character}" for character in sorted(followers))],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator((word for word in sorted(words) for _ in range(words[word])), trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=max_length)


def train_opt_tokenizer(
    texts: Iterable[str], vocab_size: int = 2_000, *, max_length: int = 2048, min_frequency: int = 2
) -> GPT2Tokenizer:
    """A byte-level BPE tokenizer with the special tokens of OPT: </s> (2) begins and ends a text, <pad> is 1.

    As OPT's own, it puts </s> in front of every text and nothing behind it; any string can be encoded and
    decoded back.

    Args:
        texts, vocab_size, max_length, min_frequency: as in `train_bert_tokenizer`; `vocab_size` of at least 260 holds
            every byte and the special tokens.

    Raises:
        ValueError: there is no text, or `vocab_size` is below 260.
    """
    if vocab_size < 256 + len(_OPT_SPECIAL):
        raise ValueError(f"vocab_size={vocab_size} has no room for 256 bytes and {len(_OPT_SPECIAL)} special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(_OPT_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_some(texts), trainer)
    learned = GPT2Tokenizer(
        vocab=tokenizer.get_vocab(),
        merges=_merges(tokenizer),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=max_length,
    )
    learned.add_special_tokens({"additional_special_tokens": ["<s>"]})
    learned.add_bos_token = True
    return learned


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]


def _some(texts: Iterable[str]) -> Iterable[str]:
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise ValueError("there is no text to train a tokenizer on")
    yield first
    yield from texts
