"""Starts the processes that `accelerate launch --num_processes N` leaves out on a machine without GPUs.

On the CPU the launcher starts N processes only through MPI; without it, it starts one and says nothing, and a run with
half of its batch looks like any other. The scripts notice it and start the others themselves, by torch's launcher.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

# Set by torch's launcher (and by accelerate's, where it uses torch's) in each of several processes.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def asked_for_but_alone(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher was asked for several processes and started this one alone.

    Its simple launcher names a meeting point only if there is somebody to meet, but tells nobody a rank.
    """
    launched = "ACCELERATE_DYNAMO_BACKEND" in environment and "MASTER_ADDR" in environment
    return launched and not any(name in environment for name in _RANK_VARIABLES)


def processes_in(command: Sequence[str]) -> int | None:
    """The number of processes that an `accelerate launch` command line asks for; None if it does not say."""
    for position, part in enumerate(command):
        name, _, value = part.partition("=")
        value = value or (command[position + 1] if position + 1 < len(command) else "")
        if name.replace("-", "_") == "__num_processes":
            return int(value) if value.isdigit() else None
        if name.replace("-", "_") == "__config_file" and Path(value).is_file():
            count = (yaml.safe_load(Path(value).read_text()) or {}).get("num_processes")
            return int(count) if count else None
        if part.endswith(".py"):
            break
    return None


def start_missing_processes() -> None:
    """Replaces this process by torch's launcher with as many processes as were asked for; else does nothing.

    Raises:
        SystemExit: several processes were asked for, but it cannot be told how many, or they are to use GPUs.
    """
    if not asked_for_but_alone(os.environ):
        return
    import psutil
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") or not torch.cuda.is_available()
    parent = psutil.Process().parent()
    count = processes_in(parent.cmdline()[1:]) if parent is not None else None
    if count is None or not on_cpu:
        raise SystemExit(
            "accelerate launch was asked for several processes but started only this one. Add --multi_gpu (with "
            "--use_cpu for the script on a machine without GPUs), or launch with torchrun --nproc_per_node N"
        )
    print(f"accelerate launch started 1 of {count} processes on the CPU; starting all of them by torchrun", flush=True)
    # The launcher of torch picks a free port; the one named by accelerate would be in the way of a second run.
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*launcher, *sys.argv])


def say(text: object) -> None:
    """Prints on the first of several processes only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)
