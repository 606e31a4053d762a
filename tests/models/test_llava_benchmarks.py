"""LLaVA's benchmarks run, and find what they compare equal."""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loss_memory() -> None:
    report = script("llava_loss_memory").main(["--small"])
    assert report["ratio"] < 0.6
    assert report["gradient_difference"] < 1e-4


def test_generation() -> None:
    reports = script("llava_generation").main(["--small", "--repeats", "1", "--batch", "3", "--text", "8"])
    assert set(reports) == {"greedy", "3 beams"}
    assert all(report["ratios"]["GFLOP"] <= 1 for report in reports.values())
