"""`hf-vlp convert llava` and `to-llava`."""

from pathlib import Path

from hf_vlp.cli.errors import UsageError


def convert_llava(
    source: Path, target: Path, tokenizer: str | None = None, vision: str | None = None, base: str | None = None
) -> None:
    """An original LLaVA folder (1, 1.5, NeXT; or stage 1's projector with `base`) to a native one with processor."""
    from transformers import AutoTokenizer

    from hf_vlp.hub.saving import save_for_hub
    from hf_vlp.models.llava.conversion_llava import is_original, load_original, read_settings
    from hf_vlp.models.llava.initialization_llava import new_processor

    if not is_original(source):
        raise UsageError(f"{source} is no folder of the original LLaVA (its config.json names no mm_vision_tower)")
    words = tokenizer or base or (str(source) if (source / "tokenizer_config.json").is_file() else None)
    model = load_original(source, base=base, vision=vision)
    processor = None
    if words is not None:
        tiles = model.config.model_type == "llava_next"
        settings = read_settings(source)
        if tiles:
            options = {"image_grid_pinpoints": model.config.image_grid_pinpoints, "max_tiles": 10**6}
        else:
            options = {"aspect": "pad" if settings.get("image_aspect_ratio") == "pad" else "crop"}
        processor = new_processor(
            AutoTokenizer.from_pretrained(words), model.model.vision_tower, tiles=tiles, **options
        )
        if processor.image_token_id != model.config.image_token_id:
            raise UsageError(
                f"the tokenizer {words} has {processor.image_token_id} tokens before <image>, the model "
                f"{model.config.image_token_id}; give the tokenizer that belongs to the checkpoint"
            )
    save_for_hub(model, processor, target)


def export_llava(source: Path, target: Path, vision: str = "openai/clip-vit-large-patch14-336") -> None:
    """A native LLaVA folder under the original names; `vision` is what its config is to name as the tower."""
    from hf_vlp.models.catalog import load_class
    from hf_vlp.models.llava.conversion_llava import save_original

    save_original(load_class(str(source), "model").from_pretrained(source), target, vision=vision)
