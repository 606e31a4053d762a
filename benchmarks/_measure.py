"""What the benchmarks share: time of sides that take turns, memory of a step, the table of both."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _memory import TrackedAllocations, table  # noqa: E402


def synchronize(device: str) -> None:
    """Waits for what runs on a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def in_turns(sides: Mapping[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Seconds of each side, the median of runs that take turns; empty without repeats."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, function in sides.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items() if seconds}


def peak_bytes(run: Callable[[], Any], device: str, model: nn.Module, *given: Tensor) -> int:
    """Most bytes that a step holds beyond weights and what is given to it, gradients included."""
    model.zero_grad(set_to_none=True)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with TrackedAllocations(*model.parameters(), *model.buffers(), *given) as tracked:
        run()
    return tracked.peak


def print_sides(title: str, results: Mapping[str, Mapping[str, float]], other: str, **more: Any) -> dict[str, Any]:
    """Prints the table of `"ours"` and `other` with their ratios, then the same as JSON, which it returns."""
    columns = list(results["ours"])
    ratios = {column: results["ours"][column] / results[other][column] for column in columns}
    rows = [[name, *(f"{row[column]:.4g}" for column in columns)] for name, row in results.items()]
    rows.append(["ratio", *(f"{ratios[column]:.3f}" for column in columns)])
    print(table(title, ["", *columns], rows))
    report = {"results": results, "ratios": ratios, **more, "threads": torch.get_num_threads()}
    print(json.dumps(report))
    return report
