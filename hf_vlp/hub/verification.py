"""Does a saved folder work where this package is not installed?"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_vlp.hub import probe as probe_module
from hf_vlp.hub.card import CARD_FILE

# Makes `import hf_vlp` fail as it does where the package is missing, then runs scripts, each with its arguments, and
# writes what each printed: one process for all, since importing torch and transformers takes most of the time.
_WITHOUT_PACKAGE = """
import contextlib, io, json, runpy, sys
sys.modules["hf_vlp"] = None
printed = []
for command in json.loads(sys.argv[1]):
    sys.argv = command
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(command[0], run_name="__main__")
    printed.append(out.getvalue())
sys.stdout.write(json.dumps(printed))
"""


class VerificationError(RuntimeError):
    """A folder does not load without this package, or computes something else there."""


@dataclass
class VerificationReport:
    """What was compared.

    Attributes:
        folder: the folder.
        differences: name of an output -> largest absolute difference to the model it was saved from.
        snippets: the card's Python snippets that ran, with what they printed.
    """

    folder: Path
    differences: dict[str, float] = field(default_factory=dict)
    snippets: list[str] = field(default_factory=list)

    @property
    def largest(self) -> float:
        return max(self.differences.values(), default=0.0)


def verify_folder(
    folder: str | Path,
    *,
    model: Any = None,
    processor: Any = None,
    tolerance: float = 1e-5,
    snippets: bool = True,
    timeout: float = 600.0,
) -> VerificationReport:
    """Loads a folder in a process that can't import this package, and compares.

    Args:
        folder: a saved folder.
        model: the model that it was saved from; loaded from the folder by this package's classes where None.
        processor: the same for the processor.
        tolerance: largest absolute difference allowed in any output. Token ids must be equal.
        snippets: also run the Python snippets of the card, with the folder in place of the repository's name.
        timeout: seconds for that process.

    Raises:
        VerificationError: it does not load, differs, or a snippet fails; the message holds the end of the output.
    """
    folder = Path(folder).resolve()
    report = VerificationReport(folder)
    if model is None:
        model, processor = probe_module.load(str(folder))
    training = model.training
    expected = probe_module.probe(model, processor)
    model.train(training)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "outputs.safetensors"
        scripts = [[probe_module.__file__, str(folder), str(output)]]
        if snippets and (folder / CARD_FILE).is_file():
            scripts += [[str(path)] for path in write_snippets(folder, Path(scratch))]
        _, *report.snippets = run_without_package(scripts, cwd=scratch, timeout=timeout)
        found = load_file(output)
        if set(found) != set(expected):
            raise VerificationError(
                f"{folder}: other outputs without hf_vlp: {sorted(set(found) ^ set(expected))} on one side only"
            )
        for name, value in expected.items():
            report.differences[name] = _difference(folder, name, value, found[name], tolerance)
    return report


def _difference(folder: Path, name: str, expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> float:
    if expected.shape != found.shape:
        raise VerificationError(f"{folder}: {name} has shape {tuple(found.shape)} for {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    difference = (expected.double() - found.double()).abs().max().item()
    allowed = tolerance if expected.is_floating_point() else 0.0
    if not difference <= allowed:  # also false for NaN
        raise VerificationError(
            f"{folder}: {name} differs by {difference:.3g} (allowed: {allowed:g}) from the model it was saved from"
        )
    return difference


def card_snippets(text: str) -> list[str]:
    """The Python blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def write_snippets(folder: Path, scratch: Path) -> list[Path]:
    """The card's Python blocks as scripts beside a `photo.png`, with the folder in place of the repository's name."""
    text = (folder / CARD_FILE).read_text(encoding="utf-8")
    probe_module.picture(1).save(scratch / "photo.png")
    scripts = []
    for number, snippet in enumerate(card_snippets(text)):
        # The name that the card loads is the only string that follows `from_pretrained(` or `model=`.
        local = re.sub(
            r'(from_pretrained\(|model=)"[^"]+"', lambda found: f"{found[1]}{json.dumps(str(folder))}", snippet
        )
        scripts.append(scratch / f"snippet_{number}.py")
        scripts[-1].write_text(local, encoding="utf-8")
    return scripts


def run_without_package(scripts: list[list[str]], *, cwd: str | Path, timeout: float = 600.0) -> list[str]:
    """Runs Python files, each with its arguments, in a process where `import hf_vlp` fails and there is no network.

    Returns:
        What each printed.

    Raises:
        VerificationError: one failed, or all together took more than `timeout` seconds.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(cwd) / "modules"), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", _WITHOUT_PACKAGE, json.dumps(scripts)]
    names = ", ".join(Path(script[0]).name for script in scripts)
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(f"{names} did not end within {timeout:g} s") from error
    if done.returncode:
        raise VerificationError(f"{names} failed without hf_vlp:\n{done.stderr.strip()[-3000:]}")
    return json.loads(done.stdout)
