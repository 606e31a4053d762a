"""Runs a function on several gloo ranks of this machine, for tests that compare N ranks with one process."""

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_EXIT_GRACE = 10.0

# What tests of several ranks import, or make torch import on first use, at some seconds a rank.
_PRELOADED = [
    "hypothesis",
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "torch.utils.checkpoint",
    "transformers.modeling_utils",
]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `function(*args)` on `world_size` processes that share a gloo process group.

    The processes are forked from a server that has imported torch once, so that only the first call of a test run
    pays for the import. A worker runs on one thread.

    Args:
        function: defined at the top level of an importable module. It learns its rank from `torch.distributed`.
        args: sent to every rank; tensors are copied.
        timeout: seconds after which the ranks are ended and the call fails.

    Returns:
        What `function` returned on each rank, in rank order.

    Raises:
        RuntimeError: a rank raised (its traceback is in the message) or died.
        TimeoutError: not all ranks were done in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    payload = _pack(args)
    with tempfile.TemporaryDirectory(prefix="hf_vlp_ranks_") as folder:
        store = str(Path(folder) / "store")
        pipes, workers = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(function, payload, rank, world_size, store, sender, timeout), daemon=True
            )
            worker.start()
            sender.close()
            pipes.append(receiver)
            workers.append(worker)
        grace = 0.0
        try:
            results = _collect(pipes, time.monotonic() + timeout)
            # A gloo worker may hang at its exit after its result has arrived.
            grace = _EXIT_GRACE
            return results
        finally:
            deadline = time.monotonic() + grace
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
                if worker.is_alive():
                    worker.kill()
                    worker.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(open_pipes.values())} of {len(pipes)} gave no result in time")
        for pipe in ready:
            rank = open_pipes[pipe]
            try:
                message = pipe.recv_bytes()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(pipes)} died without a result") from None
            ok, value = _unpack(message)
            if not ok:
                raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _work(
    function: Callable[..., Any],
    payload: bytes,
    rank: int,
    world_size: int,
    store: str,
    sender: Connection,
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        result = function(*_unpack(payload))
        message = _pack((True, result))
        dist.barrier()
    except BaseException:
        message = _pack((False, traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(message: bytes) -> Any:
    # Only what this module has packed itself a moment ago is read here.
    return torch.load(io.BytesIO(message), weights_only=False)
