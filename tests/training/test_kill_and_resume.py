"""Runs that are killed (SIGKILL) again and again end with the weights of a run that was left alone, to the bit.

Each attempt is a process of its own, forked from a server that has imported everything once. It is killed after a
random time, or at a named moment of writing a checkpoint, which it announces and then waits at.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

KINDS = ("clip", "stage1", "stage2", "albef", "blip", "llava", "cogvlm", "qwen_vl", "instructblip")
STEPS = 8
OPTIONS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
# Moments of a checkpoint: after the model's files, after all, before and after the rename, while an old one goes.
MOMENTS = ("model", "written", "manifest", "published", "removing")
RANDOM_KILLS = 5


def trainer_of(kind: str, folder: Path) -> Any:
    import torch

    from tests.training import runs

    torch.set_num_threads(1)
    if kind == "clip":
        return runs.clip_trainer(folder, dropout=0.3, data=runs.rows(bad=(5,)), **OPTIONS)
    if kind == "stage1":
        return runs.stage1_trainer(folder, dropout=0.2, **OPTIONS)
    if kind == "albef":
        return runs.albef_trainer(folder, dropout=0.2, **OPTIONS)
    if kind == "blip":
        return runs.blip_trainer(folder, dropout=0.2, **OPTIONS)
    if kind == "llava":
        from tests.training.llava_runs import llava_trainer

        return llava_trainer(folder, lora_r=2, pack_to=160, **OPTIONS)
    if kind == "cogvlm":
        from tests.training.cogvlm_runs import cogvlm_trainer

        return cogvlm_trainer(folder, lora="visual_experts", pack_to=96, dropout=0.2, **OPTIONS)
    if kind == "qwen_vl":
        from tests.training.qwen_vl_runs import qwen_vl_trainer

        return qwen_vl_trainer(folder, lora_r=2, pack_to=160, gradient_accumulation_steps=2, **OPTIONS)
    if kind == "instructblip":
        from tests.training.qwen_vl_runs import instructblip_trainer

        return instructblip_trainer(folder, lora_r=2, dropout=0.2, **OPTIONS)
    return runs.stage2_trainer(folder, lora_r=2, gradient_accumulation_steps=2, **OPTIONS)


def attempt(kind: str, folder: str, moment: str | None, pipe: Any) -> None:
    """One process' life: trains, announces what it has come to, and at the end sends the hash of its weights."""
    from tests.training import runs

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    trainer = trainer_of(kind, Path(folder))
    if moment is not None:
        announce(moment, trainer, pipe)
    pipe.send(("started", None))
    began = time.monotonic()
    trainer.train()
    duration = time.monotonic() - began
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    pipe.send(("done", ((runs.fingerprint(runs.weights(trainer.model)), logged), duration)))


def announce(moment: str, trainer: Any, pipe: Any) -> None:
    """Makes the process say that it is at `moment`, and stay there to be killed."""
    from hf_vlp.training import checkpoints

    def stop() -> None:
        pipe.send(("moment", moment))
        time.sleep(60)

    def after(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            stop()
            return result

        return run

    def before(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            stop()
            return function(*args, **kwargs)

        return run

    if moment == "model":
        trainer.save_model = after(trainer.save_model)
    elif moment == "written":
        checkpoints.publish = before(checkpoints.publish)
    elif moment == "manifest":
        checkpoints._sync_folder = before(checkpoints._sync_folder)
    elif moment == "published":
        checkpoints.publish = after(checkpoints.publish)
    else:
        rename = checkpoints.os.rename

        def slow_removal(source: Any, target: Any) -> None:
            rename(source, target)
            if checkpoints.REMOVING_PREFIX in str(target):
                stop()

        checkpoints.os.rename = slow_removal


def run_once(context: Any, kind: str, folder: Path, moment: str | None, limit: float | None) -> Any:
    """Starts an attempt and kills it at `moment`, or `limit` seconds after its training began.

    Returns:
        Result and duration of the training; None when it was killed.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(kind, str(folder), moment, sender), daemon=True)
    process.start()
    sender.close()
    try:
        deadline = None
        while receiver.poll(300 if deadline is None else max(0.0, deadline - time.monotonic())):
            with contextlib.suppress(EOFError):
                what, value = receiver.recv()
                if what == "started" and limit is not None:
                    deadline = time.monotonic() + limit
                elif what == "moment":
                    break
                elif what == "done":
                    return value
                continue
            raise AssertionError(f"the {kind} run died by itself (exit code {process.exitcode})")
        assert deadline is not None or moment is not None, "the run hangs"
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join(30)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_end_as_an_unbroken_one(tmp_path: Path, kind: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.runs", "hf_vlp.training"])
    expected, duration = run_once(context, kind, tmp_path / "whole", None, None)

    draws = random.Random(f"{kind} 1")
    kills = list(MOMENTS) + [None] * RANDOM_KILLS
    draws.shuffle(kills)
    life = 0
    while kills:
        limit = draws.uniform(0, 0.7 * duration) if kills[0] is None else None
        result = run_once(context, kind, tmp_path / f"life {life}", kills[0], limit)
        if result is None:
            kills.pop(0)
        else:
            # It came to its end before the kill: the remaining ones hit another run.
            assert result[0] == expected
            life += 1
    assert run_once(context, kind, tmp_path / f"life {life}", None, None)[0] == expected
    for number in range(life + 1):
        left = sorted(path.name for path in (tmp_path / f"life {number}").iterdir())
        assert left == [f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"], "nothing half-written is left"
