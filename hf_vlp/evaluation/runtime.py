"""What every evaluation loop shares: processes, batches, images, progress and the model's mode."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, processes) of this run; joins the process group when `accelerate launch` started several."""
    if not (dist.is_available() and dist.is_initialized()) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState()
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this process prints and writes."""
    return world()[0] == 0


def default_device() -> torch.device:
    """The device of this process: as `accelerate` assigns it, or the first accelerator, or the CPU."""
    from accelerate import PartialState

    return PartialState().device


def shard(count: int) -> range:
    """The contiguous part of `range(count)` that belongs to this process; the parts cover it once, in rank order."""
    rank, size = world()
    return range(rank * count // size, (rank + 1) * count // size)


def gather_lists(items: list[T]) -> list[T]:
    """The lists of all processes joined in rank order, on every process."""
    if world()[1] == 1:
        return items
    parts: list[Any] = [None] * world()[1]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def gather_rows(rows: Tensor) -> Tensor:
    """Tensors of all processes (on the CPU, first dimensions may differ) joined in rank order, on every process."""
    if world()[1] == 1:
        return rows
    return torch.cat(gather_lists([rows.cpu()]))


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most `size` items.

    Raises:
        ValueError: `size` below 1.
    """
    if size < 1:
        raise ValueError(f"batch size {size}: it must be at least 1")
    for start in range(0, len(items), size):
        yield items[start : start + size]


def progress(items: Iterable[T], description: str, *, total: int | None = None, show: bool = True) -> Iterable[T]:
    """A progress bar on the main process."""
    return tqdm(items, desc=description, total=total, disable=not (show and is_main()), leave=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`eval()` and no gradients inside; afterwards every submodule is in the mode that it was in before.

    Not `inference_mode`: what a module caches under it could not be used in training afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def to_device(batch: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Moves tensors to `device`, floating ones to `dtype` as well."""
    moved = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            value = value.to(device, dtype if value.is_floating_point() else None)
        moved[name] = value
    return moved


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of positions of similar length, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lambda position: (lengths[position], position))
    yield from (list(batch) for batch in chunks(order, size))
