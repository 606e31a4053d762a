"""ALBEF: contrast before fusion, matching and masked language modelling with momentum distillation."""
