"""CogVLM's benchmarks run, and their sides compute the same."""

from tests.models.test_blip2_benchmarks import load


def test_forward_costs_what_the_language_model_costs() -> None:
    report = load("cogvlm_forward").main(["--small", "--batch", "2", "--repeats", "1"])
    assert report["text_is_bit_identical"]
    flops = {name: row["GFLOP"] for name, row in report["results"].items()}
    assert flops["our adapter alone"] > 0
    assert flops["ours"] - flops["our adapter alone"] <= flops["language model"] * 1.0001


def test_all_ways_of_generation_write_the_same() -> None:
    report = load("cogvlm_generation").main(["--small", "--batch", "2", "--new-tokens", "4", "--repeats", "1"])
    assert set(report["results"]) == {"ours", "masked", "masked, double work"}
    flops = {name: row["GFLOP"] for name, row in report["results"].items()}
    assert flops["ours"] <= flops["masked"] < flops["masked, double work"]
