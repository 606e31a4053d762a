"""The reader of reference cases itself, and that no recorded case is left without a test."""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_vlp.models.catalog import ARCHITECTURES
from tests.reference import cases
from tests.reference.cases import Case, NotComputedWarning, find_cases


def write_case(root: Path, outputs: dict[str, torch.Tensor], tolerance: float = 1e-4, name: str = "thing") -> Case:
    folder = root / "system" / name
    folder.mkdir(parents=True)
    spec: dict[str, Any] = {"system": "system", "case": name, "config": {}, "inputs": {}, "notes": []}
    spec |= {"outputs": {key: {"shape": list(value.shape)} for key, value in outputs.items()}, "tolerance": tolerance}
    (folder / "case.json").write_text(json.dumps(spec))
    save_file(outputs, folder / "outputs.safetensors")
    return Case(folder, spec)


def test_every_case_of_the_architectures_has_a_test() -> None:
    found = [case for a in {a.reference for a in ARCHITECTURES.values()} - {None} for case in find_cases(system=a)]
    if not found:
        if os.environ.get("CI"):
            pytest.fail(f"no reference cases, which CI must have; set {cases.ENVIRONMENT_VARIABLE}")
        pytest.skip(f"no reference cases; set {cases.ENVIRONMENT_VARIABLE}")
    for path in Path(__file__).parent.glob("test_*.py"):
        import_module(f"tests.reference.{path.stem}")
    untested = sorted({str(case.folder) for case in found if not case.kinds & cases.REGISTERED_KINDS})
    assert not untested, f"reference cases without a test: {untested}"


def test_roots_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path / "one", {"a": torch.ones(2)})
    write_case(tmp_path / "two", {"a": torch.ones(3)})
    monkeypatch.setenv(cases.ENVIRONMENT_VARIABLE, f"{tmp_path / 'one'}:{tmp_path / 'two'}:{tmp_path / 'missing'}")
    assert [case.outputs["a"].numel() for case in find_cases("system/thing")] == [2, 3]
    assert find_cases("system/other") == []


def test_compare_is_relative_to_the_magnitude(tmp_path: Path) -> None:
    case = write_case(tmp_path, {"small": torch.full((3,), 0.01), "large": torch.full((3,), 100.0)})
    case.compare("large", torch.full((3,), 100.005))
    case.compare("small", torch.full((3,), 0.01 + 5e-7))
    with pytest.raises(AssertionError, match="small.*relative error"):
        case.compare("small", torch.full((3,), 0.01 + 5e-6))


@pytest.mark.parametrize(
    "ours", [torch.ones(3, 1), torch.ones(3, dtype=torch.int64), torch.tensor([1.0, 1.0, float("nan")])]
)
def test_compare_rejects_other_shapes_kinds_and_non_finite(tmp_path: Path, ours: torch.Tensor) -> None:
    case = write_case(tmp_path, {"a": torch.ones(3)})
    with pytest.raises(AssertionError, match="'a'"):
        case.compare("a", ours)


def test_compare_keeps_infinities_in_place(tmp_path: Path) -> None:
    masked = torch.tensor([1.0, -torch.inf])
    case = write_case(tmp_path, {"a": masked})
    case.compare("a", masked.clone())
    with pytest.raises(AssertionError, match="non-finite"):
        case.compare("a", -masked)
    with pytest.raises(AssertionError, match="itself"):
        case.compare("a", case.outputs["a"])


def test_integers_must_be_equal(tmp_path: Path) -> None:
    case = write_case(tmp_path, {"ids": torch.tensor([1, 2, 3])}, tolerance=0)
    case.compare("ids", torch.tensor([1, 2, 3], dtype=torch.int32))
    with pytest.raises(AssertionError, match="1 of 3"):
        case.compare("ids", torch.tensor([1, 2, 4]))


def test_nothing_is_left_out_silently(tmp_path: Path) -> None:
    case = write_case(tmp_path, {"a": torch.ones(1), "b/0": torch.ones(1), "b/1": torch.ones(1)})
    case.compare("a", torch.ones(1))
    with pytest.raises(AssertionError, match=r"no test compared: \['b/0', 'b/1'\]"):
        case.finish()
    with pytest.warns(NotComputedWarning) as caught:
        case.finish({"b/*": "because"})
    assert [str(warning.message).split(": ", 1)[1] for warning in caught] == [
        f"b/{index} not computed: because" for index in (0, 1)
    ]
    with pytest.raises(AssertionError, match="yet compared"), pytest.warns(NotComputedWarning):
        case.finish({"b/*": "because", "a": "stale"})
    with pytest.warns(NotComputedWarning):
        case.finish({"b/*": "because", "d/*": "of another case"})
    with pytest.raises(AssertionError, match=r"no test compared: \['b/1'\]"), pytest.warns(NotComputedWarning):
        case.leave_out("b/0", "this recording says so")
        case.finish()
    case.leave_out("b/1", "and this")
    with pytest.warns(NotComputedWarning, match="b/1 not computed: and this"):
        case.finish()
    with pytest.raises(KeyError, match="'c' is not in case.json"):
        case.compare("c", torch.ones(1))


def test_without_cases_skips_but_fails_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cases.ENVIRONMENT_VARIABLE, str(tmp_path))

    @cases.reference("system/absent", complete=False)
    def test(case: Case) -> None:
        raise AssertionError("must not run")

    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="HF_VLP_REFERENCE"):
        test(case=None)
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="system/absent"):
        test(case=None)
