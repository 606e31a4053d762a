"""LLaVA's benchmarks run, and find what they compare equal."""

from tests.models.test_blip2_benchmarks import load


def test_loss_memory() -> None:
    report = load("llava_loss_memory").main(["--small"])
    assert report["ratio"] < 0.6
    assert report["gradient_difference"] < 1e-4


def test_generation() -> None:
    reports = load("llava_generation").main(["--small", "--repeats", "1", "--batch", "3", "--text", "8"])
    assert set(reports) == {"greedy", "3 beams"}
    assert all(report["ratios"]["GFLOP"] <= 1 for report in reports.values())
