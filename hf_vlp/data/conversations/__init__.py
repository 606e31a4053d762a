"""Conversations about images: sources, templates, label masks, batches. Names are resolved on first use."""

from hf_vlp._exports import lazy_exports

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
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
