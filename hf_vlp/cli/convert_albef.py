"""`hf-vlp convert` of ALBEF, both ways."""

from pathlib import Path

from hf_vlp.cli.errors import UsageError


def convert_albef(
    source: Path,
    target: Path,
    tokenizer: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> None:
    """An ALBEF checkpoint of its authors, of pretraining or of a task, to a folder with code, card and, given a
    tokenizer, processor. MLM head, twin and queue of a pretraining are kept in the side file from which training goes
    on; text assignment becomes a model of two images whose classifier is new.
    """
    from hf_vlp.hub.saving import save_for_hub
    from hf_vlp.models.albef.conversion_albef import layout_of, model_from_original, read_original
    from hf_vlp.models.albef.processing_albef import AlbefProcessor
    from hf_vlp.models.pretraining import PreTrainingMixin

    state = read_original(source)
    model = model_from_original(state, vision_heads=vision_heads, text_heads=text_heads)
    inference = getattr(model, "inference_model", model)
    processor = None
    if tokenizer is not None:
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(tokenizer)
        rows = inference.config.text_config.vocab_size
        if len(words) > rows:
            raise UsageError(
                f"the tokenizer {tokenizer} has {len(words)} tokens, the checkpoint {rows}; give the one that belongs "
                "to it (bert-base-uncased)"
            )
        inference.config.use_tokenizer(words)
        max_words = 50 if layout_of(state).kind == "vqa" else 30
        size = inference.config.vision_config.image_size
        processor = AlbefProcessor.for_image_size(words, size, max_words=max_words)
    save_for_hub(inference, processor, target)
    if isinstance(model, PreTrainingMixin):
        model.save_extras(target)


def export_albef(source: Path, target: Path) -> None:
    """A folder of any ALBEF model with a head to one file under the names of its authors."""
    from hf_vlp.models.albef.conversion_albef import load_folder, save_original

    save_original(load_folder(source), target)
