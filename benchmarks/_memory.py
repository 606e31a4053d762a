"""How much memory a step takes, counted in two ways that know nothing of each other. Shared by the benchmarks here."""

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TrackedAllocations(TorchDispatchMode):
    """Bytes of all tensors that live at a time and were made inside the context, backward included.

    Counts storages, each once, from the operator that makes it until nothing refers to it. Scratch space within an
    operator is not seen; `peak_rss_in_child` sees it.
    """

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class SavedForBackward(saved_tensors_hooks):
    """Bytes that autograd keeps for the backward at a time: the activations. What exists already (weights, inputs) is
    not counted.
    """

    def __init__(self, *existing: Tensor) -> None:
        self.live = 0
        self.peak = 0
        # Storage -> how many saved tensors share it. What exists is there from the start, for ever.
        self._uses = {tensor.untyped_storage().data_ptr(): 1 for tensor in existing}
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> "SavedForBackward":
        super().__enter__()
        return self

    def _pack(self, value: Tensor) -> "_Saved":
        return _Saved(self, value)

    @staticmethod
    def _unpack(saved: "_Saved") -> Tensor:
        return saved.value

    def hold(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] == 1:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def release(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        self._uses[key] -= 1
        if self._uses[key] == 0:
            del self._uses[key]
            self.live -= storage.nbytes()


class _Saved:
    def __init__(self, counter: SavedForBackward, value: Tensor) -> None:
        self.counter, self.value = counter, value
        counter.hold(value.untyped_storage())

    def __del__(self) -> None:
        self.counter.release(self.value.untyped_storage())


class PeakRss:
    """Growth of this process's resident memory inside the context: its high-water mark over the level at the start.

    For Linux, whose kernel keeps the mark and lets a process reset its own.
    """

    def __enter__(self) -> "PeakRss":
        Path("/proc/self/clear_refs").write_text("5")
        self.start = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.growth = _status("VmHWM") - self.start


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def result_of_child(*arguments: str) -> dict[str, Any]:
    """Runs this script again with other arguments and reads the JSON of its last line."""
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """Plain text table."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [columns, *rows]]
    return "\n".join([title, *lines])
