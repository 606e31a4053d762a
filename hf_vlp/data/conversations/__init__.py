"""Conversations about images: sources, templates, label masks, batches. Names are resolved on first use."""

from importlib import import_module
from typing import Any

# Public name -> module that defines it.
_EXPORTS = {
    "ChatTemplate": "chat",
    "ConversationCollator": "collator",
    "ConversationDataset": "datasets",
    "ConversationIterableDataset": "datasets",
    "EncodedConversation": "encoding",
    "ImageCountError": "messages",
    "RenderedConversation": "templates",
    "Template": "templates",
    "encode_conversation": "encoding",
    "length_grouped_order": "lengths",
    "load_conversations": "loading",
    "make_template": "templates",
    "pack_lengths": "packing",
    "prompt_batch": "prompts",
    "register_template": "templates",
    "template_names": "templates",
    "to_messages": "messages",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
