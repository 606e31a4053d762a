"""Means of the named loss terms over steps and ranks, without a device synchronisation a step."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def loss_terms(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The scalar entries of a model output whose names start with `loss_`, detached."""
    return {
        name: value.detach().float()
        for name, value in outputs.items()
        if name.startswith("loss_") and isinstance(value, Tensor) and value.numel() == 1
    }


class TermMeter:
    """Weighted sums of named scalars since the last `clear`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, terms: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Adds one step's values; stays on their device."""
        for name, value in terms.items():
            value = value.reshape(())
            self.sums[name] = self.sums[name] + value * weight if name in self.sums else value * weight
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def means(self, gather: Any = None) -> dict[str, float]:
        """Weighted mean of each name over steps and ranks.

        Args:
            gather: gathers a (1, N) tensor of each rank to (ranks, N); None for one process. All ranks must have seen
                the same names.
        """
        if not self.sums:
            return {}
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name] for name in names]).double()
        weights = torch.tensor([self.weights[name] for name in names], dtype=torch.float64, device=sums.device)
        table = torch.cat([sums, weights])[None]
        if gather is not None:
            table = gather(table)
        total, count = table.sum(0).chunk(2)
        return dict(zip(names, (total / count.clamp(min=1e-12)).tolist(), strict=True))

    def clear(self) -> None:
        self.sums, self.weights = {}, {}

    def state(self) -> dict[str, tuple[float, float]]:
        """Name -> (sum, weight), exact, as JSON keeps it."""
        return {name: (self.sums[name].item(), self.weights[name]) for name in self.sums}

    def load_state(self, state: Mapping[str, Iterable[float]], device: torch.device | str = "cpu") -> None:
        self.clear()
        for name, (total, weight) in state.items():
            self.sums[name] = torch.tensor(total, device=device)
            self.weights[name] = weight
