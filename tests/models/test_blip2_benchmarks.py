"""The BLIP-2 benchmarks run, and compare equal things."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def test_stage_1_costs_less_than_the_original_and_gives_the_same() -> None:
    report = load("blip2_stage1").main(["--small", "--batch", "4", "--repeats", "1"])
    assert report["difference"] < 1e-6
    assert report["ratios"]["GFLOP a sample, forward"] < 0.65
    assert report["ratios"]["forward + backward"] < 0.68
    assert report["ratios"]["MiB at peak"] < 0.8


def test_stage_1_benchmark_fails_when_the_sides_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("blip2_stage1")
    loss = module.ComposedStage1._generation_loss
    monkeypatch.setattr(module.ComposedStage1, "_generation_loss", lambda self, *a: loss(self, *a) * 1.01)
    with pytest.raises(SystemExit, match="the two sides differ"):
        module.main(["--small", "--batch", "4", "--repeats", "1"])


def test_reranking_projects_an_image_once() -> None:
    report = load("itm_reranking").main(["--small", "--texts", "16", "--class-texts", "4", "--repeats", "1"])
    assert report["difference"] < 1e-4
    results = report["results"]
    assert results["ours"]["GFLOP a pair"] < 0.7 * results["to the longest"]["GFLOP a pair"]
    assert results["to the longest"]["GFLOP a pair"] < results["native Q-Former"]["GFLOP a pair"]
    assert results["ours from pixels"]["GFLOP a pair"] < 0.5 * results["native class"]["GFLOP a pair"]


def test_captioning_reads_prompts_once() -> None:
    report = load("captioning").main(["--small", "--batch", "4", "--new-tokens", "4", "--repeats", "1"])
    assert report["ratios"]["GFLOP a caption"] < 0.97
