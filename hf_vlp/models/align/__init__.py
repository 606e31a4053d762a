"""ALIGN: EfficientNet and BERT towers."""
