"""LoRA (2106.09685) on a frozen language model: where it goes, how it is saved, resumed and merged. The one place.

Adapters are put into the language model itself (`peft.inject_adapter_in_model`), not around the whole model: the model
stays a `Blip2ForConditionalGeneration`, checkpoints hold everything by name, and nothing outside the language model
can be hit by a target's name. `export` of the trainer writes the merged weights in the native format and, beside them,
the adapter alone in peft's format.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_vlp.training.arguments import option

ADAPTER = "default"
ADAPTER_FOLDER = "language_model_adapter"

# Attention projections by model type of the language model. Types that are not here are looked up in peft's own table.
TARGETS: dict[str, tuple[str, ...]] = {
    "opt": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "phi3": ("qkv_proj",),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "t5": ("q", "v"),
}


@dataclass
class LoraArguments:
    """Low-rank adapters on the frozen language model."""

    _argument_group_name: ClassVar[str] = "LoRA"

    lora_r: int = option(0, "Rank of the adapters; 0 for none, as in the paper.")
    lora_alpha: float | None = option(None, "Scale of the adapters; twice the rank if left out.")
    lora_dropout: float = option(0.05, "Dropout in front of the adapters.")
    lora_targets: list[str] = option(
        list, "Names of the layers that get an adapter, or one regular expression over their paths in the language "
        "model; left out: the query and value projections of its family."
    )  # fmt: skip
    language_model_bits: int = option(
        16, "Load the language model in 4 or 8 bits (QLoRA; needs bitsandbytes and a GPU), else in its own type."
    )


def language_model_path(model: nn.Module) -> str:
    """Where a model keeps its language model: `language_model` (BLIP-2), `model.language_model` (LLaVA), or what its
    attribute `language_model_path` says.

    Raises:
        ValueError: the model has none.
    """
    named = getattr(model, "language_model_path", None)
    modules = dict(model.named_modules())
    for path in [named] if named else ["language_model", "model.language_model"]:
        if path in modules:
            return path
    raise ValueError(f"{type(model).__name__} has no language model for adapters; its parts are {sorted(modules)[:8]}")


def lora_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers with an adapter, by path."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def resolve_targets(language_model: nn.Module, targets: list[str] | None = None) -> list[str]:
    """Paths in the language model of the layers that get an adapter.

    Args:
        language_model: has a `config.model_type`.
        targets: last parts of the layers' paths, or one regular expression over whole paths; None: by model type.

    Raises:
        ValueError: they match no layer; the message names the layers that there are.
    """
    candidates = {name: layer for name, layer in language_model.named_modules() if _can_adapt(layer)}
    kinds = sorted({name.rpartition(".")[2] for name in candidates})
    model_type = language_model.config.model_type
    wanted = list(targets or _targets_of(model_type))
    if not wanted:
        raise ValueError(
            f"no LoRA targets are known for a language model of type {model_type!r}; name some with --lora_targets, "
            f"e.g. from its layers {kinds}"
        )
    pattern = re.compile(wanted[0]) if len(wanted) == 1 and re.search(r"[*+?|\\()\[\]^$]", wanted[0]) else None
    if pattern is not None:
        found = [name for name in candidates if pattern.fullmatch(name)]
    else:
        found = [name for name in candidates if name.rpartition(".")[2] in wanted or name in wanted]
        unmatched = [
            target for target in wanted if not any(n == target or n.endswith(f".{target}") for n in candidates)
        ]
        if unmatched and found:
            raise ValueError(
                f"LoRA targets {unmatched} match no layer of {type(language_model).__name__}; it has {kinds}"
            )
    if not found:
        raise ValueError(
            f"LoRA targets {wanted} match no layer of {type(language_model).__name__}; --lora_targets may name "
            f"some of {kinds}"
        )
    return found


def add_lora(model: nn.Module, arguments: LoraArguments, *, path: str | None = None) -> list[str]:
    """Puts adapters into `model.<path>`; only they train there. Call it after `apply_stage`.

    A fresh adapter leaves the outputs as they are (its second matrix is zero). Adapters are float32 whatever the type
    of the frozen weights.

    Args:
        model: contains the language model.
        arguments: rank and targets; a rank of 0 does nothing.
        path: of the language model in `model`; by default `language_model_path`.

    Returns:
        Paths, in the language model, of the adapted layers.

    Raises:
        ValueError: targets that match nothing, a negative rank, or adapters that are there already.
    """
    if arguments.lora_r == 0:
        return []
    if arguments.lora_r < 0:
        raise ValueError(f"--lora_r must not be negative, not {arguments.lora_r}")
    from peft import LoraConfig, inject_adapter_in_model

    path = path or language_model_path(model)
    language_model = model.get_submodule(path)
    if lora_layers(language_model):
        raise ValueError(f"{path} has LoRA adapters already; merge them (hf_vlp.training.lora.merge) or load without")
    targets = resolve_targets(language_model, arguments.lora_targets or None)
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_r,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=language_model.config.model_type == "gpt2",
    )
    inject_adapter_in_model(config, language_model, ADAPTER)
    for name, parameter in language_model.named_parameters():
        is_adapter = ".lora_" in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()
    return targets


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the model with every adapter added to the layer under it, under the names of the plain model.

    The model itself is left as it is. Quantized layers are merged in their dequantized form.
    """
    layers = lora_layers(model)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        owner = next((path for path in layers if name.startswith(f"{path}.")), None)
        if owner is None:
            state[name] = value
        elif name.startswith(f"{owner}.base_layer."):
            state[name.replace(f"{owner}.base_layer.", f"{owner}.")] = value
    for path, layer in layers.items():
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(layer.base_layer).data
        for quantization in [key for key in state if key.startswith(f"{path}.weight.")]:
            del state[quantization]
        for adapter in layer.active_adapters:
            delta = layer.get_delta_weight(adapter).to(weight.device)
            weight = (weight.float() + delta.float()).to(weight.dtype)
        state[f"{path}.weight"] = weight
    return state


def merge(model: nn.Module) -> nn.Module:
    """Adds every adapter to the layer under it, in place, and takes the adapters out; returns the model."""
    for path, layer in lora_layers(model).items():
        layer.merge()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    for module in model.modules():
        if isinstance(getattr(module, "peft_config", None), dict):
            del module.peft_config
    return model


def save_adapter(model: nn.Module, folder: str | Path, *, path: str | None = None) -> Path:
    """Writes the adapters alone in peft's format: `PeftModel.from_pretrained(language_model, folder)` loads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    language_model = model.get_submodule(path or language_model_path(model))
    config = language_model.peft_config[ADAPTER]
    config.save_pretrained(folder)
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value.detach().cpu().contiguous()
        for name, value in language_model.state_dict().items()
        if ".lora_" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, path: str | None = None) -> None:
    """Puts saved adapters into `model.<path>`, by default its language model.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the adapter does not fit the language model.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has no adapter_model.safetensors; name the folder of a saved adapter")
    language_model = model.get_submodule(path or language_model_path(model))
    inject_adapter_in_model(LoraConfig.from_pretrained(folder), language_model, ADAPTER)
    saved = {
        re.sub(r"\.(lora_[A-Za-z_]+)\.", rf".\1.{ADAPTER}.", name.removeprefix("base_model.model.")): value
        for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    own = {name for name in language_model.state_dict() if ".lora_" in name}
    if set(saved) != own:
        raise ValueError(
            f"the adapter in {folder} does not fit {type(language_model).__name__}: only in the adapter "
            f"{sorted(set(saved) - own)[:3]}, only in the model {sorted(own - set(saved))[:3]}"
        )
    language_model.load_state_dict(saved, strict=False)


def language_model_options(arguments: LoraArguments) -> dict[str, Any]:
    """Keyword arguments for loading the language model in the precision that the arguments ask for.

    Raises:
        ImportError: 4 or 8 bits without bitsandbytes.
        ValueError: another number of bits.
    """
    bits = arguments.language_model_bits
    if bits in (16, 32):
        return {"dtype": torch.float32} if bits == 32 else {}
    if bits not in (4, 8):
        raise ValueError(f"--language_model_bits may be 4, 8, 16 or 32, not {bits}")
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"--language_model_bits {bits} needs bitsandbytes: pip install 'hf-vlp[quantization]', or use 16 bits"
        )
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    }


def _can_adapt(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, nn.Linear | Conv1D) and not isinstance(layer, nn.MultiheadAttention)


def _targets_of(model_type: str) -> tuple[str, ...]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return TARGETS.get(model_type) or tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ()))
