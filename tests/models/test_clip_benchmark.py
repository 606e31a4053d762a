"""The CLIP benchmark runs and finds what it compares equal."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "clip_step.py"


@pytest.fixture(scope="module")
def clip_step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clip_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_run_reports_savings(clip_step: ModuleType) -> None:
    report = clip_step.main(["--small", "--batch", "8", "--repeats", "1"])
    assert report["difference"] < 1e-4
    assert 0.3 < report["ratios"]["GFLOP a sample"] < 0.6
    assert report["ratios"]["MiB at peak"] < 0.8


def test_different_sides_are_not_reported(clip_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    build = clip_step.models

    def other_weights(*arguments: object) -> tuple:
        ours, native = build(*arguments)
        torch.nn.init.normal_(native.text_projection.weight)
        return ours, native

    monkeypatch.setattr(clip_step, "models", other_weights)
    with pytest.raises(SystemExit, match="differ by more than"):
        clip_step.main(["--small", "--batch", "8", "--repeats", "1"])
