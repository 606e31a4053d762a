"""Momentum twins: slowly following copies of trained modules (MoCo, 1911.05722, equation 2; ALBEF, 2107.07651)."""

import copy

import torch
from torch import nn


def momentum_twin(module: nn.Module) -> nn.Module:
    """A copy of `module` that is never trained. Keep it in a submodule, so that checkpoints hold it."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_twin(twin: nn.Module, module: nn.Module, momentum: float) -> None:
    """Moves the twin's parameters towards the module's: `twin = momentum * twin + (1 - momentum) * module`.

    Floating-point buffers (running statistics) follow in the same way, others are copied. Ranks that hold the same
    weights stay the same without communication.

    Raises:
        ValueError: the two do not have the same parameters and buffers, or `momentum` is not in [0, 1].
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"`momentum` must be in [0, 1], got {momentum}")
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (twin, module))
    differing = set(ours.keys() ^ theirs.keys())
    differing |= {name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape}
    if differing:
        raise ValueError(f"the twin is no copy of the module, they differ in {sorted(differing)[:5]}")
    for name, value in ours.items():
        if value.is_floating_point():
            value.lerp_(theirs[name].detach().to(value), 1.0 - momentum)
        else:
            value.copy_(theirs[name])
