"""The generation benchmarks of Qwen-VL and InstructBLIP run, and both of their sides write the same."""

import pytest

from tests.models.test_blip2_benchmarks import load


@pytest.mark.parametrize(
    ("name", "options"),
    [("qwen_vl_generation", []), ("instructblip_generation", []), ("instructblip_generation", ["--beams", "3"])],
)
def test_both_sides_write_the_same(name: str, options: list[str]) -> None:
    report = load(name).main(["--small", "--repeats", "1", *options])
    assert report["ratios"]["GFLOP"] < 1 and report["ratios"]["seconds"] > 0


def test_a_difference_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("qwen_vl_generation")
    rotate = module.RemoteStyle.rotate
    monkeypatch.setattr(module.RemoteStyle, "rotate", lambda self, states, start: rotate(self, states, start + 1) * 2)
    with pytest.raises(SystemExit, match="different ids"):
        module.main(["--small", "--repeats", "1"])
