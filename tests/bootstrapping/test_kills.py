"""Killed at any point and started again, on one process or two: the set is that of a run that nobody disturbed."""

import multiprocessing
import os
import random
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_vlp.bootstrapping.writing as writing
from hf_vlp.bootstrapping import JobError, Source
from hf_vlp.data import load_pairs
from tests.bootstrapping.fakes import rows
from tests.bootstrapping.jobs import contents, run
from tests.distributed import run_ranks

_PRELOADED = ["tests.bootstrapping.jobs", "hf_vlp.bootstrapping.job", "pyarrow.parquet"]
# Seconds that the fake models take over a batch: a run of 23 records takes about one.
SLOW = 0.03


def context() -> Any:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_PRELOADED)
    return found


def work(output: Path, kind: str, seconds: float) -> None:
    torch.set_num_threads(1)
    run(output, seconds, settings={"format": kind})


def die_at(output: Path, kind: str, stage: str, count: int) -> None:
    """Kills itself at the `count`-th file: while it is written, just before or just after it gets its name."""
    torch.set_num_threads(1)
    seen = 0
    names = {"half": "fsync", "before": "replace", "after": "replace"}
    plain = getattr(os, names[stage])

    def deadly(*arguments: Any) -> None:
        nonlocal seen
        if stage == "half" and not stat.S_ISREG(os.fstat(arguments[0]).st_mode):
            # A folder is synced as well.
            return plain(*arguments)
        seen += 1
        if stage == "after":
            plain(*arguments)
        if seen == count:
            if stage == "half":
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments) if stage != "after" else None

    setattr(writing.os, names[stage], deadly)
    run(output, settings={"format": kind})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    found = {}
    for kind in writing.FORMATS:
        run(folder / kind, settings={"format": kind})
        found[kind] = contents(folder / kind)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", writing.FORMATS)
def test_five_kills_at_random_points(tmp_path: Path, unbroken: dict, kind: str):
    draws = random.Random(kind)
    kills = 0
    done_before: set[str] = set()
    units = tmp_path / "_capfilt" / "units"
    while kills < 5:
        process = context().Process(target=work, args=(tmp_path, kind, SLOW))
        process.start()
        # From the moment at which it works on units, whatever the machine took to get there.
        finished = len(list(units.glob("*.json"))) if units.is_dir() else 0
        deadline = time.monotonic() + 60
        while kills and time.monotonic() < deadline and process.is_alive():
            if units.is_dir() and len(list(units.glob("*.json"))) > finished:
                break
            time.sleep(0.002)
        time.sleep(draws.uniform(0.0, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was to be killed at work, but was done"
        kills += 1
        now = {path.name for path in units.glob("[!.]*.json")} if units.is_dir() else set()
        assert done_before <= now, "what was done stays done"
        done_before = now
    assert 0 < len(done_before) < 8
    run(tmp_path, settings={"format": kind})
    assert contents(tmp_path) == unbroken[kind]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["half", "before", "after"])
def test_kills_around_every_rename(tmp_path: Path, unbroken: dict, stage: str):
    """Each of five runs dies at a file further on; a sixth ends the job."""
    for count in (1, 2, 3, 5, 9):
        process = context().Process(target=die_at, args=(tmp_path, "parquet", stage, count))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run(tmp_path)
    assert contents(tmp_path) == unbroken["parquet"]


def on_a_rank(output: Path, kind: str) -> dict[str, Any]:
    return run(output, settings={"format": kind})


@pytest.mark.parametrize("kind", writing.FORMATS)
def test_two_processes_write_the_set_of_one(tmp_path: Path, unbroken: dict, kind: str):
    first, second = run_ranks(on_a_rank, 2, tmp_path, kind)
    assert contents(tmp_path) == unbroken[kind]
    assert first["texts"] == second["texts"]


def test_one_process_goes_on_where_two_were_killed(tmp_path: Path, unbroken: dict):
    with pytest.raises((RuntimeError, TimeoutError)):
        run_ranks(one_of_two_dies, 2, tmp_path, timeout=30)
    run(tmp_path)
    assert contents(tmp_path) == unbroken["parquet"]


def one_of_two_dies(output: Path) -> None:
    if torch.distributed.get_rank() == 1:
        die_at(output, "parquet", "before", 4)
    run(output)


def on_a_rank_of_a_stream(output: Path, size: int) -> None:
    run(output, sources=[Source(load_pairs("shapes", size=size, streaming=True, preset="simple"))])


def test_two_processes_share_a_stream(tmp_path: Path):
    run_ranks(on_a_rank_of_a_stream, 2, tmp_path / "two", 13)
    on_a_rank_of_a_stream(tmp_path / "one", 13)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def on_a_rank_with_a_fault(output: Path) -> str:
    found = [Source(rows(23))]
    broken = torch.distributed.get_rank() == 1
    try:
        run(output, sources=found, captioner=None, say=None, text_filter=Faulty() if broken else None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Faulty:
    """Records itself as no filter, then fails on the first unit."""

    model = torch.nn.Linear(1, 1)

    def recorded(self) -> None:
        return None

    def inputs(self, pictures: Any) -> dict[str, Any]:
        return {}

    def scores(self, *arguments: Any) -> None:
        """Not reached."""

    def embed(self, inputs: Any) -> None:
        raise RuntimeError("out of memory")


def test_a_failed_process_is_not_waited_for(tmp_path: Path):
    waiting, failed = run_ranks(on_a_rank_with_a_fault, 2, tmp_path)
    assert failed == "RuntimeError: out of memory"
    assert waiting == "JobError: process 1 failed: RuntimeError: out of memory"
    assert JobError.__name__ in waiting


def on_a_rank_with_its_own_seed(output: Path) -> str:
    try:
        run(output, settings={"seed": torch.distributed.get_rank()})
    except JobError as error:
        return str(error)
    return "nothing"


def test_processes_with_different_settings_are_refused(tmp_path: Path):
    for word in run_ranks(on_a_rank_with_its_own_seed, 2, tmp_path):
        assert "different models, data or settings" in word
