"""A name for a model that two models share only if they compute the same."""

import json
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

# What `config` holds that says where a model came from, not what it is.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "_commit_hash", "torch_dtype", "dtype")


def model_fingerprint(model: nn.Module, processor: Any = None) -> str:
    """32 hexadecimal digits over the weights, the config and what the processor does to images and texts.

    Neither the folder nor the class's module goes in, so a copied checkpoint keeps its name. The type of the weights
    does: a model in bfloat16 is not the model in float32.

    Args:
        model: with `named_parameters` and perhaps a `config`.
        processor: with `image_processor` and `tokenizer`, as far as it has them.
    """
    digest = blake2b(digest_size=16)
    digest.update(type(model).__name__.encode())
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        digest.update(_json(_without_origin(config.to_dict())))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_content(tensor))
    if processor is not None:
        _add_processor(digest, processor)
    return digest.hexdigest()


def _content(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _add_processor(digest: Any, processor: Any) -> None:
    images = getattr(processor, "image_processor", None)
    if hasattr(images, "to_dict"):
        digest.update(_json(images.to_dict()))
    tokenizer = getattr(processor, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Left over from the last call, and set anew by the next one.
        rules.pop("padding", None)
        rules.pop("truncation", None)
        digest.update(_json(rules))
    elif hasattr(tokenizer, "get_vocab"):
        digest.update(_json(sorted(tokenizer.get_vocab().items())))


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_origin(held) for name, held in value.items() if name not in _ORIGIN}
    return value


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
