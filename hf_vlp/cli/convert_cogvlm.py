"""`hf-vlp convert` of CogVLM, both ways."""

from pathlib import Path


def convert_cogvlm(source: Path, target: Path, tokenizer: str | None = None) -> None:
    """A published CogVLM or CogVLM2 to a folder with card and processor.

    The tokenizer is the folder's own, or another (CogVLM 1 takes that of lmsys/vicuna-7b-v1.5); without one no
    processor is written.
    """
    from transformers import AutoTokenizer

    from hf_vlp.hub.saving import save_for_hub
    from hf_vlp.models.cogvlm.conversion_cogvlm import model_from_original, read_original
    from hf_vlp.models.cogvlm.processing_cogvlm import CogVLMProcessor

    model = model_from_original(*read_original(source))
    processor = None
    if tokenizer is not None or (source / "tokenizer_config.json").is_file():
        words = AutoTokenizer.from_pretrained(tokenizer or source)
        processor = CogVLMProcessor.for_model(words, model.config)
        model.config.image_token_id = processor.image_token_id
    save_for_hub(model, processor, target)


def export_cogvlm(source: Path, target: Path) -> None:
    """A folder of ours to weights and config under the names of the published code."""
    from hf_vlp.models.cogvlm.conversion_cogvlm import save_original
    from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration

    save_original(CogVLMForConditionalGeneration.from_pretrained(source), target)
