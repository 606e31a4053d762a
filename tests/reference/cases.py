"""Reference cases: recorded runs of the original authors' code, and the comparison with ours.

A case is a folder `<root>/<system>/<name>/` with a `case.json` (config, inputs, outputs, notes, tolerance) and
`inputs`, `outputs` and `weights` as safetensors. Roots come from the environment variable `HF_VLP_REFERENCE` (several
may be joined by the path separator); without it, from `../shared/reference` beside the repository. Tests name a case
by `<system>/<kind>` only and read every size from its config, so that the same test runs on another recording of the
same kind.

    @reference("clip/vit")
    def test_vit(case):
        model = build(case.config, case.weights)
        case.compare("image_features", model.get_image_features(case.inputs["image"]))

The test fails if any output of `case.json` was neither compared nor declared in `not_computed` with a reason.
"""

import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ENVIRONMENT_VARIABLE = "HF_VLP_REFERENCE"
DEFAULT_ROOT = Path(__file__).parents[2] / ".." / "shared" / "reference"

# Below this largest magnitude a tensor counts as numerical noise around zero: a relative error means nothing there.
MAGNITUDE_FLOOR = 1e-3

# Kinds whose every output is compared by some test.
REGISTERED_KINDS: set[str] = set()


class NotComputedWarning(UserWarning):
    """An output of a reference case that the package does not compute, with the reason."""


def reference_roots() -> list[Path]:
    """Folders that hold reference cases and exist, in the order of the environment variable."""
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    candidates = [Path(part) for part in value.split(os.pathsep) if part] if value else [DEFAULT_ROOT]
    return [root.resolve() for root in candidates if root.is_dir()]


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of `expected` (never taken below `MAGNITUDE_FLOOR`)."""
    finite = expected.isfinite()
    scale = expected[finite].abs().max().item() if finite.any() else 0.0
    difference = (ours[finite] - expected[finite]).abs().max().item() if finite.any() else 0.0
    return difference / max(scale, MAGNITUDE_FLOOR)


@dataclass
class Case:
    """One recorded run.

    Attributes:
        folder: where it lies.
        spec: the whole `case.json`.
        compared: output name -> relative error found.
        left_out: output name -> why the case itself says that it cannot be computed.
    """

    folder: Path
    spec: dict[str, Any]
    compared: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def system(self) -> str:
        return self.spec["system"]

    @property
    def kind(self) -> str:
        """`<system>/<case>`, which tests register for."""
        return f"{self.spec['system']}/{self.spec['case']}"

    @property
    def kinds(self) -> set[str]:
        """Kinds under which tests find this case: the one that it states and its folder's name."""
        return {self.kind, f"{self.spec['system']}/{self.folder.name}"}

    @property
    def config(self) -> dict[str, Any]:
        return self.spec["config"]

    @property
    def notes(self) -> list[str]:
        return self.spec["notes"]

    @property
    def tolerance(self) -> float:
        """Largest relative error allowed; 0 asks for equality."""
        return float(self.spec["tolerance"])

    @property
    def output_names(self) -> list[str]:
        return list(self.spec["outputs"])

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self._tensors("inputs")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self._tensors("outputs")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers under the original names."""
        return self._tensors("weights")

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.is_file() else {}

    def compare(self, name: str, ours: Tensor | float | int | bool) -> None:
        """Asserts that `ours` equals the recorded output and records that it was compared.

        Floating-point tensors may differ by `tolerance` times the largest magnitude of the recorded tensor; others
        must be equal. Non-finite values must stand at the same places.

        Raises:
            AssertionError: different value, shape or kind of number; the message names case and output.
            KeyError: the case has no such output.
        """
        where = f"{self.folder}: output {name!r}"
        if name not in self.spec["outputs"]:
            raise KeyError(f"{where} is not in case.json, which has: {self.output_names}")
        expected = self.outputs[name]
        if isinstance(ours, Tensor):
            assert ours is not expected, f"{where} was compared with itself"
            ours = ours.detach().cpu()
        else:
            ours = torch.tensor(ours)
        assert ours.shape == expected.shape, f"{where}: shape {tuple(ours.shape)}, recorded {tuple(expected.shape)}"
        assert ours.is_floating_point() == expected.is_floating_point(), (
            f"{where}: {ours.dtype}, recorded {expected.dtype}"
        )
        if not expected.is_floating_point():
            assert torch.equal(ours.to(torch.int64), expected.to(torch.int64)), (
                f"{where}: {(ours != expected).sum().item()} of {expected.numel()} values differ"
            )
            self.compared[name] = 0.0
            return
        ours, expected = ours.double(), expected.double()
        finite = expected.isfinite()
        assert torch.equal(ours.isfinite(), finite), f"{where}: non-finite values stand at other places"
        same = (ours[~finite] == expected[~finite]) | (ours[~finite].isnan() & expected[~finite].isnan())
        assert same.all(), f"{where}: non-finite values differ"
        error = relative_error(ours, expected)
        assert error <= self.tolerance, f"{where}: relative error {error:.2e}, allowed {self.tolerance:.0e}"
        self.compared[name] = error

    def leave_out(self, name: str, reason: str) -> None:
        """Declares one output of this recording as not computed, which `finish` reports as a warning."""
        self.left_out[name] = reason

    def finish(self, not_computed: Mapping[str, str] | None = None) -> None:
        """Asserts that no output was left out.

        Args:
            not_computed: output name or shell pattern -> why the package does not compute it; reported as a warning.
        """
        reasons = not_computed or {}
        left_out = [name for name in self.output_names if name not in self.compared]
        unexplained = []
        for name in left_out:
            declared = (why for pattern, why in reasons.items() if fnmatchcase(name, pattern))
            reason = self.left_out.get(name) or next(declared, None)
            if reason is None:
                unexplained.append(name)
            else:
                warnings.warn(f"{self.kind} ({self.folder}): {name} not computed: {reason}", NotComputedWarning, 2)
        assert not unexplained, f"{self.folder}: outputs that no test compared: {unexplained}"
        # Another case of the kind may lack what a pattern is for.
        stale = [p for p in reasons if any(fnmatchcase(name, p) for name in self.compared)
                 and not any(fnmatchcase(name, p) for name in left_out)]  # fmt: skip
        assert not stale, f"{self.folder}: declared as not computed, yet compared: {stale}"


def compare(case: Case, name: str, ours: Tensor | float | int | bool) -> None:
    """Same as `case.compare(name, ours)`."""
    case.compare(name, ours)


def find_cases(kind: str | None = None, system: str | None = None) -> list[Case]:
    """Cases under all roots, of one kind or of one system, sorted by folder within a root."""
    found = []
    for root in reference_roots():
        for path in sorted(root.glob("*/*/case.json")):
            case = Case(path.parent, json.loads(path.read_text(encoding="utf-8")))
            if (kind is None or kind in case.kinds) and system in (None, case.system):
                found.append(case)
    return found


def reference(
    kind: str, *, not_computed: Mapping[str, str] | None = None, complete: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: runs a test function once for each recorded case of `kind`, given as the argument `case`.

    Args:
        kind: `<system>/<case>`.
        not_computed: output name or shell pattern -> reason. Everything else must be compared by the function.
        complete: False for a further test of a kind whose outputs another function covers.

    Without any folder of cases the test is skipped, but fails where the environment variable `CI` is set.
    """
    cases = find_cases(kind)
    if complete:
        REGISTERED_KINDS.add(kind)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, case: Case | None, **kwargs: Any) -> None:
            if case is None:
                message = (
                    f"no reference case {kind!r} under {[str(r) for r in reference_roots()] or str(DEFAULT_ROOT)}; "
                    f"set {ENVIRONMENT_VARIABLE} to the folder that holds the cases"
                )
                if os.environ.get("CI"):
                    pytest.fail(message)
                pytest.skip(message)
            # A fresh record, as a case object may serve several tests.
            case = Case(case.folder, case.spec)
            function(*args, case=case, **kwargs)
            if complete:
                case.finish(not_computed)

        names = [f"{case.folder.parent.parent.name}/{case.kind}" for case in cases]
        return pytest.mark.parametrize("case", cases or [None], ids=names or [f"no-{kind}"])(run)

    return decorate
