"""What a LoRA run trained, alone: a small folder that is put onto its base again, or merged into a native one.

<folder>/adapters.json                the base and its architecture
<folder>/language_model_adapter/      the adapters in peft's format
<folder>/trained.safetensors          every other weight that was trained (the projector, a newline, …), by name
<folder>/generation_config.json       where answers end, which the template of the run decides
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

from hf_vlp.models.catalog import architecture_of
from hf_vlp.training.lora import ADAPTER_FOLDER, load_adapter, lora_layers, merge, save_adapter

INDEX_FILE = "adapters.json"
TRAINED_FILE = "trained.safetensors"
GENERATION_FILE = "generation_config.json"


class AdapterFolderError(ValueError):
    """A folder of adapters that is incomplete, or that does not fit the base."""


def save_adapters(model: nn.Module, folder: str | Path, *, base: str | Path) -> Path:
    """Writes what trains in a model with LoRA adapters.

    Args:
        model: with adapters; what requires a gradient besides them goes to `trained.safetensors`.
        base: folder or Hub id that the run started from.

    Raises:
        ValueError: the model has no adapters.
    """
    if not lora_layers(model):
        raise ValueError(f"{type(model).__name__} has no LoRA adapters; save the whole model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(model, folder / ADAPTER_FOLDER)
    trained = {
        name: parameter.detach().cpu().contiguous().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }
    save_file(trained, folder / TRAINED_FILE, metadata={"format": "pt"})
    model.generation_config.save_pretrained(folder)
    base = str(base)
    index = {
        "base": os.path.relpath(base, folder) if Path(base).is_dir() else base,
        "base_is_folder": Path(base).is_dir(),
        "model_type": model.config.model_type,
        "class": type(model).__name__,
    }
    # Last, so that a folder with an index is whole.
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def base_of(folder: str | Path) -> str:
    """Folder or Hub id of the base of saved adapters.

    Raises:
        AdapterFolderError: no adapters of `save_adapters` are there, or the base is gone.
    """
    folder = Path(folder)
    index = _index(folder)
    if not index["base_is_folder"]:
        return index["base"]
    base = (folder / index["base"]).resolve()
    if not (base / "config.json").is_file():
        raise AdapterFolderError(f"the base of {folder}, {base}, is not there any more; name it with --base")
    return str(base)


def load_adapters(model: nn.Module, folder: str | Path) -> nn.Module:
    """Puts saved adapters and the weights that were trained with them onto a base; returns the model.

    Raises:
        AdapterFolderError: they are of another architecture, or of other sizes.
    """
    folder = Path(folder)
    index = _index(folder)
    if index["model_type"] != model.config.model_type:
        raise AdapterFolderError(
            f"{folder} holds adapters of a {index['model_type']!r}, the base is a {model.config.model_type!r}"
        )
    trained, own = load_file(folder / TRAINED_FILE), dict(model.named_parameters())
    wrong = [name for name, value in trained.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        name = wrong[0]
        size = tuple(own[name].shape) if name in own else "absent"
        raise AdapterFolderError(
            f"{folder} does not fit the base: {name!r} is {tuple(trained[name].shape)} there and {size} in the base "
            f"({len(wrong)} such weights); give the base that the adapters were trained on"
        )
    load_adapter(model, folder / ADAPTER_FOLDER)
    model.load_state_dict(trained, strict=False)
    if (folder / GENERATION_FILE).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def merge_folder(folder: str | Path, out: str | Path, *, base: str | Path | None = None, card: Any = None) -> Path:
    """Merges saved adapters into their base and writes the native folder, with the base's processor.

    Args:
        folder: of `save_adapters`.
        base: folder or Hub id; by default the one that the adapters name.
    """
    from hf_vlp.hub import save_for_hub

    base = str(base or base_of(folder))
    architecture = architecture_of(base)
    model = architecture.load("model").from_pretrained(base)
    merge(load_adapters(model, folder))
    processor = architecture.load("processor").from_pretrained(base)
    own = Path(folder) / "processor_config.json"
    if own.is_file():
        # Stage 2 may talk in another template than stage 1.
        processor = architecture.load("processor").from_pretrained(folder)
    return Path(save_for_hub(model.eval(), processor, out, card=card))


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise AdapterFolderError(
            f"{folder} has no {INDEX_FILE}: it is no folder of adapters (llava_stage2.py writes one to "
            "<output_dir>/adapters), or its writing was cut off"
        )
    return json.loads(path.read_text(encoding="utf-8"))


__all__ = ["AdapterFolderError", "base_of", "load_adapters", "merge_folder", "save_adapters"]
