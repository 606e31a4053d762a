"""InstructBLIP checkpoints of LAVIS, to the native format and back.

The names are those of BLIP-2 (see `conversion_blip_2`) with `llm_model.` and `llm_proj.` for a causal language model,
and a Q-Former that keeps its text embeddings but not its prediction head.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import InstructBlipConfig, PreTrainedConfig, PreTrainedModel

from hf_vlp.models.blip2 import conversion_blip_2 as blip2

# BLIP-2's native names -> InstructBLIP's.
_NATIVE = (("qformer.layernorm.", "qformer.embeddings.layernorm."), ("embeddings.", "qformer.embeddings."))
# Buffers of Llama that old transformers saved, and the head that LAVIS drops after loading the Q-Former.
_NOT_READ = re.compile(r"rotary_emb\.inv_freq$|^Qformer\.cls\.|\.position_ids$")


def _swap(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def native_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a BLIP-2 of transformers under the names of an InstructBLIP."""
    return {_swap(name, _NATIVE): value for name, value in state.items()}


def native_qformer_config(qformer: Mapping[str, Any]) -> dict[str, Any]:
    """A BLIP-2 Q-Former's config as an InstructBLIP's, which always reads text."""
    return {name: value for name, value in qformer.items() if name not in ("model_type", "use_qformer_text_input")}


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original names to native ones.

    Args:
        state: what `conversion_blip_2.read_original` gives; may lack parts that were frozen.

    Raises:
        ValueError: tensors without a counterpart; the message names them.
    """
    table = (("llm_model.", "opt_model."), ("llm_proj.", "opt_proj."))
    renamed = {_swap(name, table): value for name, value in state.items() if not _NOT_READ.search(name)}
    if blip2.vision_kind(renamed) == "clip":
        raise ValueError("the native instructblip format has no place for CLIP's vision tower; it holds EVA's only")
    return native_names(blip2.from_original(renamed)[0])


def to_original(state: Mapping[str, Tensor], *, language_model: str) -> dict[str, Tensor]:
    """Inverse of `from_original`.

    Args:
        state: state dict of an InstructBLIP.
        language_model: `"vicuna"` (any causal one) or `"t5"`.

    Raises:
        ValueError: tensors that the original does not have, or another `language_model`.
    """
    if language_model not in ("vicuna", "t5"):
        raise ValueError(f"language_model is 'vicuna' or 't5', not {language_model!r}")
    back = tuple((new, old) for old, new in _NATIVE)
    state = {_swap(name, back): value for name, value in state.items()}
    original = blip2.to_original(state, language_model="t5" if language_model == "t5" else "opt")
    table = (("opt_model.", "llm_model."), ("opt_proj.", "llm_proj."))
    return {_swap(name, table): value for name, value in original.items()}


def config_from_original(
    state: Mapping[str, Tensor],
    *,
    text_config: PreTrainedConfig,
    image_token_id: int | None,
    vision_heads: int | None = None,
    qformer_heads: int | None = None,
) -> InstructBlipConfig:
    """Reads the sizes of an original model off its shapes.

    Args:
        state: original state dict with its vision tower.
        text_config: of the language model.
        image_token_id: of the processor.
        vision_heads: by default width / 88, as in EVA ViT-g.
        qformer_heads: by default width / 64.

    Raises:
        ValueError: the checkpoint has no vision tower.
    """
    table = (("llm_model.", "opt_model."), ("llm_proj.", "opt_proj."))
    config = blip2.config_from_original(
        {_swap(name, table): value for name, value in state.items()},
        text_config=text_config,
        vision_heads=vision_heads,
        qformer_heads=qformer_heads,
        image_token_id=image_token_id,
    )
    vision = {name: value for name, value in config.vision_config.to_dict().items() if name != "model_type"}
    return InstructBlipConfig(
        vision_config=vision,
        qformer_config=native_qformer_config(config.qformer_config.to_dict()),
        text_config=config.text_config.to_dict(),
        num_query_tokens=config.num_query_tokens,
        image_token_index=image_token_id,
    )


def model_from_original(
    state: Mapping[str, Tensor],
    *,
    vision: Mapping[str, Tensor] | None = None,
    language_model: PreTrainedModel | None = None,
    config: InstructBlipConfig | None = None,
    **config_options: Any,
) -> transformers.InstructBlipForConditionalGeneration:
    """The model that an original checkpoint holds, in float32 and eval mode.

    Args:
        state: original state dict.
        vision: state dict of the tower's own file, if `state` lacks it.
        language_model: the language model, if `state` lacks it; its `config` serves as `text_config`.
        config: by default `config_from_original(state, **config_options)`.

    Raises:
        MissingWeightsError: parts are missing and were not given; ValueError: as of `config_from_original`.
    """
    from hf_vlp.models.instructblip.modeling_instructblip import InstructBlipForConditionalGeneration

    if vision is not None:
        state = blip2.with_vision_file(state, vision)
    if language_model is not None:
        config_options.setdefault("text_config", language_model.config)
    config = config or config_from_original(state, **config_options)
    weights = {name: v.float() if v.is_floating_point() else v for name, v in from_original(state).items()}
    model = InstructBlipForConditionalGeneration(config)
    if language_model is not None:
        weights |= {f"language_model.{name}": value for name, value in language_model.state_dict().items()}
    blip2.load_native_weights(model, weights)
    return model.eval()


def convert_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    language_model: PreTrainedModel | None = None,
    **config_options: Any,
) -> PreTrainedModel:
    """Writes an original checkpoint as a native folder.

    Args:
        path: file of LAVIS.
        out: folder to write.
        vision: the tower's own file, if `path` lacks it.
        language_model: the language model, if `path` lacks it.
        config_options: of `config_from_original`.
    """
    tower = None if vision is None else blip2.read_original(vision)
    model = model_from_original(
        blip2.read_original(path), vision=tower, language_model=language_model, **config_options
    )
    model.save_pretrained(out)
    return model


def save_original(model: PreTrainedModel, path: str | Path) -> None:
    """Writes a model under LAVIS' names, as safetensors."""
    kind = "vicuna" if model.config.use_decoder_only_language_model else "t5"
    state = to_original(model.state_dict(), language_model=kind)
    save_file(
        {name: v.detach().cpu().clone().contiguous() for name, v in state.items()}, path, metadata={"format": "pt"}
    )


__all__ = [
    "config_from_original",
    "convert_checkpoint",
    "from_original",
    "model_from_original",
    "native_names",
    "native_qformer_config",
    "save_original",
    "to_original",
]
