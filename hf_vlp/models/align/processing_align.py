"""A processor for training ALIGN from scratch; what it saves is the native `AlignProcessor`."""

from transformers import AlignProcessor, EfficientNetImageProcessorPil, PreTrainedTokenizerBase


def align_processor(tokenizer: PreTrainedTokenizerBase, image_size: int) -> AlignProcessor:
    """Square images scaled to [-1, 1], as the published checkpoint has them, beside a BERT tokenizer.

    Args:
        tokenizer: of the text tower.
        image_size: side in pixels, reached by resizing without a crop.
    """
    image_processor = EfficientNetImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
        include_top=False,
    )
    return AlignProcessor(image_processor, tokenizer)


__all__ = ["align_processor"]
