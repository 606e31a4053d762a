"""A processor for training ALIGN from scratch: a native `AlignProcessor` with a tokenizer of one's own."""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AlignProcessor, BertTokenizer, EfficientNetImageProcessor

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def build_align_processor(
    texts: Iterable[str], *, image_size: int = 289, vocab_size: int = 30522, context_length: int = 64
) -> AlignProcessor:
    """A WordPiece tokenizer trained on `texts`, and square images scaled to [-1, 1] as the published model has them.

    Args:
        texts: training text.
        image_size: side in pixels, reached by resizing without a crop.
        vocab_size: upper limit of the vocabulary.
        context_length: longest text in tokens, with `[CLS]` and `[SEP]`.
    """
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = BertTokenizer(vocab=backend.get_vocab(), do_lower_case=True, model_max_length=context_length)
    image_processor = EfficientNetImageProcessor(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
        include_top=False,
    )
    return AlignProcessor(image_processor, tokenizer)


__all__ = ["build_align_processor"]
