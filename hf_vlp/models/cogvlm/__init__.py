"""CogVLM: a language model with a visual expert in every layer."""
