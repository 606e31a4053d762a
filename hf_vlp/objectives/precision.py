"""The precision in which losses are computed."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 if it came in half precision, else as it is (float64 stays float64)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Similarities, softmaxes and sums of a loss run in full precision whatever autocast says for the towers."""
    return torch.autocast(device_type=device.type, enabled=False)
