"""`hf-vlp convert` of BLIP, both ways."""

from pathlib import Path

from hf_vlp.cli.errors import UsageError


def convert_blip(
    source: Path,
    target: Path,
    tokenizer: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> None:
    """A BLIP checkpoint of its authors, of pretraining or of a task, to a folder with card and, given a tokenizer,
    processor. Momentum twin and queues of a pretraining are kept in the side file from which training goes on.
    """
    from hf_vlp.hub.saving import save_for_hub
    from hf_vlp.models.blip.conversion_blip import inference_model, kind_of, read_original, training_model

    state = read_original(source)
    kind = kind_of(state)
    if kind == "base":
        raise UsageError(f"{source} holds towers without a head, which no model of BLIP is; give a whole checkpoint")
    options = {"vision_heads": vision_heads, "text_heads": text_heads}
    words = None
    if tokenizer is not None:
        from transformers import AutoTokenizer

        from hf_vlp.models.blip.processing_blip import DECODER_TOKEN, ENCODER_TOKEN, add_blip_tokens

        words = add_blip_tokens(AutoTokenizer.from_pretrained(tokenizer))
        options |= {
            "dec_token_id": words.convert_tokens_to_ids(DECODER_TOKEN),
            "enc_token_id": words.convert_tokens_to_ids(ENCODER_TOKEN),
            "sep_token_id": words.sep_token_id,
        }
    with_twin = kind == "pretraining" and "image_queue" in state
    model = (training_model if with_twin else inference_model)(state, **options)
    processor = None
    if words is not None:
        from hf_vlp.models.blip.processing_blip import BlipProcessor

        rows = model.config.text_config.vocab_size
        if len(words) > rows:
            raise UsageError(
                f"the tokenizer {tokenizer} has {len(words)} tokens with [DEC] and [ENC], the checkpoint {rows}; give "
                "the one that belongs to it (bert-base-uncased)"
            )
        size = model.config.vision_config.image_size
        processor = BlipProcessor.for_image_size(words, size, max_words=50 if kind == "vqa" else 30)
    save_for_hub(model, processor, target)
    if with_twin:
        model.save_extras(target)


def export_blip(source: Path, target: Path) -> None:
    """A folder of any BLIP model to one file under the names of its authors."""
    from hf_vlp.models.blip.conversion_blip import load_folder, save_original

    save_original(load_folder(source), target)
