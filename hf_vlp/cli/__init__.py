"""The `hf-vlp` command."""
