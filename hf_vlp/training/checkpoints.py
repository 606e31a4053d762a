"""Checkpoints that are whole or not there: written aside, listed in a manifest, then renamed in one step.

`<output_dir>/.writing-checkpoint-<step>/` is filled by all ranks, its manifest (every file, its size and hash) comes
last, and one `rename` makes it `<output_dir>/checkpoint-<step>`. A process killed at any moment leaves either the
whole folder or a `.writing-*` one, which is never picked up and is removed by the next run.

Optimizer, scheduler, scaler and random states are kept as safetensors and JSON, without pickles.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WRITING_PREFIX = ".writing-"
REMOVING_PREFIX = ".removing-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class IncompleteCheckpointError(ValueError):
    """A folder named as the checkpoint to resume from is not a whole checkpoint."""


def checkpoint_step(folder: str | Path) -> int:
    """Optimizer step of `checkpoint-<step>`, -1 for any other name."""
    match = _CHECKPOINT.fullmatch(Path(folder).name)
    return int(match.group(1)) if match else -1


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints below `output_dir`, oldest step first. Sizes are checked here, hashes on loading."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted((path for path in found if is_complete(path)), key=checkpoint_step)


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint with the highest step below `output_dir`, None where there is none."""
    found = checkpoints(output_dir)
    return found[-1] if found else None


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` has a manifest and every file of it at its size."""
    return not _problems(Path(folder), hashes=False)


def verify(folder: str | Path) -> None:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        IncompleteCheckpointError: a file is missing, of another size, or of another hash; the message names it.
    """
    problems = _problems(Path(folder), hashes=True)
    if problems:
        raise IncompleteCheckpointError(
            f"{folder} is not a whole checkpoint: {'; '.join(problems)}. Remove the folder, or name another one with "
            "--resume"
        )


def remove_leftovers(output_dir: str | Path) -> list[Path]:
    """Removes what a killed process left half-written or half-removed. Call on one rank, when none is writing."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    leftovers = [path for path in folder.iterdir() if path.name.startswith((WRITING_PREFIX, REMOVING_PREFIX))]
    for path in leftovers:
        logger.warning("removing %s, which a stopped process left half-written", path)
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def publish(writing: Path, final: Path) -> None:
    """Writes the manifest of `writing` and renames it to `final`; call on one rank after all have written.

    Everything is flushed to the disk before the rename, so a whole-looking folder is whole after a power loss too.
    """
    files = {}
    for path in sorted(path for path in writing.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(writing).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    _write_text(writing / MANIFEST, json.dumps({"files": files}, indent=1))
    _sync_folder(writing)
    if final.exists():
        # Left by an older run or by a run that was resumed from an earlier step: it is replaced, never mixed.
        remove_checkpoint(final)
    os.rename(writing, final)
    _sync_folder(final.parent)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint so that a kill half-way cannot leave a folder that looks like one."""
    doomed = folder.with_name(f"{REMOVING_PREFIX}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(output_dir: str | Path, limit: int | None, *, keep: str | Path | None = None) -> None:
    """Removes the oldest whole checkpoints beyond `limit`; `keep` (the best one) is spared. None or 0: no limit."""
    if not limit or limit <= 0:
        return
    spared = Path(keep).resolve() if keep else None
    found = checkpoints(output_dir)
    removable = [path for path in found[:-1] if path.resolve() != spared]
    for path in removable[: max(0, len(found) - limit)]:
        remove_checkpoint(path)


# Optimizer, scheduler, scaler


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path, name: str = "optimizer") -> None:
    """Writes `<name>.safetensors` (state tensors, by parameter name) and `<name>.json` (groups, scalar state).

    Raises:
        TypeError: the optimizer keeps a state that is neither a tensor nor a plain value.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    names = _parameter_names(optimizer, model)
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}|{key}"] = value.detach().cpu().contiguous().clone()
            elif value is None or isinstance(value, bool | int | float | str):
                scalars[f"{names[index]}|{key}"] = value
            else:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps {key!r} of {names[index]!r} as {type(value).__name__}, which "
                    "cannot be stored without pickle; use another --optim"
                )
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    _write_text(folder / f"{name}.json", json.dumps({"groups": _plain(groups), "scalars": scalars}))


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path, name: str = "optimizer") -> None:
    """Restores what `save_optimizer` wrote.

    Raises:
        ValueError: the groups hold other parameters than the optimizer's.
    """
    saved = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    names = _parameter_names(optimizer, model)
    current = optimizer.state_dict()
    here = [[names[index] for index in group["params"]] for group in current["param_groups"]]
    there = [group["params"] for group in saved["groups"]]
    if here != there:
        flat_here, flat_there = ({name for group in groups for name in group} for groups in (here, there))
        raise ValueError(
            f"{folder} was written with other parameter groups: "
            f"only in the checkpoint {sorted(flat_there - flat_here)[:5]}, only now "
            f"{sorted(flat_here - flat_there)[:5]}, else the split over groups differs. "
            "Resume with the stage and learning rates of the first run"
        )
    indices = {name: index for index, name in names.items()}
    state: dict[int, dict[str, Any]] = {}
    for label, value in [*tensors.items(), *saved["scalars"].items()]:
        parameter, _, key = label.rpartition("|")
        state.setdefault(indices[parameter], {})[key] = value
    groups = []
    for group, now in zip(saved["groups"], current["param_groups"], strict=True):
        restored = {
            key: tuple(value) if isinstance(now.get(key), tuple) else value
            for key, value in group.items()
            if key != "params"
        }
        groups.append({**restored, "params": now["params"]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, str]:
    """Index of a parameter in `optimizer.state_dict()` -> its name in `model`."""
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: by_identity[id(parameter)] for index, parameter in enumerate(parameters)}


# Random states


def random_state() -> dict[str, Any]:
    """States of the generators of python, numpy and torch (CPU and every CUDA device)."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.random.set_rng_state_all(state["cuda"])


def save_random_state(folder: Path, rank: int) -> None:
    """Writes this rank's generators to `random_state_<rank>.safetensors`."""
    state = random_state()
    version, words, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "torch": state["torch"],
        **{f"cuda.{index}": value for index, value in enumerate(state.get("cuda", []))},
    }
    rest = {"python": [version, gauss], "numpy": [kind, position, has_gauss, cached]}
    save_file(tensors, folder / f"random_state_{rank}.safetensors", metadata={"rest": json.dumps(rest)})


def load_random_state(folder: Path, rank: int) -> None:
    """Restores this rank's generators.

    Raises:
        FileNotFoundError: the checkpoint has no state of this rank, so it was written by fewer processes.
    """
    from safetensors import safe_open

    path = folder / f"random_state_{rank}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint was written by a run with fewer processes")
    with safe_open(path, framework="pt") as file:
        rest = json.loads(file.metadata()["rest"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    version, gauss = rest["python"]
    kind, position, has_gauss, cached = rest["numpy"]
    state: dict[str, Any] = {
        "python": (version, tuple(tensors["python"].tolist()), gauss),
        "numpy": (kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached),
        "torch": tensors["torch"],
    }
    cuda = [tensors[f"cuda.{index}"] for index in range(sum(key.startswith("cuda.") for key in tensors))]
    if cuda and len(cuda) == torch.cuda.device_count():
        state["cuda"] = cuda
    set_random_state(state)


# Settings


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `name: <in the checkpoint> -> <now>` for every setting that differs, nested mappings by dotted names."""
    lines = []
    for key in sorted({*saved, *now}):
        name = f"{prefix}{key}"
        before, after = saved.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += changed_settings(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines


def plain(value: Any) -> Any:
    """`value` as JSON keeps it, so that saved and present settings compare equal."""
    return json.loads(json.dumps(_plain(value)))


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON."""
    _write_text(path, json.dumps(_plain(value), indent=1))


def tensor_hash(value: Tensor) -> str:
    """Equal for tensors of the same type, shape and bits."""
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Small things


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _problems(folder: Path, *, hashes: bool) -> list[str]:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return [f"{MANIFEST} is missing"]
    try:
        files = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST} cannot be read"]
    problems = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif hashes and _sha256(path) != entry["sha256"]:
            problems.append(f"{name} has changed since it was written")
    return problems


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
